//! Three real replicas, abstract disks, and a network that delivers what it holds in any order or never.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use consensus::{Effects, Entry, Event, Index, Message, Notice, Payload, PersistId, ReplicaId};
use stateright::{Model, Property};

use crate::envelope::Envelope;
use crate::host::{GENESIS_LEADER, Hashed, Host, REPLICAS};
use crate::ledger::Ledger;

/// The secondary of the group that was formed.
const FIRST_SECOND: ReplicaId = ReplicaId(1);

/// How many times each thing that could go on for ever may happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Inputs.
    pub inputs: u8,
    /// Deadlines that pass: heartbeats, repeated questions, a leader not heard for the failure timeout.
    pub timeouts: u8,
    /// Connections that break: a follower's to its leader, or all of a leader's.
    pub breaks: u8,
    /// Crashes, each followed by a restart.
    pub crashes: u8,
    /// A leader without a secondary begins a syncvm; with one, it drops it.
    pub seconds: u8,
    /// Planned hand-overs.
    pub hand_overs: u8,
}

/// A deliberate mistake around the replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// The disk says "durable" before it is.
    AckBeforePersist,
    /// A restarted replica claims to have an intact guest.
    IntactAfterRestart,
}

/// What to explore.
#[derive(Clone, Debug)]
pub struct Group {
    pub budget: Budget,
    /// A message that was delivered may be delivered again, any number of times.
    pub duplication: bool,
    /// Records stay pending until the explorer says so, and a crash loses them; otherwise they are durable at
    /// once.
    pub slow_disks: bool,
    pub mutant: Mutant,
}

/// One thing that may happen next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    Deliver(Envelope),
    /// All records of a disk become durable.
    Persist(ReplicaId),
    Timeout(ReplicaId),
    Break(ReplicaId),
    /// With the number of unfinished records that reach the disk.
    Crash(ReplicaId, usize),
    Input(ReplicaId),
    DropSecond(ReplicaId),
    SyncVm(ReplicaId, ReplicaId),
    /// The guest of the second is whole now, says its leader.
    Whole(ReplicaId, ReplicaId),
    HandOver(ReplicaId, ReplicaId),
}

/// The whole group.
#[derive(Clone, Debug, PartialEq, Hash)]
pub struct State {
    hosts: [Arc<Hashed>; REPLICAS as usize],
    /// A set, in order.
    flying: Vec<Envelope>,
    pub ledger: Ledger,
    left: Budget,
    /// As in [`Group::slow_disks`].
    slow_disks: bool,
}

fn replicas() -> impl Iterator<Item = ReplicaId> {
    (0..REPLICAS).map(ReplicaId)
}

impl State {
    fn host(&self, id: ReplicaId) -> &Host {
        &self.hosts[id.slot()]
    }

    /// Lets one host do something, and takes over what follows.
    fn at(&mut self, id: ReplicaId, mutant: Mutant, act: impl FnOnce(&mut Host, &mut Effects)) {
        let mut host = self.host(id).clone();
        let mut out = Effects::default();
        // A replica asserts some of I1 itself. Its copy is dropped then.
        let whole = catch_unwind(AssertUnwindSafe(|| {
            act(&mut host, &mut out);
            self.absorb(id, &mut host, &mut out, mutant);
        }));
        if whole.is_err() {
            self.ledger.broken_i1 = Some("a replica refuses to go on");
            return;
        }
        self.hosts[id.slot()] = Arc::new(Hashed::new(host));
        let hosts = &self.hosts;
        self.flying.retain(|envelope| !envelope.is_dead(&hosts[envelope.from.slot()], &hosts[envelope.to.slot()]));
    }

    fn absorb(&mut self, id: ReplicaId, host: &mut Host, out: &mut Effects, mutant: Mutant) {
        let records = out.persist.len();
        host.disk.pending.append(&mut out.persist);
        for (to, message) in out.messages.drain(..) {
            match message {
                Message::Accept { view, .. } => self.ledger.on_accept_sent(id, host.life, view),
                Message::AcceptOk { view, through, .. } => host.acknowledged = (view, through),
                _ => {}
            }
            let envelope = Envelope::new(id, to, message);
            if let Err(at) = self.flying.binary_search(&envelope) {
                self.flying.insert(at, envelope);
            }
        }
        for (index, view, entry) in out.committed.drain(..) {
            self.ledger.on_committed(host.handed_out.next(), (index, view, entry));
            host.handed_out = index;
        }
        for notice in out.notices.drain(..) {
            match notice {
                Notice::Leading { view } => self.ledger.on_leading(id, host, view),
                Notice::Jumped { base } => (host.handed_out, host.guest) = (base, None),
                _ => {}
            }
        }
        if records > 0 && (mutant == Mutant::AckBeforePersist || !self.slow_disks) {
            if !self.slow_disks {
                host.disk.apply(records);
            }
            host.replica.step(0, Event::Persisted { through: PersistId(u64::MAX) }, out);
            self.absorb(id, host, out, mutant);
        }
    }

    fn step(&mut self, id: ReplicaId, mutant: Mutant, event: Event) {
        // A clock that goes back stands still: only timeouts move it.
        self.at(id, mutant, |host, out| host.replica.step(0, event, out));
    }

    fn propose(&mut self, id: ReplicaId, mutant: Mutant, entry: Entry) {
        self.at(id, mutant, |host, out| {
            let _ = host.replica.propose(0, entry, out);
        });
    }

    fn persist(&mut self, id: ReplicaId, mutant: Mutant) {
        self.at(id, mutant, |host, out| {
            let count = host.disk.pending.len();
            host.disk.apply(count);
            host.replica.step(0, Event::Persisted { through: PersistId(count as u64) }, out);
        });
    }

    fn timeout(&mut self, id: ReplicaId, mutant: Mutant) {
        self.at(id, mutant, |host, out| {
            // All of it in one move: time that passes without a look would not count.
            let due_us = host.replica.decides_at_us();
            let mut at_us = 0;
            while at_us < due_us {
                at_us = host.replica.next_deadline_us();
                host.replica.step(at_us, Event::Tick, out);
            }
        });
    }

    /// The connections to the leader break, or all of a leader's.
    fn break_connections(&mut self, id: ReplicaId, mutant: Mutant) {
        let leader = self.host(id).replica.leader();
        self.at(id, mutant, |host, out| {
            for peer in replicas().filter(|peer| *peer != id && (leader == Some(id) || leader == Some(*peer))) {
                host.replica.step(0, Event::PeerLost(peer), out);
            }
        });
    }

    fn whole(&mut self, leader: ReplicaId, with: ReplicaId, mutant: Mutant) {
        let Some(base) = self.syncvm_to_answer(leader, with) else {
            return;
        };
        self.at(with, mutant, |host, out| {
            host.guest = Some(base);
            host.replica.step(0, Event::GuestIntact(true), out);
        });
        self.propose(leader, mutant, Entry::Second { replica: Some(with), base });
    }

    /// The syncvm with `with` that `leader` proposed itself, that is committed, and that nobody was named by yet.
    fn syncvm_to_answer(&self, leader: ReplicaId, with: ReplicaId) -> Option<Index> {
        let view = self.host(leader).replica.leading()?;
        let committed = self.ledger.committed.iter().zip(1..).take(self.host(leader).handed_out.0 as usize);
        let (_, index) = committed
            .filter(|((of, entry), _)| *of == view && matches!(entry, Entry::SyncVm { .. } | Entry::Second { .. }))
            .last()
            .filter(|((_, entry), _)| *entry == Entry::SyncVm { with })?;
        // Its guest takes the leader's state as of that entry, and its log goes on from there.
        (self.host(leader).replica.last_index() == Index(index)).then_some(Index(index))
    }

    /// Delivers and persists everything until nothing moves.
    fn settle(&mut self) {
        loop {
            if !self.flying.is_empty() {
                let envelope = self.flying.remove(0);
                self.step(envelope.to, Mutant::None, envelope.event());
            } else if let Some(id) = replicas().find(|id| !self.host(*id).disk.pending.is_empty()) {
                self.persist(id, Mutant::None);
            } else {
                return;
            }
        }
    }

    /// A group that was formed: replica 0 leads, replica 1 is its secondary, nothing is under way.
    fn formed(budget: Budget, slow_disks: bool) -> State {
        let hosts = [0, 1, 2].map(|id| Arc::new(Hashed::new(Host::new(ReplicaId(id)))));
        let mut state = State { hosts, flying: Vec::new(), ledger: Ledger::default(), left: budget, slow_disks };
        let second = FIRST_SECOND;
        state.at(GENESIS_LEADER, Mutant::None, |host, out| {
            host.guest = Some(Index(0));
            host.replica.step(0, Event::GuestIntact(true), out);
        });
        replicas().for_each(|id| state.timeout(id, Mutant::None));
        state.settle();
        assert!(state.host(GENESIS_LEADER).replica.leading().is_some(), "no group was formed");
        state.propose(GENESIS_LEADER, Mutant::None, Entry::SyncVm { with: second });
        state.settle();
        state.whole(GENESIS_LEADER, second, Mutant::None);
        state.settle();
        // A heartbeat, so that everybody knows what is committed.
        state.timeout(GENESIS_LEADER, Mutant::None);
        state.settle();
        let told = replicas().filter(|id| state.host(*id).replica.second() == Some(second));
        assert_eq!(told.count(), usize::from(REPLICAS), "not everybody knows the secondary");
        state.ledger.reigns.clear();
        state
    }
}

impl Group {
    /// What the leaders of this moment may do of themselves.
    fn leader_actions(&self, state: &State, id: ReplicaId, actions: &mut Vec<Action>) {
        let replica = &state.host(id).replica;
        if replica.leading().is_none() {
            return;
        }
        if state.left.inputs > 0 {
            actions.push(Action::Input(id));
        }
        let second = replica.second().filter(|second| *second != id);
        if let Some(second) = second
            && state.left.hand_overs > 0
        {
            actions.push(Action::HandOver(id, second));
        }
        for with in replicas().filter(|with| *with != id) {
            if state.syncvm_to_answer(id, with).is_some() {
                actions.push(Action::Whole(id, with));
            } else if second.is_none() && state.left.seconds > 0 {
                actions.push(Action::SyncVm(id, with));
            }
        }
        if second.is_some() && state.left.seconds > 0 {
            actions.push(Action::DropSecond(id));
        }
    }

    fn host_actions(&self, state: &State, id: ReplicaId, actions: &mut Vec<Action>) {
        let host = state.host(id);
        if !host.disk.pending.is_empty() {
            actions.push(Action::Persist(id));
        }
        if state.left.timeouts > 0 {
            actions.push(Action::Timeout(id));
        }
        if state.left.breaks > 0 && host.replica.leader().is_some() {
            actions.push(Action::Break(id));
        }
        if state.left.crashes > 0 {
            actions.extend((0..=host.disk.pending.len()).map(|keep| Action::Crash(id, keep)));
        }
    }
}

impl Model for Group {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::formed(self.budget, self.slow_disks)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.extend(state.flying.iter().cloned().map(Action::Deliver));
        for id in replicas() {
            self.host_actions(state, id, actions);
            self.leader_actions(state, id, actions);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let (mut state, mutant) = (last.clone(), self.mutant);
        match action {
            Action::Deliver(envelope) => {
                if !self.duplication || !envelope.may_be_doubled() {
                    state.flying.retain(|other| *other != envelope);
                }
                state.step(envelope.to, mutant, envelope.event());
            }
            Action::Persist(id) => state.persist(id, mutant),
            Action::Timeout(id) => {
                state.left.timeouts -= 1;
                state.timeout(id, mutant);
            }
            Action::Break(id) => {
                state.left.breaks -= 1;
                state.break_connections(id, mutant);
            }
            Action::Crash(id, keep) => {
                state.left.crashes -= 1;
                state.hosts[id.slot()] = Arc::new(Hashed::new(state.host(id).crash(id, keep)));
                if mutant == Mutant::IntactAfterRestart {
                    state.step(id, mutant, Event::GuestIntact(true));
                }
            }
            Action::Input(id) => {
                state.left.inputs -= 1;
                state.propose(id, mutant, Entry::Input(Payload::from(vec![state.left.inputs])));
            }
            Action::DropSecond(id) => {
                state.left.seconds -= 1;
                state.propose(id, mutant, Entry::Second { replica: None, base: Index(0) });
            }
            Action::SyncVm(id, with) => {
                state.left.seconds -= 1;
                state.propose(id, mutant, Entry::SyncVm { with });
            }
            Action::Whole(id, with) => state.whole(id, with, mutant),
            Action::HandOver(id, to) => {
                state.left.hand_overs -= 1;
                state.step(id, mutant, Event::HandOver { to });
            }
        }
        (state != *last).then_some(state)
    }

    /// What must hold, and what must be possible, or the budget is too small to mean anything.
    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always(I1, |_, state: &State| state.ledger.broken_i1.is_none()),
            Property::always(I6, |_, state: &State| state.ledger.broken_i6.is_none()),
        ];
        let budget = &self.budget;
        // Two of three must have lost their leader.
        if budget.breaks + budget.timeouts + budget.crashes + 2 * budget.hand_overs > 1 {
            properties.push(Property::sometimes("the view changes and the secondary leads", |_, state: &State| {
                state.ledger.reigns.iter().any(|(_, leader)| *leader == FIRST_SECOND)
            }));
        }
        if budget.breaks + budget.crashes + 2 * budget.hand_overs > 1 && budget.inputs > 0 {
            properties.push(Property::sometimes("an input is committed in the second view", |_, state: &State| {
                let inputs = state.ledger.committed.iter().filter(|(_, entry)| matches!(entry, Entry::Input(_)));
                let second = state.ledger.reigns.first().map(|(view, _)| *view);
                inputs.map(|(view, _)| Some(*view)).any(|view| view == second)
            }));
        }
        if budget.seconds > 1 {
            properties.push(Property::sometimes("another secondary is named", |_, state: &State| {
                let other = |replica: &ReplicaId| *replica != FIRST_SECOND && *replica != GENESIS_LEADER;
                let mut entries = state.ledger.committed.iter().map(|(_, entry)| entry);
                entries.any(|entry| matches!(entry, Entry::Second { replica: Some(replica), .. } if other(replica)))
            }));
        }
        if budget.inputs > 0 {
            properties.push(Property::sometimes("every input is committed", |group: &Self, state: &State| {
                let inputs = state.ledger.committed.iter().filter(|(_, entry)| matches!(entry, Entry::Input(_)));
                inputs.count() == usize::from(group.budget.inputs)
            }));
        }
        properties
    }
}

pub const I1: &str = "I1: one leader per view, one committed entry per index";
pub const I6: &str = "I6: only a replica that the committed log names leads";
