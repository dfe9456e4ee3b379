//! Every state that three replicas can reach within small bounds, explored with stateright: I1 and I6 hold in all.
//!
//! The replicas are the real ones. Around them: a network that delivers what it holds in any order, twice, or never; disks
//! that lose what is not durable; timeouts, broken connections, crashes, proposals, changes of the
//! secondary and hand-overs at any moment. What could go on for ever has a budget, and a budget is what a
//! test here is about. The simulator (`simulation.rs`) goes much further along single paths; this goes along all of
//! them for a few steps, so that no interleaving of a single view change is left to luck.
//!
//! Not explored: how a group forms, truncation and jumps, wiped disks. They are the simulator's.
//!
//! `PLOVER_EXPLORE=large` widens the budgets from seconds to minutes. Rejected: stateright's actor framework, whose actors own
//! their timers and storage, which here are the replica's and the disk's.

mod envelope;
mod host;
mod ledger;
mod model;

use std::time::{Duration, Instant};

use model::{Budget, Group, I1, I6, Mutant};
use stateright::{Checker, HasDiscoveries, Model};

/// More than the largest exploration takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(1800);

fn large() -> bool {
    std::env::var("PLOVER_EXPLORE").is_ok_and(|size| size == "large")
}

/// Explores everything. Fewer than `least` states mean that a bound cuts off what the test is for.
fn explore(name: &str, group: Group, least: usize) {
    let start = Instant::now();
    let checker = group.checker().threads(if large() { 2 } else { 1 }).timeout(DEADLINE).spawn_dfs().join();
    let states = checker.unique_state_count();
    println!("{name}: {states} states, the deepest {} steps away, in {:?}", checker.max_depth(), start.elapsed());
    assert!(start.elapsed() < DEADLINE, "{name}: not everything was explored within {DEADLINE:?}");
    checker.assert_properties();
    assert!(states >= least, "{name}: {states} states are too few to mean anything");
}

const NOTHING: Budget = Budget { inputs: 0, timeouts: 0, breaks: 0, crashes: 0, seconds: 0, hand_overs: 0 };

#[test]
fn a_crash_during_a_view_change() {
    let breaks = if large() { 2 } else { 1 };
    let budget = Budget { inputs: 1, breaks, crashes: 1, ..NOTHING };
    explore("crash", Group { budget, slow_disks: true, duplication: true, mutant: Mutant::None }, 10_000);
}

#[test]
fn view_after_view() {
    let (inputs, breaks) = if large() { (2, 2) } else { (1, 3) };
    let budget = Budget { inputs, breaks, ..NOTHING };
    explore("views", Group { budget, slow_disks: false, duplication: false, mutant: Mutant::None }, 10_000);
}

#[test]
fn timeouts_at_any_moment() {
    let inputs = if large() { 1 } else { 0 };
    let budget = Budget { inputs, timeouts: 2, ..NOTHING };
    explore("timeouts", Group { budget, slow_disks: false, duplication: !large(), mutant: Mutant::None }, 10_000);
}

#[test]
fn inputs_in_flight() {
    let budget = Budget { inputs: 2, ..NOTHING };
    explore("inputs", Group { budget, slow_disks: true, duplication: large(), mutant: Mutant::None }, 10_000);
}

#[test]
fn a_secondary_that_is_dropped() {
    let budget = Budget { seconds: 1, breaks: 2, ..NOTHING };
    explore("dropped", Group { budget, slow_disks: large(), duplication: false, mutant: Mutant::None }, 5_000);
}

#[test]
fn another_secondary() {
    let budget = Budget { seconds: 2, breaks: 1, ..NOTHING };
    explore("seconds", Group { budget, slow_disks: large(), duplication: false, mutant: Mutant::None }, 10_000);
}

#[test]
fn a_hand_over() {
    let crashes = if large() { 1 } else { 0 };
    let budget = Budget { inputs: 1, hand_overs: 1, breaks: 1, crashes, ..NOTHING };
    explore("hand-over", Group { budget, slow_disks: large(), duplication: false, mutant: Mutant::None }, 10_000);
}

/// The shortest way to break an invariant, found by an exploration that ends there.
#[track_caller]
fn assert_breaks(group: Group, property: &'static str) {
    let only = HasDiscoveries::AnyOf([property].into());
    let checker = group.checker().finish_when(only).timeout(DEADLINE).spawn_bfs().join();
    let path = checker.discovery(property).expect("the explorer does not notice the mistake");
    println!("{property}, broken after {} states:", checker.unique_state_count());
    path.into_actions().iter().for_each(|action| println!("  {action:?}"));
}

#[test]
fn a_disk_that_acknowledges_early_is_noticed() {
    let budget = Budget { inputs: 1, breaks: 1, crashes: 1, ..NOTHING };
    let group = Group { budget, slow_disks: true, duplication: false, mutant: Mutant::AckBeforePersist };
    assert_breaks(group, I1);
}

#[test]
fn a_guest_that_is_not_there_is_noticed() {
    let budget = Budget { crashes: 1, ..NOTHING };
    let group = Group { budget, slow_disks: true, duplication: false, mutant: Mutant::IntactAfterRestart };
    assert_breaks(group, I6);
}
