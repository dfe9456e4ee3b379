//! Faults and load drawn from the seed.

use super::cluster::{Ambush, Cluster, REPLICAS};
use super::network::{Happening, Weather};
use crate::effects::Event;
use crate::entry::{Entry, Payload};
use crate::ids::ReplicaId;

/// How a run misbehaves; drawn once per seed, so that some seeds are calm and some are brutal. Chances are per
/// mille and round.
#[derive(Debug)]
pub(super) struct Temper {
    crash: u64,
    ambush: u64,
    restart: u64,
    partition: u64,
    slow_link: u64,
    heal: u64,
    handover: u64,
    guest_death: u64,
    /// A disk that dies with its process is lost.
    lose_disk: u64,
    slow_disk: u64,
    full_disk: u64,
    write_error: u64,
    sluggish: u64,
    /// A replica, or all of them together, get no CPU for a while.
    starve: u64,
    proposals: u64,
    input_bytes: u64,
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
            ..Weather::fair()
        };
        cluster.serves_alone = pick(&[0, 1, 1]) == 1;
        Temper {
            crash: pick(&[0, 4, 15, 40]),
            ambush: pick(&[0, 4, 20]),
            restart: pick(&[30, 100, 300]),
            partition: pick(&[0, 5, 20, 50]),
            slow_link: pick(&[0, 0, 10, 30]),
            heal: pick(&[20, 80, 300]),
            handover: pick(&[0, 30, 120]),
            guest_death: pick(&[0, 0, 5, 20]),
            lose_disk: pick(&[0, 0, 300, 700]),
            slow_disk: pick(&[0, 0, 3, 10]),
            full_disk: pick(&[0, 0, 3]),
            write_error: pick(&[0, 0, 3, 10]),
            sluggish: pick(&[0, 5, 15]),
            starve: pick(&[0, 0, 5, 20]),
            proposals: pick(&[1, 3, 8, 20]),
            input_bytes: pick(&[0, 0, 300]),
        }
    }
}

fn anybody(cluster: &mut Cluster) -> ReplicaId {
    ReplicaId(cluster.rng.below(u64::from(REPLICAS)) as u8)
}

/// One round of load and faults.
pub(super) fn act(cluster: &mut Cluster, temper: &Temper) {
    for _ in 0..cluster.rng.below(temper.proposals + 1) {
        let id = anybody(cluster);
        if cluster.nodes[id.slot()].leading().is_some() && is_run(cluster, id) {
            propose_input(cluster, id, temper.input_bytes);
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
    if cluster.ambush.is_none() && cluster.rng.chance(temper.ambush) {
        let restart_after_us = cluster.rng.chance(700).then(|| cluster.rng.below(5000));
        cluster.ambush = Some(Ambush { steps: cluster.rng.below(100), restart_after_us });
    }
    disturb_network(cluster, temper);
    disturb_disk(cluster, temper);
    disturb_guest(cluster, temper);
    if cluster.rng.chance(temper.starve) {
        let (who, for_us) = (cluster.rng.below(4) as usize, absence_us(cluster));
        for id in (0..REPLICAS).map(ReplicaId).filter(|id| who >= usize::from(REPLICAS) || id.slot() == who) {
            cluster.starve(id, for_us);
        }
    }
}

/// What takes a busy host's time from a process: several time slices, or a hypervisor's pause.
pub(super) fn absence_us(cluster: &mut Cluster) -> u64 {
    50_000 + cluster.rng.below(450_000)
}

fn is_run(cluster: &Cluster, id: ReplicaId) -> bool {
    !cluster.nodes[id.slot()].is_absent(cluster.now_us)
}

fn disturb_network(cluster: &mut Cluster, temper: &Temper) {
    if cluster.rng.chance(temper.partition) {
        partition(cluster);
    }
    if cluster.rng.chance(temper.slow_link) {
        let (from, to) = (anybody(cluster), anybody(cluster));
        let delay_us = 1000 + cluster.rng.below(80_000);
        cluster.note(|| format!("the link {from} -> {to} takes {delay_us} us longer"));
        cluster.weather.slow_us[from.slot()][to.slot()] = delay_us;
    }
    if cluster.rng.chance(temper.heal) {
        cluster.weather.blocked = Default::default();
        cluster.weather.slow_us = Default::default();
    }
}

fn disturb_disk(cluster: &mut Cluster, temper: &Temper) {
    let id = anybody(cluster);
    if cluster.rng.chance(temper.slow_disk) {
        let until_us = cluster.now_us + 200_000 + cluster.rng.below(1_000_000);
        cluster.note(|| format!("the disk of {id} is slow"));
        cluster.nodes[id.slot()].disk.slow_until_us = until_us;
    }
    let full = cluster.nodes[id.slot()].disk.full;
    if full && cluster.rng.chance(100) {
        cluster.note(|| format!("the disk of {id} has room again"));
        cluster.nodes[id.slot()].disk.full = false;
    } else if !full && cluster.rng.chance(temper.full_disk) {
        cluster.note(|| format!("the disk of {id} is full"));
        cluster.nodes[id.slot()].disk.full = true;
    }
    if cluster.rng.chance(temper.write_error) && cluster.replica(id).is_some() {
        cluster.note(|| format!("writes to the disk of {id} fail"));
        cluster.nodes[id.slot()].disk.failed = true;
    }
}

fn disturb_guest(cluster: &mut Cluster, temper: &Temper) {
    let id = anybody(cluster);
    if !is_run(cluster, id) {
        return;
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
    if cluster.rng.chance(temper.sluggish) {
        cluster.note(|| format!("the guest of {id} is slow"));
        cluster.nodes[id.slot()].sluggish_until_us = cluster.now_us + cluster.rng.below(800_000);
    }
}

pub(super) fn propose_input(cluster: &mut Cluster, id: ReplicaId, most_bytes: u64) {
    // Every input differs, so that an entry in the wrong place is noticed.
    let mut bytes = cluster.rng.next().to_le_bytes().to_vec();
    bytes.resize(8 + cluster.rng.below(most_bytes + 1) as usize, 0);
    cluster.propose(id, Entry::Input(Payload::from(bytes)));
}

fn crash(cluster: &mut Cluster, temper: &Temper, id: ReplicaId) {
    if cluster.rng.chance(200) {
        cluster.crash_daemon(id);
    } else {
        cluster.crash(id);
    }
    if cluster.rng.chance(500) {
        cluster.announce_link(id, false);
    }
    // One disk at a time: the loss of two of three is beyond what the group promises to survive.
    if cluster.may_lose(id) && cluster.checker.committed() > 0 && cluster.rng.chance(temper.lose_disk) {
        lose_disk(cluster, id);
    }
    if cluster.rng.chance(300) {
        let at_us = cluster.now_us + cluster.rng.below(20_000);
        cluster.schedule(at_us, Happening::Start { node: id.0 });
    }
}

fn lose_disk(cluster: &mut Cluster, id: ReplicaId) {
    let block = cluster.nodes[id.slot()].disk.block_records() as u64;
    match cluster.rng.below(6) {
        0 => cluster.wipe(id),
        1 => cluster.rot_middle(id),
        _ if block > 0 => {
            let records = 1 + cluster.rng.below(block) as usize;
            cluster.rot_end(id, records);
        }
        _ => {}
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
