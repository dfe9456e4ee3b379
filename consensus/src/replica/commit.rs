//! When entries count as committed, and when they may be forgotten (R8, R10).

use super::{Phase, Replica};
use crate::config::MAX_REPLICAS;
use crate::effects::{Effects, Notice};
use crate::entry::Entry;
use crate::ids::Index;

impl Replica {
    /// A leader commits what a majority holds durably, once that reaches into its own view. Entries of earlier
    /// views are committed by the `Noop` above them and never by count: a majority may hold one and it may still
    /// lose against a later view (R8).
    pub(super) fn commit_by_majority(&mut self, out: &mut Effects) {
        let Phase::Leader(leading) = &self.phase else {
            return;
        };
        let noop = leading.noop;
        let mut held = [Index(0); MAX_REPLICAS];
        let held = &mut held[..usize::from(self.config.replicas)];
        for (slot, index) in held.iter_mut().enumerate() {
            let peer = &self.peers[slot];
            *index = if slot == self.config.me.slot() { self.durability.index() } else { peer.counted };
        }
        held.sort_unstable_by(|a, b| b.cmp(a));
        let majority = held[usize::from(self.config.replicas) / 2];
        if majority < noop || majority <= self.commit {
            return;
        }
        self.advance_commit(majority, out);
        let mut begins = false;
        if let Phase::Leader(leading) = &mut self.phase
            && !leading.serving
        {
            leading.serving = true;
            begins = true;
        }
        if begins {
            self.cold_start = false;
            out.notices.push(Notice::Leading { view: self.promised });
        }
        self.tell_commit(begins, out);
    }

    /// Hands out the entries that became committed.
    pub(super) fn advance_commit(&mut self, to: Index, out: &mut Effects) {
        let to = to.min(self.log.last().index);
        while self.commit < to {
            let index = self.commit.next();
            let (view, entry) = self.log.get(index).expect("entries above the commit index are in the log");
            self.committed.advance(index, view, entry);
            out.committed.push((index, view, entry.clone()));
            self.commit = index;
            if let Entry::Second { replica, .. } = *entry {
                self.second_committed(view, replica);
            }
        }
    }

    /// Moves the base up, to the commit index at most.
    pub(super) fn truncate(&mut self, to: Index, out: &mut Effects) {
        let to = to.min(self.commit);
        if to > self.log.base().index {
            self.log.truncate(to, self.config.retain_bytes);
            self.persist_state(false, out);
        }
    }
}
