//! Vectors of entries between two messages, so that steady state allocates none.
//!
//! A plain stack in [`Effects`](crate::Effects), which goes by every replica's hands and its driver's anyway. Rejected: a
//! vector that returns by itself when it is dropped (needs a shared, locked pool), and messages that
//! refer to the log instead of holding entries (nobody could keep one while the replica goes on).

use crate::entry::Entry;
use crate::ids::View;

/// The entries of a message, each with the view that first proposed it.
pub(crate) type Entries = Vec<(View, Entry)>;

/// More than the messages that a leader has on their way within one step.
const MAX_KEPT: usize = 64;
/// A larger vector came from a peer with other settings, and is not worth keeping.
const MAX_KEPT_ENTRIES: usize = 1024;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Spare(Vec<Entries>);

impl Spare {
    /// An empty vector, with memory if there is one.
    pub(crate) fn take(&mut self) -> Entries {
        self.0.pop().unwrap_or_default()
    }

    /// Keeps the memory of `entries` for later, within limits; what it holds is dropped now.
    pub(crate) fn give(&mut self, mut entries: Entries) {
        if (1..=MAX_KEPT_ENTRIES).contains(&entries.capacity()) && self.0.len() < MAX_KEPT {
            entries.clear();
            self.0.push(entries);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Entry;
    use crate::ids::ReplicaId;

    #[test]
    fn memory_comes_back_empty_and_within_limits() {
        let mut spare = Spare::default();
        let mut entries = Entries::with_capacity(7);
        entries.push((View(1), Entry::Noop { leader: ReplicaId(1) }));
        spare.give(entries);
        spare.give(Entries::new());
        spare.give(Entries::with_capacity(MAX_KEPT_ENTRIES + 1));
        assert_eq!(spare.0.len(), 1, "neither a vector without memory nor a huge one is kept");
        let again = spare.take();
        assert!(again.is_empty() && again.capacity() >= 7);
        assert_eq!(spare.take().capacity(), 0);
        (0..2 * MAX_KEPT).for_each(|_| spare.give(Entries::with_capacity(1)));
        assert_eq!(spare.0.len(), MAX_KEPT);
    }
}
