//! The storage log's SPDK device, in a guest with emulated NVMe controllers (rig/src/nvme_guest.rs).
//!
//! On a machine without SPDK each test says loudly that it was skipped, and passes.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use rig::nvme_guest::{NvmeGuest, SKIPPED, controller_address, spdk_version};
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
    format!("file={},format=raw,cache=unsafe", path.display())
}

/// Boots, waits and expects success.
fn run(host: &Host, name: &str, backends: &[String], words: &[&str]) -> String {
    let guest = NvmeGuest::boot(host, name, backends, words).unwrap();
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
    if !has_spdk() {
        return;
    }
    let bed = Testbed::new().unwrap();
    let host = bed.host(0);
    let disks = [raw_disk(host, "disk.img", 1024 * MIB)];
    let console = run(host, "kills", &disks, &["kill-rounds", &controller_address(0), "12"]);
    println!("{console}");
    assert_eq!(console.lines().filter(|line| line.starts_with("round ")).count(), 12, "{console}");
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
    sparse_file(&disk, 256 * MIB);
    let mut words: Vec<String> = Vec::new();
    let mut first = 0;
    for (round, acknowledgements) in (1..).zip([40, 1, 150]) {
        let before = std::fs::read(&disk).unwrap();
        sparse_file(&log, 0);
        let backend = format!(
            "driver=blklogwrites,cache=writeback,file.driver=file,file.filename={},log.driver=file,log.filename={}",
            disk.display(),
            log.display()
        );
        let (name, address) = (format!("cut{round}"), controller_address(0));
        let mut arguments = vec!["append".to_owned(), address, round.to_string(), first.to_string()];
        arguments.extend(words.clone());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let guest = NvmeGuest::boot(host, &name, &[backend], &arguments).unwrap();
        let enough = || (acknowledged(&guest.console()).len() >= acknowledgements).then_some(());
        guest.wait_for("acknowledgements", Deadline::after_secs(LIMIT_SECS), enough).unwrap();
        guest.cut_power().unwrap();
        let end = *acknowledged(&guest.console()).last().unwrap();
        println!("cut {round}: blocks {first} to {end} are durable; {}", lose_unflushed(&disk, before, &log));
        words.push(format!("{round}:{first}:{end}"));
        first = end;
    }
    let disks = [format!("file={},format=raw,cache=unsafe", disk.display())];
    let address = controller_address(0);
    let mut arguments = vec!["check", &address];
    arguments.extend(words.iter().map(String::as_str));
    let console = run(host, "check", &disks, &arguments);
    assert_eq!(console.lines().filter(|line| line.starts_with("checked run ")).count(), 3, "{console}");
}

/// The numbers of all «acked N» lines; a last line without its end is not one.
fn acknowledged(console: &str) -> Vec<u64> {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(|line| line.strip_prefix("acked ")?.parse().ok()).collect()
}

/// Makes the disk again as it was before, with the writes of the log up to the last flush and none behind it: what a
/// volatile cache guarantees. The log's format is that of Linux's dm-log-writes.
fn lose_unflushed(disk: &Path, before: Vec<u8>, log: &Path) -> String {
    const SECTOR: usize = 512;
    const FLUSH: u64 = 1;
    let log = std::fs::read(log).unwrap();
    let word = |at: usize| log.get(at..at + 8).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap()));
    // It gets its header with the first flush.
    let header = (word(0), word(8));
    assert!([(0x6a_7366_7773_6872, 1), (0, 0)].contains(&header), "magic and version of the log: {header:x?}");
    let (mut image, mut durable) = (before.clone(), before);
    let mut at = SECTOR;
    let (mut writes, mut flushes, mut lost) = (0, 0, 0);
    loop {
        let [sector, sectors, flags] = [0, 8, 16].map(|field| word(at + field));
        let (to, length) = (sector as usize * SECTOR, sectors as usize * SECTOR);
        at += SECTOR;
        // Zeros behind the last entry; its data may be cut off.
        let Some(data) = log.get(at..at + length).filter(|_| sectors > 0 || flags > 0) else { break };
        image[to..to + length].copy_from_slice(data);
        at += length;
        if sectors > 0 {
            writes += 1;
            lost += 1;
        }
        if flags & FLUSH != 0 {
            flushes += 1;
            lost = 0;
            durable.clone_from(&image);
        }
    }
    std::fs::write(disk, durable).unwrap();
    format!("of {writes} writes and {flushes} flushes the last {lost} writes are lost")
}
