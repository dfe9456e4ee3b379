//! `consensus.vs_raft_crate`: ours against the crate `raft` (TiKV's), both three replicas in one thread, logs in
//! memory, messages handed over as values, entries proposed in rounds.
//!
//! Both keep entries twice, in the state machine and in a store, by reference count. The peer runs as its
//! documentation says (`Ready`, `advance`), with what makes it faster here switched on: proposals of a round
//! share a message, and followers hear of a commit with the next message, as ours do.

use std::collections::VecDeque;

use anyhow::{Context, Result, bail, ensure};
use raft::eraftpb::Message;
use raft::storage::MemStorage;
use raft::{RawNode, StateRole};
use slog::{Discard, Logger, o};

use super::in_memory::InMemory;
use crate::Effort;
use crate::row::Row;
use crate::sample::{Better, Figure, compare, thread_cpu_time};

const ENTRY_BYTES: usize = 64;
/// Entries proposed before messages are delivered.
const ROUND: u64 = 256;
/// Rounds between truncations, on both sides.
const TRUNCATE_EVERY: u64 = 16;
const MAX_MESSAGE_BYTES: u64 = 1 << 20;

/// Measures.
///
/// # Errors
/// One of the sides does not commit everything on all replicas.
pub fn measure(effort: Effort) -> Result<Row> {
    let rounds = effort.pick(800, 8);
    let mut ours = InMemory::new()?;
    let mut peer = RaftGroup::new()?;
    let figure = Figure { id: "consensus.vs_raft_crate", unit: "entries/cpu-s", better: Better::Higher };
    compare(
        figure,
        effort,
        "raft 0.7 RawNode + MemStorage",
        || per_cpu_second(rounds, || ours.commit(rounds, ROUND, ENTRY_BYTES, TRUNCATE_EVERY)),
        || per_cpu_second(rounds, || peer.commit(rounds)),
    )
}

fn per_cpu_second(rounds: u64, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = thread_cpu_time();
    work()?;
    Ok((rounds * ROUND) as f64 / (thread_cpu_time() - start).as_secs_f64())
}

struct Member {
    node: RawNode<MemStorage>,
    /// Committed entries with data.
    committed: u64,
    applied: u64,
}

struct RaftGroup {
    members: Vec<Member>,
    flying: VecDeque<Message>,
}

impl RaftGroup {
    /// A group whose first member leads.
    fn new() -> Result<RaftGroup> {
        let logger = Logger::root(Discard, o!());
        let mut members = Vec::new();
        for id in 1..=3 {
            let config = raft::Config {
                id,
                heartbeat_tick: 1,
                election_tick: 10,
                max_size_per_msg: MAX_MESSAGE_BYTES,
                max_inflight_msgs: 256,
                batch_append: true,
                skip_bcast_commit: true,
                ..raft::Config::default()
            };
            let store = MemStorage::new_with_conf_state((vec![1, 2, 3], vec![]));
            members.push(Member { node: RawNode::new(&config, store, &logger)?, committed: 0, applied: 0 });
        }
        let mut group = RaftGroup { members, flying: VecDeque::new() };
        group.members[0].node.campaign()?;
        group.deliver()?;
        ensure!(group.members[0].node.raft.state == StateRole::Leader, "the peer's first member does not lead");
        Ok(group)
    }

    /// As [`InMemory::commit`].
    fn commit(&mut self, rounds: u64) -> Result<()> {
        let first = self.members[0].committed;
        for round in 1..=rounds {
            for _ in 0..ROUND {
                self.members[0].node.propose(Vec::new(), vec![5; ENTRY_BYTES])?;
            }
            self.deliver()?;
            if round % TRUNCATE_EVERY == 0 {
                self.truncate()?;
            }
        }
        // Followers hear of the last commits with the next heartbeat.
        self.members[0].node.tick();
        self.deliver()?;
        for member in &self.members {
            let count = member.committed - first;
            ensure!(count == rounds * ROUND, "{count} of {} entries came out committed", rounds * ROUND);
        }
        Ok(())
    }

    fn deliver(&mut self) -> Result<()> {
        loop {
            for at in 0..self.members.len() {
                self.carry_out(at)?;
            }
            if self.flying.is_empty() {
                return Ok(());
            }
            while let Some(message) = self.flying.pop_front() {
                let to = usize::try_from(message.to)?;
                self.members[to - 1].node.step(message)?;
            }
        }
    }

    /// The steps of the crate's documentation, in its order.
    fn carry_out(&mut self, at: usize) -> Result<()> {
        let member = &mut self.members[at];
        if !member.node.has_ready() {
            return Ok(());
        }
        let mut ready = member.node.ready();
        self.flying.extend(ready.take_messages());
        if !ready.snapshot().is_empty() {
            bail!("the peer sends a snapshot, which nobody should need");
        }
        member.take_committed(&ready.take_committed_entries());
        let store = member.node.store().clone();
        store.wl().append(ready.entries())?;
        if let Some(state) = ready.hs() {
            store.wl().set_hardstate(state.clone());
        }
        self.flying.extend(ready.take_persisted_messages());
        let mut light = member.node.advance(ready);
        if let Some(commit) = light.commit_index() {
            store.wl().mut_hard_state().set_commit(commit);
        }
        self.flying.extend(light.take_messages());
        member.take_committed(&light.take_committed_entries());
        member.node.advance_apply();
        Ok(())
    }

    /// What every member has applied, nobody needs.
    fn truncate(&mut self) -> Result<()> {
        let through = self.members.iter().map(|member| member.applied).min().context("there are members")?;
        for member in &self.members {
            member.node.store().wl().compact(through)?;
        }
        Ok(())
    }
}

impl Member {
    fn take_committed(&mut self, entries: &[raft::eraftpb::Entry]) {
        if let Some(last) = entries.last() {
            self.applied = last.index;
        }
        self.committed += entries.iter().filter(|entry| !entry.data.is_empty()).count() as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_commits_everything_everywhere() {
        let mut group = RaftGroup::new().unwrap();
        group.commit(2 * TRUNCATE_EVERY).unwrap();
        group.commit(1).unwrap();
        assert!(group.members.iter().all(|member| member.committed == (2 * TRUNCATE_EVERY + 1) * ROUND));
        assert!(group.truncate().is_ok());
    }
}
