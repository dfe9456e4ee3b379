//! Random faults in sequence under a checking load, from a seed.
//!
//! `PLOVER_CHAOS_SEED` (decimal) chooses the faults, `PLOVER_CHAOS_FAULTS` how many; without them a fixed seed and 20. A failed
//! run prints both, and the same two variables do the same faults again.

use std::time::Duration;

use rig::chaos::{ACTIONS, FOLLOWER_PHASES, Kind, LEADER_PHASES, Role, Step, carry_out, plan};
use rig::scenario::Scenario;
use rig::{Cluster, ClusterOptions, Service, Testbed, program};

const SEED: u64 = 2018;
const FAULTS: usize = 20;

fn from_environment<T: std::str::FromStr>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => default,
    }
}

fn run(seed: u64, steps: &[Step]) {
    let bed = Testbed::new().unwrap();
    let programs = program("plover").unwrap().parent().unwrap().to_owned();
    let mut options = ClusterOptions::new(Service::Redis, programs);
    options.data_disk_mib = Some(1024);
    let cluster = Cluster::new(&bed, options).unwrap();
    cluster.start_all().unwrap();
    let mut scenario = Scenario::start(&cluster, seed).unwrap();
    for step in steps {
        if let Err(error) = carry_out(&mut scenario, step) {
            panic!("seed {seed}, step {step}: {error}");
        }
    }
    let verdict = scenario.finish().unwrap();
    println!("{}", verdict.table());
    verdict.assert_flawless();
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn random_faults_lose_nothing() {
    let seed = from_environment("PLOVER_CHAOS_SEED", SEED);
    let faults = from_environment("PLOVER_CHAOS_FAULTS", FAULTS);
    println!("again: PLOVER_CHAOS_SEED={seed} PLOVER_CHAOS_FAULTS={faults}");
    run(seed, &plan(seed, faults));
}

/// Every point of an exchange is the last one once; what dies there takes turns.
#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_host_may_die_in_any_phase_of_a_syncvm() {
    let leaders = LEADER_PHASES.map(|phase| (Role::Leader, phase));
    let followers = FOLLOWER_PHASES.map(|phase| (Role::Secondary, phase));
    let points = leaders.into_iter().chain(followers);
    let steps: Vec<Step> = points
        .zip(ACTIONS.into_iter().cycle())
        .enumerate()
        .map(|(before, ((role, phase), action))| Step {
            number: before + 1,
            role,
            kind: Kind::CrashPoint { phase, action },
            hold: Duration::ZERO,
        })
        .collect();
    run(SEED, &steps);
}
