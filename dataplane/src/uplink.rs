//! Where a VM's frames enter and leave a host.
//!
//! One trait, because AF_PACKET and DPDK ports follow; a [`tap::Tap`] is the first.

pub mod announce;
pub mod tap;

use std::io;
use std::os::fd::BorrowedFd;

/// Offloads that the guest accepted, so that frames may arrive with checksums left to compute and
/// unsegmented (virtio 1.2 §5.1.3, `VIRTIO_NET_F_GUEST_*`).
///
/// UFO and USO are left out on purpose: a guest restored on a host without them cannot renegotiate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OffloadFlags {
    /// Partial checksums. Without it the others have no effect.
    pub csum: bool,
    /// TCP over IPv4 up to 64 KiB.
    pub tso4: bool,
    /// TCP over IPv6 up to 64 KiB.
    pub tso6: bool,
    /// TSO packets with ECN set.
    pub ecn: bool,
}

/// A port towards the clients of the VM. Nonblocking; owned by the reactor thread.
pub trait Uplink: Send {
    /// Takes one frame (vnet header included) into `buf` and returns its length, or `None` when
    /// nothing waits. `buf` must hold [`MAX_FRAME_BYTES`](crate::MAX_FRAME_BYTES).
    ///
    /// # Errors
    /// The port is gone; no later call will succeed.
    fn recv(&mut self, buf: &mut [u8]) -> io::Result<Option<usize>>;

    /// Sends one frame (vnet header included). `false`: the port did not take it (queue full, link
    /// down, a header that makes no sense); it is dropped and counted, as a switch would.
    ///
    /// # Errors
    /// The port is gone; no later call will succeed.
    fn send(&mut self, frame: &[u8]) -> io::Result<bool>;

    /// Readable when [`recv`](Self::recv) has a frame.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Sets what the guest can take; the port undoes all other offloads before a frame arrives.
    ///
    /// # Errors
    /// The port refused.
    fn set_offload(&mut self, features: OffloadFlags) -> io::Result<()>;
}
