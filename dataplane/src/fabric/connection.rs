//! One established control connection: framing, buffers, and nothing about who is at the other end.
//!
//! A message is `u32` length (little-endian) and the bytes. Length 0 is a ping: it says that the
//! sender's reactor runs, and is not delivered.

use super::{LostReason, MAX_CONTROL_MESSAGE_BYTES, SendError, socket};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io::IoSlice;

const LENGTH_BYTES: usize = 4;
/// Parts of a message that one system call takes, the length included.
const MAX_SLICES: usize = 8;
/// The receive buffer at first; it grows to the largest message seen.
const INITIAL_BUFFER_BYTES: usize = 128 << 10;
/// Below this much room the buffer is compacted before the next read.
const MIN_READ_BYTES: usize = 32 << 10;
/// Reads per pump, so that one flooding peer cannot keep the reactor.
const MAX_READS: usize = 16;

/// A connected, greeted socket.
#[derive(Debug)]
pub(super) struct Connection {
    fd: OwnedFd,
    pub instance: u64,
    /// Received bytes are `input[start..end]`.
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Unsent bytes are `output[sent..]`.
    output: Vec<u8>,
    sent: usize,
    /// Set by a failed write or by `break_off`; the next pump reports it.
    broken: Option<LostReason>,
    wrote_since_pump: bool,
    pub last_heard_us: u64,
    pub last_sent_us: u64,
}

impl Connection {
    /// Takes over a socket after the greeting; `early` are bytes that came right behind it.
    pub fn new(fd: OwnedFd, instance: u64, early: &[u8], now_us: u64) -> Connection {
        let mut input = vec![0; INITIAL_BUFFER_BYTES];
        input[..early.len()].copy_from_slice(early);
        Connection {
            fd,
            instance,
            input,
            start: 0,
            end: early.len(),
            output: Vec::new(),
            sent: 0,
            broken: None,
            wrote_since_pump: false,
            last_heard_us: now_us,
            last_sent_us: now_us,
        }
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
        if queued > 0 && queued + LENGTH_BYTES + bytes > max_queued_bytes {
            return Err(SendError::Full);
        }
        let length = u32::try_from(bytes).expect("bounded above").to_le_bytes();
        let mut skip = 0;
        if queued == 0 && parts.len() < MAX_SLICES {
            let mut slices = [IoSlice::new(&[]); MAX_SLICES];
            slices[0] = IoSlice::new(&length);
            for (slice, part) in slices[1..].iter_mut().zip(parts) {
                *slice = IoSlice::new(part);
            }
            skip = self.write(|fd| socket::send(fd, &slices[..=parts.len()]))?;
        }
        for part in std::iter::once(&length[..]).chain(parts.iter().copied()) {
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
        // A failure shows up in the next pump, and a partial write is queued like any other.
        if let Ok(written) = self.write(|fd| socket::send(fd, &[IoSlice::new(&zero)]))
            && written > 0
        {
            self.output.extend_from_slice(&zero[written..]);
        }
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
        self.hand_out(deliver)?;
        for _ in 0..MAX_READS {
            self.make_room();
            let room = self.input.len() - self.end;
            match socket::recv(&self.fd, &mut self.input[self.end..]) {
                Ok(None) => break,
                Ok(Some(0)) => return Err(self.broken.take().unwrap_or(LostReason::Closed)),
                Ok(Some(received)) => {
                    self.last_heard_us = now_us;
                    self.end += received;
                    self.hand_out(deliver)?;
                    if received < room {
                        break;
                    }
                }
                Err(error) => return Err(LostReason::Io(std::io::Error::from(error).to_string())),
            }
        }
        self.broken.take().map_or(Ok(()), Err)
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

    /// Hands out every whole message in the buffer.
    fn hand_out(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<(), LostReason> {
        while let Some(length) = self.announced() {
            if length > MAX_CONTROL_MESSAGE_BYTES {
                return Err(LostReason::Oversize { bytes: length as u64 });
            }
            let from = self.start + LENGTH_BYTES;
            if self.end - from < length {
                break;
            }
            self.start = from + length;
            if length > 0 {
                deliver(&self.input[from..from + length]);
            }
        }
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
        Ok(())
    }

    /// The length of the first message, if its four bytes are here.
    fn announced(&self) -> Option<usize> {
        let length = self.input[self.start..self.end].first_chunk::<LENGTH_BYTES>()?;
        Some(u32::from_le_bytes(*length) as usize)
    }

    /// Sees to it that the message under way fits and that the next read is worth its call.
    fn make_room(&mut self) {
        // `hand_out` has refused oversize, so a peer can make us hold one message at most.
        let need = self.announced().map_or(0, |length| LENGTH_BYTES + length);
        let room_behind = self.input.len() - self.end;
        if self.start > 0 && (room_behind < MIN_READ_BYTES || self.start + need > self.input.len()) {
            self.input.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let wanted = need.max(self.end - self.start + MIN_READ_BYTES);
        if self.start + wanted > self.input.len() {
            self.input.resize((self.start + wanted).next_power_of_two(), 0);
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
