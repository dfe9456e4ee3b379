//! The log on real devices, as root: a file system that is full, block devices, and ones that fail while it runs.
//!
//! The devices are loop devices over files in /dev/shm. A device fails when its file becomes shorter and the device is told
//! so (`losetup -c`): what lies beyond the end gives I/O errors.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::{DEADLINE, Scratch, append, entry, settle};
use storage_log::{LegSpec, LegState, LogError, LogStore, Options, Record, Ticket, open};

const SEGMENT: u64 = 64 << 10;

fn options() -> Options {
    Options { segment_bytes: SEGMENT, max_bytes: 512 * SEGMENT, stage_bytes: 1 << 20, direct: true }
}

/// Runs a program; its text if all went well.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} (cargo xtask setup installs it): {error}"));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A loop device over a file, taken apart when dropped.
struct Loop {
    backing: PathBuf,
    device: PathBuf,
    bytes: u64,
}

impl Loop {
    fn new(scratch: &Scratch, name: &str, bytes: u64) -> Loop {
        let backing = scratch.path().join(name);
        File::create(&backing).unwrap().set_len(bytes).unwrap();
        let device = run("losetup", &["--find", "--show", backing.to_str().unwrap()]);
        let this = Loop { backing, device: device.into(), bytes };
        // Not every file system below can, and then it is a device with a cache.
        let _ = Command::new("losetup").args(["--direct-io=on"]).arg(&this.device).output();
        this
    }

    fn leg(&self) -> LegSpec {
        LegSpec::Device(self.device.clone())
    }

    /// Makes everything behind `bytes` fail. What it held is kept aside.
    fn shrink(&self, bytes: u64) -> Vec<u8> {
        let held = std::fs::read(&self.backing).unwrap();
        self.resize(bytes);
        held
    }

    /// Makes the device whole again, with what it held.
    fn mend(&self, held: &[u8]) {
        std::fs::write(&self.backing, held).unwrap();
        self.resize(self.bytes);
    }

    fn resize(&self, bytes: u64) {
        File::options().write(true).open(&self.backing).unwrap().set_len(bytes).unwrap();
        run("losetup", &["-c", self.device.to_str().unwrap()]);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // The last user may be a moment away from closing it; the kernel takes it apart then.
        let output = Command::new("losetup").arg("-d").arg(&self.device).output();
        if !output.is_ok_and(|output| output.status.success()) {
            eprintln!("the loop device {} is left", self.device.display());
        }
    }
}

/// A small ext4, unmounted when dropped.
struct Mount {
    dir: PathBuf,
    _device: Loop,
}

impl Mount {
    fn new(scratch: &Scratch, bytes: u64) -> Mount {
        let device = Loop::new(scratch, "ext4", bytes);
        let dir = scratch.path().join("mount");
        std::fs::create_dir(&dir).unwrap();
        let path = device.device.to_str().unwrap();
        run("mkfs.ext4", &["-q", "-m", "0", "-O", "^has_journal", path]);
        run("mount", &[path, dir.to_str().unwrap()]);
        Mount { dir, _device: device }
    }

    /// Takes all space but so much.
    fn fill(&self, left_bytes: u64) -> PathBuf {
        let path = self.dir.join("filler");
        let statistics = rustix::fs::statvfs(&self.dir).unwrap();
        let free = statistics.f_bavail * statistics.f_frsize;
        let file = File::create(&path).unwrap();
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&file, flags, 0, free.saturating_sub(left_bytes).max(4096)).unwrap();
        file.sync_all().unwrap();
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a log may be open in it when a test panics.
        let output = Command::new("umount").arg("-l").arg(&self.dir).output();
        if !output.is_ok_and(|output| output.status.success()) {
            eprintln!("{} is still mounted", self.dir.display());
        }
    }
}

/// Appends entries one at a time until one is refused or does not become durable. Returns the last durable one.
fn append_until_refused(log: &mut dyn LogStore, mut last: u64) -> (u64, Option<LogError>) {
    let deadline = Instant::now() + DEADLINE;
    loop {
        assert!(Instant::now() < deadline, "nothing was refused within {DEADLINE:?}");
        let bytes = content(last + 1);
        match log.append(Record::Entry { index: last + 1, view: 1, parts: [&bytes, &[]] }) {
            // The next segment is being made.
            Err(LogError::QueueFull) => drop(log.wait(Ticket(u64::MAX), Duration::from_millis(20))),
            Err(error) => return (last, Some(error)),
            Ok(ticket) => {
                log.flush();
                let durable = log.wait(ticket, DEADLINE);
                assert!(durable || log.failed().is_some(), "an entry that was taken stays under way");
                if !durable {
                    return (last, log.failed());
                }
                last += 1;
            }
        }
    }
}

fn content(index: u64) -> Vec<u8> {
    vec![index as u8; 7000]
}

fn check(legs: &[LegSpec], at_least: u64) -> Box<dyn LogStore> {
    let (log, recovered) = open(legs, options()).unwrap();
    assert!(!recovered.doubtful);
    let last = recovered.entries.last().map_or(0, |entry| entry.index);
    assert!(last >= at_least && last <= at_least + 2, "{at_least} entries were acknowledged, {last} are there");
    for (entry, index) in recovered.entries.iter().zip(recovered.entries[0].index..) {
        assert!(entry.index == index && entry.bytes == content(index), "entry {index}");
    }
    log
}

#[test]
#[ignore = "e2e: mounts a small file system and fills it"]
fn a_full_file_system_stops_the_log_and_loses_nothing() {
    let scratch = Scratch::new();
    let mount = Mount::new(&scratch, 32 << 20);
    let legs = [LegSpec::Dir(mount.dir.join("log"))];
    let (mut log, _) = open(&legs, options()).unwrap();
    let mut last = 0;
    for index in 1..=20 {
        let ticket = entry(&mut *log, index, 1, &content(index));
        assert!(settle(&mut *log, ticket));
        last = index;
    }
    let filler = mount.fill(3 * SEGMENT);
    let (durable, refusal) = append_until_refused(&mut *log, last);
    let refusal = refusal.expect("the file system is full, and the log says so");
    assert!(matches!(refusal, LogError::NoSpace { .. }) && refusal.is_full(), "{refusal}");
    assert!(log.failed().is_none() && durable > last, "the segments that were made in advance are used");
    assert!(log.status().no_room.is_some());
    // The promise still goes in: the rest of the segment is kept for that.
    for vote in 0..3u8 {
        let ticket = append(&mut *log, Record::State(&[vote]));
        assert!(settle(&mut *log, ticket), "a state finds no room");
    }
    // A restart in the middle loses nothing, and changes nothing.
    drop(log);
    let mut log = check(&legs, durable);
    std::fs::remove_file(filler).unwrap();
    let next = log_end(&legs, &mut log) + 1;
    let deadline = Instant::now() + DEADLINE;
    let bytes = content(next);
    let ticket = loop {
        match log.append(Record::Entry { index: next, view: 1, parts: [&bytes, &[]] }) {
            Ok(ticket) => break ticket,
            Err(error) => assert!(error.is_full() && Instant::now() < deadline, "{error}"),
        }
        log.wait(Ticket(u64::MAX), Duration::from_millis(20));
    };
    assert!(settle(&mut *log, ticket), "it goes on when there is space");
    drop(log);
    check(&legs, next);
}

/// As the product does: no input while the log says that it fills up, and after each syncvm the log is cut.
#[test]
#[ignore = "e2e: mounts a small file system and fills it"]
fn a_full_file_system_stops_nobody_who_cuts_the_log() {
    let scratch = Scratch::new();
    let mount = Mount::new(&scratch, 32 << 20);
    let dir = mount.dir.join("log");
    let legs = [LegSpec::Dir(dir.clone())];
    let (mut log, _) = open(&legs, options()).unwrap();
    let ticket = append(&mut *log, Record::State(b"promise"));
    assert!(settle(&mut *log, ticket));
    let deadline = Instant::now() + DEADLINE;
    while crate::common::segments(&dir).len() < 2 {
        assert!(Instant::now() < deadline, "no second segment");
        log.wait(Ticket(u64::MAX), Duration::from_millis(1));
    }
    mount.fill(0);
    let mut last = 0;
    let mut pauses = 0;
    // Many times what there is room for.
    while last < 1000 {
        assert!(Instant::now() < deadline, "it goes on no more behind entry {last}: {:?}", log.status());
        if !log.is_filling_up() {
            let ticket = entry(&mut *log, last + 1, 1, &content(last + 1));
            assert!(settle(&mut *log, ticket));
            last += 1;
            continue;
        }
        pauses += 1;
        let ticket = entry(&mut *log, last + 1, 1, b"syncvm");
        assert!(settle(&mut *log, ticket));
        last += 1;
        append(&mut *log, Record::State(b"cut"));
        log.truncate_prefix(last - 1);
        log.flush();
        while log.is_filling_up() {
            assert!(Instant::now() < deadline, "nothing is given back behind entry {last}: {:?}", log.status());
            log.wait(Ticket(u64::MAX), Duration::from_millis(1));
        }
    }
    assert!(pauses > 50, "the disk was not full: {pauses} pauses");
    drop(log);
    let (_, recovered) = open(&legs, options()).unwrap();
    assert_eq!(recovered.state.as_deref(), Some(&b"cut"[..]));
    assert!(!recovered.doubtful && recovered.entries.last().is_some_and(|entry| entry.index == last));
}

/// The last entry; the log is opened anew for that.
fn log_end(legs: &[LegSpec], log: &mut Box<dyn LogStore>) -> u64 {
    *log = Box::new(storage_log::MemoryLog::new());
    let (reopened, recovered) = open(legs, options()).unwrap();
    *log = reopened;
    recovered.entries.last().expect("there are some").index
}

#[test]
#[ignore = "e2e: makes a loop device"]
fn a_block_device_holds_a_log() {
    let scratch = Scratch::new();
    let device = Loop::new(&scratch, "device", 16 << 20);
    let legs = [device.leg()];
    let mut last = 0;
    for life in 0..4 {
        let mut log = check_or_new(&legs, last);
        for _ in 0..100 {
            let ticket = entry(&mut *log, last + 1, life, &content(last + 1));
            last += 1;
            if last.is_multiple_of(8) {
                log.truncate_prefix(last.saturating_sub(40));
                assert!(settle(&mut *log, ticket));
            }
        }
        let ticket = append(&mut *log, Record::State(b"state"));
        assert!(settle(&mut *log, ticket));
        let error = open(&legs, options()).err().expect("it is in use");
        assert!(matches!(error, LogError::Locked { .. }), "{error}");
    }
    drop(check(&legs, last));
}

fn check_or_new(legs: &[LegSpec], last: u64) -> Box<dyn LogStore> {
    if last == 0 { open(legs, options()).unwrap().0 } else { check(legs, last) }
}

#[test]
#[ignore = "e2e: makes a loop device and lets it shrink"]
fn a_device_that_fails_ends_the_log_and_loses_nothing() {
    let scratch = Scratch::new();
    let device = Loop::new(&scratch, "device", 16 << 20);
    let legs = [device.leg()];
    let (mut log, _) = open(&legs, options()).unwrap();
    let mut last = 0;
    for index in 1..=20 {
        let ticket = entry(&mut *log, index, 1, &content(index));
        assert!(settle(&mut *log, ticket));
        last = index;
    }
    // In the middle of the slot that comes after the present one.
    let held = device.shrink((1 << 20) + 4 * SEGMENT + 9 * 4096);
    let (durable, failure) = append_until_refused(&mut *log, last);
    let failure = failure.expect("the log fails");
    assert!(!failure.is_full() && failure.to_string().contains(device.device.to_str().unwrap()), "{failure}");
    let ticket = log.durable();
    assert!(log.append(Record::State(b"x")).is_err(), "for good");
    let now = std::fs::read(&device.backing).unwrap();
    // Whole again: what was written since is there as well.
    device.mend(&[&now[..], &held[now.len()..]].concat());
    log.flush();
    log.wait(Ticket(ticket.0 + 1), Duration::from_millis(300));
    assert!(log.append(Record::State(b"x")).is_err() && log.durable() == ticket, "nothing comes back by itself");
    drop(log);
    let mut log = check(&legs, durable);
    let ticket = append(&mut *log, Record::State(b"goes on"));
    assert!(settle(&mut *log, ticket));
}

#[test]
#[ignore = "e2e: makes two loop devices and lets them shrink in turn"]
fn a_mirror_of_devices_goes_on_with_one_and_rebuilds_the_other() {
    let scratch = Scratch::new();
    let devices = ["one", "two"].map(|name| Loop::new(&scratch, name, 16 << 20));
    let legs = [devices[0].leg(), devices[1].leg()];
    let (mut log, _) = open(&legs, options()).unwrap();
    let mut last = 0;
    for ill in [1, 0, 1] {
        go_on(&mut *log, &mut last, 10);
        let held = devices[ill].shrink(1 << 20);
        let deadline = Instant::now() + DEADLINE;
        while !matches!(log.status().legs[ill].state, LegState::Failed(_) | LegState::Rebuilding) {
            assert!(Instant::now() < deadline, "the device that is gone is not noticed");
            go_on(&mut *log, &mut last, 1);
        }
        // Without it, and so that it misses whole segments.
        go_on(&mut *log, &mut last, 60);
        assert!(log.failed().is_none());
        devices[ill].mend(&held);
        let deadline = Instant::now() + DEADLINE;
        while !matches!(log.status().legs[ill].state, LegState::Complete) {
            let state = &log.status().legs[ill].state;
            assert!(Instant::now() < deadline, "the device is not rebuilt within {DEADLINE:?}: {state:?}");
            go_on(&mut *log, &mut last, 1);
            log.wait(Ticket(u64::MAX), Duration::from_millis(50));
        }
        go_on(&mut *log, &mut last, 10);
    }
    drop(log);
    drop(check(&legs, last));
    // Device two was rebuilt last; now it must do alone. All is there; the doubt is that of a missing copy.
    let (mut log, _) = open(&legs, options()).unwrap();
    go_on(&mut *log, &mut last, 1);
    let held = devices[0].shrink(1 << 20);
    go_on(&mut *log, &mut last, 3);
    drop(log);
    let (log, recovered) = open(&legs, options()).unwrap();
    assert!(recovered.doubtful, "a copy is missing");
    assert_eq!(recovered.entries.last().map(|entry| entry.index), Some(last));
    drop(log);
    // Back as it was, it lacks the end, which is filled in; and no doubt is left.
    devices[0].mend(&held);
    drop(check(&legs, last));
}

fn go_on(log: &mut dyn LogStore, last: &mut u64, count: u64) {
    for _ in 0..count {
        *last += 1;
        let ticket = entry(log, *last, 1, &content(*last));
        assert!(settle(log, ticket), "{:?}", log.failed());
        log.truncate_prefix(last.saturating_sub(30));
    }
}

/// Nothing of an earlier run that was killed is in the way: names carry the process id, and loop devices are anonymous.
#[test]
#[ignore = "e2e: makes and removes loop devices"]
fn nothing_is_left_behind() {
    let scratch = Scratch::new();
    let dir = scratch.path().to_owned();
    let name = dir.to_str().unwrap().to_owned();
    let panicked = std::panic::catch_unwind(move || {
        let mount = Mount::new(&scratch, 8 << 20);
        let _log = open(&[LegSpec::Dir(mount.dir.join("log"))], options()).unwrap();
        let device = Loop::new(&scratch, "device", 8 << 20);
        let _other = open(&[device.leg()], options()).unwrap();
        panic!("as a test that fails");
    });
    assert!(panicked.is_err());
    assert!(!Path::new(&dir).exists());
    let deadline = Instant::now() + DEADLINE;
    // The kernel takes them apart when the last user is gone.
    while run("losetup", &["--list", "--output", "BACK-FILE"]).contains(&name) {
        assert!(Instant::now() < deadline, "a loop device is left");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!std::fs::read_to_string("/proc/mounts").unwrap().contains(&name));
}
