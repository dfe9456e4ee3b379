//! The engine that is measured, behind the few calls that the measurements need: another engine is measured by
//! changing this file alone.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use dataplane::wait::{Interest, Poller, Ready};
use storage_log::{FileLog, LogStore, Options, Record, Ticket};

/// A disk that takes longer for one sync is broken.
const DEADLINE: Duration = Duration::from_secs(30);
/// Small enough that a measurement recycles segments many times, as a service does in an hour.
const OPTIONS: Options = Options { segment_bytes: 16 << 20, max_bytes: 256 << 20, queue_bytes: 64 << 20 };

/// A new log of records that all have one size, with a poller that waits for it, as the reactor has one.
pub struct Engine {
    file: FileLog,
    poller: Poller,
    ready: Vec<Ready>,
    record: Vec<u8>,
    next_index: u64,
    appended: Ticket,
    truncated: u64,
}

impl Engine {
    /// An empty log in `directory`.
    pub fn create(directory: &Path, record_bytes: usize) -> Result<Engine> {
        let (file, recovered) = FileLog::open(directory, OPTIONS)?;
        ensure!(recovered.entries.is_empty(), "a new log is not empty");
        let poller = Poller::new()?;
        poller.add(file.event_fd(), 0, Interest::ReadEdge)?;
        Ok(Engine {
            file,
            poller,
            ready: Vec::new(),
            record: record(1, record_bytes),
            next_index: 1,
            appended: Ticket(0),
            truncated: 0,
        })
    }

    /// Appends `records` records and starts their write.
    pub fn start_commit(&mut self, records: u64) -> Result<Ticket> {
        for _ in 0..records {
            stamp(&mut self.record, self.next_index);
            let record = Record::Entry { index: self.next_index, view: 1, parts: [&[], &self.record] };
            self.appended = self.file.append(record)?;
            self.next_index += 1;
        }
        self.file.flush();
        Ok(self.appended)
    }

    /// Waits until everything up to `ticket` is durable.
    pub fn wait(&mut self, ticket: Ticket) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while self.file.durable() < ticket {
            if let Some(error) = self.file.failed() {
                return Err(error.into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("a record was not durable within {} s", DEADLINE.as_secs());
            }
            self.poller.wait(Some(left.as_micros() as u64), &mut self.ready)?;
        }
        Ok(())
    }

    /// Forgets all records but those that are not durable yet.
    pub fn truncate(&mut self) {
        // Tickets count records, and these are records 1, 2, 3, ….
        self.truncated = self.file.durable().0;
        self.file.truncate_prefix(self.truncated);
    }

    /// Closes the log, opens it again and looks for everything that was acknowledged and not truncated.
    pub fn check(self, directory: &Path) -> Result<()> {
        let Engine { file, truncated, next_index, record: sample, .. } = self;
        drop(file);
        let (_, recovered) = FileLog::open(directory, OPTIONS)?;
        let mut missing = truncated + 1;
        for entry in recovered.entries.iter().filter(|entry| entry.index > truncated) {
            if entry.index != missing || entry.bytes != record(entry.index, sample.len()) {
                break;
            }
            missing += 1;
        }
        ensure!(
            missing == next_index,
            "the log lost or changed acknowledged records: {} to {} should be there, {missing} is not",
            truncated + 1,
            next_index - 1
        );
        Ok(())
    }
}

/// What record `index` holds.
fn record(index: u64, bytes: usize) -> Vec<u8> {
    let mut record = (0..bytes).map(|at| (at % 251) as u8).collect();
    stamp(&mut record, index);
    record
}

fn stamp(record: &mut Vec<u8>, index: u64) {
    record[..8].copy_from_slice(&index.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Scratch;

    #[test]
    fn acknowledged_records_are_found_and_missing_ones_noticed() {
        let scratch = Scratch::new(&std::env::temp_dir(), "plover-perf-engine").unwrap();
        let mut log = Engine::create(scratch.path(), 100).unwrap();
        for _ in 0..3 {
            let ticket = log.start_commit(2).unwrap();
            log.wait(ticket).unwrap();
            log.truncate();
        }
        let ticket = log.start_commit(2).unwrap();
        log.wait(ticket).unwrap();
        assert_eq!(log.truncated, 6);
        // As if one more had been acknowledged.
        log.next_index += 1;
        let error = log.check(scratch.path()).unwrap_err().to_string();
        assert!(error.ends_with("7 to 9 should be there, 9 is not"), "{error}");
    }
}
