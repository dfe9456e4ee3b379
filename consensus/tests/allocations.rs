//! Steady state allocates nothing in a step, in sending and in encoding; decoding allocates the payloads of
//! inputs and nothing else.
//!
//! A test binary of its own, because it counts with the global allocator. The count is per thread: the
//! harness allocates on others.

use std::collections::VecDeque;

use consensus::{Config, Effects, Entry, Event, Index, Message, Payload, PersistId, Recovered, Replica, ReplicaId};
use counting_allocator::{Counting, allocations};

#[global_allocator]
static COUNTING: Counting = Counting;

/// Runs `work` and adds its allocations to `sum`.
fn counting<T>(sum: &mut u64, work: impl FnOnce() -> T) -> T {
    let before = allocations();
    let result = work();
    *sum += allocations() - before;
    result
}

const LEADER: ReplicaId = ReplicaId(0);
const SECOND: ReplicaId = ReplicaId(1);
/// More than a window of messages, so that entries also gather into batches.
const DEPTH: u64 = 40;
const BURST_US: u64 = 1000;
const TRUNCATE_EVERY: u64 = 5;
/// More than any message of this test.
const WIRE_BYTES: usize = 16 << 10;

/// Allocations by what made them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Allocations {
    steps: u64,
    sends: u64,
    decodes: u64,
    /// Inputs that were decoded: each has an allocation for its bytes and one for their reference count.
    decoded_inputs: u64,
}

struct Host {
    replica: Replica,
    out: Effects,
    persisted: u64,
    committed: Index,
}

/// Three hosts, each with effects of its own and wire buffers that are used again, like real ones.
struct Group {
    hosts: [Host; 3],
    now_us: u64,
    flying: VecDeque<(ReplicaId, ReplicaId, Vec<u8>)>,
    buffers: Vec<Vec<u8>>,
    allocations: Allocations,
    steps: u64,
}

impl Group {
    fn new() -> Group {
        let host = |id: u8| {
            let mut config = Config::new(ReplicaId(id), LEADER, 7 + u64::from(id));
            config.retain_bytes = 16 << 10;
            let replica = Replica::new(config, Recovered::default(), 0);
            Host { replica, out: Effects::default(), persisted: 0, committed: Index(0) }
        };
        let mut group = Group {
            hosts: [host(0), host(1), host(2)],
            now_us: 0,
            flying: VecDeque::new(),
            buffers: Vec::new(),
            allocations: Allocations::default(),
            steps: 0,
        };
        group.step(LEADER, Event::GuestIntact(true));
        while group.hosts[0].replica.leading().is_none() {
            assert!(group.now_us < 10_000_000, "no leader within 10 s of virtual time");
            group.pass_time(BURST_US);
        }
        let base = group.propose(Entry::SyncVm { with: SECOND });
        group.deliver();
        group.propose(Entry::Second { replica: Some(SECOND), base });
        group.deliver();
        assert_eq!(group.hosts[0].replica.second(), Some(SECOND));
        group
    }

    fn propose(&mut self, entry: Entry) -> Index {
        let host = &mut self.hosts[LEADER.0 as usize];
        let proposed =
            counting(&mut self.allocations.steps, || host.replica.propose(self.now_us, entry, &mut host.out));
        self.steps += 1;
        self.carry_out(LEADER);
        proposed.expect("the leader takes proposals")
    }

    fn step(&mut self, id: ReplicaId, event: Event) {
        let host = &mut self.hosts[id.0 as usize];
        counting(&mut self.allocations.steps, || host.replica.step(self.now_us, event, &mut host.out));
        self.steps += 1;
        self.carry_out(id);
    }

    /// Does what the step asked for; records are durable at once, which is a step of its own.
    fn carry_out(&mut self, id: ReplicaId) {
        let host = &mut self.hosts[id.0 as usize];
        let records = host.out.persist.drain(..).count() as u64;
        let (buffers, flying) = (&mut self.buffers, &mut self.flying);
        counting(&mut self.allocations.sends, || {
            host.out.send(|to, message| {
                let mut bytes: Vec<u8> = buffers.pop().unwrap_or_else(|| Vec::with_capacity(WIRE_BYTES));
                bytes.clear();
                message.encode(&mut bytes);
                flying.push_back((id, to, bytes));
            });
        });
        host.committed = host.out.committed.drain(..).next_back().map_or(host.committed, |(index, ..)| index);
        host.out.notices.clear();
        if records > 0 {
            host.persisted += records;
            let through = PersistId(host.persisted);
            self.step(id, Event::Persisted { through });
        }
    }

    fn deliver(&mut self) {
        while let Some((from, to, bytes)) = self.flying.pop_front() {
            let out = &mut self.hosts[to.0 as usize].out;
            let message = counting(&mut self.allocations.decodes, || out.decode(&bytes)).expect("it was encoded here");
            self.buffers.push(bytes);
            if let Message::Accept { entries, .. } = &message {
                let inputs = entries.iter().filter(|(_, entry)| matches!(entry, Entry::Input(_)));
                self.allocations.decoded_inputs += inputs.count() as u64;
            }
            self.step(to, Event::Message { from, message });
        }
    }

    fn pass_time(&mut self, us: u64) {
        self.now_us += us;
        for id in (0..3).map(ReplicaId) {
            if self.hosts[id.0 as usize].replica.next_deadline_us() <= self.now_us {
                self.step(id, Event::Tick);
            }
            self.deliver();
        }
    }

    /// Bursts of inputs at depth, with heartbeats between them and truncation now and then.
    fn run(&mut self, payloads: &[Payload], bursts: u64) {
        for burst in 1..=bursts {
            let mut last = Index(0);
            for payload in payloads.iter().take(DEPTH as usize) {
                last = self.propose(Entry::Input(payload.clone()));
            }
            self.deliver();
            self.pass_time(BURST_US);
            assert_eq!(
                (self.hosts[0].committed, self.hosts[1].committed),
                (last, last),
                "the secondary is told at once"
            );
            if burst % TRUNCATE_EVERY == 0 {
                (0..3).for_each(|id| self.step(ReplicaId(id), Event::Truncate(last)));
                self.deliver();
            }
        }
    }
}

#[test]
fn steady_state_allocates_nothing() {
    let mut group = Group::new();
    let payloads: Vec<Payload> = (0..DEPTH).map(|_| Payload::from(vec![5; 64])).collect();
    // Two fillings of the retained log, so that every queue has its final size.
    group.run(&payloads, 40);
    let base = group.hosts[2].replica.base().index;
    (group.allocations, group.steps) = (Allocations::default(), 0);
    group.run(&payloads, 50);
    let expected =
        Allocations { decoded_inputs: 2 * 50 * DEPTH, decodes: 2 * 2 * 50 * DEPTH, ..Allocations::default() };
    assert_eq!(group.allocations, expected, "in {} steps", group.steps);
    assert!(group.steps > 50 * DEPTH * 4, "{} steps are too few to mean anything", group.steps);
    assert!(group.hosts[2].replica.base().index > base, "the log was truncated meanwhile");
}
