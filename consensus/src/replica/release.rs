//! When the effects of a guest may leave, and who may be named secondary (R17).
//!
//! A leader releases what every replica that may lead after it has in its guest. Who that is, the log says: the
//! committed secondary, and whoever a `Second` names that is proposed and may be chosen without this leader's
//! knowledge. What their guests hold, the syncvms say that this leader proposed.

use super::{Leading, Phase, Replica};
use crate::ids::{Index, ReplicaId, View};

/// Why frames should leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// The syncvm with this index, which ends their slot, was acknowledged.
    SyncVm(Index),
    /// There is no secondary whose guest would have to contain them.
    Alone,
}

/// A syncvm of this view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct SyncVm {
    index: Index,
    with: ReplicaId,
}

impl Replica {
    /// Whether frames of the reign over `view` may leave now (I3). To be asked before every release: the answer
    /// holds until the next event.
    pub fn may_release(&self, view: View, release: Release) -> bool {
        let Some(leading) = self.serving(view) else {
            return false;
        };
        match release {
            // A syncvm under way ends in a guest that may be named: what leaves after its stop must be in the
            // next one, and when it stops only the wiring knows.
            Release::Alone => leading.alone && leading.syncvm.is_none() && self.heirs().next().is_none(),
            Release::SyncVm(index) => leading.syncvm.is_some_and(|last| {
                last.index == index && index <= self.commit && self.heirs().all(|id| id == last.with)
            }),
        }
    }

    fn serving(&self, view: View) -> Option<&Leading> {
        match &self.phase {
            Phase::Leader(leading) if leading.serving && view == self.promised => Some(leading),
            _ => None,
        }
    }

    /// Whoever else may lead by a log that a majority may hold.
    fn heirs(&self) -> impl Iterator<Item = ReplicaId> {
        let me = self.config.me;
        self.committed.second.into_iter().chain(self.log.named_above(self.commit)).filter(move |id| *id != me)
    }

    /// Whether the last syncvm of this view is `base`, with `replica`, and committed. That it was acknowledged
    /// too is the wiring's word.
    pub(super) fn is_whole(&self, replica: ReplicaId, base: Index) -> bool {
        self.serving(self.promised)
            .and_then(|leading| leading.syncvm)
            .is_some_and(|last| last.index == base && last.with == replica && base <= self.commit)
    }

    /// An entry was appended by `propose`; `with` is the partner if it is a `SyncVm`.
    pub(super) fn note_proposed(&mut self, index: Index, with: Option<ReplicaId>) {
        let now_us = self.now_us;
        if let Phase::Leader(leading) = &mut self.phase {
            if let Some(with) = with {
                leading.syncvm = Some(SyncVm { index, with });
            }
            leading.lag_mark.get_or_insert((index, now_us));
        }
    }

    pub(super) fn on_syncvm_failed(&mut self, index: Index) {
        if let Phase::Leader(leading) = &mut self.phase {
            leading.syncvm.take_if(|last| last.index == index);
        }
    }

    /// A `Second` of `view` was committed: syncvms from before a `Second(none)` name nobody any more.
    pub(super) fn second_committed(&mut self, view: View, second: Option<ReplicaId>) {
        let (commit, promised) = (self.commit, self.promised);
        if let Phase::Leader(leading) = &mut self.phase {
            leading.alone = second.is_none() && view == promised;
            leading.lag_mark = None;
            if second.is_none() {
                leading.syncvm.take_if(|last| last.index < commit);
            }
        }
    }
}
