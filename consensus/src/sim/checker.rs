//! The invariants, checked while the simulation runs. The checker knows every replica and all of the past,
//! which no replica does.

use std::collections::{BTreeMap, BTreeSet};

use super::cluster::Node;
use crate::entry::{Base, Entry};
use crate::ids::{Index, ReplicaId, View};
use crate::replica::{Release, Replica};

/// See the module.
#[derive(Debug)]
pub(super) struct Checker {
    genesis_leader: ReplicaId,
    /// Entry 1 is at 0.
    committed: Vec<(View, Entry)>,
    pub(super) inputs: u64,
    /// The last `Second` that was committed, and its view.
    second: Option<(View, Option<ReplicaId>)>,
    /// Which process (replica and incarnation) sent entries in a view.
    leaders: BTreeMap<View, (ReplicaId, u32)>,
    /// Through where frames of a view's guest left.
    released: BTreeMap<View, Index>,
    /// Syncvms, by view and index, after which a guest was whole.
    made_whole: BTreeSet<(View, Index)>,
}

impl Checker {
    pub(super) fn new(genesis_leader: ReplicaId) -> Checker {
        Checker {
            genesis_leader,
            committed: Vec::new(),
            inputs: 0,
            second: None,
            leaders: BTreeMap::new(),
            released: BTreeMap::new(),
            made_whole: BTreeSet::new(),
        }
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
        match entry {
            Entry::Input(_) => self.inputs += 1,
            Entry::Second { replica, .. } => self.second = Some((view, *replica)),
            Entry::SyncVm { .. } | Entry::Noop { .. } => {}
        }
        self.committed.push((view, entry.clone()));
        self.on_disks(index, nodes)
    }

    /// I2 for one entry. What a lost disk held before counts: that loss the group may bear.
    fn on_disks(&self, index: Index, nodes: &[Node]) -> Result<(), String> {
        let (view, entry) = &self.committed[index.0 as usize - 1];
        let holds = |node: &&Node| {
            node.disk.holds(index, *view) || node.lost.as_ref().is_some_and(|former| former.holds(index, *view))
        };
        let held = nodes.iter().filter(holds).count();
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

    pub(super) fn on_made_whole(&mut self, view: View, syncvm: Index) {
        self.made_whole.insert((view, syncvm));
    }

    /// I3: what leaves was acknowledged, or nobody else may lead; and whoever leads later already has it.
    pub(super) fn on_release(
        &mut self,
        nodes: &[Node],
        by: ReplicaId,
        view: View,
        release: Release,
        through: Index,
    ) -> Result<(), String> {
        let fine = match release {
            Release::SyncVm(index) => self.made_whole.contains(&(view, index)),
            Release::Alone => self.second == Some((view, None)),
        };
        if !fine {
            return Err(format!("I3: {by} releases {release:?} in {view}; the last Second is {:?}", self.second));
        }
        let later = |node: &&Node| node.leading().is_some_and(|led| led > view);
        let lacks = |node: &&Node| node.guest.as_ref().is_none_or(|guest| !guest.contains(view, through));
        if let Some(other) = nodes.iter().filter(later).find(lacks) {
            return Err(format!("I3: {by} releases {release:?} in {view}, and {} leads later without it", other.id));
        }
        let released = self.released.entry(view).or_default();
        *released = through.max(*released);
        Ok(())
    }

    /// The roles by the committed entries below `index`.
    fn roles_before(&self, index: Index) -> Base {
        let mut roles = Base::default();
        for (at, (view, entry)) in self.committed.iter().enumerate().take(index.prev().0 as usize) {
            roles.advance(Index(at as u64 + 1), *view, entry);
        }
        roles
    }

    /// I2, I3 and I6 for a replica that begins to lead.
    pub(super) fn on_leading(&mut self, node: &Node, replica: &Replica, view: View) -> Result<(), String> {
        let me = node.id;
        // A leader whose Noop was chosen may learn so late, when a higher view has committed more.
        let earlier = |(_, (led, _)): &(usize, &(View, Entry))| *led <= view;
        for (at, (known_view, entry)) in self.committed.iter().enumerate().filter(earlier) {
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
            // The operator gave up what was released before.
            self.released.clear();
            return Ok(());
        }
        let Some(guest) = &node.guest else {
            return Err(format!("I6: {me} leads {view} and has no guest"));
        };
        if roles.leader != Some(me) && !first && guest.whole < roles.second_base {
            let (whole, base) = (guest.whole, roles.second_base);
            return Err(format!("I6: {me} leads {view} with a guest of syncvm {whole}; the log says {base}"));
        }
        match self.released.range(..view).find(|(led, through)| !guest.contains(**led, **through)) {
            Some((led, through)) => {
                Err(format!("I3: {me} leads {view}; its guest lacks what {led} released through {through}"))
            }
            None => Ok(()),
        }
    }
}
