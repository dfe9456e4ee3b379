//! A replica's records in an in-memory log, where they are durable at once.

use anyhow::Result;
use consensus::{Persist, PersistId};
use storage_log::{LogStore, MemoryLog, Record};

/// The log and what is in it.
#[derive(Default)]
pub struct Memory {
    log: MemoryLog,
    buffer: Vec<u8>,
    persisted: PersistId,
}

impl Memory {
    /// Stores records. `Some` if that made any durable: the replica must be told.
    pub fn store(&mut self, records: impl Iterator<Item = Persist>) -> Result<Option<PersistId>> {
        for record in records {
            self.buffer.clear();
            match &record {
                Persist::State(state) => {
                    state.encode(&mut self.buffer);
                    self.log.append(Record::State(&self.buffer))?;
                    self.log.truncate_prefix(state.base.index.0);
                }
                Persist::Append { index, view, entry } => {
                    entry.encode_header(&mut self.buffer);
                    let parts = [&self.buffer[..], entry.payload()];
                    self.log.append(Record::Entry { index: index.0, view: view.0, parts })?;
                }
            }
        }
        self.log.flush();
        let durable = PersistId(self.log.durable().0);
        let moved = durable > self.persisted;
        self.persisted = durable;
        Ok(moved.then_some(durable))
    }
}
