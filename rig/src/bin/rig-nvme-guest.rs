//! What runs inside the guest of `rig/tests/nvme.rs`: SPDK's device under the storage log, on emulated NVMe controllers.
//!
//! `append` writes numbered blocks and says which are durable until somebody kills it, `check` reads them back, and
//! `kill-rounds` does both again and again; `selftest` tries everything else, faults included.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use storage_log::spdk::{Device, DeviceOptions, DmaBuffer, Environment, EnvironmentOptions, SpdkError, Tag};

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;
/// Groups in flight in `append`; each has one MiB of the staging buffer, which the device takes in several transfers.
const GROUPS: usize = 8;
/// Nothing in here takes longer.
const LIMIT: Duration = Duration::from_secs(60);

/// Counts allocations, to see that a commit makes none.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as for this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as for this function.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    let log = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::WARN);
    log.with_writer(std::io::stderr).with_ansi(false).without_time().init();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["append", address, run, first, ref runs @ ..] => {
            numbers([run, first]).and_then(|[run, first]| append(address, run, first, runs))
        }
        ["check", address, ref runs @ ..] => open(address, runs).map(drop),
        ["kill-rounds", address, rounds] => numbers([rounds]).and_then(|[rounds]| kill_rounds(address, rounds)),
        ["selftest", good, bad, slow] => selftest(good, bad, slow),
        _ => Err(anyhow::anyhow!("unknown arguments {words:?}")),
    };
    match outcome {
        Ok(()) => {
            println!("PLOVER-NVME-OK {}", words[0]);
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("PLOVER-NVME-FAILED {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn numbers<const N: usize>(words: [&str; N]) -> Result<[u64; N]> {
    let mut parsed = [0; N];
    for (number, word) in parsed.iter_mut().zip(words) {
        *number = word.parse().with_context(|| format!("«{word}» is no number"))?;
    }
    Ok(parsed)
}

fn environment() -> Result<Environment> {
    Ok(Environment::start(&EnvironmentOptions::default())?)
}

/// A small generator: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// A block's content follows from its number and the run that wrote it.
fn fill(block: &mut [u8], run: u64, number: u64) {
    let mut random = Random(run << 40 | number);
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
}

/// A group of blocks on its way.
struct Group {
    /// Number behind its last block.
    end: u64,
    tag: Tag,
    flushing: bool,
    durable: bool,
}

/// Opens the device and compares it with what earlier runs wrote: words RUN:FROM:TO.
fn open(address: &str, runs: &[&str]) -> Result<Device> {
    let mut device = Device::open(environment()?, &DeviceOptions::new(address))?;
    for run in runs {
        let parts: Vec<&str> = run.split(':').collect();
        let parts: [&str; 3] = parts.try_into().ok().with_context(|| format!("«{run}» is not RUN:FROM:TO"))?;
        let [run, from, to] = numbers(parts)?;
        check(&mut device, run, from..to)?;
        println!("checked run {run}, blocks {from} to {to}");
    }
    Ok(device)
}

/// After the check of `runs`: writes groups of blocks from number `first` on, flushes each when it is written, and says so in order: «acked N» means
/// that all below N are durable. Ends when it is killed or the device is full.
fn append(address: &str, run: u64, first: u64, runs: &[&str]) -> Result<()> {
    let mut device = open(address, runs)?;
    let blocks = device.capacity_bytes() / BLOCK as u64;
    let mut random = Random(run);
    let mut groups: VecDeque<Group> = VecDeque::new();
    let mut next = first;
    let mut place = 0;
    println!("appending from {first}");
    loop {
        while groups.len() < GROUPS && next < blocks {
            // Mostly small, sometimes longer than one transfer.
            let most = if random.below(8) == 0 { MIB / BLOCK } else { 4 };
            let length = (1 + random.below(most as u64)).min(blocks - next);
            let start = place * MIB;
            let range = start..start + length as usize * BLOCK;
            for (block, number) in device.staging_mut()[range.clone()].chunks_exact_mut(BLOCK).zip(next..) {
                fill(block, run, number);
            }
            let tag = device.submit_write(next * BLOCK as u64, range)?;
            next += length;
            place = (place + 1) % GROUPS;
            groups.push_back(Group { end: next, tag, flushing: false, durable: false });
        }
        if groups.is_empty() {
            return Ok(());
        }
        advance(&mut device, &mut groups)?;
        while groups.front().is_some_and(|group| group.durable) {
            let group = groups.pop_front().context("there is one")?;
            println!("acked {}", group.end);
        }
    }
}

/// Flushes what was written and marks what was flushed.
fn advance(device: &mut Device, groups: &mut VecDeque<Group>) -> Result<()> {
    let mut failed = None;
    let mut written = [None; GROUPS];
    let mut count = 0;
    device.poll(&mut |tag, outcome| {
        failed = failed.take().or(outcome.err());
        let Some(index) = groups.iter().position(|group| group.tag == tag) else { return };
        if groups[index].flushing {
            groups[index].durable = true;
        } else {
            written[count] = Some(index);
            count += 1;
        }
    });
    if let Some(error) = failed {
        return Err(error.into());
    }
    for index in written.into_iter().flatten() {
        groups[index].tag = device.submit_flush()?;
        groups[index].flushing = true;
    }
    Ok(())
}

/// Compares the blocks of a range with what `run` wrote there.
fn check(device: &mut Device, run: u64, range: Range<u64>) -> Result<()> {
    const PIECE: u64 = 256;
    let mut found = vec![0; PIECE as usize * BLOCK];
    let mut expected = vec![0; BLOCK];
    let mut at = range.start;
    while at < range.end {
        let end = (at + PIECE).min(range.end);
        let bytes = &mut found[..(end - at) as usize * BLOCK];
        device.read_at(at * BLOCK as u64, bytes)?;
        for (block, number) in bytes.chunks_exact(BLOCK).zip(at..) {
            fill(&mut expected, run, number);
            ensure!(block == expected, "block {number} of run {run} was acknowledged and is lost");
        }
        at = end;
    }
    Ok(())
}

/// Starts this program again with other arguments, because SPDK's environment starts once in a process.
fn again(words: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(words).stdin(Stdio::null());
    Ok(command)
}

/// Kills `append` at some moment, in each round a new one that goes on where the last one is known to be durable; checks the
/// round's blocks after each round and all at the end.
fn kill_rounds(address: &str, rounds: u64) -> Result<()> {
    let mut random = Random(rounds);
    let mut checked: Vec<String> = Vec::new();
    let mut first = 0;
    for run in 1..=rounds {
        let acknowledgements = random.below(200);
        let end = killed_append(address, run, first, acknowledgements)?;
        let range = format!("{run}:{first}:{end}");
        let status = again(&["check", address, &range])?.stdout(Stdio::null()).status()?;
        ensure!(status.success(), "round {run} ({range}): {status}");
        println!("round {run}: killed after block {end}");
        checked.push(range);
        first = end;
    }
    let mut words = vec!["check", address];
    words.extend(checked.iter().map(String::as_str));
    let status = again(&words)?.status()?;
    ensure!(status.success(), "all rounds: {status}");
    Ok(())
}

/// Returns the number behind the last block that was acknowledged before the kill.
fn killed_append(address: &str, run: u64, first: u64, acknowledgements: u64) -> Result<u64> {
    let mut command = again(&["append", address, &run.to_string(), &first.to_string()])?;
    let mut child = command.stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
    let mut end = first;
    let mut seen = 0;
    for line in lines.by_ref() {
        let line = line?;
        if let Some(number) = line.strip_prefix("acked ") {
            end = number.parse()?;
            seen += 1;
        } else {
            ensure!(!line.starts_with("PLOVER"), "round {run}: {line}");
        }
        if seen >= acknowledgements && line.starts_with('a') {
            break;
        }
    }
    child.kill()?;
    // What it still said before it died counts.
    for line in lines.map_while(Result::ok) {
        if let Some(number) = line.strip_prefix("acked ").and_then(|number| number.parse().ok()) {
            end = number;
        }
    }
    child.wait()?;
    Ok(end)
}

/// Polls until nothing more is expected, and returns each command's outcome.
fn collect(device: &mut Device, count: usize) -> Result<BTreeMap<Tag, Result<(), SpdkError>>> {
    let start = Instant::now();
    let mut outcomes = BTreeMap::new();
    let mut twice = None;
    while outcomes.len() < count {
        ensure!(start.elapsed() < LIMIT, "{} of {count} commands ended", outcomes.len());
        device.poll(&mut |tag, outcome| {
            if outcomes.insert(tag, outcome).is_some() {
                twice = Some(tag);
            }
        });
    }
    ensure!(twice.is_none(), "{twice:?} ended twice");
    Ok(outcomes)
}

fn options(address: &str) -> DeviceOptions {
    DeviceOptions { queue_depth: 16, ..DeviceOptions::new(address) }
}

fn selftest(good: &str, bad: &str, slow: &str) -> Result<()> {
    let environment = environment()?;
    println!("{} started", Environment::version());
    let again = Environment::start(&EnvironmentOptions::default());
    ensure!(matches!(again, Err(SpdkError::StartedBefore)), "a second start: {again:?}");
    let part = |name: &str, outcome: Result<()>| {
        println!("part {name}: {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        outcome.with_context(|| name.to_owned())
    };
    part("refusals", refusals(environment, good))?;
    let mut device = Device::open(environment, &options(good))?;
    println!("{:?}, {} bytes", device.geometry(), device.capacity_bytes());
    ensure!(device.geometry().has_write_cache, "the emulated device has a write cache");
    part("what was written is read", round_trips(&mut device))?;
    part("a full queue", full_queue(&mut device))?;
    part("no allocation", no_allocation(&mut device))?;
    part("a reset under load", reset_under_load(&mut device))?;
    drop(device);
    let mut device = Device::open(environment, &options(good))?;
    part("the next owner reads it", check(&mut device, 77, 0..16))?;
    drop(device);
    part("device errors", device_errors(environment, bad))?;
    part("a device that hangs", hanging(environment, slow))
}

fn refusals(environment: Environment, good: &str) -> Result<()> {
    let nobody = Device::open(environment, &options("0000:00:1e.7"));
    ensure!(matches!(nobody, Err(SpdkError::Attach { .. })), "no such controller: {nobody:?}");
    let nonsense = Device::open(environment, &options("here"));
    ensure!(matches!(nonsense, Err(SpdkError::Attach { .. })), "no address: {nonsense:?}");
    let missing = Device::open(environment, &DeviceOptions { namespace: 9, ..options(good) });
    ensure!(matches!(missing, Err(SpdkError::NoNamespace { namespace: 9, .. })), "no namespace 9: {missing:?}");
    let shallow = Device::open(environment, &DeviceOptions { queue_depth: 1, ..options(good) });
    ensure!(matches!(shallow, Err(SpdkError::BadOption { name: "queue_depth", .. })), "depth 1: {shallow:?}");
    let huge = Device::open(environment, &DeviceOptions { staging_bytes: 1 << 40, ..options(good) });
    ensure!(matches!(huge, Err(SpdkError::NoMemory { .. })), "a TiB of staging: {huge:?}");
    Ok(())
}

/// Blocking writes and reads of random places, against a copy in memory.
fn round_trips(device: &mut Device) -> Result<()> {
    let mut random = Random(1);
    let mut model = vec![0; 4 * MIB];
    device.write_at(0, &model)?;
    for _ in 0..40 {
        let blocks = model.len() / BLOCK;
        let start = random.below(blocks as u64) as usize;
        let length = (1 + random.below(120) as usize).min(blocks - start);
        let range = start * BLOCK..(start + length) * BLOCK;
        model[range.clone()].fill_with(|| random.next() as u8);
        device.write_at(range.start as u64, &model[range])?;
    }
    device.flush()?;
    for _ in 0..60 {
        let start = random.below(model.len() as u64) as usize;
        let length = (1 + random.below(400_000) as usize).min(model.len() - start);
        let mut found = vec![0; length];
        device.read_at(start as u64, &mut found)?;
        ensure!(found == model[start..start + length], "{length} bytes at {start}");
    }
    let end = device.capacity_bytes();
    device.write_at(end - BLOCK as u64, &model[..BLOCK])?;
    let mut last = vec![0; BLOCK];
    device.read_at(end - BLOCK as u64, &mut last)?;
    ensure!(last == model[..BLOCK], "the last block");
    Ok(())
}

/// Fills the staging buffer with a run's blocks and submits one write for each.
fn submit_blocks(device: &mut Device, run: u64, count: usize) -> Result<Vec<Tag>> {
    for (block, number) in device.staging_mut()[..count * BLOCK].chunks_exact_mut(BLOCK).zip(0..) {
        fill(block, run, number);
    }
    let submit =
        |number: usize| Ok(device.submit_write((number * BLOCK) as u64, number * BLOCK..(number + 1) * BLOCK)?);
    (0..count).map(submit).collect()
}

fn full_queue(device: &mut Device) -> Result<()> {
    let tags = submit_blocks(device, 5, 16)?;
    for refused in [device.submit_write(0, 0..BLOCK), device.submit_flush()] {
        ensure!(matches!(refused, Err(SpdkError::Busy { .. })), "the queue is full: {refused:?}");
    }
    let outcomes = collect(device, 16)?;
    ensure!(outcomes.keys().eq(tags.iter()) && outcomes.values().all(Result::is_ok), "{outcomes:?}");
    check(device, 5, 0..16)?;
    // One command of many transfers, and then as many as the queue takes.
    let length = device.staging().len();
    device.staging_mut().fill_with({
        let mut random = Random(6);
        move || random.next() as u8
    });
    device.submit_write(0, 0..length)?;
    ensure!(collect(device, 1)?.into_values().all(|outcome| outcome.is_ok()), "8 MiB at once");
    let mut found = vec![0; length];
    device.read_at(0, &mut found)?;
    ensure!(found == device.staging(), "8 MiB at once");
    let mut accepted = 0;
    let refusal = loop {
        match device.submit_write(0, 0..length) {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
    };
    ensure!(matches!(refusal, SpdkError::Busy { .. }) && accepted > 0, "{accepted} accepted, then {refusal}");
    let outcomes = collect(device, accepted)?;
    ensure!(outcomes.values().all(Result::is_ok), "{outcomes:?}");
    Ok(())
}

/// A write and a flush, a thousand times, without an allocation.
fn no_allocation(device: &mut Device) -> Result<()> {
    let commit = |device: &mut Device| -> Result<(), SpdkError> {
        for flush in [false, true] {
            let tag = if flush { device.submit_flush()? } else { device.submit_write(0, 0..BLOCK)? };
            let ended = Cell::new(false);
            while !ended.get() {
                let mut problem = None;
                device.poll(&mut |other, outcome| {
                    ended.set(other == tag);
                    problem = outcome.err();
                });
                if let Some(problem) = problem {
                    return Err(problem);
                }
            }
        }
        Ok(())
    };
    commit(device)?;
    let (before, start) = (ALLOCATIONS.load(Ordering::Relaxed), Instant::now());
    for _ in 0..1000 {
        commit(device)?;
    }
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    println!("1000 commits of a block in {:?}", start.elapsed());
    ensure!(allocations == 0, "{allocations} allocations in 1000 commits");
    Ok(())
}

fn reset_under_load(device: &mut Device) -> Result<()> {
    for round in 0..3 {
        let tags = submit_blocks(device, 70 + round, 16)?;
        let mut told = BTreeMap::new();
        device.reset(&mut |tag, outcome| drop(told.insert(tag, outcome)))?;
        ensure!(told.keys().eq(tags.iter()), "each command is answered once: {told:?}");
        let fine = |outcome: &Result<(), SpdkError>| matches!(outcome, Ok(()) | Err(SpdkError::Gone { .. }));
        ensure!(told.values().all(fine), "{told:?}");
    }
    device.maintain()?;
    submit_blocks(device, 77, 16)?;
    ensure!(collect(device, 16)?.into_values().all(|outcome| outcome.is_ok()), "it works after a reset");
    device.flush()?;
    check(device, 77, 0..16)
}

/// The backend fails every write that touches sector 4096 (2 MiB) and every flush.
fn device_errors(environment: Environment, bad: &str) -> Result<()> {
    let mut device = Device::open(environment, &options(bad))?;
    let place = 2 * MIB as u64;
    let tags = [device.submit_write(0, 0..BLOCK)?, device.submit_write(place, 0..BLOCK)?];
    let outcomes = collect(&mut device, 2)?;
    ensure!(outcomes[&tags[0]].is_ok(), "{outcomes:?}");
    let failed = &outcomes[&tags[1]];
    ensure!(matches!(failed, Err(SpdkError::Device { offset_bytes, .. }) if *offset_bytes == place), "{failed:?}");
    ensure!(device.failure().is_none(), "the device itself still works");
    let read = device.read_at(place, &mut [0; BLOCK]);
    ensure!(read.is_ok(), "{read:?}");
    let failed = device.flush().err().context("a flush that failed is taken for one that did not")?;
    ensure!(matches!(failed, SpdkError::Device { action: "a flush", .. }), "{failed}");
    println!("{failed}");
    Ok(())
}

/// The backend takes minutes for what is written here.
fn hanging(environment: Environment, slow: &str) -> Result<()> {
    let command_timeout = Duration::from_millis(500);
    let mut device = Device::open(environment, &DeviceOptions { command_timeout, ..options(slow) })?;
    let start = Instant::now();
    let tags = submit_blocks(&mut device, 9, 4)?;
    let outcomes = collect(&mut device, tags.len())?;
    let took = start.elapsed();
    let timed_out = |outcome: &Result<(), SpdkError>| matches!(outcome, Err(SpdkError::Timeout { .. }));
    ensure!(outcomes.values().any(timed_out), "{outcomes:?}");
    ensure!(took >= command_timeout && took < command_timeout * 20, "{took:?}");
    for refused in [device.submit_flush().err(), device.maintain().err(), device.read_at(0, &mut [0; 8]).err()] {
        ensure!(matches!(refused, Some(SpdkError::Timeout { .. })), "a failed device takes nothing: {refused:?}");
    }
    let mut late = 0;
    device.reset(&mut |_, _| late += 1)?;
    ensure!(late == 0, "{late} commands were answered twice");
    let read = device.read_at(0, &mut [0; BLOCK]);
    if let Err(error) = read {
        bail!("it works after a reset: {error}");
    }
    Ok(())
}
