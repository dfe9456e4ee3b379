//! Compares the memories of two guests byte by byte, without anything that syncvm uses for the same purpose.

use syncvm::{GuestRam, PAGE_BYTES, PageNumber};

use super::workload::LINE_BYTES;

const BLOCK_BYTES: usize = 256;

/// Where two memories differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// The pages, ascending.
    pub pages: Vec<PageNumber>,
    /// For each of them, how many of its lines.
    lines_of_pages: Vec<u32>,
    /// Lines of 64 bytes.
    pub lines: usize,
    /// Blocks of 256 bytes.
    pub blocks_256: usize,
}

impl Difference {
    /// Bytes of the blocks of 256 bytes that differ: what a transfer cannot do without, at that size of block.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        (self.blocks_256 * BLOCK_BYTES) as u64
    }

    /// How many lines differ in the median page that differs; 0 if none does.
    #[must_use]
    pub fn median_lines(&self) -> u32 {
        let mut lines = self.lines_of_pages.clone();
        lines.sort_unstable();
        lines.get(lines.len() / 2).copied().unwrap_or(0)
    }

    fn add(&mut self, page: PageNumber, a: &[u8], b: &[u8]) {
        let different = |bytes: usize| a.chunks_exact(bytes).zip(b.chunks_exact(bytes)).filter(|(a, b)| a != b).count();
        let lines = different(LINE_BYTES);
        self.pages.push(page);
        self.lines_of_pages.push(lines as u32);
        self.lines += lines;
        self.blocks_256 += different(BLOCK_BYTES);
    }

    fn append(&mut self, mut other: Difference) {
        self.pages.append(&mut other.pages);
        self.lines_of_pages.append(&mut other.lines_of_pages);
        self.lines += other.lines;
        self.blocks_256 += other.blocks_256;
    }
}

/// Compares all of both, on two threads.
///
/// # Panics
/// When the sizes differ.
#[must_use]
pub fn compare(a: &GuestRam, b: &GuestRam) -> Difference {
    assert_eq!(a.pages(), b.pages(), "guests of different sizes");
    let half = a.pages() / 2;
    std::thread::scope(|scope| {
        let back = scope.spawn(|| compare_range(a, b, half..a.pages()));
        let mut difference = compare_range(a, b, 0..half);
        difference.append(back.join().expect("comparing does not panic"));
        difference
    })
}

fn compare_range(a: &GuestRam, b: &GuestRam, pages: std::ops::Range<usize>) -> Difference {
    let mut difference = Difference::default();
    let (mut in_a, mut in_b) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    for page in pages {
        let page = PageNumber(page as u32);
        a.read_page(page, &mut in_a);
        b.read_page(page, &mut in_b);
        if in_a != in_b {
            difference.add(page, &in_a, &in_b);
        }
    }
    difference
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::syncvm::guest::new_ram;

    #[test]
    fn every_differing_byte_is_found_in_its_page_block_and_line() {
        let (a, b) = (new_ram(5).unwrap(), new_ram(5).unwrap());
        assert_eq!(compare(&a, &b), Difference::default());
        let mut bytes = [0; PAGE_BYTES];
        for at in [0, 63, 64, 255, 256, 4095] {
            bytes[at] = 1;
        }
        b.write_page(PageNumber(4), &bytes);
        bytes.fill(0);
        bytes[100] = 9;
        b.write_page(PageNumber(1), &bytes);
        let found = compare(&a, &b);
        assert_eq!(found.pages, [PageNumber(1), PageNumber(4)]);
        // Page 4: lines 0, 1, 3, 4 and 63; blocks 0, 1 and 15.
        assert_eq!((found.lines, found.blocks_256, found.block_bytes()), (1 + 5, 1 + 3, 4 * 256));
        assert_eq!(found.median_lines(), 5);
    }
}
