//! One established control connection: buffers, records when it is encrypted, and nothing about who is at the other
//! end. The messages in the stream are those of [`frames`](super::frames).

use super::frames::{Frames, LENGTH_BYTES};
use super::secure::{Cipher, Records, sealed_bytes};
use super::{LostReason, MAX_CONTROL_MESSAGE_BYTES, SendError, socket};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io::IoSlice;
use std::net::SocketAddr;

/// Parts of a message that one system call takes, the length included.
const MAX_SLICES: usize = 8;
/// With less room than this no read is worth its call.
const MIN_READ_BYTES: usize = 32 << 10;
/// Reads per pump, so that one flooding peer cannot keep the reactor.
const MAX_READS: usize = 16;

/// A connected, greeted socket.
#[derive(Debug)]
pub(super) struct Connection {
    fd: OwnedFd,
    pub instance: u64,
    /// Absent in the clear.
    secure: Option<Secure>,
    frames: Frames,
    /// Unsent bytes are `output[sent..]`.
    output: Vec<u8>,
    sent: usize,
    /// Set by a failed write or by `break_off`; the next pump reports it.
    broken: Option<LostReason>,
    wrote_since_pump: bool,
    pub last_heard_us: u64,
    pub last_sent_us: u64,
}

/// What lies between the socket and the messages.
#[derive(Debug)]
struct Secure {
    cipher: Box<Cipher>,
    records: Records,
}

impl Connection {
    /// Takes over a socket after the greeting; `early` are bytes that came right behind it.
    pub fn new(fd: OwnedFd, cipher: Option<Box<Cipher>>, instance: u64, early: &[u8], now_us: u64) -> Connection {
        let in_the_clear = if cipher.is_none() { early } else { &[] };
        Connection {
            fd,
            instance,
            frames: Frames::new(in_the_clear),
            secure: cipher.map(|cipher| Secure { cipher, records: Records::new(early) }),
            output: Vec::new(),
            sent: 0,
            broken: None,
            wrote_since_pump: false,
            last_heard_us: now_us,
            last_sent_us: now_us,
        }
    }

    /// Where the peer is, while there is a connection.
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        let addr = rustix::net::getpeername(&self.fd).ok().flatten();
        addr.and_then(|addr| SocketAddr::try_from(addr).ok())
    }

    /// Bytes that wait for the socket.
    pub fn queued_bytes(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Whether the next pump will report the end.
    pub fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Makes the next pump report `reason`. The first reason stays.
    pub fn break_off(&mut self, reason: LostReason) {
        self.broken.get_or_insert(reason);
    }

    /// Sends a message or queues what does not fit now, up to `max_queued_bytes`.
    pub fn send(&mut self, parts: &[&[u8]], max_queued_bytes: usize) -> Result<(), SendError> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        if bytes == 0 || bytes > MAX_CONTROL_MESSAGE_BYTES {
            return Err(SendError::BadLength { bytes });
        }
        if self.is_broken() {
            return Err(SendError::NotConnected);
        }
        let queued = self.queued_bytes();
        let stream_bytes = LENGTH_BYTES + bytes;
        let wire_bytes = if self.secure.is_some() { sealed_bytes(stream_bytes) } else { stream_bytes };
        if queued > 0 && queued + wire_bytes > max_queued_bytes {
            return Err(SendError::Full);
        }
        let length = u32::try_from(bytes).expect("bounded above").to_le_bytes();
        match &mut self.secure {
            Some(secure) => {
                let parts = std::iter::once(&length[..]).chain(parts.iter().copied());
                secure.cipher.seal(parts, &mut self.output);
                if queued == 0 {
                    self.flush();
                }
                Ok(())
            }
            None => self.send_in_the_clear(&length, parts),
        }
    }

    /// Spares the copy into the queue when the socket takes the message at once.
    fn send_in_the_clear(&mut self, length: &[u8], parts: &[&[u8]]) -> Result<(), SendError> {
        let queued = self.queued_bytes();
        let mut skip = 0;
        if queued == 0 && parts.len() < MAX_SLICES {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            slices[0] = IoSlice::new(length);
            for (slice, part) in slices[1..].iter_mut().zip(parts) {
                *slice = IoSlice::new(part);
            }
            skip = self.write(|fd| socket::send(fd, &slices[..=parts.len()]))?;
        }
        for part in std::iter::once(length).chain(parts.iter().copied()) {
            let done = skip.min(part.len());
            self.output.extend_from_slice(&part[done..]);
            skip -= done;
        }
        if queued == 0 && parts.len() >= MAX_SLICES {
            self.flush();
        }
        Ok(())
    }

    /// Writes a ping, unless bytes are queued anyway.
    pub fn ping(&mut self) {
        if self.queued_bytes() > 0 {
            return;
        }
        let zero = [0; LENGTH_BYTES];
        match &mut self.secure {
            Some(secure) => secure.cipher.seal([&zero[..]], &mut self.output),
            None => self.output.extend_from_slice(&zero),
        }
        // A failure shows up in the next pump.
        self.flush();
    }

    /// Flushes, reads and hands out whole messages.
    ///
    /// # Errors
    /// The connection has ended. Every message that came before the end was handed out.
    pub fn pump(&mut self, now_us: u64, deliver: &mut dyn FnMut(&[u8])) -> Result<(), LostReason> {
        if self.broken == Some(LostReason::Disconnected) {
            return Err(LostReason::Disconnected);
        }
        self.flush();
        if std::mem::take(&mut self.wrote_since_pump) {
            self.last_sent_us = now_us;
        }
        // What came right behind the greeting.
        self.take_in(0, deliver)?;
        for _ in 0..MAX_READS {
            let room = match &mut self.secure {
                Some(secure) => secure.records.room(),
                None => self.frames.room(MIN_READ_BYTES),
            };
            let room_bytes = room.len();
            match socket::recv(&self.fd, room) {
                Ok(None) => break,
                Ok(Some(0)) => return Err(self.broken.take().unwrap_or(LostReason::Closed)),
                Ok(Some(received)) => {
                    self.last_heard_us = now_us;
                    self.take_in(received, deliver)?;
                    if received < room_bytes {
                        break;
                    }
                }
                Err(error) => return Err(LostReason::Io(std::io::Error::from(error).to_string())),
            }
        }
        self.broken.take().map_or(Ok(()), Err)
    }

    /// Hands out the messages that are whole with the `received` bytes in the room.
    fn take_in(&mut self, received: usize, deliver: &mut dyn FnMut(&[u8])) -> Result<(), LostReason> {
        let Some(Secure { cipher, records }) = &mut self.secure else {
            self.frames.received(received);
            return self.frames.hand_out(deliver);
        };
        records.received(received);
        while let Some(bytes) = records.whole() {
            let opened = records.open(cipher, self.frames.room(bytes));
            self.frames.received(opened.map_err(|forged| LostReason::Forged(forged.to_string()))?);
            self.frames.hand_out(deliver)?;
        }
        Ok(())
    }

    fn flush(&mut self) {
        while self.queued_bytes() > 0 && !self.is_broken() {
            let output = std::mem::take(&mut self.output);
            let unsent = [IoSlice::new(&output[self.sent..])];
            let written = self.write(|fd| socket::send(fd, &unsent));
            self.output = output;
            match written {
                Ok(0) | Err(_) => break,
                Ok(written) => self.sent += written,
            }
        }
        if self.queued_bytes() == 0 {
            self.output.clear();
            self.sent = 0;
        } else if self.sent > self.output.len() / 2 {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// One write; 0 if nothing fits. An error breaks the connection.
    fn write(
        &mut self,
        write: impl FnOnce(BorrowedFd<'_>) -> Result<Option<usize>, rustix::io::Errno>,
    ) -> Result<usize, SendError> {
        match write(self.fd.as_fd()) {
            Ok(written) => {
                self.wrote_since_pump |= written.is_some();
                Ok(written.unwrap_or(0))
            }
            Err(error) => {
                self.break_off(LostReason::Io(std::io::Error::from(error).to_string()));
                Err(SendError::NotConnected)
            }
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
