//! The device by itself: everything that it promises, faults included.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use storage_log::spdk::{Device, DeviceOptions, DmaBuffer, Environment, EnvironmentOptions, SpdkError, Tag};

use crate::{ALLOCATIONS, BLOCK, LIMIT, MIB, Random};

const STAGING_BYTES: usize = 8 * MIB;

/// A block's content follows from its number and the run that wrote it.
fn fill(block: &mut [u8], run: u64, number: u64) {
    let mut random = Random(run << 40 | number);
    for word in block.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
}

/// A device with its staging buffer.
struct Bench {
    device: Device,
    staging: DmaBuffer,
}

impl Bench {
    fn open(environment: Environment, options: &DeviceOptions) -> Result<Self, SpdkError> {
        let staging = DmaBuffer::new(environment, STAGING_BYTES, "the test")?;
        Ok(Self { device: Device::open(environment, options, &staging)?, staging })
    }

    /// Fills the staging buffer with a run's blocks and submits one write for each, from the device's beginning on.
    fn submit_blocks(&mut self, run: u64, count: usize) -> Result<Vec<Tag>> {
        for (block, number) in self.staging[..count * BLOCK].chunks_exact_mut(BLOCK).zip(0..) {
            fill(block, run, number);
        }
        let range = |number: usize| number * BLOCK..(number + 1) * BLOCK;
        let submit = |number| Ok(self.device.submit_write((number * BLOCK) as u64, range(number))?);
        (0..count).map(submit).collect()
    }

    /// Compares the device's first blocks with what `run` wrote there.
    fn check(&mut self, run: u64, count: usize) -> Result<()> {
        let mut found = vec![0; count * BLOCK];
        let mut expected = vec![0; BLOCK];
        self.device.read_at(0, &mut found)?;
        for (block, number) in found.chunks_exact(BLOCK).zip(0..) {
            fill(&mut expected, run, number);
            ensure!(block == expected, "block {number} is not that of run {run}");
        }
        Ok(())
    }
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

pub fn selftest(good: &str, bad: &str, slow: &str) -> Result<()> {
    let environment = Environment::start(&EnvironmentOptions::default())?;
    println!("{} started", Environment::version());
    let again = Environment::start(&EnvironmentOptions::default());
    ensure!(matches!(again, Err(SpdkError::StartedBefore)), "a second start: {again:?}");
    ensure!(Environment::running().is_ok(), "it runs");
    let part = |name: &str, outcome: Result<()>| {
        println!("part {name}: {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        outcome.with_context(|| name.to_owned())
    };
    part("refusals", refusals(environment, good))?;
    let mut bench = Bench::open(environment, &options(good))?;
    let device = &mut bench.device;
    println!("{:?}, {} bytes", device.geometry(), device.capacity_bytes());
    ensure!(device.geometry().has_write_cache, "the emulated device has a write cache");
    part("what was written is read", round_trips(device))?;
    part("no allocation", no_allocation(device))?;
    part("a full queue", full_queue(&mut bench))?;
    part("waiting amid others", waiting_amid_others(&mut bench))?;
    part("a reset under load", reset_under_load(&mut bench))?;
    drop(bench);
    let mut bench = Bench::open(environment, &options(good))?;
    part("the next owner reads it", bench.check(77, 16))?;
    drop(bench);
    part("device errors", device_errors(environment, bad))?;
    part("a device that hangs", hanging(environment, slow))
}

fn refusals(environment: Environment, good: &str) -> Result<()> {
    let refused = |options: &DeviceOptions| Bench::open(environment, options).err();
    let nobody = refused(&options("0000:00:1e.7"));
    ensure!(matches!(nobody, Some(SpdkError::Attach { .. })), "no such controller: {nobody:?}");
    let nonsense = refused(&options("here"));
    ensure!(matches!(nonsense, Some(SpdkError::Attach { .. })), "no address: {nonsense:?}");
    let missing = refused(&DeviceOptions { namespace: 9, ..options(good) });
    ensure!(matches!(missing, Some(SpdkError::NoNamespace { namespace: 9, .. })), "no namespace 9: {missing:?}");
    let shallow = refused(&DeviceOptions { queue_depth: 1, ..options(good) });
    ensure!(matches!(shallow, Some(SpdkError::BadOption { name: "queue_depth", .. })), "depth 1: {shallow:?}");
    let huge = DmaBuffer::new(environment, 1 << 40, "a test").err();
    ensure!(matches!(huge, Some(SpdkError::NoMemory { .. })), "a TiB of memory: {huge:?}");
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

fn full_queue(bench: &mut Bench) -> Result<()> {
    let tags = bench.submit_blocks(5, 16)?;
    let Bench { device, staging } = &mut *bench;
    for refused in [device.submit_write(0, 0..BLOCK), device.submit_flush()] {
        ensure!(matches!(refused, Err(SpdkError::Busy { .. })), "the queue is full: {refused:?}");
    }
    let outcomes = collect(device, 16)?;
    ensure!(outcomes.keys().eq(tags.iter()) && outcomes.values().all(Result::is_ok), "{outcomes:?}");
    // One command of many transfers, and then as many as the queue takes.
    let mut random = Random(6);
    staging.fill_with(|| random.next() as u8);
    device.submit_write(MIB as u64, 0..STAGING_BYTES)?;
    ensure!(collect(device, 1)?.into_values().all(|outcome| outcome.is_ok()), "8 MiB at once");
    let mut found = vec![0; STAGING_BYTES];
    device.read_at(MIB as u64, &mut found)?;
    ensure!(found == staging[..], "8 MiB at once");
    let mut accepted = 0;
    let refusal = loop {
        match device.submit_write(MIB as u64, 0..STAGING_BYTES) {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
    };
    ensure!(matches!(refusal, SpdkError::Busy { .. }) && accepted > 0, "{accepted} accepted, then {refusal}");
    let outcomes = collect(device, accepted)?;
    ensure!(outcomes.values().all(Result::is_ok), "{outcomes:?}");
    bench.check(5, 16)
}

/// Blocking calls while other commands are in flight: each is told once, by the poll.
fn waiting_amid_others(bench: &mut Bench) -> Result<()> {
    for round in 0..20 {
        let tags = bench.submit_blocks(100 + round, 12)?;
        let place = 40 * MIB as u64;
        bench.device.write_at(place, &[round as u8; 2 * BLOCK])?;
        let mut found = [0; 2 * BLOCK];
        bench.device.read_at(place, &mut found)?;
        ensure!(found == [round as u8; 2 * BLOCK], "what was written amid others is read");
        let outcomes = collect(&mut bench.device, 12)?;
        ensure!(outcomes.keys().eq(tags.iter()) && outcomes.values().all(Result::is_ok), "{outcomes:?}");
        bench.check(100 + round, 12)?;
    }
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

fn reset_under_load(bench: &mut Bench) -> Result<()> {
    for round in 0..3 {
        let tags = bench.submit_blocks(70 + round, 16)?;
        let mut told = BTreeMap::new();
        bench.device.reset(&mut |tag, outcome| drop(told.insert(tag, outcome)))?;
        ensure!(told.keys().eq(tags.iter()), "each command is answered once: {told:?}");
        let fine = |outcome: &Result<(), SpdkError>| matches!(outcome, Ok(()) | Err(SpdkError::Gone { .. }));
        ensure!(told.values().all(fine), "{told:?}");
    }
    bench.device.maintain()?;
    bench.submit_blocks(77, 16)?;
    ensure!(collect(&mut bench.device, 16)?.into_values().all(|outcome| outcome.is_ok()), "it works after a reset");
    bench.device.flush()?;
    bench.check(77, 16)
}

/// The backend fails every write that touches sector 4096 (2 MiB) and every flush.
fn device_errors(environment: Environment, bad: &str) -> Result<()> {
    let Bench { mut device, staging: _staging } = Bench::open(environment, &options(bad))?;
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
    let mut bench = Bench::open(environment, &DeviceOptions { command_timeout, ..options(slow) })?;
    let start = Instant::now();
    let tags = bench.submit_blocks(9, 4)?;
    let device = &mut bench.device;
    let outcomes = collect(device, tags.len())?;
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
