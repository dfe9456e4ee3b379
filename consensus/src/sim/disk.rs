//! A simulated disk. Records become durable in order. A crash keeps a prefix of those that were not yet (the rest
//! was never written, or torn and cut). A disk may be full, may fail, and may rot: at its end, where the store
//! cuts and says that it doubts (R15), or in the middle, where it refuses to open.

use std::collections::{BTreeMap, VecDeque};

use crate::config::Recovered;
use crate::effects::Persist;
use crate::entry::{Entry, HardState};
use crate::ids::{Index, PersistId, View};

/// Records at the end that rot may take: what one block holds.
const BLOCK_RECORDS: usize = 8;

type Entries = BTreeMap<Index, (View, Entry)>;

/// How to take back a durable record.
#[derive(Clone, Debug)]
enum Undo {
    State { before: Option<HardState>, covered: Entries },
    Append { index: Index, superseded: Entries },
}

#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    state: Option<HardState>,
    entries: Entries,
    pending: VecDeque<Persist>,
    /// Records applied since the process began.
    applied: u64,
    /// For the newest durable records, newest last.
    undo: VecDeque<Undo>,
    /// Its end was cut, and nothing was written since.
    doubtful: bool,
    /// Damaged in the middle: the store refuses to open it.
    pub(super) damaged: bool,
    /// Takes no record.
    pub(super) full: bool,
    /// Nothing becomes durable any more, until the process is started again.
    pub(super) failed: bool,
    /// Every sync takes long until this time.
    pub(super) slow_until_us: u64,
}

impl Disk {
    /// Takes a record and returns its number.
    pub(super) fn push(&mut self, record: Persist) -> PersistId {
        self.pending.push_back(record);
        PersistId(self.applied + self.pending.len() as u64)
    }

    /// Makes every record through this one durable.
    ///
    /// # Errors
    /// When the first record on a doubtful disk is not the one that says so (R15).
    pub(super) fn apply(&mut self, through: PersistId) -> Result<(), String> {
        while self.applied < through.0 {
            let Some(record) = self.pending.pop_front() else {
                break;
            };
            self.applied += 1;
            if std::mem::take(&mut self.doubtful) && !matches!(record, Persist::State(HardState { learner: true, .. }))
            {
                return Err(format!("R15: the first record on a doubtful disk is {record:?}"));
            }
            let undo = self.write(record);
            self.undo.push_back(undo);
            if self.undo.len() > BLOCK_RECORDS {
                self.undo.pop_front();
            }
        }
        Ok(())
    }

    fn write(&mut self, record: Persist) -> Undo {
        match record {
            Persist::State(state) => {
                let kept = self.entries.split_off(&state.base.index.next());
                let covered = std::mem::replace(&mut self.entries, kept);
                Undo::State { before: self.state.replace(state), covered }
            }
            Persist::Append { index, view, entry } => {
                let superseded = self.entries.split_off(&index);
                self.entries.insert(index, (view, entry));
                Undo::Append { index, superseded }
            }
        }
    }

    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The process dies: `keep` of the records that were not durable turn out to be.
    pub(super) fn crash(&mut self, keep: usize) -> Result<(), String> {
        let result = self.apply(PersistId(self.applied + keep as u64));
        self.pending.clear();
        (self.applied, self.failed) = (0, false);
        result
    }

    /// How many durable records rot at the end may take.
    pub(super) fn block_records(&self) -> usize {
        self.undo.len()
    }

    /// The last `records` durable records are bad, and the store cuts them.
    pub(super) fn rot_end(&mut self, records: usize) {
        for undo in self.undo.drain(self.undo.len() - records..).rev() {
            match undo {
                Undo::State { before, mut covered } => {
                    self.state = before;
                    self.entries.append(&mut covered);
                }
                Undo::Append { index, mut superseded } => {
                    self.entries.remove(&index);
                    self.entries.append(&mut superseded);
                }
            }
        }
        self.doubtful = true;
    }

    pub(super) fn wipe(&mut self) {
        *self = Disk { full: self.full, slow_until_us: self.slow_until_us, ..Disk::default() };
    }

    /// Pretends that a replica voted here before, which a wiped disk cannot know.
    pub(super) fn forge_state(&mut self) {
        self.state = Some(HardState { promised: View(1), ..HardState::default() });
    }

    pub(super) fn recovered(&self) -> Recovered {
        let entries = self.entries.iter().map(|(index, (view, entry))| (*index, *view, entry.clone()));
        Recovered { doubtful: self.doubtful, ..Recovered::from_store(self.state, entries.collect()) }
    }

    /// A replica that starts from this disk votes.
    pub(super) fn lets_vote(&self) -> bool {
        !self.doubtful && self.state.is_some_and(|state| !state.learner)
    }

    pub(super) fn holds(&self, index: Index, view: View) -> bool {
        let Some(state) = self.state else {
            return false;
        };
        index <= state.base.index
            || (!state.void_entries && self.entries.get(&index).is_some_and(|(have, _)| *have == view))
    }
}
