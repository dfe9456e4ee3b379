//! The records of an encrypted connection.
//!
//! A record is `u16` length (little-endian) and one Noise message: up to 65 519 bytes of the stream and a tag of 16.
//! A record that was changed, left out, doubled or moved does not open, and ends the connection. Both sides change
//! to a derived key after each 2^20 records, so no key encrypts more than 64 GiB.

use snow::TransportState;

const HEADER_BYTES: usize = 2;
const TAG_BYTES: usize = 16;
const MAX_RECORD_BYTES: usize = u16::MAX as usize;
/// Bytes of the stream in one record.
pub(in crate::fabric) const MAX_PLAIN_BYTES: usize = MAX_RECORD_BYTES - TAG_BYTES;
/// Records under one key.
const REKEY_RECORDS: u64 = 1 << 20;
/// Received bytes: four whole records, so that a read is worth its call.
const INBOUND_BYTES: usize = 4 * (HEADER_BYTES + MAX_RECORD_BYTES);

/// What came does not belong to this connection: it was changed, replayed, or never encrypted with its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bytes came that the peer did not encrypt; the connection was tampered with, or its data was damaged")]
pub(in crate::fabric) struct Forged;

/// What `plain` bytes become: the most that [`Cipher::seal`] appends for them.
pub(in crate::fabric) const fn sealed_bytes(plain: usize) -> usize {
    plain + plain.div_ceil(MAX_PLAIN_BYTES) * (HEADER_BYTES + TAG_BYTES)
}

/// The keys of an established connection, both directions.
pub(in crate::fabric) struct Cipher {
    noise: TransportState,
    /// Where the parts of a message come together.
    scratch: Box<[u8]>,
}

impl Cipher {
    pub(super) fn new(noise: TransportState) -> Cipher {
        Cipher { noise, scratch: vec![0; MAX_PLAIN_BYTES].into() }
    }

    /// Appends the concatenation of `parts` as records.
    pub fn seal<'p>(&mut self, parts: impl IntoIterator<Item = &'p [u8]>, out: &mut Vec<u8>) {
        let mut parts = Parts::new(parts.into_iter());
        loop {
            let plain = parts.next_chunk(&mut self.scratch);
            if plain.is_empty() {
                return;
            }
            let at = out.len();
            out.resize(at + sealed_bytes(plain.len()), 0);
            seal_record(&mut self.noise, plain, &mut out[at..]);
        }
    }

    /// Writes the next record to the start of `out` and returns its length; 0 after the last one.
    ///
    /// # Panics
    /// If `out` is shorter than the record.
    pub fn seal_next<'p, I: Iterator<Item = &'p [u8]>>(&mut self, parts: &mut Parts<'p, I>, out: &mut [u8]) -> usize {
        match parts.next_chunk(&mut self.scratch) {
            [] => 0,
            plain => seal_record(&mut self.noise, plain, out),
        }
    }

    /// Opens one Noise message into `out` and returns the length. No room for the tag costs an allocation.
    ///
    /// # Errors
    /// The message is not the one that the peer sent next.
    pub(super) fn open(&mut self, message: &[u8], out: &mut [u8]) -> Result<usize, Forged> {
        if self.noise.receiving_nonce() % REKEY_RECORDS == REKEY_RECORDS - 1 {
            self.noise.rekey_incoming();
        }
        match self.noise.read_message(message, out) {
            // No peer of ours sends a record without bytes, and a stream of these would be work without progress.
            Ok(0) | Err(_) => Err(Forged),
            Ok(bytes) => Ok(bytes),
        }
    }
}

/// Shows no keys.
impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cipher").finish_non_exhaustive()
    }
}

fn seal_record(noise: &mut TransportState, plain: &[u8], out: &mut [u8]) -> usize {
    if noise.sending_nonce() % REKEY_RECORDS == REKEY_RECORDS - 1 {
        noise.rekey_outgoing();
    }
    let (header, record) = out.split_at_mut(HEADER_BYTES);
    // 2^64 records are not sent within the life of any machine.
    let bytes = noise.write_message(plain, record).expect("a record fits, and nonces do not run out");
    header.copy_from_slice(&u16::try_from(bytes).expect("a record is no longer").to_le_bytes());
    HEADER_BYTES + bytes
}

/// The parts of a message, cut into records.
pub(in crate::fabric) struct Parts<'p, I> {
    /// What is left of the part under way.
    part: &'p [u8],
    rest: I,
}

impl<'p, I: Iterator<Item = &'p [u8]>> Parts<'p, I> {
    pub fn new(parts: I) -> Parts<'p, I> {
        Parts { part: &[], rest: parts }
    }

    /// The next record's bytes, in `scratch` unless one part has them all; empty at the end.
    fn next_chunk<'c>(&mut self, scratch: &'c mut [u8]) -> &'c [u8]
    where
        'p: 'c,
    {
        let mut filled = 0;
        loop {
            if filled == 0 && self.part.len() >= MAX_PLAIN_BYTES {
                let (chunk, left) = self.part.split_at(MAX_PLAIN_BYTES);
                self.part = left;
                return chunk;
            }
            let take = self.part.len().min(MAX_PLAIN_BYTES - filled);
            let (now, left) = self.part.split_at(take);
            scratch[filled..filled + take].copy_from_slice(now);
            (self.part, filled) = (left, filled + take);
            if filled == MAX_PLAIN_BYTES {
                return scratch;
            }
            let Some(part) = self.rest.next() else {
                return &scratch[..filled];
            };
            self.part = part;
        }
    }
}

/// Received bytes and the records in them.
#[derive(Debug)]
pub(in crate::fabric) struct Records {
    bytes: Box<[u8]>,
    /// What is here is `bytes[start..end]`.
    start: usize,
    end: usize,
}

impl Records {
    /// With the bytes that came behind the greeting.
    ///
    /// # Panics
    /// If these are more than a few records.
    pub fn new(early: &[u8]) -> Records {
        let mut bytes = vec![0; INBOUND_BYTES].into_boxed_slice();
        bytes[..early.len()].copy_from_slice(early);
        Records { bytes, start: 0, end: early.len() }
    }

    /// Where to receive; never empty once [`whole`](Self::whole) finds no record.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.bytes.len() - self.start < HEADER_BYTES + MAX_RECORD_BYTES {
            // The record under way would not fit behind; it is all that can be here.
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    /// `bytes` were received into the room.
    pub fn received(&mut self, bytes: usize) {
        self.end += bytes;
        assert!(self.end <= self.bytes.len(), "more was received than there was room for");
    }

    /// The length of the first message, with its tag, once it is here as a whole.
    pub fn whole(&self) -> Option<usize> {
        let (header, message) = self.bytes[self.start..self.end].split_first_chunk::<HEADER_BYTES>()?;
        let bytes = usize::from(u16::from_le_bytes(*header));
        (message.len() >= bytes).then_some(bytes)
    }

    /// Opens the first message into `out`, which should be as long as the message with its tag, and returns
    /// how many bytes of the stream it brought.
    ///
    /// # Errors
    /// It is not what the peer sent next.
    ///
    /// # Panics
    /// If there is no whole record.
    pub fn open(&mut self, cipher: &mut Cipher, out: &mut [u8]) -> Result<usize, Forged> {
        let bytes = self.whole().expect("the caller has seen a whole record");
        let from = self.start + HEADER_BYTES;
        let plain = cipher.open(&self.bytes[from..from + bytes], out)?;
        self.start = from + bytes;
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::fuzz::ciphers;
    use proptest::prelude::*;

    /// Puts all of `wire` through `records`, cut into pieces of `piece` bytes.
    fn open_all(cipher: &mut Cipher, wire: &[u8], piece: usize) -> Result<Vec<u8>, Forged> {
        let (mut records, mut stream, mut wire) = (Records::new(&[]), Vec::new(), wire);
        while !wire.is_empty() {
            let room = records.room();
            assert!(!room.is_empty());
            let take = piece.min(room.len()).min(wire.len());
            room[..take].copy_from_slice(&wire[..take]);
            records.received(take);
            wire = &wire[take..];
            while let Some(bytes) = records.whole() {
                let at = stream.len();
                stream.resize(at + bytes, 0);
                let plain = records.open(cipher, &mut stream[at..])?;
                stream.truncate(at + plain);
            }
        }
        Ok(stream)
    }

    #[test]
    fn keys_change_on_both_sides_at_the_same_record() {
        let (mut near, mut far) = ciphers();
        let (mut record, mut plain) = (Vec::new(), [0; 32]);
        for number in 0..REKEY_RECORDS + 5 {
            record.clear();
            near.seal([&number.to_le_bytes()[..]], &mut record);
            assert_eq!(far.open(&record[HEADER_BYTES..], &mut plain), Ok(8), "record {number}");
            assert_eq!(plain[..8], number.to_le_bytes());
        }
    }

    #[test]
    fn an_empty_record_is_no_progress_and_refused() {
        let (mut near, mut far) = ciphers();
        let mut message = [0; TAG_BYTES];
        near.noise.write_message(&[], &mut message).unwrap();
        assert_eq!(far.open(&message, &mut [0; 32]), Err(Forged));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        #[test]
        fn a_stream_survives_any_cut(
            lens in prop::collection::vec(prop_oneof![0usize..300, 65_000..66_000usize, 131_000..132_000usize], 1..6),
            piece in prop_oneof![1usize..100, 10_000..300_000usize],
        ) {
            let (mut near, mut far) = ciphers();
            let parts: Vec<Vec<u8>> = lens.iter().map(|&len| (0..len).map(|at| (at * 7 + len) as u8).collect()).collect();
            let mut wire = Vec::new();
            near.seal(parts.iter().map(Vec::as_slice), &mut wire);
            let plain = parts.concat();
            prop_assert_eq!(wire.len(), sealed_bytes(plain.len()));
            prop_assert!(open_all(&mut far, &wire, piece) == Ok(plain));
        }

        #[test]
        fn a_changed_bit_is_noticed(at in any::<prop::sample::Index>(), bit in 0..8) {
            let (mut near, mut far) = ciphers();
            let mut wire = Vec::new();
            near.seal([&[7; 500][..]], &mut wire);
            let at = at.index(wire.len());
            wire[at] ^= 1u8 << bit;
            // A length that grew waits for more.
            let opened = open_all(&mut far, &wire, 100);
            prop_assert!(opened == Err(Forged) || at < HEADER_BYTES && opened == Ok(Vec::new()));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            crate::fabric::fuzz::frames(&bytes);
        }
    }
}
