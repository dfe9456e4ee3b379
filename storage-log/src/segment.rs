//! A segment's header (its block 0), and what is known of a segment while the log runs.
//!
//! A log never writes behind what an earlier life of it wrote: each opening begins a new segment. The header of a
//! segment says how the one before it ended, so that bytes which are missing there are noticed, and which the oldest
//! one is that must exist, so that a whole segment that is missing is noticed too.

use crate::block::{Block, DATA_BYTES, SegmentId, Trailer, array, seal};
use crate::record::Chain;

const MAGIC: [u8; 8] = *b"PLVRLOG2";
const HEADER_BYTES: usize = 68;
const FLAG_DOUBT: u32 = 1;

/// Segment `number` of a log. The first is 1.
pub(crate) type SegmentNumber = u64;

/// The places of a mirror's copies as bits: bit 0 is the first configured place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Members(pub u32);

impl Members {
    pub fn contains(self, leg: usize) -> bool {
        self.0 >> leg & 1 != 0
    }

    pub fn insert(&mut self, leg: usize) {
        self.0 |= 1 << leg;
    }
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub id: SegmentId,
    /// Drawn when the log was made: copies of different logs are never mixed.
    pub log_id: u64,
    /// Counts openings and changes of `members`; of two segments with one number the higher epoch is right.
    pub epoch: u64,
    /// The copies that hold everything acknowledged.
    pub members: Members,
    /// Blocks of this segment.
    pub blocks: u32,
    /// The generation of the segment before, and the blocks of it that count.
    pub previous_generation: u64,
    pub previous_blocks: u32,
    /// The chain at the end of the segment before.
    pub chain: Chain,
    /// The oldest segment that holds something needed.
    pub first: SegmentNumber,
    /// When the log was opened its end was in doubt, and no state was written since.
    pub doubt: bool,
}

impl Header {
    /// Writes the header as block 0, the beginning of a group of `group_blocks`.
    pub fn seal_into(&self, block: &mut Block, group_blocks: u32) {
        block[0..8].copy_from_slice(&MAGIC);
        block[8..16].copy_from_slice(&self.log_id.to_le_bytes());
        block[16..24].copy_from_slice(&self.epoch.to_le_bytes());
        block[24..28].copy_from_slice(&self.members.0.to_le_bytes());
        block[28..32].copy_from_slice(&self.blocks.to_le_bytes());
        block[32..40].copy_from_slice(&self.previous_generation.to_le_bytes());
        block[40..44].copy_from_slice(&self.previous_blocks.to_le_bytes());
        block[44..48].copy_from_slice(&self.chain.0.to_le_bytes());
        block[48..56].copy_from_slice(&self.first.to_le_bytes());
        block[56..60].copy_from_slice(&(if self.doubt { FLAG_DOUBT } else { 0 }).to_le_bytes());
        block[60..HEADER_BYTES].fill(0);
        let trailer = Trailer { segment: self.id, group_start: 0, group_blocks, used: HEADER_BYTES as u16 };
        seal(block, trailer, 0);
    }

    /// The header in a whole block 0.
    pub fn read(block: &Block, trailer: Trailer) -> Option<Header> {
        let flags = u32::from_le_bytes(array(&block[56..60]));
        let is_header = block[0..8] == MAGIC && usize::from(trailer.used) == HEADER_BYTES && flags <= FLAG_DOUBT;
        let header = is_header.then(|| Header {
            id: trailer.segment,
            log_id: u64::from_le_bytes(array(&block[8..16])),
            epoch: u64::from_le_bytes(array(&block[16..24])),
            members: Members(u32::from_le_bytes(array(&block[24..28]))),
            blocks: u32::from_le_bytes(array(&block[28..32])),
            previous_generation: u64::from_le_bytes(array(&block[32..40])),
            previous_blocks: u32::from_le_bytes(array(&block[40..44])),
            chain: Chain(u32::from_le_bytes(array(&block[44..48]))),
            first: u64::from_le_bytes(array(&block[48..56])),
            doubt: flags & FLAG_DOUBT != 0,
        });
        header.filter(Header::is_plausible)
    }

    /// Whether its numbers can be those of a log, which counts on from them.
    fn is_plausible(&self) -> bool {
        const MOST: u64 = 1 << 62;
        (1..=self.id.number).contains(&self.first) && self.id.number <= MOST && self.epoch <= MOST && self.blocks >= 2
    }
}

const _: () = assert!(HEADER_BYTES <= DATA_BYTES);

/// What the log knows of a segment that it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentInfo {
    pub id: SegmentId,
    /// Blocks written or staged.
    pub blocks: u32,
    /// The last of its entries that no later record has superseded, if any is left.
    pub last_index: Option<u64>,
}

impl SegmentInfo {
    pub fn new(id: SegmentId) -> SegmentInfo {
        SegmentInfo { id, blocks: 1, last_index: None }
    }
}

/// Notes that entry `index` goes into the last of `segments`.
pub(crate) fn note_entry<'a>(segments: impl DoubleEndedIterator<Item = &'a mut SegmentInfo>, index: u64) {
    let mut segments = segments.rev();
    if let Some(present) = segments.next() {
        present.last_index = Some(index);
    }
    for older in segments {
        // Later segments hold higher indexes, so that beyond the first one that is not superseded none is.
        match older.last_index {
            Some(last) if last >= index => older.last_index = index.checked_sub(1),
            Some(_) => break,
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{BLOCK_BYTES, Content, examine};

    #[test]
    fn a_header_comes_back() {
        let header = Header {
            id: SegmentId { number: 9, generation: 4 },
            log_id: 1,
            epoch: 2,
            members: Members(3),
            blocks: 16,
            previous_generation: 8,
            previous_blocks: 5,
            chain: Chain(77),
            first: 6,
            doubt: true,
        };
        let mut block = [0xAA; BLOCK_BYTES];
        header.seal_into(&mut block, 2);
        let Content::Whole(trailer) = examine(&block, 0) else { panic!("not whole") };
        assert_eq!(Header::read(&block, trailer), Some(header));
        block[0] ^= 1;
        assert_eq!(Header::read(&block, trailer), None);
    }

    #[test]
    fn superseded_entries_no_longer_hold_their_segment() {
        let id = |number| SegmentId { number, generation: 0 };
        let mut segments: Vec<SegmentInfo> = (1..=3).map(|number| SegmentInfo::new(id(number))).collect();
        for (count, index) in [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5)] {
            note_entry(segments[..count].iter_mut(), index);
        }
        let last = |segments: &[SegmentInfo]| segments.iter().map(|segment| segment.last_index).collect::<Vec<_>>();
        assert_eq!(last(&segments), [Some(2), Some(4), Some(5)]);
        note_entry(segments.iter_mut(), 2);
        assert_eq!(last(&segments), [Some(1), Some(1), Some(2)]);
        note_entry(segments.iter_mut(), 0);
        assert_eq!(last(&segments), [None, None, Some(0)]);
    }
}
