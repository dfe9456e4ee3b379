//! The engine that is measured, behind the few calls that the measurements need: another engine is measured by
//! changing this file alone.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use storage_log::{LegSpec, LogError, LogStore, Options, Record, Recovered, Ticket};

/// A disk that takes longer for one sync is broken.
const DEADLINE: Duration = Duration::from_secs(30);
/// Few segments, so that a measurement uses them again, as a service does in an hour.
const MAX_BYTES: u64 = 256 << 20;

fn open(directory: &Path) -> Result<(Box<dyn LogStore>, Recovered)> {
    let options = Options { max_bytes: MAX_BYTES, ..Options::default() };
    Ok(storage_log::open(&[LegSpec::Dir(directory.to_owned())], options)?)
}

/// A log of records that all have one size, waited for within the kernel.
pub struct Engine {
    log: Box<dyn LogStore>,
    record: Vec<u8>,
    /// The last record that was appended, that is durable, that was forgotten.
    appended: u64,
    durable: u64,
    truncated: u64,
}

/// A group of records on its way.
#[derive(Clone, Copy, Debug)]
pub struct Commit {
    ticket: Ticket,
    through: u64,
}

impl Engine {
    /// An empty log in `directory`.
    pub fn create(directory: &Path, record_bytes: usize) -> Result<Engine> {
        let (log, recovered) = open(directory)?;
        ensure!(recovered.entries.is_empty(), "a new log is not empty");
        Ok(Engine { log, record: record(1, record_bytes), appended: 0, durable: 0, truncated: 0 })
    }

    /// Appends `records` records and starts their write.
    pub fn start_commit(&mut self, records: u64) -> Result<Commit> {
        let mut ticket = None;
        for _ in 0..records {
            let index = self.appended + 1;
            stamp(&mut self.record, index);
            ticket = Some(self.append(index)?);
            self.appended = index;
        }
        self.log.flush();
        Ok(Commit { ticket: ticket.context("a commit of no records")?, through: self.appended })
    }

    /// Appends the record as soon as it goes in: the log may be making its next segment.
    fn append(&mut self, index: u64) -> Result<Ticket> {
        loop {
            match self.log.append(Record::Entry { index, view: 1, parts: [&[], &self.record] }) {
                Err(LogError::QueueFull) => {
                    self.log.flush();
                    self.log.wait(Ticket(index), Duration::from_millis(1));
                }
                appended => return Ok(appended?),
            }
        }
    }

    /// Waits until it is durable.
    pub fn wait(&mut self, commit: Commit) -> Result<()> {
        if !self.log.wait(commit.ticket, DEADLINE) {
            bail!("a record was not durable within {} s: {:?}", DEADLINE.as_secs(), self.log.failed());
        }
        self.durable = commit.through;
        Ok(())
    }

    /// Forgets all records but those that are not durable yet.
    pub fn truncate(&mut self) {
        self.truncated = self.durable;
        self.log.truncate_prefix(self.truncated);
    }

    /// Closes the log, opens it again and looks for everything that was acknowledged and not truncated.
    pub fn check(self, directory: &Path) -> Result<()> {
        let Engine { log, truncated, appended, record: sample, .. } = self;
        drop(log);
        let (_, recovered) = open(directory)?;
        let mut missing = truncated + 1;
        for entry in recovered.entries.iter().filter(|entry| entry.index > truncated) {
            if entry.index != missing || entry.bytes != record(entry.index, sample.len()) {
                break;
            }
            missing += 1;
        }
        ensure!(
            missing == appended + 1,
            "the log lost or changed acknowledged records: {} to {appended} should be there, {missing} is not",
            truncated + 1
        );
        Ok(())
    }
}

/// What record `index` holds.
fn record(index: u64, bytes: usize) -> Vec<u8> {
    let mut record: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
    stamp(&mut record, index);
    record
}

fn stamp(record: &mut [u8], index: u64) {
    record[..8].copy_from_slice(&index.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{self, Scratch};

    #[test]
    fn acknowledged_records_are_found_and_missing_ones_noticed() {
        let scratch = Scratch::new(&results::directory(), "engine-test").unwrap();
        let mut log = Engine::create(scratch.path(), 100).unwrap();
        for _ in 0..3 {
            let commit = log.start_commit(2).unwrap();
            log.wait(commit).unwrap();
            log.truncate();
        }
        let commit = log.start_commit(2).unwrap();
        log.wait(commit).unwrap();
        assert_eq!(log.truncated, 6);
        // As if one more had been acknowledged.
        log.appended += 1;
        let error = log.check(scratch.path()).unwrap_err().to_string();
        assert!(error.ends_with("7 to 9 should be there, 9 is not"), "{error}");
    }
}
