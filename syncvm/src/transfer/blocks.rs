//! Blocks: the level below the page. Of a divergent page usually few cache lines differ, and only those blocks are sent
//! whose digests differ.
//!
//! A digest has 16 bits, so about one block in 65 536 that differ is taken for equal. That costs a page sent whole and
//! never a wrong byte: the follower checks what it put together against the leader's 128-bit page hashes before it
//! acknowledges. Longer digests cost more bytes than the pages that they save; shorter ones cost more pages. The digest is
//! seeded per exchange, so that a pair of blocks that agrees falsely once does not do so for ever.
//!
//! The block size is the follower's choice for each exchange: when it applies a transfer it sees exactly which lines
//! changed, and takes the size that would have been the cheapest. Rejected: a third level (digests of lines within
//! blocks that differ), which saves a few bytes per page for another round trip.
//!
//! A word of a block that is zero costs a bit, like a zero page. It runs at 4.5 GB/s, so it wins on any link. Rejected by time: LZ4
//! (0.5 GB/s for a quarter of the bytes of a Redis guest) and a dictionary of the last 256 words (1.3 GB/s for half) make a
//! syncvm longer unless the link is slower than 2 to 3 Gbit/s.

use xxhash_rust::xxh3::xxh3_64;

use super::{MAX_BODY_BYTES, WireError};
use crate::page::PAGE_BYTES;
use crate::wire::Reader;

/// Bytes of one block's digest.
pub const DIGEST_BYTES: usize = 2;

/// The smallest block: what a CPU writes back at once.
const LINE_BYTES: usize = 64;

/// What costs a bit if it is zero.
const WORD_BYTES: usize = 8;

/// How large a block is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlockSize {
    /// 64 bytes.
    B64,
    /// 128 bytes.
    #[default]
    B128,
    /// 256 bytes.
    B256,
}

impl BlockSize {
    /// Every size, smallest first.
    pub const EVERY: [Self; 3] = [Self::B64, Self::B128, Self::B256];

    /// The size in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::B64 => 64,
            Self::B128 => 128,
            Self::B256 => 256,
        }
    }

    /// Blocks of one page; at most the 64 bits of a bitmap.
    #[must_use]
    pub const fn per_page(self) -> usize {
        PAGE_BYTES / self.bytes()
    }

    /// Bytes of the digests of one page.
    #[must_use]
    pub const fn digests_bytes(self) -> usize {
        self.per_page() * DIGEST_BYTES
    }

    const fn bitmap_bytes(self) -> usize {
        self.per_page() / 8
    }

    const fn lines(self) -> usize {
        self.bytes() / LINE_BYTES
    }

    /// The number that stands for this size on the wire.
    #[must_use]
    pub fn code(self) -> u8 {
        (self.bytes() / LINE_BYTES) as u8
    }

    /// The size behind a number from the wire.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::EVERY.into_iter().find(|size| size.code() == code)
    }
}

fn digest(block: &[u8], seed: u64) -> [u8; DIGEST_BYTES] {
    // Multiply-shift: for distinct 64-bit hashes a universal choice of 16 bits by the seed.
    ((xxh3_64(block).wrapping_mul(seed | 1) >> 48) as u16).to_le_bytes()
}

/// Appends the digests of a page's blocks.
pub fn digest_page(page: &[u8], size: BlockSize, seed: u64, out: &mut Vec<u8>) {
    debug_assert_eq!(page.len(), PAGE_BYTES);
    page.chunks_exact(size.bytes()).for_each(|block| out.extend_from_slice(&digest(block, seed)));
}

/// Which blocks of `page` have other digests than `theirs`: bit n stands for block n.
#[must_use]
pub fn differing_blocks(page: &[u8], theirs: &[u8], size: BlockSize, seed: u64) -> u64 {
    debug_assert_eq!(theirs.len(), size.digests_bytes());
    let pairs = page.chunks_exact(size.bytes()).zip(theirs.chunks_exact(DIGEST_BYTES));
    pairs.enumerate().fold(0, |map, (at, (block, theirs))| map | u64::from(digest(block, seed) != theirs) << at)
}

/// The body of a [`super::Kind::Digests`] message: the block size, then the digests of whole pages.
///
/// # Errors
/// When the bytes are no such body.
pub fn decode_digests(body: &[u8]) -> Result<(BlockSize, std::slice::ChunksExact<'_, u8>), WireError> {
    let mut reader = Reader(body);
    let code = reader.u8("block size")?;
    let size = BlockSize::from_code(code).ok_or(WireError::Value { field: "block size", value: code.into() })?;
    let digests = reader.0.chunks_exact(size.digests_bytes());
    if !digests.remainder().is_empty() {
        return Err(WireError::Trailing(digests.remainder().len()));
    }
    Ok((size, digests))
}

/// How many pages' worth of the blocks in `maps` fit one [`super::Kind::Blocks`] message, and how many blocks those are.
fn fitting(size: BlockSize, maps: &[u64]) -> (usize, usize) {
    let mut room = MAX_BODY_BYTES - 4;
    let mut blocks = 0;
    for (count, map) in maps.iter().enumerate() {
        let wanted = map.count_ones() as usize;
        let bytes = size.bitmap_bytes() + wanted * (size.lines() + size.bytes());
        if bytes > room {
            return (count, blocks);
        }
        room -= bytes;
        blocks += wanted;
    }
    (maps.len(), blocks)
}

/// Puts the words of a line that are not zero into `words`, one after the other, and anything behind them. Returns their bits.
#[inline]
fn pack(line: &[u8], words: &mut [u8; LINE_BYTES]) -> u8 {
    let (mut mask, mut end) = (0, 0);
    for (at, word) in line.chunks_exact(WORD_BYTES).enumerate() {
        // Without a branch: the next word takes the place of one that is zero.
        words[end..end + WORD_BYTES].copy_from_slice(word);
        let kept = word != [0; WORD_BYTES];
        mask |= u8::from(kept) << at;
        end += usize::from(kept) * WORD_BYTES;
    }
    mask
}

/// The bits of the words of a line that are not zero.
fn mask_of(line: &[u8]) -> u8 {
    let words = line.chunks_exact(WORD_BYTES).enumerate();
    words.fold(0, |mask, (at, word)| mask | u8::from(word != [0; WORD_BYTES]) << at)
}

/// How many bytes the words of a mask are.
fn packed_bytes(mask: u8) -> usize {
    mask.count_ones() as usize * WORD_BYTES
}

/// Undoes [`pack`]; `words` begins with the words of this line. Returns the rest.
#[inline]
fn unpack<'a>(mask: u8, mut words: &'a [u8], line: &mut [u8]) -> &'a [u8] {
    for (at, into) in line.chunks_exact_mut(WORD_BYTES).enumerate() {
        if mask >> at & 1 == 0 {
            into.fill(0);
        } else {
            let (word, rest) = words.split_at(WORD_BYTES);
            into.copy_from_slice(word);
            words = rest;
        }
    }
    words
}

/// Puts the next [`super::Kind::Blocks`] message into `body`: bitmaps first, then a mask for each line of the blocks, then their
/// words. `pages` are the pages that `maps` describe. Returns how many pages it covers and how many blocks it holds.
pub(super) fn encode_blocks<'a>(
    size: BlockSize,
    maps: &[u64],
    pages: impl Iterator<Item = &'a [u8]>,
    body: &mut Vec<u8>,
) -> (usize, usize) {
    let (count, blocks) = fitting(size, maps);
    body.clear();
    body.extend_from_slice(&(count as u32).to_le_bytes());
    for map in &maps[..count] {
        body.extend_from_slice(&map.to_le_bytes()[..size.bitmap_bytes()]);
    }
    let mut mask_at = body.len();
    let mut end = mask_at + blocks * size.lines();
    body.resize(end + blocks * size.bytes(), 0);
    for (map, page) in maps[..count].iter().zip(pages) {
        for at in Bits(*map) {
            for line in page[at * size.bytes()..][..size.bytes()].chunks_exact(LINE_BYTES) {
                let words = body[end..].first_chunk_mut().expect("there is room for every line as a whole");
                let mask = pack(line, words);
                body[mask_at] = mask;
                mask_at += 1;
                end += packed_bytes(mask);
            }
        }
    }
    body.truncate(end);
    (count, blocks)
}

/// The positions of the bits that are set.
struct Bits(u64);

impl Iterator for Bits {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let at = self.0.trailing_zeros() as usize;
        (self.0 != 0).then(|| {
            self.0 &= self.0 - 1;
            at
        })
    }
}

/// The decoded body of a [`super::Kind::Blocks`] message.
#[derive(Clone, Copy, Debug)]
pub struct BlocksChunk<'a> {
    size: BlockSize,
    maps: &'a [u8],
    /// One for each line of the blocks.
    masks: &'a [u8],
    words: &'a [u8],
}

impl<'a> BlocksChunk<'a> {
    /// Reads a body whose blocks have this size.
    ///
    /// # Errors
    /// When bitmaps and blocks do not fit each other.
    pub fn decode(body: &'a [u8], size: BlockSize) -> Result<Self, WireError> {
        let mut reader = Reader(body);
        let count = reader.u32("page count")? as usize;
        let maps = reader.take(count.saturating_mul(size.bitmap_bytes()), "block bitmaps")?;
        let blocks: usize = maps.iter().map(|byte| byte.count_ones() as usize).sum();
        let masks = reader.take(blocks * size.lines(), "masks of words")?;
        let words = reader.take(masks.iter().map(|mask| packed_bytes(*mask)).sum(), "words")?;
        reader.end()?;
        Ok(Self { size, maps, masks, words })
    }

    /// How many pages it covers.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.maps.len() / self.size.bitmap_bytes()
    }

    /// How many blocks it holds.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.masks.len() / self.size.lines()
    }

    /// Overwrites the blocks in `pages`, which holds as many pages as [`Self::pages`] says.
    pub(super) fn patch(&self, pages: &mut [u8]) {
        let (mut masks, mut words) = (self.masks.iter(), self.words);
        let maps = self.maps.chunks_exact(self.size.bitmap_bytes());
        for (map, page) in maps.zip(pages.chunks_exact_mut(PAGE_BYTES)) {
            let mut bits = [0; 8];
            bits[..map.len()].copy_from_slice(map);
            for at in Bits(u64::from_le_bytes(bits)) {
                let block = &mut page[at * self.size.bytes()..][..self.size.bytes()];
                for (line, mask) in block.chunks_exact_mut(LINE_BYTES).zip(&mut masks) {
                    words = unpack(*mask, words, line);
                }
            }
        }
    }
}

/// What differed between the old and the new content of the pages of a transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Pages that were compared block by block.
    pub pages: u64,
    /// How many of their blocks differed, for each size of [`BlockSize::EVERY`].
    blocks: [u64; 3],
    /// How many bytes those were with their masks, for each size.
    packed: [u64; 3],
    /// The same for pages that became zero, which need no digests: their blocks of 256 bytes.
    zeroed_blocks: u64,
}

impl Differences {
    /// Adds a page.
    pub fn add(&mut self, old: &[u8], new: &[u8]) {
        self.pages += 1;
        let lines = differing_lines(old, new);
        let mut line_bytes = [0; PAGE_BYTES / LINE_BYTES];
        for first in Bits(merged(lines, BlockSize::B256)) {
            let wide = new[first * LINE_BYTES..][..BlockSize::B256.bytes()].chunks_exact(LINE_BYTES);
            for (bytes, line) in line_bytes[first..].iter_mut().zip(wide) {
                *bytes = 1 + packed_bytes(mask_of(line)) as u64;
            }
        }
        for (at, size) in BlockSize::EVERY.into_iter().enumerate() {
            let map = merged(lines, size);
            self.blocks[at] += u64::from(map.count_ones());
            self.packed[at] += Bits(map).flat_map(|first| &line_bytes[first..][..size.lines()]).sum::<u64>();
        }
    }

    /// Adds a page that becomes zero.
    pub fn add_zeroed(&mut self, old: &[u8]) {
        let lines = differing_lines(old, &[0; PAGE_BYTES]);
        self.zeroed_blocks += u64::from(merged(lines, BlockSize::B256).count_ones());
    }

    /// Bytes of the 256-byte blocks that differed: what a transfer is measured against.
    #[must_use]
    pub fn bytes_in_blocks_of_256(&self) -> u64 {
        (self.blocks[2] + self.zeroed_blocks) * BlockSize::B256.bytes() as u64
    }

    /// The block size with which digests, bitmaps and blocks would have been the fewest bytes.
    #[must_use]
    pub fn cheapest(&self) -> Option<BlockSize> {
        let cost = |(size, packed): &(BlockSize, u64)| {
            self.pages * (size.digests_bytes() + size.bitmap_bytes()) as u64 + packed
        };
        let sizes = BlockSize::EVERY.into_iter().zip(self.packed);
        sizes.min_by_key(cost).filter(|_| self.pages > 0).map(|(size, _)| size)
    }
}

/// Which lines of two pages differ.
fn differing_lines(old: &[u8], new: &[u8]) -> u64 {
    let pairs = old.chunks_exact(LINE_BYTES).zip(new.chunks_exact(LINE_BYTES));
    pairs.enumerate().fold(0, |map, (at, (old, new))| map | u64::from(old != new) << at)
}

/// The first bit of each block in which any line is set.
fn merged(lines: u64, size: BlockSize) -> u64 {
    match size {
        BlockSize::B64 => lines,
        BlockSize::B128 => (lines | lines >> 1) & 0x5555_5555_5555_5555,
        BlockSize::B256 => (lines | lines >> 1 | lines >> 2 | lines >> 3) & 0x1111_1111_1111_1111,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page(fill: u8) -> Vec<u8> {
        (0..PAGE_BYTES).map(|at| fill.wrapping_add((at / 7) as u8)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]
        #[test]
        fn blocks_that_differ_and_no_others_cross(writes in prop::collection::vec((0usize..3, 0usize..PAGE_BYTES, any::<u8>()), 0..40), seed in any::<u64>()) {
            let old: Vec<u8> = [page(1), page(2), page(3)].concat();
            let mut new = old.clone();
            for (page, at, byte) in writes {
                new[page * PAGE_BYTES + at] = byte;
            }
            for size in BlockSize::EVERY {
                let mut digests = vec![size.code()];
                old.chunks_exact(PAGE_BYTES).for_each(|page| digest_page(page, size, seed, &mut digests));
                let (told, theirs) = decode_digests(&digests).unwrap();
                prop_assert_eq!(told, size);
                // One of 65 536 does; that is what the check of the whole page is for.
                let mut pairs = old.chunks(size.bytes()).zip(new.chunks(size.bytes()));
                if pairs.any(|(old, new)| old != new && digest(old, seed) == digest(new, seed)) {
                    continue;
                }
                let maps: Vec<u64> = new.chunks_exact(PAGE_BYTES).zip(theirs)
                    .map(|(page, theirs)| differing_blocks(page, theirs, size, seed)).collect();
                let mut body = Vec::new();
                let (pages, blocks) = encode_blocks(size, &maps, new.chunks_exact(PAGE_BYTES), &mut body);
                let differing = old.chunks(size.bytes()).zip(new.chunks(size.bytes())).filter(|(old, new)| old != new).count();
                prop_assert_eq!((pages, blocks), (3, differing));
                let chunk = BlocksChunk::decode(&body, size).unwrap();
                prop_assert_eq!((chunk.pages(), chunk.blocks()), (3, differing));
                let mut patched = old.clone();
                chunk.patch(&mut patched);
                prop_assert!(patched == new);
                let mut counted = Differences::default();
                old.chunks_exact(PAGE_BYTES).zip(new.chunks_exact(PAGE_BYTES)).for_each(|(old, new)| counted.add(old, new));
                prop_assert_eq!(counted.blocks[(size.code() / 2) as usize], differing as u64);
            }
        }

        #[test]
        fn decoders_survive_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..600), pages in 0u32..20, count in any::<bool>()) {
            let _ = decode_digests(&bytes).map(|(_, digests)| digests.count());
            let mut body = if count { pages.to_le_bytes().to_vec() } else { Vec::new() };
            body.extend(bytes);
            for size in BlockSize::EVERY {
                if let Ok(chunk) = BlocksChunk::decode(&body, size) {
                    let mut pages = vec![0; chunk.pages().min(1000) * PAGE_BYTES];
                    chunk.patch(&mut pages);
                }
            }
        }
    }

    #[test]
    fn a_message_never_exceeds_its_bound() {
        for size in BlockSize::EVERY {
            let all = u64::MAX >> (64 - size.per_page());
            let (pages, blocks) =
                encode_blocks(size, &[all; 300], std::iter::repeat(&[7; PAGE_BYTES][..]), &mut Vec::new());
            assert!((250..256).contains(&pages), "{pages}");
            assert_eq!(blocks, pages * size.per_page());
        }
    }

    #[test]
    fn the_cheapest_size_follows_what_differs() {
        let old = vec![9; PAGE_BYTES];
        let cheapest = |written: &[(usize, usize)]| {
            let mut new = old.clone();
            written.iter().for_each(|&(at, length)| new[at..at + length].fill(1));
            let mut differences = Differences::default();
            differences.add(&old, &new);
            differences.cheapest()
        };
        assert_eq!(cheapest(&[(0, 1)]), Some(BlockSize::B128), "one line of a page: 198 bytes, not 201 or 294");
        assert_eq!(cheapest(&[(0, 1), (1000, 1)]), Some(BlockSize::B64), "two: 266 bytes, not 328 or 554");
        assert_eq!(cheapest(&[(0, 256)]), Some(BlockSize::B256), "few long runs need no fine digests");
        assert_eq!(cheapest(&[(0, PAGE_BYTES)]), Some(BlockSize::B256));
        let scattered: Vec<_> = (0..16).map(|block| (block * 256, 8)).collect();
        assert_eq!(cheapest(&scattered), Some(BlockSize::B64));
        assert_eq!(Differences::default().cheapest(), None);
        let mut new = old.clone();
        new[..1024].fill(0);
        new[1024..1088].fill(1);
        let mut differences = Differences::default();
        differences.add(&old, &new);
        assert_eq!(differences.packed, [16 + 65, 16 + 130, 16 + 260], "a line of zeros costs a byte");
        let mut zeroed = Differences::default();
        zeroed.add_zeroed(&[1; PAGE_BYTES]);
        assert_eq!((zeroed.cheapest(), zeroed.bytes_in_blocks_of_256()), (None, 4096));
    }
}
