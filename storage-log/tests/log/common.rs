//! What the tests share: a directory that goes away, and waiting for the disk.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use storage_log::{LegSpec, LogError, LogStore, Options, Record, Ticket};

/// A disk that takes longer is broken.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// The smallest segments that there are.
pub const SEGMENT: u64 = 8 * 4096;

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

    /// A directory for a log.
    pub fn leg(&self, name: &str) -> LegSpec {
        LegSpec::Dir(self.0.join(name))
    }

    /// A file that stands for a device.
    pub fn device(&self, name: &str, bytes: u64) -> LegSpec {
        let path = self.0.join(name);
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(bytes).unwrap();
        LegSpec::Device(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn options(segment_bytes: u64) -> Options {
    Options { segment_bytes, max_bytes: 64 * segment_bytes, stage_bytes: 1 << 20, direct: true }
}

/// Appends an entry, and makes room first if need be.
pub fn entry(log: &mut dyn LogStore, index: u64, view: u64, bytes: &[u8]) -> Ticket {
    let (a, b) = bytes.split_at(bytes.len() / 3);
    append(log, Record::Entry { index, view, parts: [a, b] })
}

/// Appends, and makes room first if need be.
pub fn append(log: &mut dyn LogStore, record: Record<'_>) -> Ticket {
    for _ in 0..1000 {
        match log.append(record) {
            Ok(ticket) => return ticket,
            Err(LogError::QueueFull) => {
                log.flush();
                log.wait(Ticket(log.durable().0 + 1), Duration::from_millis(20));
            }
            Err(error) => panic!("{error}"),
        }
    }
    panic!("the queue stays full");
}

/// Flushes and waits until `ticket` is durable or the log has failed; says which.
pub fn settle(log: &mut dyn LogStore, ticket: Ticket) -> bool {
    log.flush();
    let durable = log.wait(ticket, DEADLINE);
    assert!(durable || log.failed().is_some(), "the log did nothing within {DEADLINE:?}");
    durable
}

/// The segment files, oldest first.
pub fn segments(dir: &Path) -> Vec<PathBuf> {
    let all = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path());
    let mut files: Vec<PathBuf> = all.filter(|path| path.extension().is_some_and(|end| end == "log")).collect();
    files.sort();
    files
}

/// Numbers that follow from a seed (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True once in `times`.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.next().to_le_bytes());
        words.flatten().take(len).collect()
    }
}
