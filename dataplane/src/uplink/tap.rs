//! A TAP device as uplink.
//!
//! Frames carry the 12-byte vnet header (`IFF_VNET_HDR`), so offloads pass through. The device lives
//! as long as the [`Tap`]: a daemon that dies leaves nothing behind, and a bridge stops forwarding to a
//! dead host at once. Rejected: a persistent TAP made by the operator (two daemons could share it).

use super::interface::{self, check};
use super::{Burst, Intake, OffloadFlags, Uplink, UplinkDrops};
use crate::frame::{MAX_FRAME_BYTES, VNET_HEADER_BYTES};
use rustix::event::epoll;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

const TUN_PATH: &str = "/dev/net/tun";
// linux/if_tun.h and linux/sockios.h; the libc crate does not have all of them for every target.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const IFF_TUN_EXCL: libc::c_int = 0x8000;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;

/// Frames that are taken from one queue before the next has its turn.
const QUEUE_BURST: usize = 64;

/// Why a TAP could not be made. Each text names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel would not take the name.
    #[error("\"{name}\" cannot name a network interface: use 1 to 15 bytes without '/', ':' or blanks")]
    BadName {
        /// The name.
        name: String,
    },
    /// The tun module is not there.
    #[error("{TUN_PATH} is missing: load the kernel's tun module (modprobe tun)")]
    NoTunDevice,
    /// Not allowed to make interfaces.
    #[error("no permission to create the TAP {name}: run as root or grant CAP_NET_ADMIN")]
    NotPermitted {
        /// The TAP's name.
        name: String,
    },
    /// Somebody else has the name.
    #[error(
        "the interface {name} exists already and is in use: is another plover or QEMU running with \
         this uplink? Stop it or choose another name"
    )]
    InUse {
        /// The TAP's name.
        name: String,
    },
    /// The bridge does not exist, or is no bridge.
    #[error(
        "{bridge} is not a bridge on this host: create it (ip link add {bridge} type bridge) or correct the uplink"
    )]
    NoBridge {
        /// The bridge's name.
        bridge: String,
    },
    /// Anything else.
    #[error("TAP {name}: {action} failed")]
    Io {
        /// The TAP's name.
        name: String,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// An open TAP device.
#[derive(Debug)]
pub struct Tap {
    /// At least one.
    queues: Vec<OwnedFd>,
    /// Readable while any of several is.
    any: Option<OwnedFd>,
    /// Whose turn it is.
    next: usize,
    name: String,
    drops: UplinkDrops,
    /// Where frames go that nobody wants.
    scratch: Box<[u8]>,
}

impl Tap {
    /// Creates the TAP `name`, attaches it to `bridge` if one is given, and brings it up. IPv6 is
    /// switched off on it, so that the host itself does not talk into the VM's link.
    ///
    /// # Errors
    /// [`TapError`]; nothing is left behind.
    pub fn open(name: &str, bridge: Option<&str>) -> Result<Tap, TapError> {
        Tap::open_queues(name, bridge, 1)
    }

    /// The same with several queues. Each has a lock and room for frames of its own, so that senders on different cores of
    /// the host do not wait for one another; they are still emptied by one thread, in turn.
    ///
    /// # Errors
    /// [`TapError`]; nothing is left behind.
    ///
    /// # Panics
    /// Without a queue.
    pub fn open_queues(name: &str, bridge: Option<&str>, queues: u16) -> Result<Tap, TapError> {
        assert!(queues > 0, "a TAP has at least one queue");
        let fail = |action| move |source| TapError::Io { name: name.to_owned(), action, source };
        let bad_name = || TapError::BadName { name: name.to_owned() };
        let plain = interface::request(name).ok_or_else(bad_name)?;
        let queues = (0..queues)
            // A second daemon must not join the first one's device as one more queue of it.
            .map(|at| match (queues, at) {
                (1, _) => open_queue(name, plain, 0),
                (_, 0) => open_queue(name, plain, libc::IFF_MULTI_QUEUE | IFF_TUN_EXCL),
                (_, _) => open_queue(name, plain, libc::IFF_MULTI_QUEUE),
            })
            .collect::<Result<Vec<OwnedFd>, TapError>>()?;
        let any = any_of(&queues).map_err(fail("watching its queues"))?;
        let scratch = vec![0; MAX_FRAME_BYTES].into_boxed_slice();
        let mut tap = Tap { queues, any, next: 0, name: name.to_owned(), drops: UplinkDrops::default(), scratch };
        let mut header_bytes = VNET_HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int through the pointer, which points to one.
        let result = unsafe { libc::ioctl(tap.queues[0].as_raw_fd(), TUNSETVNETHDRSZ as _, &raw mut header_bytes) };
        check(result).map_err(fail("TUNSETVNETHDRSZ"))?;
        tap.set_offload(OffloadFlags::default()).map_err(fail("TUNSETOFFLOAD"))?;
        disable_ipv6(name);
        let control = interface::control_socket().map_err(fail("opening a control socket"))?;
        if let Some(bridge) = bridge {
            attach(&control, name, plain, bridge)?;
        }
        interface::bring_up(&control, plain).map_err(fail("bringing the link up"))?;
        Ok(tap)
    }

    /// Takes frames from the queues in turn and gives each to `take`, which reads it and says whether there was one.
    fn each_queue(
        &mut self,
        budget_frames: usize,
        mut take: impl FnMut(&OwnedFd, &mut [u8]) -> io::Result<Taken>,
    ) -> io::Result<Burst> {
        let (mut frames, mut found_empty) = (0, 0);
        while found_empty < self.queues.len() {
            let share = QUEUE_BURST.min(budget_frames - frames);
            let mut taken = 0;
            while taken < share {
                match take(&self.queues[self.next], &mut self.scratch)? {
                    Taken::Frame => taken += 1,
                    Taken::NoRoom => return Ok(Burst { frames: frames + taken, more: true }),
                    Taken::Nothing => break,
                }
            }
            frames += taken;
            found_empty = if taken < QUEUE_BURST { found_empty + 1 } else { 0 };
            if frames == budget_frames {
                return Ok(Burst { frames, more: true });
            }
            self.next = (self.next + 1) % self.queues.len();
        }
        Ok(Burst { frames, more: false })
    }

    /// The queue for a frame that leaves: the same for all frames of a flow, because the kernel has the answers come in by the
    /// queue by which the flow left last.
    fn queue_for(&self, frame: &[u8]) -> &OwnedFd {
        if self.queues.len() == 1 {
            return &self.queues[0];
        }
        let packet = &frame[VNET_HEADER_BYTES.min(frame.len())..];
        let flow = match packet.get(12..14) {
            // Addresses and ports.
            Some([0x08, 0x00]) => packet.get(26..38),
            Some([0x86, 0xdd]) => packet.get(22..58),
            _ => None,
        };
        let sum = flow.unwrap_or_default().iter().fold(0usize, |sum, byte| sum.wrapping_mul(31) + usize::from(*byte));
        &self.queues[sum % self.queues.len()]
    }
}

/// What became of an attempt to take a frame.
enum Taken {
    Frame,
    NoRoom,
    Nothing,
}

fn open_queue(name: &str, mut request: libc::ifreq, extra: libc::c_int) -> Result<OwnedFd, TapError> {
    if !Path::new(TUN_PATH).exists() {
        return Err(TapError::NoTunDevice);
    }
    let fail = |action, source| TapError::Io { name: name.to_owned(), action, source };
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
    let fd = rustix::fs::open(TUN_PATH, flags, rustix::fs::Mode::empty()).map_err(|errno| match errno {
        Errno::ACCESS | Errno::PERM => TapError::NotPermitted { name: name.to_owned() },
        Errno::NXIO | Errno::NODEV => TapError::NoTunDevice,
        other => fail("opening /dev/net/tun", other.into()),
    })?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | extra;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    interface::ioctl(&fd, TUNSETIFF, &mut request).map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM) => TapError::NotPermitted { name: name.to_owned() },
        Some(libc::EBUSY | libc::EINVAL) => TapError::InUse { name: name.to_owned() },
        _ => fail("TUNSETIFF", source),
    })?;
    Ok(fd)
}

/// An epoll that is readable while one of several queues is; a single queue needs none.
fn any_of(queues: &[OwnedFd]) -> io::Result<Option<OwnedFd>> {
    if queues.len() == 1 {
        return Ok(None);
    }
    let any = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for queue in queues {
        epoll::add(&any, queue, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    }
    Ok(Some(any))
}

/// Reads one frame, or `None` when nothing waits.
fn read_frame(fd: &OwnedFd, buf: &mut [u8]) -> io::Result<Option<usize>> {
    match rustix::io::read(fd, &mut *buf) {
        Ok(len) if len >= VNET_HEADER_BYTES => {
            // The kernel writes the 10-byte header and skips num_buffers; what stood there before
            // must not get into the log.
            buf[10..12].fill(0);
            Ok(Some(len))
        }
        Ok(len) => Err(io::Error::other(format!("it gave {len} bytes, less than a header"))),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        // The link was set down; like a pulled cable, it may come back.
        Err(Errno::IO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl Uplink for Tap {
    fn name(&self) -> &str {
        &self.name
    }

    fn recv_burst(&mut self, into: &mut Intake<'_>, budget_frames: usize) -> io::Result<Burst> {
        self.each_queue(budget_frames, |queue, _| {
            let Some(spare) = into.spare(MAX_FRAME_BYTES) else { return Ok(Taken::NoRoom) };
            Ok(match read_frame(queue, spare)? {
                Some(len) => {
                    into.commit(len);
                    Taken::Frame
                }
                None => Taken::Nothing,
            })
        })
    }

    fn discard_burst(&mut self, budget_frames: usize) -> io::Result<Burst> {
        self.each_queue(budget_frames, |queue, scratch| {
            Ok(if read_frame(queue, scratch)?.is_some() { Taken::Frame } else { Taken::Nothing })
        })
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<bool> {
        match rustix::io::write(self.queue_for(frame), frame) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::INTR) => {
                self.drops.full += 1;
                Ok(false)
            }
            // EINVAL and EFAULT: the guest wrote nonsense into the header. EIO: link down.
            Err(Errno::INVAL | Errno::FAULT | Errno::IO | Errno::MSGSIZE) => {
                self.drops.refused += 1;
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // A TAP takes one frame per write and has no call that takes several.
        Ok(())
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.any.as_ref().unwrap_or(&self.queues[0]).as_fd())
    }

    fn set_offload(&mut self, features: OffloadFlags) -> io::Result<()> {
        let mut flags = 0;
        if features.csum {
            flags |= TUN_F_CSUM;
            flags |= if features.tso4 { TUN_F_TSO4 } else { 0 };
            flags |= if features.tso6 { TUN_F_TSO6 } else { 0 };
            // The kernel refuses ECN without a TSO.
            flags |= if features.ecn && (features.tso4 || features.tso6) { TUN_F_TSO_ECN } else { 0 };
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.queues[0].as_raw_fd(), TUNSETOFFLOAD as _, flags) })
    }

    fn drops(&mut self) -> UplinkDrops {
        self.drops
    }
}

fn attach(control: &OwnedFd, name: &str, request: libc::ifreq, bridge: &str) -> Result<(), TapError> {
    let fail = |source| TapError::Io { name: name.to_owned(), action: "attaching it to the bridge", source };
    let no_bridge = || TapError::NoBridge { bridge: bridge.to_owned() };
    let index = interface::index(control, request).map_err(fail)?;
    let mut request = interface::request(bridge).ok_or_else(no_bridge)?;
    request.ifr_ifru.ifru_ifindex = index;
    interface::ioctl(control, SIOCBRADDIF, &mut request).map_err(|source| match source.raw_os_error() {
        Some(libc::ENODEV | libc::EOPNOTSUPP | libc::EINVAL) => no_bridge(),
        Some(libc::EPERM) => TapError::NotPermitted { name: name.to_owned() },
        _ => fail(source),
    })
}

/// Best effort: a host without IPv6 has no such file, and chatter is no reason to refuse service.
fn disable_ipv6(name: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    if let Err(error) = std::fs::write(&path, "1") {
        tracing::debug!(%error, path, "IPv6 stays as it is on the TAP");
    }
}
