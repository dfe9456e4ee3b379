//! Durable append-only log.
//!
//! Keeps what an acceptor must not forget: one small state and a run of numbered entries whose suffix
//! may be overwritten. It knows nothing of consensus; indexes and views are numbers to it. Engines share
//! the trait [`LogStore`]: [`FileLog`] (plain files, group commit by a writer thread) and
//! [`MemoryLog`] (for simulations and tests of the layers above; not durable, and says so).

mod file;
mod memory;
mod record;
mod recovery;
mod writer;

pub use file::{FileLog, Options};
pub use memory::MemoryLog;
pub use record::MAX_RECORD_BYTES;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

/// Counts appended records from 1, so `durable() >= ticket` means that a record and all before it
/// survive a crash.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// What can be appended.
#[derive(Debug, Clone, Copy)]
pub enum Record<'a> {
    /// Replaces the state.
    State(&'a [u8]),
    /// Sets the entry at `index` and removes every entry behind it.
    Entry {
        /// Its place: at most one behind the last entry, unless the log has no entries.
        index: u64,
        /// Kept beside the bytes.
        view: u64,
        /// The bytes, concatenated.
        parts: [&'a [u8]; 2],
    },
}

/// An entry as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredEntry {
    /// Its place.
    pub index: u64,
    /// As appended.
    pub view: u64,
    /// As appended.
    pub bytes: Vec<u8>,
}

/// What a log held when it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovered {
    /// The last state, if there was one.
    pub state: Option<Vec<u8>>,
    /// The entries in index order, without gaps.
    pub entries: Vec<StoredEntry>,
    /// Bytes cut off at the end: a write that a crash interrupted before it was acknowledged.
    pub torn_bytes: u64,
}

/// An engine. Owned by one thread; no call blocks on a device.
pub trait LogStore: Send {
    /// Takes a copy of `record`. It reaches the device after the next [`flush`](Self::flush) and is safe
    /// once [`durable`](Self::durable) has reached the ticket.
    ///
    /// # Errors
    /// [`LogError`]; nothing was appended. If [`is_full`](LogError::is_full), try again later; any other
    /// error stays.
    ///
    /// # Panics
    /// If an entry's index leaves a gap or the record exceeds [`MAX_RECORD_BYTES`]: such a log could
    /// not be opened again.
    fn append(&mut self, record: Record<'_>) -> Result<Ticket, LogError>;

    /// Starts the write of everything appended; records of one flush share one sync. Call it once after a
    /// run of appends. Does not wait.
    fn flush(&mut self);

    /// The last record that is safe, all before it included. Never goes back.
    fn durable(&self) -> Ticket;

    /// The error that ended this log, if one did. Nothing becomes durable after it: after a failed
    /// sync nobody knows what the device holds.
    fn failed(&self) -> Option<LogError>;

    /// Forgets the entries up to and including `through` and gives space back when it can. With no
    /// entry left, the next one may have any index. Takes effect with the next flush.
    fn truncate_prefix(&mut self, through: u64);
}

/// Why a log cannot be opened or written. Each text names the place and the remedy.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// Another process has it.
    #[error(
        "the log {dir} is in use by another process: two daemons must not share a log; stop the other one \
         or correct the directory in the configuration"
    )]
    Locked {
        /// The directory.
        dir: PathBuf,
    },
    /// A file operation failed.
    #[error("{action} {path} failed: check the disk and the space on it, then restart")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: Arc<io::Error>,
    },
    /// Bytes that were durable have changed.
    #[error(
        "{file} is damaged at byte {offset}: {problem}. What follows cannot be trusted, so this replica must \
         not vote with it. Restore the file from a copy, or move the whole directory away and let the \
         replica join anew; do not delete this file alone"
    )]
    Damaged {
        /// The segment.
        file: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        problem: String,
    },
    /// The writer is behind; records are queued up to the bound.
    #[error("the log's write queue is full")]
    QueueFull,
    /// The log has its maximum size.
    #[error("the log has reached its limit of {max_bytes} bytes: raise it, or see why entries are not released")]
    LogFull {
        /// The limit.
        max_bytes: u64,
    },
}

impl LogError {
    /// Whether the same append can succeed later, after syncs or a truncation.
    pub fn is_full(&self) -> bool {
        matches!(self, LogError::QueueFull | LogError::LogFull { .. })
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> LogError {
        LogError::Io { action, path: path.into(), source: Arc::new(source.into()) }
    }
}

/// Follows the indexes of the live entries; both engines and the recovery obey the same rules.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct IndexRange {
    /// First and last entry.
    range: Option<(u64, u64)>,
}

impl IndexRange {
    /// Whether an entry at `index` leaves no gap.
    pub fn accepts(self, index: u64) -> bool {
        self.range.is_none_or(|(_, last)| index <= last.saturating_add(1))
    }

    /// Notes an entry that was accepted.
    pub fn set(&mut self, index: u64) {
        let first = self.range.map_or(index, |(first, _)| first.min(index));
        self.range = Some((first, index));
    }

    /// Notes a truncation.
    pub fn truncate(&mut self, through: u64) {
        self.range = self.range.filter(|&(_, last)| last > through);
        self.range = self.range.map(|(first, last)| (first.max(through + 1), last));
    }

    /// The index behind the last entry, if there is an entry.
    pub fn next(self) -> Option<u64> {
        self.range.map(|(_, last)| last.saturating_add(1))
    }
}
