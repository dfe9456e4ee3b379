//! The cheapest clock there is: the CPU's time stamp counter where it runs evenly, else `clock_gettime`.
//!
//! A reactor reads it at every border between two stages, so it must cost nanoseconds. Readings are turned into time when
//! somebody looks, by comparison with the monotonic clock since the start: no calibration delays the start. Rejected:
//! `rdtscp` and fences (they wait for the pipeline; a few instructions more or less do not matter here).

use crate::wait::now_us;

/// A reading, in ticks of unknown length. Only differences mean anything, and only on one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cycles(u64);

impl Cycles {
    /// Ticks from `earlier` to `self`; 0 if the counter went backwards (a thread that moved between unsynchronised cores).
    pub fn since(self, earlier: Cycles) -> u64 {
        let ticks = self.0.wrapping_sub(earlier.0);
        if ticks > u64::MAX / 2 { 0 } else { ticks }
    }

    /// So many ticks later.
    #[cfg(test)]
    pub(crate) fn plus(self, ticks: u64) -> Cycles {
        Cycles(self.0.wrapping_add(ticks))
    }
}

/// Reads cycles and tells how long they are.
#[derive(Debug, Clone)]
pub struct CycleClock {
    has_tsc: bool,
    since: Cycles,
    since_us: u64,
}

impl CycleClock {
    /// A clock that starts now.
    pub fn new() -> CycleClock {
        let has_tsc = has_even_tsc();
        CycleClock { has_tsc, since: read(has_tsc), since_us: now_us() }
    }

    /// The present reading.
    #[inline]
    pub fn now(&self) -> Cycles {
        read(self.has_tsc)
    }

    /// Whether a reading is one instruction, and ticks are some tenths of a nanosecond.
    pub fn is_cheap(&self) -> bool {
        self.has_tsc
    }

    /// Converts `ticks` to µs, as measured from the clock's start to now. A clock that is younger than a millisecond knows
    /// its own rate badly.
    pub fn to_us(&self, ticks: u64) -> u64 {
        if !self.has_tsc {
            return ticks / 1000;
        }
        let (passed, passed_us) = (self.now().since(self.since), now_us().saturating_sub(self.since_us));
        if passed == 0 { 0 } else { (u128::from(ticks) * u128::from(passed_us) / u128::from(passed)) as u64 }
    }
}

impl Default for CycleClock {
    fn default() -> CycleClock {
        CycleClock::new()
    }
}

#[inline]
fn read(has_tsc: bool) -> Cycles {
    #[cfg(target_arch = "x86_64")]
    if has_tsc {
        // SAFETY: RDTSC has no memory effects, and every x86-64 CPU has it; `has_tsc` says that the kernel left it to users.
        return Cycles(unsafe { core::arch::x86_64::_rdtsc() });
    }
    let _ = has_tsc;
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Cycles(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
}

/// Whether the time stamp counter runs at one rate in all power states (CPUID 8000_0007h, EDX bit 8).
fn has_even_tsc() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        const INVARIANT_TSC: u32 = 1 << 8;
        const POWER_LEAF: u32 = 0x8000_0007;
        let highest = core::arch::x86_64::__cpuid(0x8000_0000).eax;
        highest >= POWER_LEAF && core::arch::x86_64::__cpuid(POWER_LEAF).edx & INVARIANT_TSC != 0
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measures_a_pause(clock: &CycleClock) {
        let (before, before_us) = (clock.now(), now_us());
        while now_us() - before_us < 20_000 {
            std::hint::spin_loop();
        }
        let us = clock.to_us(clock.now().since(before));
        let truth = now_us() - before_us;
        // The clock is as old as the pause, so its rate is known to the µs that its start was read apart.
        assert!(us.abs_diff(truth) < truth / 10, "{us} us instead of {truth} us");
    }

    #[test]
    fn cycles_become_time() {
        measures_a_pause(&CycleClock::new());
    }

    #[test]
    fn so_do_those_of_a_machine_without_an_even_counter() {
        measures_a_pause(&CycleClock { has_tsc: false, since: read(false), since_us: now_us() });
    }

    #[test]
    fn a_counter_that_goes_backwards_counts_nothing() {
        assert_eq!(Cycles(5).since(Cycles(7)), 0);
        assert_eq!(Cycles(7).since(Cycles(5)), 2);
    }
}
