//! Consensus, its durable log and its messages, joined: the part of the reactor that turns [`Effects`] into I/O.
//!
//! Nothing here decides anything; [`Replica`] does. The order is that of [`Effects`]: persist, send, apply, notices.

use std::collections::VecDeque;

use consensus::{
    Config, Effects, Encoder, Entry, Event, HardState, Index, Notice, Persist, PersistId, Recovered, Replica,
    ReplicaId, View,
};
use dataplane::fabric::{Fabric, PeerFabric, PeerId, Transport};
use dataplane::wait::now_us;
use storage_log::{LegSpec, LogError, LogStore, Options, Record};

use super::GroupError;
use super::messages::KIND_CONSENSUS;
use super::peers::Received;

/// One committed entry on its way to the guest.
#[derive(Debug, Clone)]
pub struct Committed {
    /// Its position.
    pub index: Index,
    /// The view that proposed it.
    pub view: View,
    /// What it says.
    pub entry: Entry,
}

/// The replica of consensus with the log and the fabric it works through.
pub struct Ordering {
    replica: Replica,
    effects: Effects,
    log: Box<dyn LogStore>,
    /// Records that the log had no room for. While there are any, nothing newer is stored or acknowledged.
    unstored: VecDeque<Persist>,
    fabric: PeerFabric,
    persisted: PersistId,
    buffer: Vec<u8>,
    encoder: Encoder,
    /// Committed entries that the reactor has not taken yet.
    pub committed: VecDeque<Committed>,
    /// Notices that the reactor has not taken yet.
    pub notices: VecDeque<Notice>,
    /// Why the log broke; nothing is acknowledged any more then.
    failure: Option<LogError>,
    served_alone: bool,
    recovered_last: Index,
}

impl Ordering {
    /// Opens the log that is kept in `legs` and starts a replica from what it holds.
    ///
    /// # Errors
    /// When the log cannot be opened or does not hold what we wrote.
    pub fn open(legs: &[LegSpec], options: Options, config: Config, fabric: PeerFabric) -> Result<Self, GroupError> {
        let (mut log, stored) = storage_log::open(legs, options)?;
        let corrupt = |error: consensus::WireError| GroupError::ForeignLog {
            dir: legs[0].path().to_owned(),
            reason: error.to_string(),
        };
        let state = stored.state.as_deref().map(HardState::decode).transpose().map_err(corrupt)?;
        let entries: Result<Vec<_>, _> = stored
            .entries
            .iter()
            .map(|stored| Entry::decode(&stored.bytes).map(|entry| (Index(stored.index), View(stored.view), entry)))
            .collect();
        let mut recovered = Recovered::from_store(state, entries.map_err(corrupt)?);
        recovered.doubtful = stored.doubtful;
        // The state may be durable without the truncation that went with it, and the next entry may be far ahead.
        log.truncate_prefix(recovered.base.index.0);
        // In doubt, nobody knows how far the guest that still runs has come.
        let served_alone = !recovered.doubtful && served_alone(&recovered, config.me);
        let recovered_last = recovered.entries.last().map_or(recovered.base.index, |(index, ..)| *index);
        // Not before: reading a long log takes a while.
        let replica = Replica::new(config, recovered, now_us());
        Ok(Self {
            replica,
            effects: Effects::default(),
            log,
            unstored: VecDeque::new(),
            fabric,
            persisted: PersistId(0),
            buffer: Vec::with_capacity(1 << 20),
            encoder: Encoder::default(),
            committed: VecDeque::new(),
            notices: VecDeque::new(),
            failure: None,
            served_alone,
            recovered_last,
        })
    }

    /// What consensus knows.
    pub fn replica(&self) -> &Replica {
        &self.replica
    }

    /// The connections, for registering and looking at.
    pub fn fabric(&mut self) -> &mut PeerFabric {
        &mut self.fabric
    }

    /// The log, for watching and looking at.
    pub fn log(&self) -> &dyn LogStore {
        &*self.log
    }

    /// Whether the log must be polled again at once: it has something under way and no way to say when that is done.
    pub fn log_wants_polling(&self) -> bool {
        self.log.is_busy() && self.log.event_fd().is_none()
    }

    /// Whether something was decided that the reactor has not taken yet.
    pub fn has_news(&self) -> bool {
        !self.notices.is_empty() || !self.committed.is_empty()
    }

    /// Hands an event to consensus and carries out what follows.
    pub fn step(&mut self, now_us: u64, event: Event) {
        self.replica.step(now_us, event, &mut self.effects);
        self.carry_out();
    }

    /// Proposes an entry; `None` when this replica may not now.
    pub fn propose(&mut self, now_us: u64, entry: Entry) -> Option<Index> {
        let proposed = self.replica.propose(now_us, entry, &mut self.effects).ok();
        self.carry_out();
        proposed
    }

    /// A consensus message, without its kind byte.
    pub fn receive(&mut self, now_us: u64, from: ReplicaId, message: &Received<'_>) {
        let decoded = match message {
            Received::Passing(bytes) => self.effects.decode(bytes),
            Received::Kept(message) => self.effects.decode_shared(message),
        };
        match decoded {
            Ok(message) => self.step(now_us, Event::Message { from, message }),
            Err(error) => {
                tracing::warn!(from = from.0, %error, "a peer's message is not understood; its connection is closed");
                self.fabric.disconnect(PeerId(from.0));
            }
        }
    }

    /// Looks at the log: tells consensus what became durable, or that nothing will any more. Returns how many records did.
    pub fn poll_log(&mut self, now_us: u64) -> usize {
        self.log.poll();
        if !self.unstored.is_empty() && self.store_backlog() {
            self.log.flush();
        }
        let durable = self.log.durable().0;
        let news = durable.saturating_sub(self.persisted.0);
        if news > 0 {
            self.persisted = PersistId(durable);
            self.step(now_us, Event::Persisted { through: PersistId(durable) });
        }
        if let Some(failure) = self.log.failed() {
            self.fail_log(now_us, failure);
        }
        usize::try_from(news).unwrap_or(usize::MAX)
    }

    /// Why the log failed, if it did: the group must then be torn down and started again.
    pub fn log_failure(&mut self) -> Option<GroupError> {
        self.failure.take().map(GroupError::from)
    }

    /// The last entry that was stored when this process started.
    pub fn recovered_last(&self) -> Index {
        self.recovered_last
    }

    /// Whether the log says at start that this replica led and nobody was secondary: then a guest that still runs is
    /// the group's, and only this daemon was away. True at most once per process.
    pub fn take_served_alone(&mut self) -> bool {
        std::mem::take(&mut self.served_alone)
    }

    /// Time since a peer's last byte: unlike consensus's figure it is not reset by a change of view.
    /// Absent before the first.
    pub fn peer_silent_us(&self, peer: ReplicaId, now_us: u64) -> Option<u64> {
        self.fabric.last_heard_us(PeerId(peer.0)).map(|heard| now_us.saturating_sub(heard))
    }

    /// What carries the messages to and from a peer.
    pub fn transport(&self, peer: ReplicaId) -> Transport {
        self.fabric.transport(PeerId(peer.0))
    }

    /// When the fabric wants to be polled next.
    pub fn fabric_deadline_us(&self) -> u64 {
        self.fabric.next_deadline_us()
    }

    /// Sends a message that is not consensus's.
    pub fn send_plain(&mut self, to: ReplicaId, bytes: &[u8]) {
        // A peer that is away or slow hears the next report.
        let _ = self.fabric.send(PeerId(to.0), &[bytes]);
    }

    fn fail_log(&mut self, now_us: u64, failure: LogError) {
        if self.failure.is_none() {
            self.failure = Some(failure);
            self.step(now_us, Event::StorageFailed);
        }
    }

    /// Gives the log one record; `false` if it has no room now. Any other failure shows in the next look at the log.
    fn store(&mut self, persist: &Persist) -> bool {
        self.buffer.clear();
        let appended = match persist {
            Persist::State(state) => {
                state.encode(&mut self.buffer);
                let appended = self.log.append(Record::State(&self.buffer));
                if appended.is_ok() {
                    self.log.truncate_prefix(state.base.index.0);
                }
                appended
            }
            Persist::Append { index, view, entry } => {
                entry.encode_header(&mut self.buffer);
                let parts = [&self.buffer, entry.payload()];
                self.log.append(Record::Entry { index: index.0, view: view.0, parts })
            }
        };
        match appended {
            Ok(_) => true,
            Err(error) => !error.is_full(),
        }
    }

    /// Stores what waited for room, in order. Returns whether anything went in.
    fn store_backlog(&mut self) -> bool {
        let before = self.unstored.len();
        while let Some(persist) = self.unstored.pop_front() {
            if !self.store(&persist) {
                self.unstored.push_front(persist);
                break;
            }
        }
        self.unstored.len() < before
    }

    fn carry_out(&mut self) {
        let mut records = std::mem::take(&mut self.effects.persist);
        for persist in records.drain(..) {
            // Behind a record that waits, everything waits.
            if !self.unstored.is_empty() || !self.store(&persist) {
                self.unstored.push_back(persist);
            }
        }
        self.effects.persist = records;
        self.log.flush();
        self.effects.send_parts(&mut self.encoder, &[KIND_CONSENSUS], |to, parts| {
            // Lost when the peer is away: consensus sends again.
            let _ = self.fabric.send(PeerId(to.0), parts);
        });
        let committed = self.effects.committed.drain(..);
        self.committed.extend(committed.map(|(index, view, entry)| Committed { index, view, entry }));
        self.notices.extend(self.effects.notices.drain(..));
    }
}

/// Whether the last `Noop` of a stored log names `me` and its last `Second` nobody.
fn served_alone(recovered: &Recovered, me: ReplicaId) -> bool {
    let (mut leader, mut second) = (recovered.base.leader, recovered.base.second);
    for (_, _, entry) in &recovered.entries {
        match entry {
            Entry::Noop { leader: named } => leader = Some(*named),
            Entry::Second { replica, .. } => second = *replica,
            Entry::Input(_) | Entry::SyncVm { .. } => {}
        }
    }
    leader == Some(me) && second.is_none()
}
