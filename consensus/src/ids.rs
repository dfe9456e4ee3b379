//! Newtypes for everything that is counted or named, so that an index cannot be passed where a view is meant.

use std::fmt;

/// One of the replicas of a group, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaId(pub u8);

impl ReplicaId {
    /// The place of this replica in an array over the group.
    pub const fn slot(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ReplicaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}", self.0)
    }
}

/// A view: the reign of one leader. View `v` belongs to replica `v % replicas`; 0 means "none yet".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct View(pub u64);

impl View {
    /// The replica that alone may lead this view.
    pub fn owner(self, replicas: u8) -> ReplicaId {
        ReplicaId((self.0 % u64::from(replicas)) as u8)
    }

    /// The smallest view above this one that `owner` may lead; `None` when the numbers are used up.
    pub fn next_owned_by(self, owner: ReplicaId, replicas: u8) -> Option<View> {
        let (n, owner) = (u64::from(replicas), u64::from(owner.0));
        let step = (owner + n - self.0 % n) % n;
        self.0.checked_add(if step == 0 { n } else { step }).map(View)
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

/// A position in the log. The first entry has index 1; 0 means "nothing".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Index(pub u64);

impl Index {
    /// The position after this one. An index counts proposals, so that `u64` cannot run out in practice;
    /// it saturates rather than wraps.
    pub const fn next(self) -> Index {
        Index(self.0.saturating_add(1))
    }

    /// The position before this one; 0 stays 0.
    pub const fn prev(self) -> Index {
        Index(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The name of an entry: the view that first proposed it, and its index. Two logs that hold the same
/// viewstamp hold the same entries up to there. Compared view first, which orders whole logs by age (R5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Viewstamp {
    /// The view in which the entry was first proposed.
    pub view: View,
    /// Its position.
    pub index: Index,
}

impl fmt::Display for Viewstamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.index, self.view)
    }
}

/// The number of a [`Persist`](crate::Persist) effect: counted from 1 in order of emission since the process began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PersistId(pub u64);
