//! The durable log against what the device does without it.
//!
//! * `log.append.bB.rR`: B records of R bytes per commit, one commit after another, against fio with the same
//!   sync pattern, depth and bytes per write. Ours pays for its headers and checksums, fio for nothing.
//! * `log.commit_p50`: one record of 1 KiB until it is durable, against one block in a bare io_uring loop.
//!
//! Both sides write in one directory, so on one file system, and alternate. Acknowledged records are looked for
//! afterwards.

mod bare_uring;
mod engine;
mod fio;

use std::collections::VecDeque;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;

use crate::Effort;
use crate::group::Sink;
use crate::results::Scratch;
use crate::sample::{Better, Figure, Latencies, compare};
use bare_uring::BareUring;
use engine::Engine;
use fio::Fio;

/// Writes in flight, on both sides: the log syncs one group before it writes the next.
const DEPTH: u32 = 1;
/// Commits that are not durable yet, on our side: one is on its way to the disk while the next one is appended, as in
/// service, where inputs arrive while the disk works. Each is a write and a sync of its own all the same.
const UNDER_WAY: usize = 2;
/// Commits between truncations.
const TRUNCATE_EVERY: u64 = 16;
const BATCHES: [u64; 3] = [1, 8, 64];
const RECORDS_BYTES: [usize; 2] = [256, 4096];
/// The record of `log.commit_p50`: with its header it fits a block.
const SINGLE_BYTES: usize = 1024;

const COMMIT_P50: &str = "log.commit_p50";

/// Measures in a scratch directory under `directory`, whose file system is the one measured.
///
/// # Errors
/// fio is not there, the disk fails, or the log does not hold what was acknowledged.
pub fn run(effort: Effort, directory: &Path, sink: Sink<'_>) -> Result<()> {
    let scratch = Scratch::new(directory, "log")?;
    let block_bytes = bare_uring::direct_block_bytes(scratch.path())?;
    for batch in BATCHES {
        for record_bytes in RECORDS_BYTES {
            append(effort, directory, Shape { batch, record_bytes, block_bytes }, sink)?;
        }
    }
    if sink.wants(COMMIT_P50) {
        single(effort, scratch.path(), sink)?;
    }
    Ok(())
}

/// What one commit is.
struct Shape {
    batch: u64,
    record_bytes: usize,
    /// What fio's writes are rounded up to.
    block_bytes: usize,
}

fn append(effort: Effort, directory: &Path, shape: Shape, sink: Sink<'_>) -> Result<()> {
    let Shape { batch, record_bytes, block_bytes } = shape;
    let commits = effort.pick(600, 8);
    let id = format!("log.append.b{batch}.r{record_bytes}");
    if !sink.wants(&id) {
        return Ok(());
    }
    let scratch = Scratch::new(directory, &id)?;
    let place = scratch.path().join("log");
    let fio_bytes = (batch * record_bytes as u64).next_multiple_of(block_bytes as u64);
    let mut log = Engine::create(&place, record_bytes)?;
    let fio = Fio::prepare(scratch.path(), fio_bytes, DEPTH, commits)?;
    let peer = format!("fio io_uring direct fdatasync=1 bs={fio_bytes} iodepth={DEPTH}");
    let figure = Figure { id: &id, unit: "commits/s", better: Better::Higher };
    let row = compare(figure, effort, &peer, || commits_per_s(&mut log, batch, commits), || fio.run())?;
    log.check(&place)?;
    sink(row)
}

fn commits_per_s(log: &mut Engine, batch: u64, commits: u64) -> Result<f64> {
    let mut flying = VecDeque::new();
    let start = Instant::now();
    for commit in 1..=commits {
        flying.push_back(log.start_commit(batch)?);
        if flying.len() >= UNDER_WAY {
            log.wait(flying.pop_front().expect("one was pushed"))?;
        }
        if commit % TRUNCATE_EVERY == 0 {
            log.truncate();
        }
    }
    for commit in flying {
        log.wait(commit)?;
    }
    Ok(commits as f64 / start.elapsed().as_secs_f64())
}

fn single(effort: Effort, directory: &Path, sink: Sink<'_>) -> Result<()> {
    let commits = effort.pick(200, 10);
    let place = directory.join("single");
    let mut log = Engine::create(&place, SINGLE_BYTES)?;
    let mut bare = BareUring::create(&directory.join("bare"))?;
    let figure = Figure { id: COMMIT_P50, unit: "us", better: Better::Lower };
    let row = compare(
        figure,
        effort,
        "bare io_uring write+fdatasync, 4 KiB",
        || {
            let p50_us = p50_us(commits, || {
                let commit = log.start_commit(1)?;
                log.wait(commit)
            });
            log.truncate();
            p50_us
        },
        || p50_us(commits, || bare.commit()),
    )?;
    log.check(&place)?;
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
