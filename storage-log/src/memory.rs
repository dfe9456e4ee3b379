//! A log in memory: durable at each flush, gone with the process.

use std::time::Duration;

use rustix::fd::BorrowedFd;

use crate::record::MAX_RECORD_BYTES;
use crate::{IndexRange, LogError, LogStatus, LogStore, Record, Recovered, StoredEntry, Ticket};

/// Keeps records in memory. [`snapshot`](Self::snapshot) gives what a file log would recover.
#[derive(Debug, Default)]
pub struct MemoryLog {
    content: Recovered,
    range: IndexRange,
    appended: u64,
    durable: u64,
}

impl MemoryLog {
    /// An empty log.
    pub fn new() -> MemoryLog {
        MemoryLog::default()
    }

    /// What opening the log would recover if all that was appended had become durable.
    pub fn snapshot(&self) -> Recovered {
        self.content.clone()
    }
}

impl LogStore for MemoryLog {
    fn append(&mut self, record: Record<'_>) -> Result<Ticket, LogError> {
        match record {
            Record::State(state) => {
                assert!(state.len() <= MAX_RECORD_BYTES, "a state of {} bytes", state.len());
                self.content.state = Some(state.to_vec());
            }
            Record::Entry { index, view, parts } => {
                assert!(self.range.accepts(index), "entry {index} would leave a gap behind {:?}", self.range);
                let bytes = parts.concat();
                assert!(bytes.len() <= MAX_RECORD_BYTES, "an entry of {} bytes", bytes.len());
                self.range.set(index);
                set_entry(&mut self.content.entries, StoredEntry { index, view, bytes });
            }
        }
        self.appended += 1;
        Ok(Ticket(self.appended))
    }

    fn flush(&mut self) {
        self.durable = self.appended;
    }

    fn poll(&mut self) {}

    fn durable(&self) -> Ticket {
        Ticket(self.durable)
    }

    fn failed(&self) -> Option<LogError> {
        None
    }

    fn truncate_prefix(&mut self, through: u64) {
        self.range.truncate(through);
        drop_prefix(&mut self.content.entries, through);
    }

    fn wait(&mut self, ticket: Ticket, _timeout: Duration) -> bool {
        self.durable >= ticket.0
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn is_filling_up(&self) -> bool {
        false
    }

    fn is_busy(&self) -> bool {
        false
    }

    fn status(&self) -> LogStatus {
        LogStatus::default()
    }
}

/// Puts an entry in its place and removes those behind it.
pub(crate) fn set_entry(entries: &mut Vec<StoredEntry>, entry: StoredEntry) {
    let keep = entries.partition_point(|old| old.index < entry.index);
    entries.truncate(keep);
    entries.push(entry);
}

/// Removes the entries up to `through`.
pub(crate) fn drop_prefix(entries: &mut Vec<StoredEntry>, through: u64) {
    let gone = entries.partition_point(|old| old.index <= through);
    entries.drain(..gone);
}
