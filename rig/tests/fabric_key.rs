//! The key between the hosts, end to end: a host with another one stays out and says so, and a key is changed node by node
//! as the manual says, while the guest serves.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rig::cluster::{DAEMON, VM};
use rig::scenario::{Expect, Roles, Scenario};
use rig::{Cluster, ClusterOptions, Deadline, Host, Service, Testbed, program, wait_until_every};

const LOOK: Duration = Duration::from_millis(50);
const LIMIT_SECS: u64 = 20;
const BRIEF: Duration = Duration::from_millis(300);

fn cluster(bed: &Testbed) -> Cluster<'_> {
    let programs = program("plover").unwrap().parent().unwrap().to_owned();
    Cluster::new(bed, ClusterOptions::new(Service::Redis, programs)).unwrap()
}

/// A new key at `path`, and its line.
fn keygen(path: &Path) -> String {
    let mut command = Command::new(program("plover").unwrap());
    assert!(command.arg("keygen").arg(path).status().unwrap().success());
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

fn wait_said(cluster: &Cluster, host: &Host, texts: &[&str]) -> String {
    let what = format!("{texts:?} in the status of {}", host.name());
    wait_until_every(LOOK, Deadline::after_secs(LIMIT_SECS), &what, || {
        let said = cluster.ask(host, &["status", VM]).unwrap_or_default();
        texts.iter().all(|text| said.contains(text)).then_some(said)
    })
    .unwrap_or_else(|error| panic!("{}", cluster.explain(error)))
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_host_with_another_key_stays_out_and_both_sides_say_what_to_do() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed);
    let (first, third) = (bed.host(0), bed.host(2));
    let right = std::fs::read_to_string(cluster.key_path(first)).unwrap();
    std::fs::remove_file(cluster.key_path(third)).unwrap();
    keygen(&cluster.key_path(third));
    for host in bed.hosts() {
        cluster.start_daemon(host).unwrap();
    }
    wait_said(&cluster, first, &["h3: NOT connected", "the fabric key differs; copy the same key file"]);
    let daemon = third.process(DAEMON).unwrap();
    let line = daemon.wait_for_line("the fabric key differs", Deadline::after_secs(LIMIT_SECS)).unwrap();
    println!("{line}");
    // From the first or the second: both have the other key.
    let from = |host: &Host| line.contains(&format!("addr={}:", host.ip()));
    assert!(line.contains("WARN") && (from(first) || from(bed.host(1))), "{line}");
    // Mended as both say.
    std::fs::write(cluster.key_path(third), right).unwrap();
    daemon.kill().unwrap();
    wait_until_every(LOOK, Deadline::after_secs(LIMIT_SECS), "the third host connected", || {
        let status = cluster.status(first)?;
        let peers = status["peers"].as_array()?.clone();
        peers.iter().all(|peer| peer["connected"] == true).then_some(())
    })
    .unwrap_or_else(|error| panic!("{}", cluster.explain(error)));
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn the_key_is_changed_node_by_node_while_the_guest_serves() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed);
    cluster.start_all().unwrap();
    let old = std::fs::read_to_string(cluster.key_path(bed.host(0))).unwrap();
    let new = keygen(&bed.host(0).directory().join("new.key"));
    let mut scenario = Scenario::start(&cluster, 11).unwrap();
    for (step, text) in [format!("{old}{new}\n"), format!("{new}\n{old}"), format!("{new}\n")].iter().enumerate() {
        for host in bed.hosts() {
            let mut act =
                |name: &str, expect: Expect, strike: &dyn Fn(&Cluster, &Roles) -> rig::Result<Vec<rig::Fault>>| {
                    let name = format!("{}. step, {}: {name}", step + 1, host.name());
                    scenario.survive(&name, expect, BRIEF, strike).unwrap_or_else(|error| panic!("{error}"));
                };
            if cluster.leader().is_some_and(|leader| leader.name() == host.name()) {
                act("handed over", Expect::Moves, &|cluster, roles| {
                    cluster.ask(&roles.leader, &["failover", VM]).map(|_| Vec::new())
                });
            }
            act("new file, restarted", Expect::Stays, &|cluster, _| {
                std::fs::write(cluster.key_path(host), text).unwrap();
                let daemon = host.process(DAEMON).expect("it was started");
                Ok(vec![daemon.killed()?])
            });
        }
    }
    let verdict = scenario.finish().unwrap();
    println!("{}", verdict.table());
    verdict.assert_flawless();
    for host in bed.hosts() {
        let log = host.process(DAEMON).unwrap().log();
        assert!(!log.contains("the fabric key differs"), "{}: {log}", host.name());
    }
}
