//! `HashPool`: hashes a list of pages on spare cores and on the calling thread.
//!
//! Each participant takes a chunk of pages at a time and writes their hashes where they belong. CityHash reads pages where they
//! are (see [`super::city`]); XXH3 reads a private copy, because its crate takes a slice.

use super::{HASH_BYTES, HashKind, PageHash, PageHashValue, Xxh3_128, city};
use crate::page::{PAGE_BYTES, PageNumber};
use crate::ram::GuestRam;
use crate::workers::Workers;

/// Pages per chunk: some 50 µs of work, so that handing out chunks costs nothing and the end is even.
const CHUNK_PAGES: usize = 96;

const _: () = assert!(CHUNK_PAGES.is_multiple_of(city::LANES));

/// A fixed set of hashing threads. Jobs come from one caller at a time; others wait their turn.
pub struct HashPool {
    workers: Workers,
}

impl HashPool {
    /// Starts `workers` threads named `plover-hash-N` that run where the kernel puts them. With 0 the calling thread does
    /// all the work.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self::on_cores(&vec![None; workers])
    }

    /// Starts one thread per entry, on that core or, without one, where the kernel puts it.
    #[must_use]
    pub fn on_cores(cores: &[Option<usize>]) -> Self {
        Self { workers: Workers::new(cores) }
    }

    /// How many threads help the caller.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.count()
    }

    /// The threads, for other work of the same kind.
    pub(crate) fn threads(&self) -> &Workers {
        &self.workers
    }

    /// The hashes of `pages`, in their order. CPU-bound: it ends by itself.
    ///
    /// # Panics
    /// When a page lies beyond the RAM file.
    #[must_use]
    pub fn hash_pages(&self, kind: HashKind, ram: &GuestRam, pages: &[PageNumber]) -> Vec<PageHashValue> {
        let mut hashes = Vec::new();
        self.hash_pages_into(kind, ram, pages, &mut hashes);
        hashes
    }

    /// As [`Self::hash_pages`], in place of what `hashes` holds; allocates only when that has too little room.
    ///
    /// # Panics
    /// When a page lies beyond the RAM file.
    pub fn hash_pages_into(
        &self,
        kind: HashKind,
        ram: &GuestRam,
        pages: &[PageNumber],
        hashes: &mut Vec<PageHashValue>,
    ) {
        assert!(
            pages.iter().all(|page| page.index() < ram.pages()),
            "a page to hash lies beyond the {} pages of RAM",
            ram.pages()
        );
        hashes.clear();
        hashes.resize(pages.len(), [0; HASH_BYTES]);
        let results = Results(hashes.as_mut_ptr());
        let zero_hash = kind.zero_page();
        self.workers.run(pages.len().div_ceil(CHUNK_PAGES), &|_, task| {
            let first = task * CHUNK_PAGES;
            let pages = &pages[first..pages.len().min(first + CHUNK_PAGES)];
            // SAFETY: `hashes` has as many entries as `pages` and is left alone until the end of the run; chunks do not
            // overlap, and each is one task, which runs once.
            let into = unsafe { results.slice(first, pages.len()) };
            let holes = holes_at_front(ram, pages);
            into[..holes].fill(zero_hash);
            hash_chunk(kind, ram, &pages[holes..], &mut into[holes..]);
        });
    }
}

/// Where the results go, for all participants.
struct Results(*mut PageHashValue);

// SAFETY: only used to make slices that do not overlap (see `hash_pages_into`).
unsafe impl Sync for Results {}

impl Results {
    /// # Safety
    /// The entries exist, and nobody else uses them while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "disjoint parts of one buffer for several threads")]
    unsafe fn slice(&self, first: usize, count: usize) -> &mut [PageHashValue] {
        // SAFETY: the caller vouches for it.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), count) }
    }
}

/// How many pages at the front of the chunk are a hole in the RAM file. Asked only when the chunk is one run of pages, as when
/// all of RAM is hashed; dirty pages are not holes.
fn holes_at_front(ram: &GuestRam, chunk: &[PageNumber]) -> usize {
    let (first, last) = (chunk[0], chunk[chunk.len() - 1]);
    if chunk.len() < CHUNK_PAGES || last.index() != first.index() + CHUNK_PAGES - 1 {
        return 0;
    }
    let hole = first..ram.next_backed(first);
    chunk.iter().take_while(|page| hole.contains(page)).count()
}

fn hash_chunk(kind: HashKind, ram: &GuestRam, pages: &[PageNumber], into: &mut [PageHashValue]) {
    match kind {
        HashKind::City128 => city::hash_guest_pages(ram, pages, into),
        HashKind::Xxh3_128 => {
            let mut copy = [0; PAGE_BYTES];
            for (index, (page, into)) in pages.iter().zip(into).enumerate() {
                if let Some(next) = pages.get(index + 1) {
                    ram.prefetch(*next);
                }
                ram.read_page(*page, &mut copy);
                *into = Xxh3_128::hash(&copy);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    #[test]
    fn hashing_all_of_a_sparse_guest_allocates_nothing() {
        const PAGES: u32 = 1000;
        let fd = memfd_create("plover-hash-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, u64::from(PAGES) * 4096).unwrap();
        let ram = GuestRam::new(fd, None).unwrap();
        for page in [70, 71, 999] {
            ram.write_page(PageNumber(page), &[page as u8; PAGE_BYTES]);
        }
        let pages: Vec<PageNumber> = (0..PAGES).map(PageNumber).collect();
        let hash = HashKind::Xxh3_128;
        let hashes = HashPool::new(0).hash_pages(hash, &ram, &pages);
        for (page, value) in hashes.iter().enumerate() {
            let content = if [70, 71, 999].contains(&page) { page as u8 } else { 0 };
            assert_eq!(*value, hash.function()(&[content; PAGE_BYTES]), "page {page}");
        }
        let blocks = rustix::fs::fstat(ram.fd()).unwrap().st_blocks;
        assert!(blocks <= 2 * 64 * 8, "{blocks} blocks of 512 bytes are allocated");
    }

    #[test]
    fn any_number_of_workers_gives_the_hashes_in_order() {
        const PAGES: u32 = 700;
        let fd = memfd_create("plover-hash-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, u64::from(PAGES) * 4096).unwrap();
        let ram = GuestRam::new(fd, None).unwrap();
        for page in 1..PAGES {
            let bytes: Vec<u8> = (0..PAGE_BYTES).map(|i| (i as u32 * page % 253) as u8).collect();
            ram.write_page(PageNumber(page), &bytes);
        }
        let pages: Vec<PageNumber> = (0..PAGES).rev().map(PageNumber).collect();
        let expected: Vec<PageHashValue> = pages
            .iter()
            .map(|&page| {
                let mut bytes = [0; PAGE_BYTES];
                ram.read_page(page, &mut bytes);
                HashKind::City128.function()(&bytes)
            })
            .collect();
        assert_eq!(expected.last(), Some(&HashKind::City128.zero_page()));
        for workers in [0, 1, 3] {
            let pool = HashPool::new(workers);
            assert_eq!(pool.workers(), workers);
            for take in [0, 1, 64, 65, 700, 128, 699] {
                let hashes = pool.hash_pages(HashKind::City128, &ram, &pages[..take]);
                assert_eq!(hashes, expected[..take], "{workers} workers, {take} pages");
            }
        }
    }
}
