//! The storage log's SPDK device, in a guest with emulated NVMe controllers (rig/src/nvme_guest.rs).
//!
//! On a machine without SPDK each test says loudly that it was skipped, and passes.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use rig::nvme_guest::{self, SKIPPED, controller_address, spdk_version};
use rig::{Deadline, Host, Testbed};

/// Under TCG on a busy machine.
const LIMIT_SECS: u64 = 300;
const MIB: u64 = 1 << 20;

/// Whether the tests can run here.
fn has_spdk() -> bool {
    match spdk_version() {
        Some(version) => {
            println!("SPDK's NVMe library {version}");
            true
        }
        None => {
            // Not by println, which a passing test does not show; without a terminal nobody reads it.
            drop(writeln!(std::io::stderr(), "\n{SKIPPED}\n"));
            false
        }
    }
}

fn sparse_file(path: &Path, bytes: u64) {
    File::create(path).unwrap().set_len(bytes).unwrap();
}

/// A disk of its own for a test; «unsafe»: flushes of the emulated device do not reach this machine's disk.
fn raw_disk(host: &Host, name: &str, bytes: u64) -> String {
    let path = host.directory().join(name);
    sparse_file(&path, bytes);
    raw_disk_at(&path)
}

fn raw_disk_at(path: &Path) -> String {
    format!("file={},format=raw,cache=unsafe", path.display())
}

/// Boots, waits and expects success.
fn run(host: &Host, name: &str, backends: &[String], words: &[&str]) -> String {
    let guest = nvme_guest::boot(host, name, backends, words).unwrap();
    let outcome = guest.wait(Deadline::after_secs(LIMIT_SECS)).unwrap();
    assert_eq!(outcome.status, Some(0), "{name} ended with this on its console:\n{}", outcome.console);
    outcome.console
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn the_device_does_what_it_says_and_survives_faults() {
    if !has_spdk() {
        return;
    }
    let bed = Testbed::new().unwrap();
    let host = bed.host(0);
    let bad = host.directory().join("bad.img");
    sparse_file(&bad, 16 * MIB);
    // Writes fail at one place, flushes always.
    let bad = format!(
        "driver=raw,cache=writeback,file.driver=blkdebug,file.image.driver=file,file.image.filename={},\
         file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.sector=4096,\
         file.inject-error.1.event=none,file.inject-error.1.iotype=flush",
        bad.display()
    );
    // A write of a block takes four seconds.
    let slow = raw_disk(host, "slow.img", 16 * MIB) + ",throttling.bps-write=1024";
    let disks = [raw_disk(host, "good.img", 64 * MIB), bad, slow];
    let addresses = [0, 1, 2].map(controller_address);
    let console = run(host, "selftest", &disks, &["selftest", &addresses[0], &addresses[1], &addresses[2]]);
    println!("{console}");
    assert!(console.contains("PLOVER-NVME-OK selftest"), "{console}");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_killed_process_loses_nothing_that_it_acknowledged() {
    const ROUNDS: usize = 12;
    if !has_spdk() {
        return;
    }
    let bed = Testbed::new().unwrap();
    let host = bed.host(0);
    let disks = [raw_disk(host, "disk.img", 64 * MIB)];
    let console = run(host, "kills", &disks, &["kill-rounds", &controller_address(0), &ROUNDS.to_string()]);
    println!("{console}");
    assert_eq!(console.lines().filter(|line| line.starts_with("round ")).count(), ROUNDS, "{console}");
}

/// Every write and flush is also logged, so that what a cache may have lost can be taken away.
#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_power_cut_loses_nothing_that_was_acknowledged() {
    if !has_spdk() {
        return;
    }
    let bed = Testbed::new().unwrap();
    let host = bed.host(0);
    let (disk, log) = (host.directory().join("disk.img"), host.directory().join("writes.log"));
    sparse_file(&disk, 64 * MIB);
    let address = controller_address(0);
    let mut runs: Vec<String> = Vec::new();
    let mut last = 0;
    for (run, acknowledgements) in (1..).zip([60, 1, 200]) {
        let before = std::fs::read(&disk).unwrap();
        sparse_file(&log, 0);
        let backend = format!(
            "driver=blklogwrites,cache=writeback,file.driver=file,file.filename={},log.driver=file,log.filename={}",
            disk.display(),
            log.display()
        );
        let number = run.to_string();
        let mut arguments = vec!["append", &address, &number];
        arguments.extend(runs.iter().map(String::as_str));
        let guest = nvme_guest::boot(host, &format!("cut{run}"), &[backend], &arguments).unwrap();
        let enough = || (acknowledged(&guest.console()).len() >= acknowledgements).then_some(());
        guest.wait_for("acknowledgements", Deadline::after_secs(LIMIT_SECS), enough).unwrap();
        guest.cut_power().unwrap();
        let end = *acknowledged(&guest.console()).last().unwrap();
        println!("cut {run}: {} to {end} were acknowledged; {}", last + 1, lose_unflushed(&disk, before, &log));
        runs.push(format!("{run}:{}:{end}", last + 1));
        last = end;
    }
    let disks = [raw_disk_at(&disk)];
    let mut arguments = vec!["check", &address];
    arguments.extend(runs.iter().map(String::as_str));
    println!("{}", run(host, "check", &disks, &arguments));
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_mirror_goes_on_without_a_device_and_fills_it_again() {
    if !has_spdk() {
        return;
    }
    let bed = Testbed::new().unwrap();
    let host = bed.host(0);
    let good = raw_disk(host, "good.img", 64 * MIB);
    let path = host.directory().join("once.img");
    sparse_file(&path, 64 * MIB);
    // One write fails after so many flushes: the first two are those of the layout.
    const FLUSHES: usize = 25;
    let mut once = format!(
        "driver=raw,cache=writeback,file.driver=blkdebug,file.image.driver=file,file.image.filename={},\
         file.inject-error.0.event=pwritev,file.inject-error.0.iotype=write,file.inject-error.0.once=on,\
         file.inject-error.0.state={}",
        path.display(),
        FLUSHES + 1
    );
    for flush in 0..FLUSHES {
        let (from, to) = (flush + 1, flush + 2);
        let rule = format!("file.set-state.{flush}");
        once += &format!(",{rule}.event=flush_to_disk,{rule}.state={from},{rule}.new_state={to}");
    }
    let disks = [good, once];
    let both = [0, 1].map(controller_address).join("+");
    let console = run(host, "mirror", &disks, &["mirror", &both]);
    println!("{console}");
    assert!(console.contains("a copy failed") && console.contains("complete again"), "{console}");
    let runs = format!("1:1:{}", acknowledged(&console).last().unwrap());
    let disks = [raw_disk_at(&host.directory().join("good.img")), raw_disk_at(&path)];
    run(host, "both", &disks, &["check", &both, &runs]);
    run(host, "filled", &disks, &["check-alone", &controller_address(1), &runs]);
}

/// The numbers of all «acked N» lines; a last line without its end is not one.
fn acknowledged(console: &str) -> Vec<u64> {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(|line| line.strip_prefix("acked ")?.parse().ok()).collect()
}

/// Makes the disk again as it was before, with the writes of the log up to the last flush and none behind it: what a
/// volatile cache guarantees. The log's format is that of Linux's dm-log-writes.
fn lose_unflushed(disk: &Path, mut disk_bytes: Vec<u8>, log: &Path) -> String {
    const SECTOR: usize = 512;
    const FLUSH: u64 = 1;
    let log = std::fs::read(log).unwrap();
    let word = |at: usize| log.get(at..at + 8).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
    // It gets its header with the first flush.
    let header = (word(0), word(8));
    assert!([(0x6a_7366_7773_6872, 1), (0, 0)].contains(&header), "magic and version of the log: {header:x?}");
    let mut cached = Vec::new();
    let mut at = SECTOR;
    let (mut writes, mut flushes) = (0, 0);
    loop {
        let [sector, sectors, flags] = [0, 8, 16].map(|field| word(at + field));
        let (to, length) = (sector as usize * SECTOR, sectors as usize * SECTOR);
        at += SECTOR;
        // Zeros behind the last entry; its data may be cut off.
        let Some(data) = log.get(at..at + length).filter(|_| sectors > 0 || flags > 0) else { break };
        at += length;
        if sectors > 0 {
            writes += 1;
            cached.push((to, data));
        }
        if flags & FLUSH != 0 {
            flushes += 1;
            for (to, data) in cached.drain(..) {
                disk_bytes[to..to + data.len()].copy_from_slice(data);
            }
        }
    }
    std::fs::write(disk, disk_bytes).unwrap();
    format!("of {writes} writes and {flushes} flushes the last {} writes are lost", cached.len())
}
