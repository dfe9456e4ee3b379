//! One replica with an in-memory log and the TCP fabric, driven as the product's reactor drives it.
//!
//! A turn takes in what the fabric has, steps the replica, and hands out what follows: records, then messages.
//! Between turns the thread sleeps in the poller, for no longer than the next deadline. It does not spin: three
//! replicas and whatever they are compared with share two CPUs, and a thread that spins takes what another needs.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use consensus::{Config, Effects, Entry, Event, Index, Message, Recovered, Replica, ReplicaId};
use dataplane::fabric::{self, Fabric, FabricConfig, FabricEvent, Listener, PeerFabric, PeerId};
use dataplane::wait::{Poller, Ready, now_us};

use super::memory::Memory;

/// While the peer is measured nobody drives the replicas: no silence may count, for the fabric or for consensus.
const PATIENCE_US: u64 = 3_600_000_000;
const FABRIC_TOKEN: u64 = 1000;

/// What the fabric brought, between polling and handling: handling sends, which needs the fabric.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    messages: Vec<(ReplicaId, Range<usize>)>,
    connected: Vec<ReplicaId>,
    lost: Option<String>,
}

impl Inbox {
    fn take(&mut self, event: FabricEvent<'_>) {
        match event {
            FabricEvent::Message { peer, bytes } => {
                let from = self.bytes.len();
                self.bytes.extend_from_slice(bytes);
                self.messages.push((ReplicaId(peer.0), from..self.bytes.len()));
            }
            FabricEvent::Connected { peer, .. } => self.connected.push(ReplicaId(peer.0)),
            FabricEvent::Lost { peer, reason } => self.lost = Some(format!("replica {peer}: {reason}")),
            FabricEvent::Refused { peer, reason } => self.lost = Some(format!("replica {peer}: {reason:?}")),
        }
    }
}

/// See the module.
pub struct Node {
    /// Which replica it is.
    pub me: ReplicaId,
    replica: Replica,
    effects: Effects,
    memory: Memory,
    fabric: PeerFabric,
    pub poller: Arc<Poller>,
    ready: Vec<Ready>,
    inbox: Inbox,
    buffer: Vec<u8>,
    committed: Index,
}

impl Node {
    /// Replica `me` of `replicas`, whose listener is `listener`; replica 0 leads.
    pub fn new(listener: &Listener, replicas: Vec<fabric::Replica>, me: ReplicaId) -> Result<Node> {
        let config = FabricConfig {
            silence_timeout_us: PATIENCE_US,
            replace_after_us: PATIENCE_US,
            ping_us: PATIENCE_US / 10,
            ..FabricConfig::default()
        };
        let port = listener.register("perf", replicas, PeerId(me.0))?;
        let poller = Arc::new(Poller::new()?);
        let now = now_us();
        let fabric = PeerFabric::new(config, port.control, Arc::clone(&poller), FABRIC_TOKEN, now)?;
        let mut config = Config::new(me, ReplicaId(0), now ^ u64::from(me.0));
        config.failure_timeout_us = PATIENCE_US;
        Ok(Node {
            me,
            replica: Replica::new(config, Recovered::default(), now),
            effects: Effects::default(),
            memory: Memory::default(),
            fabric,
            poller,
            ready: Vec::new(),
            inbox: Inbox::default(),
            buffer: Vec::new(),
            committed: Index(0),
        })
    }

    /// The replica, to look at.
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// The last entry that came out committed here.
    pub fn committed(&self) -> Index {
        self.committed
    }

    /// Whether both others are connected.
    pub fn is_connected(&self) -> bool {
        (0..3).filter(|id| *id != self.me.0).all(|id| self.fabric.is_connected(PeerId(id)))
    }

    /// Sleeps until there is something to do, and does it.
    ///
    /// # Errors
    /// `deadline` has passed, a connection broke, or a message makes no sense.
    pub fn sleep_and_turn(&mut self, deadline: Instant) -> Result<()> {
        let left_us = deadline.saturating_duration_since(Instant::now()).as_micros() as u64;
        ensure!(left_us > 0, "nothing happened until the deadline; committed through {}", self.committed);
        let due_us = self.fabric.next_deadline_us().min(self.replica.next_deadline_us());
        let sleep_us = due_us.saturating_sub(now_us()).min(left_us);
        self.poller.wait(Some(sleep_us), &mut self.ready)?;
        self.turn()
    }

    /// Does what is there to do now.
    fn turn(&mut self) -> Result<()> {
        let now = now_us();
        let mut inbox = std::mem::take(&mut self.inbox);
        if !self.ready.is_empty() || now >= self.fabric.next_deadline_us() {
            self.fabric.poll(now, &mut |event| inbox.take(event));
        }
        if let Some(reason) = inbox.lost.take() {
            bail!("the fabric's connection is gone: {reason}");
        }
        for peer in inbox.connected.drain(..) {
            self.step(now, Event::PeerConnected(peer))?;
        }
        for (from, range) in inbox.messages.drain(..) {
            let message = Message::decode(&inbox.bytes[range]).context("a message does not decode")?;
            self.step(now, Event::Message { from, message })?;
        }
        inbox.bytes.clear();
        self.inbox = inbox;
        if now >= self.replica.next_deadline_us() {
            self.step(now, Event::Tick)?;
        }
        Ok(())
    }

    /// Hands an event to the replica and carries out what follows.
    pub fn step(&mut self, now_us: u64, event: Event) -> Result<()> {
        self.replica.step(now_us, event, &mut self.effects);
        self.carry_out(now_us)
    }

    /// Proposes an entry; what follows waits for [`carry_out`](Self::carry_out).
    pub fn propose(&mut self, now_us: u64, entry: Entry) -> Result<Index> {
        Ok(self.replica.propose(now_us, entry, &mut self.effects)?)
    }

    /// Records, then messages, then commits.
    pub fn carry_out(&mut self, now_us: u64) -> Result<()> {
        loop {
            let durable = self.memory.store(self.effects.persist.drain(..))?;
            for (to, message) in self.effects.messages.drain(..) {
                self.buffer.clear();
                message.encode(&mut self.buffer);
                // Not connected yet, or full: consensus sends again.
                let _ = self.fabric.send(PeerId(to.0), &[&self.buffer]);
            }
            for (index, ..) in self.effects.committed.drain(..) {
                ensure!(index == self.committed.next(), "entry {index} came out behind {}", self.committed);
                self.committed = index;
            }
            self.effects.notices.clear();
            let Some(through) = durable else {
                return Ok(());
            };
            self.replica.step(now_us, Event::Persisted { through }, &mut self.effects);
        }
    }
}
