//! One replica: its state, the way in ([`Replica::step`], [`Replica::propose`]) and the getters.
//!
//! One struct with its rules spread over files by subject, rather than a struct per role: promise, log and
//! durability belong to the replica whatever it is doing, and a role that owned them would have to hand them
//! over at every view change.

mod acceptor;
mod attention;
mod canonical;
mod commit;
mod durable;
mod election;
mod flow;
mod recovery;
mod rejoin;
mod release;
mod replication;

use std::collections::VecDeque;

use crate::config::{Config, MAX_REPLICAS, Recovered};
use crate::effects::{Effects, Event, Notice};
use crate::entry::{Base, Entry};
use crate::ids::{Index, ReplicaId, View, Viewstamp};
use crate::log::Log;
use crate::message::Message;
use crate::rng::Rng;
use durable::Durability;
use release::SyncVm;

pub use flow::Lag;
pub use release::Release;

/// What the committed log makes of this replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It led last; whether it still may act on that is [`Replica::leading`].
    Leader,
    /// It is next in line.
    Secondary,
    /// It stores and votes.
    Witness,
}

/// Why an entry was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another replica leads, or nobody does, or this one is handing over.
    #[error("replica does not lead; propose at {leader:?}, or wait for an election if that is None")]
    NotLeader {
        /// Who does, as far as known.
        leader: Option<ReplicaId>,
    },
    /// Too much is proposed and not yet committed.
    #[error("the window of uncommitted entries is full; propose again after the next commit")]
    WindowFull,
    /// The secondary's guest is too far behind (R16). Only inputs are refused for that.
    #[error("the secondary's guest is too far behind; propose again when it has caught up, or name another")]
    SecondaryLags,
    /// The entry names a secondary that no syncvm of this view made whole (R17).
    #[error("no syncvm of this view with that replica and index is committed; do one first")]
    NotWhole,
    /// The log store failed.
    #[error("the log store of this replica failed; repair it and restart the process")]
    StorageFailed,
}

/// What this replica is doing about leadership.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Follower,
    PreVote { view: View, granted: u8 },
    Candidate(Box<Candidate>),
    Leader(Leading),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Vote {
    last: Viewstamp,
    commit: Index,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Candidate {
    view: View,
    votes: [Option<Vote>; MAX_REPLICAS],
    /// A new group forms: every replica must promise (R12).
    genesis: bool,
    /// The others were asked; not before the own promise is durable (R1).
    asked: bool,
    /// The voter whose log is better than ours, and its last entry.
    fetching: Option<(ReplicaId, Viewstamp)>,
    /// The first entry that it has not sent yet.
    fetch_from: Index,
    give_up_us: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Leading {
    noop: Index,
    serving: bool,
    heartbeat_us: u64,
    handover: Option<HandOver>,
    /// The last `Second` that was committed is a `Second(none)` of this view (R17).
    alone: bool,
    /// The last syncvm that was proposed in this view, unless it was given up (R17).
    syncvm: Option<SyncVm>,
    /// The secondary has not consumed this entry, which was there at that time (R16).
    lag_mark: Option<(Index, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct HandOver {
    to: ReplicaId,
    give_up_us: u64,
}

/// What is known of another replica.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Peer {
    /// The connection broke and nothing was heard since.
    lost: bool,
    heard_us: u64,
    /// Its log matches ours through here, durably (leader only).
    matched: Index,
    /// As `matched`, by what it said while it had a vote: that alone counts towards a majority, since an
    /// acknowledgement from before it lost its disk may arrive late (leader only, R13).
    counted: Index,
    /// What its guest has consumed (leader only, R16).
    consumed: Index,
    /// The next entry to send (leader only).
    next: Index,
    /// The last index of each message with entries that it has not acknowledged (leader only).
    in_flight: VecDeque<Index>,
    /// It lacked what came before the last message, which is sent alone until it matches behind this entry
    /// (leader only, R9).
    probe: Option<Index>,
    /// It had a vote when it was last heard (leader only).
    voting: bool,
    /// The highest commit index that it was told (leader only).
    told_commit: Index,
    /// It said that its disk is blank, with this nonce (R12).
    blank_nonce: Option<u64>,
    /// Its answer to our `Hello`: promise and last entry (R13).
    hello: Option<(View, Viewstamp)>,
}

/// A replica of the log. See the crate's documentation for how to drive it. Copied and compared by model checkers only.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Replica {
    config: Config,
    rng: Rng,
    now_us: u64,
    log: Log,
    durability: Durability,
    promised: View,
    /// The highest view heard of; a candidate must go above.
    seen: View,
    commit: Index,
    /// Roles as of `commit`.
    committed: Base,
    /// The log matches that of the leader of `promised` through here.
    matched: Index,
    leader: Option<ReplicaId>,
    leader_heard_us: u64,
    /// An `Accept` of the present view is not answered yet.
    ack_due: bool,
    acked: Index,
    /// What this replica's guest has consumed, and what the leader was told of it (R16).
    consumed: Index,
    told_consumed: Index,
    /// A `Prepare` for `promised` is not answered yet.
    promise_due: Option<ReplicaId>,
    phase: Phase,
    /// When a replica that does not lead does something by itself.
    deadline_us: u64,
    guest_intact: bool,
    cold_start: bool,
    /// Somebody's log names this replica, whatever its own says (R7); ends at this time.
    hinted_until_us: u64,
    learner: bool,
    blank: bool,
    /// The disk is doubtful, and no record says yet that its replica is a learner (R15).
    doubt_unsaved: bool,
    nonce: u64,
    /// What a learner must reach before it votes.
    learn_target: Option<Viewstamp>,
    failed: bool,
    peers: [Peer; MAX_REPLICAS],
}

impl Replica {
    /// Starts a replica from what its disk holds. `now_us` is any clock that never goes back; later steps use
    /// the same one.
    ///
    /// # Panics
    /// When `config` is contradictory, or the recovered entries have a hole (the store lost records, and
    /// going on would forget what was promised).
    pub fn new(config: Config, recovered: Recovered, now_us: u64) -> Replica {
        config.check();
        let blank = recovered.is_blank();
        let mut log = Log::new(recovered.base);
        if !recovered.void_entries {
            for (index, view, entry) in recovered.entries {
                if index > recovered.base.index {
                    let expected = log.last().index.next();
                    assert!(
                        index == expected,
                        "recovered log: entry {index} where {expected} should be; the store lost records"
                    );
                    log.append(view, entry);
                }
            }
        }
        let mut rng = Rng::new(config.seed ^ now_us.rotate_left(32));
        let nonce = rng.next().max(1);
        let learner = (blank && config.replicas > 1) || recovered.learner || recovered.doubtful;
        let deadline_us =
            now_us + if learner { 0 } else { config.failure_timeout_us + rng.below(config.campaign_retry_us) };
        let durability = Durability::new(log.last().index, recovered.void_entries);
        Replica {
            rng,
            now_us,
            durability,
            promised: recovered.promised,
            seen: recovered.promised,
            commit: recovered.base.index,
            committed: recovered.base,
            matched: recovered.base.index,
            leader: None,
            leader_heard_us: 0,
            ack_due: false,
            acked: Index(0),
            consumed: Index(0),
            told_consumed: Index(0),
            promise_due: None,
            phase: Phase::Follower,
            deadline_us,
            guest_intact: false,
            cold_start: false,
            hinted_until_us: 0,
            learner,
            blank,
            doubt_unsaved: recovered.doubtful,
            nonce,
            learn_target: None,
            failed: false,
            peers: std::array::from_fn(|_| Peer { heard_us: now_us, ..Peer::default() }),
            log,
            config,
        }
    }

    /// Takes one event and appends what follows from it to `out`. A clock that went back is taken to stand still, and one
    /// that jumped ahead past [`next_deadline_us`](Self::next_deadline_us) means that this replica was not run (R18).
    pub fn step(&mut self, now_us: u64, event: Event, out: &mut Effects) {
        self.advance(now_us, out);
        if self.failed {
            return;
        }
        if std::mem::take(&mut self.doubt_unsaved) {
            // Before anything else is stored: the first record overwrites the store's evidence.
            self.persist_state(true, out);
        }
        match event {
            Event::Message { from, message } => self.on_message(from, message, out),
            Event::Persisted { through } => self.on_persisted(through, out),
            Event::Tick => self.on_tick(out),
            Event::PeerConnected(peer) => self.on_peer_connected(peer, out),
            Event::PeerLost(peer) => self.on_peer_lost(peer, out),
            Event::PeerHeard(peer) => self.on_peer_heard(peer),
            Event::GuestIntact(intact) => self.on_guest_intact(intact, out),
            Event::StepDown => self.on_step_down(out),
            Event::HandOver { to } => self.on_hand_over(to, out),
            Event::Consumed(index) => self.on_consumed(index, out),
            Event::SyncVmFailed(index) => self.on_syncvm_failed(index),
            Event::Truncate(index) => self.truncate(index, out),
            Event::StorageFailed => self.on_storage_failed(out),
            Event::AllowColdStart => {
                self.cold_start = true;
                self.campaign_if_leaderless(out);
            }
        }
    }

    fn on_message(&mut self, from: ReplicaId, message: Message, out: &mut Effects) {
        if from == self.config.me || from.0 >= self.config.replicas {
            return;
        }
        self.peers[from.slot()].lost = false;
        if !matches!(self.phase, Phase::Leader(_)) {
            self.peers[from.slot()].heard_us = self.now_us;
        }
        match message {
            Message::PreVote { view } => self.on_pre_vote(from, view, out),
            Message::PreVoteReply { view, granted, promised } => {
                self.on_pre_vote_reply(from, view, granted, promised, out)
            }
            Message::Prepare { view, genesis_nonce } => self.on_prepare(from, view, genesis_nonce, out),
            Message::Promise { view, last, commit } => self.on_promise(from, view, Vote { last, commit }, out),
            Message::Fetch { view, from: index } => self.on_fetch(from, view, index, out),
            Message::Fetched { view, prev, mut entries } => {
                self.on_fetched(from, view, prev, &mut entries, out);
                out.spare.give(entries);
            }
            Message::FetchedBase { view, base } => self.on_fetched_base(from, view, base, out),
            Message::Accept { view, prev, commit, base, mut entries } => {
                if self.follow(from, view, out) {
                    self.on_accept(from, prev, (commit, base), &mut entries, out);
                }
                out.spare.give(entries);
            }
            Message::AcceptOk { view, through, voting, consumed } => {
                self.on_accept_ok(from, view, (through, voting), consumed, out)
            }
            Message::Reject { view, prev, have, commit } => self.on_reject(from, view, (prev, have, commit), out),
            Message::InstallBase { view, base } => {
                if self.follow(from, view, out) {
                    self.on_install_base(base, out);
                }
            }
            Message::Nack { promised } => self.on_nack(promised, out),
            Message::TakeOver { view, handover } => self.on_take_over(from, view, handover, out),
            Message::Hello { nonce, blank } => self.on_hello(from, nonce, blank, out),
            Message::HelloReply { nonce, promised, last } => self.on_hello_reply(from, nonce, (promised, last), out),
        }
    }

    /// Appends `entry` to the log if this replica leads, and sends it on its way. It is committed only when it
    /// comes out of [`Effects::committed`].
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub fn propose(&mut self, now_us: u64, entry: Entry, out: &mut Effects) -> Result<Index, ProposeError> {
        self.advance(now_us, out);
        if self.failed {
            return Err(ProposeError::StorageFailed);
        }
        match &self.phase {
            Phase::Leader(Leading { serving: true, handover: None, .. }) => {}
            Phase::Leader(Leading { handover: Some(HandOver { to, .. }), .. }) => {
                return Err(ProposeError::NotLeader { leader: Some(*to) });
            }
            _ => {
                return Err(ProposeError::NotLeader { leader: self.leader.filter(|leader| *leader != self.config.me) });
            }
        }
        let last = self.log.last().index;
        let (entries, bytes) = (last.0 - self.commit.0, self.log.bytes_between(self.commit, last));
        if entries >= self.config.window_entries
            || (entries > 0 && bytes + entry.weight_bytes() > self.config.window_bytes)
        {
            return Err(ProposeError::WindowFull);
        }
        match entry {
            Entry::Input(_) if self.second_lags(self.now_us) => return Err(ProposeError::SecondaryLags),
            Entry::Second { replica: Some(replica), base } if !self.is_whole(replica, base) => {
                return Err(ProposeError::NotWhole);
            }
            _ => {}
        }
        let with = if let Entry::SyncVm { with } = entry { Some(with) } else { None };
        let index = self.append(self.promised, entry, out);
        self.note_proposed(index, with);
        self.replicate(out);
        Ok(index)
    }

    fn on_tick(&mut self, out: &mut Effects) {
        if matches!(self.phase, Phase::Leader(_)) {
            self.leader_tick(out);
        } else if self.now_us >= self.deadline_us {
            self.on_deadline(out);
        }
    }

    fn on_peer_connected(&mut self, peer: ReplicaId, out: &mut Effects) {
        if peer == self.config.me || peer.0 >= self.config.replicas {
            return;
        }
        let state = &mut self.peers[peer.slot()];
        state.lost = false;
        // What was on its way over the old connection may be gone; the heartbeat's `prev` finds out (R9).
        state.in_flight.clear();
        if matches!(self.phase, Phase::Leader(_)) {
            self.send_heartbeat(peer, out);
        } else if self.learner {
            self.say_hello(out);
        }
    }

    fn on_peer_lost(&mut self, peer: ReplicaId, out: &mut Effects) {
        if peer.0 >= self.config.replicas {
            return;
        }
        self.peers[peer.slot()].lost = true;
        if self.leader == Some(peer) {
            self.campaign_if_leaderless(out);
        }
    }

    fn on_peer_heard(&mut self, peer: ReplicaId) {
        if peer.0 >= self.config.replicas {
            return;
        }
        let state = &mut self.peers[peer.slot()];
        (state.lost, state.heard_us) = (false, self.now_us);
        if self.leader == Some(peer) {
            self.leader_heard_us = self.now_us;
        }
    }

    fn on_guest_intact(&mut self, intact: bool, out: &mut Effects) {
        self.guest_intact = intact;
        if intact {
            self.campaign_if_leaderless(out);
        } else if !self.may_have_guest() {
            match self.phase {
                Phase::PreVote { .. } | Phase::Candidate(_) => self.become_follower(self.config.failure_timeout_us),
                // It would begin to serve without one (R6). A leader that serves may have something left to say;
                // it stops by `StepDown`.
                Phase::Leader(Leading { serving: false, .. }) => self.lose_lead(out),
                _ => {}
            }
        }
    }

    fn on_step_down(&mut self, out: &mut Effects) {
        self.guest_intact = false;
        if !matches!(self.phase, Phase::Leader(_)) {
            return;
        }
        self.send_take_over_to_second(out);
        self.lose_lead(out);
    }

    fn send_take_over_to_second(&self, out: &mut Effects) {
        if let Some(second) = self.committed.second.filter(|second| *second != self.config.me) {
            out.messages.push((second, Message::TakeOver { view: self.promised, handover: true }));
        }
    }

    fn on_hand_over(&mut self, to: ReplicaId, out: &mut Effects) {
        let (now_us, timeout_us) = (self.now_us, self.config.failure_timeout_us);
        if to == self.config.me || self.committed.second != Some(to) {
            return;
        }
        if let Phase::Leader(leading) = &mut self.phase
            && leading.serving
        {
            leading.handover = Some(HandOver { to, give_up_us: now_us + 2 * timeout_us });
            out.messages.push((to, Message::TakeOver { view: self.promised, handover: true }));
        }
    }

    fn on_storage_failed(&mut self, out: &mut Effects) {
        if matches!(self.phase, Phase::Leader(_)) {
            self.send_take_over_to_second(out);
            self.lose_lead(out);
        }
        self.phase = Phase::Follower;
        self.failed = true;
    }

    /// Stops leading, if it does; the next campaign may come soon.
    fn lose_lead(&mut self, out: &mut Effects) {
        if matches!(self.phase, Phase::Leader(_)) {
            out.notices.push(Notice::LostLead { view: self.promised });
        }
        self.become_follower(self.config.campaign_retry_us);
    }

    fn become_follower(&mut self, wait_us: u64) {
        self.phase = Phase::Follower;
        self.leader = None;
        self.deadline_us = self.now_us + wait_us + self.rng.below(self.config.campaign_retry_us);
    }

    /// What the committed log makes of this replica. After a restart the committed log begins at the base
    /// until a leader says more.
    pub fn role(&self) -> Role {
        if self.committed.leader == Some(self.config.me) {
            Role::Leader
        } else if self.committed.second == Some(self.config.me) {
            Role::Secondary
        } else {
            Role::Witness
        }
    }

    /// The view that this replica leads: everything earlier and its `Noop` are committed, and it has promised
    /// nobody else.
    pub fn leading(&self) -> Option<View> {
        matches!(self.phase, Phase::Leader(Leading { serving: true, .. }) if !self.failed).then_some(self.promised)
    }

    /// The highest view that this replica has promised.
    pub fn view(&self) -> View {
        self.promised
    }

    /// Who leads that view, once it was heard; itself from the moment it begins to.
    pub fn leader(&self) -> Option<ReplicaId> {
        self.leader
    }

    /// The secondary by the committed log.
    pub fn second(&self) -> Option<ReplicaId> {
        self.committed.second
    }

    /// The `SyncVm` that made the secondary's guest whole, by the committed log.
    pub fn second_base(&self) -> Index {
        self.committed.second_base
    }

    /// Everything through here is committed, as far as this replica knows.
    pub fn commit_index(&self) -> Index {
        self.commit
    }

    /// The last entry of the log, committed or not.
    pub fn last_index(&self) -> Index {
        self.log.last().index
    }

    /// Where the log begins.
    pub fn base(&self) -> &Base {
        self.log.base()
    }

    /// How far the log of `peer` is known to match, durably. Only a leader knows; 0 otherwise.
    pub fn match_index(&self, peer: ReplicaId) -> Index {
        match &self.phase {
            Phase::Leader(_) if peer == self.config.me => self.durability.index(),
            Phase::Leader(_) => self.peers.get(peer.slot()).map_or(Index(0), |peer| peer.matched),
            _ => Index(0),
        }
    }

    /// Time since a sign of life of `peer`: bulk traffic or a message; for a leader only an answer in its own view.
    pub fn peer_silent_us(&self, peer: ReplicaId, now_us: u64) -> u64 {
        self.peers.get(peer.slot()).map_or(u64::MAX, |peer| now_us.saturating_sub(peer.heard_us))
    }

    /// Whether a majority, this replica included, was heard within the failure timeout. A leader without it
    /// keeps its view but cannot commit.
    pub fn has_quorum_contact(&self, now_us: u64) -> bool {
        let leads = matches!(self.phase, Phase::Leader(_));
        let heard = self.config.peers().filter(|id| {
            let peer = &self.peers[id.slot()];
            !peer.lost
                && (peer.voting || !leads)
                && now_us.saturating_sub(peer.heard_us) < self.config.failure_timeout_us
        });
        self.config.is_majority(1 + heard.count())
    }

    /// Whether this replica must catch up before it votes (R13).
    pub fn is_learner(&self) -> bool {
        self.learner
    }

    /// An entry of the log, committed or not.
    pub(crate) fn entry(&self, index: Index) -> Option<(View, &Entry)> {
        self.log.get(index)
    }

    /// The last entry of the log, and the roles as of there.
    pub(crate) fn tail(&self) -> (Viewstamp, Base) {
        (self.log.last(), self.log.tail_roles())
    }
}
