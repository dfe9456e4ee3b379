//! QEMU's side against a real QEMU: arguments, agent, RAM, preflight, device state, events.
//!
//! Needs root and what `cargo xtask setup` makes (or another QEMU ≥ 10 in `PLOVER_QEMU`).

#[path = "qemu_side/vm.rs"]
mod vm;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use plover_agent::protocol::{VcpuChange, VcpuCommon, WrittenRange};
use qemu_vhost_user::qemu::agent::{AgentClient, AgentError, DEFAULT_PERIOD_US, VcpuClocks};
use qemu_vhost_user::qemu::device_state;
use qemu_vhost_user::qemu::fingerprint::{Mismatch, compare};
use qemu_vhost_user::qemu::preflight::{self, Refusal};
use qemu_vhost_user::qemu::qmp::{EventKind, Qmp, RunState};
use qemu_vhost_user::qemu::ram::{self, RamError};
use qemu_vhost_user::qemu::state_file::StateFile;
use vm::{PATIENCE, Vm, until};

/// What the guest prints on its console when its service runs.
const READY: &str = "PLOVER-GUEST-READY";

fn refusal(vm: &Vm) -> Refusal {
    let mut qmp = vm.qmp();
    let mut agent = vm.agent();
    preflight::check(&mut qmp, Some(&mut agent), "a", vm.directory()).expect_err("to be refused")
}

fn say(refusal: &Refusal, remedy: &str) {
    let text = refusal.to_string();
    println!("{text}");
    assert!(text.contains(remedy), "«{text}» does not name «{remedy}»");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn our_arguments_give_a_vm_that_can_be_protected() {
    let vm = Vm::new("accepted").start();
    let (mut qmp, mut agent) = (vm.qmp(), vm.agent());
    assert_eq!(qmp.peer_pid().expect("pid"), vm.pid());
    assert_eq!(agent.hello().expect("hello").pid as i32, vm.pid());
    let accepted = preflight::check(&mut qmp, Some(&mut agent), "a", vm.directory()).expect("accepted");
    let ram = accepted.ram;
    assert_eq!(ram.length_bytes, vm::MEMORY_BYTES);
    assert_eq!(ram.page_bytes, 4096);
    println!("{}", accepted.fingerprint.devices.text);
    assert!(accepted.fingerprint.warnings.is_empty());
    assert_eq!(qmp.query_status().expect("status"), RunState::Prelaunch);

    // What is written into the file is what QEMU sees as the guest's physical memory.
    let file = std::fs::File::from(ram.clone_file().expect("another descriptor"));
    file.write_all_at(&0x1234_5678_u32.to_le_bytes(), 0x20_0000).expect("write");
    let seen = qmp.hmp("xp /1wx 0x200000").expect("xp");
    assert!(seen.contains("0x12345678"), "{seen}");
    // And at the addresses that were found.
    let memory = std::fs::File::open(format!("/proc/{}/mem", vm.pid())).expect("QEMU's memory");
    let mut word = [0; 4];
    memory.read_exact_at(&mut word, ram.ranges[0].addresses.start + 0x20_0000).expect("read");
    assert_eq!(u32::from_le_bytes(word), 0x1234_5678);
    // The trial left no file behind, and the VM still boots.
    let left = std::fs::read_dir("/dev/shm").expect("/dev/shm").flatten();
    let ours = format!("plover-preflight-a-{}-", std::process::id());
    assert_eq!(left.filter(|entry| entry.file_name().to_string_lossy().starts_with(&ours)).count(), 0);
    qmp.cont().expect("cont");
    vm.wait_for_console(READY);
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_vm_that_was_given_anothers_state_is_not_fresh_for_whoever_attaches_next() {
    let vm = Vm::new("fresh").start();
    let fresh = || {
        let (mut qmp, mut agent) = (vm.qmp(), vm.agent());
        let accepted = preflight::check(&mut qmp, Some(&mut agent), "a", vm.directory()).expect("accepted");
        assert_eq!(qmp.query_status().expect("status"), RunState::Prelaunch);
        accepted.fresh
    };
    assert!(fresh() && fresh(), "looking at it changes nothing");
    let mut qmp = vm.qmp();
    qmp.mark_used().expect("marked");
    qmp.mark_used().expect("marked again");
    drop(qmp);
    assert!(!fresh());
    vm.qmp().reset(false).expect("reset");
    assert!(!fresh(), "its memory is what it was");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn that_a_vm_follows_is_known_to_whoever_attaches_next() {
    let vm = Vm::new("follows").start();
    assert!(!vm.qmp().is_following().expect("asked"));
    for follows in [true, true, false, false, true] {
        vm.qmp().mark_following(follows).expect("noted");
        assert_eq!(vm.qmp().is_following().expect("asked"), follows);
    }
    vm.qmp().reset(false).expect("reset");
    assert!(vm.qmp().is_following().expect("asked"), "its memory is what it was");
}

fn cpu_ns(clocks: &VcpuClocks, after_sequence: u64) -> (u64, u64) {
    let sample =
        until("a new sample of the vCPU clocks", || clocks.read().filter(|sample| sample.sequence > after_sequence));
    assert!(sample.vcpus >= 1, "no vCPU thread was found");
    (sample.cpu_ns, sample.sequence)
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn vcpu_clocks_advance_exactly_while_the_guest_works() {
    let vm = Vm::new("clocks").start();
    let (mut qmp, mut agent) = (vm.qmp(), vm.agent());
    let clocks = agent.clocks().expect("clocks");
    assert!(clocks.read().is_none(), "the sampler sleeps until it is wanted");
    clocks.set_period_us(DEFAULT_PERIOD_US);
    qmp.cont().expect("cont");
    vm.wait_for_console(READY);
    let first = clocks.read().expect("a sample");
    assert!(first.cpu_ns > 100_000_000, "booting takes more than 0.1 s of CPU: {first:?}");
    qmp.stop().expect("stop");
    // One sample may have been taken half before the stop.
    let (_, sequence) = cpu_ns(&clocks, clocks.read().expect("a sample").sequence);
    let (stopped, sequence) = cpu_ns(&clocks, sequence);
    let (later, _) = cpu_ns(&clocks, sequence + 50);
    assert!(later - stopped < 200_000, "a stopped guest used {} ns", later - stopped);
    drop(agent);
    // The agent puts the sampler of a lost connection to rest.
    let asleep = clocks.read().expect("the last sample").sequence;
    vm.agent().hello().expect("hello");
    let now = clocks.read().expect("the last sample").sequence;
    assert!(now <= asleep + 50, "still sampling: {asleep} {now}");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn device_state_is_saved_and_loaded_twenty_times_in_one_process() {
    let vm = Vm::new("cycles").start();
    let (mut qmp, mut agent) = (vm.qmp(), vm.agent());
    preflight::check(&mut qmp, Some(&mut agent), "a", vm.directory()).expect("accepted");
    qmp.cont().expect("cont");
    vm.wait_for_console(READY);
    let file = StateFile::create(vm.directory(), "cycles").expect("state file");
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut times_us = Vec::new();
    for cycle in 0..20 {
        let timed = |what: &mut dyn FnMut()| {
            let started = Instant::now();
            what();
            started.elapsed().as_micros()
        };
        let stop = timed(&mut || qmp.stop().expect("stop"));
        let save = timed(&mut || qmp.save_devices_state(file.path()).expect("save"));
        let read = timed(&mut || file.read_into(&mut before).expect("read"));
        assert_eq!(qmp.query_status().expect("status"), RunState::Paused);
        agent.register_yank().expect("yank");
        let load = timed(&mut || qmp.load_devices_state(file.path()).expect("load"));
        qmp.save_devices_state(file.path()).expect("save again");
        file.read_into(&mut after).expect("read again");
        assert!(before.len() > 10_000 && before.len() == after.len(), "{} {}", before.len(), after.len());
        let differing = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        assert_eq!(differing, 0, "bytes of device state after the load of cycle {cycle}");
        let cont = timed(&mut || qmp.cont().expect("cont"));
        assert_eq!(qmp.query_status().expect("status"), RunState::Running);
        times_us.push([stop, save, read, load, cont]);
    }
    print_times(&times_us);
    // The guest still works: its clock interrupts make its CPU threads run now and then.
    let clocks = agent.clocks().expect("clocks");
    clocks.set_period_us(DEFAULT_PERIOD_US);
    let (start, sequence) = cpu_ns(&clocks, 0);
    until("the guest to work", || (cpu_ns(&clocks, sequence).0 > start).then_some(()));
    let kinds: Vec<EventKind> = qmp.take_events().into_iter().map(|event| event.kind).collect();
    assert_eq!(kinds.iter().filter(|kind| **kind == EventKind::Stop).count(), 20, "{kinds:?}");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn the_agent_stops_saves_loads_and_resumes_as_the_monitor_does() {
    const LIMIT: Duration = Duration::from_secs(10);
    let vm = Vm::new("control").start();
    let (mut qmp, mut agent) = (vm.qmp(), vm.agent());
    preflight::check(&mut qmp, Some(&mut agent), "a", vm.directory()).expect("accepted");
    agent.cont(LIMIT).expect("cont");
    assert_eq!(qmp.query_status().expect("status"), RunState::Running);
    vm.wait_for_console(READY);
    let file = StateFile::create(vm.directory(), "control").expect("state file");
    let (mut by_agent, mut by_monitor) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        agent.stop(LIMIT).expect("stop");
        assert_eq!(qmp.query_status().expect("status"), RunState::Paused);
        agent.save_devices_state(file.path(), LIMIT).expect("save");
        file.read_into(&mut by_agent).expect("read");
        // Before the load, after which a device may have something to do.
        qmp.save_devices_state(file.path()).expect("save by the monitor");
        file.read_into(&mut by_monitor).expect("read");
        assert!(by_agent.len() > 10_000 && by_agent == by_monitor);
        agent.load_devices_state(file.path(), LIMIT).expect("load");
        agent.cont(LIMIT).expect("cont");
        assert_eq!(qmp.query_status().expect("status"), RunState::Running);
    }
    // QEMU's own reason comes along, and QEMU lives on.
    agent.stop(LIMIT).expect("stop");
    file.write(b"no device state").expect("write");
    let refused = agent.load_devices_state(file.path(), LIMIT).expect_err("garbage");
    assert!(matches!(&refused, AgentError::Refused { reason, .. } if reason.contains("failed")), "{refused}");
    let missing = vm.directory().join("missing/file");
    let refused = agent.save_devices_state(&missing, LIMIT).expect_err("no such folder");
    assert!(refused.to_string().contains("No such file"), "{refused}");
    file.write(&by_agent).expect("write");
    agent.load_devices_state(file.path(), LIMIT).expect("load");
    agent.cont(LIMIT).expect("cont");
    assert_eq!(qmp.query_status().expect("status"), RunState::Running);
    // Both at the same QEMU, in any order.
    qmp.stop().expect("stop");
    agent.cont(LIMIT).expect("cont");
    qmp.stop().expect("stop");
    assert_eq!(qmp.query_status().expect("status"), RunState::Paused);
}

/// A figure of what TCG says of its translations.
fn jit(qmp: &mut Qmp, name: &str) -> u64 {
    let said = qmp.hmp("info jit").expect("info jit");
    let line = said.lines().find_map(|line| line.trim().strip_prefix(name)).unwrap_or_else(|| panic!("{said}"));
    line.trim().parse().unwrap_or_else(|error| panic!("{line}: {error}"))
}

const FLUSHES: &str = "TB flush count";
const INVALIDATED: &str = "TB invalidate count";

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn tcg_keeps_its_translations_over_a_load_without_the_vcpus_common_state() {
    let vm = Vm::new("translations").start();
    let (mut qmp, mut agent) = (vm.qmp(), vm.agent());
    let ram = preflight::check(&mut qmp, Some(&mut agent), "a", vm.directory()).expect("accepted").ram;
    qmp.cont().expect("cont");
    vm.wait_for_console(READY);
    let file = StateFile::create(vm.directory(), "translations").expect("state file");
    let mut state = Vec::new();
    let mut load = |qmp: &mut Qmp, agent: &mut AgentClient, is_whole: bool| {
        qmp.stop().expect("stop");
        qmp.save_devices_state(file.path()).expect("save");
        file.read_into(&mut state).expect("read");
        let divided = device_state::divide(&state).expect("a vCPU's common state");
        if !is_whole {
            file.write(&divided.rest).expect("write");
        }
        agent.register_yank().expect("yank");
        qmp.load_devices_state(file.path()).expect("load");
        qmp.cont().expect("cont");
        divided.vcpus
    };
    let before = jit(&mut qmp, FLUSHES);
    load(&mut qmp, &mut agent, true);
    until("all translations to be forgotten", || (jit(&mut qmp, FLUSHES) > before).then_some(()));
    let before = jit(&mut qmp, FLUSHES);
    let vcpus = load(&mut qmp, &mut agent, false);
    assert_eq!(vcpus.keys().copied().collect::<Vec<_>>(), [0]);
    let clocks = agent.clocks().expect("clocks");
    clocks.set_period_us(DEFAULT_PERIOD_US);
    let (start, sequence) = cpu_ns(&clocks, 0);
    until("the guest to work", || (cpu_ns(&clocks, sequence).0 > start).then_some(()));
    assert_eq!(jit(&mut qmp, FLUSHES), before);

    // The vCPU is what it is said to be, and becomes what it is told; QEMU's own saving says so.
    qmp.stop().expect("stop");
    let mut vcpu = |qmp: &mut Qmp| {
        qmp.save_devices_state(file.path()).expect("save");
        file.read_into(&mut state).expect("read");
        device_state::divide(&state).expect("a vCPU's common state").vcpus[&0]
    };
    let was = vcpu(&mut qmp);
    let becomes = VcpuCommon { halted: !was.halted, interrupts: was.interrupts ^ 0x10 };
    let wrong = VcpuChange { index: 0, was: becomes, becomes: was };
    assert!(agent.change_vcpus(&[wrong]).is_err() && agent.change_vcpus(&[VcpuChange { index: 1, ..wrong }]).is_err());
    assert_eq!(vcpu(&mut qmp), was);
    agent.change_vcpus(&[VcpuChange { index: 0, was, becomes }]).expect("changed");
    assert_eq!(vcpu(&mut qmp), becomes);
    agent.change_vcpus(&[wrong]).expect("changed back");

    // What was written is translated again, and nothing else is.
    let whole = &ram.ranges[0].addresses;
    let before = jit(&mut qmp, INVALIDATED);
    let outside = WrittenRange { address: whole.end, bytes: 4096 };
    assert!(agent.tell_written(&[outside]).is_err() && jit(&mut qmp, INVALIDATED) == before);
    let all = WrittenRange { address: whole.start, bytes: whole.end - whole.start };
    assert!(agent.tell_written(&[all]).expect("told"));
    let invalidated = jit(&mut qmp, INVALIDATED) - before;
    assert!(
        invalidated > 100,
        "{invalidated} translations of a running kernel\n{}",
        qmp.hmp("info jit").expect("info jit")
    );
    qmp.cont().expect("cont");
    let (start, sequence) = cpu_ns(&clocks, sequence);
    until("the guest to work again", || (cpu_ns(&clocks, sequence).0 > start).then_some(()));
}

/// One row per step of a cycle.
fn print_times(times_us: &[[u128; 5]]) {
    for (index, step) in ["stop", "save", "read", "load", "cont"].iter().enumerate() {
        let mut column: Vec<_> = times_us.iter().map(|times| times[index]).collect();
        column.sort_unstable();
        println!("{step}: median {} µs, longest {} µs", column[10], column[19]);
    }
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_userfaultfd_of_the_agent_acts_on_qemus_memory() {
    let vm = Vm::new("uffd").start();
    let (mut qmp, mut agent) = (vm.qmp(), vm.agent());
    let ram = ram::locate(&mut qmp).expect("RAM");
    let uffd = agent.take_userfaultfd().expect("userfaultfd");
    // linux/userfaultfd.h: UFFD_API, features, ioctls; features asks for WP_HUGETLBFS_SHMEM and WP_ASYNC.
    let mut api: [u64; 3] = [0xAA, (1 << 12) | (1 << 15), 0];
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    // SAFETY: UFFDIO_API reads and writes exactly these 24 bytes.
    let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
    assert_eq!(done, 0);
    for range in &ram.ranges {
        let mut register: [u64; 4] = [range.addresses.start, range.addresses.end - range.addresses.start, 2, 0];
        const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
        // SAFETY: UFFDIO_REGISTER reads and writes exactly these 32 bytes.
        let done = unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr()) };
        assert_eq!(done, 0);
    }
    // Registered in QEMU's address space, not in this one: its smaps say so (uw: userfaultfd write tracking).
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).expect("smaps");
    let start = format!("{:x}-", ram.ranges[0].addresses.start);
    let flags = smaps.split_once(&start).and_then(|(_, rest)| rest.split_once("VmFlags:")).expect("flags").1;
    let flags = flags.lines().next().unwrap_or("");
    assert!(flags.contains(" uw"), "{flags}");
    assert_eq!(ram::locate(&mut qmp).expect("RAM again").ranges, ram.ranges);
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn children_of_qemu_do_not_inherit_the_agent() {
    let vm = Vm::new("children")
        .replace("vhost-user,id=plover-net0,chardev=plover-net0,queues=1", "user,id=plover-net0")
        .replace("tx_queue_size=1024", "tx_queue_size=256")
        .start();
    let output = vm.directory().join("environment");
    // QEMU runs a child of its own for exec: migration; what the child says lands in the file.
    let target = format!("exec:env > {0}.new; mv {0}.new {0}; cat > /dev/null", output.display());
    vm.qmp().execute("migrate", serde_json::json!({"uri": target})).expect("migrate");
    let environment = until("the child's environment", || std::fs::read_to_string(&output).ok());
    assert!(environment.contains("PATH="), "{environment}");
    assert!(!environment.contains("LD_PRELOAD") && !environment.contains("PLOVER_AGENT"), "{environment}");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn refused_with_a_remedy_machine_q35() {
    let vm = Vm::new("q35").replace("pc,memory-backend", "q35,memory-backend").start();
    let refusal = refusal(&vm);
    assert!(matches!(refusal, Refusal::Machine(_)));
    say(&refusal, "-machine pc");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn refused_with_a_remedy_memory_not_shared_or_without_backend() {
    let private = refusal(&Vm::new("private").replace("share=on", "share=off").start());
    assert!(matches!(private, Refusal::Ram(RamError::NotShared(_))));
    say(&private, "share=on");
    let none = refusal(&Vm::new("nobackend").replace("memory-backend=plover-ram,", "").start());
    assert!(matches!(none, Refusal::Ram(_)));
    say(&none, "memory backend");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn refused_with_a_remedy_writable_vga_memory() {
    let refusal = refusal(&Vm::new("vga").user(&["-vga", "std"]).start());
    assert!(matches!(refusal, Refusal::WritableBlocks { .. }));
    say(&refusal, "-nodefaults -vga none");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn refused_with_a_remedy_migration_settings() {
    let description = refusal(&Vm::new("vmdesc").replace(",suppress-vmdesc=on", "").start());
    assert!(matches!(description, Refusal::VmDescription));
    say(&description, "suppress-vmdesc=on");
    let section = refusal(&Vm::new("section").replace("send-configuration=off", "send-configuration=on").start());
    assert!(matches!(section, Refusal::SendConfiguration));
    say(&section, "-global migration.send-configuration=off");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn refused_with_a_remedy_guest_that_announces_itself() {
    let refusal = refusal(&Vm::new("announce").replace("guest_announce=off", "guest_announce=on").start());
    assert!(matches!(refusal, Refusal::GuestAnnounce));
    say(&refusal, "guest_announce=off");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn refused_with_a_remedy_agent_missing_or_in_another_qemu() {
    let (vm, other) = (Vm::new("noagent").without_agent().start(), Vm::new("otheragent").start());
    assert!(AgentClient::connect(&vm.directory().join("agent.sock"), Instant::now()).is_err());
    let mut qmp = vm.qmp();
    let missing = preflight::check(&mut qmp, None, "a", vm.directory()).expect_err("no agent");
    assert!(matches!(missing, Refusal::AgentMissing));
    say(&missing, "LD_PRELOAD");
    let mut agent = other.agent();
    let elsewhere = preflight::check(&mut qmp, Some(&mut agent), "a", vm.directory()).expect_err("another QEMU's");
    assert!(matches!(elsewhere, Refusal::AgentElsewhere { agent_pid, .. } if agent_pid == other.pid()));
    say(&elsewhere, "its own PLOVER_AGENT_SOCKET");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn two_replicas_are_compared_by_what_the_guest_sees() {
    let fingerprint = |replica: &str, vm: &Vm| {
        let (mut qmp, mut agent) = (vm.qmp(), vm.agent());
        preflight::check(&mut qmp, Some(&mut agent), replica, vm.directory()).expect("accepted").fingerprint
    };
    let booted = Vm::new("first").start();
    booted.qmp().cont().expect("cont");
    booted.wait_for_console(READY);
    let first = fingerprint("a", &booted);
    drop(booted);
    // Another directory and so other paths; not booted, so that the BARs are not mapped.
    assert_eq!(compare(&first, &fingerprint("b", &Vm::new("second").start())), Ok(()));
    let device = fingerprint("b", &Vm::new("device").user(&["-device", "virtio-rng-pci"]).start());
    let mismatch = compare(&first, &device).expect_err("a device more");
    println!("{mismatch}");
    assert!(
        matches!(mismatch, Mismatch::Devices { .. })
            && mismatch.to_string().contains("only b has «i440FX-pcihost: dev: virtio-rng-pci")
    );
    let memory = fingerprint("b", &Vm::new("memory").memory(128 << 20).start());
    let mismatch = compare(&first, &memory).expect_err("less RAM");
    assert!(mismatch.to_string().contains("a has 256 MiB, b has 128 MiB"), "{mismatch}");
    let cpu = fingerprint("b", &Vm::new("cpu").user(&["-cpu", "qemu64"]).start());
    let mismatch = compare(&first, &cpu).expect_err("another CPU");
    assert!(mismatch.to_string().contains("only b has «cpu 0: qemu64-x86_64-cpu»"), "{mismatch}");
}

/// Waits for an event through the descriptor, as an owner with a poll loop does.
fn wait_for_event(qmp: &mut Qmp, wanted: impl Fn(&EventKind) -> bool) -> EventKind {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = qmp.take_events().into_iter().map(|event| event.kind).find(&wanted);
        if let Some(kind) = found {
            return kind;
        }
        let mut set = [libc::pollfd { fd: qmp.poll_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 }];
        // SAFETY: one pollfd, valid for the call.
        unsafe { libc::poll(set.as_mut_ptr(), 1, 1000) };
        assert!(Instant::now() < deadline, "the event did not come");
        qmp.poll_events().expect("events");
    }
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_reset_and_a_power_off_from_inside_are_seen_while_idle() {
    let vm = Vm::new("events").service("redis", "rdinit=/bin/busybox -- poweroff -f").user(&["-no-shutdown"]).start();
    let mut qmp = vm.qmp();
    qmp.execute("system_reset", serde_json::Value::Null).expect("reset");
    let reset = wait_for_event(&mut qmp, |kind| matches!(kind, EventKind::Reset { .. }));
    assert_eq!(reset, EventKind::Reset { guest: false, reason: "host-qmp-system-reset".into() });
    qmp.cont().expect("cont");
    let shutdown = wait_for_event(&mut qmp, |kind| matches!(kind, EventKind::Shutdown { .. }));
    assert_eq!(shutdown, EventKind::Shutdown { guest: true, reason: "guest-shutdown".into() });
    assert_eq!(qmp.query_status().expect("status"), RunState::Shutdown);
    qmp.quit().expect("quit");
    let error = until("the end", || qmp.query_status().err());
    assert!(error.is_disconnected(), "{error}");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn the_printed_command_starts_the_same_vm() {
    let vm = Vm::new("shell with 'blank").start_by_shell();
    let (mut qmp, mut agent) = (vm.qmp(), vm.agent());
    assert!(agent.hello().expect("hello").has_yank, "sh passed the agent on to QEMU");
    assert_eq!(qmp.peer_pid().expect("pid"), vm.pid());
    preflight::check(&mut qmp, Some(&mut agent), "a", vm.directory()).expect("accepted");
}

#[test]
fn a_missing_socket_is_waited_for_until_the_deadline_only() {
    let started = Instant::now();
    let deadline = started + Duration::from_millis(50);
    assert!(Qmp::connect(Path::new("/nonexistent/qmp.sock"), deadline).is_err());
    assert!(started.elapsed() >= Duration::from_millis(50));
}
