//! The end of a run: all faults cease, everybody is back. If any replica may lead, somebody must.

use super::chaos::propose_input;
use super::cluster::{Cluster, GENESIS_LEADER, Node, REPLICAS, Weather};
use crate::effects::Event;
use crate::entry::Base;
use crate::ids::{ReplicaId, Viewstamp};

const ROUND_US: u64 = 10_000;
/// Twenty failure timeouts: several elections, a rejoin and the catching up of a wiped disk fit in.
const ROUNDS: u64 = 200;

fn everybody() -> impl Iterator<Item = ReplicaId> {
    (0..REPLICAS).map(ReplicaId)
}

fn leader(cluster: &Cluster) -> Option<ReplicaId> {
    everybody().find(|id| cluster.replica(*id).is_some_and(|replica| replica.leading().is_some()))
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
    if cluster.nodes.iter().any(|node| node.guest.is_some()) {
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
        cluster.drive_products();
    }
    done(cluster)
}

/// Returns whether a cold start was needed.
pub(super) fn play(cluster: &mut Cluster) -> Result<bool, String> {
    cluster.note(|| "all faults end".to_owned());
    cluster.weather = Weather::fair();
    for id in everybody() {
        if cluster.replica(id).is_none() {
            cluster.start(id);
        }
        cluster.announce_link(id, true);
    }
    // An old leader that was cut off learns so first.
    for _ in 0..ROUNDS / 4 {
        cluster.run_until(cluster.now_us + ROUND_US);
        cluster.drive_products();
    }
    let mut cold_start = false;
    if !wait(cluster, |cluster| leader(cluster).is_some()) {
        let Some((last, roles)) = best_log(cluster) else {
            return Ok(false);
        };
        let able = |node: &&Node| node.guest.is_some() && !node.wiped && is_named(node.id, last, &roles);
        if let Some(able) = cluster.nodes.iter().find(able) {
            return Err(format!("liveness: {} is named and has a guest, and nobody leads", able.id));
        }
        for node in &mut cluster.nodes {
            // A guest that the log does not name is of no use any more.
            node.guest = None;
        }
        if !cold_start_if_lost(cluster) {
            return Ok(true); // The only replicas that may lead lost disk and guest: the service is gone (R13).
        }
        cold_start = true;
        if !wait(cluster, |cluster| leader(cluster).is_some()) {
            return Err("liveness: a cold start was allowed, and nobody leads".to_owned());
        }
    }
    let before = cluster.checker.committed();
    if let Some(id) = leader(cluster) {
        propose_input(cluster, id);
    }
    let settled = |cluster: &Cluster| {
        let commits = everybody().map(|id| cluster.replica(id).map(|replica| replica.commit_index().0));
        cluster.checker.committed() > before
            && commits.min().flatten() > Some(before)
            && cluster.nodes.iter().all(|node| !node.wiped)
            && leader(cluster).and_then(|id| cluster.replica(id)?.second()).is_some()
    };
    if wait(cluster, settled) {
        Ok(cold_start)
    } else {
        Err("liveness: a leader leads, yet not everybody commits its entry, votes, and has a secondary".to_owned())
    }
}
