//! Three replicas in one thread that hand one another their messages as values, and keep their records as values.

use std::collections::VecDeque;

use anyhow::{Result, ensure};
use consensus::{Config, Effects, Entry, Event, Index, Message, Payload, PersistId, Recovered, Replica, ReplicaId};

use super::store::Store;

const LEADER: usize = 0;

struct Member {
    replica: Replica,
    store: Store,
    committed: Index,
}

/// The group; time is virtual and moves only where it must.
pub struct InMemory {
    members: Vec<Member>,
    flying: VecDeque<(ReplicaId, ReplicaId, Message)>,
    out: Effects,
    now_us: u64,
}

impl InMemory {
    /// A group whose replica 0 leads.
    pub fn new() -> Result<InMemory> {
        let member = |id: u8| Member {
            replica: Replica::new(
                Config::new(ReplicaId(id), ReplicaId(0), 77 + u64::from(id)),
                Recovered::default(),
                0,
            ),
            store: Store::default(),
            committed: Index(0),
        };
        let members = (0..3).map(member).collect();
        let mut group = InMemory { members, flying: VecDeque::new(), out: Effects::default(), now_us: 0 };
        group.step(LEADER, Event::GuestIntact(true))?;
        while group.members[LEADER].replica.leading().is_none() {
            ensure!(group.now_us < 10_000_000, "no leader within 10 s of virtual time");
            group.pass_time(1_000)?;
        }
        Ok(group)
    }

    /// Commits `rounds` times `depth` entries of `bytes` bytes on every replica; the entries of a round are proposed
    /// before any message is delivered. Truncates after each of `truncate_every` rounds.
    pub fn commit(&mut self, rounds: u64, depth: u64, bytes: usize, truncate_every: u64) -> Result<()> {
        let first = self.members[LEADER].committed;
        for round in 1..=rounds {
            for _ in 0..depth {
                let entry = Entry::Input(Payload::from(vec![5; bytes]));
                self.members[LEADER].replica.propose(self.now_us, entry, &mut self.out)?;
            }
            self.carry_out(LEADER)?;
            self.deliver()?;
            if round % truncate_every == 0 {
                let through = self.members[LEADER].committed;
                self.step(LEADER, Event::Truncate(through))?;
            }
        }
        // Followers hear of the last commits with the next heartbeat.
        self.pass_time(50_000)?;
        for member in &self.members {
            let count = member.committed.0 - first.0;
            ensure!(count == rounds * depth, "{count} of {} entries came out committed", rounds * depth);
        }
        Ok(())
    }

    fn step(&mut self, at: usize, event: Event) -> Result<()> {
        self.members[at].replica.step(self.now_us, event, &mut self.out);
        self.carry_out(at)?;
        self.deliver()
    }

    fn carry_out(&mut self, at: usize) -> Result<()> {
        let member = &mut self.members[at];
        loop {
            let before = member.store.records;
            for record in self.out.persist.drain(..) {
                member.store.take(record)?;
            }
            let from = ReplicaId(at as u8);
            self.flying.extend(self.out.messages.drain(..).map(|(to, message)| (from, to, message)));
            for (index, ..) in self.out.committed.drain(..) {
                ensure!(index == member.committed.next(), "entry {index} came out behind {}", member.committed);
                member.committed = index;
            }
            self.out.notices.clear();
            if member.store.records == before {
                return Ok(());
            }
            let through = PersistId(member.store.records);
            member.replica.step(self.now_us, Event::Persisted { through }, &mut self.out);
        }
    }

    fn deliver(&mut self) -> Result<()> {
        while let Some((from, to, message)) = self.flying.pop_front() {
            let at = to.slot();
            self.members[at].replica.step(self.now_us, Event::Message { from, message }, &mut self.out);
            self.carry_out(at)?;
        }
        Ok(())
    }

    fn pass_time(&mut self, us: u64) -> Result<()> {
        let until_us = self.now_us + us;
        loop {
            let deadlines = self.members.iter().map(|member| member.replica.next_deadline_us());
            match deadlines.zip(0..).min() {
                Some((at_us, at)) if at_us <= until_us => {
                    self.now_us = self.now_us.max(at_us);
                    self.step(at, Event::Tick)?;
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
    fn every_entry_comes_out_on_every_replica() {
        let mut group = InMemory::new().unwrap();
        group.commit(20, 100, 64, 4).unwrap();
        group.commit(1, 1, 64, 4).unwrap();
        // The leader's Noop came first.
        assert!(group.members.iter().all(|member| member.committed == Index(2002)));
        assert!(group.members.iter().all(|member| member.replica.base().index >= Index(1901)));
        for member in &group.members {
            assert_eq!(member.store.entries.back().map(|(index, ..)| *index), Some(Index(2002)));
            assert!(member.store.entries.len() <= 101);
        }
    }
}
