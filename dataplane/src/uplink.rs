//! Where a VM's frames enter and leave a host.
//!
//! One trait, burst-wise and object-safe: the reactor pays one indirect call for a burst of frames and does not care
//! which port it has. Frames are read straight into the batch that is proposed, and what is sent leaves at the end of a
//! turn, so that a port may hand over many frames at once.

pub mod af_packet;
pub mod announce;
#[cfg(feature = "dpdk")]
pub mod dpdk;
pub mod filter;
mod interface;
pub mod offload;
pub mod tap;

use crate::batch::{BatchBuilder, Building};
use filter::{Action, Filter};
use std::io;
use std::ops::DerefMut;
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

/// What one call of [`Uplink::recv_burst`] or [`Uplink::discard_burst`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Burst {
    /// Frames taken from the port.
    pub frames: usize,
    /// There may be more at once: the budget or the room ended the burst, not the port.
    pub more: bool,
}

/// Frames that a port lost since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UplinkDrops {
    /// Outbound: the port's queue was full.
    pub full: u64,
    /// Outbound: the port refused the frame (bad vnet header, too short or too long, link down).
    pub refused: u64,
    /// Inbound: the port had no room for them, because nobody took its frames in time.
    pub missed: u64,
}

impl UplinkDrops {
    /// Outbound frames that were lost.
    pub fn outbound(&self) -> u64 {
        self.full + self.refused
    }
}

/// Where the frames of a burst land: straight in the batch that will be proposed, if the filter lets them pass.
#[derive(Debug)]
pub struct Intake<'a> {
    batch: Building<'a>,
    filter: &'a mut Filter,
}

impl<'a> Intake<'a> {
    /// Frames that `filter` lets pass go into `batch`.
    pub fn new<M>(batch: &'a mut BatchBuilder<M>, filter: &'a mut Filter) -> Intake<'a>
    where
        M: DerefMut<Target = [u8]>,
    {
        Intake { batch: batch.building(), filter }
    }

    /// Room for one frame of up to `max` bytes, or `None` when the batch must be proposed first.
    pub fn spare(&mut self, max: usize) -> Option<&mut [u8]> {
        self.batch.spare(max)
    }

    /// Makes the first `len` bytes of what [`spare`](Self::spare) gave the next frame, unless the filter drops it or no
    /// frame has that length. A packet that continues the one before it becomes a part of that.
    ///
    /// # Panics
    /// If no room of at least `len` bytes was given.
    pub fn commit(&mut self, len: usize) {
        let frame = self.batch.offered(len);
        if self.filter.decide(frame) == Action::Order && !self.batch.join(len) {
            // The only error is a bad length, and a port that makes such a frame has nothing to be told.
            let _ = self.batch.commit(len);
        }
    }
}

/// A port towards the clients of the VM. Nonblocking; owned by the reactor thread.
pub trait Uplink: Send {
    /// The port's name, for messages.
    fn name(&self) -> &str;

    /// Takes up to `budget_frames` frames (vnet header included), as many as fit `into`.
    ///
    /// # Errors
    /// The port is gone; no later call will succeed.
    fn recv_burst(&mut self, into: &mut Intake<'_>, budget_frames: usize) -> io::Result<Burst>;

    /// Throws up to `budget_frames` waiting frames away: a replica that does not serve has no use for them.
    ///
    /// # Errors
    /// The port is gone; no later call will succeed.
    fn discard_burst(&mut self, budget_frames: usize) -> io::Result<Burst>;

    /// Sends one frame (vnet header included), at the latest in [`flush`](Self::flush). `false`: the port did not take
    /// it; it is dropped and counted, as a switch would. One that was taken may still be dropped in `flush`; only
    /// [`drops`](Self::drops) tells.
    ///
    /// # Errors
    /// The port is gone; no later call will succeed.
    fn send(&mut self, frame: &[u8]) -> io::Result<bool>;

    /// Hands what [`send`](Self::send) took to the wire. Called once per turn of the reactor.
    ///
    /// # Errors
    /// The port is gone; no later call will succeed.
    fn flush(&mut self) -> io::Result<()>;

    /// Readable while a frame waits (level-triggered); `None` when the port can only be polled. The number stays the
    /// same as long as the port lives.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Sets what the guest can take; the port undoes all other offloads before a frame arrives.
    ///
    /// # Errors
    /// The port refused.
    fn set_offload(&mut self, features: OffloadFlags) -> io::Result<()>;

    /// What was lost so far. Costs at most one system call; not for every frame.
    fn drops(&mut self) -> UplinkDrops;
}
