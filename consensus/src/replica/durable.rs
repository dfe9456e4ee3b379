//! Which records are durable, and hence what may be acknowledged (R2).

use std::collections::VecDeque;

use super::Replica;
use crate::effects::{Effects, Persist};
use crate::entry::{Entry, HardState};
use crate::ids::{Index, PersistId, View};

/// Counts records and remembers which entries they cover.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Durability {
    pub(super) emitted: PersistId,
    pub(super) durable: PersistId,
    /// The last state record that an acknowledgement depends on: a promise, a jump, a promotion. Mere
    /// truncation is not one, so that it holds up nobody.
    pub(super) binding: PersistId,
    /// Appends that are not durable yet.
    pub(super) pending: VecDeque<(PersistId, Index)>,
    index: Index,
    /// Stored entries are void until the next append supersedes them (R11).
    void_entries: bool,
}

impl Durability {
    pub(super) fn new(index: Index, void_entries: bool) -> Durability {
        let none = PersistId(0);
        Durability { emitted: none, durable: none, binding: none, pending: VecDeque::new(), index, void_entries }
    }

    /// Every entry of the log through here is durable.
    pub(super) fn index(&self) -> Index {
        self.index
    }

    /// The promise, and whatever else state must hold before anything is acknowledged, is durable.
    pub(super) fn is_bound(&self) -> bool {
        self.durable >= self.binding
    }

    fn next(&mut self) -> PersistId {
        self.emitted.0 += 1;
        self.emitted
    }

    fn supersede(&mut self, from: Index) {
        while self.pending.back().is_some_and(|(_, index)| *index >= from) {
            self.pending.pop_back();
        }
        self.index = self.index.min(from.prev());
    }

    fn persisted(&mut self, through: PersistId) {
        self.durable = self.durable.max(through.min(self.emitted));
        while let Some((_, index)) = self.pending.pop_front_if(|(id, _)| *id <= self.durable) {
            self.index = index;
        }
    }
}

impl Replica {
    pub(super) fn persist_state(&mut self, binding: bool, out: &mut Effects) {
        let id = self.durability.next();
        if binding {
            self.durability.binding = id;
        }
        self.blank = false;
        out.persist.push(Persist::State(HardState {
            promised: self.promised,
            base: *self.log.base(),
            learner: self.learner,
            void_entries: self.durability.void_entries,
        }));
    }

    /// Appends to the log, in memory and towards the disk.
    pub(super) fn append(&mut self, view: View, entry: Entry, out: &mut Effects) -> Index {
        let index = self.log.append(view, entry.clone());
        let id = self.durability.next();
        self.durability.supersede(index);
        self.durability.pending.push_back((id, index));
        out.persist.push(Persist::Append { index, view, entry });
        if self.durability.void_entries {
            self.durability.void_entries = false;
            self.persist_state(true, out);
        }
        index
    }

    /// Drops entries from `from` on: they conflict with the log of a leader that is elected, so that they are
    /// not committed and never will be (R5).
    pub(super) fn cut(&mut self, from: Index) {
        assert!(from > self.commit, "cut at {from}: entries through {} are committed", self.commit);
        self.log.cut(from);
        self.durability.supersede(from);
    }

    /// Begins the log anew after `base`.
    pub(super) fn void_log(&mut self) {
        self.durability.pending.clear();
        self.durability.index = self.log.base().index;
        self.durability.void_entries = true;
    }

    pub(super) fn on_persisted(&mut self, through: PersistId, out: &mut Effects) {
        self.durability.persisted(through);
        self.ask_once_durable(out);
        self.answer_prepare(out);
        self.answer_accept(out);
        self.count_votes(out);
        self.commit_by_majority(out);
    }
}
