//! The way out: what the guest sends is held in the guard, or leaves at once while there is nobody to wait for.
//!
//! I3 lives here: a frame leaves only through [`Egress::release`] and [`Egress::collect`], and both want the proof that
//! consensus allows it now ([`Replica::may_release`], R17): that its slot was acknowledged, or that nobody else may lead.

use consensus::{Release, Replica, View};
use dataplane::frame::is_bare_ack;
use dataplane::guard::{Guard, SlotMark};
use dataplane::uplink::Uplink;
use hdrhistogram::Histogram;

use super::slots::histogram;
use crate::device::{FrameSink, NetDevice};

/// Frames taken from the guest in one turn of the reactor.
const TX_BUDGET_FRAMES: usize = 256;
/// Held frames that leave in one turn: more than a turn adds, so that a release comes to an end, and few enough that
/// heartbeats do not wait for a full guard.
const RELEASE_BUDGET_FRAMES: usize = 2 * TX_BUDGET_FRAMES;

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
    releasing: Option<Releasing>,
    held_us: Histogram<u64>,
    answers: Answers,
}

/// What the guest has sent and somebody may wait for: every frame but bare acknowledgements.
#[derive(Debug, Clone, Copy, Default)]
struct Answers {
    /// Held in the present slot.
    held: u64,
    /// Held in the slot before.
    before: u64,
    /// When the last one came.
    newest_us: u64,
}

impl Answers {
    fn note(&mut self, now_us: u64, answers: u64) {
        if answers > 0 {
            self.held += answers;
            self.newest_us = now_us;
        }
    }

    fn end_slot(&mut self) {
        self.before = std::mem::take(&mut self.held);
    }

    fn newest_us(&self) -> Option<u64> {
        (self.held > 0).then_some(self.newest_us)
    }
}

/// The guard as the place where the guest's frames go: copied once, from the ring into it.
struct Hold<'a> {
    guard: &'a mut Guard,
    now_us: u64,
    refused: bool,
    answers: u64,
}

impl FrameSink for Hold<'_> {
    #[inline]
    fn room(&mut self, len_bytes: usize) -> Option<&mut [u8]> {
        let room = self.guard.room(len_bytes).ok();
        self.refused |= room.is_none();
        room
    }

    #[inline]
    fn commit(&mut self) -> bool {
        self.answers += u64::from(!is_bare_ack(self.guard.offered()));
        self.guard.commit(self.now_us);
        true
    }
}

/// What [`Egress::collect`] took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collected {
    /// Frames.
    pub frames: usize,
    /// There may be more at once.
    pub more: bool,
    /// The guard had no room for the next one. It stays in the ring, and the guest was not asked to say so again.
    pub refused: bool,
}

/// Slots that may leave, and are on their way out.
#[derive(Debug, Clone, Copy)]
struct Releasing {
    through: SlotMark,
    view: View,
    reason: Release,
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
    pub fn new(guard: Guard, uplink: Box<dyn Uplink>) -> Self {
        Self {
            guard,
            port: Port { uplink, handed: 0, failure: None },
            direct: false,
            releasing: None,
            held_us: histogram(),
            answers: Answers::default(),
        }
    }

    /// Takes what the guest has sent. It leaves at once if that is the mode and there is proof; without proof the mode
    /// ends. Returns how many frames were taken; the budget's worth means that there may be more at once, otherwise the
    /// guest kicks.
    pub fn collect(&mut self, device: &mut NetDevice, now_us: u64, proof: Option<ReleaseProof>) -> Collected {
        self.direct &= proof.is_some();
        let (guard, port) = (&mut self.guard, &mut self.port);
        let mut refused = false;
        let frames = if self.direct {
            device.collect_tx(TX_BUDGET_FRAMES, &mut |frame| {
                port.send(frame);
                true
            })
        } else {
            let mut hold = Hold { guard, now_us, refused: false, answers: 0 };
            let frames = device.collect(TX_BUDGET_FRAMES, &mut hold);
            refused = hold.refused;
            self.answers.note(now_us, hold.answers);
            frames
        };
        Collected { frames, more: frames == TX_BUDGET_FRAMES, refused }
    }

    /// When the guest last sent something in this slot that somebody may wait for.
    pub fn newest_answer_us(&self) -> Option<u64> {
        self.answers.newest_us()
    }

    /// How many frames that somebody may wait for this slot has.
    pub fn answers(&self) -> u64 {
        self.answers.held
    }

    /// How many the slot before had.
    pub fn answers_before(&self) -> u64 {
        self.answers.before
    }

    /// Whether frames leave at once.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Ends the present slot: what is held now belongs to it, what comes later does not.
    pub fn seal(&mut self) -> SlotMark {
        self.answers.end_slot();
        self.guard.seal()
    }

    /// The frames of all slots through `through` may leave, as long as there is proof of `view` and `reason`: they do in
    /// this turn and those that follow ([`Egress::go_on_releasing`]).
    pub fn release(&mut self, through: SlotMark, view: View, reason: Release, _proof: ReleaseProof) {
        self.releasing = Some(Releasing { through, view, reason });
    }

    /// As [`Egress::release`], at once and whatever it takes.
    pub fn release_all(&mut self, now_us: u64, through: SlotMark, proof: ReleaseProof) {
        while self.release_some(now_us, through, &proof) == RELEASE_BUDGET_FRAMES {}
    }

    /// Whether frames that may leave are still held.
    pub fn is_releasing(&self) -> bool {
        self.releasing.is_some()
    }

    /// Lets a turn's worth of frames leave, if they still may. Frames that may not any more stay held, and leave with a
    /// later slot or are forgotten with it. Returns how many left.
    pub fn go_on_releasing(&mut self, now_us: u64, replica: &Replica) -> usize {
        let Some(Releasing { through, view, reason }) = self.releasing else { return 0 };
        let Some(proof) = ReleaseProof::new(replica, view, reason) else {
            self.releasing = None;
            return 0;
        };
        let released = self.release_some(now_us, through, &proof);
        if released < RELEASE_BUDGET_FRAMES {
            self.releasing = None;
            self.direct = matches!(reason, Release::Alone) && self.guard.frames() == 0;
        }
        released
    }

    fn release_some(&mut self, now_us: u64, through: SlotMark, _proof: &ReleaseProof) -> usize {
        let (port, held_us) = (&mut self.port, &mut self.held_us);
        self.guard.release_some(through, RELEASE_BUDGET_FRAMES, |frame, arrival_us| {
            held_us.saturating_record(now_us.saturating_sub(arrival_us));
            port.send(frame);
        })
    }

    /// From now on frames leave at once, or as soon as those that are held have left.
    pub fn set_direct(&mut self, view: View, proof: ReleaseProof) {
        if self.direct || self.is_releasing() {
            return;
        }
        if self.guard.frames() == 0 {
            self.direct = true;
            return;
        }
        let mark = self.seal();
        self.release(mark, view, Release::Alone, proof);
    }

    /// From now on frames are held.
    pub fn set_held(&mut self) {
        self.direct = false;
        // What is still on its way out because nobody had to be waited for is held with the rest.
        self.releasing = self.releasing.filter(|releasing| !matches!(releasing.reason, Release::Alone));
    }

    /// Forgets the frames of all slots through `mark`: another replica has sent them.
    pub fn discard(&mut self, mark: SlotMark) {
        self.guard.discard(mark);
    }

    /// Forgets everything: the guest that said it is no longer part of the group.
    pub fn discard_all(&mut self) {
        self.releasing = None;
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

    /// How long frames were held before they left.
    pub fn held_us(&self) -> &Histogram<u64> {
        &self.held_us
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_by_slot_and_acknowledgements_are_not_news() {
        let mut answers = Answers::default();
        answers.note(5, 0);
        assert_eq!(answers.newest_us(), None);
        answers.note(6, 3);
        answers.note(7, 1);
        answers.note(8, 0);
        assert_eq!((answers.held, answers.newest_us()), (4, Some(7)));
        answers.end_slot();
        assert_eq!((answers.held, answers.before, answers.newest_us()), (0, 4, None), "a slot of its own");
        answers.end_slot();
        assert_eq!(answers.before, 0);
    }
}
