//! `PageBuffer`: copies of pages, one after the other, in memory that is kept from one syncvm to the next.
//!
//! A stop must not wait for the kernel to hand out zeroed memory, so the buffer keeps what it once had, up to
//! [`KEPT_BYTES`]; what a syncvm over all of RAM needed beyond that goes back afterwards.

use crate::page::PAGE_BYTES;

/// What is kept in any case: more than a usual syncvm needs.
const KEPT_BYTES: usize = 64 << 20;

#[derive(Debug, Default)]
pub(super) struct PageBuffer {
    data: Vec<u8>,
    used_bytes: usize,
}

impl PageBuffer {
    /// Forgets every page.
    pub fn clear(&mut self) {
        self.used_bytes = 0;
    }

    /// Makes room for `pages` pages at once.
    pub fn reserve(&mut self, pages: usize) {
        let wanted = self.used_bytes + pages * PAGE_BYTES;
        if self.data.len() < wanted {
            // Fresh from the kernel, which zeroes each page when it is first written. Resizing would write all of it here.
            let mut larger = vec![0; wanted];
            larger[..self.used_bytes].copy_from_slice(self.bytes());
            self.data = larger;
        }
    }

    /// Where the next page goes. It belongs to the buffer once [`Self::keep`] is called.
    pub fn slot(&mut self) -> &mut [u8] {
        let end = self.used_bytes + PAGE_BYTES;
        if self.data.len() < end {
            // In steps, because large vectors grow in place and zeroing ahead is wasted.
            self.data.resize(end.max(self.data.len() / 4 * 5), 0);
        }
        &mut self.data[self.used_bytes..end]
    }

    /// Keeps the page in the slot, and says where it begins.
    pub fn keep(&mut self) -> usize {
        let at = self.used_bytes;
        self.used_bytes += PAGE_BYTES;
        at
    }

    /// How many pages there are.
    pub fn pages(&self) -> usize {
        self.used_bytes / PAGE_BYTES
    }

    pub fn bytes(&self) -> &[u8] {
        &self.data[..self.used_bytes]
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.data[..self.used_bytes]
    }

    /// The pages.
    pub fn iter(&self) -> std::slice::ChunksExact<'_, u8> {
        self.bytes().chunks_exact(PAGE_BYTES)
    }

    /// Gives back what is far more than the last use needed. Takes its time: not for the stop.
    pub fn trim(&mut self) {
        let kept = KEPT_BYTES.max(self.used_bytes);
        if self.data.len() > KEPT_BYTES && self.used_bytes < self.data.len() / 4 {
            self.data.truncate(kept);
            self.data.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_stay_where_they_are_and_large_buffers_shrink() {
        let mut buffer = PageBuffer::default();
        for page in 0..300 {
            buffer.slot().fill(page as u8);
            assert_eq!(buffer.keep(), page * PAGE_BYTES);
        }
        // A slot that is not kept is used again.
        buffer.slot().fill(7);
        assert_eq!(buffer.pages(), 300);
        assert!(buffer.iter().enumerate().all(|(page, bytes)| bytes.iter().all(|byte| *byte == page as u8)));
        buffer.clear();
        buffer.reserve(30_000);
        assert_eq!(buffer.pages(), 0);
        buffer.slot();
        buffer.keep();
        buffer.trim();
        assert_eq!((buffer.data.len(), buffer.pages()), (KEPT_BYTES, 1));
        buffer.trim();
        assert_eq!(buffer.data.len(), KEPT_BYTES, "this much is kept");
    }
}
