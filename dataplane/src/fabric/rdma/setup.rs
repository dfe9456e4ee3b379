//! From two offers to a connection: rdma_cm on InfiniBand and RoCE alike.
//!
//! Both sides register their memory at once, because the offer tells where it is. The side that dialed the TCP connection
//! connects; the other listens at a port of its own and takes only the request that shows its token, which went over the
//! authenticated connection. The answer shows the first side's token.

use std::net::SocketAddr;

use rdma_sys as sys;

use super::super::lane::{LaneSetup, SetupContext, SetupError, SetupProgress, Transport};
use super::lane::{Limits, PeerRing, RdmaLane};
use super::offer::{Offer, TOKEN_BYTES, Token};
use super::ring::{RECEIVES, SEND_WORK};
use super::verbs::{CmEvent, Depths, Id, Link, Memory, VerbsError};

/// rdma_cm's own limit is far above.
const MOST_RESOLVE_MS: u64 = 10_000;

/// In each, what hangs on an identifier is dropped before it: the device may go with the last one.
#[derive(Debug)]
enum State {
    /// Nothing has been asked of the device yet.
    Dialer {
        memory: Memory,
        id: Id,
    },
    Resolving {
        memory: Memory,
        id: Id,
    },
    Connecting {
        link: Link,
    },
    Listening {
        memory: Memory,
        listener: Id,
    },
    /// The identifier that listened has this connection's events too.
    Accepting {
        link: Link,
        listener: Id,
    },
    /// Failed, or handed out.
    Over,
}

/// A set-up whose offer is made.
#[derive(Debug)]
pub struct RdmaSetup {
    state: State,
    token: Token,
    context: SetupContext,
    refused: u32,
}

fn error(what: impl ToString) -> SetupError {
    SetupError { transport: Transport::Rdma, what: what.to_string() }
}

impl From<VerbsError> for SetupError {
    fn from(source: VerbsError) -> SetupError {
        error(source)
    }
}

impl RdmaSetup {
    /// Registers memory and, on the side that did not dial, listens. The bytes are the offer for the peer.
    ///
    /// # Errors
    /// [`SetupError`]: no rdma-core, no device at this side's address, no memory to lock.
    pub fn begin(context: &SetupContext) -> Result<(RdmaSetup, Vec<u8>), SetupError> {
        let mut token = Token([0; TOKEN_BYTES]);
        fill_random(&mut token.0)?;
        let address = context.local.ip().to_canonical();
        let id = Id::bind(address)?;
        let memory = Memory::new(&id, context.ring_bytes)?;
        let (ring_address, rkey) = memory.ring_for_peer();
        let port = if context.we_dial { 0 } else { id.listen()? };
        let listens = SocketAddr::new(address, port);
        let offer = Offer { listens, token, ring_address, rkey, ring_bytes: context.ring_bytes as u32 };
        let state = match context.we_dial {
            true => State::Dialer { id, memory },
            false => State::Listening { listener: id, memory },
        };
        Ok((RdmaSetup { state, token, context: context.clone(), refused: 0 }, offer.encode()))
    }

    fn next_event(&self) -> Result<Option<CmEvent>, VerbsError> {
        match &self.state {
            State::Dialer { .. } | State::Over => Ok(None),
            State::Resolving { id, .. } => id.next_event(),
            State::Connecting { link } => link.id().next_event(),
            State::Listening { listener, .. } | State::Accepting { listener, .. } => listener.next_event(),
        }
    }

    /// `Some`: the connection stands.
    fn handle(&mut self, event: CmEvent, peer: &Offer, left_ms: u32) -> Result<Option<Link>, SetupError> {
        match (std::mem::replace(&mut self.state, State::Over), event.kind) {
            (State::Resolving { id, memory }, sys::CM_ADDR_RESOLVED) => {
                id.resolve_route(left_ms)?;
                self.state = State::Resolving { id, memory };
            }
            (State::Resolving { id, memory }, sys::CM_ROUTE_RESOLVED) => {
                let link = open(id, memory)?;
                link.connect(&peer.token.0)?;
                self.state = State::Connecting { link };
            }
            (State::Connecting { link }, sys::CM_ESTABLISHED) if self.token.opens(&event.private) => {
                return Ok(Some(link));
            }
            (State::Connecting { .. }, sys::CM_ESTABLISHED) => {
                return Err(error("who accepted the connection does not know our token"));
            }
            (State::Listening { listener, memory }, sys::CM_CONNECT_REQUEST) if self.token.opens(&event.private) => {
                let id = event.request.expect("a request has an identifier");
                let link = open(id, memory)?;
                link.accept(&peer.token.0)?;
                self.state = State::Accepting { link, listener };
            }
            (State::Accepting { link, .. }, sys::CM_ESTABLISHED) if link.concerns(&event) => return Ok(Some(link)),
            (state @ (State::Listening { .. } | State::Accepting { .. }), sys::CM_CONNECT_REQUEST) => {
                self.state = state;
                self.refuse(event);
            }
            // Of a request that was refused.
            (State::Listening { listener, memory }, _) => self.state = State::Listening { listener, memory },
            (State::Accepting { link, listener }, _) if !link.concerns(&event) => {
                self.state = State::Accepting { link, listener };
            }
            _ => return Err(error(format_args!("the connection to {} failed: {}", peer.listens, event.text()))),
        }
        Ok(None)
    }

    /// A request without the token has no effect but this line.
    fn refuse(&mut self, event: CmEvent) {
        self.refused += 1;
        if self.refused == 1 {
            let (address, peer) = (self.context.local.ip(), self.context.peer);
            tracing::warn!(%address, waits_for = %peer, "refused an RDMA connection that does not show the token of this set-up");
        }
        if let Some(id) = event.request {
            // If it fails, dropping the identifier declines as well.
            let _ = id.reject();
        }
    }
}

/// A queue pair with its receives.
fn open(id: Id, memory: Memory) -> Result<Link, VerbsError> {
    let link = Link::new(id, memory, Depths { sends: SEND_WORK, receives: RECEIVES })?;
    link.post_receives(RECEIVES)?;
    Ok(link)
}

/// Whether the peer's ring is like ours, and somewhere.
fn check_ring(peer: &Offer, ring_bytes: usize) -> Result<(), SetupError> {
    let (theirs, address) = (peer.ring_bytes, peer.ring_address);
    if theirs as usize != ring_bytes {
        return Err(error(format_args!(
            "the peer's ring has {theirs} bytes, ours {ring_bytes}; run one version on all nodes"
        )));
    }
    // The lane adds places to it.
    if address.checked_add(u64::from(theirs)).is_none() {
        return Err(error(format_args!("the peer's ring of {theirs} bytes cannot be at {address:#x}")));
    }
    Ok(())
}

fn fill_random(bytes: &mut [u8]) -> Result<(), SetupError> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(|failure| error(format_args!("no random numbers: {failure}")))?;
    }
    Ok(())
}

impl RdmaSetup {
    /// Goes on; `None`: to be called again soon. See [`LaneSetup::complete`].
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn advance(&mut self, peer_offer: &[u8], now_us: u64) -> Result<Option<RdmaLane>, SetupError> {
        let peer = Offer::decode(peer_offer).map_err(error)?;
        let ring_bytes = self.context.ring_bytes;
        check_ring(&peer, ring_bytes)?;
        // For rdma_cm's resolution of addresses and routes.
        let left_ms = (self.context.deadline_us.saturating_sub(now_us) / 1000).clamp(1, MOST_RESOLVE_MS) as u32;
        if matches!(self.state, State::Dialer { .. }) {
            let State::Dialer { id, memory } = std::mem::replace(&mut self.state, State::Over) else { unreachable!() };
            id.resolve_addr(peer.listens, left_ms)?;
            self.state = State::Resolving { id, memory };
        }
        while let Some(event) = self.next_event()? {
            if let Some(link) = self.handle(event, &peer, left_ms)? {
                let ring = PeerRing { address: peer.ring_address, rkey: peer.rkey };
                let SetupContext { max_message_bytes, max_queued_bytes, .. } = self.context;
                let limits = Limits { message_bytes: max_message_bytes, queued_bytes: max_queued_bytes };
                return Ok(Some(RdmaLane::new(link, ring, ring_bytes, limits)?));
            }
        }
        match self.state {
            State::Over => Err(error("it failed before")),
            _ => Ok(None),
        }
    }
}

impl LaneSetup for RdmaSetup {
    fn complete(&mut self, peer_offer: &[u8], now_us: u64) -> Result<SetupProgress, SetupError> {
        Ok(match self.advance(peer_offer, now_us)? {
            Some(lane) => SetupProgress::Up(Box::new(lane)),
            None => SetupProgress::Pending,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Offer, RdmaSetup, TOKEN_BYTES, Token, check_ring};
    use crate::fabric::lane::SetupContext;

    #[test]
    fn a_ring_beyond_the_end_of_memory_is_refused() {
        const BYTES: u32 = 1 << 20;
        let listens = "10.0.0.1:1".parse().unwrap();
        let offer = |ring_address, ring_bytes| {
            let token = Token([0; TOKEN_BYTES]);
            Offer { listens, token, ring_address, rkey: 1, ring_bytes }
        };
        let last = u64::MAX - u64::from(BYTES);
        for address in [0, 0x7f00_0020_0000, last] {
            assert!(check_ring(&offer(address, BYTES), BYTES as usize).is_ok(), "{address:#x}");
        }
        for address in [last + 1, u64::MAX] {
            let refused = check_ring(&offer(address, BYTES), BYTES as usize).unwrap_err().to_string();
            assert!(refused.contains("cannot be at 0xffff"), "{refused}");
        }
        let refused = check_ring(&offer(0, BYTES / 2), BYTES as usize).unwrap_err().to_string();
        assert!(refused.contains("one version"), "{refused}");
    }

    /// Where there is no rdma-core or no device; elsewhere the guests of rig/tests/rdma.rs test the set-up.
    #[test]
    fn without_a_device_the_error_says_what_to_do() {
        let local = "127.0.0.77:1".parse().unwrap();
        let context = SetupContext {
            we_dial: true,
            local,
            peer: local,
            ring_bytes: 1 << 20,
            max_message_bytes: 1 << 20,
            max_queued_bytes: 1 << 20,
            deadline_us: 0,
        };
        let refused = RdmaSetup::begin(&context).expect_err("no RDMA device has this address").to_string();
        assert!(refused.starts_with("cannot set up the rdma lane: "), "{refused}");
        assert!(refused.contains("install librdmacm1") || refused.contains("has the address 127.0.0.77"), "{refused}");
    }
}
