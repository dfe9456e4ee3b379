//! Measuring harness: what Plover's parts cost, next to a peer or a physical limit measured in the same run.
//!
//! A measurement is a pair of functions, ours and the peer's, each of which does a fixed amount of work and
//! returns one number. [`sample::compare`] calls them in a fixed alternating order and computes medians and
//! the spread; the result is a [`row::Row`], which goes into a table for people and, as one JSON object per
//! line, into `target/perf/results.ndjson` for machines. Every measurement also checks what it measured
//! (contents, counts, order): a fast wrong answer fails the run.
//!
//! Rejected: criterion. It runs one side to the end before it starts the other, so whatever else the machine
//! does in between lands in the ratio, and the ratio is what we publish.

pub mod dataplane;
pub mod fabric;
pub mod failover;
pub mod group;
pub mod log;
pub mod ordering;
pub mod page_hash;
pub mod peers;
pub mod pin;
pub mod plot;
pub mod replica_steps;
pub mod results;
pub mod row;
pub mod rows;
pub mod sample;
pub mod services;
pub mod syncvm;
pub mod table;

/// How much work to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Enough for figures.
    Full,
    /// Seconds only: shows that the measurement works, its figures mean nothing.
    Smoke,
}

impl Effort {
    /// `full` or `smoke`, whichever applies.
    #[must_use]
    pub fn pick<T>(self, full: T, smoke: T) -> T {
        match self {
            Effort::Full => full,
            Effort::Smoke => smoke,
        }
    }

    /// How often each side is measured. Odd, so that the median is a run that happened.
    #[must_use]
    pub fn runs(self) -> usize {
        self.pick(15, 3)
    }
}
