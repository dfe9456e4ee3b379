//! A socket whose calls block until a deadline or a cancellation.

use super::BulkError;
use crate::fabric::socket;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Slices per system call; the kernel's limit is 1024.
const MAX_SLICES: usize = 1024;

/// What a link and its cancel handles share.
#[derive(Debug)]
pub(super) struct Shared {
    fd: OwnedFd,
    cancelled: AtomicBool,
}

impl Shared {
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        // ENOTCONN: the connection has ended by itself; the calls have returned then.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }
}

#[derive(Debug)]
pub(super) struct Stream {
    pub shared: Arc<Shared>,
    /// Bytes moved, both directions.
    pub progress: Arc<AtomicU64>,
}

impl Stream {
    pub fn new(fd: OwnedFd) -> Stream {
        Stream { shared: Arc::new(Shared { fd, cancelled: AtomicBool::new(false) }), progress: Arc::default() }
    }

    /// A connection to `addr`.
    pub fn connect(addr: SocketAddr, deadline: Instant) -> Result<Stream, BulkError> {
        let lost = |error: std::io::Error| BulkError::PeerLost(format!("connecting to {addr}: {error}"));
        let stream = Stream::new(socket::dial(addr, socket::tune_bulk).map_err(lost)?);
        stream.wait_writable(deadline)?;
        match rustix::net::sockopt::socket_error(&stream.shared.fd) {
            Ok(Ok(())) => Ok(stream),
            Ok(Err(error)) | Err(error) => Err(lost(error.into())),
        }
    }

    /// Fails if the link was cancelled.
    pub fn check(&self) -> Result<(), BulkError> {
        if self.shared.cancelled.load(Ordering::Acquire) { Err(BulkError::Cancelled) } else { Ok(()) }
    }

    /// Sends all of it. After an error `started` tells whether a part is out.
    pub fn write_all(
        &self,
        mut slices: &mut [IoSlice<'_>],
        started: &mut bool,
        deadline: Instant,
    ) -> Result<(), BulkError> {
        while slices.iter().any(|slice| !slice.is_empty()) {
            let batch = &slices[..slices.len().min(MAX_SLICES)];
            match socket::send(&self.shared.fd, batch) {
                Ok(Some(sent)) => {
                    self.progress.fetch_add(sent as u64, Ordering::Relaxed);
                    IoSlice::advance_slices(&mut slices, sent);
                    *started = true;
                }
                Ok(None) => self.wait_writable(deadline)?,
                Err(error) => return Err(self.lost(error)),
            }
        }
        Ok(())
    }

    /// Receives at least one byte into `room`, which must not be empty.
    pub fn read(&self, room: &mut [u8], deadline: Instant) -> Result<usize, BulkError> {
        loop {
            match socket::recv(&self.shared.fd, room) {
                Ok(Some(0)) => return Err(self.closed()),
                Ok(Some(received)) => {
                    self.progress.fetch_add(received as u64, Ordering::Relaxed);
                    return Ok(received);
                }
                Ok(None) => self.wait(PollFlags::IN, deadline)?,
                Err(error) => return Err(self.lost(error)),
            }
        }
    }

    /// Appends bytes to `buf` until it is `len` long.
    pub fn read_exact(&self, buf: &mut Vec<u8>, len: usize, deadline: Instant) -> Result<(), BulkError> {
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
                Ok(_) => return Err(self.closed()),
                Err(Errno::AGAIN | Errno::INTR) => self.wait(PollFlags::IN, deadline)?,
                Err(error) => return Err(self.lost(error)),
            }
        }
        Ok(())
    }

    /// Waits until the socket takes bytes or has failed.
    pub fn wait_writable(&self, deadline: Instant) -> Result<(), BulkError> {
        self.wait(PollFlags::OUT, deadline)
    }

    /// Wakes a peer that sleeps in [`wait_bell`](Self::wait_bell).
    pub fn ring_bell(&self) {
        // A full socket is bell enough, and a failed one is noticed by whoever waits for it.
        let _ = socket::send(&self.shared.fd, &[IoSlice::new(&[0])]);
    }

    /// Waits for the bell, for `event` or for the connection's end.
    pub fn wait_bell(&self, event: Option<BorrowedFd<'_>>, deadline: Instant) -> Result<(), BulkError> {
        self.check()?;
        let ready = wait_for_any(&[Some(self.shared.fd.as_fd()), event], deadline);
        self.check()?;
        if ready { Ok(()) } else { Err(BulkError::Timeout) }
    }

    /// Takes what was rung.
    pub fn drain_bell(&self) -> Result<(), BulkError> {
        let mut chunk = [0; 64];
        match socket::recv(&self.shared.fd, &mut chunk) {
            Ok(Some(0)) => Err(self.closed()),
            // What is left wakes once more.
            Ok(_) => Ok(()),
            Err(error) => Err(self.lost(error)),
        }
    }

    /// This end of the connection.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        rustix::net::getsockname(&self.shared.fd).ok().and_then(|addr| SocketAddr::try_from(addr).ok())
    }

    /// The other end.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        let addr = rustix::net::getpeername(&self.shared.fd).ok().flatten();
        addr.and_then(|addr| SocketAddr::try_from(addr).ok())
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<(), BulkError> {
        self.check()?;
        let ready = wait_for(self.shared.fd.as_fd(), flags, deadline);
        self.check()?;
        if ready { Ok(()) } else { Err(BulkError::Timeout) }
    }

    fn closed(&self) -> BulkError {
        let closed = || BulkError::PeerLost("it closed the connection".to_owned());
        self.check().err().unwrap_or_else(closed)
    }

    fn lost(&self, error: Errno) -> BulkError {
        let lost = || BulkError::PeerLost(std::io::Error::from(error).to_string());
        self.check().err().unwrap_or_else(lost)
    }
}

/// Waits until `fd` is readable; `false` at the deadline.
pub(in crate::fabric) fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> bool {
    wait_for(fd, PollFlags::IN, deadline)
}

fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags, deadline: Instant) -> bool {
    poll_until(&mut [PollFd::from_borrowed_fd(fd, flags)], deadline)
}

fn wait_for_any(fds: &[Option<BorrowedFd<'_>>], deadline: Instant) -> bool {
    let fds = fds.iter().flatten();
    let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    poll_until(&mut fds, deadline)
}

/// Waits until one of `fds` is ready or has failed; `false` at the deadline.
fn poll_until(fds: &mut [PollFd<'_>], deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if poll_once(fds, left) {
            return true;
        }
        if left.is_zero() {
            return false;
        }
    }
}

fn poll_once(fds: &mut [PollFd<'_>], left: Duration) -> bool {
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
    match rustix::event::poll(fds, Some(&timeout)) {
        Ok(ready) => ready > 0,
        Err(Errno::INTR) => false,
        // Out of kernel memory; the caller tries the socket and comes back.
        Err(_) => true,
    }
}
