//! Busy and idle time of a poll loop, because `top` shows 100 % for each one that spins.
//!
//! The loop counts in plain fields; now and then it publishes them, and any thread reads the
//! published values. Rejected: atomics in the loop (a read-modify-write per packet for a number
//! that is looked at once a second).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a poll loop did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoopCounts {
    /// Time in iterations that found work, µs.
    pub busy_us: u64,
    /// Time in iterations that found none, µs, sleeping excluded.
    pub idle_us: u64,
    /// Time asleep, µs.
    pub asleep_us: u64,
    /// Iterations that found work.
    pub busy_loops: u64,
    /// Iterations that found none.
    pub idle_loops: u64,
    /// Frames from the uplink.
    pub frames_in: u64,
    /// Frames from the guest.
    pub frames_out: u64,
    /// Frames dropped for want of room, in either direction.
    pub frames_dropped: u64,
}

const FIELDS: usize = 8;

impl LoopCounts {
    fn to_array(self) -> [u64; FIELDS] {
        let LoopCounts { busy_us, idle_us, asleep_us, busy_loops, idle_loops, frames_in, frames_out, frames_dropped } =
            self;
        [busy_us, idle_us, asleep_us, busy_loops, idle_loops, frames_in, frames_out, frames_dropped]
    }

    fn from_array(values: [u64; FIELDS]) -> LoopCounts {
        let [busy_us, idle_us, asleep_us, busy_loops, idle_loops, frames_in, frames_out, frames_dropped] = values;
        LoopCounts { busy_us, idle_us, asleep_us, busy_loops, idle_loops, frames_in, frames_out, frames_dropped }
    }
}

/// The loop's own end: counts and publishes.
#[derive(Debug)]
pub struct LoopCounter {
    /// The counts; the loop adds to the frame fields itself.
    pub counts: LoopCounts,
    since_us: u64,
    published: Arc<[AtomicU64; FIELDS]>,
}

impl LoopCounter {
    /// Starts counting at `now_us`.
    pub fn new(now_us: u64) -> LoopCounter {
        LoopCounter { counts: LoopCounts::default(), since_us: now_us, published: Arc::default() }
    }

    /// Ends one iteration; the time since the last call is busy if it found work, else idle.
    pub fn end_loop(&mut self, now_us: u64, found_work: bool) {
        let spent_us = self.lap(now_us);
        if found_work {
            self.counts.busy_us += spent_us;
            self.counts.busy_loops += 1;
        } else {
            self.counts.idle_us += spent_us;
            self.counts.idle_loops += 1;
        }
    }

    /// Ends a sleep; the time since the last call was asleep.
    pub fn end_sleep(&mut self, now_us: u64) {
        self.counts.asleep_us += self.lap(now_us);
    }

    /// Makes the present counts visible to readers.
    pub fn publish(&self) {
        for (cell, value) in self.published.iter().zip(self.counts.to_array()) {
            cell.store(value, Ordering::Relaxed);
        }
    }

    /// A reader for other threads.
    pub fn reader(&self) -> LoopCountsReader {
        LoopCountsReader(Arc::clone(&self.published))
    }

    fn lap(&mut self, now_us: u64) -> u64 {
        let spent_us = now_us.saturating_sub(self.since_us);
        self.since_us = now_us;
        spent_us
    }
}

/// Reads what a loop published last. Fields may stem from two neighbouring publications.
#[derive(Debug, Clone)]
pub struct LoopCountsReader(Arc<[AtomicU64; FIELDS]>);

impl LoopCountsReader {
    /// The counts as published last.
    pub fn read(&self) -> LoopCounts {
        LoopCounts::from_array(std::array::from_fn(|i| self.0[i].load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_attributed_once_and_published_on_demand() {
        let mut counter = LoopCounter::new(100);
        let reader = counter.reader();
        counter.end_loop(130, true);
        counter.end_loop(135, false);
        counter.end_sleep(200);
        counter.counts.frames_dropped += 3;
        assert_eq!(reader.read(), LoopCounts::default());
        counter.publish();
        let counts = reader.read();
        assert_eq!((counts.busy_us, counts.idle_us, counts.asleep_us), (30, 5, 65));
        assert_eq!((counts.busy_loops, counts.idle_loops, counts.frames_dropped), (1, 1, 3));
        assert_eq!(counts, counter.counts);
    }
}
