//! Single replicas and small groups, driven by hand: what the simulator only shows as a whole.

use std::collections::VecDeque;

use consensus::{
    Base, Config, Effects, Entry, Event, HardState, Index, Message, Notice, Payload, Persist, PersistId, ProposeError,
    Recovered, Replica, ReplicaId, Role, View, Viewstamp,
};

const R0: ReplicaId = ReplicaId(0);
const R1: ReplicaId = ReplicaId(1);
const R2: ReplicaId = ReplicaId(2);

/// Three replicas; messages arrive at once and in order, disks are instant unless held.
struct Group {
    replicas: Vec<Replica>,
    now_us: u64,
    emitted: [u64; 3],
    hold_disk: [bool; 3],
    /// Nothing reaches or leaves it.
    cut: [bool; 3],
    flying: VecDeque<(ReplicaId, ReplicaId, Message)>,
    /// Everything that was sent, also what a cut swallowed.
    sent: Vec<(ReplicaId, ReplicaId, Message)>,
    notices: Vec<(ReplicaId, Notice)>,
    out: Effects,
}

impl Group {
    fn new(adjust: impl Fn(&mut Config)) -> Group {
        let replicas = [R0, R1, R2].map(|id| {
            let mut config = Config::new(id, R0, 77 + u64::from(id.0));
            adjust(&mut config);
            Replica::new(config, Recovered::default(), 0)
        });
        let mut group = Group {
            replicas: Vec::from(replicas),
            now_us: 0,
            emitted: [0; 3],
            hold_disk: [false; 3],
            cut: [false; 3],
            flying: VecDeque::new(),
            sent: Vec::new(),
            notices: Vec::new(),
            out: Effects::default(),
        };
        group.step(R0, Event::GuestIntact(true));
        group.run(50);
        assert_eq!(group.at(R0).leading(), Some(View(3)));
        group
    }

    /// With r1 as secondary whose guest is whole.
    fn with_secondary(adjust: impl Fn(&mut Config)) -> Group {
        let mut group = Group::new(adjust);
        let base = group.propose(R0, Entry::SyncVm { with: R1 }).expect("r0 leads");
        group.step(R1, Event::GuestIntact(true));
        group.propose(R0, Entry::Second { replica: Some(R1), base }).expect("r0 leads");
        group.run(50);
        assert_eq!(group.at(R1).role(), Role::Secondary);
        group
    }

    fn at(&self, id: ReplicaId) -> &Replica {
        &self.replicas[id.slot()]
    }

    fn step(&mut self, id: ReplicaId, event: Event) {
        self.replicas[id.slot()].step(self.now_us, event, &mut self.out);
        self.absorb(id);
        self.deliver();
    }

    fn propose(&mut self, id: ReplicaId, entry: Entry) -> Result<Index, ProposeError> {
        let result = self.replicas[id.slot()].propose(self.now_us, entry, &mut self.out);
        self.absorb(id);
        self.deliver();
        result
    }

    fn absorb(&mut self, id: ReplicaId) {
        while !(self.out.persist.is_empty() && self.out.messages.is_empty()) {
            for (to, message) in self.out.messages.drain(..) {
                self.sent.push((id, to, message.clone()));
                self.flying.push_back((id, to, message));
            }
            let records = self.out.persist.drain(..).count() as u64;
            self.emitted[id.slot()] += records;
            if records > 0 && !self.hold_disk[id.slot()] {
                self.persist(id);
            }
        }
        self.notices.extend(self.out.notices.drain(..).map(|notice| (id, notice)));
        self.out.clear();
    }

    fn persist(&mut self, id: ReplicaId) {
        let through = PersistId(self.emitted[id.slot()]);
        self.replicas[id.slot()].step(self.now_us, Event::Persisted { through }, &mut self.out);
    }

    fn release_disk(&mut self, id: ReplicaId) {
        self.hold_disk[id.slot()] = false;
        self.persist(id);
        self.absorb(id);
        self.deliver();
    }

    fn deliver(&mut self) {
        while let Some((from, to, message)) = self.flying.pop_front() {
            if !self.cut[from.slot()] && !self.cut[to.slot()] {
                self.replicas[to.slot()].step(self.now_us, Event::Message { from, message }, &mut self.out);
                self.absorb(to);
            }
        }
    }

    fn run(&mut self, ms: u64) {
        let until_us = self.now_us + ms * 1000;
        loop {
            let due = self.replicas.iter().map(Replica::next_deadline_us).enumerate().min_by_key(|(_, at)| *at);
            match due {
                Some((slot, at_us)) if at_us <= until_us => {
                    self.now_us = self.now_us.max(at_us);
                    self.step(ReplicaId(slot as u8), Event::Tick);
                }
                _ => break,
            }
        }
        self.now_us = until_us;
    }

    fn noticed(&self, id: ReplicaId, wanted: impl Fn(&Notice) -> bool) -> bool {
        self.notices.iter().any(|(by, notice)| *by == id && wanted(notice))
    }
}

fn input(bytes: usize) -> Entry {
    Entry::Input(Payload::from(vec![5; bytes]))
}

#[test]
fn nothing_is_acknowledged_before_it_is_durable() {
    let mut group = Group::new(|_| {});
    (group.hold_disk[1], group.hold_disk[2]) = (true, true);
    let index = group.propose(R0, input(10)).expect("r0 leads");
    group.run(60);
    assert!(group.at(R0).commit_index() < index);
    group.release_disk(R2);
    assert_eq!(group.at(R0).commit_index(), index);
    assert_eq!(group.at(R0).match_index(R2), index);
    assert!(group.at(R0).match_index(R1) < index, "r1 still waits for its disk");
}

#[test]
fn the_leader_counts_itself_only_when_durable() {
    let mut group = Group::new(|_| {});
    group.cut[2] = true;
    group.hold_disk[0] = true;
    let index = group.propose(R0, input(10)).expect("r0 leads");
    assert_eq!(group.at(R0).match_index(R1), index);
    assert!(group.at(R0).commit_index() < index);
    group.release_disk(R0);
    assert_eq!(group.at(R0).commit_index(), index);
}

#[test]
fn a_promise_waits_for_the_disk() {
    let mut group = Group::with_secondary(|_| {});
    group.cut[0] = true;
    (group.hold_disk[2], group.sent) = (true, Vec::new());
    group.step(R1, Event::PeerLost(R0));
    group.step(R2, Event::PeerLost(R0));
    group.run(60);
    let promised =
        |group: &Group| group.sent.iter().any(|(from, _, m)| *from == R2 && matches!(m, Message::Promise { .. }));
    assert!(group.at(R2).view() > View(3) && !promised(&group));
    group.release_disk(R2);
    assert!(promised(&group) && group.at(R1).leading().is_some());
}

#[test]
fn a_replica_whose_store_failed_is_silent() {
    let mut group = Group::new(|_| {});
    group.step(R2, Event::StorageFailed);
    group.sent.clear();
    let index = group.propose(R0, input(10)).expect("r0 leads");
    group.run(300);
    assert_eq!(group.at(R0).commit_index(), index);
    assert!(group.sent.iter().all(|(from, ..)| *from != R2));
    assert_eq!(group.at(R2).next_deadline_us(), u64::MAX);
}

#[test]
fn a_leader_whose_store_failed_hands_over() {
    let mut group = Group::with_secondary(|_| {});
    group.step(R0, Event::StorageFailed);
    assert!(group.at(R1).leading().is_some());
    assert!(group.noticed(R0, |notice| *notice == Notice::LostLead { view: View(3) }));
    assert_eq!(group.propose(R0, input(1)), Err(ProposeError::StorageFailed));
}

#[test]
fn the_window_bounds_what_is_not_committed() {
    let mut group = Group::new(|config| config.window_entries = 10);
    (group.cut[1], group.cut[2]) = (true, true);
    let taken = (0..100).take_while(|_| group.propose(R0, input(10)).is_ok()).count();
    assert_eq!(taken, 10);
    assert_eq!(group.propose(R0, input(10)), Err(ProposeError::WindowFull));
    assert!(!group.at(R0).has_quorum_contact(group.now_us + 100_000));

    let mut group = Group::new(|config| config.window_bytes = 1000);
    (group.cut[1], group.cut[2]) = (true, true);
    assert!(group.propose(R0, input(5000)).is_ok(), "an entry above the window still goes, alone");
    assert_eq!(group.propose(R0, input(10)), Err(ProposeError::WindowFull));
}

#[test]
fn a_silent_witness_costs_nothing_and_jumps_when_it_is_back() {
    let mut group = Group::with_secondary(|config| (config.retain_bytes, config.peer_window_entries) = (1000, 8));
    group.cut[2] = true;
    group.sent.clear();
    for _ in 0..500 {
        let index = group.propose(R0, input(100)).expect("the others commit");
        assert_eq!(group.at(R0).commit_index(), index);
        group.step(R0, Event::Truncate(index));
    }
    let entries = |message: &Message| {
        if let Message::Accept { entries, .. } = message { entries.len() } else { 0 }
    };
    let sent: usize = group.sent.iter().filter(|(_, to, _)| *to == R2).map(|(_, _, message)| entries(message)).sum();
    assert!(sent <= 8, "{sent} entries were sent to a replica that acknowledges nothing");
    group.cut[2] = false;
    group.run(200);
    assert!(group.noticed(R2, |notice| matches!(notice, Notice::Jumped { .. })));
    assert_eq!(group.at(R2).commit_index(), group.at(R0).commit_index());
    assert_eq!(group.at(R2).second(), Some(R1), "roles survive the jump");
    let index = group.propose(R0, input(1)).expect("r0 leads");
    assert_eq!(group.at(R0).match_index(R2), index);
}

#[test]
fn a_dead_guest_passes_the_lead_on_or_ends_it() {
    let mut group = Group::with_secondary(|_| {});
    group.step(R0, Event::StepDown);
    assert!(group.at(R1).leading().is_some() && group.at(R0).role() == Role::Witness);

    let mut group = Group::new(|_| {});
    group.step(R0, Event::StepDown);
    group.run(1000);
    assert!([R0, R1, R2].iter().all(|id| group.at(*id).leading().is_none()), "no guest is left");
    group.step(R0, Event::AllowColdStart);
    group.run(200);
    assert!(group.at(R0).leading().is_some());
}

#[test]
fn a_hand_over_that_nobody_takes_ends() {
    let mut group = Group::with_secondary(|_| {});
    group.cut[1] = true;
    group.step(R0, Event::HandOver { to: R1 });
    assert_eq!(group.propose(R0, input(1)), Err(ProposeError::NotLeader { leader: Some(R1) }));
    group.run(300);
    assert!(group.noticed(R0, |notice| *notice == Notice::HandOverFailed { to: R1 }));
    assert!(group.propose(R0, input(1)).is_ok());
}

#[test]
fn a_witness_never_campaigns_whatever_its_guest() {
    let mut group = Group::with_secondary(|_| {});
    (group.cut[0], group.cut[1]) = (true, true);
    group.sent.clear();
    group.step(R2, Event::GuestIntact(true));
    group.step(R2, Event::PeerLost(R0));
    group.run(2000);
    let asks = |message: &Message| matches!(message, Message::PreVote { .. } | Message::Prepare { .. });
    assert!(group.sent.iter().all(|(from, _, message)| *from != R2 || !asks(message)));
}

#[test]
fn bulk_traffic_keeps_a_leader_alive() {
    let mut group = Group::with_secondary(|_| {});
    group.cut[0] = true;
    for _ in 0..20 {
        group.step(R1, Event::PeerHeard(R0));
        group.step(R2, Event::PeerHeard(R0));
        group.run(50);
    }
    assert_eq!(group.at(R1).view(), View(3));
    group.run(300);
    assert!(group.at(R1).leading().is_some());
}

/// Whether `id` has asked for a pre-vote.
fn suspects(group: &Group, id: ReplicaId) -> bool {
    group.sent.iter().any(|(from, _, message)| *from == id && matches!(message, Message::PreVote { .. }))
}

#[test]
fn a_dead_leader_is_noticed_in_time_and_by_those_who_are_seldom_run_too() {
    for (apart_us, most_looks) in [(1_000, 125), (30_000, 5), (60_000, 4), (400_000, 4)] {
        let mut group = Group::with_secondary(|_| {});
        group.cut[0] = true;
        group.sent.clear();
        let looks = (1..=most_looks).find(|_| {
            group.now_us += apart_us;
            group.step(R1, Event::Tick);
            suspects(&group, R1)
        });
        let looks = looks.unwrap_or_else(|| panic!("not within {most_looks} looks, {apart_us} us apart"));
        assert!(looks > 1, "after one look, {apart_us} us after the last");
    }
}

#[test]
fn a_leader_that_was_not_run_gives_nobody_up_and_its_lead_to_nobody() {
    let mut group = Group::with_secondary(|_| {});
    group.now_us += 300_000;
    group.sent.clear();
    let view = View(4);
    let asked = Event::Message { from: R1, message: Message::PreVote { view } };
    group.step(R0, asked);
    let refused = Message::PreVoteReply { view, granted: false, promised: View(3) };
    assert!(group.sent.contains(&(R0, R1, refused)), "{:?}", group.sent);
    assert!(group.at(R0).peer_silent_us(R1, group.now_us) < 100_000);
    assert!(group.noticed(R0, |notice| matches!(notice, Notice::Absent { for_us } if *for_us >= 300_000)));
}

#[test]
fn what_was_granted_before_an_absence_starts_no_campaign() {
    let mut group = Group::with_secondary(|_| {});
    group.cut = [true; 3];
    while !suspects(&group, R1) {
        group.run(10);
    }
    group.now_us += 200_000;
    group.sent.clear();
    let granted = Message::PreVoteReply { view: View(4), granted: true, promised: View(3) };
    group.step(R1, Event::Message { from: R2, message: granted });
    assert_eq!(group.at(R1).view(), View(3), "the leader may have been heard since");
    group.run(60);
    assert!(suspects(&group, R1), "it asks again");
}

/// A replica with nine entries that was told to begin after 5, which none of them matches; the state it stores.
fn jumped(old: &[(Index, View, Entry)]) -> (Replica, HardState) {
    let state = HardState { promised: View(6), ..HardState::default() };
    let recovered = Recovered::from_store(Some(state), old.to_vec());
    let mut replica = Replica::new(Config::new(R2, R0, 5), recovered, 0);
    assert_eq!(replica.last_index(), Index(9));
    let base = Base { index: Index(5), view: View(3), second: Some(R2), leader: Some(R0), ..Base::default() };
    let mut out = Effects::default();
    let message = Message::InstallBase { view: View(9), base };
    replica.step(1, Event::GuestIntact(true), &mut out);
    replica.step(1, Event::Message { from: R0, message }, &mut out);
    assert!(out.notices.contains(&Notice::Jumped { base: Index(5) }));
    assert!(out.messages.is_empty(), "a jump is acknowledged once it is durable");
    match out.persist.last() {
        Some(Persist::State(state)) => (replica, *state),
        other => panic!("a jump must be stored, not {other:?}"),
    }
}

/// R11: a replica that jumped and crashed before anything superseded its old entries must not find them again.
#[test]
fn entries_from_before_a_jump_stay_void() {
    let old: Vec<_> = (1..=9).map(|index| (Index(index), View(6), input(1))).collect();
    let (mut replica, state) = jumped(&old);
    let restarted = Replica::new(Config::new(R2, R0, 6), Recovered::from_store(Some(state), old), 0);
    assert_eq!((restarted.last_index(), restarted.commit_index()), (Index(5), Index(5)));

    let prev = Viewstamp { view: View(3), index: Index(5) };
    let entries = vec![(View(9), Entry::Noop { leader: R0 })];
    let message = Message::Accept { view: View(9), prev, commit: Index(5), base: Index(5), entries };
    let mut out = Effects::default();
    replica.step(2, Event::Message { from: R0, message }, &mut out);
    let [Persist::Append { .. }, Persist::State(state)] = out.persist.as_slice() else { panic!("{out:?}") };
    assert!(!state.void_entries, "the append superseded the old entries");
}

#[test]
fn a_jump_costs_the_guest() {
    let old: Vec<_> = (1..=9).map(|index| (Index(index), View(6), input(1))).collect();
    let (mut replica, _) = jumped(&old);
    assert_eq!(replica.role(), Role::Secondary);
    let mut out = Effects::default();
    replica.step(2, Event::PeerLost(R0), &mut out);
    assert!(out.messages.is_empty(), "a secondary that jumped has no guest to lead with: {:?}", out.messages);
    replica.step(3, Event::GuestIntact(true), &mut out);
    assert!(matches!(out.messages[..], [(R0, Message::PreVote { .. }), (R1, Message::PreVote { .. })]));
}

#[test]
#[should_panic(expected = "the store lost records")]
fn a_hole_in_the_store_is_refused() {
    let entries = vec![(Index(1), View(3), input(1)), (Index(3), View(3), input(1))];
    let state = HardState { promised: View(3), ..HardState::default() };
    Replica::new(Config::new(R2, R0, 5), Recovered::from_store(Some(state), entries), 0);
}

#[test]
fn a_group_of_one_serves() {
    let mut config = Config::new(R0, R0, 1);
    config.replicas = 1;
    let mut replica = Replica::new(config, Recovered::default(), 0);
    let (mut out, mut records) = (Effects::default(), 0);
    replica.step(0, Event::GuestIntact(true), &mut out);
    while !out.persist.is_empty() {
        records += out.persist.drain(..).count() as u64;
        replica.step(1, Event::Persisted { through: PersistId(records) }, &mut out);
    }
    assert!(replica.leading().is_some());
}
