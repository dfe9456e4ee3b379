//! What the product does around consensus, as far as roles depend on it: the leader makes another guest whole
//! by a syncvm, names it secondary, truncates behind later syncvms, and drops a secondary that fell silent.

use super::cluster::{Cluster, REPLICAS};
use crate::effects::Event;
use crate::entry::Entry;
use crate::ids::{Index, ReplicaId, View};

#[derive(Clone, Copy, Debug)]
struct Sync {
    view: View,
    with: ReplicaId,
    with_life: u32,
    index: Index,
}

/// The leader's plans.
#[derive(Debug, Default)]
pub(super) struct Product {
    sync: Option<Sync>,
    /// The last role entry that it proposed, and the view.
    proposed: Option<(View, Index)>,
}

const SILENCE_US: u64 = 100_000;

impl Cluster {
    /// Lets every leader act.
    pub(super) fn drive_products(&mut self) {
        for id in (0..REPLICAS).map(ReplicaId) {
            if let Some(view) = self.replica(id).and_then(|replica| replica.leading()) {
                self.drive_leader(id, view);
            }
        }
    }

    fn drive_leader(&mut self, id: ReplicaId, view: View) {
        let product = &mut self.nodes[id.slot()].product;
        product.sync = product.sync.filter(|sync| sync.view == view);
        product.proposed = product.proposed.filter(|(proposed, _)| *proposed == view);
        let (sync, proposed) = (product.sync, product.proposed);
        let Some(replica) = self.replica(id) else {
            return;
        };
        if proposed.is_some_and(|(_, index)| replica.commit_index() < index) {
            return;
        }
        if let Some(sync) = sync {
            self.drive_sync(id, sync);
            return;
        }
        let silent = |peer: ReplicaId| replica.peer_silent_us(peer, self.now_us) > SILENCE_US;
        match replica.second() {
            Some(second) if second == id || silent(second) || self.nodes[second.slot()].guest.is_none() => {
                self.propose_role(id, view, Entry::Second { replica: None, base: Index(0) });
            }
            Some(second) => self.start_sync(id, view, second),
            None => {
                let with = ReplicaId((id.0 + 1 + self.rng.below(2) as u8) % REPLICAS);
                if self.replica(id).is_some_and(|replica| replica.peer_silent_us(with, self.now_us) < SILENCE_US) {
                    self.start_sync(id, view, with);
                }
            }
        }
    }

    fn propose_role(&mut self, id: ReplicaId, view: View, entry: Entry) -> Option<Index> {
        let index = self.propose(id, entry)?.ok()?;
        self.nodes[id.slot()].product.proposed = Some((view, index));
        Some(index)
    }

    fn start_sync(&mut self, id: ReplicaId, view: View, with: ReplicaId) {
        if let Some(index) = self.propose_role(id, view, Entry::SyncVm { with }) {
            let with_life = self.nodes[with.slot()].life;
            self.nodes[id.slot()].product.sync = Some(Sync { view, with, with_life, index });
        }
    }

    /// The syncvm is committed at the leader; once the other side has it too, its guest is whole.
    fn drive_sync(&mut self, id: ReplicaId, sync: Sync) {
        let other = &self.nodes[sync.with.slot()];
        let Some(replica) = other.replica.as_ref().filter(|_| other.life == sync.with_life) else {
            self.nodes[id.slot()].product.sync = None;
            return;
        };
        if replica.commit_index() < sync.index {
            return;
        }
        let refuses = replica.view() != sync.view;
        self.nodes[id.slot()].product.sync = None;
        // A replica that has left this view refuses the transfer.
        if refuses {
            return;
        }
        self.nodes[sync.with.slot()].guest = Some(sync.index);
        self.step(sync.with, Event::GuestIntact(true));
        if self.replica(id).and_then(|replica| replica.second()) == Some(sync.with) {
            self.step(id, Event::Truncate(sync.index));
        } else {
            self.propose_role(id, sync.view, Entry::Second { replica: Some(sync.with), base: sync.index });
        }
    }
}
