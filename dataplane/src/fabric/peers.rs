//! The control lane to all peers.
//!
//! Per peer one connection; the lower replica id dials, so there is never a race between two. A connected
//! fabric pings when it has nothing to say: that makes silence mean something on links that carry no
//! traffic (secondary and witness), both for dropping a dead connection before TCP does and for telling a
//! live peer from a second node that was given its name. What silence means for the group is decided above, by
//! consensus.

use super::connection::Connection;
use super::hello::{Answer, Hello, Lane, Refusal, RefusalCode};
use super::lane::Transport;
use super::port::{ControlPort, IncomingControl, Membership};
use super::secure::{Dialer, Greeted, encode_answer};
use super::session::{Plan, Session};
use super::{Fabric, FabricEvent, LostReason, PeerId, SendError, socket};
use crate::wait::{Interest, Poller};
use rustix::fd::OwnedFd;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;

/// A refusal that did not change is reported again after this time.
const REFUSAL_REPEAT_US: u64 = 10_000_000;

/// More than any answer has.
const READ_BYTES: usize = 2048;

/// Times and bounds of a [`PeerFabric`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FabricConfig {
    /// Between the end of one attempt to connect and the next, give or take a quarter.
    pub retry_us: u64,
    /// The same after a refusal, which only a person can mend.
    pub refused_retry_us: u64,
    /// For an attempt to connect, the greeting included.
    pub connect_timeout_us: u64,
    /// A peer that said nothing for so long may be replaced by another process with its name.
    pub replace_after_us: u64,
    /// A connection that said nothing for so long is closed and made anew. Time in which nobody polled does not count.
    pub silence_timeout_us: u64,
    /// Something is sent at least so often; a fraction of `replace_after_us`.
    pub ping_us: u64,
    /// Bytes that may wait for one peer's socket; at least one largest message.
    pub max_queued_bytes: usize,
}

impl Default for FabricConfig {
    fn default() -> FabricConfig {
        FabricConfig {
            retry_us: 100_000,
            refused_retry_us: 1_000_000,
            connect_timeout_us: 1_000_000,
            replace_after_us: 100_000,
            silence_timeout_us: 1_000_000,
            ping_us: 25_000,
            max_queued_bytes: 16 << 20,
        }
    }
}

#[derive(Debug)]
enum State {
    /// Not connected. The dialing side tries at `retry_us`; the other waits (`u64::MAX`).
    Idle { retry_us: u64 },
    /// Connecting or greeting.
    Dialing(Attempt),
    /// Greeted. Messages flow as soon as the session is up.
    Up(Session),
}

/// A connection before the welcome.
#[derive(Debug)]
struct Attempt {
    fd: OwnedFd,
    deadline_us: u64,
    dialer: Dialer,
    received: Vec<u8>,
    /// Waits until the socket takes it; at first until there is a connection.
    unsent: Vec<u8>,
}

#[derive(Debug)]
struct Link {
    peer: PeerId,
    addr: SocketAddr,
    we_dial: bool,
    token: u64,
    state: State,
    /// What the poller watches for on the present socket.
    interest: Interest,
    last_heard_us: Option<u64>,
    /// How much of the time since then nobody polled.
    unpolled_us: u64,
    refusal: Option<(Refusal, u64)>,
    trouble: Option<String>,
}

/// What all links share.
#[derive(Debug)]
struct Common {
    config: FabricConfig,
    membership: Arc<Membership>,
    poller: Arc<Poller>,
    random: u64,
    polled_us: u64,
}

/// The control lane of one group; see the module.
#[derive(Debug)]
pub struct PeerFabric {
    common: Common,
    port: ControlPort,
    links: Vec<Link>,
}

impl PeerFabric {
    /// Starts to connect with all other replicas of the port's group. Sockets come and go in `poller` by
    /// themselves, under the tokens `first_token ..= first_token + 255`: whenever one of these is
    /// ready, call [`poll`](Fabric::poll).
    ///
    /// # Errors
    /// The poller did not take the port's eventfd.
    ///
    /// # Panics
    /// If the queue's bound is below one largest message.
    pub fn new(
        config: FabricConfig,
        port: ControlPort,
        poller: Arc<Poller>,
        first_token: u64,
        now_us: u64,
    ) -> io::Result<PeerFabric> {
        assert!(config.max_queued_bytes > super::MAX_CONTROL_MESSAGE_BYTES, "a message must fit the queue");
        poller.add(&port, first_token, Interest::ReadEdge)?;
        let membership = Arc::clone(&port.membership);
        let me = membership.me;
        let others = membership.replicas.iter().filter(|replica| replica.id != me);
        let links = others
            .zip(first_token + 1..)
            .map(|(replica, token)| Link {
                peer: replica.id,
                addr: replica.addr,
                we_dial: me < replica.id,
                token,
                state: State::Idle { retry_us: if me < replica.id { now_us } else { u64::MAX } },
                interest: Interest::Read,
                last_heard_us: None,
                unpolled_us: 0,
                refusal: None,
                trouble: None,
            })
            .collect();
        let random = membership.identity.instance | 1;
        Ok(PeerFabric { common: Common { config, membership, poller, random, polled_us: now_us }, port, links })
    }

    /// What carries the messages to and from `peer`, by the group's configuration.
    ///
    /// # Panics
    /// If the group has no other replica `peer`.
    pub fn transport(&self, peer: PeerId) -> Transport {
        self.common.membership.transport_to(self.link(peer).peer)
    }

    fn link(&self, peer: PeerId) -> &Link {
        self.links.iter().find(|link| link.peer == peer).expect("the peer is another replica of the group")
    }

    fn link_mut(&mut self, peer: PeerId) -> &mut Link {
        self.links.iter_mut().find(|link| link.peer == peer).expect("the peer is another replica of the group")
    }

    /// Decides on a connection whose hello was good (the listener checked names and numbers).
    fn welcome(&mut self, incoming: IncomingControl, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let IncomingControl { fd, mut cipher, hello, addr } = incoming;
        if socket::is_closed(&fd) {
            // It waited too long for us and will dial again.
            return;
        }
        let common = &mut self.common;
        let replace_after_us = common.config.replace_after_us;
        let link = self.links.iter_mut().find(|link| link.peer == hello.from).expect("checked by the listener");
        if let State::Up(Session { connection: old, .. }) = &link.state {
            let silent_us = now_us.saturating_sub(old.last_heard_us);
            if old.instance != hello.instance && silent_us <= replace_after_us {
                let text = format!(
                    "another node named {} (instance {:016x}) is connected from {}; two nodes must not have \
                     one name: correct `name` in one node.toml",
                    hello.node,
                    old.instance,
                    old.peer_addr().map_or_else(|| "an unknown address".to_owned(), |addr| addr.to_string())
                );
                tracing::warn!(%addr, "refused a fabric connection: {text}");
                let refused = Answer::Refused(Refusal::new(RefusalCode::SameName, text));
                let answer = encode_answer(&refused, cipher.as_deref_mut());
                let _ = socket::send(&fd, &[IoSlice::new(&answer)]);
                return;
            }
            link.lose(&LostReason::Replaced, common, now_us, sink);
        }
        let welcome = Answer::Welcome { instance: common.membership.identity.instance };
        let answer = encode_answer(&welcome, cipher.as_deref_mut());
        if socket::send(&fd, &[IoSlice::new(&answer)]) != Ok(Some(answer.len())) {
            return;
        }
        if common.poller.add(&fd, link.token, Interest::Read).is_ok() {
            link.interest = Interest::Read;
            link.up(Connection::new(fd, cipher, hello.instance, &[], now_us), common, now_us, sink);
        }
    }
}

impl Fabric for PeerFabric {
    fn send(&mut self, peer: PeerId, parts: &[&[u8]]) -> Result<(), SendError> {
        let max_queued_bytes = self.common.config.max_queued_bytes;
        match &mut self.link_mut(peer).state {
            State::Up(session) => session.send(parts, max_queued_bytes),
            State::Idle { .. } | State::Dialing(_) => Err(SendError::NotConnected),
        }
    }

    fn poll(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let unpolled_us = self.common.unpolled_us(now_us);
        for link in &mut self.links {
            link.unpolled_us += unpolled_us;
            link.drive(&mut self.common, now_us, sink);
        }
        // After the links: a newcomer is judged by what the old connection has said up to now.
        while let Some(incoming) = self.port.inbox.pop() {
            self.welcome(incoming, now_us, sink);
        }
        for link in &mut self.links {
            link.watch(&self.common.poller);
        }
    }

    fn poll_lanes(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        for link in &mut self.links {
            link.pump_lane(&mut self.common, now_us, sink);
        }
    }

    fn has_memory_lanes(&self) -> bool {
        self.links.iter().any(|link| matches!(&link.state, State::Up(session) if session.has_lane()))
    }

    fn arm(&mut self) -> bool {
        let mut something = false;
        for link in &mut self.links {
            // All of them, whatever the first says: one that is not armed would wake nobody.
            if let State::Up(session) = &mut link.state {
                something |= session.arm();
            }
        }
        something
    }

    fn next_deadline_us(&self) -> u64 {
        let look_us = self.common.polled_us.saturating_add(self.common.config.look_us());
        self.links.iter().map(|link| link.deadline_us(&self.common.config, look_us)).min().unwrap_or(u64::MAX)
    }

    fn is_connected(&self, peer: PeerId) -> bool {
        matches!(&self.link(peer).state, State::Up(session) if session.is_up() && !session.connection.is_broken())
    }

    fn last_heard_us(&self, peer: PeerId) -> Option<u64> {
        self.link(peer).last_heard_us
    }

    fn queued_bytes(&self, peer: PeerId) -> usize {
        match &self.link(peer).state {
            State::Up(session) => session.queued_bytes(),
            State::Idle { .. } | State::Dialing(_) => 0,
        }
    }

    fn disconnect(&mut self, peer: PeerId) {
        if let State::Up(session) = &mut self.link_mut(peer).state
            && session.is_up()
        {
            session.connection.break_off(LostReason::Disconnected);
        }
    }

    fn trouble(&self, peer: PeerId) -> Option<&str> {
        self.link(peer).trouble.as_deref()
    }
}

impl Link {
    fn drive(&mut self, common: &mut Common, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        match &mut self.state {
            State::Idle { retry_us } if *retry_us <= now_us => self.start(common, now_us),
            State::Idle { .. } => {}
            State::Dialing(attempt) if attempt.deadline_us <= now_us => {
                self.fail(format!("{} does not answer", self.addr), common.config.retry_us, common, now_us);
            }
            State::Dialing(_) => self.greet(common, now_us, sink),
            State::Up(_) => self.pump(common, now_us, sink),
        }
    }

    fn start(&mut self, common: &mut Common, now_us: u64) {
        let dialed = socket::dial(self.addr, socket::tune_control).and_then(|fd| {
            common.poller.add(&fd, self.token, Interest::Write)?;
            Ok(fd)
        });
        match dialed {
            Ok(fd) => {
                let deadline_us = now_us + common.config.connect_timeout_us;
                self.interest = Interest::Write;
                let mut unsent = Vec::new();
                let dialer =
                    Dialer::new(&common.membership.security, &hello(&common.membership, self.peer), &mut unsent);
                self.state = State::Dialing(Attempt { fd, deadline_us, dialer, received: Vec::new(), unsent });
            }
            Err(error) => {
                let text = format!("connecting to {}: {error}", self.addr);
                self.fail(text, common.config.retry_us, common, now_us);
            }
        }
    }

    /// Ends an attempt to connect.
    fn fail(&mut self, trouble: String, retry_us: u64, common: &mut Common, now_us: u64) {
        self.trouble = Some(trouble);
        let retry_us = now_us + common.jittered(retry_us);
        self.close(common, retry_us);
    }

    /// Drops the socket, if there is one.
    fn close(&mut self, common: &Common, retry_us: u64) {
        let retry_us = if self.we_dial { retry_us } else { u64::MAX };
        // Closing would end the watch as well; an fd that somebody duplicated would not.
        match std::mem::replace(&mut self.state, State::Idle { retry_us }) {
            State::Idle { .. } => {}
            State::Dialing(attempt) => drop(common.poller.remove(&attempt.fd)),
            State::Up(session) => {
                let _ = common.poller.remove(&session);
                if let Some(event) = session.event_fd() {
                    let _ = common.poller.remove(event);
                }
            }
        }
    }

    /// Sends and reads what the handshake has next.
    fn greet(&mut self, common: &mut Common, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let State::Dialing(attempt) = &mut self.state else { unreachable!("greet is called while dialing") };
        match attempt.advance() {
            Ok(None) => {}
            Ok(Some(Greeted::Welcome { instance, cipher })) => {
                let State::Dialing(attempt) = std::mem::replace(&mut self.state, State::Idle { retry_us: 0 }) else {
                    unreachable!("the state was just looked at")
                };
                let connection = Connection::new(attempt.fd, cipher, instance, &attempt.received, now_us);
                self.up(connection, common, now_us, sink);
                self.pump(common, now_us, sink);
            }
            Ok(Some(Greeted::Refused(refusal))) => {
                self.fail(refusal.text.clone(), common.config.refused_retry_us, common, now_us);
                self.report(refusal, now_us, sink);
            }
            Err(error) => {
                let text = format!("connecting to {}: {error}", self.addr);
                self.fail(text, common.config.retry_us, common, now_us);
            }
        }
    }

    fn report(&mut self, refusal: Refusal, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let known = |(old, at_us): &(Refusal, u64)| *old == refusal && now_us < at_us + REFUSAL_REPEAT_US;
        if !self.refusal.as_ref().is_some_and(known) {
            sink(FabricEvent::Refused { peer: self.peer, reason: &refusal });
            self.refusal = Some((refusal, now_us));
        }
    }

    fn up(&mut self, connection: Connection, common: &Common, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let instance = connection.instance;
        let plan = Plan {
            transport: common.membership.transport_to(self.peer),
            we_dial: self.we_dial,
            max_queued_bytes: common.config.max_queued_bytes,
            deadline_us: now_us + common.config.connect_timeout_us,
        };
        let session = Session::new(connection, plan);
        self.heard(now_us);
        if session.is_up() {
            self.connected(instance, sink);
        }
        self.state = State::Up(session);
    }

    fn connected(&mut self, instance: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        self.refusal = None;
        self.trouble = None;
        sink(FabricEvent::Connected { peer: self.peer, instance });
    }

    fn pump(&mut self, common: &mut Common, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let State::Up(session) = &mut self.state else {
            return;
        };
        let peer = self.peer;
        let mut deliver = |bytes: &[u8]| sink(FabricEvent::Message { peer, bytes });
        let mut result = session.pump(now_us, &mut deliver);
        let heard_us = session.connection.last_heard_us;
        self.heard(heard_us);
        let State::Up(session) = &mut self.state else { unreachable!("it was just pumped") };
        let silent_us = now_us.saturating_sub(heard_us.saturating_add(self.unpolled_us));
        if result.is_ok() && silent_us >= common.config.silence_timeout_us {
            result = Err(LostReason::Silent { silent_us });
        }
        match result {
            Ok(true) => self.lane_up(common, now_us, sink),
            Ok(false) if now_us.saturating_sub(session.connection.last_sent_us) >= common.config.ping_us => {
                session.connection.ping();
                session.connection.last_sent_us = now_us;
            }
            Ok(false) => {}
            Err(reason) => self.lose(&reason, common, now_us, sink),
        }
    }

    fn lane_up(&mut self, common: &mut Common, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let State::Up(session) = &self.state else { unreachable!("its lane is up") };
        if let Some(event) = session.event_fd()
            && let Err(error) = common.poller.add(event, self.token, Interest::Read)
        {
            let text = format!("the poller does not take the lane's events: {error}");
            return self.lose(&LostReason::Lane(text), common, now_us, sink);
        }
        let instance = session.connection.instance;
        self.connected(instance, sink);
        self.pump(common, now_us, sink);
    }

    fn pump_lane(&mut self, common: &mut Common, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let State::Up(session) = &mut self.state else {
            return;
        };
        let peer = self.peer;
        let result = session.poll_lane(now_us, &mut |bytes| sink(FabricEvent::Message { peer, bytes }));
        let heard_us = session.connection.last_heard_us;
        self.heard(heard_us);
        if let Err(reason) = result {
            self.lose(&reason, common, now_us, sink);
        }
    }

    /// The last that was heard was at `at_us`.
    fn heard(&mut self, at_us: u64) {
        if self.last_heard_us != Some(at_us) {
            (self.last_heard_us, self.unpolled_us) = (Some(at_us), 0);
        }
    }

    /// Ends a session. Nobody is told of one that never was up, except of what keeps its lane from coming up.
    fn lose(&mut self, reason: &LostReason, common: &mut Common, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let was_up = matches!(&self.state, State::Up(session) if session.is_up());
        match reason {
            LostReason::Lane(text) if !was_up => {
                self.fail(text.clone(), common.config.refused_retry_us, common, now_us);
                self.report(Refusal::new(RefusalCode::Lane, text.clone()), now_us, sink);
            }
            _ => self.fail(reason.to_string(), common.config.retry_us, common, now_us),
        }
        if was_up {
            sink(FabricEvent::Lost { peer: self.peer, reason });
        }
    }

    /// Tells the poller what this link waits for: room only while something needs it.
    fn watch(&mut self, poller: &Poller) {
        let wanted = match &self.state {
            State::Idle { .. } => return,
            State::Dialing(attempt) if !attempt.unsent.is_empty() => Interest::Write,
            State::Dialing(_) => Interest::Read,
            State::Up(session) if session.connection.queued_bytes() > 0 => Interest::ReadWrite,
            State::Up(_) => Interest::Read,
        };
        if wanted == self.interest {
            return;
        }
        let changed = match &self.state {
            State::Idle { .. } => return,
            State::Dialing(attempt) => poller.modify(&attempt.fd, self.token, wanted),
            State::Up(session) => poller.modify(session, self.token, wanted),
        };
        changed.expect("the socket is in the poller");
        self.interest = wanted;
    }

    fn deadline_us(&self, config: &FabricConfig, look_us: u64) -> u64 {
        match &self.state {
            State::Idle { retry_us } => *retry_us,
            State::Dialing(attempt) => attempt.deadline_us,
            State::Up(session) => {
                let connection = &session.connection;
                // Broken, or a partial write that the poller does not know of yet: poll at once.
                if connection.is_broken() || (connection.queued_bytes() > 0 && self.interest != Interest::ReadWrite) {
                    return 0;
                }
                let ping_us = connection.last_sent_us + config.ping_us;
                let silence_us = connection.last_heard_us + self.unpolled_us + config.silence_timeout_us;
                ping_us.min(silence_us).min(session.setup_deadline_us()).min(look_us)
            }
        }
    }
}

impl FabricConfig {
    /// Links are polled at least this often, if anybody is run to do so.
    fn look_us(&self) -> u64 {
        self.silence_timeout_us / 4
    }
}

impl Common {
    /// Notes a poll, and says how much of the time since the last one must not pass for silence: this thread was not run, and
    /// the peers may have stood still on the same machine.
    fn unpolled_us(&mut self, now_us: u64) -> u64 {
        let passed_us = now_us.saturating_sub(self.polled_us);
        self.polled_us = self.polled_us.max(now_us);
        passed_us.saturating_sub(self.config.look_us())
    }

    /// `us` give or take a quarter (xorshift64: only there to keep retries from marching in step).
    fn jittered(&mut self, us: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        us - us / 4 + self.random % (us / 2).max(1)
    }
}

impl Attempt {
    fn advance(&mut self) -> io::Result<Option<Greeted>> {
        if !self.flush()? {
            return Ok(None);
        }
        let mut chunk = [0u8; READ_BYTES];
        match socket::recv(&self.fd, &mut chunk)? {
            None => return Ok(None),
            Some(0) => return Err(io::Error::other("it closed the connection without an answer")),
            Some(received) => self.received.extend_from_slice(&chunk[..received]),
        }
        let greeted = self.dialer.advance(&mut self.received, &mut self.unsent).map_err(io::Error::other)?;
        self.flush()?;
        Ok(greeted)
    }

    /// Sends what waits; `false` if some of it still does, for want of a connection as a rule.
    fn flush(&mut self) -> io::Result<bool> {
        if !self.unsent.is_empty()
            && let Some(sent) = socket::send(&self.fd, &[IoSlice::new(&self.unsent)])?
        {
            self.unsent.drain(..sent);
        }
        Ok(self.unsent.is_empty())
    }
}

fn hello(membership: &Membership, to: PeerId) -> Hello {
    Hello {
        lane: Lane::Control,
        from: membership.me,
        to,
        transport: membership.transport_to(to),
        instance: membership.identity.instance,
        view: 0,
        number: 0,
        group: membership.group.clone(),
        node: membership.identity.name.clone(),
    }
}
