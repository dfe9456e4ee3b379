//! A group of replicas with simulated clock, network and disks.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Mutant;
use super::checker::Checker;
use super::disk::Disk;
use crate::config::Config;
use crate::effects::{Effects, Event, Notice};
use crate::entry::Entry;
use crate::ids::{Index, PersistId, ReplicaId};
use crate::message::Message;
use crate::replica::{ProposeError, Replica};
use crate::rng::Rng;

pub(super) const REPLICAS: u8 = 3;
pub(super) const GENESIS_LEADER: ReplicaId = ReplicaId(0);

/// One replica with its host.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: ReplicaId,
    pub(super) replica: Option<Replica>,
    pub(super) disk: Disk,
    /// The `SyncVm` that made its guest whole, if it has a guest; 0 for the guest that was there first.
    pub(super) guest: Option<Index>,
    /// How many times it was started.
    pub(super) life: u32,
    /// Its disk was wiped and it does not vote again yet.
    pub(super) wiped: bool,
    /// The operator allowed it to boot a fresh guest.
    pub(super) cold_start: bool,
    /// The last committed entry that this process handed out.
    handed_out: Index,
    pub(super) product: super::product::Product,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    Deliver { from: u8, to: u8, slot: usize },
    DiskDone { node: u8, life: u32, through: PersistId },
    LinkLost { at: u8, peer: u8 },
    LinkUp { at: u8, peer: u8 },
}

/// What the network and the disks do. Chances are per mille.
#[derive(Clone, Debug)]
pub(super) struct Weather {
    pub(super) loss: u64,
    pub(super) duplicate: u64,
    pub(super) delay_us: u64,
    /// Added at random: delays that differ reorder messages.
    pub(super) jitter_us: u64,
    pub(super) disk_us: u64,
    pub(super) disk_jitter_us: u64,
    /// `blocked[from][to]`.
    pub(super) blocked: [[bool; REPLICAS as usize]; REPLICAS as usize],
}

impl Weather {
    pub(super) fn fair() -> Weather {
        Weather {
            loss: 0,
            duplicate: 0,
            delay_us: 100,
            jitter_us: 0,
            disk_us: 200,
            disk_jitter_us: 0,
            blocked: Default::default(),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) now_us: u64,
    pub(super) rng: Rng,
    pub(super) nodes: Vec<Node>,
    pub(super) weather: Weather,
    pub(super) checker: Checker,
    pub(super) violation: Option<String>,
    pub(super) trace: Option<Vec<String>>,
    pub(super) events: u64,
    mutant: Mutant,
    limits: fn(&mut Config),
    queue: BinaryHeap<Reverse<(u64, u64, Happening)>>,
    /// Messages on their way; their places are reused.
    flying: Vec<Option<Message>>,
    free: Vec<usize>,
    order: u64,
    spare: Vec<Effects>,
}

impl Cluster {
    pub(super) fn new(seed: u64, mutant: Mutant, limits: fn(&mut Config)) -> Cluster {
        let nodes = (0..REPLICAS).map(|id| Node {
            id: ReplicaId(id),
            replica: None,
            disk: Disk::default(),
            guest: None,
            life: 0,
            wiped: false,
            cold_start: false,
            handed_out: Index(0),
            product: Default::default(),
        });
        Cluster {
            now_us: 1000,
            rng: Rng::new(seed),
            nodes: nodes.collect(),
            weather: Weather::fair(),
            checker: Checker::new(GENESIS_LEADER),
            violation: None,
            trace: None,
            events: 0,
            mutant,
            limits,
            queue: BinaryHeap::new(),
            flying: Vec::new(),
            free: Vec::new(),
            order: 0,
            spare: Vec::new(),
        }
    }

    pub(super) fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>10.3} ms  {}", self.now_us as f64 / 1000.0, text()));
        }
    }

    fn check(&mut self, result: Result<(), String>) {
        if let Err(what) = result
            && self.violation.is_none()
        {
            self.note(|| format!("VIOLATION {what}"));
            self.violation = Some(what);
        }
    }

    fn schedule(&mut self, at_us: u64, happening: Happening) {
        self.order += 1;
        self.queue.push(Reverse((at_us, self.order, happening)));
    }

    pub(super) fn start(&mut self, id: ReplicaId) {
        let mut config = Config::new(id, GENESIS_LEADER, self.rng.next());
        (self.limits)(&mut config);
        let node = &mut self.nodes[id.slot()];
        node.life += 1;
        let recovered = node.disk.recovered();
        node.handed_out = recovered.base.index;
        node.replica = Some(Replica::new(config, recovered, self.now_us));
        let life = node.life;
        self.note(|| format!("{id} starts (life {life})"));
        if self.mutant == Mutant::IntactAfterRestart && life > 1 {
            self.step(id, Event::GuestIntact(true));
        }
    }

    /// The process and its guest die; part of what was on its way to the disk arrives there.
    pub(super) fn crash(&mut self, id: ReplicaId) {
        let keep = self.rng.below(self.nodes[id.slot()].disk.pending() as u64 + 1) as usize;
        let node = &mut self.nodes[id.slot()];
        node.disk.crash(keep);
        (node.replica, node.guest, node.cold_start) = (None, None, false);
        node.product = Default::default();
        self.note(|| format!("{id} dies; {keep} unfinished records reach its disk"));
        let result = self.checker.on_crash(&self.nodes);
        self.check(result);
    }

    /// The disk of a dead replica is lost.
    pub(super) fn wipe(&mut self, id: ReplicaId) {
        let forget = self.mutant == Mutant::VoteAfterWipe;
        let node = &mut self.nodes[id.slot()];
        node.disk.wipe();
        node.wiped = true;
        if forget {
            node.disk.forge_state();
        }
        self.note(|| format!("{id} loses its disk"));
    }

    /// Tells the others that the connection to `id` broke, or is back.
    pub(super) fn announce_link(&mut self, id: ReplicaId, up: bool) {
        for peer in (0..REPLICAS).filter(|peer| *peer != id.0) {
            let at_us = self.now_us + self.weather.delay_us + self.rng.below(self.weather.jitter_us + 1);
            for (at, peer) in [(peer, id.0), (id.0, peer)] {
                let happening = if up { Happening::LinkUp { at, peer } } else { Happening::LinkLost { at, peer } };
                self.schedule(at_us, happening);
            }
        }
    }

    pub(super) fn replica(&self, id: ReplicaId) -> Option<&Replica> {
        self.nodes[id.slot()].replica.as_ref()
    }

    pub(super) fn step(&mut self, id: ReplicaId, event: Event) {
        let mut out = self.spare.pop().unwrap_or_default();
        self.events += 1;
        if let Some(replica) = &mut self.nodes[id.slot()].replica {
            replica.step(self.now_us, event, &mut out);
            self.absorb(id, &mut out);
        }
        out.clear();
        self.spare.push(out);
    }

    pub(super) fn propose(&mut self, id: ReplicaId, entry: Entry) -> Option<Result<Index, ProposeError>> {
        let mut out = self.spare.pop().unwrap_or_default();
        let text = self.trace.is_some().then(|| entry.to_string());
        let result =
            self.nodes[id.slot()].replica.as_mut().map(|replica| replica.propose(self.now_us, entry, &mut out));
        self.note(|| match result {
            Some(Ok(index)) => format!("{id} proposes {} at {index}", text.unwrap_or_default()),
            Some(Err(error)) => format!("{id} refuses a proposal: {error}"),
            None => format!("{id} is dead and takes no proposal"),
        });
        self.absorb(id, &mut out);
        out.clear();
        self.spare.push(out);
        result
    }

    /// Does what a replica asks for.
    fn absorb(&mut self, id: ReplicaId, out: &mut Effects) {
        let mut through = None;
        for record in out.persist.drain(..) {
            through = Some(self.nodes[id.slot()].disk.push(record));
        }
        if let Some(through) = through {
            let delay_us = self.weather.disk_us + self.rng.below(self.weather.disk_jitter_us + 1);
            let life = self.nodes[id.slot()].life;
            self.schedule(self.now_us + delay_us, Happening::DiskDone { node: id.0, life, through });
        }
        for (to, message) in out.messages.drain(..) {
            self.send(id, to, message);
        }
        for (index, view, entry) in out.committed.drain(..) {
            let node = &mut self.nodes[id.slot()];
            let expected = node.handed_out.next();
            node.handed_out = index;
            self.note(|| format!("{id} commits {index}: {entry}"));
            if index != expected {
                self.check(Err(format!("I1: {id} hands out {index} instead of {expected}")));
            }
            let result = self.checker.on_committed(id, (index, view, &entry), &self.nodes);
            self.check(result);
        }
        for notice in out.notices.drain(..) {
            self.on_notice(id, notice);
        }
        if let Some(through) = through
            && self.mutant == Mutant::AckBeforePersist
        {
            self.step(id, Event::Persisted { through });
        }
    }

    fn on_notice(&mut self, id: ReplicaId, notice: Notice) {
        self.note(|| format!("{id} notice {notice:?}"));
        let node = &mut self.nodes[id.slot()];
        match notice {
            Notice::Jumped { base } => (node.handed_out, node.guest) = (base, None),
            Notice::Leading { view } => {
                let replica = node.replica.take().expect("it just took a step");
                let result = self.checker.on_leading(&self.nodes[id.slot()], &replica, view);
                self.nodes[id.slot()].replica = Some(replica);
                self.check(result);
                let node = &mut self.nodes[id.slot()];
                if node.guest.is_none() {
                    node.guest = Some(node.handed_out);
                    self.step(id, Event::GuestIntact(true));
                }
                self.nodes[id.slot()].cold_start = false;
            }
            Notice::Following { .. } => node.cold_start = false,
            Notice::Promoted | Notice::LostLead { .. } | Notice::HandOverFailed { .. } | Notice::Ineligible { .. } => {}
        }
    }

    fn send(&mut self, from: ReplicaId, to: ReplicaId, message: Message) {
        if let Message::Accept { view, prev, entries, .. } = &message {
            let result = self.checker.on_accept_sent((from, self.nodes[from.slot()].life), *view);
            self.check(result);
            if self.mutant == Mutant::ForgedAcknowledgement {
                let through = Index(prev.index.0 + entries.len() as u64);
                let forged = Message::AcceptOk { view: *view, through, voting: true };
                self.fly(to, from, forged);
            }
        }
        if self.weather.blocked[from.slot()][to.slot()] || self.rng.chance(self.weather.loss) {
            return;
        }
        if self.rng.chance(self.weather.duplicate) {
            self.fly(from, to, message.clone());
        }
        self.fly(from, to, message);
    }

    fn fly(&mut self, from: ReplicaId, to: ReplicaId, message: Message) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.flying.push(None);
            self.flying.len() - 1
        });
        self.flying[slot] = Some(message);
        let at_us = self.now_us + self.weather.delay_us + self.rng.below(self.weather.jitter_us + 1);
        self.schedule(at_us, Happening::Deliver { from: from.0, to: to.0, slot });
    }

    /// Runs until `until_us`, or until an invariant breaks.
    pub(super) fn run_until(&mut self, until_us: u64) {
        while self.violation.is_none() {
            let next_us = self.queue.peek().map_or(u64::MAX, |Reverse((at_us, ..))| *at_us);
            let tick = self.nodes.iter().filter_map(|node| Some((node.replica.as_ref()?.next_deadline_us(), node.id)));
            let (tick_us, id) = tick.min().unwrap_or((u64::MAX, GENESIS_LEADER));
            if next_us.min(tick_us) > until_us {
                break;
            }
            if tick_us < next_us {
                self.now_us = self.now_us.max(tick_us);
                self.step(id, Event::Tick);
            } else if let Some(Reverse((at_us, _, happening))) = self.queue.pop() {
                self.now_us = self.now_us.max(at_us);
                self.happen(happening);
            }
        }
        self.now_us = self.now_us.max(until_us);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Deliver { from, to, slot } => {
                let Some(message) = self.flying[slot].take() else {
                    return;
                };
                self.free.push(slot);
                let (from, to) = (ReplicaId(from), ReplicaId(to));
                if self.replica(to).is_some() && !super::transcript::is_heartbeat(&message) {
                    self.note(|| format!("{from} -> {to}  {}", super::transcript::describe(&message)));
                }
                self.step(to, Event::Message { from, message });
            }
            Happening::DiskDone { node, life, through } => {
                let node = &mut self.nodes[usize::from(node)];
                if node.life == life && node.replica.is_some() {
                    node.disk.apply(through);
                    node.wiped &= !node.disk.lets_vote() || self.mutant == Mutant::VoteAfterWipe;
                    let id = node.id;
                    self.step(id, Event::Persisted { through });
                }
            }
            Happening::LinkLost { at, peer } => self.step(ReplicaId(at), Event::PeerLost(ReplicaId(peer))),
            Happening::LinkUp { at, peer } => self.step(ReplicaId(at), Event::PeerConnected(ReplicaId(peer))),
        }
    }
}
