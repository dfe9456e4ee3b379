//! The log's engine on SPDK devices: entries are appended and acknowledged until somebody kills the process, and what is there
//! afterwards is compared with what was acknowledged.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use storage_log::{LegSpec, LegState, LogStore, Options, Record, Recovered, Ticket};

use crate::{LIMIT, MIB, Random, numbers};

/// So many of the last entries are kept, so that slots of the device are given back and used again.
const KEPT: u64 = 1500;
/// Entries that are not durable, at most.
const WINDOW: usize = 64;
/// A state is written before every entry whose index is a multiple of this.
const STATE_EVERY: u64 = 50;

fn options() -> Options {
    Options { segment_bytes: MIB as u64, max_bytes: 48 * MIB as u64, ..Options::default() }
}

/// `devices`: PCI addresses, with «+» between them.
fn legs(devices: &str) -> Vec<LegSpec> {
    devices.split('+').map(|address| LegSpec::device(format!("spdk:{address}").into())).collect()
}

fn open(devices: &str) -> Result<(Box<dyn LogStore>, Recovered)> {
    Ok(storage_log::open(&legs(devices), options())?)
}

/// What an entry holds follows from its index and the run that appended it.
fn content(run: u64, index: u64) -> Vec<u8> {
    let mut random = Random(run << 40 | index);
    let most = if random.below(16) == 0 { 60_000 } else { 3000 };
    let length = random.below(most) as usize;
    (0..length).map(|_| random.next() as u8).collect()
}

/// The run that had an index acknowledged; `runs` are words RUN:FROM:TO.
struct Runs(Vec<[u64; 3]>);

impl Runs {
    fn parse(words: &[&str]) -> Result<Self> {
        let parse = |word: &&str| {
            let parts: Vec<&str> = word.split(':').collect();
            numbers::<3>(parts.try_into().ok().with_context(|| format!("«{word}» is not RUN:FROM:TO"))?)
        };
        Ok(Self(words.iter().map(parse).collect::<Result<_>>()?))
    }

    /// The last index that was acknowledged.
    fn last(&self) -> u64 {
        self.0.last().map_or(0, |[_, _, to]| *to)
    }

    fn run_of(&self, index: u64) -> Option<u64> {
        self.0.iter().find(|[_, from, to]| (from..=to).contains(&&index)).map(|[run, ..]| *run)
    }
}

/// A copy that is opened without the other one may lack what that one has gone on with, and must say so.
fn verify_alone(recovered: &mut Recovered, runs: &Runs) -> Result<()> {
    ensure!(std::mem::take(&mut recovered.doubtful), "the other copy is missing, and nobody says so");
    verify(recovered, runs)
}

/// Everything that was acknowledged is there, and nothing but what was appended.
fn verify(recovered: &Recovered, runs: &Runs) -> Result<()> {
    let last = runs.last();
    let found = recovered.entries.last().map_or(0, |entry| entry.index);
    let first = recovered.entries.first().map_or(1, |entry| entry.index);
    println!("found {first} to {found}, acknowledged to {last}, torn {} bytes", recovered.torn_bytes);
    ensure!(found >= last, "the log ends at {found}, but {last} was acknowledged");
    ensure!(first <= (last + 1).saturating_sub(KEPT).max(1), "the log begins at {first}; {last} was acknowledged");
    ensure!(!recovered.doubtful, "the log is in doubt, although its device keeps what it flushed");
    for (entry, index) in recovered.entries.iter().zip(first..) {
        ensure!(entry.index == index, "{} follows {}", entry.index, index - 1);
        ensure!(entry.bytes == content(entry.view, index), "entry {index} of run {} has changed", entry.view);
        if let Some(run) = runs.run_of(index) {
            ensure!(
                entry.view == run,
                "entry {index} is of run {}, but that of run {run} was acknowledged",
                entry.view
            );
        }
    }
    if last >= STATE_EVERY {
        let state = recovered.state.as_deref().context("the state is lost")?;
        let state = u64::from_le_bytes(state.try_into().context("the state has another length")?);
        ensure!(state >= last - last % STATE_EVERY, "the state is that of {state}, at {last}");
    }
    Ok(())
}

/// After [`verify`]: appends entries behind the last acknowledged one and says in order which are durable, until it is killed.
pub fn append(devices: &str, run: u64, words: &[&str]) -> Result<()> {
    let runs = Runs::parse(words)?;
    let (mut log, recovered) = open(devices)?;
    verify(&recovered, &runs)?;
    println!("appending");
    append_while(log.as_mut(), run, runs.last() + 1, &mut |index, _| {
        println!("acked {index}");
        Ok(true)
    })
}

/// Appends until `go_on` says no; it is told the last index that is durable.
fn append_while(
    log: &mut dyn LogStore,
    run: u64,
    first: u64,
    go_on: &mut dyn FnMut(u64, &dyn LogStore) -> Result<bool>,
) -> Result<()> {
    let mut random = Random(run);
    let mut pending: VecDeque<(Ticket, u64)> = VecDeque::new();
    let mut index = first;
    let mut moved = Instant::now();
    loop {
        let burst = random.below(12);
        for _ in 0..burst {
            if pending.len() >= WINDOW {
                break;
            }
            if index.is_multiple_of(STATE_EVERY) {
                retry(log, Record::State(&index.to_le_bytes()))?;
            }
            let bytes = content(run, index);
            let (left, right) = bytes.split_at(bytes.len() / 2);
            pending.push_back((retry(log, Record::Entry { index, view: run, parts: [left, right] })?, index));
            index += 1;
        }
        log.flush();
        log.poll();
        if let Some(error) = log.failed() {
            return Err(error.into());
        }
        let durable = log.durable();
        let count = pending.iter().take_while(|(ticket, _)| *ticket <= durable).count();
        if let Some((_, last)) = pending.drain(..count).next_back() {
            moved = Instant::now();
            if !go_on(last, log)? {
                return Ok(());
            }
            log.truncate_prefix(last.saturating_sub(KEPT));
        }
        ensure!(pending.is_empty() || moved.elapsed() < LIMIT, "nothing becomes durable");
    }
}

/// Appends; waits for room if there is none now.
fn retry(log: &mut dyn LogStore, record: Record<'_>) -> Result<Ticket> {
    let start = Instant::now();
    loop {
        match log.append(record) {
            Err(error) if error.is_full() && start.elapsed() < LIMIT => {
                log.flush();
                log.poll();
            }
            other => return Ok(other?),
        }
    }
}

/// Looks at the log, opens it, and closes it. `alone`: the devices are not all copies.
pub fn check(devices: &str, alone: bool, words: &[&str]) -> Result<()> {
    let runs = Runs::parse(words)?;
    let compare = |mut found: Recovered| {
        if alone { verify_alone(&mut found, &runs) } else { verify(&found, &runs) }
    };
    let mut records = 0;
    let inspected = storage_log::inspect(&legs(devices), &mut |_| records += 1)?;
    println!("{records} records, blocks that copies lack: {:?}", inspected.missing_blocks);
    compare(inspected.recovered)?;
    // In the same process: a group that is started anew opens its log again.
    for _ in 0..2 {
        let (log, recovered) = open(devices)?;
        drop(log);
        compare(recovered)?;
    }
    Ok(())
}

/// One of two devices fails a write: the log goes on, and fills the copy again while it runs.
pub fn mirror(devices: &str) -> Result<()> {
    let (mut log, _) = open(devices)?;
    let (mut failed, mut complete) = (None, None);
    let start = Instant::now();
    append_while(log.as_mut(), 1, 1, &mut |index, log| {
        let legs = log.status().legs;
        if failed.is_none() && legs.iter().any(|leg| matches!(leg.state, LegState::Failed(_))) {
            println!("a copy failed before {index} was durable");
            failed = Some(index);
        }
        let whole = legs.iter().all(|leg| matches!(leg.state, LegState::Complete));
        if failed.is_some() && complete.is_none() && whole {
            println!("it was complete again before {index} was durable, after {:?}", start.elapsed());
            complete = Some(index);
        }
        ensure!(start.elapsed() < LIMIT, "failed {failed:?}, complete {complete:?} at {index}: {legs:?}");
        // Some more, so that both copies have something new.
        let more = complete.is_none_or(|complete| index < complete + 200);
        if !more {
            println!("acked {index}");
        }
        Ok(more)
    })
}

/// Starts this program again, because SPDK's environment starts once in a process.
fn again(words: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(words).stdin(Stdio::null());
    Ok(command)
}

/// Kills `append` at some moment, again and again; each one first checks what the ones before it had acknowledged.
pub fn kill_rounds(devices: &str, rounds: u64) -> Result<()> {
    let mut random = Random(rounds);
    let mut words: Vec<String> = Vec::new();
    let mut last = 0;
    for run in 1..=rounds {
        let mut arguments = vec!["append".to_owned(), devices.to_owned(), run.to_string()];
        arguments.extend(words.iter().cloned());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let end = killed_append(&arguments, last, random.below(120))?;
        println!("round {run}: killed after {end} was acknowledged");
        if end > last {
            words.push(format!("{run}:{}:{end}", last + 1));
        }
        last = end;
    }
    let mut arguments = vec!["check", devices];
    arguments.extend(words.iter().map(String::as_str));
    let status = again(&arguments)?.status()?;
    ensure!(status.success(), "after all rounds: {status}");
    Ok(())
}

/// Returns the last index that was acknowledged before the kill.
fn killed_append(arguments: &[&str], before: u64, acknowledgements: u64) -> Result<u64> {
    let mut child = again(arguments)?.stdout(Stdio::piped()).spawn()?;
    let lines = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
    let (mut last, mut seen, mut killed) = (before, 0, false);
    for line in lines.map_while(Result::ok) {
        if let Some(number) = line.strip_prefix("acked ") {
            last = number.parse()?;
            seen += 1;
        } else {
            ensure!(!line.starts_with("PLOVER"), "{arguments:?}: {line}");
        }
        if !killed && seen >= acknowledgements && (seen > 0 || line == "appending") {
            child.kill()?;
            killed = true;
        }
    }
    let status = child.wait()?;
    ensure!(killed, "{arguments:?} ended by itself: {status}");
    Ok(last)
}
