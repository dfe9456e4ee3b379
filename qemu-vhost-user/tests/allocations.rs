//! No allocation per frame from the uplink to the guest: a group of three, in one thread, with the parts that the reactor is
//! made of and in the order in which it calls them: intake into the arena, proposal, messages as bytes that the receiver puts
//! into its arena once, durability, commit, delivery frame by frame, and frames out through the guard.
//!
//! A test binary of its own, because it counts with the global allocator, per thread. The log's disk is left out (records are
//! durable at once): what it allocates is counted in its own crate.

use consensus::{Config, Effects, Entry, Event, Index, Message, Payload, PersistId, Recovered, Replica, ReplicaId};
use counting_allocator::{Counting, allocations};
use dataplane::arena::{Arena, ArenaBytes, CHUNK_BYTES};
use dataplane::batch::{self, BatchBuilder, MIN_BATCH_BYTES};
use dataplane::guard::Guard;
use dataplane::region::{PageSize, Region};
use dataplane::uplink::Intake;
use dataplane::uplink::filter::{Action, Filter};

#[global_allocator]
static COUNTING: Counting = Counting;

const LEADER: usize = 0;
const FRAMES_PER_BATCH: usize = 64;
const FRAME_BYTES: usize = 76;
const ARENA_CHUNKS: usize = 4;

fn shared(bytes: ArenaBytes) -> Payload {
    let (chunk, at, len) = bytes.into_parts();
    Payload::within(chunk, at, len)
}

struct Host {
    replica: Replica,
    effects: Effects,
    arena: Arena,
    guard: Guard,
    persisted: u64,
    /// Frames that the guest got, and their bytes added up.
    delivered: (u64, u64),
}

struct Group {
    hosts: [Host; 3],
    filter: Filter,
    /// Messages on their way, in buffers that are used again.
    flying: Vec<(usize, usize, Vec<u8>)>,
    buffers: Vec<Vec<u8>>,
    now_us: u64,
    proposed: u64,
}

impl Group {
    fn new() -> Group {
        let map = |bytes| Region::map(bytes, PageSize::Normal, None).expect("memory");
        let host = |id: u8| {
            let mut config = Config::new(ReplicaId(id), ReplicaId(0), 1 + u64::from(id));
            config.retain_bytes = CHUNK_BYTES as u64;
            Host {
                replica: Replica::new(config, Recovered::default(), 0),
                effects: Effects::default(),
                arena: Arena::new(map(ARENA_CHUNKS * CHUNK_BYTES)),
                guard: Guard::new(map(1 << 20)),
                persisted: 0,
                delivered: (0, 0),
            }
        };
        let hosts = [host(0), host(1), host(2)];
        let filter = Filter::new(&[], Action::Order);
        let mut group = Group { hosts, filter, flying: Vec::new(), buffers: Vec::new(), now_us: 0, proposed: 0 };
        group.step(LEADER, Event::GuestIntact(true));
        while group.hosts[LEADER].replica.leading().is_none() {
            assert!(group.now_us < 10_000_000, "no leader within 10 s of virtual time");
            group.pass_time();
        }
        group
    }

    fn step(&mut self, id: usize, event: Event) {
        let host = &mut self.hosts[id];
        host.replica.step(self.now_us, event, &mut host.effects);
        self.carry_out(id);
    }

    fn carry_out(&mut self, id: usize) {
        let host = &mut self.hosts[id];
        let records = host.effects.persist.drain(..).count() as u64;
        let (buffers, flying) = (&mut self.buffers, &mut self.flying);
        host.effects.send(|to, message| {
            let mut bytes = buffers.pop().unwrap_or_else(|| Vec::with_capacity(1 << 16));
            bytes.clear();
            message.encode(&mut bytes);
            flying.push((id, usize::from(to.0), bytes));
        });
        for (_, _, entry) in host.effects.committed.drain(..) {
            let Entry::Input(payload) = &entry else { continue };
            for frame in batch::frames(payload).expect("a batch") {
                host.delivered.0 += 1;
                host.delivered.1 += frame.iter().map(|byte| u64::from(*byte)).sum::<u64>();
                // The guest answers with as much.
                host.guard.push(self.now_us, frame).expect("the guard has room");
            }
        }
        host.effects.notices.clear();
        if records > 0 {
            host.persisted += records;
            let through = PersistId(host.persisted);
            self.step(id, Event::Persisted { through });
        }
    }

    fn deliver(&mut self) {
        while !self.flying.is_empty() {
            let (from, to, bytes) = self.flying.remove(0);
            let host = &mut self.hosts[to];
            let kept = shared(host.arena.put(&bytes).expect("the arena has room"));
            let message = host.effects.decode_shared(&kept).expect("it was encoded here");
            if let Message::Accept { entries, .. } = &message {
                let inside = |bytes: &[u8]| kept.as_ptr_range().contains(&bytes.as_ptr());
                assert!(entries.iter().all(|(_, entry)| entry.payload().is_empty() || inside(entry.payload())));
            }
            drop(kept);
            self.buffers.push(bytes);
            self.step(to, Event::Message { from: ReplicaId(from as u8), message });
        }
    }

    fn pass_time(&mut self) {
        self.now_us += 1000;
        for id in 0..3 {
            if self.hosts[id].replica.next_deadline_us() <= self.now_us {
                self.step(id, Event::Tick);
            }
            self.deliver();
        }
    }

    /// One turn of a leader: a burst from the uplink, its proposal, and everything that follows.
    fn turn(&mut self) -> Index {
        let Group { hosts, filter, .. } = self;
        let host = &mut hosts[LEADER];
        let mut batch = BatchBuilder::within(host.arena.room(MIN_BATCH_BYTES, 1 << 18).expect("the arena has room"));
        let mut intake = Intake::new(&mut batch, filter);
        for number in 0..FRAMES_PER_BATCH {
            intake.spare(FRAME_BYTES).expect("room in the batch").fill(number as u8);
            intake.commit(FRAME_BYTES);
        }
        let bytes = batch.seal();
        let payload = shared(host.arena.freeze(bytes));
        let proposed = host.replica.propose(self.now_us, Entry::Input(payload), &mut host.effects);
        self.proposed += FRAMES_PER_BATCH as u64;
        self.carry_out(LEADER);
        self.deliver();
        proposed.expect("the leader takes proposals")
    }

    /// Turns, with time passing, and a syncvm's end now and then: output is released and the log truncated.
    fn run(&mut self, turns: u64) {
        for turn in 1..=turns {
            let last = self.turn();
            if turn % 8 == 0 {
                self.pass_time();
                for host in &mut self.hosts {
                    let mark = host.guard.seal();
                    host.guard.release(mark, |frame, _| assert_eq!(frame.len(), FRAME_BYTES));
                }
                (0..3).for_each(|id| self.step(id, Event::Truncate(last)));
                self.deliver();
            }
        }
    }
}

#[test]
fn steady_state_allocates_nothing_per_frame_from_arrival_to_release() {
    let mut group = Group::new();
    // Enough to fill the retained log twice, so that every queue has its final size and chunks are used again.
    let turns = 2 * (CHUNK_BYTES / (FRAMES_PER_BATCH * FRAME_BYTES)) as u64 / 8 * 8;
    group.run(turns);
    let (proposed, before) = (group.proposed, allocations());
    group.run(turns);
    let allocated = allocations() - before;
    let frames = group.proposed - proposed;
    assert_eq!(allocated, 0, "allocations for {frames} frames");
    assert!(frames > 50_000, "{frames} frames are too few to mean anything");
    // Heartbeats tell everybody what was committed last.
    (0..50).for_each(|_| group.pass_time());
    let per_batch: u64 = (0..FRAMES_PER_BATCH as u64).map(|byte| byte * FRAME_BYTES as u64).sum();
    for host in &group.hosts {
        assert_eq!(host.delivered.0, group.proposed, "every frame once");
        assert_eq!(host.delivered.1, group.proposed / FRAMES_PER_BATCH as u64 * per_batch, "and as it was");
        assert_eq!(host.arena.refusals(), 0);
    }
}
