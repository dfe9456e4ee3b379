//! The end of a run (I7). All faults cease and everybody is back: if any replica may lead, somebody must, and the
//! group must become whole. Replicas that are not run for a while change nothing about who leads (R18). Then one fault comes
//! to stay, and the group must go on.

use super::chaos::{absence_us, propose_input};
use super::cluster::{Cluster, GENESIS_LEADER, Node, REPLICAS};
use super::network::Weather;
use crate::effects::Event;
use crate::entry::Base;
use crate::ids::{ReplicaId, Viewstamp};

const ROUND_US: u64 = 10_000;
/// Twenty failure timeouts: several elections, a rejoin and the catching up of a wiped disk fit in.
const ROUNDS: u64 = 200;
/// Ten failure timeouts with a fault that stays: notice it, elect or drop, and commit.
const FAULT_ROUNDS: u64 = 100;
/// Inputs that must be committed by then: more than a dead secondary may be behind.
const FAULT_INPUTS: u64 = 60;
/// How often replicas are not run for a while, and how long each lasts together with what follows.
const STARVATIONS: u64 = 2;
const STARVATION_ROUNDS: u64 = 60;
/// With a heartbeat's interval before it and what messages take, less than the failure timeout.
const SHORT_ABSENCE_US: u64 = 70_000;
/// After a pause of the whole machine, all of its processes run again within this time.
const WAKES_WITHIN_US: u64 = 20_000;

fn everybody() -> impl Iterator<Item = ReplicaId> {
    (0..REPLICAS).map(ReplicaId)
}

fn leader(cluster: &Cluster) -> Option<ReplicaId> {
    everybody().find(|id| cluster.nodes[id.slot()].leading().is_some())
}

/// The newest log of the group, and the roles by it.
fn best_log(cluster: &Cluster) -> Option<(Viewstamp, Base)> {
    cluster
        .nodes
        .iter()
        .filter_map(|node| node.replica.as_ref())
        .map(|replica| replica.tail())
        .max_by_key(|(last, _)| *last)
}

fn is_named(id: ReplicaId, last: Viewstamp, roles: &Base) -> bool {
    if last.index.0 == 0 { id == GENESIS_LEADER } else { roles.second == Some(id) || roles.leader == Some(id) }
}

/// The operator sees that no guest is left and allows a cold start where the newest log in sight names one.
/// Returns whether there is one.
pub(super) fn cold_start_if_lost(cluster: &mut Cluster) -> bool {
    if cluster.nodes.iter().any(|node| node.guest.is_some() || node.orphan.is_some()) {
        return false;
    }
    let Some((last, roles)) = best_log(cluster) else {
        return false;
    };
    let able = everybody()
        .find(|id| cluster.replica(*id).is_some_and(|replica| !replica.is_learner()) && is_named(*id, last, &roles));
    if let Some(id) = able {
        cluster.note(|| format!("the operator allows {id} a cold start"));
        cluster.nodes[id.slot()].cold_start = true;
        cluster.step(id, Event::AllowColdStart);
    }
    able.is_some()
}

/// Waits until `done`; false if it never is.
fn wait(cluster: &mut Cluster, done: impl Fn(&Cluster) -> bool) -> bool {
    for _ in 0..ROUNDS {
        if cluster.violation.is_some() || done(cluster) {
            break;
        }
        cluster.run_until(cluster.now_us + ROUND_US);
    }
    done(cluster)
}

/// Returns whether the group is whole in the end. It cannot be when the only replicas that may lead lost disk and
/// guest: then the service is gone (R13).
pub(super) fn play(cluster: &mut Cluster) -> Result<bool, String> {
    calm(cluster);
    if !wait(cluster, |cluster| leader(cluster).is_some()) && !find_leader(cluster)? {
        return Ok(false);
    }
    let before = cluster.checker.committed();
    if let Some(id) = leader(cluster) {
        propose_input(cluster, id, 0);
    }
    let settled = |cluster: &Cluster| {
        let commits = everybody().map(|id| cluster.replica(id).map(|replica| replica.commit_index().0));
        cluster.checker.committed() > before
            && commits.min().flatten() > Some(before)
            && cluster.nodes.iter().all(|node| node.lost.is_none())
            && has_whole_secondary(cluster)
    };
    if wait(cluster, settled) {
        Ok(true)
    } else {
        Err("I7: a leader leads, yet not everybody commits its entry, votes, and has a secondary".to_owned())
    }
}

/// Somebody leads, and the secondary's guest has consumed what is committed but for the last few entries.
fn has_whole_secondary(cluster: &Cluster) -> bool {
    let second = leader(cluster).and_then(|id| cluster.replica(id)?.second());
    second.map(|second| &cluster.nodes[second.slot()]).is_some_and(|node| {
        node.guest.is_some() && node.leading().is_none() && node.consumed.0 + 4 >= cluster.checker.committed()
    })
}

/// Ends all faults, and gives an old leader that was cut off the time to learn that it is one.
fn calm(cluster: &mut Cluster) {
    cluster.note(|| "all faults end".to_owned());
    (cluster.weather, cluster.ambush) = (Weather::fair(), None);
    for node in &mut cluster.nodes {
        (node.disk.full, node.disk.failed) = (false, false);
        (node.disk.slow_until_us, node.sluggish_until_us, node.absent_until_us) = (0, 0, 0);
    }
    for id in everybody() {
        if cluster.replica(id).is_none() {
            cluster.start(id);
        }
        cluster.announce_link(id, true);
    }
    cluster.run_until(cluster.now_us + ROUNDS / 4 * ROUND_US);
}

/// Nobody leads: that must be for want of a guest. The operator allows a fresh one.
fn find_leader(cluster: &mut Cluster) -> Result<bool, String> {
    let Some((last, roles)) = best_log(cluster) else {
        return Ok(false);
    };
    let able = |node: &&Node| node.guest.is_some() && node.lost.is_none() && is_named(node.id, last, &roles);
    if let Some(able) = cluster.nodes.iter().find(able) {
        return Err(format!("I7: {} is named and has a guest, and nobody leads", able.id));
    }
    for node in &mut cluster.nodes {
        // A guest that the log does not name is of no use any more.
        (node.guest, node.orphan) = (None, None);
    }
    if !cold_start_if_lost(cluster) {
        return Ok(false);
    }
    cluster.counts.cold_starts += 1;
    if wait(cluster, |cluster| leader(cluster).is_some()) {
        Ok(true)
    } else {
        Err("I7: a cold start was allowed, and nobody leads".to_owned())
    }
}

/// Replicas of a group that is whole are not run for a while, again and again: the followers, all at once, or the leader for
/// less than its peers allow it. Returns whether the group is whole afterwards.
pub(super) fn play_starvation(cluster: &mut Cluster) -> Result<bool, String> {
    let Some(chief) = leader(cluster) else { return Ok(false) };
    let view = cluster.nodes[chief.slot()].leading();
    for _ in 0..STARVATIONS {
        starve_some(cluster, chief);
        for _ in 0..STARVATION_ROUNDS {
            cluster.run_until(cluster.now_us + ROUND_US);
            if cluster.violation.is_some() {
                return Ok(false);
            }
            let moved = everybody().find(|id| cluster.replica(*id).map(|replica| replica.view()) != view);
            if let Some(id) = moved {
                return Err(format!(
                    "R18: {id} left the view of {chief}, which lives; replicas were only not run for a while"
                ));
            }
            if !cluster.nodes[chief.slot()].is_absent(cluster.now_us) {
                propose_input(cluster, chief, 0);
            }
        }
    }
    // A secondary that was silent for too long is given up, and comes back.
    play(cluster)
}

fn starve_some(cluster: &mut Cluster, chief: ReplicaId) {
    let kind = cluster.rng.below(4);
    let together_us = absence_us(cluster);
    for id in everybody() {
        let own_us = absence_us(cluster);
        let for_us = match kind {
            0 => Some(SHORT_ABSENCE_US).filter(|_| id == chief),
            1 => Some(own_us).filter(|_| id != chief),
            2 => Some(own_us).filter(|_| id.slot() == (chief.slot() + 1 + (own_us % 2) as usize) % 3),
            // Whoever is run first again hears nothing yet.
            _ => Some(together_us + own_us % WAKES_WITHIN_US),
        };
        if let Some(for_us) = for_us {
            cluster.starve(id, for_us);
        }
    }
}

/// One fault comes to a group that is whole, and stays.
pub(super) fn play_single_fault(cluster: &mut Cluster) -> Result<(), String> {
    let (a, b) = (cluster.rng.below(3) as usize, cluster.rng.below(2) as usize);
    let (one, other) = (ReplicaId(a as u8), ReplicaId(((a + 1 + b) % 3) as u8));
    let fault = match cluster.rng.below(4) {
        0 | 1 => {
            cluster.crash(one);
            if cluster.rng.chance(500) {
                cluster.announce_link(one, false);
            }
            format!("{one} is down")
        }
        2 => {
            cluster.weather.blocked[one.slot()][other.slot()] = true;
            format!("{one} -> {other} is cut")
        }
        _ => {
            cluster.weather.blocked[one.slot()][other.slot()] = true;
            cluster.weather.blocked[other.slot()][one.slot()] = true;
            format!("{one} <-> {other} is cut")
        }
    };
    cluster.note(|| format!("{fault}, for good"));
    let (before, reigns, cut) = (cluster.checker.inputs, cluster.counts.reigns, !fault.ends_with("down"));
    for _ in 0..FAULT_ROUNDS {
        cluster.run_until(cluster.now_us + ROUND_US);
        if cut && cluster.counts.reigns > reigns {
            return Err(format!("R3: {fault}, and the lead changes though its leader lives and reaches a majority"));
        }
        if cluster.violation.is_some() || cluster.checker.inputs >= before + FAULT_INPUTS {
            return Ok(());
        }
        for id in everybody() {
            if cluster.nodes[id.slot()].leading().is_some() {
                propose_input(cluster, id, 0);
                propose_input(cluster, id, 0);
            }
        }
    }
    let done = cluster.checker.inputs - before;
    Err(format!("I7: {fault}, and the group commits {done} inputs in {} ms", FAULT_ROUNDS * ROUND_US / 1000))
}
