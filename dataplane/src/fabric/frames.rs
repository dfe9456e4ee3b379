//! The messages in the byte stream of a control connection.
//!
//! A message is `u32` length (little-endian) and the bytes. Length 0 is a ping: it says that the
//! sender's reactor runs, and is not delivered.

use super::{LostReason, MAX_CONTROL_MESSAGE_BYTES};

pub(super) const LENGTH_BYTES: usize = 4;
/// The buffer at first; it grows to the largest message seen.
const INITIAL_BUFFER_BYTES: usize = 128 << 10;

/// What came of the stream and was not handed out yet.
#[derive(Debug)]
pub(super) struct Frames {
    bytes: Vec<u8>,
    /// What is here is `bytes[start..end]`.
    start: usize,
    end: usize,
}

impl Frames {
    pub fn new(early: &[u8]) -> Frames {
        let mut bytes = vec![0; INITIAL_BUFFER_BYTES.max(early.len())];
        bytes[..early.len()].copy_from_slice(early);
        Frames { bytes, start: 0, end: early.len() }
    }

    /// Where the stream goes on: at least `least` bytes, and the message under way fits.
    pub fn room(&mut self, least: usize) -> &mut [u8] {
        // `hand_out` has refused oversize, so a peer can make us hold one message at most.
        let need = self.announced().map_or(0, |length| LENGTH_BYTES + length);
        let room_behind = self.bytes.len() - self.end;
        if self.start > 0 && (room_behind < least || self.start + need > self.bytes.len()) {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let wanted = need.max(self.end - self.start + least);
        if self.start + wanted > self.bytes.len() {
            self.bytes.resize((self.start + wanted).next_power_of_two(), 0);
        }
        &mut self.bytes[self.end..]
    }

    /// `bytes` more are in the room.
    pub fn received(&mut self, bytes: usize) {
        self.end += bytes;
        assert!(self.end <= self.bytes.len(), "more was received than there was room for");
    }

    /// Hands out every whole message.
    ///
    /// # Errors
    /// A message that is too long was announced.
    pub fn hand_out(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<(), LostReason> {
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
                deliver(&self.bytes[from..from + length]);
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
        let length = self.bytes[self.start..self.end].first_chunk::<LENGTH_BYTES>()?;
        Some(u32::from_le_bytes(*length) as usize)
    }
}
