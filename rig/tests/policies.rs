//! The policies of syncvm other than the default: a guest under each loses its leader, and nobody notices more than
//! time.

use std::time::Duration;

use rig::cluster::{DAEMON, QEMU, VM};
use rig::scenario::{Expect, Roles, Scenario, on_cluster, wait_whole};
use rig::{Cluster, Deadline, Fault, Host, Result, Service, wait_until_every};

type Pick = fn(&Roles) -> &Host;
const LEADER: Pick = |roles| &roles.leader;
const SECONDARY: Pick = |roles| &roles.secondary;
const LOOK: Duration = Duration::from_millis(50);
const BRIEF: Duration = Duration::from_millis(300);
/// A guest that starts from the last syncvm does again what it did since; its clients wait for that.
const LONGEST_GAP_MS: f64 = 2_500.0;

fn with_policy(policy: &str, test: impl FnOnce(&Cluster)) {
    on_cluster(Service::Redis, |options| options.policy = policy.to_owned(), test).unwrap();
}

fn survives_its_leaders(cluster: &Cluster, shown: &str, secondary_runs: bool) {
    let mut scenario = Scenario::start(cluster, 11).unwrap();
    let strike = |cluster: &Cluster, roles: &Roles| -> Result<Vec<Fault>> {
        let leader = cluster.ask(&roles.leader, &["status", VM])?;
        println!("{leader}");
        assert!(leader.contains(shown), "{shown:?} is not in:\n{leader}");
        let secondary = cluster.status(&roles.secondary).expect("its daemon answers");
        assert_eq!(secondary["guest"], if secondary_runs { "running" } else { "stopped" }, "{secondary}");
        Ok(vec![roles.leader.crash()?])
    };
    let mut taken_over = 0;
    for round in 1..=2 {
        scenario
            .survive(&format!("{shown}: leader's host killed, {round}"), Expect::Moves, BRIEF, strike)
            .unwrap_or_else(|error| panic!("{error}"));
        // Its count is lost with the next strike.
        let leader = cluster.wait_leader(Deadline::after_secs(10)).unwrap();
        let status = cluster.status(leader).expect("the leader answers");
        taken_over += status["inputs_taken_over"].as_u64().expect("it is shown");
    }
    println!("{taken_over} inputs delivered at take-over");
    assert_eq!(taken_over > 0, !secondary_runs, "only a guest that stood still has inputs to catch up with");
    // Where what is kept for a take-over is made needless, or is not yet: a host dies there.
    let points: &[(Pick, &str, Expect)] = match secondary_runs {
        true => &[],
        false => &[(LEADER, "leader-sent-half", Expect::Moves), (SECONDARY, "follower-acked", Expect::Stays)],
    };
    for (host, phase, expect) in points {
        let strike = |cluster: &Cluster, roles: &Roles| -> Result<Vec<Fault>> {
            cluster.ask(host(roles), &["crash-point", VM, phase, "kill-both"]).map(|_| Vec::new())
        };
        let survived = scenario.survive(&format!("{shown}: dies at {phase}"), *expect, BRIEF, strike);
        survived.unwrap_or_else(|error| panic!("{error}"));
    }
    let hand_over = |cluster: &Cluster, roles: &Roles| -> Result<Vec<Fault>> {
        cluster.ask(&roles.leader, &["failover", VM]).map(|_| Vec::new())
    };
    scenario.survive("plover failover", Expect::Moves, BRIEF, hand_over).unwrap_or_else(|error| panic!("{error}"));
    // Its count began when it came to lead, a moment ago.
    let slot_ends = || {
        let leader = cluster.wait_leader(Deadline::after_secs(1)).ok()?;
        let ends = cluster.status(leader)?["totals"]["slot_ends"].clone();
        (ends["interval"].as_u64()? > 5).then_some(ends)
    };
    let slot_ends = wait_until_every(LOOK, Deadline::after_secs(10), "slots of the new leader", slot_ends);
    let slot_ends = slot_ends.unwrap_or_else(|error| panic!("{}", cluster.explain(error)));
    assert!(slot_ends["idle"].is_null(), "{slot_ends}");
    let verdict = scenario.finish().unwrap();
    println!("{}", verdict.table());
    verdict.assert_flawless();
    assert!(verdict.load.gap_ms < LONGEST_GAP_MS, "clients had no answer for {} ms", verdict.load.gap_ms);
}

/// A QEMU that never ran, but was given a leader's state, is no guest that waits to be booted, for its daemon as for the next
/// one: a cold start would go on from an old state, or a mixture, as if it were a new machine.
fn what_a_leader_gave_is_not_booted(cluster: &Cluster) {
    let roles = wait_whole(cluster, Deadline::after_secs(60)).unwrap();
    let host = &roles.witness;
    let guest = || {
        let guest = cluster.status(host)?["guest"].as_str()?.to_owned();
        ["stopped", "prepared"].contains(&guest.as_str()).then_some(guest)
    };
    let refused = || cluster.ask(host, &["cold-start", VM]).expect_err("refused").to_string();
    assert_eq!(guest().as_deref(), Some("prepared"), "it has been the witness since its QEMU started");

    let leader = roles.leader.process(DAEMON).expect("it was started");
    let starts = leader.starts();
    cluster.ask(&roles.leader, &["crash-point", VM, "leader-round", "kill-both"]).unwrap();
    // Not its host: the others are to see at once that it is gone.
    let _dead = [DAEMON, QEMU].map(|name| roles.secondary.process(name).expect("it was started").killed().unwrap());
    leader.wait_started(starts + 1, Deadline::after_secs(20)).unwrap();
    assert!(refused().contains("restart its QEMU first"), "{}", refused());

    host.process(DAEMON).expect("it was started").kill().unwrap();
    let guest = wait_until_every(LOOK, Deadline::after_secs(10), "its QEMU to be found again", guest);
    assert_eq!(guest.unwrap_or_else(|error| panic!("{}", cluster.explain(error))), "stopped");
    assert!(refused().contains("restart its QEMU first"), "{}", refused());
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn with_checkpoints_the_secondary_stands_still_until_it_leads() {
    with_policy("sync = \"mc\"\n", |cluster| {
        survives_its_leaders(cluster, "mc every 100 ms", false);
        what_a_leader_gave_is_not_booted(cluster);
    });
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn with_a_fixed_interval_both_guests_run() {
    with_policy("sync = \"str\"\ninterval_ms = 40\n", |cluster| {
        survives_its_leaders(cluster, "str every 40 ms", true);
    });
}
