//! The unit of everything in this crate: a 4 KiB page of the guest's RAM file.
//!
//! Pages are numbered by their place in the **RAM file**, not by guest physical address (which has holes)
//! and not by QEMU's virtual address (which differs between replicas). Backing with huge pages changes
//! nothing here: a dirty huge page is 512 dirty pages.

use std::fmt;

/// Bytes of one page.
pub const PAGE_BYTES: usize = 4096;

/// Index of a page in the RAM file. 32 bits reach 16 TiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNumber(pub u32);

impl PageNumber {
    /// The page's number as an index.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Where the page begins in the RAM file, in bytes.
    #[must_use]
    pub const fn file_offset(self) -> usize {
        self.0 as usize * PAGE_BYTES
    }
}

impl fmt::Display for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// Whether every byte of `page` is zero. Such a page crosses the wire as a flag.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    // Blocks without an early exit inside vectorise; the exit between blocks makes the usual page cheap.
    page.chunks(256).all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_byte_anywhere_makes_a_page_nonzero() {
        let mut page = vec![0; PAGE_BYTES];
        assert!(is_zero(&page));
        for at in [0, 1, 255, 256, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }
}
