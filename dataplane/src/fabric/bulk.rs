//! The bulk lane: one TCP connection per syncvm transfer, used by one sync thread.
//!
//! Calls block, but every one has a deadline, and another thread can cancel them: a peer that dies in
//! the middle of an exchange must never leave a guest stopped. A message is `u32` length, `u16` kind, `u16`
//! zero, and the bytes. Rejected: the control connection for this (a transfer of GiB would delay
//! heartbeats), and nonblocking state machines (a sync thread has nothing else to do).

use super::hello::{Answer, Hello, Lane, MAX_ANSWER_BYTES};
use super::{NodeIdentity, PeerId, Refusal, socket};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The most payload of a bulk message, bytes.
pub const MAX_BULK_MESSAGE_BYTES: usize = (4 << 20) + 4096;
const HEADER_BYTES: usize = 8;
/// Slices per system call; the kernel's limit is 1024.
const MAX_SLICES: usize = 1024;

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
    /// The view of the transfer.
    pub view: u64,
    /// The number of the transfer.
    pub number: u64,
}

#[derive(Debug)]
struct Shared {
    fd: OwnedFd,
    cancelled: AtomicBool,
}

/// Cancels a link's calls from any thread.
#[derive(Debug, Clone)]
pub struct BulkCancel(Arc<Shared>);

impl BulkCancel {
    /// Ends the connection; a blocked call and all later ones return [`BulkError::Cancelled`].
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        // ENOTCONN: the connection has ended by itself; the calls have returned then.
        let _ = rustix::net::shutdown(&self.0.fd, rustix::net::Shutdown::Both);
    }
}

/// A bulk connection.
#[derive(Debug)]
pub struct BulkLink {
    shared: Arc<Shared>,
    progress: Arc<AtomicU64>,
    /// A call ended inside a message; the stream has no meaning any more.
    broken: Option<BulkError>,
}

impl BulkLink {
    /// Connects, says hello and waits for the welcome, all before `deadline`.
    ///
    /// # Errors
    /// [`BulkError`].
    pub fn dial(addr: SocketAddr, hello: &BulkHello, deadline: Instant) -> Result<BulkLink, BulkError> {
        let lost = |error: std::io::Error| BulkError::PeerLost(format!("connecting to {addr}: {error}"));
        let fd = socket::dial(addr, socket::tune_bulk).map_err(lost)?;
        let mut link = BulkLink::from_stream(fd);
        link.wait(PollFlags::OUT, deadline)?;
        match rustix::net::sockopt::socket_error(&link.shared.fd) {
            Ok(Ok(())) => {}
            Ok(Err(error)) | Err(error) => return Err(lost(error.into())),
        }
        let mut bytes = Vec::new();
        let wire = Hello {
            lane: Lane::Bulk,
            from: hello.from,
            to: hello.to,
            instance: hello.identity.instance,
            view: hello.view,
            number: hello.number,
            group: hello.group.clone(),
            node: hello.identity.name.clone(),
        };
        wire.encode(&mut bytes);
        link.send_all(&mut [IoSlice::new(&bytes)], deadline)?;
        link.read_welcome(deadline)?;
        Ok(link)
    }

    /// Takes over a connected and greeted socket.
    pub(super) fn from_stream(fd: OwnedFd) -> BulkLink {
        let shared = Arc::new(Shared { fd, cancelled: AtomicBool::new(false) });
        BulkLink { shared, progress: Arc::default(), broken: None }
    }

    /// Sends one message of `kind`: the concatenation of `parts`.
    ///
    /// # Errors
    /// [`BulkError`]. After an error inside the message every later call fails too.
    ///
    /// # Panics
    /// If the parts exceed [`MAX_BULK_MESSAGE_BYTES`].
    pub fn send(&mut self, kind: u16, parts: &[IoSlice<'_>], deadline: Instant) -> Result<(), BulkError> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        assert!(bytes <= MAX_BULK_MESSAGE_BYTES, "a bulk message of {bytes} bytes");
        let mut header = [0; HEADER_BYTES];
        header[0..4].copy_from_slice(&(bytes as u32).to_le_bytes());
        header[4..6].copy_from_slice(&kind.to_le_bytes());
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&header));
        slices.extend_from_slice(parts);
        self.send_all(&mut slices, deadline)
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
        let result = self.recv_message(&mut header, buf, deadline);
        if let Err(error) = &result
            && !(error.is_timeout() && header.is_empty())
        {
            self.broken = Some(error.clone());
        }
        result
    }

    /// A handle that cancels this link's calls.
    pub fn cancel_handle(&self) -> BulkCancel {
        BulkCancel(Arc::clone(&self.shared))
    }

    /// Bytes moved so far in both directions; grows while the transfer lives.
    pub fn progress(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.progress)
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

    /// Fails if the link was cancelled or broken before.
    fn check(&self) -> Result<(), BulkError> {
        if self.shared.cancelled.load(Ordering::Acquire) {
            return Err(BulkError::Cancelled);
        }
        self.broken.clone().map_or(Ok(()), Err)
    }

    fn send_all(&mut self, mut slices: &mut [IoSlice<'_>], deadline: Instant) -> Result<(), BulkError> {
        self.check()?;
        let mut started = false;
        while slices.iter().any(|slice| !slice.is_empty()) {
            let batch = &slices[..slices.len().min(MAX_SLICES)];
            let result = match socket::send(&self.shared.fd, batch) {
                Ok(Some(sent)) => {
                    self.progress.fetch_add(sent as u64, Ordering::Relaxed);
                    IoSlice::advance_slices(&mut slices, sent);
                    started = true;
                    Ok(())
                }
                Ok(None) => self.wait(PollFlags::OUT, deadline),
                Err(error) => Err(self.lost(error)),
            };
            if let Err(error) = result {
                if started || !error.is_timeout() {
                    self.broken = Some(error.clone());
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Appends bytes to `buf` until it is `len` long.
    fn recv_exact(&mut self, buf: &mut Vec<u8>, len: usize, deadline: Instant) -> Result<(), BulkError> {
        buf.reserve_exact(len.saturating_sub(buf.len()));
        while buf.len() < len {
            let missing = len - buf.len();
            let spare = &mut buf.spare_capacity_mut()[..missing];
            match rustix::net::recv(&self.shared.fd, spare, rustix::net::RecvFlags::DONTWAIT) {
                Ok(((received, _), _)) if !received.is_empty() => {
                    let received = received.len();
                    self.progress.fetch_add(received as u64, Ordering::Relaxed);
                    // SAFETY: recv initialised the first `received` bytes of the spare capacity.
                    unsafe { buf.set_len(buf.len() + received) };
                }
                Ok(_) => {
                    self.check()?;
                    return Err(BulkError::PeerLost("it closed the connection".to_owned()));
                }
                Err(Errno::AGAIN | Errno::INTR) => self.wait(PollFlags::IN, deadline)?,
                Err(error) => return Err(self.lost(error)),
            }
        }
        Ok(())
    }

    fn read_welcome(&mut self, deadline: Instant) -> Result<(), BulkError> {
        let mut bytes = Vec::with_capacity(MAX_ANSWER_BYTES);
        loop {
            // Exactly the answer: the peer's first message may be right behind it.
            let wanted = bytes.len() + Answer::missing_bytes(&bytes);
            self.recv_exact(&mut bytes, wanted, deadline)?;
            match Answer::parse(&bytes) {
                Ok(None) => {}
                Ok(Some((Answer::Welcome { .. }, _))) => return Ok(()),
                Ok(Some((Answer::Refused(refusal), _))) => return Err(BulkError::Refused(refusal)),
                Err(error) => return Err(BulkError::Protocol(error.to_string())),
            }
        }
    }

    /// Waits until the socket is ready or has failed.
    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<(), BulkError> {
        self.check()?;
        let ready = wait_for(self.shared.fd.as_fd(), flags, deadline);
        self.check()?;
        if ready { Ok(()) } else { Err(BulkError::Timeout) }
    }

    fn lost(&self, error: Errno) -> BulkError {
        if self.shared.cancelled.load(Ordering::Acquire) {
            return BulkError::Cancelled;
        }
        BulkError::PeerLost(std::io::Error::from(error).to_string())
    }
}

/// Waits until `fd` is readable; `false` at the deadline.
pub(super) fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> bool {
    wait_for(fd, PollFlags::IN, deadline)
}

fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if poll_once(fd, flags, left) {
            return true;
        }
        if left.is_zero() {
            return false;
        }
    }
}

fn poll_once(fd: BorrowedFd<'_>, flags: PollFlags, left: Duration) -> bool {
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
    let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
    match rustix::event::poll(&mut fds, Some(&timeout)) {
        Ok(ready) => ready > 0,
        Err(Errno::INTR) => false,
        // Out of kernel memory; the caller tries the socket and comes back.
        Err(_) => true,
    }
}
