//! `SlotPolicy`: where does a slot end? (PLOVER §4.3)
//!
//! A slot ends when the guest is idle, and, so that a busy guest cannot postpone it for ever, when the guard
//! fills up, when the guest has stopped answering, when the oldest held frame gets too old, or at the slot's maximum
//! length. Pure: one snapshot
//! in, one decision out, no memory of its own. Fixed intervals as in Remus were rejected by the
//! paper: an idle guest with a closed TCP window wastes the rest of the interval. They are here all the same
//! ([`SlotConfig::interval_us`]), so that what that rejection gains can be measured.

use std::fmt;

use crate::idle::Activity;

/// Limits of a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotConfig {
    /// The slot ends when this share of the guard is used.
    pub guard_pressure_fraction: f64,
    /// No frame should be held longer than this, syncvm included, in µs.
    pub max_hold_us: u64,
    /// Longest slot of a guest that does something, in µs.
    pub max_slot_us: u64,
    /// Slots have this length in µs, whatever the guest does; only a guard that fills up ends one earlier. The
    /// other limits mean nothing then.
    pub interval_us: Option<u64>,
}

impl Default for SlotConfig {
    fn default() -> Self {
        Self { guard_pressure_fraction: 0.75, max_hold_us: 200_000, max_slot_us: 200_000, interval_us: None }
    }
}

/// The end of an idle guest's slot waits for one part in so many of what a syncvm usually takes.
const LINGER_SHARE: u64 = 16;
/// A guest that computes and has answered nothing for so many times what a syncvm usually takes will not answer soon: what is
/// held leaves, and the guest stands still for a small part of its time only. While more comes it is worth waiting for.
const PAUSE_COSTS: u64 = 12;
/// The same while the guest has got less than half of what it got in the slot before.
const FEW_LINGER_SHARE: u64 = 2;
/// How many syncvms are remembered.
const RECENT_COSTS: usize = 64;
/// How many of so many may have cost more than what is predicted.
const OUTLIERS: usize = 1;

/// What the last syncvms cost, as a prediction for the next. A high quantile and not the mean: a bound on how long
/// frames are held is worth nothing if half of them miss it. Not the maximum: one outlier would shorten all slots.
#[derive(Clone, Debug)]
pub struct SyncCosts {
    recent_us: [u64; RECENT_COSTS],
    noted: usize,
    predicted_us: u64,
    usual_us: u64,
}

impl Default for SyncCosts {
    fn default() -> Self {
        Self { recent_us: [0; RECENT_COSTS], noted: 0, predicted_us: 0, usual_us: 0 }
    }
}

impl SyncCosts {
    /// One more.
    pub fn note(&mut self, cost_us: u64) {
        self.recent_us[self.noted % RECENT_COSTS] = cost_us;
        self.noted += 1;
        let known = self.noted.min(RECENT_COSTS);
        let mut sorted = self.recent_us;
        sorted[..known].sort_unstable();
        let outliers = if known < RECENT_COSTS / 4 { 0 } else { OUTLIERS };
        self.predicted_us = sorted[known - 1 - outliers];
        self.usual_us = sorted[known / 2];
    }

    /// What one usually costs; 0 before the first.
    #[must_use]
    pub fn usual_us(&self) -> u64 {
        self.usual_us
    }

    /// What the next will cost at most, probably; 0 before the first.
    #[must_use]
    pub fn predicted_us(&self) -> u64 {
        self.predicted_us
    }
}

/// What the leader sees when it asks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlotSnapshot {
    /// What the idle detector says.
    pub activity: Activity,
    /// Bytes that the guard holds.
    pub guard_bytes: usize,
    /// Bytes that the guard can hold.
    pub guard_capacity_bytes: usize,
    /// Age of the oldest held frame in µs; `None` if nothing is held.
    pub oldest_frame_age_us: Option<u64>,
    /// Time since the guest last sent something in this slot that somebody may wait for (no bare acknowledgement), in µs; `None` if
    /// nothing.
    pub newest_answer_age_us: Option<u64>,
    /// Time since the slot began (the last resume), in µs.
    pub since_resume_us: u64,
    /// Time since the slot has had something to release or to reconcile, in µs; 0 if it has not.
    pub active_us: u64,
    /// Longest slot of a guest that is idle, holds nothing and consumed nothing, in µs.
    pub idle_max_slot_us: u64,
    /// Frames that the guest consumed in this slot.
    pub consumed_inputs: u64,
    /// Frames that it consumed in the slot before.
    pub consumed_before: u64,
    /// Frames of this slot that somebody may wait for.
    pub answers: u64,
    /// Frames of the slot before that somebody may have waited for.
    pub answers_before: u64,
    /// Inputs that are proposed or committed but not yet in the guest.
    pub pending_inputs: u64,
    /// Time since the guest last got an input, in µs.
    pub quiet_us: u64,
    /// What a syncvm usually takes from its proposal until the slot's frames have left, in µs.
    pub usual_cost_us: u64,
    /// What the next syncvm will probably take from its proposal to the stop of the guest, in µs.
    pub stop_cost_us: u64,
    /// What it will take at most, probably, from its proposal until the slot's frames have left, in µs.
    pub sync_cost_us: u64,
}

/// Why a slot ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotEnd {
    /// The guest is idle and there is something to release or to reconcile.
    Idle,
    /// The guard is nearly full.
    GuardPressure,
    /// The oldest held frame would become too old.
    OldestFrame,
    /// The guest computes, but has answered nothing for a while.
    Pause,
    /// The slot reached its maximum length.
    MaxLength,
    /// The slot has its fixed length.
    Interval,
}

impl fmt::Display for SlotEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::GuardPressure => "guard-pressure",
            Self::OldestFrame => "oldest-frame",
            Self::Pause => "pause",
            Self::MaxLength => "max-length",
            Self::Interval => "interval",
        })
    }
}

/// Decides slot boundaries by the limits it was made with.
#[derive(Clone, Copy, Debug)]
pub struct SlotPolicy {
    config: SlotConfig,
}

impl SlotPolicy {
    /// A policy with these limits.
    #[must_use]
    pub fn new(config: SlotConfig) -> Self {
        Self { config }
    }

    /// Whether the slot ends now, and why.
    #[must_use]
    pub fn decide(&self, now: &SlotSnapshot) -> Option<SlotEnd> {
        let pressure = now.guard_capacity_bytes as f64 * self.config.guard_pressure_fraction;
        if now.guard_bytes > 0 && now.guard_bytes as f64 >= pressure {
            return Some(SlotEnd::GuardPressure);
        }
        if let Some(interval_us) = self.config.interval_us {
            let ends = now.since_resume_us.saturating_add(now.stop_cost_us.min(interval_us / 2)) >= interval_us;
            return ends.then_some(SlotEnd::Interval);
        }
        // The frame leaves only after the syncvm, so start early by what that will take. Where the bound cannot
        // be kept, a slot still has a fifth of it, or a costly syncvm would make slots of no length.
        let lead_us = now.sync_cost_us.min(self.config.max_hold_us / 5 * 4);
        if now.oldest_frame_age_us.is_some_and(|age| age.saturating_add(lead_us) >= self.config.max_hold_us) {
            return Some(SlotEnd::OldestFrame);
        }
        // A server that answers many at a time pauses before it answers most of them: that is worth waiting for.
        let most = now.answers >= now.answers_before / 2;
        let pause_us = now.usual_cost_us.saturating_mul(PAUSE_COSTS);
        if pause_us > 0 && most && now.newest_answer_age_us.is_some_and(|age| age >= pause_us) {
            return Some(SlotEnd::Pause);
        }
        let idle = now.activity == Activity::Idle && now.pending_inputs == 0;
        let untouched = now.oldest_frame_age_us.is_none() && now.consumed_inputs == 0;
        if idle && untouched {
            return (now.since_resume_us >= now.idle_max_slot_us).then_some(SlotEnd::MaxLength);
        }
        if now.active_us >= self.config.max_slot_us {
            return Some(SlotEnd::MaxLength);
        }
        (idle && !self.lingers(now)).then_some(SlotEnd::Idle)
    }

    /// An idle guest may get its next input at once: clients that were answered together ask again one after the
    /// other. A slot that ends between two of them makes the later ones wait for a whole syncvm more, so the end
    /// waits for a part of what it costs, a large one while most are still to come; but only in a slot that is
    /// shorter than a syncvm, or steady traffic would put it off again and again.
    fn lingers(&self, now: &SlotSnapshot) -> bool {
        let few = now.consumed_inputs < now.consumed_before / 2;
        let share = if few { FEW_LINGER_SHARE } else { LINGER_SHARE };
        now.quiet_us < now.usual_cost_us / share && now.active_us < now.usual_cost_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: SlotSnapshot = SlotSnapshot {
        activity: Activity::Idle,
        guard_bytes: 0,
        guard_capacity_bytes: 1000,
        oldest_frame_age_us: None,
        newest_answer_age_us: None,
        since_resume_us: 10,
        active_us: 0,
        idle_max_slot_us: 1_000_000,
        consumed_inputs: 0,
        consumed_before: 0,
        answers: 0,
        answers_before: 0,
        pending_inputs: 0,
        quiet_us: 1_000,
        usual_cost_us: 4_000,
        stop_cost_us: 1_000,
        sync_cost_us: 5_000,
    };

    fn decide(snapshot: SlotSnapshot) -> Option<SlotEnd> {
        SlotPolicy::new(SlotConfig::default()).decide(&snapshot)
    }

    #[test]
    fn an_untouched_idle_guest_rests_until_the_long_limit() {
        assert_eq!(decide(QUIET), None);
        assert_eq!(decide(SlotSnapshot { since_resume_us: 999_999, ..QUIET }), None);
        let end = decide(SlotSnapshot { since_resume_us: 1_000_000, ..QUIET });
        assert_eq!(end, Some(SlotEnd::MaxLength));
    }

    #[test]
    fn idle_ends_the_slot_when_there_is_something_to_gain() {
        let held = SlotSnapshot { oldest_frame_age_us: Some(5), guard_bytes: 60, ..QUIET };
        assert_eq!(decide(held), Some(SlotEnd::Idle));
        let consumed = SlotSnapshot { consumed_inputs: 1, ..QUIET };
        assert_eq!(decide(consumed), Some(SlotEnd::Idle));
        let more_to_come = SlotSnapshot { pending_inputs: 1, ..held };
        assert_eq!(decide(more_to_come), None, "not idle with inputs on the way");
        let just_asked = SlotSnapshot { quiet_us: 249, ..held };
        assert_eq!(decide(just_asked), None, "a sixteenth of 4 ms for the next to ask");
        assert_eq!(decide(SlotSnapshot { quiet_us: 250, ..held }), Some(SlotEnd::Idle));
        let few = SlotSnapshot { consumed_before: 4, consumed_inputs: 1, quiet_us: 1_999, ..held };
        assert_eq!(decide(few), None, "most of those who were answered are still to ask");
        assert_eq!(decide(SlotSnapshot { consumed_inputs: 2, ..few }), Some(SlotEnd::Idle));
        assert_eq!(decide(SlotSnapshot { quiet_us: 2_000, ..few }), Some(SlotEnd::Idle));
        let long = SlotSnapshot { active_us: 4_000, ..just_asked };
        assert_eq!(decide(long), Some(SlotEnd::Idle), "steady traffic puts no slot off for ever");
        for activity in [Activity::Busy, Activity::Unknown] {
            assert_eq!(decide(SlotSnapshot { activity, ..held }), None);
        }
    }

    #[test]
    fn a_busy_guest_cannot_postpone_the_end() {
        let busy = SlotSnapshot { activity: Activity::Busy, pending_inputs: 9, ..QUIET };
        assert_eq!(decide(SlotSnapshot { active_us: 200_000, ..busy }), Some(SlotEnd::MaxLength));
        let aged = SlotSnapshot { oldest_frame_age_us: Some(195_000), guard_bytes: 1, ..busy };
        assert_eq!(decide(aged), Some(SlotEnd::OldestFrame), "195 ms + 5 ms of syncvm");
        let younger = SlotSnapshot { oldest_frame_age_us: Some(194_999), ..aged };
        assert_eq!(decide(younger), None);
        let costly = SlotSnapshot { sync_cost_us: 1_000_000, ..younger };
        assert_eq!(decide(costly), Some(SlotEnd::OldestFrame));
        let fresh = SlotSnapshot { oldest_frame_age_us: Some(39_999), ..costly };
        assert_eq!(decide(fresh), None, "a fifth of the bound is always left");
        let full = SlotSnapshot { guard_bytes: 750, oldest_frame_age_us: Some(0), ..busy };
        assert_eq!(decide(full), Some(SlotEnd::GuardPressure));
    }

    #[test]
    fn what_a_busy_guest_has_sent_leaves_when_no_more_comes() {
        let busy = SlotSnapshot { activity: Activity::Busy, guard_bytes: 60, ..QUIET };
        let silent = |for_us| SlotSnapshot {
            oldest_frame_age_us: Some(for_us + 1_000),
            newest_answer_age_us: Some(for_us),
            ..busy
        };
        assert_eq!(decide(silent(47_999)), None, "twelve syncvms of 4 ms");
        assert_eq!(decide(silent(48_000)), Some(SlotEnd::Pause));
        let sends = SlotSnapshot { oldest_frame_age_us: Some(150_000), newest_answer_age_us: Some(0), ..busy };
        assert_eq!(decide(sends), None);
        let few = SlotSnapshot { answers: 3, answers_before: 8, ..silent(90_000) };
        assert_eq!(decide(few), None, "most of those who ask are not answered yet");
        assert_eq!(decide(SlotSnapshot { answers: 4, ..few }), Some(SlotEnd::Pause));
        assert_eq!(
            decide(SlotSnapshot { usual_cost_us: 0, ..silent(90_000) }),
            None,
            "nobody knows yet what one costs"
        );
    }

    #[test]
    fn a_fixed_interval_counts_from_the_resume_to_the_stop_and_asks_nothing_else() {
        let policy = SlotPolicy::new(SlotConfig { interval_us: Some(25_000), ..SlotConfig::default() });
        let held = SlotSnapshot { oldest_frame_age_us: Some(24_000), guard_bytes: 60, consumed_inputs: 1, ..QUIET };
        for snapshot in [QUIET, held, SlotSnapshot { activity: Activity::Busy, pending_inputs: 3, ..held }] {
            let at = |since_resume_us| policy.decide(&SlotSnapshot { since_resume_us, ..snapshot });
            assert_eq!(at(23_999), None, "the stop comes 1 ms after the proposal");
            assert_eq!(at(24_000), Some(SlotEnd::Interval));
        }
        let slow = SlotSnapshot { stop_cost_us: 900_000, since_resume_us: 12_499, ..held };
        assert_eq!(policy.decide(&slow), None, "half of it is always left");
        let full = SlotSnapshot { guard_bytes: 750, ..QUIET };
        assert_eq!(policy.decide(&full), Some(SlotEnd::GuardPressure));
    }

    #[test]
    fn costs_predict_a_high_quantile_of_the_recent_and_forget_the_old() {
        let mut costs = SyncCosts::default();
        assert_eq!(costs.predicted_us(), 0);
        costs.note(7_000);
        assert_eq!(costs.predicted_us(), 7_000);
        for cost_us in 1..=RECENT_COSTS as u64 {
            costs.note(cost_us * 100);
        }
        assert_eq!((costs.predicted_us(), costs.usual_us()), (6_300, 3_300), "one of 64 may be longer");
        (0..RECENT_COSTS).for_each(|_| costs.note(50));
        costs.note(90_000);
        assert_eq!(costs.predicted_us(), 50, "a single outlier decides nothing");
        costs.note(90_000);
        assert_eq!(costs.predicted_us(), 90_000);
    }
}
