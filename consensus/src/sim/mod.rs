//! The simulator: one seed runs a whole group through crashes, lost disks, partitions and a network that
//! loses, doubles and reorders; the invariants are checked after every event.
//!
//! It is part of the library, not of the tests, so that `xtask` can run it for hours; nothing in the product
//! refers to it, and it needs no dependency. Wrong variants ([`Mutant`]) are made by lying to correct
//! replicas from outside, so that the product contains no faulty code.

mod chaos;
mod checker;
mod cluster;
mod disk;
mod finale;
mod product;
mod transcript;

use std::fmt;

pub use transcript::{ScriptError, play};

use chaos::Temper;
use cluster::{Cluster, GENESIS_LEADER, REPLICAS};

use crate::config::Config;
use crate::effects::Event;
use crate::ids::{Index, ReplicaId};

/// A deliberate mistake around the replicas, to see that the simulator notices it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// None.
    None,
    /// The log store says "durable" before it is.
    AckBeforePersist,
    /// A restarted replica claims to have an intact guest.
    IntactAfterRestart,
    /// Something acknowledges every `Accept` at once on behalf of the receiver: a majority of one.
    ForgedAcknowledgement,
    /// A wiped disk passes for one that merely has nothing new.
    VoteAfterWipe,
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Decides everything.
    pub seed: u64,
    /// Rounds of load and faults; one takes a few simulated milliseconds.
    pub rounds: u64,
    /// Whether to record what happens, which is slow.
    pub trace: bool,
    /// What to get wrong.
    pub mutant: Mutant,
}

impl Options {
    /// A run of the usual length.
    pub fn new(seed: u64) -> Options {
        Options { seed, rounds: 600, trace: false, mutant: Mutant::None }
    }
}

/// What a run did, to see that a campaign of seeds visits what it should.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Events that replicas took.
    pub events: u64,
    /// Entries that were committed.
    pub committed: u64,
    /// How many times a replica began to lead.
    pub reigns: u64,
    /// How many times a replica was started.
    pub lives: u64,
    /// Every guest was lost and an operator had to allow a cold start.
    pub cold_start: bool,
}

/// An invariant broke.
#[derive(Clone, Debug)]
pub struct Violation {
    /// The seed that shows it.
    pub seed: u64,
    /// When, in simulated time.
    pub at_us: u64,
    /// Which invariant, and how.
    pub what: String,
    /// What led to it, if it was recorded.
    pub trace: Vec<String>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        writeln!(f, "seed {} at {} us: {}", self.seed, self.at_us, self.what)?;
        write!(
            f,
            "replay: PLOVER_SIM_FIRST_SEED={} PLOVER_SIM_SEEDS=1 PLOVER_SIM_TRACE=1 cargo test -p consensus --test simulation seeds -- --nocapture",
            self.seed
        )
    }
}

impl std::error::Error for Violation {}

/// Small limits, so that windows, batches and retention are exceeded all the time.
fn tight_limits(config: &mut Config) {
    config.window_entries = 40;
    config.batch_entries = 5;
    config.peer_window_entries = 16;
    config.pipeline_messages = 4;
    config.retain_bytes = 600;
}

/// Runs one seed.
///
/// # Errors
/// The first invariant that breaks, or a group that makes no progress after all faults have ended.
pub fn run(options: &Options) -> Result<Summary, Box<Violation>> {
    let mut cluster = Cluster::new(options.seed, options.mutant, tight_limits);
    cluster.trace = options.trace.then(Vec::new);
    let temper = Temper::draw(&mut cluster);
    cluster.note(|| format!("{temper:?}"));
    for id in (0..REPLICAS).map(ReplicaId) {
        cluster.start(id);
    }
    cluster.nodes[GENESIS_LEADER.slot()].guest = Some(Index(0));
    cluster.step(GENESIS_LEADER, Event::GuestIntact(true));
    for _ in 0..options.rounds {
        let pause_us = 500 + cluster.rng.below(9500);
        cluster.run_until(cluster.now_us + pause_us);
        if cluster.violation.is_some() {
            break;
        }
        chaos::act(&mut cluster, &temper);
    }
    let finale = if cluster.violation.is_none() { finale::play(&mut cluster) } else { Ok(false) };
    match (cluster.violation.take(), finale) {
        (None, Ok(cold_start)) => Ok(Summary {
            events: cluster.events,
            committed: cluster.checker.committed(),
            reigns: cluster.checker.reigns,
            lives: cluster.nodes.iter().map(|node| u64::from(node.life)).sum(),
            cold_start,
        }),
        (Some(what), _) | (None, Err(what)) => Err(Box::new(Violation {
            seed: options.seed,
            at_us: cluster.now_us,
            what,
            trace: cluster.trace.take().unwrap_or_default(),
        })),
    }
}
