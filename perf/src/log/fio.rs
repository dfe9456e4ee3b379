//! fio as a peer: the same writes and syncs with nothing in between.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::bare_uring::create_written;
use crate::peers;

/// fio starts, writes and ends within this, or the disk is broken.
const LIMIT: Duration = Duration::from_secs(180);

/// Sequential writes, each followed by fdatasync, into a file that is laid out beforehand.
pub struct Fio {
    directory: PathBuf,
    block_bytes: u64,
    depth: u32,
    writes: u64,
}

impl Fio {
    /// `writes` writes of `block_bytes` each, at most `depth` in flight, in `directory`.
    pub fn prepare(directory: &Path, block_bytes: u64, depth: u32, writes: u64) -> Result<Fio> {
        create_written(&directory.join("fio.data"), block_bytes * writes)?;
        Ok(Fio { directory: directory.to_owned(), block_bytes, depth, writes })
    }

    /// Runs it once: writes and syncs per second, by fio's own clock (its start does not count).
    pub fn run(&self) -> Result<f64> {
        let mut command = peers::command("fio")?;
        command.current_dir(&self.directory).args([
            "--name=commits",
            "--filename=fio.data",
            "--ioengine=io_uring",
            "--fixedbufs=1",
            "--registerfiles=1",
            "--direct=1",
            "--rw=write",
            "--fdatasync=1",
            "--allow_file_create=0",
            "--fallocate=none",
            // One thread in the process: no second process that would outlive it.
            "--thread=1",
            "--output-format=json",
        ]);
        command.arg(format!("--bs={}", self.block_bytes));
        command.arg(format!("--iodepth={}", self.depth));
        command.arg(format!("--size={}", self.block_bytes * self.writes));
        let text = peers::output(command, &self.directory, LIMIT)?;
        rate(&text, self.writes).context("fio's report")
    }
}

/// Writes per second, if every write was done.
fn rate(report: &str, writes: u64) -> Result<f64> {
    // Warnings stand before the object.
    let json: Value = serde_json::from_str(report.find('{').map_or("", |at| &report[at..]))?;
    let job = &json["jobs"][0];
    let done = job["write"]["total_ios"].as_u64();
    ensure!(job["error"] == 0 && done == Some(writes), "error {}, {done:?} of {writes} writes", job["error"]);
    // fio's sync.total_ios stays 0; the latencies count.
    let syncs = job["sync"]["lat_ns"]["N"].as_u64().unwrap_or(0);
    // It ends after the last write, without a sync.
    ensure!(syncs + 1 >= writes, "{syncs} syncs for {writes} writes");
    job["write"]["iops"].as_f64().context("no write.iops")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(writes: u64, syncs: u64) -> String {
        format!(
            "note: something\n{{\"jobs\":[{{\"error\":0,\"write\":{{\"total_ios\":{writes},\"iops\":250.5}},\
             \"sync\":{{\"lat_ns\":{{\"N\":{syncs}}}}}}}]}}"
        )
    }

    #[test]
    fn a_report_counts_only_if_every_write_was_synced() {
        assert_eq!(rate(&report(10, 9), 10).unwrap(), 250.5);
        assert!(rate(&report(9, 9), 10).is_err());
        assert!(rate(&report(10, 8), 10).is_err());
        assert!(rate("fio: no such engine", 10).is_err());
    }
}
