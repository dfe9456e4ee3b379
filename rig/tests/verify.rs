//! I4: after a syncvm all RAM and the whole device state of leader and secondary are equal, byte by byte.
//!
//! With `verify = true` both sides hash all of RAM after every syncvm and compare. These tests let that check pass over Redis
//! under load and over threads that race, and show that it bites: memory of the secondary is changed behind the tracker's back.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rig::cluster::{QEMU, VM};
use rig::guest::BOOT_LIMIT_SECS;
use rig::scenario::{Scenario, wait_whole};
use rig::{Cluster, ClusterOptions, Deadline, Host, Service, Testbed, program, wait_until_every};
use serde_json::Value;

/// Full comparisons that a run must have passed.
const SYNCVMS: u64 = 200;
/// For the trackers that are only a fallback.
const FEW_SYNCVMS: u64 = 15;
/// Hashing all of RAM twice per syncvm takes its time when other programs want the cores, and must not look like a failure.
const VERIFY: &str = "verify = true\nsync_timeout_ms = 20000\nfailure_timeout_ms = 400\n";
const RACEY: Service = Service::Racey { threads: 4, rounds: 0 };
const PAGE_BYTES: usize = 4096;
const LOOK: Duration = Duration::from_millis(100);

fn cluster<'a>(bed: &'a Testbed, service: Service, policy: &str) -> Cluster<'a> {
    let programs = program("plover").unwrap().parent().unwrap().to_owned();
    let mut options = ClusterOptions::new(service, programs);
    options.policy = policy.to_owned();
    let cluster = Cluster::new(bed, options).unwrap();
    cluster.start_all().unwrap();
    cluster
}

fn status(cluster: &Cluster, host: &Host) -> Value {
    cluster.status(host).unwrap_or_else(|| panic!("{} does not answer", host.name()))
}

fn total(cluster: &Cluster, host: &Host, name: &str) -> u64 {
    status(cluster, host)["totals"][name].as_u64().unwrap()
}

/// Waits for so many full comparisons on the leader, and checks that none found a difference.
fn wait_verified(cluster: &Cluster, leader: &Host, count: u64, limit_secs: u64) {
    let start = Instant::now();
    let failed_before = total(cluster, leader, "failed");
    let what = format!("{count} verified syncvms");
    wait_until_every(LOOK, Deadline::after_secs(limit_secs), &what, || {
        (total(cluster, leader, "verified") >= count).then_some(())
    })
    .unwrap_or_else(|error| panic!("{}", cluster.explain(error)));
    let totals = &status(cluster, leader)["totals"];
    println!("{what} after {:.1} s: {totals}", start.elapsed().as_secs_f64());
    assert_eq!(totals["diverged"], 0, "{totals}");
    // A syncvm of two guests that boot at different speed may fail: what one has set and the other not must not stay.
    let failed = totals["failed"].as_u64().unwrap() - failed_before;
    assert_eq!(failed, 0, "{totals}");
    assert!(totals["dirty_pages"].as_u64() > Some(0), "nothing was ever dirty: {totals}");
}

fn redis_load_verifies(policy: &str, count: u64) {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed, Service::Redis, policy);
    let scenario = Scenario::start(&cluster, 3).unwrap();
    let leader = wait_whole(&cluster, Deadline::after_secs(30)).unwrap().leader;
    println!("tracker: {}", status(&cluster, &leader)["tracker"]);
    wait_verified(&cluster, &leader, count, 240);
    let verdict = scenario.finish().unwrap();
    println!("{}", verdict.table());
    verdict.assert_flawless();
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn redis_under_load_stays_equal() {
    redis_load_verifies(VERIFY, SYNCVMS);
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn the_tracker_of_last_resort_keeps_guests_equal() {
    redis_load_verifies(&format!("{VERIFY}tracker = \"full\"\n"), FEW_SYNCVMS);
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn soft_dirty_bits_keep_guests_equal_where_the_kernel_has_them() {
    if kernel_has_soft_dirty() {
        redis_load_verifies(&format!("{VERIFY}tracker = \"soft-dirty\"\n"), FEW_SYNCVMS);
    } else {
        println!("left out: this kernel has no soft-dirty bits");
    }
}

/// Whether a page written after `clear_refs` shows as dirty, and one that was not does not (bit 55 of pagemap).
fn kernel_has_soft_dirty() -> bool {
    let mut pages = vec![1u8; 3 * PAGE_BYTES];
    let address = pages.as_ptr() as usize / PAGE_BYTES + 1;
    let bit = || {
        let mut entry = [0; 8];
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        pagemap.read_exact_at(&mut entry, address as u64 * 8).unwrap();
        u64::from_ne_bytes(entry) >> 55 & 1
    };
    if std::fs::write("/proc/self/clear_refs", "4").is_err() {
        return false;
    }
    let before = bit();
    pages.fill(2);
    std::hint::black_box(&pages);
    (before, bit()) == (0, 1)
}

/// A question to racey on a connection of its own; the bytes that it answers after its first line.
struct Racey(BufReader<TcpStream>);

impl Racey {
    fn connect(cluster: &Cluster) -> Self {
        let address = cluster.address();
        let client = cluster.bed().client();
        client.wait_for_port(address, Deadline::after_secs(BOOT_LIMIT_SECS)).unwrap();
        let stream = client.namespace().run(move || TcpStream::connect(address)).unwrap().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self(BufReader::new(stream))
    }

    fn ask(&mut self, question: &str) -> String {
        writeln!(self.0.get_mut(), "{question}").unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// The whole output file.
    fn file(&mut self) -> Vec<u8> {
        let head = self.ask("file 0");
        let length = head.strip_prefix("bytes ").and_then(|text| text.parse().ok());
        let mut bytes = vec![0; length.unwrap_or_else(|| panic!("racey said {head:?}"))];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn racing_threads_stay_equal_and_go_on_where_they_were() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed, RACEY, VERIFY);
    let roles = wait_whole(&cluster, Deadline::after_secs(90)).unwrap();
    let mut racey = Racey::connect(&cluster);
    let start = Instant::now();
    while total(&cluster, &roles.leader, "verified") < SYNCVMS {
        assert!(start.elapsed() < Duration::from_secs(300), "200 syncvms take too long");
        cluster.ask(&roles.leader, &["sync", VM]).unwrap();
        racey.ask("status");
    }
    wait_verified(&cluster, &roles.leader, SYNCVMS, 1);

    // What a client has read was covered by a syncvm, so whoever leads next has the same and goes on from there.
    let mut known = racey.file();
    assert!(known.len() > 100, "racey has hardly begun: {} bytes", known.len());
    let mut goes_on = |how: &str| {
        let now = racey.file();
        let equal = known.iter().zip(&now).take_while(|(a, b)| a == b).count();
        assert!(
            now.len() >= known.len() && equal == known.len(),
            "{how}: of {} bytes that a client had read only the first {equal} are in the {} of the new leader",
            known.len(),
            now.len()
        );
        println!("{how}: {} bytes were known, {} are there now", known.len(), now.len());
        known = now;
    };
    cluster.ask(&roles.leader, &["failover", VM]).unwrap();
    goes_on("planned failover");
    let roles = wait_whole(&cluster, Deadline::after_secs(60)).unwrap();
    let dead = roles.leader.crash().unwrap();
    goes_on("host killed");
    dead.undo().unwrap();
    wait_whole(&cluster, Deadline::after_secs(60)).unwrap();
    goes_on("protected again");
}

/// The guest's RAM as a file: the memfd that its QEMU holds.
fn ram_of(host: &Host) -> File {
    let pid = host.process(QEMU).unwrap().pid();
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let ram = fds
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            std::fs::read_link(path)
                .is_ok_and(|target| target.to_string_lossy().starts_with("/memfd:memory-backend-memfd"))
        })
        .expect("QEMU holds the guest's memory");
    File::options().read(true).write(true).open(ram).unwrap()
}

/// Changes a byte in some pages that are zero now, which a small guest does not touch soon. A write through the file marks
/// no page table of QEMU: it is invisible for every tracker, as if the tracker were broken.
fn change_behind_the_trackers_back(host: &Host) {
    const PAGES: usize = 8;
    let ram = ram_of(host);
    let bytes = ram.metadata().unwrap().len();
    let mut page = [0; PAGE_BYTES];
    let mut changed = 0;
    // From the middle up: the kernel gives out pages from both ends.
    for at in (bytes / 2..bytes).step_by(PAGE_BYTES * 64) {
        ram.read_exact_at(&mut page, at).unwrap();
        if page.iter().all(|&byte| byte == 0) {
            ram.write_all_at(&[0xA5], at + 123).unwrap();
            changed += 1;
            if changed == PAGES {
                return;
            }
        }
    }
    panic!("the guest of {} has no {PAGES} empty pages", host.name());
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_write_that_the_tracker_misses_is_found_and_repaired() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed, Service::Redis, VERIFY);
    // A guest that boots sets devices up, and one whose guest is ahead with that must rejoin.
    bed.client().wait_for_port(cluster.address(), Deadline::after_secs(BOOT_LIMIT_SECS)).unwrap();
    let roles = wait_whole(&cluster, Deadline::after_secs(90)).unwrap();
    cluster.ask(&roles.leader, &["sync", VM]).unwrap();
    assert_eq!(total(&cluster, &roles.leader, "diverged"), 0);

    change_behind_the_trackers_back(&roles.secondary);
    // It is refused, or answered by a later syncvm that has repaired the damage; the count tells.
    let answer = cluster.ask(&roles.leader, &["sync", VM]);
    println!("sync after the change: {answer:?}");
    wait_until_every(LOOK, Deadline::after_secs(30), "the difference to be found", || {
        (total(&cluster, &roles.leader, "diverged") > 0).then_some(())
    })
    .unwrap_or_else(|error| panic!("{}", cluster.explain(error)));

    // A guest that is not what it should be is brought in again, all pages compared.
    wait_synced(&cluster, &roles.leader);
    let found = total(&cluster, &roles.leader, "diverged");
    let verified = total(&cluster, &roles.leader, "verified");
    for _ in 0..3 {
        cluster.ask(&roles.leader, &["sync", VM]).unwrap();
    }
    assert_eq!(total(&cluster, &roles.leader, "diverged"), found);
    assert!(total(&cluster, &roles.leader, "verified") >= verified + 3);
}

/// Waits until a syncvm is acknowledged: the leader may have said «protected» just before it lost its secondary.
fn wait_synced(cluster: &Cluster, leader: &Host) {
    wait_until_every(LOOK, Deadline::after_secs(60), "a syncvm", || cluster.ask(leader, &["sync", VM]).ok())
        .unwrap_or_else(|error| panic!("{}", cluster.explain(error)));
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn without_a_tracker_the_same_change_is_simply_repaired() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed, Service::Redis, &format!("{VERIFY}tracker = \"full\"\n"));
    bed.client().wait_for_port(cluster.address(), Deadline::after_secs(BOOT_LIMIT_SECS)).unwrap();
    let roles = wait_whole(&cluster, Deadline::after_secs(90)).unwrap();
    // With this tracker each syncvm takes long. One that has compared the pages already would find the change when it verifies.
    cluster.ask(&roles.leader, &["sync", VM]).unwrap();
    change_behind_the_trackers_back(&roles.secondary);
    let before = total(&cluster, &roles.leader, "verified");
    cluster.ask(&roles.leader, &["sync", VM]).unwrap();
    assert!(total(&cluster, &roles.leader, "verified") > before);
    assert_eq!(total(&cluster, &roles.leader, "diverged"), 0);
}
