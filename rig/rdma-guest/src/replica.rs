//! One of three replicas of consensus with a durable log, joined as the daemon joins them, over RDMA.
//!
//! Replica 0 leads and makes 1 its secondary, then proposes numbers and says which are acknowledged. When it dies, 1 leads
//! and goes on from the last number. In the end each tells who proposed which numbers, as its log of commits has it.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use consensus::{
    Config, Effects, Entry, Event, Index, Message, Notice, Payload, Persist, PersistId, Recovered, Replica, ReplicaId,
};
use dataplane::fabric::{Fabric, FabricConfig, FabricEvent, Listener, NodeIdentity, PeerFabric, PeerId};
use dataplane::wait::{Interest, Poller, Ready, now_us};
use storage_log::{LegSpec, LogStore, Options, Record};

use crate::{LIMIT, replicas, security};

const LOG_TOKEN: u64 = 1;
const FABRIC_TOKEN: u64 = 1000;
/// Before a new leader's numbers end the test.
const AFTER_THE_KILL: u64 = 60;
/// Proposed and not committed.
const WINDOW: u64 = 4;
const SECONDARY: ReplicaId = ReplicaId(1);
const WITNESS: ReplicaId = ReplicaId(2);

/// A number and who proposed it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Input {
    number: u64,
    by: ReplicaId,
}

impl Input {
    fn encode(self) -> Vec<u8> {
        [&self.number.to_le_bytes()[..], &[self.by.0]].concat()
    }

    fn decode(bytes: &[u8]) -> Result<Input> {
        ensure!(bytes.len() == 9, "an input of {} bytes", bytes.len());
        Ok(Input { number: u64::from_le_bytes(bytes[..8].try_into()?), by: ReplicaId(bytes[8]) })
    }
}

struct Node {
    me: ReplicaId,
    replica: Replica,
    effects: Effects,
    log: Box<dyn LogStore>,
    persisted: PersistId,
    fabric: PeerFabric,
    poller: Arc<Poller>,
    ready: Vec<Ready>,
    buffer: Vec<u8>,
    /// All that was committed, in order.
    inputs: Vec<Input>,
    committed: Index,
    leads: bool,
    /// The syncvm's index once it is committed.
    base: Option<Index>,
    has_second: bool,
    proposed: u64,
    led_from: u64,
    /// To be told to consensus behind the entries at hand.
    became_secondary: bool,
    lost: Vec<ReplicaId>,
}

/// Runs until the numbers of the second leader are committed.
///
/// # Errors
/// Something that must not be, or the time is over.
pub fn run(me: u8, addresses: [IpAddr; 3]) -> Result<()> {
    let listener = Listener::bind(
        SocketAddr::new(addresses[usize::from(me)], crate::PORT),
        NodeIdentity::new(&format!("node{me}"))?,
        security(),
    )?;
    let mut node = Node::new(&listener, addresses, ReplicaId(me))?;
    if me == 0 {
        node.step(Event::GuestIntact(true))?;
    }
    let start = Instant::now();
    while !node.is_done() {
        ensure!(start.elapsed() < LIMIT, "committed through {} in vain", node.committed);
        node.turn()?;
    }
    node.tell_ranges();
    // The witness may not know of the last commit yet, and leaves when it does.
    while node.leads && !node.lost.contains(&WITNESS) {
        ensure!(start.elapsed() < LIMIT, "the witness does not leave");
        node.turn()?;
    }
    Ok(())
}

impl Node {
    fn new(listener: &Listener, addresses: [IpAddr; 3], me: ReplicaId) -> Result<Node> {
        // In memory: a disk is not what is tested here.
        let options = Options { segment_bytes: 1 << 20, max_bytes: 32 << 20, stage_bytes: 1 << 20, direct: false };
        let (log, stored) = storage_log::open(&[LegSpec::Dir(PathBuf::from("/tmp/log"))], options)?;
        ensure!(stored.state.is_none() && stored.entries.is_empty(), "the guest is new");
        let poller = Arc::new(Poller::new()?);
        if let Some(fd) = log.event_fd() {
            poller.add(fd, LOG_TOKEN, Interest::Read)?;
        }
        let port = listener.register("rdma", replicas(&addresses), PeerId(me.0))?;
        let config = FabricConfig { silence_timeout_us: 2_000_000, ..FabricConfig::default() };
        let now = now_us();
        let fabric = PeerFabric::new(config, port.control, Arc::clone(&poller), FABRIC_TOKEN, now)?;
        let mut config = Config::new(me, ReplicaId(0), now ^ u64::from(me.0));
        // Emulated machines on a busy one.
        config.failure_timeout_us = 1_500_000;
        Ok(Node {
            me,
            replica: Replica::new(config, Recovered::from_store(None, Vec::new()), now),
            effects: Effects::default(),
            log,
            persisted: PersistId(0),
            fabric,
            poller,
            ready: Vec::new(),
            buffer: Vec::new(),
            inputs: Vec::new(),
            committed: Index(0),
            leads: false,
            base: None,
            has_second: false,
            proposed: 0,
            led_from: 0,
            became_secondary: false,
            lost: Vec::new(),
        })
    }

    /// Enough numbers of a leader after the first are committed.
    fn is_done(&self) -> bool {
        let later = self.inputs.iter().rev().take_while(|input| input.by != ReplicaId(0)).count() as u64;
        later >= AFTER_THE_KILL
    }

    /// Sleeps until there is something to do, and does it.
    fn turn(&mut self) -> Result<()> {
        let due_us = self.fabric.next_deadline_us().min(self.replica.next_deadline_us());
        let log_is_polled = self.log.is_busy() && self.log.event_fd().is_none();
        let is_awake = self.fabric.arm() || log_is_polled;
        let sleep_us = if is_awake { 0 } else { due_us.saturating_sub(now_us()).min(100_000) };
        self.poller.wait(Some(sleep_us), &mut self.ready)?;
        let mut events = Vec::new();
        self.fabric.poll(now_us(), &mut |event| {
            events.extend(match event {
                FabricEvent::Connected { peer, .. } => Some(Ok(Event::PeerConnected(ReplicaId(peer.0)))),
                FabricEvent::Lost { peer, reason } => {
                    println!("lost {peer}: {reason}");
                    self.lost.push(ReplicaId(peer.0));
                    Some(Ok(Event::PeerLost(ReplicaId(peer.0))))
                }
                FabricEvent::Message { peer, bytes } => {
                    let message = Message::decode(bytes).context("a message does not decode");
                    Some(message.map(|message| Event::Message { from: ReplicaId(peer.0), message }))
                }
                FabricEvent::Refused { peer, reason } => {
                    println!("replica {peer} refuses: {reason:?}");
                    None
                }
            });
        });
        for event in events {
            self.step(event?)?;
        }
        self.log.poll();
        self.take_durable()?;
        if now_us() >= self.replica.next_deadline_us() {
            self.step(Event::Tick)?;
        }
        self.lead()
    }

    fn take_durable(&mut self) -> Result<()> {
        if let Some(failure) = self.log.failed() {
            return Err(failure.into());
        }
        let durable = PersistId(self.log.durable().0);
        if durable > self.persisted {
            self.persisted = durable;
            self.step(Event::Persisted { through: durable })?;
        }
        Ok(())
    }

    /// Proposes what is next, if this replica leads.
    fn lead(&mut self) -> Result<()> {
        if !self.leads || self.is_done() {
            return Ok(());
        }
        // The first leader makes a secondary, which takes over from it; the next one needs none.
        if self.me == ReplicaId(0) && !self.has_second {
            let entry = match self.base {
                None if self.proposed == 0 => Entry::SyncVm { with: SECONDARY },
                Some(base) if self.proposed == 1 => Entry::Second { replica: Some(SECONDARY), base },
                _ => return Ok(()),
            };
            self.proposed += u64::from(self.replica.propose(now_us(), entry, &mut self.effects).is_ok());
            return self.carry_out();
        }
        while self.led_from <= self.inputs.len() as u64 + WINDOW {
            let input = Input { number: self.led_from, by: self.me };
            let entry = Entry::Input(Payload::from(input.encode()));
            if self.replica.propose(now_us(), entry, &mut self.effects).is_err() {
                break;
            }
            self.led_from += 1;
        }
        self.carry_out()
    }

    fn step(&mut self, event: Event) -> Result<()> {
        self.replica.step(now_us(), event, &mut self.effects);
        self.carry_out()
    }

    /// Records, then messages, then commits; as the daemon does.
    fn carry_out(&mut self) -> Result<()> {
        let records = std::mem::take(&mut self.effects.persist);
        for record in &records {
            self.store(record)?;
        }
        self.log.flush();
        self.effects.send(|to, message| {
            self.buffer.clear();
            message.encode(&mut self.buffer);
            // Lost when the peer is away: consensus sends again.
            let _ = self.fabric.send(PeerId(to.0), &[&self.buffer]);
        });
        let committed: Vec<_> = self.effects.committed.drain(..).collect();
        let notices: Vec<_> = self.effects.notices.drain(..).collect();
        let any = !committed.is_empty();
        for (index, _, entry) in committed {
            ensure!(index == self.committed.next(), "entry {index} came out behind {}", self.committed);
            self.committed = index;
            self.apply(index, &entry)?;
        }
        for notice in notices {
            match notice {
                Notice::Leading { view } => {
                    println!("leading {view}");
                    self.leads = true;
                    self.led_from = self.inputs.len() as u64 + 1;
                }
                Notice::LostLead { .. } => self.leads = false,
                _ => {}
            }
        }
        if std::mem::take(&mut self.became_secondary) {
            self.step(Event::GuestIntact(true))?;
        }
        if any {
            self.step(Event::Consumed(self.committed))?;
        }
        Ok(())
    }

    fn store(&mut self, record: &Persist) -> Result<()> {
        self.buffer.clear();
        match record {
            Persist::State(state) => {
                state.encode(&mut self.buffer);
                self.log.append(Record::State(&self.buffer))?;
                self.log.truncate_prefix(state.base.index.0);
            }
            Persist::Append { index, view, entry } => {
                entry.encode_header(&mut self.buffer);
                let parts = [&self.buffer[..], entry.payload()];
                self.log.append(Record::Entry { index: index.0, view: view.0, parts })?;
            }
        }
        Ok(())
    }

    fn apply(&mut self, index: Index, entry: &Entry) -> Result<()> {
        match entry {
            Entry::Input(payload) => {
                let input = Input::decode(payload)?;
                ensure!(input.number == self.inputs.len() as u64 + 1, "number {} is next", input.number);
                self.inputs.push(input);
                // What a client would take for granted from here on.
                if input.by == self.me {
                    println!("acked {}", input.number);
                }
            }
            Entry::SyncVm { with } => {
                self.base = Some(index);
                self.became_secondary |= *with == self.me;
            }
            Entry::Second { .. } => self.has_second = true,
            Entry::Noop { .. } => {}
        }
        Ok(())
    }

    /// «by N: FROM to TO» for each leader.
    fn tell_ranges(&self) {
        for range in self.inputs.chunk_by(|one, next| one.by == next.by) {
            println!("by {}: {} to {}", range[0].by.0, range[0].number, range[range.len() - 1].number);
        }
    }
}
