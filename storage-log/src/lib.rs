//! Durable append-only log.
//!
//! Keeps what an acceptor must not forget: one small state and a run of numbered entries whose suffix
//! may be overwritten. It knows nothing of consensus; indexes and views are numbers to it.
//!
//! [`open`] gives the log that Plover runs on: io_uring with direct I/O, in a directory or on a raw device, mirrored over
//! several of them if wanted. `MemoryLog` is for simulations and tests of the layers above; it is not durable, and says so.
//! The parts, from the outside in:
//!
//! ```text
//! open      takes the copies, reads them (recovery), starts the engine
//! engine    what the owner calls: append, flush, poll; one group on its way at a time
//! stage     records → blocks → groups, in memory that the device reads from (no I/O)
//! uring     writes and syncs groups;  keeper: places for segments, rebuilding, on a thread of its own
//! volume    segments as files of a directory, or as slots of a device
//! block, record, segment   the bytes
//! ```

mod block;
mod engine;
mod inspect;
mod keeper;
mod legs;
mod memory;
mod open;
mod record;
mod recovery;
mod segment;
#[cfg(feature = "spdk")]
pub mod spdk;
mod stage;
mod uring;
mod volume;

pub use block::BLOCK_BYTES;
pub use inspect::{Inspected, InspectedRecord, RecordKind, SegmentSummary, inspect};
pub use legs::MAX_LEGS;
pub use memory::MemoryLog;
pub use open::open;
pub use record::MAX_RECORD_BYTES;
pub use volume::LegSpec;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fd::BorrowedFd;
use volume::Geometry;

/// Counts appended records from 1, so `durable() >= ticket` means that a record and all before it
/// survive a crash.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// What can be appended.
#[derive(Debug, Clone, Copy)]
pub enum Record<'a> {
    /// Replaces the state. At most 1 KiB.
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
    /// The last records may have been acknowledged and be lost: a block at the very end is bad and was not merely torn, or
    /// another copy of the log, which may have gone on without this one, is missing. Who opened the log must not act as
    /// if it remembered everything. It stays so, also after a crash, until a [`Record::State`] is durable, which
    /// hence must say it.
    pub doubtful: bool,
}

/// Sizes and ways of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// A segment is a file of this size (or a slot of a device); space is given back in such pieces. A multiple of
    /// [`BLOCK_BYTES`].
    pub segment_bytes: u64,
    /// Entries are refused when the log would need more than this, less two segments that are kept for states: a
    /// replica that cannot write its promises cannot vote.
    pub max_bytes: u64,
    /// Memory for records on their way to the device.
    pub stage_bytes: usize,
    /// Bypass the page cache where the file system can.
    pub direct: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { segment_bytes: 32 << 20, max_bytes: 4 << 30, stage_bytes: 32 << 20, direct: true }
    }
}

impl Options {
    fn geometry(&self) -> Result<Geometry, LogError> {
        let bad = |problem: String| Err(LogError::BadOptions { problem });
        let (block, segment) = (BLOCK_BYTES as u64, self.segment_bytes);
        if !segment.is_multiple_of(block) || !(8 * block..=1 << 30).contains(&segment) {
            return bad(format!("segments of {segment} bytes: 8 to 262144 blocks of {block} bytes are possible"));
        }
        if self.max_bytes / segment < 4 {
            return bad(format!("{} bytes at most with segments of {segment}: four must fit", self.max_bytes));
        }
        if self.stage_bytes < 16 * BLOCK_BYTES {
            return bad(format!("{} bytes of memory: 16 blocks of {block} bytes are the least", self.stage_bytes));
        }
        let segment_blocks = (segment / block) as u32;
        Ok(Geometry { segment_blocks, max_segments: self.max_bytes / segment, direct: self.direct })
    }
}

/// How a copy of the log fares.
#[derive(Debug, Clone)]
pub enum LegState {
    /// It holds everything.
    Complete,
    /// It is being filled again.
    Rebuilding,
    /// It cannot be used; it is tried again every few seconds.
    Failed(LogError),
}

/// One copy of the log.
#[derive(Debug, Clone)]
pub struct LegStatus {
    /// The directory or device.
    pub path: PathBuf,
    /// How it fares.
    pub state: LegState,
}

/// For an operator.
#[derive(Debug, Clone, Default)]
pub struct LogStatus {
    /// Bytes of the segments that are needed.
    pub disk_bytes: u64,
    /// Bytes that are appended and not durable.
    pub queued_bytes: u64,
    /// The copies, in the configured order.
    pub legs: Vec<LegStatus>,
    /// Why the log cannot grow at the moment, if it cannot.
    pub no_room: Option<LogError>,
}

/// A log that runs. Owned by one thread; no call but [`wait`](Self::wait) blocks on a device.
pub trait LogStore {
    /// Takes a copy of `record`. It reaches the device after the next [`flush`](Self::flush) and is safe
    /// once [`durable`](Self::durable) has reached the ticket.
    ///
    /// # Errors
    /// [`LogError`]; nothing was appended. If [`is_full`](LogError::is_full), try again later; any other
    /// error stays.
    ///
    /// # Panics
    /// If an entry's index leaves a gap or the record is too long for the log: such a log could
    /// not be opened again.
    fn append(&mut self, record: Record<'_>) -> Result<Ticket, LogError>;

    /// Starts the write of everything appended, at once or as soon as the write is done that is under way; records of one
    /// flush share one sync. Call it once after a run of appends. Does not wait.
    fn flush(&mut self);

    /// Looks what the device has done, and gives it what has gathered meanwhile. Call it in each turn while
    /// [`is_busy`](Self::is_busy), and when [`event_fd`](Self::event_fd) is readable. Costs no system call if there is
    /// nothing to do.
    fn poll(&mut self);

    /// The last record that is safe, all before it included. Never goes back.
    fn durable(&self) -> Ticket;

    /// The error that ended this log, if one did. Nothing becomes durable after it: after a failed
    /// sync nobody knows what the device holds.
    fn failed(&self) -> Option<LogError>;

    /// Forgets the entries up to and including `through` and gives space back when it can. With no
    /// entry left, the next one may have any index. Takes effect with the next flush.
    fn truncate_prefix(&mut self, through: u64);

    /// Polls until `ticket` is durable or the log has failed, `timeout` at most. Returns whether it is durable.
    fn wait(&mut self, ticket: Ticket, timeout: Duration) -> bool;

    /// Becomes readable when [`poll`](Self::poll) has something to do; edge-triggered watchers need not read it. `None` if
    /// this log must be polled.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Whether more than half is used of the log's limit, or of the present segment without a place for the next one. A leader
    /// takes no input then, so that room is left for the syncvm that makes room.
    fn is_filling_up(&self) -> bool;

    /// Whether a write is under way, or something else that goes on only when the log is polled.
    fn is_busy(&self) -> bool;

    /// How the log fares.
    fn status(&self) -> LogStatus;
}

/// Why a log cannot be opened or written. Each text names the place and the remedy.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LogError {
    /// Another process has it.
    #[error(
        "the log {path} is in use by another process: two daemons must not share a log; stop the other one \
         or correct the path in the configuration"
    )]
    Locked {
        /// The directory or device.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("{action} {path} failed: check the disk, then restart")]
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
         not vote with it. Restore the log from a copy, or move all of it away and let the \
         replica join anew; do not delete a part of it"
    )]
    Damaged {
        /// The segment.
        file: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        problem: String,
    },
    /// The place holds something that is not this log.
    #[error(
        "{path} holds something else: another log, or data that is not Plover's. Correct the path in the \
         configuration, or clear the place (a device with «wipefs -a» and «blkdiscard -z») if nothing in it is needed"
    )]
    Foreign {
        /// The directory or device.
        path: PathBuf,
    },
    /// A device has no room for a log.
    #[error(
        "{path} is too small for a log: at least {need_bytes} bytes are needed with segments of the configured size"
    )]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// For the smallest log.
        need_bytes: u64,
    },
    /// A copy lacks a part of the log that another copy has.
    #[error("{path} lacks {blocks} blocks of the log; it is rebuilt from another copy")]
    Incomplete {
        /// The first segment that lacks something.
        path: PathBuf,
        /// How many blocks.
        blocks: usize,
    },
    /// Options that contradict each other or are out of range.
    #[error("a log cannot have {problem}; correct the configuration")]
    BadOptions {
        /// What is wrong, and what is possible.
        problem: String,
    },
    /// The device is behind: the memory for records on their way is full, or there is no next segment yet.
    #[error("the log's write queue is full")]
    QueueFull,
    /// The log has its maximum size.
    #[error("the log has reached its limit of {max_bytes} bytes: raise it, or see why entries are not released")]
    LogFull {
        /// The limit.
        max_bytes: u64,
    },
    /// The disk has no room for another segment.
    #[error(
        "there is no room for the log to grow at {path}: free some space; nothing is lost, and the log goes on then"
    )]
    NoSpace {
        /// The file or device.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: Arc<io::Error>,
    },
}

impl LogError {
    /// Whether the same append can succeed later, after syncs, a truncation, or when space was freed.
    pub fn is_full(&self) -> bool {
        matches!(self, LogError::QueueFull | LogError::LogFull { .. } | LogError::NoSpace { .. })
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> LogError {
        LogError::Io { action, path: path.into(), source: Arc::new(source.into()) }
    }

    /// The failure of something that takes space.
    pub(crate) fn space(path: &Path, source: impl Into<io::Error>) -> LogError {
        let source = source.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                LogError::NoSpace { path: path.to_owned(), source: Arc::new(source) }
            }
            _ => LogError::io("creating", path, source),
        }
    }
}

/// Follows the indexes of the live entries; all engines and the recovery obey the same rules.
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

    /// Notes a truncation. Returns whether an entry is forgotten by it.
    pub fn truncate(&mut self, through: u64) -> bool {
        let changes = self.range.is_some_and(|(first, _)| first <= through);
        self.range = self.range.filter(|&(_, last)| last > through);
        self.range = self.range.map(|(first, last)| (first.max(through.saturating_add(1)), last));
        changes
    }

    /// The index behind the last entry, if there is an entry.
    pub fn next(self) -> Option<u64> {
        self.range.map(|(_, last)| last.saturating_add(1))
    }
}
