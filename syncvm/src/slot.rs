//! `SlotPolicy`: where does a slot end? (PLOVER §4.3)
//!
//! A slot ends when the guest is idle, and, so that a busy guest cannot postpone it for ever, when the guard
//! fills up, when the oldest held frame gets too old, or at the slot's maximum length. Pure: one snapshot
//! in, one decision out, no memory of its own. Fixed intervals as in Remus were rejected by the
//! paper: an idle guest with a closed TCP window wastes the rest of the interval.

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
    /// Longest slot of a guest that is idle, holds nothing and consumed nothing, in µs.
    pub idle_max_slot_us: u64,
}

impl Default for SlotConfig {
    fn default() -> Self {
        Self { guard_pressure_fraction: 0.75, max_hold_us: 50_000, max_slot_us: 100_000, idle_max_slot_us: 1_000_000 }
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
    /// Time since the slot began (the last resume), in µs.
    pub slot_age_us: u64,
    /// Inputs that the guest consumed in this slot.
    pub consumed_inputs: u64,
    /// Inputs that are proposed or committed but not yet in the guest.
    pub pending_inputs: u64,
    /// What the last syncvm took from proposal to acknowledgement, in µs; 0 if there was none.
    pub last_sync_cost_us: u64,
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
    /// The slot reached its maximum length.
    MaxLength,
}

impl fmt::Display for SlotEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::GuardPressure => "guard-pressure",
            Self::OldestFrame => "oldest-frame",
            Self::MaxLength => "max-length",
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
        // The frame leaves only after the syncvm, so start early by what the last one took; but never
        // promise more than half the bound, or a costly syncvm would make slots of no length.
        let lead_us = now.last_sync_cost_us.min(self.config.max_hold_us / 2);
        if now.oldest_frame_age_us.is_some_and(|age| age.saturating_add(lead_us) >= self.config.max_hold_us) {
            return Some(SlotEnd::OldestFrame);
        }
        let idle = now.activity == Activity::Idle && now.pending_inputs == 0;
        let untouched = now.oldest_frame_age_us.is_none() && now.consumed_inputs == 0;
        if idle && untouched {
            return (now.slot_age_us >= self.config.idle_max_slot_us).then_some(SlotEnd::MaxLength);
        }
        if now.slot_age_us >= self.config.max_slot_us {
            return Some(SlotEnd::MaxLength);
        }
        idle.then_some(SlotEnd::Idle)
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
        slot_age_us: 10,
        consumed_inputs: 0,
        pending_inputs: 0,
        last_sync_cost_us: 5_000,
    };

    fn decide(snapshot: SlotSnapshot) -> Option<SlotEnd> {
        SlotPolicy::new(SlotConfig::default()).decide(&snapshot)
    }

    #[test]
    fn an_untouched_idle_guest_rests_until_the_long_limit() {
        assert_eq!(decide(QUIET), None);
        assert_eq!(decide(SlotSnapshot { slot_age_us: 999_999, ..QUIET }), None);
        let end = decide(SlotSnapshot { slot_age_us: 1_000_000, ..QUIET });
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
        for activity in [Activity::Busy, Activity::Unknown] {
            assert_eq!(decide(SlotSnapshot { activity, ..held }), None);
        }
    }

    #[test]
    fn a_busy_guest_cannot_postpone_the_end() {
        let busy = SlotSnapshot { activity: Activity::Busy, pending_inputs: 9, ..QUIET };
        assert_eq!(decide(SlotSnapshot { slot_age_us: 100_000, ..busy }), Some(SlotEnd::MaxLength));
        let aged = SlotSnapshot { oldest_frame_age_us: Some(45_000), guard_bytes: 1, ..busy };
        assert_eq!(decide(aged), Some(SlotEnd::OldestFrame), "45 ms + 5 ms of syncvm");
        let younger = SlotSnapshot { oldest_frame_age_us: Some(44_999), ..aged };
        assert_eq!(decide(younger), None);
        let costly = SlotSnapshot { last_sync_cost_us: 1_000_000, ..younger };
        assert_eq!(decide(costly), Some(SlotEnd::OldestFrame));
        let fresh = SlotSnapshot { oldest_frame_age_us: Some(24_999), ..costly };
        assert_eq!(decide(fresh), None, "half the bound is always left");
        let full = SlotSnapshot { guard_bytes: 750, oldest_frame_age_us: Some(0), ..busy };
        assert_eq!(decide(full), Some(SlotEnd::GuardPressure));
    }
}
