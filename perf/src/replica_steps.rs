//! `consensus.steps_per_s`: three replicas in one thread, how many steps they do per second
//! of its CPU time.
//!
//! A step is one call of `Replica::step` or `Replica::propose`. Disks are instant. Time is virtual, so
//! every run does exactly the same steps; a run that does not is an error. No peer: there is no other
//! implementation of this state machine, and a bare loop would measure nothing comparable.
//!
//! `consensus.steps_per_s` is the core alone: messages pass from replica to replica as they are. In the rows
//! `.wire` they pass through their wire form, as between hosts, which costs more than the core and depends on the size of an
//! entry. Payloads are made before the clock starts, as many as a log holds, so that each has its own memory.

use std::collections::VecDeque;
use std::hint::black_box;

use anyhow::{Context, Result, ensure};
use consensus::{Config, Effects, Entry, Event, Index, Message, Payload, PersistId, Recovered, Replica, ReplicaId};

use crate::Effort;
use crate::group::Sink;
use crate::sample::{Better, Figure, measure, thread_cpu_time};

const LEADER: ReplicaId = ReplicaId(0);
/// Entries proposed before messages are delivered: a loaded leader has several in flight.
const BURST: u64 = 8;
/// Entries between truncations: a log as long as between two syncvms, and bounded memory.
const TRUNCATE_EVERY: u64 = 4096;
/// Virtual time of one burst.
const BURST_US: u64 = 100;

/// Measures with entries of 64 bytes and of 1 KiB.
///
/// # Errors
/// The group does not commit, or a run did other work than the one before.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    let entries = effort.pick(200_000, 4_000);
    let rows = [
        ("consensus.steps_per_s", 64, Passing::AsIs),
        ("consensus.steps_per_s.wire", 64, Passing::Wire),
        ("consensus.steps_per_s.wire.1KiB", 1024, Passing::Wire),
    ];
    for (id, entry_bytes, passing) in rows {
        if !sink.wants(id) {
            continue;
        }
        let figure = Figure { id, unit: "1/s", better: Better::Higher };
        let mut first_steps = None;
        let payloads = payloads(entry_bytes);
        sink(measure(figure, effort, || {
            let mut group = Group::new(passing)?;
            let before = group.steps;
            let start = thread_cpu_time();
            group.commit(entries, &payloads)?;
            let seconds = (thread_cpu_time() - start).as_secs_f64();
            let steps = group.steps - before;
            let expected = *first_steps.get_or_insert(steps);
            ensure!(steps == expected, "{steps} steps, {expected} in the first run");
            Ok(steps as f64 / seconds)
        })?)?;
    }
    Ok(())
}

/// How messages get from one replica to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passing {
    AsIs,
    Wire,
}

/// A message on its way.
struct Flying {
    from: ReplicaId,
    to: ReplicaId,
    form: Form,
}

enum Form {
    Message(Message),
    Bytes(Vec<u8>),
}

/// What is proposed, over and over: enough that no two entries of a log share memory.
fn payloads(entry_bytes: usize) -> Vec<Payload> {
    (0..TRUNCATE_EVERY).map(|_| Payload::from(vec![5; entry_bytes])).collect()
}

struct Group {
    passing: Passing,
    replicas: Vec<Replica>,
    now_us: u64,
    /// Records that each replica emitted, all durable at once.
    persisted: [u64; 3],
    /// The last entry that came out committed, per replica.
    committed: [Index; 3],
    flying: VecDeque<Flying>,
    /// Buffers for the next messages.
    spare: Vec<Vec<u8>>,
    out: Effects,
    steps: u64,
}

impl Group {
    /// A group whose replica 0 leads.
    fn new(passing: Passing) -> Result<Group> {
        let replica = |id: u8| {
            let config = Config::new(ReplicaId(id), LEADER, 77 + u64::from(id));
            Replica::new(config, Recovered::default(), 0)
        };
        let mut group = Group {
            passing,
            replicas: (0..3).map(replica).collect(),
            now_us: 0,
            persisted: [0; 3],
            committed: [Index(0); 3],
            flying: VecDeque::new(),
            spare: Vec::new(),
            out: Effects::default(),
            steps: 0,
        };
        group.step(LEADER, Event::GuestIntact(true))?;
        while group.leader().leading().is_none() {
            ensure!(group.now_us < 10_000_000, "no leader within 10 s of virtual time");
            group.pass_time(1_000)?;
        }
        Ok(group)
    }

    fn leader(&self) -> &Replica {
        &self.replicas[usize::from(LEADER.0)]
    }

    /// Proposes `entries` and returns when every replica has committed them.
    fn commit(&mut self, entries: u64, payloads: &[Payload]) -> Result<()> {
        let mut payloads = payloads.iter().cycle();
        let mut last = self.leader().last_index();
        let first = last;
        let mut truncated = last;
        for _ in 0..entries.div_ceil(BURST) {
            for _ in 0..BURST.min(entries - (last.0 - first.0)) {
                let entry = Entry::Input(payloads.next().context("there are no payloads")?.clone());
                let leader = &mut self.replicas[usize::from(LEADER.0)];
                last = leader.propose(self.now_us, entry, &mut self.out)?;
                self.steps += 1;
                self.absorb(LEADER);
            }
            self.deliver()?;
            self.pass_time(BURST_US)?;
            if last.0 - truncated.0 >= TRUNCATE_EVERY {
                truncated = last;
                for id in 0..3 {
                    self.step(ReplicaId(id), Event::Truncate(truncated))?;
                }
            }
        }
        // Followers hear of the last commits with the next heartbeat.
        self.pass_time(50_000)?;
        ensure!(
            last.0 - first.0 == entries && self.committed == [last; 3],
            "{entries} entries after {first:?} proposed through {last:?}, committed {:?}",
            self.committed
        );
        Ok(())
    }

    fn step(&mut self, id: ReplicaId, event: Event) -> Result<()> {
        self.step_one(id, event);
        self.deliver()
    }

    fn step_one(&mut self, id: ReplicaId, event: Event) {
        self.replicas[usize::from(id.0)].step(self.now_us, event, &mut self.out);
        self.steps += 1;
        self.absorb(id);
    }

    /// Takes over what a step brought forth; records are durable at once, which is a step of its own.
    fn absorb(&mut self, id: ReplicaId) {
        let slot = usize::from(id.0);
        loop {
            let records = self.out.persist.drain(..).count() as u64;
            match self.passing {
                Passing::AsIs => self.flying.extend(self.out.messages.drain(..).map(|(to, message)| Flying {
                    from: id,
                    to,
                    form: Form::Message(message),
                })),
                Passing::Wire => self.out.send(|to, message| {
                    let mut bytes = self.spare.pop().unwrap_or_default();
                    bytes.clear();
                    message.encode(&mut bytes);
                    self.flying.push_back(Flying { from: id, to, form: Form::Bytes(bytes) });
                }),
            }
            for (index, _, entry) in self.out.committed.drain(..) {
                black_box(entry.payload());
                self.committed[slot] = index;
            }
            self.out.notices.clear();
            if records == 0 {
                return;
            }
            self.persisted[slot] += records;
            let through = PersistId(self.persisted[slot]);
            self.replicas[slot].step(self.now_us, Event::Persisted { through }, &mut self.out);
            self.steps += 1;
        }
    }

    fn deliver(&mut self) -> Result<()> {
        while let Some(Flying { from, to, form }) = self.flying.pop_front() {
            let message = match form {
                Form::Message(message) => message,
                Form::Bytes(bytes) => {
                    let message = self.out.decode(&bytes).context("a message does not decode")?;
                    self.spare.push(bytes);
                    message
                }
            };
            self.step_one(to, Event::Message { from, message });
        }
        Ok(())
    }

    /// Lets virtual time pass and ticks whoever is due.
    fn pass_time(&mut self, us: u64) -> Result<()> {
        let until_us = self.now_us + us;
        loop {
            let deadlines = self.replicas.iter().map(Replica::next_deadline_us);
            let due = deadlines.zip(0..).min();
            match due {
                Some((at_us, id)) if at_us <= until_us => {
                    self.now_us = self.now_us.max(at_us);
                    self.step(ReplicaId(id), Event::Tick)?;
                }
                _ => break,
            }
        }
        self.now_us = until_us;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_groups_do_the_same_steps_and_commit_everything() {
        let steps = |passing| {
            let mut group = Group::new(passing).unwrap();
            group.commit(5_000, &payloads(64)).unwrap();
            // Noop of the view, then ours.
            assert_eq!(group.committed[2], group.leader().last_index());
            assert!(group.leader().base().index >= Index(TRUNCATE_EVERY));
            group.steps
        };
        let alone = steps(Passing::AsIs);
        assert_eq!((alone, alone), (steps(Passing::AsIs), steps(Passing::Wire)));
        assert!(alone > 5_000);
    }
}
