//! What the log holds, and what a replica remembers besides it.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use crate::ids::{Index, ReplicaId, View, Viewstamp};

/// An opaque batch of frames. A clone is a reference count, never a copy.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Payload(Arc<Vec<u8>>);

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Payload {
        Payload(Arc::new(bytes))
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// One log entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Input of the virtual machine: an opaque batch of frames.
    Input(Payload),
    /// A syncvm of the leader with `with`; its number is its index (PLOVER §4.2).
    SyncVm {
        /// The replica whose guest is made equal to the leader's.
        with: ReplicaId,
    },
    /// From here on `replica` is the secondary, or nobody is.
    Second {
        /// The new secondary.
        replica: Option<ReplicaId>,
        /// The index of the `SyncVm` that made its guest whole; 0 when there is none.
        base: Index,
    },
    /// The first entry of every view: says who leads it.
    Noop {
        /// The leader of the view.
        leader: ReplicaId,
    },
}

/// The bytes that the log accounts for an entry besides its payload.
pub(crate) const ENTRY_OVERHEAD_BYTES: u64 = 64;

impl Entry {
    /// The opaque part of the entry: the payload of an input, nothing otherwise.
    pub fn payload(&self) -> &[u8] {
        match self {
            Entry::Input(payload) => payload,
            Entry::SyncVm { .. } | Entry::Second { .. } | Entry::Noop { .. } => &[],
        }
    }

    /// What the entry weighs against windows and limits, in bytes.
    pub(crate) fn weight_bytes(&self) -> u64 {
        self.payload().len() as u64 + ENTRY_OVERHEAD_BYTES
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Entry::Input(payload) => write!(f, "Input({} B)", payload.len()),
            Entry::SyncVm { with } => write!(f, "SyncVm({with})"),
            Entry::Second { replica: Some(replica), base } => write!(f, "Second({replica}, base {base})"),
            Entry::Second { replica: None, .. } => write!(f, "Second(none)"),
            Entry::Noop { leader } => write!(f, "Noop({leader})"),
        }
    }
}

/// What the entries up to and including some index amount to once they are gone: the place where the log
/// begins, and the roles as of there, so that roles survive truncation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Base {
    /// The last index that is covered; the log holds what follows.
    pub index: Index,
    /// The view of the entry at `index`.
    pub view: View,
    /// The secondary that the last `Second` entry up to `index` names.
    pub second: Option<ReplicaId>,
    /// The `base` of that entry.
    pub second_base: Index,
    /// The leader that the last `Noop` up to `index` names.
    pub leader: Option<ReplicaId>,
}

impl Base {
    /// The viewstamp of the last entry covered.
    pub fn viewstamp(&self) -> Viewstamp {
        Viewstamp { view: self.view, index: self.index }
    }

    /// Moves one entry forward.
    pub(crate) fn advance(&mut self, index: Index, view: View, entry: &Entry) {
        (self.index, self.view) = (index, view);
        match *entry {
            Entry::Second { replica, base } => (self.second, self.second_base) = (replica, base),
            Entry::Noop { leader } => self.leader = Some(leader),
            Entry::Input(_) | Entry::SyncVm { .. } => {}
        }
    }
}

/// What a replica must remember besides its entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct HardState {
    /// It accepts nothing from views below this one.
    pub promised: View,
    /// Where its log begins.
    pub base: Base,
    /// It came back with an empty or doubtful disk and must not vote until it has caught up (R13, R15).
    pub learner: bool,
    /// Entries that were stored before this record and lie above `base` are void: the replica jumped (R11).
    pub void_entries: bool,
}
