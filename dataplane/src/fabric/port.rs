//! Where the listener hands a group's connections over.

use super::bulk::{BulkError, BulkHello, BulkLink};
use super::hello::Hello;
use super::lane::Transport;
use super::listener::Registration;
use super::secure::{Cipher, Security};
use super::{NodeIdentity, PeerId, Replica};
use crate::wait::EventFd;
use crossbeam_queue::ArrayQueue;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

/// A bounded queue with a wake-up.
#[derive(Debug)]
pub(super) struct Inbox<T> {
    queue: ArrayQueue<T>,
    event: EventFd,
}

impl<T> Inbox<T> {
    pub fn new(capacity: usize) -> io::Result<Inbox<T>> {
        Ok(Inbox { queue: ArrayQueue::new(capacity), event: EventFd::new()? })
    }

    pub fn is_full(&self) -> bool {
        self.queue.is_full()
    }

    /// Queues and wakes; gives the item back if there is no room.
    pub fn push(&self, item: T) -> Result<(), T> {
        self.queue.push(item)?;
        self.event.signal();
        Ok(())
    }

    pub fn pop(&self) -> Option<T> {
        self.queue.pop()
    }
}

/// A control connection whose hello was good; the answer is the fabric's.
#[derive(Debug)]
pub(super) struct IncomingControl {
    pub fd: OwnedFd,
    /// Its keys, unless it is in the clear.
    pub cipher: Option<Box<Cipher>>,
    pub hello: Hello,
    pub addr: SocketAddr,
}

/// What all parts of a group need to know about it.
#[derive(Debug)]
pub(super) struct Membership {
    pub group: String,
    pub me: PeerId,
    pub replicas: Vec<Replica>,
    pub identity: NodeIdentity,
    pub security: Security,
}

impl Membership {
    pub fn replica(&self, id: PeerId) -> Option<&Replica> {
        self.replicas.iter().find(|replica| replica.id == id)
    }

    /// What carries messages to and from `peer`, another replica of the group.
    pub fn transport_to(&self, peer: PeerId) -> Transport {
        let transports = |id| self.replica(id).map_or(&[][..], |replica| &replica.transports[..]);
        Transport::between(transports(self.me.min(peer)), transports(self.me.max(peer)))
    }
}

/// Both ends of a registered group.
#[derive(Debug)]
pub struct GroupPort {
    /// For [`PeerFabric::new`](super::PeerFabric::new). The group is deregistered when it is dropped.
    pub control: ControlPort,
    /// For the sync threads.
    pub bulk: BulkPort,
}

/// Incoming control connections of a group.
#[derive(Debug)]
pub struct ControlPort {
    pub(super) inbox: Arc<Inbox<IncomingControl>>,
    pub(super) membership: Arc<Membership>,
    /// Held for its drop.
    pub(super) _registration: Registration,
}

impl AsFd for ControlPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inbox.event.as_fd()
    }
}

/// A bulk connection that another replica opened.
#[derive(Debug)]
pub struct IncomingBulk {
    /// Who opened it.
    pub peer: PeerId,
    /// Its process.
    pub instance: u64,
    /// As the dialer said; what it means is between the two users.
    pub view: u64,
    /// As the dialer said.
    pub number: u64,
    /// The connection.
    pub link: BulkLink,
}

/// Bulk connections of a group, both ways. Clones share the queue.
#[derive(Debug, Clone)]
pub struct BulkPort {
    pub(super) inbox: Arc<Inbox<IncomingBulk>>,
    pub(super) membership: Arc<Membership>,
}

impl BulkPort {
    /// The next incoming connection, if one waits. It may be stale: compare view and number, and drop
    /// it if they are not the ones expected.
    pub fn take(&self) -> Option<IncomingBulk> {
        self.inbox.pop()
    }

    /// Waits for an incoming connection until `deadline`. Only one thread may wait at a time.
    pub fn wait(&self, deadline: Instant) -> Option<IncomingBulk> {
        loop {
            // Drain first: a push after it leaves the event set, so it cannot be missed.
            self.inbox.event.drain();
            if let Some(incoming) = self.take() {
                return Some(incoming);
            }
            if !super::bulk::wait_readable(self.inbox.event.as_fd(), deadline) {
                return None;
            }
        }
    }

    /// Opens a bulk connection to `peer`; see [`BulkLink::dial`].
    ///
    /// # Errors
    /// [`BulkError`].
    ///
    /// # Panics
    /// If the group has no other replica `peer`.
    pub fn dial(&self, peer: PeerId, view: u64, number: u64, deadline: Instant) -> Result<BulkLink, BulkError> {
        let replica = self.membership.replica(peer).expect("the peer is a replica of the group");
        assert!(peer != self.membership.me, "a replica does not dial itself");
        let hello = BulkHello {
            group: self.membership.group.clone(),
            identity: self.membership.identity.clone(),
            from: self.membership.me,
            to: peer,
            transport: self.membership.transport_to(peer),
            view,
            number,
        };
        BulkLink::dial(replica.addr, &hello, &self.membership.security, deadline)
    }
}

/// Readable when a connection waits (edge: once per connection; nobody has to drain it).
impl AsFd for BulkPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inbox.event.as_fd()
    }
}
