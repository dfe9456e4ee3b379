//! A network interface of the host as uplink, through a packet socket.
//!
//! Frames arrive in a ring that the kernel fills (no system call for a frame) and leave with one `sendmmsg` a turn. Both carry
//! the vnet header, so offloads pass through; what the guest cannot take is undone in [`super::offload`]. The socket takes the
//! frames for the guest's address and all broadcast and multicast, and never those that this host sends
//! (`PACKET_IGNORE_OUTGOING`, Linux 4.20), so the guest cannot talk to the host itself over this interface.
//!
//! Rejected: TPACKET_V3 (it hands over blocks, a lone packet after a timer of 1 to 4 ms: poison for request and response);
//! AF_XDP (no vnet header, so every large packet and unfinished checksum of the host's stack is wrong or must be forbidden on
//! the interface; needs a BPF program and a driver for the speed); a transmit ring (slots for packets of 64 KiB).

mod ring;
mod socket;

use super::offload::{self, Segments};
use super::{Burst, Intake, OffloadFlags, Uplink, UplinkDrops};
use crate::frame::{MAX_FRAME_BYTES, VNET_HEADER_BYTES, VnetHeader};
use ring::{KERNEL_VNET_BYTES, Received, Ring};
use socket::Wanted;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes of packets that wait for the end of the turn; then they are sent at once.
const OUT_BYTES: usize = 512 << 10;
/// An error of the socket is looked for once in so many polls that found nothing.
const POLLS_PER_LINK_CHECK: u32 = 32;
const MACS_BYTES: usize = 12;
const VLAN_BYTES: usize = 4;

/// Why an interface cannot be used. Each text names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum AfPacketError {
    /// No interface has such a name.
    #[error("\"{name}\" cannot name a network interface: use 1 to 15 bytes without '/', ':' or blanks")]
    BadName {
        /// The name.
        name: String,
    },
    /// There is none.
    #[error("there is no network interface {name} on this host: see «ip link», and correct the uplink")]
    NoInterface {
        /// The name.
        name: String,
    },
    /// Not a port for Ethernet frames.
    #[error("{name} is no Ethernet interface (type {hardware}): name another one")]
    NotEthernet {
        /// The name.
        name: String,
        /// `ARPHRD_*`.
        hardware: u16,
    },
    /// Not allowed to see other people's packets.
    #[error("no permission to open a packet socket on {name}: run as root or grant CAP_NET_RAW and CAP_NET_ADMIN")]
    NotPermitted {
        /// The name.
        name: String,
    },
    /// Anything else.
    #[error("interface {name}: {action} failed (Linux 4.20 or newer is needed)")]
    Io {
        /// The name.
        name: String,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// A packet socket on an interface.
#[derive(Debug)]
pub struct AfPacket {
    socket: OwnedFd,
    ring: Ring,
    slots: usize,
    name: String,
    offloads: OffloadFlags,
    drops: UplinkDrops,
    /// Packets for the end of the turn, each with the kernel's vnet header, and where each ends.
    out: Vec<u8>,
    out_ends: Vec<usize>,
    /// A frame that is being cut for a guest that takes no large ones, and the next piece.
    large: Box<[u8]>,
    cutting: Option<(Segments, usize, usize)>,
    empty_polls: u32,
    /// The link went down, or more than that.
    link_in_doubt: bool,
}

/// What became of the head of the ring.
enum Step {
    Taken,
    NoRoom,
    Empty,
}

impl AfPacket {
    /// Opens the interface `name`, and sets it up. `mac` is the guest's address; `None` takes the frames for all addresses.
    /// Everything is undone when the value is dropped, except that the interface stays up.
    ///
    /// # Errors
    /// [`AfPacketError`]; nothing is left behind.
    pub fn open(name: &str, mac: Option<[u8; 6]>) -> Result<AfPacket, AfPacketError> {
        let (socket, layout) = socket::open(name, mac.map_or(Wanted::Everything, Wanted::Mac))?;
        let mapped = Ring::map(socket.as_fd(), layout);
        let ring =
            mapped.map_err(|source| AfPacketError::Io { name: name.to_owned(), action: "mapping its ring", source })?;
        Ok(AfPacket {
            socket,
            ring,
            slots: layout.slots(),
            name: name.to_owned(),
            offloads: OffloadFlags::default(),
            drops: UplinkDrops::default(),
            out: Vec::with_capacity(OUT_BYTES),
            out_ends: Vec::with_capacity(OUT_BYTES / 60),
            large: vec![0; MAX_FRAME_BYTES].into_boxed_slice(),
            cutting: None,
            empty_polls: 0,
            link_in_doubt: false,
        })
    }

    /// How many frames can wait to be received.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Takes the packet at the head of the ring.
    fn take(&mut self, into: &mut Intake<'_>) -> io::Result<Step> {
        let Some(received) = self.ring.head() else {
            return self.check_link().map(|()| Step::Empty);
        };
        if received.queued {
            return self.take_queued(into);
        }
        let bytes = frame_bytes(&received);
        if received.packet_bytes > received.packet.len() || bytes > MAX_FRAME_BYTES || received.packet.len() < 14 {
            self.drops.missed += 1;
            self.ring.release();
            return Ok(Step::Taken);
        }
        let header = header_of(received.vnet, received.vlan, self.offloads);
        if offload::is_needed(VnetHeader::of(&header).expect("a whole header"), self.offloads) {
            assemble(&header, &received, &mut self.large);
            self.begin_cutting(bytes);
        } else {
            let Some(room) = into.spare(bytes) else { return Ok(Step::NoRoom) };
            assemble(&header, &received, room);
            into.commit(bytes);
        }
        self.ring.release();
        Ok(Step::Taken)
    }

    /// Takes a packet that did not fit its slot.
    fn take_queued(&mut self, into: &mut Intake<'_>) -> io::Result<Step> {
        let Some(received) = self.ring.head() else { return Ok(Step::Empty) };
        let (vlan, tag_bytes) = (received.vlan, received.vlan.map_or(0, |_| VLAN_BYTES));
        let header = header_of(received.vnet, vlan, self.offloads);
        let is_cut = offload::is_needed(VnetHeader::of(&header).expect("a whole header"), self.offloads);
        let room = match is_cut {
            true => &mut self.large[..],
            false => match into.spare(MAX_FRAME_BYTES) {
                Some(room) => room,
                None => return Ok(Step::NoRoom),
            },
        };
        let (head, rest) = room.split_at_mut(VNET_HEADER_BYTES + MACS_BYTES + tag_bytes);
        head[..VNET_HEADER_BYTES].copy_from_slice(&header);
        let (macs, tag) = head[VNET_HEADER_BYTES..].split_first_chunk_mut::<MACS_BYTES>().expect("longer than that");
        tag.copy_from_slice(vlan.as_ref().map_or(&[], |tag| tag));
        let mut result = socket::receive(&self.socket, macs, rest);
        // A note that the link went down comes before the packets that were received until then.
        if matches!(&result, Err(error) if error.raw_os_error() == Some(libc::ENETDOWN)) {
            self.link_in_doubt = true;
            result = socket::receive(&self.socket, macs, rest);
        }
        let packet_bytes = result.ok().filter(|bytes| (14..=MACS_BYTES + rest.len()).contains(bytes));
        self.ring.release();
        match packet_bytes.map(|bytes| VNET_HEADER_BYTES + tag_bytes + bytes) {
            Some(bytes) if is_cut => self.begin_cutting(bytes),
            Some(bytes) => into.commit(bytes),
            None => self.drops.missed += 1,
        }
        Ok(Step::Taken)
    }

    /// The first `bytes` of `large` are a frame for a guest that does not take it as it is.
    fn begin_cutting(&mut self, bytes: usize) {
        match Segments::of(&self.large[..bytes]) {
            Ok(segments) => self.cutting = Some((segments, bytes, 0)),
            Err(_) => self.drops.missed += 1,
        }
    }

    /// Goes on with the frame that is being cut. Returns whether it is done.
    fn cut(&mut self, into: &mut Intake<'_>) -> bool {
        while let Some((segments, bytes, next)) = &mut self.cutting {
            if *next == segments.len() {
                self.cutting = None;
                break;
            }
            let Some(room) = into.spare(segments.bytes(*next)) else { return false };
            let len = segments.write(&self.large[..*bytes], *next, room);
            into.commit(len);
            *next += 1;
        }
        true
    }

    /// Nothing waits: now and then it is worth asking whether anything ever will.
    fn check_link(&mut self) -> io::Result<()> {
        self.empty_polls = self.empty_polls.wrapping_add(1);
        if !self.empty_polls.is_multiple_of(POLLS_PER_LINK_CHECK) {
            return Ok(());
        }
        match socket::take_error(&self.socket) {
            Some(error) if error.raw_os_error() != Some(libc::ENETDOWN) => return Err(error),
            Some(_) => self.link_in_doubt = true,
            None => {}
        }
        // Set down like a pulled cable, it may come up again.
        if std::mem::take(&mut self.link_in_doubt) && !socket::is_bound(&self.socket) {
            return Err(removed());
        }
        Ok(())
    }
}

fn removed() -> io::Error {
    io::Error::other("the interface was removed, renamed away or moved to another namespace: put it back")
}

/// Bytes of the frame that a packet becomes.
fn frame_bytes(received: &Received<'_>) -> usize {
    VNET_HEADER_BYTES + received.packet.len() + received.vlan.map_or(0, |_| VLAN_BYTES)
}

/// The frame's vnet header: the kernel's, with the tag counted that goes back in.
fn header_of(vnet: &[u8; KERNEL_VNET_BYTES], vlan: Option<[u8; 4]>, offloads: OffloadFlags) -> [u8; VNET_HEADER_BYTES] {
    let mut bytes = [0; VNET_HEADER_BYTES];
    bytes[..KERNEL_VNET_BYTES].copy_from_slice(vnet);
    let header: &mut VnetHeader = zerocopy::transmute_mut!(&mut bytes);
    if vlan.is_some() {
        let shift = VLAN_BYTES as u16;
        if header.flags & offload::NEEDS_CSUM != 0 {
            header.csum_start = header.csum_start.get().saturating_add(shift).into();
        }
        if header.gso_type != 0 {
            header.hdr_len = header.hdr_len.get().saturating_add(shift).into();
        }
    }
    if !offloads.csum && header.flags & offload::NEEDS_CSUM == 0 {
        // Such a guest must not be told that a checksum is known to be right either.
        header.flags = 0;
    }
    bytes
}

/// Puts a frame together. `to` has room for [`frame_bytes`].
fn assemble(header: &[u8; VNET_HEADER_BYTES], received: &Received<'_>, to: &mut [u8]) {
    let (macs, rest) = received.packet.split_at(MACS_BYTES);
    let mut at = 0;
    for part in [header.as_slice(), macs, received.vlan.as_ref().map_or(&[], |tag| tag), rest] {
        to[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    }
}

impl Uplink for AfPacket {
    fn name(&self) -> &str {
        &self.name
    }

    fn recv_burst(&mut self, into: &mut Intake<'_>, budget_frames: usize) -> io::Result<Burst> {
        let mut frames = 0;
        while frames < budget_frames {
            if !self.cut(into) {
                return Ok(Burst { frames, more: true });
            }
            match self.take(into)? {
                Step::Taken => frames += 1,
                Step::NoRoom => return Ok(Burst { frames, more: true }),
                Step::Empty => return Ok(Burst { frames, more: false }),
            }
        }
        Ok(Burst { frames, more: true })
    }

    fn discard_burst(&mut self, budget_frames: usize) -> io::Result<Burst> {
        self.cutting = None;
        for frames in 0..budget_frames {
            let Some(received) = self.ring.head() else {
                return self.check_link().map(|()| Burst { frames, more: false });
            };
            if received.queued {
                // Its length does not matter, and an error leaves nothing in the queue that is worth more.
                let _ = socket::receive(&self.socket, &mut [0; MACS_BYTES], &mut []);
            }
            self.ring.release();
        }
        Ok(Burst { frames: budget_frames, more: true })
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<bool> {
        if frame.len() < VNET_HEADER_BYTES + 14 || frame.len() > MAX_FRAME_BYTES {
            self.drops.refused += 1;
            return Ok(false);
        }
        if self.out.len() + frame.len() > OUT_BYTES || self.out_ends.len() == self.out_ends.capacity() {
            self.flush()?;
        }
        self.out.extend_from_slice(&frame[..KERNEL_VNET_BYTES]);
        self.out.extend_from_slice(&frame[VNET_HEADER_BYTES..]);
        self.out_ends.push(self.out.len());
        Ok(true)
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut done = 0;
        while done < self.out_ends.len() {
            let (sent, error) = socket::send(&self.socket, &self.out, &self.out_ends, done);
            done += sent;
            let Some(error) = error else { break };
            match error.raw_os_error() {
                Some(libc::EAGAIN | libc::ENOBUFS | libc::ENOMEM) => {
                    self.drops.full += (self.out_ends.len() - done) as u64;
                    break;
                }
                Some(libc::EINTR) => continue,
                Some(libc::ENXIO | libc::ENODEV) => {
                    self.out.clear();
                    self.out_ends.clear();
                    return Err(removed());
                }
                // EINVAL and EMSGSIZE: the guest wrote nonsense, or more than the link takes. ENETDOWN: the link is down.
                _ => {
                    self.drops.refused += 1;
                    done += 1;
                }
            }
        }
        self.out.clear();
        self.out_ends.clear();
        Ok(())
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }

    fn set_offload(&mut self, features: OffloadFlags) -> io::Result<()> {
        self.offloads = features;
        Ok(())
    }

    fn drops(&mut self) -> UplinkDrops {
        self.drops.missed += socket::take_missed(&self.socket);
        self.drops
    }
}
