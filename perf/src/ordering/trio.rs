//! Three replicas over loopback TCP: the leader in the calling thread, each follower in one of its own.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use consensus::{Entry, Event, Index, Payload, ReplicaId};
use dataplane::fabric::{Listener, NodeIdentity, PeerId, Replica, Security};
use dataplane::wait::{EventFd, Interest, now_us};

use super::node::Node;
use crate::pin;

const DEADLINE: Duration = Duration::from_secs(20);
const STOP_TOKEN: u64 = 1;
/// Entries between truncations: a log as long as between two syncvms, and bounded memory.
const TRUNCATE_EVERY: u64 = 16_384;

/// Tells the followers when to end.
struct Stop {
    /// Once they have committed through here.
    through: AtomicU64,
    wakes: [EventFd; 2],
}

impl Stop {
    fn tell(&self, through: Index) {
        self.through.store(through.0, Ordering::Release);
        for wake in &self.wakes {
            wake.signal();
        }
    }
}

/// See the module.
pub struct Trio {
    leader: Node,
    truncated: Index,
    stop: Arc<Stop>,
    followers: Vec<JoinHandle<Result<Node>>>,
    /// Held for their threads, which take the connections.
    _listeners: Vec<Listener>,
}

impl Trio {
    /// Starts them, the followers on `follower_cpu` if there is one, and returns once replica 0 leads.
    pub fn start(follower_cpu: Option<usize>) -> Result<Trio> {
        let mut listeners = Vec::new();
        for id in 0..3 {
            let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
            // As the peers are: etcd and gRPC without TLS, bare TCP.
            let security = Security::Insecure;
            listeners.push(Listener::bind(addr, NodeIdentity::new(&format!("node{id}"))?, security)?);
        }
        let replicas: Vec<Replica> = (0..)
            .zip(&listeners)
            .map(|(id, listener)| Replica {
                id: PeerId(id),
                node: listener.identity().name.clone(),
                addr: listener.local_addr(),
                transports: Vec::new(),
            })
            .collect();
        // All before the first thread: a replica that is dialled before it is known refuses, which ends the run.
        let leader = Node::new(&listeners[0], replicas.clone(), ReplicaId(0))?;
        let first = Node::new(&listeners[1], replicas.clone(), ReplicaId(1))?;
        let second = Node::new(&listeners[2], replicas, ReplicaId(2))?;
        let stop = Arc::new(Stop { through: AtomicU64::new(u64::MAX), wakes: [EventFd::new()?, EventFd::new()?] });
        // Made before its threads, so that an error in between ends those that run.
        let mut trio = Trio { leader, truncated: Index(0), stop, followers: Vec::new(), _listeners: listeners };
        for (node, wake) in [first, second].into_iter().zip(&trio.stop.wakes) {
            node.poller.add(wake, STOP_TOKEN, Interest::ReadEdge)?;
            let stop = Arc::clone(&trio.stop);
            let thread = std::thread::Builder::new().name(format!("follower-{}", node.me));
            trio.followers.push(thread.spawn(move || {
                if let Some(cpu) = follower_cpu {
                    pin::pin(cpu)?;
                }
                follow(node, &stop)
            })?);
        }
        trio.elect()?;
        Ok(trio)
    }

    fn elect(&mut self) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        self.leader.step(now_us(), Event::GuestIntact(true))?;
        while self.leader.replica().leading().is_none() || !self.leader.is_connected() {
            self.leader.sleep_and_turn(deadline).context("no leader")?;
        }
        Ok(())
    }

    /// Proposes one entry and returns when it is committed.
    pub fn commit_one(&mut self, payload: &[u8]) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        let now = now_us();
        let index = self.leader.propose(now, input(payload))?;
        self.leader.carry_out(now)?;
        while self.leader.committed() < index {
            self.leader.sleep_and_turn(deadline)?;
        }
        self.truncate()
    }

    /// Proposes `count` entries, at most `depth` not yet committed at any time, and returns when all are committed.
    #[cfg(any(test, feature = "peers"))]
    pub fn commit_many(&mut self, count: u64, depth: u64, payload: &[u8]) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        let first = self.leader.committed();
        let mut last = self.leader.replica().last_index();
        ensure!(first == last, "{first} committed, {last} proposed before the first proposal");
        let target = Index(last.0 + count);
        while self.leader.committed() < target {
            let now = now_us();
            while last < target && last.0 - self.leader.committed().0 < depth {
                last = self.leader.propose(now, input(payload))?;
            }
            self.leader.carry_out(now)?;
            self.leader.sleep_and_turn(deadline)?;
            self.truncate()?;
        }
        Ok(())
    }

    fn truncate(&mut self) -> Result<()> {
        let committed = self.leader.committed();
        if committed.0 - self.truncated.0 >= TRUNCATE_EVERY {
            self.truncated = committed;
            self.leader.step(now_us(), Event::Truncate(committed))?;
        }
        Ok(())
    }

    /// Waits until the followers have every entry too, ends their threads and returns how many entries there were.
    pub fn close(mut self) -> Result<u64> {
        let committed = self.leader.committed();
        self.stop.tell(committed);
        let deadline = Instant::now() + DEADLINE;
        // They hear of the last commits with the next heartbeat.
        while !self.followers.iter().all(JoinHandle::is_finished) {
            self.leader.sleep_and_turn(deadline).context("a follower lacks entries")?;
        }
        for follower in std::mem::take(&mut self.followers) {
            let node = follower.join().map_err(|_| anyhow!("a follower panicked"))?.context("a follower")?;
            let theirs = node.committed();
            ensure!(theirs == committed, "the leader committed through {committed}, a follower through {theirs}");
        }
        Ok(committed.0)
    }
}

impl Drop for Trio {
    /// After an error: the threads end soon, nobody waits for them.
    fn drop(&mut self) {
        self.stop.tell(Index(0));
    }
}

/// Drives a follower until told to stop. Its connections stand for as long as the node does.
fn follow(mut node: Node, stop: &Stop) -> Result<Node> {
    while node.committed().0 < stop.through.load(Ordering::Acquire) {
        node.sleep_and_turn(Instant::now() + Duration::from_secs(3600))?;
    }
    Ok(node)
}

fn input(payload: &[u8]) -> Entry {
    Entry::Input(Payload::from(payload.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_replica_commits_what_was_proposed() {
        let mut trio = Trio::start(None).unwrap();
        for _ in 0..20 {
            trio.commit_one(&[1; 64]).unwrap();
        }
        trio.commit_many(2 * TRUNCATE_EVERY, 512, &[2; 64]).unwrap();
        assert!(trio.leader.replica().base().index >= Index(TRUNCATE_EVERY));
        // The leader's Noop came first.
        assert_eq!(trio.close().unwrap(), 1 + 20 + 2 * TRUNCATE_EVERY);
    }
}
