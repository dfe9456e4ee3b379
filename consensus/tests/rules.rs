//! Rules of docs/consensus.md that chance rarely tries: single replicas, driven message by message.

use consensus::{
    Base, Config, Effects, Entry, Event, HardState, Index, Lag, Message, Notice, Payload, Persist, PersistId,
    ProposeError, Recovered, Release, Replica, ReplicaId, View, Viewstamp,
};

const R0: ReplicaId = ReplicaId(0);
const R1: ReplicaId = ReplicaId(1);
const R2: ReplicaId = ReplicaId(2);
const NONE: Entry = Entry::Second { replica: None, base: Index(0) };

/// One replica; the test plays its disk and the others.
struct Alone {
    replica: Replica,
    now_us: u64,
    stored: u64,
    out: Effects,
}

impl Alone {
    fn new(me: ReplicaId, recovered: Recovered, adjust: impl Fn(&mut Config)) -> Alone {
        let mut config = Config::new(me, R0, 7);
        adjust(&mut config);
        Alone { replica: Replica::new(config, recovered, 0), now_us: 1, stored: 0, out: Effects::default() }
    }

    /// A leader of v3 with this log, which serves once its records are durable and r1 agrees.
    fn leader(log: Vec<Entry>, adjust: impl Fn(&mut Config)) -> Alone {
        let entries = (1u64..).zip(log).map(|(index, entry)| (Index(index), View(3), entry)).collect();
        let state = HardState { promised: View(3), ..HardState::default() };
        let mut alone = Alone::new(R0, Recovered::from_store(Some(state), entries), adjust);
        alone.step(Event::GuestIntact(true));
        let last = Viewstamp { view: View(3), index: alone.replica.last_index() };
        alone.hear(R1, Message::PreVoteReply { view: View(6), granted: true, promised: View(3) });
        alone.persist();
        alone.hear(R1, Message::Promise { view: View(6), last, commit: Index(0) });
        assert_eq!(alone.replica.leader(), Some(R0));
        alone
    }

    /// As a leader that serves, after `Second(none)` if that is wanted.
    fn serving(adjust: impl Fn(&mut Config)) -> Alone {
        let mut alone = Alone::leader(vec![Entry::Noop { leader: R0 }], adjust);
        alone.acknowledge(R1, 0);
        assert_eq!(alone.replica.leading(), Some(View(6)));
        alone
    }

    fn with_secondary(adjust: impl Fn(&mut Config)) -> Alone {
        let mut alone = Alone::serving(adjust);
        alone.commit(NONE);
        let base = alone.commit(Entry::SyncVm { with: R1 });
        alone.commit(Entry::Second { replica: Some(R1), base });
        alone
    }

    fn step(&mut self, event: Event) {
        self.out.clear();
        self.replica.step(self.now_us, event, &mut self.out);
        self.stored += self.out.persist.len() as u64;
    }

    fn hear(&mut self, from: ReplicaId, message: Message) {
        self.step(Event::Message { from, message });
    }

    fn persist(&mut self) {
        self.step(Event::Persisted { through: PersistId(self.stored) });
    }

    fn propose(&mut self, entry: Entry) -> Result<Index, ProposeError> {
        self.out.clear();
        let result = self.replica.propose(self.now_us, entry, &mut self.out);
        self.stored += self.out.persist.len() as u64;
        result
    }

    /// Everything is durable here and at `by`, whose guest has consumed that much.
    fn acknowledge(&mut self, by: ReplicaId, consumed: u64) {
        self.persist();
        let (view, through) = (self.replica.view(), self.replica.last_index());
        self.hear(by, Message::AcceptOk { view, through, voting: true, consumed: Index(consumed) });
    }

    fn commit(&mut self, entry: Entry) -> Index {
        let index = self.propose(entry).expect("it leads and serves");
        self.acknowledge(R2, 0);
        assert_eq!(self.replica.commit_index(), index);
        index
    }

    fn sent(&self, wanted: impl Fn(&Message) -> bool) -> usize {
        self.out.messages.iter().filter(|(_, message)| wanted(message)).count()
    }
}

fn input() -> Entry {
    Entry::Input(Payload::from(vec![5; 100]))
}

fn stamp(index: u64, view: u64) -> Viewstamp {
    Viewstamp { view: View(view), index: Index(index) }
}

/// A disk with entries 1 to 5 of v3 that promised v4.
fn disk(doubtful: bool) -> Recovered {
    let state = HardState { promised: View(4), ..HardState::default() };
    let entries = (1..=5).map(|index| (Index(index), View(3), input())).collect();
    Recovered { doubtful, ..Recovered::from_store(Some(state), entries) }
}

#[test]
fn a_candidate_asks_nobody_before_its_own_promise_is_durable() {
    let mut alone = Alone::new(R0, disk(false), |_| {});
    alone.hear(R1, Message::TakeOver { view: View(4), handover: false });
    alone.step(Event::GuestIntact(true));
    alone.hear(R1, Message::TakeOver { view: View(4), handover: false });
    alone.hear(R1, Message::PreVoteReply { view: View(6), granted: true, promised: View(4) });
    assert_eq!(alone.replica.view(), View(6));
    let asks = |message: &Message| matches!(message, Message::Prepare { view: View(6), .. });
    assert_eq!(alone.sent(asks), 0);
    alone.persist();
    assert_eq!(alone.sent(asks), 2);
}

#[test]
fn hello_is_answered_once_the_vote_is_durable() {
    let mut alone = Alone::new(R1, Recovered::default(), |_| {});
    let answers = |message: &Message| matches!(message, Message::HelloReply { .. });
    alone.step(Event::Tick);
    let Some((_, Message::Hello { nonce, .. })) = alone.out.messages.first().cloned() else { panic!("no Hello") };
    alone.hear(R0, Message::Prepare { view: View(3), genesis_nonce: nonce });
    alone.hear(R2, Message::Hello { nonce: 5, blank: true });
    assert_eq!(alone.sent(answers), 0);
    alone.persist();
    alone.hear(R2, Message::Hello { nonce: 5, blank: true });
    assert_eq!(alone.sent(answers), 1);
}

#[test]
fn a_leader_that_loses_its_guest_before_it_serves_stops() {
    let mut alone = Alone::leader(vec![Entry::Noop { leader: R0 }], |_| {});
    alone.step(Event::GuestIntact(false));
    assert!(alone.out.notices.contains(&Notice::LostLead { view: View(6) }));
    alone.acknowledge(R1, 0);
    assert_eq!(alone.replica.leading(), None);
}

#[test]
fn no_group_forms_over_a_log() {
    let mut alone = Alone::new(R0, Recovered::default(), |_| {});
    alone.step(Event::GuestIntact(true));
    alone.step(Event::Tick);
    let Some((_, Message::Hello { nonce, .. })) = alone.out.messages.first().cloned() else { panic!("no Hello") };
    alone.hear(R2, Message::HelloReply { nonce, promised: View(3), last: stamp(5, 3) });
    alone.hear(R1, Message::Hello { nonce: 9, blank: true });
    assert_eq!(alone.sent(|message| matches!(message, Message::Prepare { .. })), 0, "r2 holds a log");
}

#[test]
fn an_old_acknowledgement_does_not_count_for_a_learner() {
    let mut alone = Alone::serving(|_| {});
    let index = alone.propose(input()).expect("it serves");
    alone.persist();
    let view = View(6);
    alone.hear(R2, Message::AcceptOk { view, through: index, voting: false, consumed: Index(0) });
    alone.hear(R2, Message::AcceptOk { view, through: Index(1), voting: true, consumed: Index(0) });
    assert!(alone.replica.commit_index() < index, "r2 had a vote when it acknowledged 1, and lost its disk since");
    alone.hear(R2, Message::AcceptOk { view, through: index, voting: true, consumed: Index(0) });
    assert_eq!(alone.replica.commit_index(), index);
}

#[test]
fn a_doubtful_disk_says_so_first_and_keeps_its_log() {
    let mut alone = Alone::new(R2, disk(true), |_| {});
    assert_eq!((alone.replica.last_index(), alone.replica.is_learner()), (Index(5), true));
    let entries = vec![(View(3), input())];
    let (prev, commit, base) = (stamp(5, 3), Index(5), Index(0));
    alone.hear(R1, Message::Accept { view: View(4), prev, commit, base, entries });
    assert!(
        matches!(alone.out.persist[..], [Persist::State(HardState { learner: true, .. }), Persist::Append { .. }]),
        "{:?}",
        alone.out.persist
    );
    alone.persist();
    let counts = |message: &Message| matches!(message, Message::AcceptOk { voting: true, .. });
    assert_eq!((alone.out.messages.len(), alone.sent(counts)), (1, 0));
    alone.hear(R1, Message::Prepare { view: View(7), genesis_nonce: 0 });
    assert!(alone.out.messages.is_empty(), "a learner promises nothing");
}

#[test]
fn a_doubtful_disk_is_not_blank() {
    let recovered = Recovered { doubtful: true, ..Recovered::default() };
    assert!(!recovered.is_blank() && Recovered::default().is_blank());
    let mut alone = Alone::new(R1, recovered, |_| {});
    alone.step(Event::Tick);
    assert_eq!(alone.sent(|message| matches!(message, Message::Hello { blank: false, .. })), 2);
}

#[test]
fn a_learner_takes_over_the_highest_promise_and_the_newest_log() {
    let mut alone = Alone::new(R2, disk(true), |_| {});
    alone.step(Event::Tick);
    let Some((_, Message::Hello { nonce, .. })) = alone.out.messages.first().cloned() else { panic!("no Hello") };
    alone.hear(R0, Message::HelloReply { nonce, promised: View(9), last: stamp(5, 3) });
    assert!(alone.replica.is_learner(), "the other one may know more");
    alone.hear(R1, Message::HelloReply { nonce, promised: View(6), last: stamp(6, 6) });
    assert!(alone.replica.is_learner(), "6@v6 is not there yet");
    let accept = |view, entry| {
        let (prev, commit, base) = (stamp(5, 3), Index(5), Index(0));
        Message::Accept { view: View(view), prev, commit, base, entries: vec![(View(view), entry)] }
    };
    alone.hear(R1, accept(7, input()));
    assert_eq!(alone.sent(|message| *message == Message::Nack { promised: View(9) }), 1);
    alone.hear(R0, accept(9, Entry::Noop { leader: R0 }));
    assert!(!alone.replica.is_learner() && alone.out.notices.contains(&Notice::Promoted));
    assert!(matches!(alone.out.persist.last(), Some(Persist::State(HardState { learner: false, .. }))));
}

#[test]
fn a_refusal_is_answered_by_one_message_until_it_matches() {
    let mut alone = Alone::serving(|config| (config.batch_entries, config.window_entries) = (1, 100));
    for _ in 0..10 {
        alone.propose(input()).expect("it serves");
    }
    let refuse = |prev| Message::Reject { view: View(6), prev: Index(prev), have: stamp(1, 1), commit: Index(0) };
    let entries = |message: &Message| matches!(message, Message::Accept { entries, .. } if !entries.is_empty());
    alone.hear(R2, refuse(5));
    assert_eq!(alone.sent(entries), 1);
    for prev in 6..10 {
        alone.hear(R2, refuse(prev));
        assert_eq!(alone.sent(entries), 0, "{prev} was on its way before");
    }
    alone.hear(R2, Message::AcceptOk { view: View(6), through: Index(1), voting: true, consumed: Index(0) });
    assert!(alone.sent(entries) > 1);
}

#[test]
fn a_secondary_that_lags_is_waited_for() {
    let limits = |config: &mut Config| (config.second_lag_entries, config.second_lag_us) = (10, 50_000);
    let mut alone = Alone::with_secondary(limits);
    let base = alone.replica.second_base().0;
    let taken = (0..100).take_while(|_| alone.propose(input()).is_ok()).count() as u64;
    assert_eq!(alone.replica.last_index().0 - base, 10, "{taken} inputs were taken");
    assert_eq!(alone.propose(input()), Err(ProposeError::SecondaryLags));
    alone.acknowledge(R1, base + 5);
    assert!(alone.propose(input()).is_ok());
    // The time limit: it has not consumed what was there 50 ms ago.
    alone.now_us += 49_999;
    let lag = alone.replica.second_lag(alone.now_us);
    assert_eq!((lag.entries, lag.for_us < 50_000), (6, true), "{lag:?}");
    alone.now_us += 1;
    assert_eq!(alone.replica.second_lag(alone.now_us).for_us, 50_000);
    assert_eq!(alone.propose(input()), Err(ProposeError::SecondaryLags));
    assert!(alone.propose(Entry::SyncVm { with: R1 }).is_ok() && alone.propose(NONE).is_ok());
    alone.acknowledge(R2, 0);
    assert!(alone.propose(input()).is_ok(), "nobody waits for a witness");
    assert_eq!(alone.replica.second_lag(alone.now_us), Lag::default());
}

#[test]
fn bytes_and_the_secondary_s_own_report_count_too() {
    let mut alone = Alone::with_secondary(|config| config.second_lag_bytes = 1000);
    let taken = (0..100).take_while(|_| alone.propose(input()).is_ok()).count();
    assert!((5..10).contains(&taken), "{taken} inputs of 164 bytes were taken");

    let roles = Base { index: Index(9), view: View(3), second: Some(R1), leader: Some(R0), ..Base::default() };
    let state = HardState { promised: View(3), base: roles, ..HardState::default() };
    let mut second = Alone::new(R1, Recovered::from_store(Some(state), vec![]), |config| config.second_lag_entries = 8);
    let (prev, commit, base) = (stamp(9, 3), Index(12), Index(9));
    let entries = vec![(View(3), input()); 3];
    second.hear(R0, Message::Accept { view: View(3), prev, commit, base, entries });
    second.persist();
    let reports = |message: &Message| matches!(message, Message::AcceptOk { consumed: Index(12), .. });
    second.step(Event::Consumed(Index(12)));
    assert_eq!(second.sent(reports), 1, "12 entries are more than a quarter of 8");
}

#[test]
fn frames_leave_at_once_only_after_second_none_of_this_view() {
    let mut alone = Alone::leader(vec![Entry::Noop { leader: R0 }, NONE], |_| {});
    assert!(!alone.replica.may_release(View(6), Release::Alone), "it does not serve yet");
    alone.acknowledge(R1, 0);
    assert_eq!(alone.replica.leading(), Some(View(6)));
    assert!(!alone.replica.may_release(View(6), Release::Alone), "the Second(none) is v3's");
    alone.commit(NONE);
    assert!(alone.replica.may_release(View(6), Release::Alone));
    assert!(!alone.replica.may_release(View(3), Release::Alone));
    let base = alone.commit(Entry::SyncVm { with: R1 });
    assert!(!alone.replica.may_release(View(6), Release::Alone), "a guest is being made that may be named");
    alone.step(Event::SyncVmFailed(base));
    assert!(alone.replica.may_release(View(6), Release::Alone));
    assert_eq!(alone.propose(Entry::Second { replica: Some(R1), base }), Err(ProposeError::NotWhole));
    let base = alone.commit(Entry::SyncVm { with: R1 });
    alone.propose(Entry::Second { replica: Some(R1), base }).expect("it is whole");
    alone.step(Event::SyncVmFailed(base));
    assert!(!alone.replica.may_release(View(6), Release::Alone), "r1 may be chosen");
    alone.hear(R1, Message::Nack { promised: View(7) });
    assert!(!alone.replica.may_release(View(6), Release::Alone), "somebody else may lead");
}

#[test]
fn a_syncvm_releases_only_what_every_heir_has() {
    let mut alone = Alone::with_secondary(|_| {});
    assert_eq!(alone.replica.second(), Some(R1));
    let index = alone.propose(Entry::SyncVm { with: R1 }).expect("it serves");
    assert!(!alone.replica.may_release(View(6), Release::SyncVm(index)), "it is not committed");
    alone.acknowledge(R2, 0);
    assert!(alone.replica.may_release(View(6), Release::SyncVm(index)));
    assert!(!alone.replica.may_release(View(9), Release::SyncVm(index)), "that view is not its own");
    let newer = alone.commit(Entry::SyncVm { with: R1 });
    assert!(!alone.replica.may_release(View(6), Release::SyncVm(index)), "it was given up for {newer}");
    let other = alone.commit(Entry::SyncVm { with: R2 });
    assert!(!alone.replica.may_release(View(6), Release::SyncVm(other)), "r1 may lead and does not have it");
    alone.step(Event::StorageFailed);
    assert!(!alone.replica.may_release(View(6), Release::SyncVm(newer)));
}
