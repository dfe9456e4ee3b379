//! The unit of the disk format: a block of 4096 bytes that says of itself where and when it was written.
//!
//! A segment is a run of blocks. Each block holds 4064 bytes of the segment's byte stream and a trailer of 32 bytes;
//! all numbers are little-endian:
//!
//! ```text
//! 0     stream bytes
//! 4064  segment number u64
//! 4072  generation u64      drawn at random whenever a segment begins
//! 4080  group_start u32     the block at which the group began that wrote this block
//! 4084  group_blocks u32    how many blocks that group has
//! 4088  used u16, flags u16 bytes of the stream that count; flags are 0
//! 4092  crc32c u32          of everything before it and the block's place in the segment
//! ```
//!
//! Because a block verifies itself, a reader can tell *never written* (blank, or a whole block of an earlier
//! generation) from *written and damaged*. That difference decides whether the end of a log is a torn write, which
//! nobody was told about, or may be the loss of something acknowledged (see `recovery`). Rejected: a checksum per
//! record alone. It cannot tell the two apart once segments are used again, and zeroing them first would write
//! everything twice.
//!
//! Blocks are assumed to be written whole or not at all, as drives with 4096-byte sectors do. Where that is not so a
//! torn block counts as damage: the replica then asks its peers, and nothing is lost.

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
const TRAILER_BYTES: usize = 32;
/// Bytes of the stream that a block holds.
pub(crate) const DATA_BYTES: usize = BLOCK_BYTES - TRAILER_BYTES;

/// A block's bytes.
pub(crate) type Block = [u8; BLOCK_BYTES];

/// Which writing of which segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentId {
    pub number: u64,
    pub generation: u64,
}

/// What a block's trailer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub segment: SegmentId,
    pub group_start: u32,
    pub group_blocks: u32,
    pub used: u16,
}

/// What a block is to a reader who knows no more than its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing was ever written here.
    Blank,
    /// Whole, as it was written.
    Whole(Trailer),
    /// Neither.
    Bad,
}

/// Completes a block whose stream bytes are in place: it is number `at` of its segment.
pub(crate) fn seal(block: &mut Block, trailer: Trailer, at: u32) {
    let (data, rest) = block.split_at_mut(DATA_BYTES);
    data[usize::from(trailer.used)..].fill(0);
    rest[0..8].copy_from_slice(&trailer.segment.number.to_le_bytes());
    rest[8..16].copy_from_slice(&trailer.segment.generation.to_le_bytes());
    rest[16..20].copy_from_slice(&trailer.group_start.to_le_bytes());
    rest[20..24].copy_from_slice(&trailer.group_blocks.to_le_bytes());
    rest[24..26].copy_from_slice(&trailer.used.to_le_bytes());
    rest[26..28].fill(0);
    let crc = checksum(block, at);
    block[BLOCK_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
}

/// Reads the block that stands at place `at` of a segment.
pub(crate) fn examine(block: &Block, at: u32) -> Content {
    let rest = &block[DATA_BYTES..];
    let crc = u32::from_le_bytes(array(&rest[28..32]));
    let used = u16::from_le_bytes(array(&rest[24..26]));
    let (start, count) = (u32::from_le_bytes(array(&rest[16..20])), u32::from_le_bytes(array(&rest[20..24])));
    let in_group = start <= at && u64::from(at) < u64::from(start) + u64::from(count);
    if crc == checksum(block, at) && usize::from(used) <= DATA_BYTES && rest[26..28] == [0, 0] && in_group {
        return Content::Whole(Trailer {
            segment: SegmentId {
                number: u64::from_le_bytes(array(&rest[0..8])),
                generation: u64::from_le_bytes(array(&rest[8..16])),
            },
            group_start: start,
            group_blocks: count,
            used,
        });
    }
    if block.iter().all(|&byte| byte == 0) { Content::Blank } else { Content::Bad }
}

/// The part of a block that belongs to the stream.
pub(crate) fn stream(block: &Block, trailer: Trailer) -> &[u8] {
    &block[..usize::from(trailer.used)]
}

/// Not of zero bytes: a blank block must not verify.
fn checksum(block: &Block, at: u32) -> u32 {
    let seed = u64::from(at).wrapping_add(0x504c_5652).to_le_bytes();
    crc32c([&seed, &block[..BLOCK_BYTES - 4]])
}

/// CRC-32C of the parts, one behind the other.
pub(crate) fn crc32c<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    parts.into_iter().for_each(|part| digest.update(part));
    digest.finalize() as u32
}

/// The bytes as an array; the caller gives as many as it asks for.
pub(crate) fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("the slice has the array's length")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(at: u32) -> (Block, Trailer) {
        let mut block = [0xEE; BLOCK_BYTES];
        block[..5].copy_from_slice(b"hello");
        let segment = SegmentId { number: 7, generation: 99 };
        let trailer = Trailer { segment, group_start: at.saturating_sub(1), group_blocks: 3, used: 5 };
        seal(&mut block, trailer, at);
        (block, trailer)
    }

    #[test]
    fn a_block_is_whole_only_in_its_place() {
        let (block, trailer) = sealed(4);
        assert_eq!(examine(&block, 4), Content::Whole(trailer));
        assert_eq!(stream(&block, trailer), b"hello");
        assert_eq!(examine(&block, 5), Content::Bad);
        assert_eq!(examine(&[0; BLOCK_BYTES], 4), Content::Blank);
        assert!((0..64).all(|at| examine(&[0; BLOCK_BYTES], at) == Content::Blank));
    }

    #[test]
    fn every_flipped_bit_makes_it_bad() {
        let (block, _) = sealed(0);
        for bit in 0..BLOCK_BYTES * 8 {
            let mut flipped = block;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(examine(&flipped, 0), Content::Bad, "bit {bit}");
        }
    }
}
