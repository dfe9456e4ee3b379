//! What the log holds, and what a replica remembers besides it.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

use crate::ids::{Index, ReplicaId, View, Viewstamp};

/// An opaque batch of frames. A clone is a reference count, never a copy.
///
/// The bytes are a part of memory that may be somebody else's and hold other payloads too, so that a driver which keeps
/// frames in an arena hands them over without a copy and without an allocation.
#[derive(Clone)]
pub struct Payload {
    memory: Arc<dyn AsRef<[u8]> + Send + Sync>,
    at: u32,
    len: u32,
}

impl Payload {
    /// The `len` bytes from `at` on in `memory`. As long as the payload or a clone of it lives, these bytes must not change.
    ///
    /// # Panics
    /// If `memory` does not have them, or has 4 GiB or more: a mistake of the caller.
    pub fn within(memory: Arc<dyn AsRef<[u8]> + Send + Sync>, at: usize, len: usize) -> Payload {
        let has = (*memory).as_ref().len();
        assert!(at <= has && len <= has - at, "bytes {at} to {at} + {len} of {has}");
        let small = |number: usize| u32::try_from(number).expect("a payload's memory is far below 4 GiB");
        Payload { at: small(at), len: small(len), memory }
    }

    /// The part of this payload that `part`, a slice of it, covers.
    pub(crate) fn part(&self, part: &[u8]) -> Payload {
        let at = (part.as_ptr() as usize).wrapping_sub(self.as_ptr() as usize);
        assert!(at <= self.len() && part.len() <= self.len() - at, "the part is not one of this payload's");
        // Both fit: they lie within `len`, and `at + len` within the memory.
        Payload { memory: Arc::clone(&self.memory), at: self.at + at as u32, len: part.len() as u32 }
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Payload {
        let len = bytes.len();
        Payload::within(Arc::new(bytes), 0, len)
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.memory).as_ref()[self.at as usize..][..self.len as usize]
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Payload) -> bool {
        // The same bytes in the same place as a rule.
        std::ptr::eq::<[u8]>(&**self, &**other) || **self == **other
    }
}

impl Eq for Payload {}

impl Hash for Payload {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_parts_of_shared_memory() {
        let memory = Arc::new((0..100u8).collect::<Vec<u8>>());
        let whole = Payload::within(memory.clone(), 10, 50);
        let part = whole.part(&whole[5..8]);
        assert_eq!(*part, [15, 16, 17]);
        assert_eq!(part, Payload::from(vec![15, 16, 17]), "equal is what has equal bytes");
        assert_eq!(whole.part(&whole[50..]).len(), 0);
        drop(whole);
        assert_eq!(Arc::strong_count(&memory), 2, "the part alone keeps it");
    }

    #[test]
    #[should_panic(expected = "not one of")]
    fn a_slice_of_something_else_is_no_part() {
        let payload = Payload::from(vec![1, 2, 3]);
        payload.part(&[1, 2, 3]);
    }

    #[test]
    #[should_panic(expected = "of 3")]
    fn bytes_beyond_the_memory_are_refused() {
        Payload::within(Arc::new(vec![1, 2, 3]), 2, 2);
    }
}
