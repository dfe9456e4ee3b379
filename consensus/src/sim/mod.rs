//! The simulator: one seed runs a whole group through crashes, disk faults, partitions and a network that
//! loses, doubles and reorders; the invariants are checked after every event.
//!
//! It is part of the library, not of the tests, so that `cargo xtask simulate` can run it for hours; nothing in the
//! product refers to it, and it needs no dependency. What goes wrong around correct replicas ([`Mutant`]) is made
//! here; wrong replicas are made from `consensus/mutants.toml`, so that the product contains no faulty code.

mod chaos;
mod checker;
mod cluster;
mod disk;
mod finale;
mod guest;
mod network;
mod product;
mod transcript;

use std::fmt;

pub use transcript::{ScriptError, play};

use chaos::Temper;
use cluster::{Cluster, GENESIS_LEADER, REPLICAS};
use guest::Guest;

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
    /// Frames leave without the question whether they may.
    ReleaseUnasked,
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
    /// How many of those found a doubtful disk.
    pub doubtful_starts: u64,
    /// Deaths in the middle of a step.
    pub ambushes: u64,
    /// Stores that refused a record or broke.
    pub storage_failures: u64,
    /// Syncvms that were acknowledged.
    pub syncvms: u64,
    /// How many times frames left.
    pub releases: u64,
    /// How many times they were not allowed to.
    pub releases_refused: u64,
    /// Inputs that were refused because the secondary's guest was too far behind.
    pub refused_for_lag: u64,
    /// The furthest that a secondary's guest was behind when an input was taken, in entries.
    pub longest_lag: u64,
    /// Every guest was lost and an operator had to allow a cold start in the end.
    pub cold_starts: u64,
    /// The group was whole in the end, and lived through one more fault.
    pub whole: u64,
}

impl Summary {
    /// Adds another run.
    pub fn add(&mut self, other: &Summary) {
        self.events += other.events;
        self.committed += other.committed;
        self.reigns += other.reigns;
        self.lives += other.lives;
        self.doubtful_starts += other.doubtful_starts;
        self.ambushes += other.ambushes;
        self.storage_failures += other.storage_failures;
        self.syncvms += other.syncvms;
        self.releases += other.releases;
        self.releases_refused += other.releases_refused;
        self.refused_for_lag += other.refused_for_lag;
        self.longest_lag = self.longest_lag.max(other.longest_lag);
        self.cold_starts += other.cold_starts;
        self.whole += other.whole;
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { events, committed, reigns, lives, doubtful_starts, ambushes, .. } = self;
        let Summary { storage_failures, syncvms, releases, releases_refused, .. } = self;
        let Summary { refused_for_lag, longest_lag, cold_starts, whole, .. } = self;
        write!(
            f,
            "{events} events, {committed} entries, {reigns} reigns, {lives} lives ({doubtful_starts} doubtful), "
        )?;
        write!(f, "{ambushes} deaths amid a step, {storage_failures} store failures, {syncvms} syncvms, ")?;
        write!(f, "{releases} releases ({releases_refused} refused), {refused_for_lag} inputs refused for lag ")?;
        write!(f, "(longest {longest_lag}), {cold_starts} cold starts, {whole} whole in the end")
    }
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
        write!(f, "replay: cargo xtask simulate --first {} --seeds 1 --trace", self.seed)
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
    config.second_lag_entries = 24;
    config.second_lag_bytes = 5000;
    config.second_lag_us = 300_000;
}

/// Runs one seed.
///
/// # Errors
/// The first invariant that breaks, or a group that makes no progress after all faults have ended.
pub fn run(options: &Options) -> Result<Summary, Box<Violation>> {
    let mut cluster = Cluster::new(options.seed, options.mutant, tight_limits);
    cluster.trace = options.trace.then(Vec::new);
    cluster.products = true;
    let temper = Temper::draw(&mut cluster);
    cluster.note(|| format!("{temper:?}"));
    for id in (0..REPLICAS).map(ReplicaId) {
        cluster.start(id);
    }
    cluster.nodes[GENESIS_LEADER.slot()].guest = Some(Guest::booted(Index(0), GENESIS_LEADER));
    cluster.step(GENESIS_LEADER, Event::GuestIntact(true));
    for _ in 0..options.rounds {
        let pause_us = 500 + cluster.rng.below(9500);
        cluster.run_until(cluster.now_us + pause_us);
        if cluster.violation.is_some() {
            break;
        }
        chaos::act(&mut cluster, &temper);
    }
    let mut finale = Ok(());
    if cluster.violation.is_none() {
        finale = finale::play(&mut cluster).and_then(|whole| {
            cluster.counts.whole += u64::from(whole);
            if whole && finale::play_starvation(&mut cluster)? {
                return finale::play_single_fault(&mut cluster);
            }
            Ok(())
        });
    }
    match (cluster.violation.take(), finale) {
        (None, Ok(())) => Ok(Summary { committed: cluster.checker.committed(), ..cluster.counts }),
        (Some(what), _) | (None, Err(what)) => Err(Box::new(Violation {
            seed: options.seed,
            at_us: cluster.now_us,
            what,
            trace: cluster.trace.take().unwrap_or_default(),
        })),
    }
}
