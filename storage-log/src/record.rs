//! Bytes of segments and records.
//!
//! A segment file starts with a header (magic 8, number u64, salt u64, crc u32, zero u32). A record is:
//! magic u32, payload length u32, crc u32, kind u32, commit u64, index u64, view u64, payload; all
//! little-endian, no padding. The crc covers header and payload and is seeded with the segment's salt and
//! number and the record's offset, so a record found anywhere but where it was written is not valid.
//! `commit` is the offset in this segment at which the group commit began that wrote the record: the
//! commits before it were synced, which tells damage from a torn write (see recovery).

/// The longest payload of a record, bytes.
pub const MAX_RECORD_BYTES: usize = 64 << 20;

pub(crate) const SEGMENT_HEADER_BYTES: usize = 32;
pub(crate) const RECORD_HEADER_BYTES: usize = 40;
const SEGMENT_MAGIC: [u8; 8] = *b"PLVRLOG1";
const RECORD_MAGIC: [u8; 4] = *b"PLRC";

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    State = 1,
    Entry = 2,
    /// The entries up to `index` are forgotten.
    Truncate = 3,
}

/// Which segment; seeds the crc of its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentId {
    pub number: u64,
    /// Random, so that a file restored under another number or from another log does not match.
    pub salt: u64,
}

impl SegmentId {
    pub fn file_name(self) -> String {
        format!("{:020}.log", self.number)
    }

    pub fn encode_header(self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut header = [0; SEGMENT_HEADER_BYTES];
        header[0..8].copy_from_slice(&SEGMENT_MAGIC);
        header[8..16].copy_from_slice(&self.number.to_le_bytes());
        header[16..24].copy_from_slice(&self.salt.to_le_bytes());
        let crc = crc32c::crc32c(&header[..24]);
        header[24..28].copy_from_slice(&crc.to_le_bytes());
        header
    }

    /// The identity in a segment's first bytes, if they are whole and right.
    pub fn decode_header(bytes: &[u8]) -> Option<SegmentId> {
        let header = bytes.first_chunk::<SEGMENT_HEADER_BYTES>()?;
        let id = SegmentId { number: long(header, 8), salt: long(header, 16) };
        (id.encode_header() == *header).then_some(id)
    }

    fn seed(self, offset: u64) -> u32 {
        let mut seed = [0; 24];
        seed[0..8].copy_from_slice(&self.number.to_le_bytes());
        seed[8..16].copy_from_slice(&self.salt.to_le_bytes());
        seed[16..24].copy_from_slice(&offset.to_le_bytes());
        crc32c::crc32c(&seed)
    }
}

/// The number in a segment's file name.
pub(crate) fn segment_number(file_name: &str) -> Option<u64> {
    let digits = file_name.strip_suffix(".log")?;
    (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?
}

/// A record found in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found<'a> {
    pub kind: Kind,
    pub commit: u64,
    pub index: u64,
    pub view: u64,
    pub payload: &'a [u8],
}

impl Found<'_> {
    /// Bytes of the record in the segment.
    pub fn size(&self) -> usize {
        RECORD_HEADER_BYTES + self.payload.len()
    }
}

/// Writes a record whose place is not known yet into `buffer`, replacing its contents.
pub(crate) fn encode(buffer: &mut Vec<u8>, kind: Kind, index: u64, view: u64, parts: &[&[u8]]) {
    let payload_bytes: usize = parts.iter().map(|part| part.len()).sum();
    assert!(payload_bytes <= MAX_RECORD_BYTES, "a record of {payload_bytes} bytes");
    buffer.clear();
    buffer.reserve(RECORD_HEADER_BYTES + payload_bytes);
    buffer.extend(RECORD_MAGIC);
    buffer.extend((payload_bytes as u32).to_le_bytes());
    buffer.extend([0; 4]);
    buffer.extend((kind as u32).to_le_bytes());
    buffer.extend([0; 8]);
    buffer.extend(index.to_le_bytes());
    buffer.extend(view.to_le_bytes());
    for part in parts {
        buffer.extend_from_slice(part);
    }
}

/// Completes an encoded record for its place: `offset` in `segment`, in the commit that began at
/// `commit`.
pub(crate) fn place(record: &mut [u8], segment: SegmentId, offset: u64, commit: u64) {
    record[16..24].copy_from_slice(&commit.to_le_bytes());
    let crc = checksum(record, segment, offset);
    record[8..12].copy_from_slice(&crc.to_le_bytes());
}

/// The valid record at `offset` of a segment's bytes.
///
/// # Errors
/// What is wrong with it, in words.
pub(crate) fn find(bytes: &[u8], segment: SegmentId, offset: usize) -> Result<Found<'_>, &'static str> {
    let rest = &bytes[offset..];
    let header = rest.first_chunk::<RECORD_HEADER_BYTES>().ok_or("the record's header is cut off")?;
    if header[0..4] != RECORD_MAGIC {
        return Err("no record begins here");
    }
    let len = word(header, 4) as usize;
    if len > MAX_RECORD_BYTES {
        return Err("the record's length is impossible");
    }
    let record = rest.get(..RECORD_HEADER_BYTES + len).ok_or("the record is cut off")?;
    if word(header, 8) != checksum(record, segment, offset as u64) {
        return Err("the record's checksum is wrong");
    }
    let kind = match word(header, 12) {
        1 => Kind::State,
        2 => Kind::Entry,
        3 => Kind::Truncate,
        _ => return Err("the record's kind is unknown; was it written by a newer version?"),
    };
    Ok(Found {
        kind,
        commit: long(header, 16),
        index: long(header, 24),
        view: long(header, 32),
        payload: &record[RECORD_HEADER_BYTES..],
    })
}

/// Whether a record might begin at the start of `bytes`; cheap, for searches.
pub(crate) fn may_begin(bytes: &[u8]) -> bool {
    bytes.starts_with(&RECORD_MAGIC)
}

fn checksum(record: &[u8], segment: SegmentId, offset: u64) -> u32 {
    let crc = crc32c::crc32c_append(segment.seed(offset), &record[..8]);
    crc32c::crc32c_append(crc, &record[12..])
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: SegmentId = SegmentId { number: 3, salt: 99 };

    #[test]
    fn a_record_is_valid_only_in_its_place() {
        let mut record = Vec::new();
        encode(&mut record, Kind::Entry, 7, 2, &[b"ab", b"", b"c"]);
        place(&mut record, SEGMENT, 5, 1);
        let mut bytes = vec![0; 5];
        bytes.extend(&record);
        let found = find(&bytes, SEGMENT, 5).unwrap();
        assert_eq!((found.kind, found.index, found.view, found.commit), (Kind::Entry, 7, 2, 1));
        assert_eq!((found.payload, found.size()), (&b"abc"[..], record.len()));
        assert!(find(&record, SEGMENT, 0).is_err(), "at another offset");
        assert!(find(&bytes, SegmentId { salt: 98, ..SEGMENT }, 5).is_err(), "in another log");
        assert!(find(&bytes, SegmentId { number: 4, ..SEGMENT }, 5).is_err(), "in another segment");
    }

    #[test]
    fn names_and_headers_come_back() {
        assert_eq!(segment_number(&SEGMENT.file_name()), Some(3));
        for other in ["lock", "1.log", "0000000000000000000x.log", "99999999999999999999.log"] {
            assert_eq!(segment_number(other), None, "{other}");
        }
        let header = SEGMENT.encode_header();
        assert_eq!(SegmentId::decode_header(&header), Some(SEGMENT));
        for bit in 0..header.len() * 8 {
            let mut flipped = header;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(SegmentId::decode_header(&flipped), None, "bit {bit}");
        }
    }
}
