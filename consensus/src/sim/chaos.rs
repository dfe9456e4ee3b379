//! Faults and load drawn from the seed.

use super::cluster::{Cluster, REPLICAS, Weather};
use crate::effects::Event;
use crate::entry::{Entry, Payload};
use crate::ids::ReplicaId;

/// How a run misbehaves; drawn once per seed, so that some seeds are calm and some are brutal.
#[derive(Debug)]
pub(super) struct Temper {
    pub(super) crash: u64,
    restart: u64,
    partition: u64,
    heal: u64,
    handover: u64,
    guest_death: u64,
    wipe: u64,
    proposals: u64,
}

impl Temper {
    pub(super) fn draw(cluster: &mut Cluster) -> Temper {
        let rng = &mut cluster.rng;
        let mut pick = |choices: &[u64]| choices[rng.below(choices.len() as u64) as usize];
        cluster.weather = Weather {
            loss: pick(&[0, 0, 5, 30, 150]),
            duplicate: pick(&[0, 0, 10, 100]),
            delay_us: pick(&[50, 100, 1000]),
            jitter_us: pick(&[0, 100, 3000, 30_000]),
            disk_us: pick(&[20, 200, 2000]),
            disk_jitter_us: pick(&[0, 500, 5000, 40_000]),
            blocked: Default::default(),
        };
        Temper {
            crash: pick(&[0, 4, 15, 40]),
            restart: pick(&[30, 100, 300]),
            partition: pick(&[0, 5, 20, 50]),
            heal: pick(&[20, 80, 300]),
            handover: pick(&[0, 30, 120]),
            guest_death: pick(&[0, 0, 5, 20]),
            wipe: pick(&[0, 0, 300]),
            proposals: pick(&[1, 3, 8]),
        }
    }
}

fn anybody(cluster: &mut Cluster) -> ReplicaId {
    ReplicaId(cluster.rng.below(u64::from(REPLICAS)) as u8)
}

/// One round of load and faults.
pub(super) fn act(cluster: &mut Cluster, temper: &Temper) {
    cluster.drive_products();
    for _ in 0..cluster.rng.below(temper.proposals + 1) {
        let id = anybody(cluster);
        if cluster.replica(id).is_some_and(|replica| replica.leading().is_some()) {
            propose_input(cluster, id);
        }
    }
    if cluster.rng.chance(20) {
        super::finale::cold_start_if_lost(cluster);
    }
    let id = anybody(cluster);
    if cluster.replica(id).is_none() {
        if cluster.rng.chance(temper.restart) {
            cluster.start(id);
            if cluster.rng.chance(500) {
                cluster.announce_link(id, true);
            }
        }
    } else if cluster.rng.chance(temper.crash) {
        crash(cluster, temper, id);
    }
    if cluster.rng.chance(temper.partition) {
        partition(cluster);
    }
    if cluster.rng.chance(temper.heal) {
        cluster.weather.blocked = Default::default();
    }
    if cluster.rng.chance(temper.handover)
        && let Some(to) = cluster.replica(id).and_then(|replica| replica.second())
    {
        cluster.step(id, Event::HandOver { to });
    }
    if cluster.rng.chance(temper.guest_death) && cluster.replica(id).is_some() {
        cluster.note(|| format!("the guest of {id} dies"));
        cluster.nodes[id.slot()].guest = None;
        cluster.step(id, Event::StepDown);
    }
}

pub(super) fn propose_input(cluster: &mut Cluster, id: ReplicaId) {
    // Every input differs, so that an entry in the wrong place is noticed.
    let bytes = cluster.rng.next().to_le_bytes().to_vec();
    cluster.propose(id, Entry::Input(Payload::from(bytes)));
}

fn crash(cluster: &mut Cluster, temper: &Temper, id: ReplicaId) {
    cluster.crash(id);
    if cluster.rng.chance(500) {
        cluster.announce_link(id, false);
    }
    // One disk at a time: the loss of two of three is beyond what the group promises to survive.
    let others_vote = cluster.nodes.iter().all(|node| !node.wiped);
    if others_vote && cluster.checker.committed() > 0 && cluster.rng.chance(temper.wipe) {
        cluster.wipe(id);
    }
}

/// Cuts one direction, one link, or one replica off.
fn partition(cluster: &mut Cluster) {
    let (from, to) = (anybody(cluster).slot(), anybody(cluster).slot());
    let blocked = &mut cluster.weather.blocked;
    match cluster.rng.below(3) {
        0 => blocked[from][to] = true,
        1 => (blocked[from][to], blocked[to][from]) = (true, true),
        _ => {
            for (other, row) in blocked.iter_mut().enumerate() {
                if other == from {
                    *row = [true; REPLICAS as usize];
                } else {
                    row[from] = true;
                }
            }
        }
    }
}
