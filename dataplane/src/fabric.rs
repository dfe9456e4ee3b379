//! Messages between the replicas of a group.
//!
//! Two lanes. The control lane ([`Fabric`], to all peers of a group: [`PeerFabric`]) belongs to the reactor and
//! never blocks. The bulk lane ([`bulk::BulkLink`]) carries syncvm transfers, blocks under deadlines
//! and belongs to a sync thread. One [`Listener`] per node takes the connections of both for all
//! groups, so a node has one port to open.
//!
//! What carries the messages of a pair, TCP or memory, is chosen per pair ([`Transport`]); code above cannot tell.

pub mod bulk;
#[cfg(feature = "conformance")]
pub mod conformance;
mod connection;
mod frames;
#[doc(hidden)]
pub mod fuzz;
mod hello;
mod lane;
mod listener;
pub mod middleware;
mod negotiation;
mod peers;
mod port;
pub mod rdma;
mod secure;
mod session;
mod shm;
mod socket;

pub use hello::{Refusal, RefusalCode};
pub use lane::{Transport, UnknownTransport};
pub use listener::{Listener, RegisterError};
pub use peers::{FabricConfig, PeerFabric};
pub use port::{BulkPort, ControlPort, GroupPort, IncomingBulk};
pub use secure::{FabricKey, KeyError, Security};

use std::net::SocketAddr;

/// The largest control message, bytes. A longer announced length closes the connection.
pub const MAX_CONTROL_MESSAGE_BYTES: usize = 4 << 20;

/// A replica of a group, as the group's configuration numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u8);

impl std::fmt::Display for PeerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Who this process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeIdentity {
    /// The node's name, as the groups' configurations use it.
    pub name: String,
    /// A number drawn anew by each process: tells a restarted node from one that is still there, and
    /// two nodes that were given one name from each other.
    pub instance: u64,
}

impl NodeIdentity {
    /// An identity with a fresh random instance.
    ///
    /// # Errors
    /// The kernel's random source failed.
    pub fn new(name: &str) -> std::io::Result<NodeIdentity> {
        let mut bytes = [0u8; 8];
        std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
        Ok(NodeIdentity { name: name.to_owned(), instance: u64::from_le_bytes(bytes) })
    }
}

/// One replica of a group, as all its members' configurations must agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// Its number.
    pub id: PeerId,
    /// The node that holds it.
    pub node: String,
    /// Where that node's [`Listener`] is.
    pub addr: SocketAddr,
    /// What may carry its messages, the preferred one first; see [`Transport::between`].
    pub transports: Vec<Transport>,
}

/// What [`Fabric::poll`] reports.
#[derive(Debug)]
pub enum FabricEvent<'a> {
    /// Messages can flow in both directions. Nothing sent before arrives now.
    Connected {
        /// The replica.
        peer: PeerId,
        /// Its process; another number than before means that it restarted.
        instance: u64,
    },
    /// The connection is gone; messages sent on it may or may not have arrived. Follows each
    /// `Connected` exactly once.
    Lost {
        /// The replica.
        peer: PeerId,
        /// Why.
        reason: &'a LostReason,
    },
    /// One message. Messages of one connection arrive in order and whole.
    Message {
        /// The sender.
        peer: PeerId,
        /// Valid during the call.
        bytes: &'a [u8],
    },
    /// The peer's node answered that it will not talk to us; dialing goes on, slower. Said again only
    /// when the text changes or after ten seconds.
    Refused {
        /// The replica.
        peer: PeerId,
        /// Its reason, with the remedy.
        reason: &'a Refusal,
    },
}

/// Why a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LostReason {
    /// The other side closed it; its process ended, as a rule.
    #[error("the peer closed the connection")]
    Closed,
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(String),
    /// Nothing came for that long; a connected peer sends something several times per second.
    #[error("nothing heard for {silent_us} µs")]
    Silent {
        /// The time since the last byte.
        silent_us: u64,
    },
    /// The peer announced a message longer than [`MAX_CONTROL_MESSAGE_BYTES`].
    #[error("the peer announced a message of {bytes} bytes; the limit is {MAX_CONTROL_MESSAGE_BYTES}")]
    Oversize {
        /// The announced length.
        bytes: u64,
    },
    /// A record of an encrypted connection did not open.
    #[error("{0}")]
    Forged(String),
    /// What carries the messages failed, or the peer broke its rules.
    #[error("{0}")]
    Lane(String),
    /// A newer connection of the same replica took its place.
    #[error("a newer connection of the same replica took its place")]
    Replaced,
    /// [`Fabric::disconnect`] was called.
    #[error("closed on this side")]
    Disconnected,
}

/// Why a message was not sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// No connection now; a `Connected` event tells when there is one.
    #[error("not connected")]
    NotConnected,
    /// Too much is queued already; nothing of this message was sent. Try again after a later poll.
    #[error("the send queue is full")]
    Full,
    /// The message is longer than [`MAX_CONTROL_MESSAGE_BYTES`] or empty.
    #[error("a message of {bytes} bytes is outside 1..={MAX_CONTROL_MESSAGE_BYTES}")]
    BadLength {
        /// Its length.
        bytes: usize,
    },
}

/// The control lane between this replica and its peers. Nonblocking; owned by one thread.
///
/// An owner that spins calls [`poll_lanes`](Self::poll_lanes) in its loop and [`poll`](Self::poll) when the poller or the
/// deadline says so. One that is about to sleep calls [`arm`](Self::arm) first.
pub trait Fabric: Send {
    /// Sends the concatenation of `parts` as one message, or nothing of it. Success means that it will
    /// arrive unless a `Lost` follows.
    ///
    /// # Errors
    /// [`SendError`].
    fn send(&mut self, peer: PeerId, parts: &[&[u8]]) -> Result<(), SendError>;

    /// Makes progress on all connections and reports what happened. Call it when the poller says so,
    /// when [`next_deadline_us`](Self::next_deadline_us) has come, or in a loop.
    fn poll(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>));

    /// The part of [`poll`](Self::poll) that needs no system call: takes what came through memory.
    fn poll_lanes(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>));

    /// Whether something may come through memory, so that [`poll_lanes`](Self::poll_lanes) makes sense without an event.
    fn has_memory_lanes(&self) -> bool;

    /// Before the owner sleeps in the poller: asks for wake-ups. `true`: there is something already; poll instead of
    /// sleeping. Without it a message that comes through memory wakes nobody. The next poll takes it back.
    fn arm(&mut self) -> bool;

    /// When [`poll`](Self::poll) must be called at the latest.
    fn next_deadline_us(&self) -> u64;

    /// Whether messages can be sent to `peer` now.
    fn is_connected(&self, peer: PeerId) -> bool;

    /// When the last byte of `peer` arrived, over all its connections; `None` before the first.
    fn last_heard_us(&self, peer: PeerId) -> Option<u64>;

    /// Bytes accepted by [`send`](Self::send) that the transport did not take yet.
    fn queued_bytes(&self, peer: PeerId) -> usize;

    /// Ends the connection to `peer`, for instance after a message that makes no sense. The next
    /// poll reports the loss; a new connection is made as after any other.
    fn disconnect(&mut self, peer: PeerId);

    /// Why there is no connection to `peer`, or why the last one ended; for people.
    fn trouble(&self, peer: PeerId) -> Option<&str>;
}

impl<F: Fabric + ?Sized> Fabric for Box<F> {
    fn send(&mut self, peer: PeerId, parts: &[&[u8]]) -> Result<(), SendError> {
        (**self).send(peer, parts)
    }

    fn poll(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        (**self).poll(now_us, sink);
    }

    fn poll_lanes(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        (**self).poll_lanes(now_us, sink);
    }

    fn has_memory_lanes(&self) -> bool {
        (**self).has_memory_lanes()
    }

    fn arm(&mut self) -> bool {
        (**self).arm()
    }

    fn next_deadline_us(&self) -> u64 {
        (**self).next_deadline_us()
    }

    fn is_connected(&self, peer: PeerId) -> bool {
        (**self).is_connected(peer)
    }

    fn last_heard_us(&self, peer: PeerId) -> Option<u64> {
        (**self).last_heard_us(peer)
    }

    fn queued_bytes(&self, peer: PeerId) -> usize {
        (**self).queued_bytes(peer)
    }

    fn disconnect(&mut self, peer: PeerId) {
        (**self).disconnect(peer);
    }

    fn trouble(&self, peer: PeerId) -> Option<&str> {
        (**self).trouble(peer)
    }
}
