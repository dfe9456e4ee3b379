//! What the tests share: a directory that goes away, and waiting for the disk.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use storage_log::{FileLog, LogStore, Options, Record, Ticket};

/// A directory of its own, removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    /// In memory where the system has a place for that: the content of files is what counts.
    pub fn new() -> Scratch {
        let memory = Path::new("/dev/shm");
        Scratch::below(if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() })
    }

    /// Where temporary files go, on a disk as a rule.
    pub fn on_disk() -> Scratch {
        Scratch::below(std::env::temp_dir())
    }

    fn below(parent: PathBuf) -> Scratch {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let unique = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!("plover-log-test-{}-{unique}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn options(segment_bytes: u64) -> Options {
    Options { segment_bytes, max_bytes: 1 << 30, queue_bytes: 1 << 20 }
}

pub fn entry(log: &mut FileLog, index: u64, view: u64, bytes: &[u8]) -> Ticket {
    let (a, b) = bytes.split_at(bytes.len() / 3);
    log.append(Record::Entry { index, view, parts: [a, b] }).unwrap()
}

/// Flushes and waits until `ticket` is durable or the log has failed; says which.
pub fn settle(log: &mut FileLog, ticket: Ticket) -> bool {
    log.flush();
    await_log(log, |log| log.durable() >= ticket || log.failed().is_some());
    log.durable() >= ticket
}

/// Waits for the log's event until `done`.
pub fn await_log(log: &FileLog, done: impl Fn(&FileLog) -> bool) {
    let timeout = rustix::event::Timespec { tv_sec: 20, tv_nsec: 0 };
    loop {
        log.clear_event();
        if done(log) {
            return;
        }
        let event = log.event_fd();
        let mut fds = [rustix::event::PollFd::new(&event, rustix::event::PollFlags::IN)];
        let ready = rustix::event::poll(&mut fds, Some(&timeout)).unwrap();
        assert!(ready > 0, "the log did nothing within 20 s");
    }
}
