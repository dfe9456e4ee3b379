//! The bulk lane: one TCP connection per syncvm transfer, used by one sync thread.
//!
//! Calls block, but every one has a deadline, and another thread can cancel them: a peer that dies in
//! the middle of an exchange must never leave a guest stopped. A message is `u32` length, `u16` kind, `u16`
//! zero, and the bytes. Rejected: the control connection for this (a transfer of GiB would delay
//! heartbeats), and nonblocking state machines (a sync thread has nothing else to do).

mod laned;
mod sealed;
mod stream;

use super::hello::{Hello, Lane};
use super::lane::{MAX_OFFER_BYTES, Transport};
use super::secure::{Cipher, Dialer, Greeted, Security};
use super::{NodeIdentity, PeerId, Refusal};
use laned::{Greeter, Laned, Setup};
use rustix::fd::OwnedFd;
use sealed::Sealed;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;
use stream::{Shared, Stream};

pub(super) use stream::wait_readable;

/// The most payload of a bulk message, bytes.
pub const MAX_BULK_MESSAGE_BYTES: usize = (4 << 20) + 4096;
const HEADER_BYTES: usize = 8;

/// Why a bulk call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BulkError {
    /// The deadline passed.
    #[error("the deadline of the transfer passed")]
    Timeout,
    /// [`BulkCancel::cancel`] was called.
    #[error("the transfer was cancelled")]
    Cancelled,
    /// The connection failed or was closed.
    #[error("the peer is gone: {0}")]
    PeerLost(String),
    /// The peer's node would not take the connection.
    #[error("the peer refused the transfer: {0}")]
    Refused(Refusal),
    /// There is no way for the messages.
    #[error("{0}")]
    Lane(String),
    /// The peer sent what no peer of ours sends.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
}

impl BulkError {
    /// The deadline passed.
    pub fn is_timeout(&self) -> bool {
        matches!(self, BulkError::Timeout)
    }

    /// This side cancelled.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, BulkError::Cancelled)
    }

    /// The other side is gone.
    pub fn is_peer_lost(&self) -> bool {
        matches!(self, BulkError::PeerLost(_))
    }
}

/// What the dialer of a bulk connection says about itself and the transfer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BulkHello {
    /// The group.
    pub group: String,
    /// This process.
    pub identity: NodeIdentity,
    /// This replica.
    pub from: PeerId,
    /// The replica dialed.
    pub to: PeerId,
    /// What carries messages between the two.
    pub transport: Transport,
    /// The view of the transfer.
    pub view: u64,
    /// The number of the transfer.
    pub number: u64,
}

/// Cancels a link's calls from any thread.
#[derive(Debug, Clone)]
pub struct BulkCancel(Arc<Shared>);

impl BulkCancel {
    /// Ends the connection; a blocked call and all later ones return [`BulkError::Cancelled`].
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

/// The kind of a message that sets up a lane. None of the users'.
const SETUP_KIND: u16 = u16::MAX;

/// A bulk connection.
pub struct BulkLink {
    // Before the connection, whose end the peer takes for the lane's: what was sent is to arrive first.
    route: Route,
    wire: Wire,
    /// A call ended inside a message; the stream has no meaning any more.
    broken: Option<BulkError>,
}

/// The connection.
struct Wire {
    stream: Stream,
    /// Absent in the clear.
    sealed: Option<Box<Sealed>>,
}

/// Which way the messages take.
enum Route {
    /// The connection.
    Wire,
    /// A lane, as soon as both sides come to use it.
    SettingUp(Setup),
    Lane(Laned),
}

impl BulkLink {
    /// Connects, says hello under `security` and waits for the welcome, all before `deadline`.
    ///
    /// # Errors
    /// [`BulkError`].
    pub fn dial(
        addr: SocketAddr,
        hello: &BulkHello,
        security: &Security,
        deadline: Instant,
    ) -> Result<BulkLink, BulkError> {
        let stream = Stream::connect(addr, deadline)?;
        let cipher = greet(&stream, hello, security, deadline)?;
        Ok(BulkLink::new(stream, cipher, hello.transport, true))
    }

    /// Takes over a connected and greeted socket.
    pub(super) fn from_stream(fd: OwnedFd, cipher: Option<Box<Cipher>>, transport: Transport) -> BulkLink {
        BulkLink::new(Stream::new(fd), cipher, transport, false)
    }

    fn new(stream: Stream, cipher: Option<Box<Cipher>>, transport: Transport, we_dial: bool) -> BulkLink {
        let sealed = cipher.map(|cipher| Box::new(Sealed::new(cipher)));
        let route = match transport {
            Transport::Tcp => Route::Wire,
            _ => Route::SettingUp(Setup::Planned { transport, we_dial }),
        };
        BulkLink { wire: Wire { stream, sealed }, route, broken: None }
    }

    /// Sends one message of `kind`: the concatenation of `parts`.
    ///
    /// # Errors
    /// [`BulkError`]. A timeout before the first byte leaves the link usable; after any other error every later call
    /// fails too.
    ///
    /// # Panics
    /// If the parts exceed [`MAX_BULK_MESSAGE_BYTES`], or the kind is `u16::MAX`.
    pub fn send(&mut self, kind: u16, parts: &[IoSlice<'_>], deadline: Instant) -> Result<(), BulkError> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        assert!(bytes <= MAX_BULK_MESSAGE_BYTES, "a bulk message of {bytes} bytes");
        assert_ne!(kind, SETUP_KIND, "this kind is the link's own");
        let header = header(kind, bytes);
        self.check()?;
        let mut started = false;
        let result = self.find_route(deadline).and_then(|()| match &mut self.route {
            Route::Lane(lane) => lane.send(&self.wire.stream, &header, parts, &mut started, deadline),
            Route::Wire | Route::SettingUp(_) => self.wire.send(&header, parts, &mut started, deadline),
        });
        if let Err(error) = &result
            && (started || !error.is_timeout())
        {
            self.broken = Some(error.clone());
        }
        result
    }

    /// Receives one message into `buf`, replacing its contents, and returns its kind.
    ///
    /// # Errors
    /// [`BulkError`]. A timeout before the first byte of a message leaves the link usable; after any
    /// other error every later call fails too.
    pub fn recv(&mut self, buf: &mut Vec<u8>, deadline: Instant) -> Result<u16, BulkError> {
        buf.clear();
        self.check()?;
        let mut header = Vec::with_capacity(HEADER_BYTES);
        let found = self.find_route(deadline);
        let result = found.and_then(|()| self.recv_message(&mut header, buf, deadline));
        if let Err(error) = &result
            && !(error.is_timeout() && header.is_empty())
        {
            self.broken = Some(error.clone());
        }
        result
    }

    /// A handle that cancels this link's calls.
    pub fn cancel_handle(&self) -> BulkCancel {
        BulkCancel(Arc::clone(&self.wire.stream.shared))
    }

    /// Bytes moved so far in both directions, those of the encryption included; grows while the transfer lives.
    pub fn progress(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.wire.stream.progress)
    }

    fn recv_message(&mut self, header: &mut Vec<u8>, buf: &mut Vec<u8>, deadline: Instant) -> Result<u16, BulkError> {
        self.recv_exact(header, HEADER_BYTES, deadline)?;
        let bytes = u32::from_le_bytes(header[0..4].try_into().expect("4 bytes")) as usize;
        if bytes > MAX_BULK_MESSAGE_BYTES {
            return Err(BulkError::Protocol(format!("it announced a message of {bytes} bytes")));
        }
        self.recv_exact(buf, bytes, deadline)?;
        Ok(u16::from_le_bytes([header[4], header[5]]))
    }

    fn recv_exact(&mut self, buf: &mut Vec<u8>, len: usize, deadline: Instant) -> Result<(), BulkError> {
        match &mut self.route {
            Route::Lane(lane) => lane.recv_exact(&self.wire.stream, buf, len, deadline),
            Route::Wire | Route::SettingUp(_) => self.wire.recv_exact(buf, len, deadline),
        }
    }

    /// Sets up the lane, if there is to be one. With the first message, because the other side may come to use the link
    /// long after its listener took the connection.
    fn find_route(&mut self, deadline: Instant) -> Result<(), BulkError> {
        let Route::SettingUp(setup) = &mut self.route else {
            return Ok(());
        };
        let mut greeter = SetupWire { wire: &mut self.wire, broken: false };
        let result = setup.complete(&mut greeter, deadline);
        if let Err(error) = &result
            && (greeter.broken || !error.is_timeout())
        {
            self.broken = Some(error.clone());
        }
        self.route = Route::Lane(result?);
        Ok(())
    }

    /// Fails if the link was cancelled or broken before.
    fn check(&self) -> Result<(), BulkError> {
        self.wire.stream.check()?;
        self.broken.clone().map_or(Ok(()), Err)
    }
}

impl Wire {
    fn send(
        &mut self,
        header: &[u8; HEADER_BYTES],
        parts: &[IoSlice<'_>],
        started: &mut bool,
        deadline: Instant,
    ) -> Result<(), BulkError> {
        match &mut self.sealed {
            // A record that is encrypted must also be sent; so the wait comes before.
            Some(sealed) => self.stream.wait_writable(deadline).and_then(|()| {
                *started = true;
                sealed.send(&self.stream, header, parts, deadline)
            }),
            None => {
                let mut slices = Vec::with_capacity(parts.len() + 1);
                slices.push(IoSlice::new(header));
                slices.extend_from_slice(parts);
                self.stream.write_all(&mut slices, started, deadline)
            }
        }
    }

    fn recv_exact(&mut self, buf: &mut Vec<u8>, len: usize, deadline: Instant) -> Result<(), BulkError> {
        match &mut self.sealed {
            Some(sealed) => sealed.recv_exact(&self.stream, buf, len, deadline),
            None => self.stream.read_exact(buf, len, deadline),
        }
    }
}

/// The messages of a lane's set-up: those of the link, of a kind of their own.
struct SetupWire<'w> {
    wire: &'w mut Wire,
    /// A call ended inside a message.
    broken: bool,
}

impl Greeter for SetupWire<'_> {
    fn stream(&self) -> &Stream {
        &self.wire.stream
    }

    fn tell(&mut self, message: &[u8], deadline: Instant) -> Result<(), BulkError> {
        let result = self.wire.send(&header(SETUP_KIND, message.len()), &[IoSlice::new(message)], &mut true, deadline);
        self.broken |= result.is_err();
        result
    }

    fn hear(&mut self, buf: &mut Vec<u8>, deadline: Instant) -> Result<(), BulkError> {
        buf.clear();
        let mut header = Vec::with_capacity(HEADER_BYTES);
        let heard = self.wire.recv_exact(&mut header, HEADER_BYTES, deadline);
        self.broken |= heard.is_err() && !header.is_empty();
        heard?;
        let bytes = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        if bytes > 1 + MAX_OFFER_BYTES || header[4..6] != SETUP_KIND.to_le_bytes() {
            return Err(BulkError::Protocol("it does not set up the lane".to_owned()));
        }
        let heard = self.wire.recv_exact(buf, bytes, deadline);
        self.broken |= heard.is_err();
        heard
    }
}

fn header(kind: u16, bytes: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0..4].copy_from_slice(&(bytes as u32).to_le_bytes());
    header[4..6].copy_from_slice(&kind.to_le_bytes());
    header
}

impl std::fmt::Debug for BulkLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BulkLink")
            .field("stream", &self.wire.stream)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

/// The dialing side's handshake; the keys, unless it is in the clear.
fn greet(
    stream: &Stream,
    hello: &BulkHello,
    security: &Security,
    deadline: Instant,
) -> Result<Option<Box<Cipher>>, BulkError> {
    let hello = Hello {
        lane: Lane::Bulk,
        from: hello.from,
        to: hello.to,
        transport: hello.transport,
        instance: hello.identity.instance,
        view: hello.view,
        number: hello.number,
        group: hello.group.clone(),
        node: hello.identity.name.clone(),
    };
    let (mut received, mut unsent) = (Vec::new(), Vec::new());
    let mut dialer = Dialer::new(security, &hello, &mut unsent);
    loop {
        stream.write_all(&mut [IoSlice::new(&unsent)], &mut false, deadline)?;
        unsent.clear();
        // Exactly the greeting: the peer's first message may be right behind it.
        let wanted = received.len() + dialer.missing_bytes(&received);
        stream.read_exact(&mut received, wanted, deadline)?;
        match dialer.advance(&mut received, &mut unsent) {
            Ok(None) => {}
            Ok(Some(Greeted::Welcome { cipher, .. })) => return Ok(cipher),
            Ok(Some(Greeted::Refused(refusal))) => return Err(BulkError::Refused(refusal)),
            Err(error) => return Err(BulkError::Protocol(error.to_string())),
        }
    }
}
