//! Daemons that are not run for a while: the leader lives, so it must stay the leader.
//!
//! A host that is short of CPU, a hypervisor that takes a whole machine's time, and a stop by a debugger look alike from
//! inside: the clock has jumped, and what the others said meanwhile waits in the sockets or was never said. Here daemons are
//! stopped by signal, which is the same and can be had when wanted. Their reactors poll without a rest, so that it meets them
//! amid their work, and five busy processes share the cores of a test run.

use std::time::{Duration, Instant};

use rig::client::protocol::{Job, LoadParameters, Report};
use rig::cluster::DAEMON;
use rig::fault::Fault;
use rig::guest::BOOT_LIMIT_SECS;
use rig::scenario::{Checker, Roles, on_cluster, wait_whole};
use rig::{Cluster, Deadline, Host, Service};
use serde_json::Value;

const STARTED: Duration = Duration::from_secs(30);
const LOAD: Duration = Duration::from_secs(20);
const ROUNDS: usize = 12;
/// Much less than the failure timeout.
const WAKES_APART: Duration = Duration::from_millis(8);
/// Between two pauses, so that they meet the daemons at different work.
const BETWEEN_MS: u64 = 700;

/// Reactors that never rest, so that a stop comes amid their work.
const POLLING: &str = "idle = \"adaptive\"\nspin_us = 1000000\nscheduling = \"normal\"\n";

/// Runs a checking load, and `disturb` while it is on.
fn under_load(cluster: &Cluster, disturb: impl FnOnce()) {
    let job = Job::RedisLoad(LoadParameters {
        address: cluster.address(),
        connections: 64,
        in_flight: 16,
        duration_ms: LOAD.as_millis() as u64,
        ..LoadParameters::default()
    });
    let mut checker = Checker::start(cluster.bed().client(), &job).unwrap();
    checker.client().wait_started(STARTED).unwrap();
    disturb();
    let Report::RedisLoad(report) = checker.finish().unwrap() else { panic!("another report") };
    assert_eq!((report.acknowledged_writes_lost, report.wrong_reads, report.errors), (0, 0, 0));
    println!("{:.0} operations/s, longest gap {:.0} ms", report.ops_per_s, report.gap_ms);
}

/// Stops the daemons of `hosts` together, again and again.
fn pause_often(hosts: &[&Host], pauses_ms: &[u64]) {
    let began = Instant::now();
    for round in 0..ROUNDS {
        let daemon = |host: &&Host| host.process(DAEMON).expect("it was started").frozen().unwrap();
        let frozen: Vec<Fault> = hosts.iter().map(daemon).collect();
        std::thread::sleep(Duration::from_millis(pauses_ms[round % pauses_ms.len()]));
        // The first again is the last that was stopped: whoever judges early meets others who have not said anything yet.
        for fault in frozen.into_iter().rev() {
            fault.undo().unwrap();
            std::thread::sleep(WAKES_APART);
        }
        // Not in step with anything that has a period.
        std::thread::sleep(Duration::from_millis(BETWEEN_MS + 37 * (round as u64 % 5)));
    }
    println!("{ROUNDS} pauses in {:?}", began.elapsed());
}

/// While the daemons of these hosts are paused again and again, for longer than the failure timeout (100 ms), the leader
/// stays; `at_end` sees what it says then.
fn with_paused(who: fn(&Roles) -> Vec<&Host>, pauses_ms: &[u64], at_end: impl FnOnce(&Roles, &Value)) {
    let test = |cluster: &Cluster| {
        let (client, boot) = (cluster.bed().client(), Deadline::after_secs(BOOT_LIMIT_SECS));
        client.wait_for_port(cluster.address(), boot).unwrap_or_else(|error| panic!("{}", cluster.explain(error)));
        // Not before: a guest that boots may need another secondary.
        let roles = wait_whole(cluster, Deadline::after_secs(90)).unwrap();
        let before = cluster.status(&roles.leader).expect("it answers");
        under_load(cluster, || pause_often(&who(&roles), pauses_ms));
        let after = cluster.status(&roles.leader).expect("it answers");
        assert_eq!((&after["role"], &after["view"]), (&before["role"], &before["view"]), "{after}");
        at_end(&roles, &after);
        // Whoever was given up comes back.
        cluster.wait_protected(Deadline::after_secs(60)).unwrap();
    };
    on_cluster(Service::Redis, |options| options.node = POLLING.into(), test).unwrap();
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn followers_that_were_not_run_for_a_while_keep_the_leader() {
    with_paused(|roles| vec![&roles.secondary, &roles.witness], &[120, 180, 250, 400], |_, _| {});
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_machine_that_stood_still_with_all_replicas_keeps_the_leader() {
    with_paused(
        |roles| vec![&roles.leader, &roles.secondary, &roles.witness],
        // Less than the deadlines within a syncvm, the shortest of which is 1.5 s: a guest that must stop and does not is given up.
        &[120, 180, 400, 900],
        |roles, after| {
            assert_eq!(
                (&after["protected"], &after["secondary"]),
                (&true.into(), &roles.secondary.name().into()),
                "{after}"
            );
        },
    );
}
