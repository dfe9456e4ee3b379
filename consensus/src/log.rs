//! The log in memory: entries without holes above a floor, with the role entries found at once.
//!
//! The floor may lie below the base: truncated entries stay for a while for peers that are behind. Everything
//! here is bookkeeping; what may be cut and when is decided by the callers.

use std::collections::VecDeque;

use crate::entry::{Base, Entry};
use crate::ids::{Index, ReplicaId, View, Viewstamp};
use crate::spare::Entries;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Slot {
    view: View,
    entry: Entry,
    /// Weight of everything through this entry, counted from wherever the process began.
    end_bytes: u64,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Log {
    slots: VecDeque<Slot>,
    /// The entry before the first slot.
    floor: Viewstamp,
    floor_end_bytes: u64,
    base: Base,
    /// Indices above the base of `Second` and `Noop` entries, ascending.
    role_marks: VecDeque<Index>,
}

impl Log {
    pub(crate) fn new(base: Base) -> Log {
        Log { slots: VecDeque::new(), floor: base.viewstamp(), floor_end_bytes: 0, base, role_marks: VecDeque::new() }
    }

    pub(crate) fn base(&self) -> &Base {
        &self.base
    }

    /// The lowest index whose entry is still here (or would be, when the log is empty).
    pub(crate) fn first(&self) -> Index {
        self.floor.index.next()
    }

    pub(crate) fn last(&self) -> Viewstamp {
        let index = Index(self.floor.index.0 + self.slots.len() as u64);
        Viewstamp { view: self.slots.back().map_or(self.floor.view, |slot| slot.view), index }
    }

    /// Nothing was ever appended.
    pub(crate) fn is_pristine(&self) -> bool {
        self.last().index == Index(0)
    }

    fn offset(&self, index: Index) -> Option<usize> {
        let offset = index.0.checked_sub(self.floor.index.0 + 1)?;
        usize::try_from(offset).ok().filter(|offset| *offset < self.slots.len())
    }

    pub(crate) fn get(&self, index: Index) -> Option<(View, &Entry)> {
        self.offset(index).map(|at| (self.slots[at].view, &self.slots[at].entry))
    }

    /// The view of the entry at `index`, also at the floor itself.
    pub(crate) fn view_at(&self, index: Index) -> Option<View> {
        if index == self.floor.index { Some(self.floor.view) } else { self.get(index).map(|(view, _)| view) }
    }

    pub(crate) fn holds(&self, stamp: Viewstamp) -> bool {
        self.view_at(stamp.index) == Some(stamp.view)
    }

    fn end_bytes(&self, index: Index) -> u64 {
        self.offset(index).map_or(self.floor_end_bytes, |at| self.slots[at].end_bytes)
    }

    /// Weight of the entries in `(after, through]`, both at or above the floor.
    pub(crate) fn bytes_between(&self, after: Index, through: Index) -> u64 {
        if through <= after { 0 } else { self.end_bytes(through).saturating_sub(self.end_bytes(after)) }
    }

    pub(crate) fn append(&mut self, view: View, entry: Entry) -> Index {
        let index = self.last().index.next();
        let end_bytes = self.end_bytes(index.prev()) + entry.weight_bytes();
        if matches!(entry, Entry::Second { .. } | Entry::Noop { .. }) {
            self.role_marks.push_back(index);
        }
        self.slots.push_back(Slot { view, entry, end_bytes });
        index
    }

    /// Drops every entry at or above `from`, which must lie above the base.
    pub(crate) fn cut(&mut self, from: Index) {
        assert!(from > self.base.index, "cut at {from}: entries through {} are covered", self.base.index);
        self.slots.truncate((from.0 - self.floor.index.0 - 1) as usize);
        while self.role_marks.back().is_some_and(|mark| *mark >= from) {
            self.role_marks.pop_back();
        }
    }

    /// Moves the base up to `to` (clamped to what is here), and keeps `retain_bytes` of what it passes.
    pub(crate) fn truncate(&mut self, to: Index, retain_bytes: u64) {
        let to = to.min(self.last().index);
        while self.base.index < to {
            let at = self.offset(self.base.index.next()).expect("entries above the base are here");
            let slot = &self.slots[at];
            self.base.advance(self.base.index.next(), slot.view, &slot.entry);
        }
        while self.role_marks.front().is_some_and(|mark| *mark <= self.base.index) {
            self.role_marks.pop_front();
        }
        while self.floor.index < self.base.index && self.bytes_between(self.floor.index, self.base.index) > retain_bytes
        {
            let slot = self.slots.pop_front().expect("the floor is below the base");
            self.floor = Viewstamp { view: slot.view, index: self.floor.index.next() };
            self.floor_end_bytes = slot.end_bytes;
        }
    }

    /// Forgets everything and begins after `base`.
    pub(crate) fn reset(&mut self, base: Base) {
        *self = Log::new(base);
    }

    /// The roles as of the last entry, committed or not.
    pub(crate) fn tail_roles(&self) -> Base {
        let mut roles = self.base;
        for mark in &self.role_marks {
            if let Some((view, entry)) = self.get(*mark) {
                roles.advance(*mark, view, entry);
            }
        }
        roles
    }

    /// Everybody whom a `Second` entry above `index` names.
    pub(crate) fn named_above(&self, index: Index) -> impl Iterator<Item = ReplicaId> {
        let marks = self.role_marks.iter().rev().take_while(move |mark| **mark > index);
        marks.filter_map(|mark| match self.get(*mark) {
            Some((_, Entry::Second { replica, .. })) => *replica,
            _ => None,
        })
    }

    /// Copies entries from `from` on behind what is in `out`: at least one if there is one, and no more than the
    /// limits.
    pub(crate) fn batch(&self, from: Index, max_entries: u64, max_bytes: u64, out: &mut Entries) {
        let Some(start) = self.offset(from) else {
            return;
        };
        let limit = self.slots.len().min(start.saturating_add(max_entries as usize));
        let before = self.end_bytes(from.prev());
        let batch = self.slots.range(start..limit).enumerate();
        let batch = batch.take_while(|(n, slot)| *n == 0 || slot.end_bytes - before <= max_bytes);
        out.extend(batch.map(|(_, slot)| (slot.view, slot.entry.clone())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{ENTRY_OVERHEAD_BYTES, Payload};

    fn input(bytes: usize) -> Entry {
        Entry::Input(Payload::from(vec![7; bytes]))
    }

    #[test]
    fn roles_survive_truncation_and_cuts() {
        let mut log = Log::new(Base::default());
        log.append(View(1), Entry::Noop { leader: ReplicaId(1) });
        log.append(View(1), Entry::Second { replica: Some(ReplicaId(2)), base: Index(0) });
        log.append(View(1), input(1));
        log.append(View(5), Entry::Noop { leader: ReplicaId(2) });
        assert_eq!(log.tail_roles().leader, Some(ReplicaId(2)));
        log.truncate(Index(3), 0);
        assert_eq!((log.base().second, log.base().leader), (Some(ReplicaId(2)), Some(ReplicaId(1))));
        assert_eq!((log.first(), log.view_at(Index(3)), log.view_at(Index(2))), (Index(4), Some(View(1)), None));
        log.cut(Index(4));
        assert_eq!(log.tail_roles().leader, Some(ReplicaId(1)));
        assert_eq!(log.last(), Viewstamp { view: View(1), index: Index(3) });
    }

    #[test]
    fn truncation_retains_what_it_is_told_to() {
        let mut log = Log::new(Base::default());
        for _ in 0..10 {
            log.append(View(1), input(0));
        }
        log.truncate(Index(8), 3 * ENTRY_OVERHEAD_BYTES);
        assert_eq!((log.base().index, log.first()), (Index(8), Index(6)));
        assert_eq!(log.bytes_between(Index(8), Index(10)), 2 * ENTRY_OVERHEAD_BYTES);
    }

    #[test]
    fn batches_obey_limits_but_always_move() {
        let mut log = Log::new(Base::default());
        for bytes in [1000, 10, 10, 10] {
            log.append(View(1), input(bytes));
        }
        let batch = |from, max_entries, max_bytes| {
            let mut entries = Entries::new();
            log.batch(Index(from), max_entries, max_bytes, &mut entries);
            entries.len()
        };
        assert_eq!(batch(1, 100, 100), 1);
        assert_eq!(batch(2, 2, 10_000), 2);
        assert_eq!(batch(2, 100, 2 * (10 + ENTRY_OVERHEAD_BYTES)), 2);
        assert_eq!(batch(2, u64::MAX, 10_000), 3);
        assert_eq!(batch(5, 100, 100), 0);
    }
}
