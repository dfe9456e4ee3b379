//! What has happened so far, as nobody in the group knows it, and whether it breaks an invariant.

use std::collections::BTreeMap;

use consensus::{Base, Entry, Index, ReplicaId, View};

use crate::host::{GENESIS_LEADER, Host};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ledger {
    /// Entry 1 is at 0.
    pub committed: Vec<(View, Entry)>,
    /// Which process (replica and life) sent entries in a view.
    leaders: BTreeMap<View, (ReplicaId, u8)>,
    /// Who began to serve, in order, since the start of the exploration.
    pub reigns: Vec<(View, ReplicaId)>,
    /// How I1 was broken.
    pub broken_i1: Option<&'static str>,
    /// How I6 was broken.
    pub broken_i6: Option<&'static str>,
}

impl Ledger {
    /// `by` hands out a committed entry. I1: nobody ever commits something else at an index, or skips one.
    pub fn on_committed(&mut self, expected: Index, (index, view, entry): (Index, View, Entry)) {
        if index != expected {
            self.broken_i1 = Some("a replica hands out an entry out of order");
        }
        let known = Index(self.committed.len() as u64);
        if index == known.next() {
            self.committed.push((view, entry));
        } else if index > known {
            self.broken_i1 = Some("an entry is committed before the one below it");
        } else if self.committed[index.0 as usize - 1] != (view, entry) {
            self.broken_i1 = Some("two entries are committed at one index");
        }
    }

    /// I1: one process per view.
    pub fn on_accept_sent(&mut self, by: ReplicaId, life: u8, view: View) {
        if *self.leaders.entry(view).or_insert((by, life)) != (by, life) {
            self.broken_i1 = Some("two processes lead one view");
        }
    }

    /// The roles by the committed entries below `index`.
    fn roles_before(&self, index: Index) -> Base {
        let mut roles = Base::default();
        for (_, entry) in self.committed.iter().take(index.prev().0 as usize) {
            match *entry {
                Entry::Second { replica, base } => (roles.second, roles.second_base) = (replica, base),
                Entry::Noop { leader } => roles.leader = Some(leader),
                Entry::Input(_) | Entry::SyncVm { .. } => {}
            }
        }
        roles
    }

    /// I6: only a replica that the committed log names begins to serve, and only with a whole guest.
    pub fn on_leading(&mut self, me: ReplicaId, host: &Host, view: View) {
        self.reigns.push((view, me));
        let noop = self.committed.iter().position(|entry| *entry == (view, Entry::Noop { leader: me }));
        let Some(noop) = noop else {
            self.broken_i6 = Some("a replica serves before its Noop is committed");
            return;
        };
        let roles = self.roles_before(Index(noop as u64 + 1));
        let first = noop == 0 && me == GENESIS_LEADER;
        if !first && roles.second != Some(me) && roles.leader != Some(me) {
            self.broken_i6 = Some("a witness leads");
        }
        match host.guest {
            None => self.broken_i6 = Some("a replica without a guest leads"),
            Some(whole) if !first && roles.leader != Some(me) && whole < roles.second_base => {
                self.broken_i6 = Some("a replica leads with a guest that is older than the log says");
            }
            Some(_) => {}
        }
    }
}
