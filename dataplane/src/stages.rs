//! Where a reactor's time goes: cycles and batch sizes per stage of its turn, always counted.
//!
//! A lap costs one reading of the cycle counter and three additions in memory that the reactor owns. The thread that
//! counts also answers who asks (`plover status` goes through the reactor), so nothing here is shared. Rejected: sampling
//! (a stage that starves the others for a moment is what one looks for), and HDR histograms (more memory than the cache
//! of a core has to spare).

use crate::cycles::{CycleClock, Cycles};

/// A part of a turn, in the order of the packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Frames from the uplink, and their proposal.
    Uplink,
    /// Messages of the other replicas, and what consensus makes of them.
    Fabric,
    /// What became durable.
    Log,
    /// Frames of the guest, into the guard or on their way.
    Collect,
    /// Committed frames into the guest.
    Deliver,
    /// Held frames that may leave.
    Release,
    /// Roles, slots, requests, reports.
    Decide,
    /// Asking the kernel what is ready; sleeping is not part of it.
    Look,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Stage; 8] = [
        Stage::Uplink,
        Stage::Fabric,
        Stage::Log,
        Stage::Collect,
        Stage::Deliver,
        Stage::Release,
        Stage::Decide,
        Stage::Look,
    ];

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Uplink => "uplink",
            Stage::Fabric => "fabric",
            Stage::Log => "log",
            Stage::Collect => "collect",
            Stage::Deliver => "deliver",
            Stage::Release => "release",
            Stage::Decide => "decide",
            Stage::Look => "look",
        }
    }
}

const _: () = {
    let mut at = 0;
    while at < Stage::ALL.len() {
        assert!(Stage::ALL[at] as usize == at);
        at += 1;
    }
};

/// Buckets of a [`Sizes`].
pub const SIZE_BUCKETS: usize = 20;

/// How often batches had which size: bucket `n` counts sizes from 2^n up to 2^(n+1) - 1, the last one everything larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sizes {
    /// Batches per bucket.
    pub buckets: [u64; SIZE_BUCKETS],
}

impl Sizes {
    /// Counts a batch; one of size 0 is none.
    #[inline]
    pub fn add(&mut self, size: usize) {
        if size > 0 {
            self.buckets[(size.ilog2() as usize).min(SIZE_BUCKETS - 1)] += 1;
        }
    }

    /// Batches counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }
}

/// What one stage did so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StageCounts {
    /// Ticks in laps that found work.
    pub busy_cycles: u64,
    /// Ticks in laps that found none.
    pub idle_cycles: u64,
    /// How much work a lap found: frames, messages or durable records.
    pub sizes: Sizes,
}

/// Counts laps; see the module.
#[derive(Debug)]
pub struct StageClock {
    clock: CycleClock,
    lap_began: Cycles,
    stages: [StageCounts; Stage::ALL.len()],
}

impl StageClock {
    /// Starts counting now.
    pub fn new() -> StageClock {
        let clock = CycleClock::new();
        StageClock { lap_began: clock.now(), clock, stages: Default::default() }
    }

    /// Ends a lap: the time since the last call went to `stage`, which handled `work` items.
    #[inline]
    pub fn lap(&mut self, stage: Stage, work: usize) {
        let now = self.clock.now();
        let spent = now.since(self.lap_began);
        self.lap_began = now;
        let counts = &mut self.stages[stage as usize];
        if work > 0 {
            counts.busy_cycles += spent;
            counts.sizes.add(work);
        } else {
            counts.idle_cycles += spent;
        }
    }

    /// The time since the last call was sleep, or somebody else's.
    pub fn skip(&mut self) {
        self.lap_began = self.clock.now();
    }

    /// What `stage` did so far.
    pub fn counts(&self, stage: Stage) -> StageCounts {
        self.stages[stage as usize]
    }

    /// Converts cycles to µs.
    pub fn to_us(&self, cycles: u64) -> u64 {
        self.clock.to_us(cycles)
    }
}

impl Default for StageClock {
    fn default() -> StageClock {
        StageClock::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_fall_into_their_powers_of_two() {
        let mut sizes = Sizes::default();
        [0, 1, 2, 3, 4, 255, 256, usize::MAX].into_iter().for_each(|size| sizes.add(size));
        let mut expected = [0; SIZE_BUCKETS];
        (expected[0], expected[1], expected[2], expected[7], expected[8]) = (1, 2, 1, 1, 1);
        expected[SIZE_BUCKETS - 1] = 1;
        assert_eq!(sizes.buckets, expected);
        assert_eq!(sizes.count(), 7);
    }

    #[test]
    fn every_cycle_goes_to_exactly_one_stage_or_to_none() {
        let mut clock = StageClock::new();
        let began = clock.lap_began;
        let (mut slept, mut busy) = (0, 0);
        for turn in 0..1000 {
            for stage in Stage::ALL {
                clock.lap(stage, turn % 3);
            }
            busy += u64::from(turn % 3 > 0);
            let before = clock.lap_began;
            clock.skip();
            slept += clock.lap_began.since(before);
        }
        let total = clock.lap_began.since(began);
        let counted: u64 =
            Stage::ALL.map(|stage| clock.counts(stage)).iter().map(|c| c.busy_cycles + c.idle_cycles).sum();
        assert_eq!(counted + slept, total);
        assert!(Stage::ALL.iter().all(|stage| clock.counts(*stage).sizes.count() == busy));
    }
}
