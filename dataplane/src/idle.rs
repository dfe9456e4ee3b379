//! What a reactor does after a turn: poll again, ask for notifications, or sleep.
//!
//! The rule against lost wake-ups is the order: a reactor sleeps only after a turn that found nothing *while every source
//! had been asked to notify before the turn began*. Whatever comes after the look at its source then makes a descriptor
//! readable, and the sleep ends at once. [`crate::doorbell`] is the other half for sources in memory. A reactor that
//! spins asks for nothing: a guest that need not kick saves an exit per burst, a peer a system call.
//!
//! The decisions only; the reactor carries them out. So they are tested without a clock.

/// How a reactor waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleStrategy {
    /// It never sleeps and never asks for notifications. For a core that it has to itself.
    Spin {
        /// Somebody else runs on its core: it lets that go first whenever it finds nothing.
        yields: bool,
    },
    /// It polls for `spin_us` after the last work, then sleeps until it is notified.
    Adaptive {
        /// How long it polls. With 0 it never stops asking for notifications, and sleeps after each turn that leaves
        /// nothing to do.
        spin_us: u64,
        /// It runs above everything else on its core (a real-time class): after this long without a pause it takes one of
        /// [`BREATHER_US`], or a guest on the same core would starve. `u64::MAX`: never.
        breath_after_us: u64,
    },
}

impl std::fmt::Display for IdleStrategy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            IdleStrategy::Spin { yields: false } => f.write_str("spin"),
            IdleStrategy::Spin { yields: true } => f.write_str("spin (shared core)"),
            IdleStrategy::Adaptive { spin_us, .. } => write!(f, "adaptive, spin {spin_us} us"),
        }
    }
}

/// The pause of a reactor that has been busy for too long.
pub const BREATHER_US: u64 = 50;

/// Descriptors are looked at so often by a reactor whose traffic comes through memory; then they carry control only.
const CONTROL_LOOK_US: u64 = 50;

/// What a turn found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Found {
    /// Anything at all.
    pub work: bool,
    /// A budget ended a stage: there is more at once, and no notification will say so.
    pub more: bool,
}

/// What to do before the next turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Nothing: sources in memory are looked at again at once.
    Again,
    /// Ask the kernel which descriptors are ready, without waiting.
    Look,
    /// The same, and let others run on this core first.
    Yield,
    /// Ask every source for notifications, then ask the kernel which descriptors are ready, without waiting. The next turn
    /// looks at everything.
    Arm,
    /// Sleep until something is ready or the next deadline.
    Sleep,
    /// Sleep for at most [`BREATHER_US`].
    Breathe,
}

/// Makes the decisions; see the module.
#[derive(Debug)]
pub struct Idler {
    strategy: IdleStrategy,
    /// Traffic comes through descriptors, so that each turn without them would find nothing.
    by_descriptor: bool,
    armed: bool,
    last_work_us: u64,
    /// Since when it has not slept.
    awake_since_us: u64,
    looked_us: u64,
}

impl Idler {
    /// Starts armed: nothing was looked at yet.
    pub fn new(strategy: IdleStrategy, now_us: u64) -> Idler {
        let armed = matches!(strategy, IdleStrategy::Adaptive { .. });
        let (last_work_us, awake_since_us, looked_us) = (now_us, now_us, 0);
        Idler { strategy, by_descriptor: true, armed, last_work_us, awake_since_us, looked_us }
    }

    /// Says whether uplink or fabric announce their frames by descriptors; true at first.
    pub fn set_by_descriptor(&mut self, by_descriptor: bool) {
        self.by_descriptor = by_descriptor;
    }

    /// How it waits.
    pub fn strategy(&self) -> IdleStrategy {
        self.strategy
    }

    /// Whether sources must be left asking for notifications when they are found empty in the next turn.
    pub fn armed(&self) -> bool {
        self.armed
    }

    /// A sleep ended at `now_us`.
    pub fn woke(&mut self, now_us: u64) {
        self.awake_since_us = now_us;
        self.looked_us = now_us;
    }

    /// A turn ended at `now_us`.
    pub fn after_turn(&mut self, now_us: u64, found: Found) -> Rest {
        match self.strategy {
            IdleStrategy::Spin { yields } => {
                if yields && !found.work {
                    self.looked_us = now_us;
                    return Rest::Yield;
                }
                self.look_or_go_on(now_us)
            }
            IdleStrategy::Adaptive { spin_us, breath_after_us } => {
                self.after_adaptive_turn(now_us, found, spin_us, breath_after_us)
            }
        }
    }

    fn after_adaptive_turn(&mut self, now_us: u64, found: Found, spin_us: u64, breath_after_us: u64) -> Rest {
        if found.work {
            self.last_work_us = now_us;
        }
        let resting = !found.more && (spin_us == 0 || !found.work);
        if resting && self.armed {
            return Rest::Sleep;
        }
        if now_us.saturating_sub(self.awake_since_us) >= breath_after_us {
            return Rest::Breathe;
        }
        if resting && now_us.saturating_sub(self.last_work_us) >= spin_us {
            self.armed = true;
            self.looked_us = now_us;
            return Rest::Arm;
        }
        // Busy again: whoever feeds us need not notify. Without a spin it is not worth changing back and forth.
        self.armed &= spin_us == 0;
        self.look_or_go_on(now_us)
    }

    fn look_or_go_on(&mut self, now_us: u64) -> Rest {
        if self.by_descriptor || now_us.saturating_sub(self.looked_us) >= CONTROL_LOOK_US {
            self.looked_us = now_us;
            return Rest::Look;
        }
        Rest::Again
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOTHING: Found = Found { work: false, more: false };
    const WORK: Found = Found { work: true, more: false };
    const MORE: Found = Found { work: true, more: true };
    const NO_BREATH: u64 = u64::MAX;

    fn adaptive(spin_us: u64, breath_after_us: u64) -> Idler {
        Idler::new(IdleStrategy::Adaptive { spin_us, breath_after_us }, 0)
    }

    #[test]
    fn adaptive_spins_then_arms_then_looks_once_more_then_sleeps() {
        let mut idler = adaptive(20, NO_BREATH);
        assert_eq!(idler.after_turn(100, WORK), Rest::Look);
        assert!(!idler.armed());
        assert_eq!(idler.after_turn(119, NOTHING), Rest::Look);
        assert_eq!(idler.after_turn(120, NOTHING), Rest::Arm);
        assert!(idler.armed());
        assert_eq!(idler.after_turn(121, NOTHING), Rest::Sleep);
        // What came between the look and the arming is found by the look after it.
        assert_eq!(idler.after_turn(200, WORK), Rest::Look);
        assert!(!idler.armed());
    }

    #[test]
    fn a_wake_up_without_work_goes_back_to_sleep_at_once() {
        let mut idler = adaptive(20, NO_BREATH);
        assert_eq!(idler.after_turn(100, NOTHING), Rest::Sleep, "a new one is armed");
        idler.woke(500);
        assert_eq!(idler.after_turn(501, NOTHING), Rest::Sleep);
    }

    #[test]
    fn without_a_spin_it_sleeps_as_soon_as_no_stage_was_cut_short() {
        let mut idler = adaptive(0, NO_BREATH);
        assert_eq!(idler.after_turn(10, MORE), Rest::Look);
        assert_eq!(idler.after_turn(20, WORK), Rest::Sleep);
        assert!(idler.armed());
    }

    #[test]
    fn a_reactor_above_all_others_pauses_when_it_is_always_busy() {
        let mut idler = adaptive(0, 1000);
        assert_eq!(idler.after_turn(999, MORE), Rest::Look);
        assert_eq!(idler.after_turn(1000, MORE), Rest::Breathe);
        idler.woke(1050);
        assert_eq!(idler.after_turn(1051, MORE), Rest::Look);
    }

    #[test]
    fn traffic_in_memory_spares_most_looks_at_descriptors() {
        let mut idler = Idler::new(IdleStrategy::Spin { yields: false }, 0);
        assert_eq!(idler.after_turn(1000, NOTHING), Rest::Look);
        idler.set_by_descriptor(false);
        let looks = (1001..2001).filter(|now| idler.after_turn(*now, WORK) == Rest::Look).count();
        assert_eq!(looks as u64, 1000 / CONTROL_LOOK_US);
    }

    proptest! {
        /// The rule of the module, whatever turns find and however long they take.
        #[test]
        fn nobody_sleeps_but_after_an_armed_turn_that_left_nothing(
            spin_us in prop_oneof![Just(0u64), 1u64..200],
            breath in prop_oneof![Just(NO_BREATH), 1u64..5000],
            by_descriptor in any::<bool>(),
            turns in prop::collection::vec((0u64..300, any::<bool>(), any::<bool>()), 1..200),
        ) {
            let mut idler = adaptive(spin_us, breath);
            idler.set_by_descriptor(by_descriptor);
            let (mut now, mut last_work) = (0, 0);
            for (took, work, more) in turns {
                now += took;
                let found = Found { work, more: work && more };
                let armed_during_turn = idler.armed();
                last_work = if work { now } else { last_work };
                match idler.after_turn(now, found) {
                    Rest::Sleep => {
                        prop_assert!(armed_during_turn && !found.more);
                        prop_assert!(now - last_work >= spin_us || !work);
                        idler.woke(now);
                    }
                    Rest::Breathe => idler.woke(now),
                    Rest::Arm => prop_assert!(idler.armed() && now - last_work >= spin_us),
                    Rest::Yield => prop_assert!(false, "only a spinner yields"),
                    Rest::Again => prop_assert!(!by_descriptor),
                    Rest::Look => {}
                }
            }
        }

        #[test]
        fn a_spinner_never_sleeps_and_never_arms(
            yields in any::<bool>(),
            turns in prop::collection::vec((0u64..300, any::<bool>()), 1..100),
        ) {
            let mut idler = Idler::new(IdleStrategy::Spin { yields }, 0);
            let mut now = 0;
            for (took, work) in turns {
                now += took;
                let rest = idler.after_turn(now, Found { work, more: false });
                prop_assert!(!matches!(rest, Rest::Sleep | Rest::Breathe | Rest::Arm));
                prop_assert!(!idler.armed());
                prop_assert_eq!(rest == Rest::Yield, yields && !work);
            }
        }
    }
}
