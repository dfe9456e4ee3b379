//! The two guests, alike but for what is behind their network device.

use std::fs;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use huge_pages::HugePages;
use rig::guest::BOOT_LIMIT_SECS;
use rig::testbed::GUEST_IP;
use rig::{Cluster, ClusterOptions, Deadline, Guest, PlainMemory, Process, Service, Testbed, release_program};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

/// The peer's address. Its MAC address follows from it.
const PEER_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 51);
/// Has init start iperf3.
const APPEND: &str = "plover.iperf3=on";
/// What QEMU calls a thread that runs a guest's CPU.
const VCPU: &str = "CPU ";

/// Both guests on one host. They end with the test bed.
pub struct Pair<'a> {
    cluster: Cluster<'a>,
    _memory: Option<HugePages>,
}

impl<'a> Pair<'a> {
    /// Boots both. Their CPUs run on the first of `cpus`, the daemon and all other threads of both QEMUs on the second.
    ///
    /// # Errors
    /// Something is not built or set up, or a guest does not come up.
    pub fn boot(bed: &'a Testbed, cpus: [usize; 2]) -> Result<Pair<'a>> {
        let plover = release_program("plover")?;
        let programs = plover.parent().context("a program lies in a directory")?.to_owned();
        let mut options = ClusterOptions::new(Service::Redis, programs);
        options.unreplicated = true;
        options.node = String::new();
        options.append = APPEND.to_owned();
        options.daemon_cores = vec![cpus[1]];
        let memory = huge_pages();
        options.vm = if memory.is_some() { "memory_backend = \"hugepages\"\n".to_owned() } else { String::new() };
        let cluster = Cluster::new(bed, options)?;
        let host = bed.host(0);
        cluster.start_daemon(host)?;
        let ours = cluster.start_qemu(host)?;
        let plain_memory = if memory.is_some() { PlainMemory::HugePages } else { PlainMemory::Memfd };
        let guest = Guest { ip: PEER_IP, append: APPEND.to_owned(), plain_memory, ..Guest::new(Service::Redis) };
        let peer = guest.boot_plain(host, &[])?;
        let deadline = Deadline::after_secs(BOOT_LIMIT_SECS);
        bed.client().wait_for_port(cluster.address(), deadline).map_err(|error| cluster.explain(error))?;
        for qemu in [&ours, &peer] {
            pin_threads(qemu, cpus)?;
        }
        Ok(Pair { cluster, _memory: memory })
    }

    /// Where the guest on our device is.
    pub fn ours(&self) -> Ipv4Addr {
        GUEST_IP
    }

    /// Where the guest on QEMU's own backend is.
    pub fn peer(&self) -> Ipv4Addr {
        PEER_IP
    }

    /// At the end: that our guest's frames took the path that was to be measured.
    ///
    /// # Errors
    /// They did not.
    pub fn check(&self) -> Result<()> {
        let status = self.cluster.status(self.cluster.bed().host(0)).context("the daemon does not answer")?;
        let passed = |field: &str| status[field].as_u64().is_some_and(|frames| frames > 0);
        ensure!(
            status["role"] == "unreplicated" && passed("frames_in") && passed("frames_out"),
            "our guest's frames took another way; the daemon says: {status}"
        );
        Ok(())
    }
}

/// Huge pages for both guests: a guest on small ones is slower by more than what is measured here, whoever moves its frames.
fn huge_pages() -> Option<HugePages> {
    let per_guest = u64::from(Guest::new(Service::Redis).memory_mib).div_ceil(2);
    // And a few for the daemon's own memory.
    let reserved = HugePages::reserve(2 * per_guest + 16);
    if let Err(error) = &reserved {
        eprintln!("NOTE: no huge pages ({error:#}): both guests run on normal pages and are slower for it");
    }
    reserved.ok()
}

fn pin_threads(qemu: &Process, cpus: [usize; 2]) -> Result<()> {
    let tasks = format!("/proc/{}/task", qemu.pid());
    let mut vcpus = 0;
    for task in fs::read_dir(&tasks).with_context(|| format!("cannot read {tasks}"))? {
        let task = task?;
        // A thread that has just ended needs no place.
        let Ok(name) = fs::read_to_string(task.path().join("comm")) else { continue };
        let is_vcpu = name.starts_with(VCPU);
        vcpus += usize::from(is_vcpu);
        let thread = task.file_name().to_str().and_then(|id| Pid::from_raw(id.parse().ok()?));
        let mut set = CpuSet::new();
        set.set(cpus[usize::from(!is_vcpu)]);
        sched_setaffinity(thread, &set).with_context(|| format!("cannot pin «{}» of {}", name.trim(), qemu.name()))?;
    }
    ensure!(vcpus == 1, "{} has {vcpus} threads called «{VCPU}…» instead of one", qemu.name());
    Ok(())
}
