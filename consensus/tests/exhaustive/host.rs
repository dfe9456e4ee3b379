//! A replica with its disk and its guest.

use std::collections::BTreeMap;
use std::hash::{Hash, Hasher};

use consensus::{Config, Entry, HardState, Index, Persist, Recovered, Replica, ReplicaId, View};

pub const REPLICAS: u8 = 3;
pub const GENESIS_LEADER: ReplicaId = ReplicaId(0);

/// What is durable, and what a crash may lose.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Disk {
    state: Option<HardState>,
    entries: BTreeMap<Index, (View, Entry)>,
    /// Not durable yet, in order.
    pub pending: Vec<Persist>,
}

impl Disk {
    /// Makes the first `count` of the pending records durable.
    pub fn apply(&mut self, count: usize) {
        for record in self.pending.drain(..count) {
            match record {
                Persist::State(state) => {
                    self.entries = self.entries.split_off(&state.base.index.next());
                    self.state = Some(state);
                }
                Persist::Append { index, view, entry } => {
                    self.entries.split_off(&index);
                    self.entries.insert(index, (view, entry));
                }
            }
        }
    }

    fn recovered(&self) -> Recovered {
        let entries = self.entries.iter().map(|(index, (view, entry))| (*index, *view, entry.clone()));
        Recovered::from_store(self.state, entries.collect())
    }
}

/// See the module. Two hosts are the same only if everything that can matter later is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    pub replica: Replica,
    pub disk: Disk,
    /// The `SyncVm` that made its guest whole, if it has one; 0 for the guest that was there first.
    pub guest: Option<Index>,
    /// How many times it was started.
    pub life: u8,
    /// The last committed entry that this process handed out.
    pub handed_out: Index,
    /// What it acknowledged last.
    pub acknowledged: (View, Index),
}

impl Host {
    pub fn new(id: ReplicaId) -> Host {
        Host::start(id, Disk::default(), 1)
    }

    fn start(id: ReplicaId, disk: Disk, life: u8) -> Host {
        let mut config = Config::new(id, GENESIS_LEADER, 1 + u64::from(life) * u64::from(REPLICAS) + u64::from(id.0));
        // No jitter: when a timeout fires is the explorer's choice.
        config.campaign_retry_us = 1;
        let recovered = disk.recovered();
        let handed_out = recovered.base.index;
        Host {
            replica: Replica::new(config, recovered, 0),
            disk,
            guest: None,
            life,
            handed_out,
            acknowledged: Default::default(),
        }
    }

    /// Process and guest die, `keep` of the records that were not durable turn out to be, and the process is
    /// started again.
    pub fn crash(&self, id: ReplicaId, keep: usize) -> Host {
        let mut disk = self.disk.clone();
        disk.apply(keep);
        disk.pending.clear();
        Host::start(id, disk, self.life + 1)
    }
}

/// A host that is compared and hashed often and changes rarely: most steps touch one of three.
#[derive(Clone, Debug)]
pub struct Hashed {
    host: Host,
    hash: u64,
}

impl Hashed {
    pub fn new(mut host: Host) -> Hashed {
        host.replica.make_canonical();
        // The same in every run, so that a path can be found again.
        let hash = ahash::RandomState::with_seeds(1, 2, 3, 4).hash_one(&host);
        Hashed { host, hash }
    }
}

impl std::ops::Deref for Hashed {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl PartialEq for Hashed {
    fn eq(&self, other: &Hashed) -> bool {
        self.hash == other.hash && self.host == other.host
    }
}

impl Eq for Hashed {}

impl Hash for Hashed {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.hash.hash(state);
    }
}
