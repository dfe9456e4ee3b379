//! The writer thread of a [`FileLog`](crate::FileLog): group commit, segments, errors.
//!
//! It takes everything that is queued, writes it with one vectored write, syncs once, and publishes the
//! last ticket. The first error ends it for good.

use crate::record::{self, Kind, SEGMENT_HEADER_BYTES, SegmentId};
use crate::{LogError, Options};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use std::collections::VecDeque;
use std::fs::File;
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};

/// More than this is not gathered into one commit, so that the first record of it does not wait long.
const MAX_COMMIT_BYTES: usize = 32 << 20;
/// Slices of one write; the kernel's limit.
const MAX_SLICES: usize = 1024;

/// What the writer knows of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentInfo {
    pub number: u64,
    pub bytes: u64,
    /// The last of its entries that no later record has superseded, if any is left.
    pub last_index: Option<u64>,
}

impl SegmentInfo {
    /// Notes that an entry was written to `present`, which follows `older`.
    pub fn note_entry<'a>(older: impl IntoIterator<Item = &'a mut SegmentInfo>, present: &mut SegmentInfo, index: u64) {
        present.last_index = Some(index);
        for segment in older {
            // `None` for index 0: nothing in the older segments lives on.
            segment.last_index = segment.last_index.and_then(|last| index.checked_sub(1).map(|i| last.min(i)));
        }
    }
}

/// What the log and its writer share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub durable: AtomicU64,
    /// Bytes in all segments.
    pub disk_bytes: AtomicU64,
    /// Bytes of records handed over or collected, but not durable.
    pub queued_bytes: AtomicU64,
    pub failed: OnceLock<LogError>,
    pub event: OwnedFd,
}

impl Shared {
    pub fn new() -> std::io::Result<Shared> {
        Ok(Shared {
            durable: AtomicU64::new(0),
            disk_bytes: AtomicU64::new(0),
            queued_bytes: AtomicU64::new(0),
            failed: OnceLock::new(),
            event: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        })
    }

    fn signal(&self) {
        // EAGAIN: the counter is full, so the fd is readable anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

/// A record on its way to the disk.
#[derive(Debug)]
pub(crate) struct Item {
    /// An encoded record; its place is filled in by the writer.
    pub bytes: Vec<u8>,
    pub kind: Kind,
    pub index: u64,
    /// The ticket, or 0 for records that nobody waits for.
    pub ticket: u64,
}

pub(crate) struct Writer {
    dir: PathBuf,
    dir_fd: File,
    options: Options,
    shared: Arc<Shared>,
    /// All segments but the present one, oldest first.
    older: VecDeque<SegmentInfo>,
    present: SegmentInfo,
    id: SegmentId,
    file: File,
    /// The last state written; repeated in each new segment, so that old ones can go.
    state: Option<Vec<u8>>,
}

impl Writer {
    /// Goes on behind what recovery found, or starts the first segment.
    pub fn new(
        dir: &Path,
        dir_fd: File,
        options: Options,
        shared: Arc<Shared>,
        segments: Vec<SegmentInfo>,
        tail: Option<SegmentId>,
        state: Option<Vec<u8>>,
    ) -> Result<Writer, LogError> {
        let mut older = VecDeque::from(segments);
        let (present, id, file) = match older.pop_back().zip(tail) {
            Some((present, id)) => {
                let path = dir.join(id.file_name());
                let file = File::options().write(true).open(&path);
                (present, id, file.map_err(|error| LogError::io("opening", path, error))?)
            }
            None => create_segment(dir, &dir_fd, 1)?,
        };
        let bytes: u64 = older.iter().map(|segment| segment.bytes).sum();
        shared.disk_bytes.store(bytes + present.bytes, Ordering::Relaxed);
        Ok(Writer { dir: dir.to_owned(), dir_fd, options, shared, older, present, id, file, state })
    }

    /// Works until the log is dropped. Batches go back through `returns` to be reused.
    pub fn run(mut self, commands: &Receiver<Vec<Item>>, returns: &Sender<Vec<Item>>) {
        while let Ok(mut items) = commands.recv() {
            let mut bytes: usize = items.iter().map(|item| item.bytes.len()).sum();
            while bytes < MAX_COMMIT_BYTES
                && let Ok(mut more) = commands.try_recv()
            {
                bytes += more.iter().map(|item| item.bytes.len()).sum::<usize>();
                items.append(&mut more);
            }
            if self.shared.failed.get().is_none()
                && let Err(error) = self.commit(&mut items)
            {
                tracing::error!(error = &error as &dyn std::error::Error, "the log has failed");
                let _ = self.shared.failed.set(error);
                self.shared.signal();
            }
            self.shared.queued_bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
            // The log is being dropped if nobody takes them back.
            let _ = returns.send(items);
        }
    }

    fn commit(&mut self, items: &mut [Item]) -> Result<(), LogError> {
        let mut rest = items;
        while !rest.is_empty() {
            let fitting = self.place(rest);
            if fitting == 0 {
                self.roll()?;
                continue;
            }
            let (now, later) = rest.split_at_mut(fitting);
            self.write(now)?;
            rest = later;
        }
        Ok(())
    }

    /// Completes as many records as fit into the present segment; a segment takes at least one.
    fn place(&self, items: &mut [Item]) -> usize {
        let commit = self.present.bytes;
        let mut offset = commit;
        for (i, item) in items.iter_mut().enumerate() {
            let end = offset + item.bytes.len() as u64;
            if end > self.options.segment_bytes && offset > SEGMENT_HEADER_BYTES as u64 && !self.is_fresh(offset) {
                return i;
            }
            record::place(&mut item.bytes, self.id, offset, commit);
            offset = end;
        }
        items.len()
    }

    /// Whether only the repeated state stands before `offset`; then rolling again would not help.
    fn is_fresh(&self, offset: u64) -> bool {
        let state_bytes = self.state.as_ref().map_or(0, |state| record::RECORD_HEADER_BYTES + state.len());
        offset <= (SEGMENT_HEADER_BYTES + state_bytes) as u64
    }

    /// Writes and syncs placed records, then says so.
    fn write(&mut self, items: &mut [Item]) -> Result<(), LogError> {
        let slices: Vec<&[u8]> = items.iter().map(|item| item.bytes.as_slice()).collect();
        self.write_and_sync(&slices)?;
        let mut truncate_through = None;
        for item in items.iter() {
            match item.kind {
                Kind::State => {
                    let state = self.state.get_or_insert_default();
                    state.clear();
                    state.extend_from_slice(&item.bytes[record::RECORD_HEADER_BYTES..]);
                }
                Kind::Entry => SegmentInfo::note_entry(&mut self.older, &mut self.present, item.index),
                Kind::Truncate => truncate_through = truncate_through.max(Some(item.index)),
            }
        }
        let ticket = items.iter().map(|item| item.ticket).max().unwrap_or(0);
        // Release: whoever sees the ticket also sees the queue and size that belong to it.
        self.shared.durable.fetch_max(ticket, Ordering::Release);
        self.shared.signal();
        if let Some(through) = truncate_through {
            // After the tickets: nobody waits for space as urgently as for durability.
            self.delete_through(through)?;
            self.shared.signal();
        }
        Ok(())
    }

    fn write_and_sync(&mut self, buffers: &[&[u8]]) -> Result<(), LogError> {
        let path = || self.dir.join(self.id.file_name());
        let mut slices: Vec<IoSlice<'_>> = buffers.iter().map(|buffer| IoSlice::new(buffer)).collect();
        let mut rest = slices.as_mut_slice();
        while !rest.is_empty() {
            let batch = &rest[..rest.len().min(MAX_SLICES)];
            match rustix::io::pwritev(&self.file, batch, self.present.bytes) {
                Ok(0) => {
                    return Err(LogError::io("writing", path(), std::io::ErrorKind::WriteZero));
                }
                Ok(written) => {
                    self.present.bytes += written as u64;
                    self.shared.disk_bytes.fetch_add(written as u64, Ordering::Relaxed);
                    IoSlice::advance_slices(&mut rest, written);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(LogError::io("writing", path(), error)),
            }
        }
        rustix::fs::fdatasync(self.file.as_fd()).map_err(|error| LogError::io("syncing", path(), error))
    }

    /// Starts the next segment. The present one is synced, as each write is.
    fn roll(&mut self) -> Result<(), LogError> {
        let (present, id, file) = create_segment(&self.dir, &self.dir_fd, self.present.number + 1)?;
        self.shared.disk_bytes.fetch_add(present.bytes, Ordering::Relaxed);
        self.older.push_back(std::mem::replace(&mut self.present, present));
        self.id = id;
        self.file = file;
        if let Some(state) = self.state.take() {
            let mut bytes = Vec::new();
            record::encode(&mut bytes, Kind::State, 0, 0, &[&state]);
            record::place(&mut bytes, self.id, self.present.bytes, self.present.bytes);
            self.state = Some(state);
            self.write_and_sync(&[&bytes])?;
        }
        Ok(())
    }

    /// Deletes segments from the front that hold no entry behind `through`.
    fn delete_through(&mut self, through: u64) -> Result<(), LogError> {
        while let Some(oldest) = self.older.front()
            && oldest.last_index.is_none_or(|last| last <= through)
        {
            let path = self.dir.join(SegmentId { number: oldest.number, salt: 0 }.file_name());
            std::fs::remove_file(&path).map_err(|error| LogError::io("removing", &path, error))?;
            // One by one: a crash must not leave an older segment without its successor.
            self.dir_fd.sync_all().map_err(|error| LogError::io("syncing", &self.dir, error))?;
            self.shared.disk_bytes.fetch_sub(oldest.bytes, Ordering::Relaxed);
            self.older.pop_front();
        }
        Ok(())
    }
}

/// Makes an empty segment; it and its name are durable before a record goes in.
fn create_segment(dir: &Path, dir_fd: &File, number: u64) -> Result<(SegmentInfo, SegmentId, File), LogError> {
    let create = |path: &Path| -> std::io::Result<(SegmentId, File)> {
        let mut salt = [0; 8];
        std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut salt)?;
        let id = SegmentId { number, salt: u64::from_le_bytes(salt) };
        let file = File::options().write(true).create_new(true).open(path)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &id.encode_header(), 0)?;
        file.sync_all()?;
        dir_fd.sync_all()?;
        Ok((id, file))
    };
    let path = dir.join(SegmentId { number, salt: 0 }.file_name());
    let (id, file) = create(&path).map_err(|error| LogError::io("creating", path, error))?;
    Ok((SegmentInfo { number, bytes: SEGMENT_HEADER_BYTES as u64, last_index: None }, id, file))
}
