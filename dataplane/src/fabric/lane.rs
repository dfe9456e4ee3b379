//! What carries the messages between two connected replicas: a lane.
//!
//! Every pair keeps its authenticated TCP connection for life. It is the lane itself (`tcp`), or the way that the offers
//! for another one take (`shm`, `rdma`), and then it stays as sign of life, carries the pings and is the doorbell of a
//! receiver that sleeps. A lane knows nothing of peers, groups or time-outs; its owner does.
//!
//! Set-up: each side [`begin`]s and sends the offer that it gets, then calls [`LaneSetup::complete`] with the peer's
//! offer until the lane is up. The owner reports the peer as connected only when both sides have said so. Rejected: to
//! set lanes up over connections of their own, which would have to authenticate again.

use rustix::fd::BorrowedFd;
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

/// Of a control lane, each direction, bytes. Small enough to stay in the second-level cache of the core that polls it.
pub(super) const CONTROL_RING_BYTES: usize = 256 << 10;
/// Of a bulk lane, each direction, bytes.
pub(super) const BULK_RING_BYTES: usize = 4 << 20;

/// The longest offer, bytes; longer ones are refused before they are stored.
pub(super) const MAX_OFFER_BYTES: usize = 4096;

/// What carries messages between two replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Transport {
    /// The TCP connection itself. Works everywhere, and is what remains when nothing else is wanted by both.
    Tcp = 0,
    /// Rings in memory that two processes of one host share.
    Shm = 1,
    /// One-sided RDMA WRITE into rings of the receiver.
    Rdma = 2,
}

impl Transport {
    /// All, by their number on the wire.
    pub const ALL: [Transport; 3] = [Transport::Tcp, Transport::Shm, Transport::Rdma];

    /// The word that configuration and status use.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Shm => "shm",
            Transport::Rdma => "rdma",
        }
    }

    /// What two replicas use: the first that `lower` lists (the replica with the lower id) and `higher` lists too.
    /// TCP is the last of every list, written or not.
    pub fn between(lower: &[Transport], higher: &[Transport]) -> Transport {
        lower.iter().copied().find(|wanted| higher.contains(wanted)).unwrap_or(Transport::Tcp)
    }

    pub(super) fn from_wire(number: u8) -> Option<Transport> {
        Transport::ALL.into_iter().find(|&transport| transport as u8 == number)
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Transport {
    type Err = UnknownTransport;

    fn from_str(name: &str) -> Result<Transport, UnknownTransport> {
        let known = Transport::ALL.into_iter().find(|transport| transport.name() == name);
        known.ok_or_else(|| UnknownTransport { name: name.to_owned() })
    }
}

/// No transport has that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("«{name}» is no transport; there are tcp, shm and rdma")]
pub struct UnknownTransport {
    /// The name.
    pub name: String,
}

/// The peer has not taken enough yet: nothing of the message was sent. Try again after a later pump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the lane is full")]
pub(super) struct LaneFull;

/// Why a lane has ended. The owner ends the connection with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum LaneError {
    /// The peer wrote what no peer of ours writes; it is broken or hostile.
    #[error("the peer broke the rules of the {transport} lane: {what}")]
    Violation {
        /// Which lane.
        transport: Transport,
        /// Which rule.
        what: String,
    },
    /// The device or its connection failed.
    #[error("the {transport} lane failed: {what}")]
    Device {
        /// Which lane.
        transport: Transport,
        /// What it says.
        what: String,
    },
}

/// What a [`Lane::poll`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Polled {
    /// Messages handed out.
    pub messages: usize,
    /// The peer sleeps and is to be woken over the TCP connection.
    pub rings: bool,
}

/// One lane, both directions. Nonblocking; owned by one thread.
pub(super) trait Lane: Send {
    /// Sends the concatenation of `parts` as one message, or nothing of it. The parts are not empty altogether and at most
    /// [`SetupContext::max_message_bytes`] long. What does not fit now is queued, up to
    /// [`SetupContext::max_queued_bytes`]. After an error of the lane, sends succeed or fail without an effect.
    ///
    /// # Errors
    /// [`LaneFull`].
    fn send(&mut self, parts: &[&[u8]]) -> Result<(), LaneFull>;

    /// Makes progress and hands out whole messages, a bounded number of them. Returns how many; 0 means that there are none
    /// now. No system call unless the device needs one.
    ///
    /// # Errors
    /// The lane has ended. What came whole before was handed out.
    fn pump(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<usize, LaneError>;

    /// What the owner does in its loop while it is awake: says so, pumps, and asks for the doorbell. May leave the pump out
    /// where it would find nothing as a rule and hold the peer up.
    ///
    /// # Errors
    /// As [`pump`](Self::pump).
    fn poll(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<Polled, LaneError> {
        self.disarm();
        let messages = self.pump(deliver)?;
        Ok(Polled { messages, rings: self.take_doorbell() })
    }

    /// Bytes that wait for room at the peer.
    fn queued_bytes(&self) -> usize;

    /// Before the owner sleeps: asks for a wake-up when a message or, if bytes are queued, room has come. `true`: there is
    /// something already; do not sleep. No wake-up is lost between this call and the sleep.
    fn arm(&mut self) -> bool;

    /// The owner is awake and polls: it needs no wake-up until it arms again.
    fn disarm(&mut self);

    /// Whether the peer sleeps and is to be woken over the TCP connection. To be asked after sends and after each pump, and before
    /// the owner sleeps.
    fn take_doorbell(&mut self) -> bool;

    /// The same after a send, in less time: may miss a peer that has just gone to sleep.
    fn take_early_doorbell(&mut self) -> bool {
        self.take_doorbell()
    }

    /// Becomes readable after [`arm`](Self::arm) when there is something. `None`: the TCP connection does.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;

    /// The other side is up too: what served the set-up only can go.
    fn peer_is_up(&mut self) {}
}

/// What both ends of a lane must know.
#[derive(Debug, Clone)]
pub(super) struct SetupContext {
    /// Whether this side dialed the TCP connection. Breaks the symmetry.
    pub we_dial: bool,
    /// This end of the TCP connection.
    pub local: SocketAddr,
    /// The other end of the TCP connection.
    pub peer: SocketAddr,
    /// Room for messages under way in each direction, bytes: a power of two. The same on both sides.
    pub ring_bytes: usize,
    /// The longest message, bytes. A peer that sends more breaks the rules.
    pub max_message_bytes: usize,
    /// Bytes that may wait for room in the ring, beyond one message.
    pub max_queued_bytes: usize,
    /// When the owner gives up.
    pub deadline_us: u64,
}

/// How far a set-up is.
pub(super) enum SetupProgress {
    /// To be called again soon.
    Pending,
    /// Messages may be sent as soon as the peer is up too.
    Up(Box<dyn Lane>),
}

/// Why a lane could not be set up: what, where, and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot set up the {transport} lane: {what}")]
pub(super) struct SetupError {
    /// Which lane.
    pub transport: Transport,
    /// What failed.
    pub what: String,
}

/// A set-up whose offer is made. Dropping it gives back all it holds.
pub(super) trait LaneSetup: Send {
    /// Goes on with the peer's offer, the same in each call. Never blocks.
    ///
    /// # Errors
    /// [`SetupError`]; the connection is to be ended.
    fn complete(&mut self, peer_offer: &[u8], now_us: u64) -> Result<SetupProgress, SetupError>;
}

/// Starts to set up a lane over `transport`; the bytes are the offer for the peer.
///
/// # Errors
/// [`SetupError`].
///
/// # Panics
/// For [`Transport::Tcp`], which needs no set-up.
pub(super) fn begin(transport: Transport, context: &SetupContext) -> Result<(Box<dyn LaneSetup>, Vec<u8>), SetupError> {
    match transport {
        Transport::Tcp => unreachable!("the TCP connection is there already"),
        Transport::Shm => super::shm::begin(context),
        Transport::Rdma => super::rdma::begin(context),
    }
}

#[cfg(test)]
mod tests {
    use super::Transport::{self, Rdma, Shm, Tcp};

    #[test]
    fn a_pair_uses_what_the_lower_prefers_and_both_list() {
        assert_eq!(Transport::between(&[Rdma, Shm], &[Shm, Rdma]), Rdma);
        assert_eq!(Transport::between(&[Shm, Rdma], &[Rdma]), Rdma);
        assert_eq!(Transport::between(&[Shm], &[Rdma]), Tcp);
        assert_eq!(Transport::between(&[Tcp, Shm], &[Shm, Tcp]), Tcp);
        assert_eq!(Transport::between(&[], &[]), Tcp);
    }

    #[test]
    fn names_and_numbers_lead_back() {
        for transport in Transport::ALL {
            assert_eq!(transport.name().parse(), Ok(transport));
            assert_eq!(Transport::from_wire(transport as u8), Some(transport));
        }
        assert!("TCP".parse::<Transport>().is_err() && Transport::from_wire(3).is_none());
    }
}
