//! What the synthetic guest writes in a slot: on both sides the same pages, most of them with the same content.
//!
//! The shape is that of two guests that served the same Redis clients: of a page that came out different, a few of the 64
//! cache lines differ (median about 10), next to one another in a few places. Everything follows from the seed, so that two
//! processes need not talk to write the same.

use rig::client::rng::Rng;
use serde::{Deserialize, Serialize};
use syncvm::{DirtySet, GuestRam, PAGE_BYTES, PageNumber};

/// Bytes of a cache line.
pub const LINE_BYTES: usize = 64;
const LINES: u32 = (PAGE_BYTES / LINE_BYTES) as u32;

/// Which cache lines of a page are touched.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Half of the pages have at most as many lines; the number is distributed exponentially, from 1 on.
    pub median_lines: f64,
    /// Lines next to one another, on average.
    pub lines_per_place: u32,
}

impl Shape {
    /// As measured between two Redis guests.
    pub const REDIS: Shape = Shape { median_lines: 10.0, lines_per_place: 4 };
    /// As many lines, but scattered: the worst for any block that is larger than a line.
    pub const SCATTERED: Shape = Shape { lines_per_place: 1, ..Shape::REDIS };

    /// A set of lines, one bit each.
    fn lines(self, random: &mut Rng) -> u64 {
        let mean = (self.median_lines - 1.0) / std::f64::consts::LN_2;
        let wanted = (1.0 + -mean * unit(random).ln()).min(f64::from(LINES)) as u32;
        let mut lines = 0u64;
        while lines.count_ones() < wanted {
            let (start, length) = (random.below(LINES), 1 + random.below(2 * self.lines_per_place - 1));
            for line in start..(start + length).min(LINES) {
                if lines.count_ones() < wanted {
                    lines |= 1 << line;
                }
            }
        }
        lines
    }
}

/// From 0 (not included) to 1.
fn unit(random: &mut Rng) -> f64 {
    ((random.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
}

/// What both guests write between two syncvms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Slot {
    /// Decides which pages and lines.
    pub seed: u64,
    /// Decides, with the seed, what is written: the same slot in another turn changes the same places again.
    pub turn: u64,
    /// Pages that both write, at random places.
    pub dirty: u32,
    /// How many of them come out different.
    pub different: u32,
    /// What is written in a page, and what comes out different.
    pub shape: Shape,
}

impl Slot {
    /// The pages, none twice.
    ///
    /// # Panics
    /// When they would fill more than half of the RAM: drawing lots would not end soon.
    #[must_use]
    pub fn pages(&self, ram_pages: usize) -> Vec<PageNumber> {
        assert!(self.dirty as usize <= ram_pages / 2, "{} dirty pages of {ram_pages}", self.dirty);
        let (mut random, mut seen) = (Rng::new(self.seed), DirtySet::new(ram_pages));
        let mut pages = Vec::with_capacity(self.dirty as usize);
        while pages.len() < self.dirty as usize {
            let page = PageNumber(random.below(ram_pages as u32));
            if !seen.contains(page) {
                seen.insert(page);
                pages.push(page);
            }
        }
        pages
    }

    /// Writes as the guest of `side` does.
    pub fn write(&self, ram: &GuestRam, side: Side) {
        let mut bytes = [0; PAGE_BYTES];
        for (index, page) in self.pages(ram.pages()).into_iter().enumerate() {
            let different = index < self.different as usize;
            ram.read_page(page, &mut bytes);
            self.change(&mut bytes, page, side, different);
            ram.write_page(page, &bytes);
        }
    }

    fn change(&self, bytes: &mut [u8; PAGE_BYTES], page: PageNumber, side: Side, different: bool) {
        let mut random = Rng::new(self.seed ^ (u64::from(page.0) << 32));
        let turn = Rng::new(self.turn).next_u64();
        let touched = self.shape.lines(&mut random);
        for line in set_bits(touched) {
            let line = &mut bytes[line * LINE_BYTES..][..LINE_BYTES];
            for word in line.chunks_exact_mut(8) {
                word.copy_from_slice(&(random.next_u64() ^ turn).to_le_bytes());
            }
        }
        if !different {
            return;
        }
        let flip = if side == Side::Leader { 0 } else { u64::MAX };
        for line in set_bits(self.shape.lines(&mut random)) {
            let at = line * LINE_BYTES + random.below(8) as usize * 8;
            bytes[at..at + 8].copy_from_slice(&(random.next_u64() ^ turn ^ flip).to_le_bytes());
        }
    }
}

fn set_bits(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (bits != 0).then(|| {
            let bit = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            bit
        })
    })
}

/// Whose guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Side {
    /// The leader's.
    Leader,
    /// The follower's.
    Follower,
}

/// Makes every page memory that is there and is not zero, the same for the same seed.
pub fn fill(ram: &GuestRam, seed: u64) {
    let mut random = Rng::new(seed);
    let mut bytes = [0; PAGE_BYTES];
    for page in 0..ram.pages() {
        bytes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next_u64().to_le_bytes()));
        ram.write_page(PageNumber(page as u32), &bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::syncvm::compare::compare;
    use crate::syncvm::guest::new_ram;

    #[test]
    fn both_sides_write_the_same_pages_and_the_share_that_was_asked_for_differs_in_a_few_lines() {
        let (a, b) = (new_ram(4096).unwrap(), new_ram(4096).unwrap());
        fill(&a, 1);
        fill(&b, 1);
        assert!(compare(&a, &b).pages.is_empty());
        let slot = Slot { seed: 7, turn: 0, dirty: 1000, different: 200, shape: Shape::REDIS };
        slot.write(&a, Side::Leader);
        slot.write(&b, Side::Leader);
        assert!(compare(&a, &b).pages.is_empty(), "the same side twice is the same");
        Slot { turn: 1, ..slot }.write(&b, Side::Leader);
        assert_eq!(compare(&a, &b).pages.len(), 1000, "another turn changes every page");
        slot.write(&b, Side::Follower);
        let difference = compare(&a, &b);
        let mut expected: Vec<_> = slot.pages(4096)[..200].iter().map(|page| page.0).collect();
        expected.sort_unstable();
        assert_eq!(difference.pages.iter().map(|page| page.0).collect::<Vec<_>>(), expected);
        let median = difference.median_lines();
        assert!((7..=13).contains(&median), "{median} lines differ in the median page");
        assert!(difference.lines <= 4 * difference.blocks_256 && difference.blocks_256 <= difference.lines);
    }

    #[test]
    fn scattered_lines_fill_more_blocks() {
        let blocks = |shape: Shape| {
            let mut random = Rng::new(3);
            let lines: Vec<u64> = (0..1000).map(|_| shape.lines(&mut random)).collect();
            assert!(lines.iter().all(|lines| *lines != 0));
            let of = |lines: u64| (0..16).filter(|block| lines >> (4 * block) & 15 != 0).count();
            lines.into_iter().map(of).sum::<usize>()
        };
        assert!(blocks(Shape::SCATTERED) * 2 > blocks(Shape::REDIS) * 3);
    }
}
