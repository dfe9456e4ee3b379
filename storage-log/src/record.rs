//! Records: what the byte stream of a segment consists of.
//!
//! `crc u32, length u32, kind u32, index u64, view u64, payload`, all little-endian, one behind the other without
//! padding; blocks cut the stream wherever they end. The crc covers the rest of the record and is seeded with the crc of
//! the record before it, across segments. So a record counts only behind the very records that it was written behind:
//! none can be left out, exchanged or taken over from an earlier use of the same blocks.

use crate::block::{array, crc32c};

/// The longest payload of a record, bytes.
pub const MAX_RECORD_BYTES: usize = 8 << 20;

pub(crate) const RECORD_HEADER_BYTES: usize = 28;

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    State = 1,
    Entry = 2,
    /// The entries up to `index` are forgotten.
    Truncate = 3,
    /// The state again, at the beginning of a segment: not news, and no proof that anybody wrote since the log was opened.
    StateCopy = 4,
    /// The log begins with segment `index` from here on: those below are needless, also if no further segment can begin.
    Begin = 5,
}

/// The crc of the last record: what the next one is seeded with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Chain(pub u32);

/// The head of a record whose payload is `parts`, and the chain behind it.
pub(crate) fn head(
    chain: Chain,
    kind: Kind,
    (index, view): (u64, u64),
    parts: &[&[u8]],
) -> ([u8; RECORD_HEADER_BYTES], Chain) {
    let payload_bytes: usize = parts.iter().map(|part| part.len()).sum();
    let mut head = [0; RECORD_HEADER_BYTES];
    head[4..8].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
    head[8..12].copy_from_slice(&(kind as u32).to_le_bytes());
    head[12..20].copy_from_slice(&index.to_le_bytes());
    head[20..28].copy_from_slice(&view.to_le_bytes());
    let seed = chain.0.to_le_bytes();
    let crc = crc32c([&seed, &head[4..]].into_iter().chain(parts.iter().copied()));
    head[0..4].copy_from_slice(&crc.to_le_bytes());
    (head, Chain(crc))
}

/// A record found in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found<'a> {
    pub kind: Kind,
    pub index: u64,
    pub view: u64,
    pub payload: &'a [u8],
    /// What the next record is seeded with.
    pub chain: Chain,
}

impl Found<'_> {
    /// Bytes of the record in the stream.
    pub fn size(&self) -> usize {
        RECORD_HEADER_BYTES + self.payload.len()
    }
}

/// Why no record stands where one should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// The stream ends before the record does.
    CutOff,
    /// The bytes are not a record that was written here.
    Wrong(&'static str),
}

/// The record at the beginning of `stream`, behind a record with crc `chain`.
///
/// # Errors
/// A [`Flaw`].
pub(crate) fn find(stream: &[u8], chain: Chain) -> Result<Found<'_>, Flaw> {
    let head = stream.first_chunk::<RECORD_HEADER_BYTES>().ok_or(Flaw::CutOff)?;
    let len = u32::from_le_bytes(array(&head[4..8])) as usize;
    if len > MAX_RECORD_BYTES {
        return Err(Flaw::Wrong("the record's length is impossible"));
    }
    let record = stream.get(..RECORD_HEADER_BYTES + len).ok_or(Flaw::CutOff)?;
    let crc = crc32c([&chain.0.to_le_bytes(), &record[4..]]);
    if crc.to_le_bytes() != head[0..4] {
        return Err(Flaw::Wrong("the record's checksum does not follow from the record before it"));
    }
    let kind = match u32::from_le_bytes(array(&head[8..12])) {
        1 => Kind::State,
        2 => Kind::Entry,
        3 => Kind::Truncate,
        4 => Kind::StateCopy,
        5 => Kind::Begin,
        _ => return Err(Flaw::Wrong("the record's kind is unknown; was it written by a newer version?")),
    };
    Ok(Found {
        kind,
        index: u64::from_le_bytes(array(&head[12..20])),
        view: u64::from_le_bytes(array(&head[20..28])),
        payload: &record[RECORD_HEADER_BYTES..],
        chain: Chain(crc),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(chain: Chain, parts: &[&[u8]]) -> (Vec<u8>, Chain) {
        let (head, chain) = head(chain, Kind::Entry, (7, 2), parts);
        (head.iter().chain(parts.concat().iter()).copied().collect(), chain)
    }

    #[test]
    fn a_record_counts_only_behind_its_predecessor() {
        let (first, after_first) = record(Chain(5), &[b"ab", b"", b"c"]);
        let (second, after_second) = record(after_first, &[b"d"]);
        let found = find(&first, Chain(5)).unwrap();
        assert_eq!((found.kind, found.index, found.view, found.payload), (Kind::Entry, 7, 2, &b"abc"[..]));
        assert_eq!((found.chain, found.size()), (after_first, first.len()));
        assert_eq!(find(&second, after_first).unwrap().chain, after_second);
        assert!(matches!(find(&second, Chain(5)), Err(Flaw::Wrong(_))), "the first is left out");
        assert_eq!(find(&first[..first.len() - 1], Chain(5)), Err(Flaw::CutOff));
        // All zeros are no record, whatever stands before them.
        assert!((0..1000).all(|crc| find(&[0; 64], Chain(crc)).is_err()));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let (bytes, _) = record(Chain(1), &[b"payload"]);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(find(&flipped, Chain(1)).is_err(), "bit {bit}");
        }
    }
}
