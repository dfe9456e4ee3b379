//! The invariants, checked while the simulation runs. The checker knows every replica and all of the past,
//! which no replica does.

use std::collections::BTreeMap;

use super::cluster::Node;
use crate::entry::{Base, Entry};
use crate::ids::{Index, ReplicaId, View};
use crate::replica::Replica;

/// See the module.
#[derive(Debug)]
pub(super) struct Checker {
    genesis_leader: ReplicaId,
    /// Entry 1 is at 0.
    committed: Vec<(View, Entry)>,
    /// Which process (replica and incarnation) sent entries in a view.
    leaders: BTreeMap<View, (ReplicaId, u32)>,
    /// How many times a replica began to lead.
    pub(super) reigns: u64,
}

impl Checker {
    pub(super) fn new(genesis_leader: ReplicaId) -> Checker {
        Checker { genesis_leader, committed: Vec::new(), leaders: BTreeMap::new(), reigns: 0 }
    }

    pub(super) fn committed(&self) -> u64 {
        self.committed.len() as u64
    }

    /// I1: nobody ever commits something else at an index. I2: a majority of disks holds what is committed.
    pub(super) fn on_committed(
        &mut self,
        by: ReplicaId,
        (index, view, entry): (Index, View, &Entry),
        nodes: &[Node],
    ) -> Result<(), String> {
        let known = self.committed.len() as u64;
        if index.0 <= known {
            let (old_view, old) = &self.committed[index.0 as usize - 1];
            return if (*old_view, old) == (view, entry) {
                Ok(())
            } else {
                Err(format!("I1: {by} commits {entry} of {view} at {index}, where {old} of {old_view} was committed"))
            };
        }
        if index.0 != known + 1 {
            return Err(format!("I1: {by} commits {index} while only {known} entries were committed before"));
        }
        self.committed.push((view, entry.clone()));
        self.on_disks(index, nodes)
    }

    /// I2 for one entry. A wiped disk that has not caught up counts as a loss that the group may bear.
    fn on_disks(&self, index: Index, nodes: &[Node]) -> Result<(), String> {
        let (view, entry) = &self.committed[index.0 as usize - 1];
        let held = nodes.iter().filter(|node| node.wiped || node.disk.holds(index, *view)).count();
        if held * 2 > nodes.len() {
            Ok(())
        } else {
            Err(format!("I2: {entry} of {view} at {index} is committed and on {held} of {} disks", nodes.len()))
        }
    }

    /// I2 for all that was committed lately; older entries are looked at in their own time.
    pub(super) fn on_crash(&self, nodes: &[Node]) -> Result<(), String> {
        let last = self.committed.len() as u64;
        (last.saturating_sub(64)..last).try_for_each(|index| self.on_disks(Index(index + 1), nodes))
    }

    /// I1: one process per view.
    pub(super) fn on_accept_sent(&mut self, by: (ReplicaId, u32), view: View) -> Result<(), String> {
        let leader = *self.leaders.entry(view).or_insert(by);
        if leader == by {
            Ok(())
        } else {
            Err(format!("I1: {view} is led by {} (life {}) and {} (life {})", leader.0, leader.1, by.0, by.1))
        }
    }

    /// The roles by the committed entries below `index`.
    fn roles_before(&self, index: Index) -> Base {
        let mut roles = Base::default();
        for (at, (view, entry)) in self.committed.iter().enumerate().take(index.prev().0 as usize) {
            roles.advance(Index(at as u64 + 1), *view, entry);
        }
        roles
    }

    /// I2 and I6 for a replica that begins to lead.
    pub(super) fn on_leading(&mut self, node: &Node, replica: &Replica, view: View) -> Result<(), String> {
        self.reigns += 1;
        let me = node.id;
        for (at, (known_view, entry)) in self.committed.iter().enumerate() {
            let index = Index(at as u64 + 1);
            if index > replica.base().index && replica.entry(index) != Some((*known_view, entry)) {
                return Err(format!("I2: {me} leads {view} without the committed {entry} of {known_view} at {index}"));
            }
        }
        let noop = self.committed.iter().position(|entry| *entry == (view, Entry::Noop { leader: me }));
        let Some(noop) = noop else {
            return Err(format!("I6: {me} leads {view} and its Noop is not committed"));
        };
        let roles = self.roles_before(Index(noop as u64 + 1));
        let first = noop == 0 && me == self.genesis_leader;
        if !first && roles.second != Some(me) && roles.leader != Some(me) {
            let (second, leader) = (roles.second, roles.leader);
            return Err(format!("I6: {me} leads {view}; the log names second {second:?}, leader {leader:?}"));
        }
        if node.cold_start {
            return Ok(());
        }
        match node.guest {
            None => Err(format!("I6: {me} leads {view} and has no guest")),
            Some(whole) if roles.leader != Some(me) && !first && whole < roles.second_base => {
                let base = roles.second_base;
                Err(format!("I6: {me} leads {view} with a guest of syncvm {whole}; the log says {base}"))
            }
            Some(_) => Ok(()),
        }
    }
}
