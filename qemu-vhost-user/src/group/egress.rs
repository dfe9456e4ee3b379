//! The way out: what the guest sends is held in the guard, or leaves at once while there is nobody to wait for.
//!
//! I3 lives here: a frame leaves only through [`Egress::release`] and [`Egress::collect`], and both want the proof that
//! consensus allows it now ([`Replica::may_release`], R17): that its slot was acknowledged, or that nobody else may lead.

use consensus::{Release, Replica, View};
use dataplane::guard::{Guard, SlotMark};
use dataplane::uplink::Uplink;

use crate::device::NetDevice;

/// Frames taken from the guest in one turn of the reactor.
const TX_BUDGET_FRAMES: usize = 256;

/// Proof that frames may leave: made only when consensus says so, and used up before its next event.
#[derive(Debug)]
pub struct ReleaseProof(());

impl ReleaseProof {
    /// `view` is the view in which the reason to release arose.
    pub fn new(replica: &Replica, view: View, reason: Release) -> Option<Self> {
        replica.may_release(view, reason).then_some(Self(()))
    }
}

/// The guard, the rule, and the device that the frames leave by.
pub struct Egress {
    guard: Guard,
    port: Port,
    direct: bool,
}

/// The uplink with what was handed to it.
struct Port {
    uplink: Box<dyn Uplink>,
    handed: u64,
    failure: Option<std::io::Error>,
}

impl Port {
    /// Hands one frame over; a full queue drops it as a full NIC would, and TCP repairs that.
    fn send(&mut self, frame: &[u8]) {
        match self.uplink.send(frame) {
            Ok(_) => self.handed += 1,
            Err(error) => self.failure = Some(error),
        }
    }
}

impl Egress {
    /// Holds everything until told otherwise.
    pub fn new(guard_bytes: usize, uplink: Box<dyn Uplink>) -> Self {
        Self { guard: Guard::new(guard_bytes), port: Port { uplink, handed: 0, failure: None }, direct: false }
    }

    /// Takes what the guest has sent. It leaves at once if that is the mode and there is proof; without proof the mode
    /// ends. Returns whether there may be more at once; otherwise the guest kicks.
    pub fn collect(&mut self, device: &mut NetDevice, now_us: u64, proof: Option<ReleaseProof>) -> bool {
        self.direct &= proof.is_some();
        let (guard, port) = (&mut self.guard, &mut self.port);
        let taken = if self.direct {
            device.collect_tx(TX_BUDGET_FRAMES, &mut |frame| {
                port.send(frame);
                true
            })
        } else {
            device.collect_tx(TX_BUDGET_FRAMES, &mut |frame| guard.push(now_us, frame).is_ok())
        };
        taken == TX_BUDGET_FRAMES
    }

    /// Ends the present slot: what is held now belongs to it, what comes later does not.
    pub fn seal(&mut self) -> SlotMark {
        self.guard.seal()
    }

    /// Lets the frames of all slots through `mark` leave.
    pub fn release(&mut self, mark: SlotMark, _proof: ReleaseProof) -> usize {
        let port = &mut self.port;
        self.guard.release(mark, |frame| port.send(frame))
    }

    /// From now on frames leave at once; what is held leaves first.
    pub fn set_direct(&mut self, proof: ReleaseProof) {
        if !self.direct {
            let mark = self.guard.seal();
            self.release(mark, proof);
            self.direct = true;
        }
    }

    /// From now on frames are held.
    pub fn set_held(&mut self) {
        self.direct = false;
    }

    /// Forgets the frames of all slots through `mark`: another replica has sent them.
    pub fn discard(&mut self, mark: SlotMark) {
        self.guard.discard(mark);
    }

    /// Forgets everything: the guest that said it is no longer part of the group.
    pub fn discard_all(&mut self) {
        self.guard.discard_all();
    }

    /// Sends a frame of ours (an announcement, which says nothing of the guest), if there is room for it.
    pub fn announce(&mut self, frame: &[u8]) {
        self.port.send(frame);
    }

    /// Hands everything that was sent in this turn to the wire.
    ///
    /// # Errors
    /// The uplink is gone, now or since an earlier frame of this turn.
    pub fn flush(&mut self) -> std::io::Result<()> {
        match self.port.failure.take() {
            Some(error) => Err(error),
            None => self.port.uplink.flush(),
        }
    }

    /// The uplink, for receiving and settings.
    pub fn uplink(&mut self) -> &mut dyn Uplink {
        &mut *self.port.uplink
    }

    /// The guard, for looking at.
    pub fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Frames that left, and frames that the uplink lost, in either direction.
    pub fn counts(&mut self) -> (u64, u64) {
        let drops = self.port.uplink.drops();
        (self.port.handed.saturating_sub(drops.outbound()), drops.outbound() + drops.missed)
    }
}
