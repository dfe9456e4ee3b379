//! One replica with an in-memory log, an arena and the fabric's lanes, driven as the product's reactor drives it.
//!
//! The log keeps entries by their handles: durable at once, nothing copied. What comes through the fabric is put into the arena,
//! and the inputs of a message are parts of it. Nothing sleeps: whoever polls this has a CPU to spin on.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use consensus::{Config, Effects, Encoder, Entry, Event, Index, Payload, PersistId, Recovered, Replica, ReplicaId};
use dataplane::arena::{Arena, ArenaBytes};
use dataplane::fabric::{self, Fabric, FabricConfig, FabricEvent, Listener, PeerFabric, PeerId};
use dataplane::region::{PageSize, Region};
use dataplane::wait::Poller;

use crate::ordering::store::Store;

/// As the daemon's default.
pub const ARENA_BYTES: usize = 64 << 20;
/// The part of it that truncated entries may keep, as the daemon's.
const RETAIN_BYTES: u64 = ARENA_BYTES as u64 >> 2;
/// All replicas share one thread: if it does not get its CPU for a while, that is nobody's death.
const PATIENCE_US: u64 = 3_600_000_000;
/// The lanes are looked at in every turn, the sockets behind them so often.
const SOCKETS_EVERY_US: u64 = 1_000;
const FABRIC_TOKEN: u64 = 1;

/// What the fabric brought, between polling and handling: handling sends, which needs the fabric.
#[derive(Default)]
struct Inbox {
    messages: Vec<(ReplicaId, Payload)>,
    connected: Vec<ReplicaId>,
    lost: Option<String>,
}

impl Inbox {
    fn take(&mut self, event: FabricEvent<'_>, arena: &mut Arena) {
        match event {
            FabricEvent::Message { peer, bytes } => {
                let kept = arena.put(bytes).map_or_else(|| Payload::from(bytes.to_vec()), shared);
                self.messages.push((ReplicaId(peer.0), kept));
            }
            FabricEvent::Connected { peer, .. } => self.connected.push(ReplicaId(peer.0)),
            FabricEvent::Lost { peer, reason } => self.lost = Some(format!("replica {peer}: {reason}")),
            FabricEvent::Refused { peer, reason } => self.lost = Some(format!("replica {peer}: {reason:?}")),
        }
    }
}

/// A handle of the arena as the payload of an entry.
pub fn shared(bytes: ArenaBytes) -> Payload {
    let (chunk, at, len) = bytes.into_parts();
    Payload::within(chunk, at, len)
}

/// See the module.
pub struct Member {
    me: ReplicaId,
    replica: Replica,
    effects: Effects,
    store: Store,
    /// Where frames and messages live.
    pub arena: Arena,
    fabric: PeerFabric,
    sockets_us: u64,
    inbox: Inbox,
    encoder: Encoder,
    /// Committed entries that nobody has taken yet.
    pub committed: VecDeque<(Index, Entry)>,
    last_committed: Index,
}

impl Member {
    /// Replica `me` of `replicas`, whose listener is `listener`; replica 0 leads.
    ///
    /// # Errors
    /// No memory, or no poller.
    pub fn new(listener: &Listener, replicas: Vec<fabric::Replica>, me: ReplicaId, now_us: u64) -> Result<Member> {
        let port = listener.register("perf", replicas, PeerId(me.0))?;
        let config = FabricConfig {
            silence_timeout_us: PATIENCE_US,
            replace_after_us: PATIENCE_US,
            ping_us: PATIENCE_US / 10,
            ..FabricConfig::default()
        };
        let fabric = PeerFabric::new(config, port.control, Arc::new(Poller::new()?), FABRIC_TOKEN, now_us)?;
        let mut config = Config::new(me, ReplicaId(0), now_us ^ u64::from(me.0));
        config.failure_timeout_us = PATIENCE_US;
        config.retain_bytes = RETAIN_BYTES;
        // Normal pages are said by whoever reserved huge ones.
        let (region, _) = Region::map_or_normal(ARENA_BYTES, PageSize::Huge2M, None)?;
        Ok(Member {
            me,
            replica: Replica::new(config, Recovered::default(), now_us),
            effects: Effects::default(),
            store: Store::default(),
            arena: Arena::new(region),
            fabric,
            sockets_us: 0,
            inbox: Inbox::default(),
            encoder: Encoder::default(),
            committed: VecDeque::new(),
            last_committed: Index(0),
        })
    }

    /// The replica, to look at.
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// The last entry that its log holds.
    pub fn stored(&self) -> Index {
        self.store.entries.back().map_or(self.store.state.base.index, |(index, ..)| *index)
    }

    /// Whether both others are connected, through memory.
    pub fn is_connected(&self) -> bool {
        let mut others = (0..3).filter(|id| *id != self.me.0).map(PeerId);
        others.all(|id| self.fabric.is_connected(id)) && self.fabric.has_memory_lanes()
    }

    /// Takes in what came, and does what follows.
    ///
    /// # Errors
    /// A connection broke, or a message makes no sense.
    pub fn turn(&mut self, now_us: u64) -> Result<()> {
        let (inbox, arena) = (&mut self.inbox, &mut self.arena);
        if now_us >= self.sockets_us {
            self.fabric.poll(now_us, &mut |event| inbox.take(event, arena));
            self.sockets_us = now_us + SOCKETS_EVERY_US;
        } else {
            self.fabric.poll_lanes(now_us, &mut |event| inbox.take(event, arena));
        }
        if let Some(reason) = self.inbox.lost.take() {
            bail!("the fabric's connection is gone: {reason}");
        }
        while let Some(peer) = self.inbox.connected.pop() {
            self.step(now_us, Event::PeerConnected(peer))?;
        }
        let mut messages = std::mem::take(&mut self.inbox.messages);
        for (from, bytes) in messages.drain(..) {
            let message = self.effects.decode_shared(&bytes).context("a message does not decode")?;
            self.step(now_us, Event::Message { from, message })?;
        }
        self.inbox.messages = messages;
        if now_us >= self.replica.next_deadline_us() {
            self.step(now_us, Event::Tick)?;
        }
        Ok(())
    }

    /// Hands an event to the replica and carries out what follows.
    ///
    /// # Errors
    /// Entries do not come out one behind the other.
    pub fn step(&mut self, now_us: u64, event: Event) -> Result<()> {
        self.replica.step(now_us, event, &mut self.effects);
        self.carry_out(now_us)
    }

    /// Proposes an entry.
    ///
    /// # Errors
    /// This replica may not.
    pub fn propose(&mut self, now_us: u64, entry: Entry) -> Result<Index> {
        let index = self.replica.propose(now_us, entry, &mut self.effects)?;
        self.carry_out(now_us)?;
        Ok(index)
    }

    /// Records, then messages, then commits.
    fn carry_out(&mut self, now_us: u64) -> Result<()> {
        loop {
            let before = self.store.records;
            for record in self.effects.persist.drain(..) {
                self.store.take(record)?;
            }
            self.effects.send_parts(&mut self.encoder, &[], |to, parts| {
                // Not connected yet, or full: consensus sends again.
                let _ = self.fabric.send(PeerId(to.0), parts);
            });
            for (index, _, entry) in self.effects.committed.drain(..) {
                ensure!(index == self.last_committed.next(), "entry {index} came out behind {}", self.last_committed);
                self.last_committed = index;
                self.committed.push_back((index, entry));
            }
            self.effects.notices.clear();
            if self.store.records == before {
                return Ok(());
            }
            let through = PersistId(self.store.records);
            self.replica.step(now_us, Event::Persisted { through }, &mut self.effects);
        }
    }
}
