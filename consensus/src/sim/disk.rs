//! A simulated disk: records become durable in order; a crash keeps a prefix of those that were not yet.

use std::collections::{BTreeMap, VecDeque};

use crate::config::Recovered;
use crate::effects::Persist;
use crate::entry::{Entry, HardState};
use crate::ids::{Index, PersistId, View};

#[derive(Debug, Default)]
pub(super) struct Disk {
    state: Option<HardState>,
    entries: BTreeMap<Index, (View, Entry)>,
    pending: VecDeque<Persist>,
    /// Records applied since the process began.
    applied: u64,
}

impl Disk {
    /// Takes a record and returns its number.
    pub(super) fn push(&mut self, record: Persist) -> PersistId {
        self.pending.push_back(record);
        PersistId(self.applied + self.pending.len() as u64)
    }

    /// Makes every record through this one durable.
    pub(super) fn apply(&mut self, through: PersistId) {
        while self.applied < through.0 {
            let Some(record) = self.pending.pop_front() else {
                return;
            };
            self.applied += 1;
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

    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The process dies: `keep` of the records that were not durable turn out to be.
    pub(super) fn crash(&mut self, keep: usize) {
        self.apply(PersistId(self.applied + keep as u64));
        self.pending.clear();
        self.applied = 0;
    }

    pub(super) fn wipe(&mut self) {
        *self = Disk::default();
    }

    /// Pretends that a replica voted here before, which a wiped disk cannot know.
    pub(super) fn forge_state(&mut self) {
        self.state = Some(HardState { promised: View(1), ..HardState::default() });
    }

    pub(super) fn recovered(&self) -> Recovered {
        let entries = self.entries.iter().map(|(index, (view, entry))| (*index, *view, entry.clone()));
        Recovered::from_store(self.state, entries.collect())
    }

    /// A replica that starts from this disk votes.
    pub(super) fn lets_vote(&self) -> bool {
        self.state.is_some_and(|state| !state.learner)
    }

    pub(super) fn holds(&self, index: Index, view: View) -> bool {
        let Some(state) = self.state else {
            return false;
        };
        index <= state.base.index
            || (!state.void_entries && self.entries.get(&index).is_some_and(|(have, _)| *have == view))
    }
}
