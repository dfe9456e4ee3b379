//! `log.commit_p50`: one 1 KiB record until it is durable, against the bare system calls.
//!
//! The peer writes as many bytes per record as the log puts on the disk (header included) at the end of a
//! growing file, as the log does, and syncs. The difference is what the writer thread, the checksum and two
//! wake-ups cost.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use storage_log::{LegSpec, LogStore, Options, Record};

use crate::Effort;
use crate::group::Sink;
use crate::results::Scratch;
use crate::sample::{Better, Figure, Latencies, compare};

const RECORD_BYTES: usize = 1024;
/// A disk that takes longer for one sync is broken.
const DEADLINE: Duration = Duration::from_secs(30);

/// Measures in a scratch directory under `directory`, whose file system is the one measured.
///
/// # Errors
/// The disk fails, or the log does not hold what was written.
pub fn run(effort: Effort, directory: &Path, sink: Sink<'_>) -> Result<()> {
    let scratch = Scratch::new(directory, "log-commit")?;
    let commits = effort.pick(200, 10);
    let mut log = Log::open(&scratch.path().join("log"))?;
    let mut bare = Bare::create(&scratch.path().join("bare"), storage_log::BLOCK_BYTES)?;
    let figure = Figure { id: "log.commit_p50", unit: "us", better: Better::Lower };
    let row = compare(
        figure,
        effort,
        "pwrite+fdatasync",
        || p50_us(commits, || log.commit()),
        || p50_us(commits, || bare.commit()),
    )?;
    let written = log.next_index;
    drop(log);
    check(&scratch.path().join("log"), written)?;
    sink(row)
}

fn p50_us(times: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut latencies = Latencies::default();
    for _ in 0..times {
        let start = Instant::now();
        work()?;
        latencies.add(start.elapsed());
    }
    Ok(latencies.p50_us())
}

struct Log {
    store: Box<dyn LogStore>,
    next_index: u64,
    payload: Vec<u8>,
}

impl Log {
    fn open(directory: &Path) -> Result<Log> {
        let (store, recovered) = storage_log::open(&[LegSpec::Dir(directory.to_owned())], Options::default())?;
        ensure!(recovered.entries.is_empty(), "a new log is not empty");
        Ok(Log { store, next_index: 1, payload: payload() })
    }

    fn commit(&mut self) -> Result<()> {
        let record = Record::Entry { index: self.next_index, view: 1, parts: [&[], &self.payload] };
        let ticket = self.store.append(record)?;
        self.store.flush();
        if !self.store.wait(ticket, DEADLINE) {
            bail!("a record was not durable within {} s: {:?}", DEADLINE.as_secs(), self.store.failed());
        }
        self.next_index += 1;
        Ok(())
    }
}

/// What no log can beat without giving up durability or an own file layout.
struct Bare {
    file: File,
    offset: u64,
    bytes: Vec<u8>,
}

impl Bare {
    fn create(path: &Path, record_bytes: usize) -> Result<Bare> {
        let mut bytes = payload();
        bytes.resize(record_bytes, 0xA5);
        let file = File::options().write(true).create_new(true).open(path);
        let file = file.with_context(|| format!("cannot make {}", path.display()))?;
        file.sync_all()?;
        Ok(Bare { file, offset: 0, bytes })
    }

    fn commit(&mut self) -> Result<()> {
        self.file.write_all_at(&self.bytes, self.offset)?;
        // fdatasync(2), as the log does it.
        self.file.sync_data()?;
        self.offset += self.bytes.len() as u64;
        Ok(())
    }
}

fn payload() -> Vec<u8> {
    (0..RECORD_BYTES).map(|i| (i % 251) as u8).collect()
}

/// Opens the log again and looks for everything that was acknowledged.
fn check(directory: &Path, next_index: u64) -> Result<()> {
    let (_, recovered) = storage_log::open(&[LegSpec::Dir(directory.to_owned())], Options::default())?;
    let expected = payload();
    let found = recovered.entries.len() as u64;
    let intact = (1..).zip(&recovered.entries).all(|(index, entry)| entry.index == index && entry.bytes == expected);
    ensure!(
        intact && found + 1 == next_index,
        "the log lost or changed acknowledged records: {found} of {} are there",
        next_index - 1
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_lacks_a_record_is_noticed() {
        let scratch = Scratch::new(&std::env::temp_dir(), "plover-perf-log").unwrap();
        let mut log = Log::open(scratch.path()).unwrap();
        for _ in 0..3 {
            log.commit().unwrap();
        }
        drop(log);
        check(scratch.path(), 4).unwrap();
        let error = check(scratch.path(), 5).unwrap_err().to_string();
        assert!(error.ends_with("3 of 4 are there"), "{error}");
    }
}
