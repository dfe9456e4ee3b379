//! Busy and idle time of a poll loop, because `top` shows 100 % for each one that spins.
//!
//! Plain fields: the thread that counts also answers who asks. Where the busy time goes is in [`crate::stages`].

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
}

/// Attributes the time between its calls.
#[derive(Debug)]
pub struct LoopCounter {
    counts: LoopCounts,
    since_us: u64,
}

impl LoopCounter {
    /// Starts counting at `now_us`.
    pub fn new(now_us: u64) -> LoopCounter {
        LoopCounter { counts: LoopCounts::default(), since_us: now_us }
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

    /// The counts so far.
    pub fn counts(&self) -> LoopCounts {
        self.counts
    }

    fn lap(&mut self, now_us: u64) -> u64 {
        let spent_us = now_us.saturating_sub(self.since_us);
        self.since_us = now_us;
        spent_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_is_attributed_once() {
        let mut counter = LoopCounter::new(100);
        counter.end_loop(130, true);
        counter.end_loop(135, false);
        counter.end_sleep(200);
        let counts = counter.counts();
        assert_eq!((counts.busy_us, counts.idle_us, counts.asleep_us), (30, 5, 65));
        assert_eq!((counts.busy_loops, counts.idle_loops), (1, 1));
    }
}
