//! The io_uring driver: a write linked to an fdatasync, submitted with one system call; completions are read from
//! shared memory.
//!
//! The write is direct (no page cache), from registered memory to a registered file. Its completion is not reported, only
//! that of the sync behind it, so that a sleeping reactor is woken once per group. If the write fails or is cut short, it
//! is the other way round: it is reported, and the sync is dropped without a word. Rejected: O_DSYNC writes, which on
//! devices without FUA flush just the same, and which starve when the submitting thread spins in user space; and a
//! writer thread, which costs two wake-ups per commit.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};

use crate::engine::Driver;
use crate::legs::MAX_LEGS;
use crate::volume::FilePlace;

/// A write that is cut short, or that the kernel asks to repeat, is repeated so often.
const MAX_ATTEMPTS: u8 = 8;
const RING_ENTRIES: u32 = 4 * MAX_LEGS as u32;

/// What a completion is about, in the lowest bit; above it the copy, and the number of the attempt.
const OP_WRITE: u64 = 0;
const OP_SYNC: u64 = 1;
const ATTEMPT_SHIFT: u32 = 8;
const _: () = assert!(MAX_LEGS << 1 <= 1 << ATTEMPT_SHIFT);

/// A group on its way to one copy.
#[derive(Debug, Default)]
struct Job {
    bytes: Range<usize>,
    offset_bytes: u64,
    attempts: u8,
}

/// One copy's segment.
#[derive(Debug, Default)]
struct Target {
    place: Option<FilePlace>,
    job: Job,
    /// The device has not answered.
    in_flight: bool,
    /// Counts submissions, so that a completion is never taken for one of a later attempt.
    submissions: u64,
}

/// See the module.
pub(crate) struct Uring {
    ring: IoUring,
    targets: [Target; MAX_LEGS],
    memory: *const u8,
    memory_is_registered: bool,
    event: Arc<OwnedFd>,
}

impl Uring {
    /// A driver that writes from `memory`, and signals `event` when something is done.
    ///
    /// # Safety
    /// `memory` must stay where it is, and mapped, for as long as the driver lives.
    pub unsafe fn new(memory: &[u8], event: Arc<OwnedFd>) -> io::Result<Uring> {
        let ring = IoUring::new(RING_ENTRIES)?;
        let submitter = ring.submitter();
        submitter.register_files_sparse(MAX_LEGS as u32)?;
        submitter.register_eventfd(event.as_raw_fd())?;
        let vector = libc::iovec { iov_base: memory.as_ptr().cast_mut().cast(), iov_len: memory.len() };
        // SAFETY: the caller vouches that the memory outlives the ring. The kernel only reads from it: all that is ever
        // submitted with it are writes to files.
        let registered = unsafe { submitter.register_buffers(&[vector]) };
        if let Err(error) = &registered {
            tracing::info!(%error, "the log's memory cannot be registered (see «ulimit -l»); each write maps it anew");
        }
        Ok(Uring {
            ring,
            targets: Default::default(),
            memory: memory.as_ptr(),
            memory_is_registered: registered.is_ok(),
            event,
        })
    }

    fn submit(&mut self, leg: usize) -> io::Result<()> {
        let Target { place: Some(place), job, submissions, in_flight } = &mut self.targets[leg] else {
            return Err(io::ErrorKind::NotFound.into());
        };
        // SAFETY: the engine gives ranges of the memory that this driver was made for, so the result stays inside of it.
        let start = unsafe { self.memory.add(job.bytes.start) };
        let (file, length) = (Fixed(leg as u32), job.bytes.len() as u32);
        let offset = place.offset_bytes + job.offset_bytes;
        let write: Entry = if self.memory_is_registered {
            opcode::WriteFixed::new(file, start, length, 0).offset(offset).build()
        } else {
            opcode::Write::new(file, start, length).offset(offset).build()
        };
        *submissions += 1;
        let tag = *submissions << ATTEMPT_SHIFT | (leg as u64) << 1;
        let write = write.flags(Flags::IO_LINK | Flags::SKIP_SUCCESS).user_data(tag | OP_WRITE);
        let sync = opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build().user_data(tag | OP_SYNC);
        // SAFETY: the memory is mapped for as long as the driver lives and the engine does not change these bytes before
        // the completion has been seen; the file is registered and kept open by `place`.
        let pushed = unsafe { self.ring.submission().push_multiple(&[write, sync]) };
        pushed.map_err(|_| io::Error::from(io::ErrorKind::ResourceBusy))?;
        *in_flight = true;
        loop {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// A copy's group is done, or its write has failed. `None`: it was begun again.
    fn conclude(&mut self, leg: usize, op: u64, result: i32) -> Option<io::Result<()>> {
        let is_short = op == OP_WRITE && result >= 0;
        if result >= 0 && !is_short {
            return Some(Ok(()));
        }
        let failure = if is_short { libc::EIO } else { -result };
        let job = &mut self.targets[leg].job;
        if (is_short || matches!(failure, libc::EAGAIN | libc::EINTR)) && job.attempts < MAX_ATTEMPTS {
            job.attempts += 1;
            return self.submit(leg).err().map(Err);
        }
        Some(Err(io::Error::from_raw_os_error(failure)))
    }
}

impl Drop for Uring {
    /// The kernel takes the ring apart some time after it is closed. Files that are registered would stay open, and a
    /// device locked, until then.
    fn drop(&mut self) {
        if let Err(error) = self.ring.submitter().unregister_files() {
            tracing::debug!(%error, "the log's files are given back later");
        }
    }
}

impl Driver for Uring {
    type Place = FilePlace;

    fn bind(&mut self, leg: usize, place: &FilePlace) -> io::Result<()> {
        self.ring.submitter().register_files_update(leg as u32, &[place.file.as_raw_fd()])?;
        self.targets[leg].place = Some(place.clone());
        Ok(())
    }

    fn write(&mut self, leg: usize, bytes: Range<usize>, offset_bytes: u64) -> io::Result<()> {
        self.targets[leg].job = Job { bytes, offset_bytes, attempts: 0 };
        self.submit(leg)
    }

    fn release(&mut self, leg: usize) -> bool {
        const NO_FILE: i32 = -1;
        let target = &mut self.targets[leg];
        if target.in_flight {
            return false;
        }
        if target.place.take().is_some()
            && let Err(error) = self.ring.submitter().register_files_update(leg as u32, &[NO_FILE])
        {
            tracing::debug!(%error, "a file of the log is given back later");
        }
        true
    }

    fn poll(&mut self, done: &mut dyn FnMut(usize, io::Result<()>)) {
        loop {
            let Some(completion) = self.ring.completion().next() else { return };
            let (tag, result) = (completion.user_data(), completion.result());
            let leg = (tag & ((1 << ATTEMPT_SHIFT) - 1)) as usize >> 1;
            if tag >> ATTEMPT_SHIFT != self.targets[leg].submissions {
                continue;
            }
            self.targets[leg].in_flight = false;
            if let Some(outcome) = self.conclude(leg, tag & 1, result) {
                done(leg, outcome);
            }
        }
    }

    fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        let limit = Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
        match self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&limit)) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }
}
