//! From committed entries to the guest's RX ring, in log order, each frame once.
//!
//! The queue blocks at a `SyncVm` that concerns this replica until the syncvm lets it go on: nothing behind it may reach
//! the guest before (architecture.md, «edge cases»). A guest that offers no buffers gets a short while to catch up, and
//! then frames are dropped as a NIC's would be, so that a guest that never reads cannot stop the group.
//!
//! A secondary whose guest stands still (`sync = "mc"`) keeps the inputs since the last syncvm instead, and delivers
//! them when it takes over: the syncvm that covers them makes them needless.

use std::collections::VecDeque;

use consensus::{Entry, Event, Index, ReplicaId, View};
use dataplane::batch;

use super::ingress::RX_BUDGET_FRAMES;
use super::ordering::Committed;
use super::reactor::Reactor;
use super::stalls::Stalls;
use crate::device::Inject;

/// How long a guest may offer no RX buffers before its frames are dropped.
const RX_STALL_LIMIT_US: u64 = 50_000;
/// The same while a syncvm waits behind: what is dropped now, the syncvm makes good.
const SYNC_STALL_LIMIT_US: u64 = 20_000;
/// How long a guest's rings may take to start after `cont` before its frames are dropped.
const RING_START_LIMIT_US: u64 = 1_000_000;

/// Frames that are delivered in one turn of the reactor: twice what the ingress takes, so that what waits becomes less.
const DELIVER_BUDGET_FRAMES: usize = 2 * RX_BUDGET_FRAMES;

/// What one turn delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivered {
    /// Frames that reached the guest or were dropped for it.
    pub frames: usize,
    /// The budget ended the turn: there is more at once.
    pub more: bool,
}

/// The queue and the place in it.
#[derive(Debug, Default)]
pub struct Delivery {
    queue: VecDeque<Committed>,
    /// Inputs that came before the queue's and wait until a syncvm makes them needless or this replica leads.
    kept: VecDeque<Committed>,
    /// As `left_bytes`, of the first that is kept.
    kept_left_bytes: Option<usize>,
    /// Inputs that were kept and given to the guest when this replica took over.
    pub taken_over: u64,
    backlog_bytes: usize,
    /// Bytes of the first entry whose frames are not delivered yet; `None` before it was checked.
    left_bytes: Option<usize>,
    applied: Index,
    /// What consensus was told of it.
    told: Index,
    /// Entries up to here were for an earlier daemon or guest: their inputs reached the guest or are lost frames, and
    /// their roles say nothing about the guest that is here.
    pub skip_through: Index,
    /// Syncvms with this replica that are in the queue.
    syncs_queued: usize,
    stalls: Stalls,
    retry_us: u64,
    /// When the last frame reached the guest.
    pub last_injected_us: u64,
    /// Frames that the guest got since its last syncvm.
    pub consumed_since_sync: u64,
    /// Frames that it got between that syncvm and the one before.
    pub consumed_before: u64,
    /// Frames dropped for want of buffers, of a driver, or for being malformed.
    pub frames_dropped: u64,
}

/// What became of the first entry.
enum Step {
    Done,
    Blocked,
    /// The turn's budget is used up.
    Enough,
}

impl Delivery {
    /// Committed bytes that wait.
    pub fn backlog_bytes(&self) -> usize {
        self.backlog_bytes
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The last entry that the guest has consumed.
    pub fn applied(&self) -> Index {
        self.applied
    }

    /// The last entry that the guest has consumed, or would have consumed if it were to run: one that stands still
    /// keeps up with whatever is committed, also behind a syncvm under way.
    fn seen(&self, passive: bool) -> Index {
        let waits = self.queue.back().filter(|_| passive).or(self.kept.back());
        waits.map_or(self.applied, |last| last.index.max(self.applied))
    }

    /// A syncvm made the guest what its leader's was after all of the kept inputs.
    pub fn forget_kept(&mut self) {
        self.kept.clear();
        self.kept_left_bytes = None;
    }

    /// Moves the input at the head to those that are kept.
    fn keep(&mut self) {
        let Some(input) = self.queue.pop_front() else { return };
        self.backlog_bytes -= input.entry.payload().len();
        // A guest that led until now may have taken a part of it.
        let left_bytes = self.left_bytes.take();
        if self.kept.is_empty() {
            self.kept_left_bytes = left_bytes;
        }
        self.kept.push_back(input);
        self.stalls.nothing_waits();
    }

    /// The kept inputs are for the guest now, before all others.
    fn deliver_kept(&mut self) {
        while let Some(input) = self.kept.pop_back() {
            self.backlog_bytes += input.entry.payload().len();
            self.taken_over += 1;
            self.queue.push_front(input);
            self.left_bytes = None;
        }
        if let Some(left_bytes) = self.kept_left_bytes.take() {
            self.left_bytes = Some(left_bytes);
        }
    }

    /// The guest stands still for a syncvm: what it gets from now on belongs to the next slot.
    pub fn end_slot(&mut self) {
        self.consumed_before = std::mem::take(&mut self.consumed_since_sync);
    }

    /// When a stalled delivery should be looked at again.
    pub fn next_deadline_us(&self) -> u64 {
        if self.stalls.is_waiting() { self.retry_us } else { u64::MAX }
    }

    /// Whether a syncvm with this replica is queued behind the one at the head.
    pub fn newer_sync_queued(&self) -> bool {
        self.syncs_queued > 1
    }

    /// Takes the `SyncVm` at the head off the queue: it is over. Harmless when something else is there.
    pub fn pass_sync(&mut self, number: Index, me: ReplicaId) {
        if self.queue.front().is_some_and(|head| head.index == number) {
            self.pop(me);
        }
    }

    /// Whether a syncvm with this replica waits behind the head: the leader may stand still for it.
    fn sync_behind(&self) -> bool {
        self.syncs_queued > 0
    }

    /// The guest's rings have started: whatever it did not take before, it may take now.
    pub fn forget_stall(&mut self) {
        self.stalls.forget();
    }

    fn push(&mut self, committed: Committed, me: ReplicaId) {
        self.syncs_queued += usize::from(matches!(committed.entry, Entry::SyncVm { with } if with == me));
        self.backlog_bytes += committed.entry.payload().len();
        self.queue.push_back(committed);
    }

    fn pop(&mut self, me: ReplicaId) {
        if let Some(done) = self.queue.pop_front() {
            self.syncs_queued -= usize::from(matches!(done.entry, Entry::SyncVm { with } if with == me));
            self.backlog_bytes -= done.entry.payload().len();
            self.applied = self.applied.max(done.index);
            self.left_bytes = None;
            self.stalls.nothing_waits();
        }
    }
}

impl Reactor<'_> {
    /// Delivers as much as the guest takes and the turn's budget allows.
    pub(super) fn deliver(&mut self, now: u64) -> Delivered {
        let mut left = DELIVER_BUDGET_FRAMES;
        let passive = self.is_passive();
        if !passive && !self.follow.is_running() {
            self.delivery.deliver_kept();
        }
        while let Some(committed) = self.ordering.committed.pop_front() {
            if matches!(committed.entry, Entry::SyncVm { with } if with == self.me) {
                self.leave_older_exchange(committed.index);
            }
            self.delivery.push(committed, self.me);
        }
        while let Some(head) = self.delivery.queue.front() {
            let (index, view) = (head.index, head.view);
            let news = index > self.delivery.skip_through;
            let consumes = self.guest.consumes() && news;
            let step = match head.entry {
                Entry::Noop { .. } if !news => Step::Done,
                Entry::Noop { leader } => {
                    self.leader_changed(now, leader);
                    Step::Done
                }
                Entry::Second { replica, .. } => {
                    self.second_named(replica);
                    Step::Done
                }
                Entry::Input(_) if !consumes => Step::Done,
                Entry::Input(_) if passive => {
                    self.delivery.keep();
                    continue;
                }
                Entry::Input(_) => self.deliver_input(now, &mut left),
                Entry::SyncVm { with } => self.reach_sync(now, index, view, with),
            };
            match step {
                Step::Done => self.delivery.pop(self.me),
                Step::Blocked => break,
                Step::Enough => return Delivered { frames: DELIVER_BUDGET_FRAMES, more: true },
            }
        }
        Delivered { frames: DELIVER_BUDGET_FRAMES - left, more: false }
    }

    /// Whether the guest stands still until this replica leads.
    pub(super) fn is_passive(&self) -> bool {
        self.vm.policy.sync.is_passive() && self.lead.is_none()
    }

    /// Tells consensus how far the guest is: the leader waits for its secondary.
    pub(super) fn tell_consumed(&mut self, now: u64) {
        let seen = self.delivery.seen(self.is_passive());
        if std::mem::replace(&mut self.delivery.told, seen) != seen {
            self.ordering.step(now, Event::Consumed(seen));
        }
    }

    fn deliver_input(&mut self, now: u64, left: &mut usize) -> Step {
        let Some(Committed { entry: Entry::Input(payload), .. }) = self.delivery.queue.front() else {
            return Step::Done;
        };
        let payload = payload.clone();
        let checked = match self.delivery.left_bytes {
            Some(left_bytes) => Ok(batch::Frames::resume(&payload, left_bytes)),
            None => batch::frames(&payload),
        };
        let Ok(mut rest) = checked else {
            // Our own leader wrote it; a mistake of ours must not stop the group.
            self.delivery.frames_dropped += 1;
            return Step::Done;
        };
        while !rest.is_empty() {
            if *left == 0 {
                return Step::Enough;
            }
            let (mut dealt_with, outcome) = self.device.inject_batch(rest.clone().take(*left));
            if dealt_with > 0 {
                self.note_taken(rest.clone().take(dealt_with));
                self.delivery.last_injected_us = now;
                self.delivery.consumed_since_sync += dealt_with as u64;
            }
            let queue = rest.clone().nth(dealt_with).map_or(0, |frame| self.device.receive_pair(frame));
            let blocked = match outcome {
                Inject::Done => false,
                Inject::NoBuffers => !self.stalled_too_long(queue, now, RX_STALL_LIMIT_US),
                // All queues alike.
                Inject::NotRunning => !self.stalled_too_long(0, now, RING_START_LIMIT_US),
            };
            if outcome != Inject::Done && !blocked {
                self.drop_frame(if outcome == Inject::NotRunning { 0 } else { queue });
                dealt_with += 1;
            }
            *left -= dealt_with;
            if let Some(last) = dealt_with.checked_sub(1) {
                rest.nth(last);
            }
            self.delivery.left_bytes = Some(rest.left_bytes());
            if blocked {
                return Step::Blocked;
            }
        }
        Step::Done
    }

    /// The guest took these; queues that stood still go on.
    fn note_taken<'f>(&mut self, frames: impl Iterator<Item = &'f [u8]>) {
        if self.delivery.stalls.is_any() {
            frames.for_each(|frame| self.delivery.stalls.took(self.device.receive_pair(frame)));
        }
    }

    /// Counts a frame that the guest does not take; says so once per episode.
    fn drop_frame(&mut self, queue: usize) {
        self.delivery.frames_dropped += 1;
        if self.delivery.stalls.dropped(queue) {
            let running = self.device.is_running();
            tracing::debug!(vm = %self.vm.name, running, "the guest takes no frames; they are dropped until it does");
        }
    }

    /// Notes a stall; true once it has lasted too long. A guest that never had a driver is not waited for.
    fn stalled_too_long(&mut self, queue: usize, now: u64, limit_us: u64) -> bool {
        if self.delivery.stalls.is_dropping(queue) || !self.guest.rings_expected() {
            return true;
        }
        // What a leader drops, no syncvm makes good.
        let limit_us = if self.lead.is_none() && self.delivery.sync_behind() {
            limit_us.min(SYNC_STALL_LIMIT_US)
        } else {
            limit_us
        };
        self.delivery.retry_us = now + 1_000;
        self.delivery.stalls.is_too_long(queue, now, limit_us)
    }

    /// A `SyncVm` is at the head: it is ours to lead, ours to follow, or nothing to us.
    fn reach_sync(&mut self, now: u64, index: Index, view: View, with: ReplicaId) -> Step {
        let concerned =
            if with == self.me { self.reach_followed_sync(now, index, view) } else { self.reach_led_sync(now, index) };
        if concerned { Step::Blocked } else { Step::Done }
    }
}

#[cfg(test)]
mod tests {
    use consensus::Payload;

    use super::*;

    const ME: ReplicaId = ReplicaId(1);

    fn input(index: u64) -> Committed {
        Committed { index: Index(index), view: View(1), entry: Entry::Input(Payload::from(vec![0; 10])) }
    }

    #[test]
    fn what_a_slot_consumed_is_known_in_the_next_and_not_longer() {
        let mut delivery = Delivery { consumed_since_sync: 7, ..Delivery::default() };
        delivery.end_slot();
        assert_eq!((delivery.consumed_since_sync, delivery.consumed_before), (0, 7));
        delivery.end_slot();
        assert_eq!(delivery.consumed_before, 0);
    }

    fn order(delivery: &Delivery) -> Vec<u64> {
        delivery.queue.iter().map(|committed| committed.index.0).collect()
    }

    #[test]
    fn kept_inputs_come_back_in_order_before_all_others_or_are_forgotten() {
        let mut delivery = Delivery::default();
        (1..=5).for_each(|index| delivery.push(input(index), ME));
        delivery.pop(ME);
        (2..=4).for_each(|_| delivery.keep());
        assert_eq!((delivery.applied(), delivery.seen(false)), (Index(1), Index(4)));
        assert_eq!(delivery.seen(true), Index(5), "the leader waits for nothing");
        assert_eq!((order(&delivery), delivery.backlog_bytes()), (vec![5], 10));
        delivery.deliver_kept();
        assert_eq!((order(&delivery), delivery.backlog_bytes()), (vec![2, 3, 4, 5], 40));
        delivery.pop(ME);
        assert_eq!((delivery.applied(), delivery.seen(false)), (Index(2), Index(2)));
        assert_eq!(delivery.taken_over, 3);
        delivery.keep();
        delivery.forget_kept();
        delivery.deliver_kept();
        assert_eq!((order(&delivery), delivery.backlog_bytes()), (vec![4, 5], 20));
    }

    #[test]
    fn what_is_applied_never_goes_back() {
        let mut delivery = Delivery::default();
        (1..=2).for_each(|index| delivery.push(input(index), ME));
        delivery.keep();
        delivery.pop(ME);
        assert_eq!((delivery.applied(), delivery.seen(true)), (Index(2), Index(2)));
        delivery.deliver_kept();
        delivery.pop(ME);
        assert_eq!((delivery.applied(), delivery.seen(false)), (Index(2), Index(2)));
    }

    #[test]
    fn of_a_kept_input_only_what_the_guest_did_not_take_is_delivered() {
        let mut delivery = Delivery::default();
        (1..=2).for_each(|index| delivery.push(input(index), ME));
        delivery.left_bytes = Some(4);
        assert!(!delivery.stalls.is_too_long(0, 1_000, 50));
        (1..=2).for_each(|_| delivery.keep());
        assert_eq!(delivery.next_deadline_us(), u64::MAX, "nothing waits for buffers");
        assert_eq!(delivery.left_bytes, None);
        delivery.deliver_kept();
        assert_eq!((order(&delivery), delivery.left_bytes), (vec![1, 2], Some(4)));
        delivery.pop(ME);
        assert_eq!(delivery.left_bytes, None);
        // A syncvm covers the rest.
        delivery.left_bytes = Some(2);
        delivery.keep();
        delivery.forget_kept();
        delivery.push(input(3), ME);
        delivery.deliver_kept();
        assert_eq!(delivery.left_bytes, None);
    }
}
