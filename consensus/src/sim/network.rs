//! Clock and network: what is on its way, and when it arrives.

use super::Mutant;
use super::cluster::{Cluster, GENESIS_LEADER, REPLICAS};
use crate::effects::Event;
use crate::ids::{Index, PersistId, ReplicaId};
use crate::message::Message;
use std::cmp::Reverse;

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Happening {
    Deliver {
        from: u8,
        to: u8,
        slot: usize,
    },
    DiskDone {
        node: u8,
        life: u32,
        through: PersistId,
    },
    LinkLost {
        at: u8,
        peer: u8,
    },
    LinkUp {
        at: u8,
        peer: u8,
    },
    /// The product around a replica does its round.
    Product {
        node: u8,
        life: u32,
    },
    /// The guest's state arrives, or the word that it did.
    Transfer {
        exchange: usize,
    },
    Acknowledged {
        exchange: usize,
    },
    /// A group whose store failed is put together anew.
    TearDown {
        node: u8,
        life: u32,
    },
    Start {
        node: u8,
    },
}

type Links<T> = [[T; REPLICAS as usize]; REPLICAS as usize];

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
    pub(super) blocked: Links<bool>,
    /// Added to every delay: `slow_us[from][to]`.
    pub(super) slow_us: Links<u64>,
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
            slow_us: Default::default(),
        }
    }

    /// Whether bytes pass in both directions, as a connection needs.
    pub(super) fn connects(&self, a: ReplicaId, b: ReplicaId) -> bool {
        !self.blocked[a.slot()][b.slot()] && !self.blocked[b.slot()][a.slot()]
    }
}

/// Added to every sync of a slow disk, at least and at most.
const SLOW_SYNC_US: (u64, u64) = (100_000, 400_000);

impl Cluster {
    pub(super) fn schedule(&mut self, at_us: u64, happening: Happening) {
        self.order += 1;
        self.queue.push(Reverse((at_us, self.order, happening)));
    }

    /// How long a message takes.
    pub(super) fn delay_us(&mut self, from: ReplicaId, to: ReplicaId) -> u64 {
        let weather = &self.weather;
        weather.delay_us + weather.slow_us[from.slot()][to.slot()] + self.rng.below(weather.jitter_us + 1)
    }

    /// Tells the others that the connection to `id` broke, or is back.
    pub(super) fn announce_link(&mut self, id: ReplicaId, up: bool) {
        for peer in (0..REPLICAS).filter(|peer| *peer != id.0) {
            let at_us = self.now_us + self.delay_us(id, ReplicaId(peer));
            for (at, peer) in [(peer, id.0), (id.0, peer)] {
                let happening = if up { Happening::LinkUp { at, peer } } else { Happening::LinkLost { at, peer } };
                self.schedule(at_us, happening);
            }
        }
    }

    pub(super) fn schedule_sync(&mut self, id: ReplicaId, through: PersistId) {
        let mut delay_us = self.weather.disk_us + self.rng.below(self.weather.disk_jitter_us + 1);
        let node = &self.nodes[id.slot()];
        if node.disk.slow_until_us > self.now_us {
            delay_us += SLOW_SYNC_US.0 + self.rng.below(SLOW_SYNC_US.1 - SLOW_SYNC_US.0);
        }
        let life = node.life;
        self.schedule(self.now_us + delay_us, Happening::DiskDone { node: id.0, life, through });
    }

    pub(super) fn send(&mut self, from: ReplicaId, to: ReplicaId, message: Message) {
        if let Message::Accept { view, prev, entries, .. } = &message {
            let result = self.checker.on_accept_sent((from, self.nodes[from.slot()].life), *view);
            self.check(result);
            if self.mutant == Mutant::ForgedAcknowledgement {
                let through = Index(prev.index.0 + entries.len() as u64);
                let forged = Message::AcceptOk { view: *view, through, voting: true, consumed: Index(0) };
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
        let at_us = self.now_us + self.delay_us(from, to);
        self.schedule(at_us, Happening::Deliver { from: from.0, to: to.0, slot });
    }

    /// Runs until `until_us`, or until an invariant breaks.
    pub(super) fn run_until(&mut self, until_us: u64) {
        while self.violation.is_none() {
            let next_us = self.queue.peek().map_or(u64::MAX, |Reverse((at_us, ..))| *at_us);
            let tick = self.nodes.iter().filter_map(|node| Some((node.tick_us()?, node.id)));
            let (tick_us, id) = tick.min().unwrap_or((u64::MAX, GENESIS_LEADER));
            if next_us.min(tick_us) > until_us {
                break;
            }
            if tick_us < next_us {
                self.now_us = self.now_us.max(tick_us);
                self.step(id, Event::Tick);
            } else if let Some(Reverse((at_us, _, happening))) = self.queue.pop() {
                self.now_us = self.now_us.max(at_us);
                self.happen_or_wait(happening);
            }
        }
        self.now_us = self.now_us.max(until_us);
    }

    fn lives(&self, node: u8, life: u32) -> bool {
        let node = &self.nodes[usize::from(node)];
        node.life == life && node.replica.is_some()
    }

    /// What comes to a replica that is not run waits until it is: first what it is told, then its own doing.
    fn happen_or_wait(&mut self, happening: Happening) {
        let (slot, own) = match happening {
            Happening::Deliver { to, .. } => (usize::from(to), 0),
            Happening::DiskDone { node, .. } => (usize::from(node), 0),
            Happening::LinkLost { at, .. } | Happening::LinkUp { at, .. } => (usize::from(at), 0),
            Happening::Transfer { exchange } => (self.exchanges[exchange].to.0.slot(), 0),
            Happening::Acknowledged { exchange } => (self.exchanges[exchange].from.0.slot(), 0),
            Happening::Product { node, .. } => (usize::from(node), 1),
            Happening::TearDown { .. } | Happening::Start { .. } => return self.happen(happening),
        };
        let node = &self.nodes[slot];
        match node.is_absent(self.now_us) {
            true => self.schedule(node.absent_until_us + own, happening),
            false => self.happen(happening),
        }
    }

    /// The host of `id` gives it no CPU for so long.
    pub(super) fn starve(&mut self, id: ReplicaId, for_us: u64) {
        if self.replica(id).is_some() {
            self.note(|| format!("{id} is not run for {for_us} us"));
            self.nodes[id.slot()].absent_until_us = self.now_us + for_us;
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Deliver { from, to, slot } => self.deliver(ReplicaId(from), ReplicaId(to), slot),
            Happening::DiskDone { node, life, through } if self.lives(node, life) => {
                self.disk_done(ReplicaId(node), through);
            }
            Happening::LinkLost { at, peer } => self.step(ReplicaId(at), Event::PeerLost(ReplicaId(peer))),
            Happening::LinkUp { at, peer } => self.step(ReplicaId(at), Event::PeerConnected(ReplicaId(peer))),
            Happening::Product { node, life } if self.lives(node, life) => self.product_round(ReplicaId(node)),
            Happening::Transfer { exchange } => self.transfer(exchange),
            Happening::Acknowledged { exchange } => self.acknowledged(exchange),
            Happening::TearDown { node, life } if self.lives(node, life) => self.tear_down(ReplicaId(node)),
            Happening::Start { node } if self.nodes[usize::from(node)].replica.is_none() => {
                self.start(ReplicaId(node));
            }
            // For a process that is gone.
            Happening::DiskDone { .. }
            | Happening::Product { .. }
            | Happening::TearDown { .. }
            | Happening::Start { .. } => {}
        }
    }

    fn deliver(&mut self, from: ReplicaId, to: ReplicaId, slot: usize) {
        let Some(message) = self.flying[slot].take() else {
            return;
        };
        self.free.push(slot);
        if self.replica(to).is_some() && !super::transcript::is_heartbeat(&message) {
            self.note(|| format!("{from} -> {to}  {}", super::transcript::describe(&message)));
        }
        self.step(to, Event::Message { from, message });
    }

    fn disk_done(&mut self, id: ReplicaId, through: PersistId) {
        let node = &mut self.nodes[id.slot()];
        if node.disk.failed {
            self.storage_failed(id);
            return;
        }
        let result = node.disk.apply(through);
        if node.disk.lets_vote() && self.mutant != Mutant::VoteAfterWipe {
            node.lost = None;
        }
        self.check(result);
        self.step(id, Event::Persisted { through });
    }
}
