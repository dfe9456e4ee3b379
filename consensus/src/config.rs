//! What a replica is told when it starts.

use crate::entry::{Base, Entry, HardState};
use crate::ids::{Index, ReplicaId, View};

/// The largest group: fixed arrays of this size keep the hot paths free of allocation.
pub const MAX_REPLICAS: usize = 7;

/// Settings of a replica. All replicas of a group must agree on `replicas` and `genesis_leader`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// This replica.
    pub me: ReplicaId,
    /// The size of the group: odd, at most [`MAX_REPLICAS`].
    pub replicas: u8,
    /// Who leads first, when the log is empty.
    pub genesis_leader: ReplicaId,
    /// A leader is heard at least this often.
    pub heartbeat_interval_us: u64,
    /// A peer that was not heard for this long counts as dead.
    pub failure_timeout_us: u64,
    /// A refused or unanswered campaign is tried again after this time, plus up to as much again.
    pub campaign_retry_us: u64,
    /// Entries that may be proposed and not yet committed.
    pub window_entries: u64,
    /// Bytes of such entries.
    pub window_bytes: u64,
    /// Entries in one `Accept`.
    pub batch_entries: u64,
    /// Bytes of entries in one `Accept`; a single larger entry still goes, alone.
    pub batch_bytes: u64,
    /// Entries sent to one peer and not yet acknowledged by it.
    pub peer_window_entries: u64,
    /// Bytes of such entries.
    pub peer_window_bytes: u64,
    /// Messages with entries that are on their way to one peer; while that many are, entries gather into
    /// larger batches.
    pub pipeline_messages: usize,
    /// Bytes of truncated entries that stay in memory for peers that are behind.
    pub retain_bytes: u64,
    /// Entries that the secondary's guest may be behind before inputs are refused (R16).
    pub second_lag_entries: u64,
    /// Bytes of such entries.
    pub second_lag_bytes: u64,
    /// How long the secondary's guest may take to consume an entry before inputs are refused (R16). More than
    /// the longest syncvm that should not be felt: while it is applied, the secondary consumes nothing.
    pub second_lag_us: u64,
    /// Seeds jitter and nonces. Must differ between two starts of a process (R13 relies on it).
    pub seed: u64,
}

impl Config {
    /// The settings of a group of three with the default timing: heartbeats every 25 ms, 100 ms of silence
    /// count as death.
    pub fn new(me: ReplicaId, genesis_leader: ReplicaId, seed: u64) -> Config {
        Config {
            me,
            replicas: 3,
            genesis_leader,
            heartbeat_interval_us: 25_000,
            failure_timeout_us: 100_000,
            campaign_retry_us: 20_000,
            window_entries: 4096,
            window_bytes: 64 << 20,
            batch_entries: 256,
            batch_bytes: 1 << 20,
            peer_window_entries: 2048,
            peer_window_bytes: 16 << 20,
            pipeline_messages: 16,
            retain_bytes: 64 << 20,
            second_lag_entries: 4096,
            second_lag_bytes: 32 << 20,
            second_lag_us: 2_000_000,
            seed,
        }
    }

    /// Whether `count` replicas are more than half.
    pub(crate) fn is_majority(&self, count: usize) -> bool {
        count * 2 > usize::from(self.replicas)
    }

    /// Every replica but this one.
    pub(crate) fn peers(&self) -> impl Iterator<Item = ReplicaId> + use<> {
        let me = self.me;
        (0..self.replicas).map(ReplicaId).filter(move |id| *id != me)
    }

    /// # Panics
    /// When a limit is zero or an id is outside the group: a replica with such settings could never work.
    pub(crate) fn check(&self) {
        assert!(
            self.replicas % 2 == 1 && usize::from(self.replicas) <= MAX_REPLICAS,
            "replicas is {}: must be odd and at most {MAX_REPLICAS}",
            self.replicas
        );
        assert!(self.me.0 < self.replicas, "me is {}: must be below replicas = {}", self.me, self.replicas);
        assert!(
            self.genesis_leader.0 < self.replicas,
            "genesis_leader is {}: must be below replicas = {}",
            self.genesis_leader,
            self.replicas
        );
        let limits = [
            self.heartbeat_interval_us,
            self.campaign_retry_us,
            self.window_entries,
            self.window_bytes,
            self.batch_entries,
            self.batch_bytes,
            self.peer_window_entries,
            self.peer_window_bytes,
            self.pipeline_messages as u64,
            self.second_lag_entries,
            self.second_lag_bytes,
            self.second_lag_us,
        ];
        assert!(limits.iter().all(|limit| *limit > 0), "a limit or interval in {self:?} is 0: must be at least 1");
        assert!(
            self.failure_timeout_us >= 2 * self.heartbeat_interval_us,
            "failure_timeout_us is {}: must be at least twice heartbeat_interval_us = {}, or one lost heartbeat is a death",
            self.failure_timeout_us,
            self.heartbeat_interval_us
        );
    }
}

/// What the disk holds when a process starts. The default is an empty disk.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// The promise that was stored last.
    pub promised: View,
    /// Where the log begins.
    pub base: Base,
    /// The stored entries in index order; those at or below the base are ignored.
    pub entries: Vec<(Index, View, Entry)>,
    /// As in [`HardState::learner`].
    pub learner: bool,
    /// As in [`HardState::void_entries`].
    pub void_entries: bool,
    /// The store cut damaged records off its end, and they may have been acknowledged: this disk is a former
    /// state of itself, and may vote no more than an empty one (R15). The store must keep the evidence until the
    /// first record of this process is durable.
    pub doubtful: bool,
}

impl Recovered {
    /// From the stored state record, if there is one, and the stored entries; not doubtful.
    pub fn from_store(state: Option<HardState>, entries: Vec<(Index, View, Entry)>) -> Recovered {
        let Some(state) = state else {
            return Recovered::default();
        };
        Recovered {
            promised: state.promised,
            base: state.base,
            entries,
            learner: state.learner,
            void_entries: state.void_entries,
            doubtful: false,
        }
    }

    /// A new disk or a wiped one: every replica that ever took part has stored a promise above 0 or that it is
    /// a learner. A doubtful disk is not blank even when nothing is left on it: something was there.
    pub fn is_blank(&self) -> bool {
        let empty = self.base == Base::default() && self.entries.is_empty();
        empty && self.promised == View(0) && !self.learner && !self.doubtful
    }
}
