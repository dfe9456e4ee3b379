//! The file engine's front: what the reactor calls.
//!
//! Appends are collected here and handed to the writer thread by a flush, through a channel and
//! without a lock; the buffers come back and are used again.

use crate::record::{self, Kind};
use crate::recovery;
use crate::writer::{Item, Shared, Writer};
use crate::{IndexRange, LogError, LogStore, Record, Recovered, Ticket};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::FlockOperation;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// Buffers larger than this are not kept for reuse.
const MAX_KEPT_BUFFER_BYTES: usize = 1 << 20;
const MAX_KEPT_BUFFERS: usize = 256;

/// Sizes of a [`FileLog`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// A segment file is closed when it would exceed this; space is given back in such pieces.
    pub segment_bytes: u64,
    /// Entries are refused when all files would exceed this. States are taken even then: they are small,
    /// and a replica that cannot write its promises cannot vote.
    pub max_bytes: u64,
    /// Records that may wait for the disk.
    pub queue_bytes: u64,
}

impl Default for Options {
    fn default() -> Options {
        Options { segment_bytes: 64 << 20, max_bytes: 4 << 30, queue_bytes: 64 << 20 }
    }
}

/// A log in a directory of its own.
#[derive(Debug)]
pub struct FileLog {
    options: Options,
    shared: Arc<Shared>,
    /// Appended, not flushed.
    collected: Vec<Item>,
    kept: Vec<Vec<u8>>,
    range: IndexRange,
    appended: u64,
    /// `None` only while dropping.
    commands: Option<Sender<Vec<Item>>>,
    returns: Receiver<Vec<Item>>,
    thread: Option<JoinHandle<()>>,
}

impl FileLog {
    /// Opens the log in `dir`, which is created if it is missing, and returns what it holds.
    ///
    /// # Errors
    /// [`LogError`]: in use, damaged, or not accessible.
    pub fn open(dir: &Path, options: Options) -> Result<(FileLog, Recovered), LogError> {
        std::fs::create_dir_all(dir).map_err(|error| LogError::io("creating", dir, error))?;
        let dir_fd = File::open(dir).map_err(|error| LogError::io("opening", dir, error))?;
        // The lock lives as long as the writer, which owns this fd.
        rustix::fs::flock(&dir_fd, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => LogError::Locked { dir: dir.to_owned() },
            other => LogError::io("locking", dir, other),
        })?;
        let scan = recovery::scan(dir)?;
        if scan.recovered.torn_bytes > 0 {
            let torn_bytes = scan.recovered.torn_bytes;
            tracing::info!(torn_bytes, dir = %dir.display(), "cut an unfinished write off the log");
        }
        let shared = Arc::new(Shared::new().map_err(|error| LogError::io("making an eventfd for", dir, error))?);
        let writer = Writer::new(
            dir,
            dir_fd,
            options,
            Arc::clone(&shared),
            scan.segments,
            scan.tail,
            scan.recovered.state.clone(),
        )?;
        let (commands, to_write) = channel();
        let (give_back, returns) = channel();
        let thread = std::thread::Builder::new()
            .name("log-writer".to_owned())
            .spawn(move || writer.run(&to_write, &give_back))
            .map_err(|error| LogError::io("starting the writer of", dir, error))?;
        let log = FileLog {
            options,
            shared,
            collected: Vec::new(),
            kept: Vec::new(),
            range: scan.range,
            appended: 0,
            commands: Some(commands),
            returns,
            thread: Some(thread),
        };
        Ok((log, scan.recovered))
    }

    /// Readable after `durable()` has moved or the log has failed. Watch it edge-triggered, or call
    /// [`clear_event`](Self::clear_event) after each wake-up and before reading `durable()`.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// Makes the event fd unreadable until something new happens.
    pub fn clear_event(&self) {
        let mut count = [0; 8];
        // EAGAIN: it was clear.
        let _ = rustix::io::read(&self.shared.event, &mut count);
    }

    /// Bytes of all segment files.
    pub fn disk_bytes(&self) -> u64 {
        self.shared.disk_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of records that are appended and not durable.
    pub fn queued_bytes(&self) -> u64 {
        self.shared.queued_bytes.load(Ordering::Relaxed)
    }

    fn collect(&mut self, kind: Kind, index: u64, view: u64, parts: &[&[u8]], ticket: u64) {
        if self.kept.is_empty() {
            self.take_back();
        }
        let mut bytes = self.kept.pop().unwrap_or_default();
        record::encode(&mut bytes, kind, index, view, parts);
        self.shared.queued_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.collected.push(Item { bytes, kind, index, ticket });
    }

    /// Collects buffers that the writer is done with.
    fn take_back(&mut self) {
        for mut batch in self.returns.try_iter() {
            for item in batch.drain(..) {
                if self.kept.len() < MAX_KEPT_BUFFERS && item.bytes.capacity() <= MAX_KEPT_BUFFER_BYTES {
                    self.kept.push(item.bytes);
                }
            }
            if self.collected.capacity() == 0 {
                self.collected = batch;
            }
        }
    }
}

impl LogStore for FileLog {
    fn append(&mut self, record: Record<'_>) -> Result<Ticket, LogError> {
        if let Some(error) = self.failed() {
            return Err(error);
        }
        let payload_bytes = match record {
            Record::State(state) => state.len(),
            Record::Entry { parts, .. } => parts[0].len() + parts[1].len(),
        };
        let need = (record::RECORD_HEADER_BYTES + payload_bytes) as u64;
        let queued = self.queued_bytes();
        if queued > 0 && queued + need > self.options.queue_bytes {
            return Err(LogError::QueueFull);
        }
        let ticket = self.appended + 1;
        match record {
            Record::State(state) => self.collect(Kind::State, 0, 0, &[state], ticket),
            Record::Entry { index, view, parts } => {
                assert!(self.range.accepts(index), "entry {index} would leave a gap, next is {:?}", self.range.next());
                if self.disk_bytes() + queued + need > self.options.max_bytes {
                    return Err(LogError::LogFull { max_bytes: self.options.max_bytes });
                }
                self.collect(Kind::Entry, index, view, &parts, ticket);
                self.range.set(index);
            }
        }
        self.appended = ticket;
        Ok(Ticket(ticket))
    }

    fn flush(&mut self) {
        if self.collected.is_empty() {
            return;
        }
        let items = std::mem::take(&mut self.collected);
        self.take_back();
        let commands = self.commands.as_ref().expect("only drop takes it");
        commands.send(items).expect("the writer lives until the log is dropped");
    }

    fn durable(&self) -> Ticket {
        Ticket(self.shared.durable.load(Ordering::Acquire))
    }

    fn failed(&self) -> Option<LogError> {
        self.shared.failed.get().cloned()
    }

    fn truncate_prefix(&mut self, through: u64) {
        self.range.truncate(through);
        self.collect(Kind::Truncate, through, 0, &[], 0);
    }
}

impl Drop for FileLog {
    /// Writes what was appended and waits for it.
    fn drop(&mut self) {
        self.flush();
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the log's writer thread panicked");
        }
    }
}
