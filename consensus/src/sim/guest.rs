//! A guest as far as its past matters: whose execution its state contains, and through where.

use crate::ids::{Index, ReplicaId, View};

/// The state of a guest is the sequence of executions that led to it. Two guests that consume the same inputs are
/// not equal; only a syncvm makes them so.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    /// The `SyncVm` that made it whole; 0 for the guest that was there first.
    pub(super) whole: Index,
    /// Whose execution it follows; its own replica's when that leads.
    pub(super) follows: ReplicaId,
    /// As leader of that view, the guest consumed through that index.
    history: Vec<(View, Index)>,
}

impl Guest {
    pub(super) fn booted(at: Index, on: ReplicaId) -> Guest {
        Guest { whole: at, follows: on, history: Vec::new() }
    }

    /// The copy of this guest that a syncvm makes.
    pub(super) fn copied(&self, syncvm: Index, leader: ReplicaId) -> Guest {
        Guest { whole: syncvm, follows: leader, history: self.history.clone() }
    }

    /// It runs as the leader's guest.
    pub(super) fn led(&mut self, view: View, through: Index) {
        match self.history.last_mut() {
            Some((last, index)) if *last == view => *index = through,
            _ => self.history.push((view, through)),
        }
    }

    /// Whether what the leader's guest of `view` had done by `through` is part of this guest's past.
    pub(super) fn contains(&self, view: View, through: Index) -> bool {
        self.history.iter().rev().any(|(led, index)| *led == view && *index >= through)
    }
}
