//! When a leader's slots end, and where their time goes.
//!
//! The decision is [`SlotPolicy`]'s, a pure function; here is what it is asked with: what the slot holds, how old it
//! is, and what the next syncvm will probably cost by what the last ones did. Each look costs a wake-up of the
//! reactor, so [`Slots::next_look_us`] says when the next one can find something: soon only while the guest might
//! become idle.

use consensus::{Entry, ReplicaId};
use hdrhistogram::Histogram;
use syncvm::exchange::SyncReport;
use syncvm::idle::Activity;
use syncvm::slot::{SlotConfig, SlotEnd, SlotPolicy, SlotSnapshot, SyncCosts};

use super::lead::LeadSync;
use super::reactor::Reactor;
use crate::config::Policy;
use crate::status::Times;

/// A guest that is idle, holds nothing and consumed nothing is made equal all the same after this time, so that the
/// first syncvm of its next activity is short ...
const IDLE_SLOT_US: u64 = 1_000_000;
/// ... but ever more rarely, up to this, while there is next to nothing to make equal.
const LONGEST_IDLE_SLOT_US: u64 = 10_000_000;
/// That much is next to nothing.
const FEW_PAGES: usize = 1024;
/// Making an idle guest equal takes at most one part in so many of its time.
const IDLE_SHARE: u64 = 32;

/// How often the vCPUs' clock is looked at while the guest is expected to become idle.
const IDLE_POLL_US: u64 = 250;
/// It is expected to so soon after an answer to the last of those who ask.
const ANSWERED_US: u64 = 2_000;
/// While the guest may become idle it is looked at again after one part in so many of the time that the slot has
/// lasted, so that what is lost by late looks stays a small part ...
const LOOK_SHARE: u64 = 16;
/// ... but not later than this: held frames would leave late.
const LONGEST_LOOK_US: u64 = 1_000;

/// Inputs are gathered for one part in so many of the time that the slot has lasted ...
const GATHER_SHARE: u64 = 16;
/// ... if that is long enough for some to come ...
const SHORTEST_GATHER_US: u64 = 250;
/// ... and at most for this.
const LONGEST_GATHER_US: u64 = 2_000;

/// Shortest time between two looks that only time brings about.
const SHORTEST_REST_US: u64 = 100;
/// A syncvm that did not relieve a full arena or log is not tried again before this time.
const FULL_REST_US: u64 = 100_000;
/// Consensus refused the proposal: what changes that is a message, which brings a look of its own.
const REFUSED_REST_US: u64 = 10_000;

/// When the present syncvm passed which point, µs.
#[derive(Debug, Clone, Copy, Default)]
struct Marks {
    /// How long the slot before it was.
    ran_us: u64,
    proposed_us: u64,
    committed_us: u64,
    stopped_us: u64,
    acknowledged_us: Option<u64>,
    /// It ends a slot, and not a rejoin.
    ends_slot: bool,
    /// That slot had something to release or to reconcile.
    was_active: bool,
    /// It ended because its guest was idle.
    ends_idle: bool,
}

/// The slots of one leader.
pub struct Slots {
    policy: SlotPolicy,
    fixed_us: Option<u64>,
    since_us: u64,
    /// Since when the slot has something to release or to reconcile.
    active_since_us: Option<u64>,
    idle_slot_us: u64,
    next_look_us: u64,
    marks: Marks,
    costs: SyncCosts,
    stop_costs: SyncCosts,
}

impl Slots {
    /// None has ended yet; the first begins at `now_us`.
    pub fn new(policy: &Policy, now_us: u64) -> Self {
        let config = SlotConfig {
            max_hold_us: policy.max_hold_ms * 1000,
            max_slot_us: policy.max_slot_ms * 1000,
            interval_us: policy.interval_us(),
            ..SlotConfig::default()
        };
        Self {
            policy: SlotPolicy::new(config),
            fixed_us: config.interval_us,
            since_us: now_us,
            active_since_us: None,
            idle_slot_us: IDLE_SLOT_US,
            next_look_us: u64::MAX,
            marks: Marks::default(),
            costs: SyncCosts::default(),
            stop_costs: SyncCosts::default(),
        }
    }

    /// A slot begins: the guest runs again, or there is a secondary from now on.
    pub fn begin(&mut self, now_us: u64) {
        self.since_us = now_us;
        self.active_since_us = None;
        self.next_look_us = now_us;
    }

    /// There is nobody to be equal with. Returns whether the guest's clocks were being looked at.
    pub fn suspend(&mut self) -> bool {
        self.next_look_us = u64::MAX;
        self.active_since_us.take().is_some()
    }

    /// When the slot may end at the earliest, as far as time alone decides that. Never in the past: looking may be
    /// held up for reasons of its own.
    pub fn next_look_us(&self, now_us: u64) -> u64 {
        self.next_look_us.max(now_us + SHORTEST_REST_US)
    }

    /// How long inputs are gathered before they are ordered, µs. A slot lasts only while its guest computes, so inputs that
    /// come together a little later are not missed, and each round of ordering costs all replicas the same, however
    /// much it orders. Nothing in a short slot, in which clients wait for an answer.
    pub fn gather_us(&self, now_us: u64) -> u64 {
        let active_us = self.active_since_us.map_or(0, |since_us| now_us.saturating_sub(since_us));
        let gather_us = active_us / GATHER_SHARE;
        if gather_us < SHORTEST_GATHER_US { 0 } else { gather_us.min(LONGEST_GATHER_US) }
    }

    /// `end`: why the slot ends by itself, if it does.
    fn proposed(&mut self, now_us: u64, ends_slot: bool, end: Option<SlotEnd>) {
        let ran_us = now_us.saturating_sub(self.since_us);
        let was_active = self.active_since_us.is_some();
        let ends_idle = end == Some(SlotEnd::Idle);
        self.marks = Marks { ran_us, proposed_us: now_us, ends_slot, was_active, ends_idle, ..Marks::default() };
    }

    /// Whether the present syncvm was proposed because the guest was idle.
    pub fn ends_idle(&self) -> bool {
        self.marks.ends_idle
    }

    /// The proposal is committed, and the worker told to stop the guest.
    pub fn stopping(&mut self, now_us: u64) {
        self.marks.committed_us = now_us;
    }

    /// The guest stands still.
    pub fn stopped(&mut self, now_us: u64) {
        self.marks.stopped_us = now_us;
        if self.marks.ends_slot {
            self.stop_costs.note(now_us.saturating_sub(self.marks.proposed_us));
        }
    }

    /// The slot's frames may leave.
    pub fn acknowledged(&mut self, now_us: u64) {
        self.marks.acknowledged_us = self.marks.ends_slot.then_some(now_us);
    }

    /// The slot goes on.
    pub fn failed(&mut self) {
        self.marks = Marks::default();
    }

    /// The last slot's frames have left.
    fn released(&mut self, now_us: u64, times: &mut SlotTimes) {
        if let Some(acknowledged_us) = self.marks.acknowledged_us.take() {
            self.costs.note(now_us.saturating_sub(self.marks.proposed_us));
            times.add(&self.marks, acknowledged_us, now_us);
        }
    }

    fn compared(&mut self, report: &SyncReport) {
        self.idle_slot_us = match report.union_pages {
            0..=FEW_PAGES if !self.marks.was_active => (self.idle_slot_us * 2).min(LONGEST_IDLE_SLOT_US),
            _ => report.total_us.saturating_mul(IDLE_SHARE).clamp(IDLE_SLOT_US, LONGEST_IDLE_SLOT_US),
        };
    }

    /// `interval_us`: when to look again at a slot that has something to release or to reconcile.
    fn look_again(&mut self, now_us: u64, interval_us: Option<u64>) {
        self.next_look_us = match self.fixed_us {
            Some(fixed_us) => self.since_us + fixed_us.saturating_sub(self.stop_costs.predicted_us().min(fixed_us / 2)),
            None => match interval_us {
                Some(interval_us) => now_us + interval_us,
                None => self.since_us + self.idle_slot_us,
            },
        };
    }
}

/// Whether the guest may become idle any moment: it has answered most of those whom it answered in the slot before, the last just now.
fn expects_idle(answers: u64, answers_before: u64, newest_answer_age_us: Option<u64>) -> bool {
    answers >= answers_before.saturating_mul(3) / 4 && newest_answer_age_us.is_some_and(|age| age < ANSWERED_US)
}

/// In powers of two, because the agent has to be woken whenever it changes.
fn look_interval_us(active_us: u64) -> u64 {
    let mut interval_us = IDLE_POLL_US;
    while interval_us < LONGEST_LOOK_US && interval_us * 2 * LOOK_SHARE <= active_us {
        interval_us *= 2;
    }
    interval_us
}

impl Reactor<'_> {
    /// There is a secondary: end the slot when it is time.
    pub(super) fn plan_slot(&mut self, now: u64, second: ReplicaId) {
        self.egress.set_held();
        let commit = self.ordering.replica().commit_index().0;
        let lead = self.lead.as_mut().expect("planning needs a leader");
        // The proof for the last slot's frames ends with the next proposal: first they leave.
        if lead.dropping.is_some() {
            // That is settled by a commit, and not by time.
            lead.slots.next_look_us = u64::MAX;
            return;
        }
        if lead.sync != LeadSync::Resting || self.egress.is_releasing() {
            return;
        }
        let slots = &mut lead.slots;
        slots.released(now, &mut self.totals.slots);
        let guard = self.egress.guard();
        let something = guard.frames() > 0 || self.delivery.consumed_since_sync > 0;
        let active_us = match something {
            true => now.saturating_sub(*slots.active_since_us.get_or_insert(now)),
            false => 0,
        };
        let newest_answer_age_us = self.egress.newest_answer_us().map(|since| now.saturating_sub(since));
        let (answers, answers_before) = (self.egress.answers(), self.egress.answers_before());
        let interval_us = match expects_idle(answers, answers_before, newest_answer_age_us) {
            true => IDLE_POLL_US,
            false => look_interval_us(active_us),
        };
        let activity = match (slots.fixed_us, something) {
            (Some(_), _) => Activity::Unknown,
            (None, false) => Activity::Idle,
            (None, true) => {
                self.guest.watch_idle(interval_us);
                self.guest.activity(now, self.delivery.last_injected_us)
            }
        };
        let state = SlotSnapshot {
            activity,
            guard_bytes: guard.bytes(),
            guard_capacity_bytes: guard.bytes() + guard.free_bytes(),
            oldest_frame_age_us: guard.oldest_us().map(|since| now.saturating_sub(since)),
            newest_answer_age_us,
            since_resume_us: now.saturating_sub(slots.since_us),
            active_us,
            idle_max_slot_us: slots.idle_slot_us,
            consumed_inputs: self.delivery.consumed_since_sync,
            consumed_before: self.delivery.consumed_before,
            answers,
            answers_before,
            pending_inputs: u64::from(!self.delivery.is_empty() || self.ingress.in_flight(commit)),
            quiet_us: now.saturating_sub(self.delivery.last_injected_us),
            usual_cost_us: slots.costs.usual_us(),
            stop_cost_us: slots.stop_costs.predicted_us(),
            sync_cost_us: slots.costs.predicted_us(),
        };
        // A full arena or log takes no input until a syncvm has let the log be cut.
        let full = self.arena.is_exhausted() || self.ordering.log().is_filling_up();
        let relieves = something || now.saturating_sub(slots.since_us) >= FULL_REST_US;
        let forced = lead.forced_sync || lead.hand_over.is_some() || (full && relieves);
        let end = slots.policy.decide(&state);
        slots.look_again(now, something.then_some(interval_us));
        if (forced || end.is_some())
            && self.propose_sync(now, second, end)
            && let Some(end) = end
        {
            self.totals.slot_ended(end);
        }
    }

    /// Because of `end`, if the slot ends by itself. Returns whether it is proposed.
    pub(super) fn propose_sync(&mut self, now: u64, with: ReplicaId, end: Option<SlotEnd>) -> bool {
        let ends_slot = self.ordering.replica().second() == Some(with);
        let Some(number) = self.ordering.propose(now, Entry::SyncVm { with }) else {
            if let Some(lead) = &mut self.lead {
                lead.slots.next_look_us = now + REFUSED_REST_US;
            }
            return false;
        };
        self.guest.unwatch_idle();
        if let Some(lead) = &mut self.lead {
            lead.sync = LeadSync::Proposed { number, with };
            lead.forced_sync = false;
            lead.slots.proposed(now, ends_slot, end);
        }
        true
    }

    /// A syncvm of ours is over, and this is what it did.
    pub(super) fn led(&mut self, report: &SyncReport) {
        self.totals.led(report);
        if let Some(lead) = &mut self.lead {
            lead.slots.compared(report);
        }
    }
}

/// Names of the parts of a slot.
const PARTS: [&str; 5] = ["run", "order", "stop", "sync", "release"];

/// Where the time of all slots went.
pub struct SlotTimes {
    parts: [Histogram<u64>; PARTS.len()],
}

impl SlotTimes {
    /// Nothing yet.
    pub fn new() -> Self {
        Self { parts: PARTS.map(|_| histogram()) }
    }

    fn add(&mut self, marks: &Marks, acknowledged_us: u64, released_us: u64) {
        let points = [marks.proposed_us, marks.committed_us, marks.stopped_us, acknowledged_us, released_us];
        self.parts[0].saturating_record(marks.ran_us);
        for (part, ends) in self.parts[1..].iter_mut().zip(points.windows(2)) {
            part.saturating_record(ends[1].saturating_sub(ends[0]));
        }
    }

    /// For `plover status`.
    pub fn summary(&self) -> Vec<Times> {
        PARTS.iter().zip(&self.parts).map(|(name, part)| times(name, part)).collect()
    }
}

/// For times from 1 µs to an hour.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("constant bounds are valid")
}

/// A distribution for `plover status`.
pub fn times(name: &str, of: &Histogram<u64>) -> Times {
    let ms = |us: u64| us as f64 / 1000.0;
    Times {
        name: name.to_owned(),
        count: of.len(),
        p50_ms: ms(of.value_at_quantile(0.5)),
        p99_ms: ms(of.value_at_quantile(0.99)),
        max_ms: ms(of.max()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_guest_is_made_equal_ever_more_rarely_up_to_a_limit() {
        let mut slots = Slots::new(&Policy::default(), 0);
        let mut compare = |union_pages, total_us, something| {
            slots.begin(0);
            slots.active_since_us = something;
            slots.proposed(0, true, None);
            slots.compared(&SyncReport { union_pages, total_us, ..SyncReport::default() });
            slots.idle_slot_us
        };
        assert_eq!(compare(5, 0, None), 2 * IDLE_SLOT_US);
        assert_eq!((0..9).map(|_| compare(5, 0, None)).max(), Some(LONGEST_IDLE_SLOT_US));
        assert_eq!(compare(5, 0, Some(0)), IDLE_SLOT_US, "it was not idle");
        assert_eq!(compare(FEW_PAGES + 1, 100_000, None), 100_000 * IDLE_SHARE);
        assert_eq!(compare(FEW_PAGES + 1, 20_000_000, None), LONGEST_IDLE_SLOT_US, "one long syncvm is no rule");
    }

    #[test]
    fn the_end_of_a_long_slot_is_looked_for_where_it_is_expected() {
        assert!(expects_idle(48, 64, Some(ANSWERED_US - 1)));
        assert!(!expects_idle(47, 64, Some(0)), "most have had no answer yet");
        assert!(!expects_idle(64, 64, Some(ANSWERED_US)), "it computes on");
        assert!(!expects_idle(0, 0, None), "it has answered nobody");
        let mut slots = Slots::new(&Policy::default(), 0);
        for (end, idle) in [(Some(SlotEnd::Idle), true), (Some(SlotEnd::Pause), false), (None, false)] {
            slots.proposed(5, true, end);
            assert_eq!(slots.ends_idle(), idle, "{end:?}");
        }
    }

    #[test]
    fn a_long_slot_is_disturbed_more_rarely() {
        let looks = [0, 7_999, 8_000, 16_000, 60_000_000].map(look_interval_us);
        assert_eq!(looks, [250, 250, 500, 1_000, LONGEST_LOOK_US]);
        let mut slots = Slots::new(&Policy::default(), 0);
        assert_eq!(slots.gather_us(100_000), 0, "nothing to release or to reconcile");
        slots.active_since_us = Some(100_000);
        let gathered = [0, 3_999, 4_000, 20_000, 60_000_000].map(|active_us| slots.gather_us(100_000 + active_us));
        assert_eq!(gathered, [0, 0, 250, 1_250, LONGEST_GATHER_US]);
        slots.begin(200_000);
        assert_eq!(slots.gather_us(300_000), 0, "a slot of its own");
    }
}
