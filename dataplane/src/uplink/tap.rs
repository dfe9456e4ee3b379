//! A TAP device as uplink.
//!
//! Frames carry the 12-byte vnet header (`IFF_VNET_HDR`), so offloads pass through. The device lives
//! as long as the [`Tap`]: a daemon that dies leaves nothing behind, and a bridge stops forwarding to a
//! dead host at once. Rejected: a persistent TAP made by the operator (two daemons could share it).

use super::interface::{self, check};
use super::{Burst, Intake, OffloadFlags, Uplink, UplinkDrops};
use crate::frame::{MAX_FRAME_BYTES, VNET_HEADER_BYTES};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

const TUN_PATH: &str = "/dev/net/tun";
// linux/if_tun.h and linux/sockios.h; the libc crate does not have all of them for every target.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const SIOCBRADDIF: libc::c_ulong = 0x89a2;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;

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
    fd: OwnedFd,
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
        let bad_name = || TapError::BadName { name: name.to_owned() };
        let plain = interface::request(name).ok_or_else(bad_name)?;
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
        let mut request = plain;
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        interface::ioctl(&fd, TUNSETIFF, &mut request).map_err(|source| match source.raw_os_error() {
            Some(libc::EPERM) => TapError::NotPermitted { name: name.to_owned() },
            Some(libc::EBUSY | libc::EINVAL) => TapError::InUse { name: name.to_owned() },
            _ => fail("TUNSETIFF", source),
        })?;
        let scratch = vec![0; MAX_FRAME_BYTES].into_boxed_slice();
        let mut tap = Tap { fd, name: name.to_owned(), drops: UplinkDrops::default(), scratch };
        let mut header_bytes = VNET_HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int through the pointer, which points to one.
        let result = unsafe { libc::ioctl(tap.fd.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw mut header_bytes) };
        check(result).map_err(|source| fail("TUNSETVNETHDRSZ", source))?;
        tap.set_offload(OffloadFlags::default()).map_err(|source| fail("TUNSETOFFLOAD", source))?;
        disable_ipv6(name);
        let control = interface::control_socket().map_err(|source| fail("opening a control socket", source))?;
        if let Some(bridge) = bridge {
            attach(&control, name, plain, bridge)?;
        }
        interface::bring_up(&control, plain).map_err(|source| fail("bringing the link up", source))?;
        Ok(tap)
    }
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
        for frames in 0..budget_frames {
            let Some(spare) = into.spare(MAX_FRAME_BYTES) else {
                return Ok(Burst { frames, more: true });
            };
            match read_frame(&self.fd, spare)? {
                Some(len) => into.commit(len),
                None => return Ok(Burst { frames, more: false }),
            }
        }
        Ok(Burst { frames: budget_frames, more: true })
    }

    fn discard_burst(&mut self, budget_frames: usize) -> io::Result<Burst> {
        for frames in 0..budget_frames {
            if read_frame(&self.fd, &mut self.scratch)?.is_none() {
                return Ok(Burst { frames, more: false });
            }
        }
        Ok(Burst { frames: budget_frames, more: true })
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<bool> {
        match rustix::io::write(&self.fd, frame) {
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
        Some(self.fd.as_fd())
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
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD as _, flags) })
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
