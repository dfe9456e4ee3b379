//! A log that is durable at once, for measurements of everything but the disk.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use consensus::{Entry, HardState, Index, Persist, View};

/// What a log would hold, durable at once: as `MemStorage`, which keeps entries by reference count too.
#[derive(Default)]
pub(crate) struct Store {
    pub state: HardState,
    pub entries: VecDeque<(Index, View, Entry)>,
    pub records: u64,
}

impl Store {
    /// Takes a record. Only a view change, which does not happen here, would supersede entries.
    pub fn take(&mut self, record: Persist) -> Result<()> {
        self.records += 1;
        match record {
            Persist::State(state) => {
                self.state = state;
                while self.entries.pop_front_if(|(index, ..)| *index <= state.base.index).is_some() {}
            }
            Persist::Append { index, view, entry } => {
                let last = self.entries.back().map_or(self.state.base.index, |(index, ..)| *index);
                ensure!(index == last.next(), "entry {index} is stored behind {last}");
                self.entries.push_back((index, view, entry));
            }
        }
        Ok(())
    }
}
