//! `HashPool`: hashes a list of pages on spare cores and on the calling thread.
//!
//! Workers sleep on a condition variable between jobs and take chunks from a shared counter, so a slow
//! core delays at most one chunk. Each worker copies a page into its own buffer and hashes that (see
//! [`GuestRam::read_page`]). Rejected: rayon (threads that are not ours to name and pin), and spinning
//! workers (they would steal the cores that the guests run on).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::{HASH_BYTES, HashKind, PageHashValue};
use crate::page::{PAGE_BYTES, PageNumber};
use crate::ram::GuestRam;

/// Pages per chunk: about 60 µs of work, so that handing out chunks costs nothing and the end is even.
const CHUNK_PAGES: usize = 64;

struct Job {
    kind: HashKind,
    zero_hash: PageHashValue,
    ram: GuestRam,
    pages: Vec<PageNumber>,
    next_chunk: AtomicUsize,
    results: Mutex<Results>,
    finished: Condvar,
}

struct Results {
    hashes: Vec<PageHashValue>,
    pages_left: usize,
    worker_panicked: bool,
}

#[derive(Default)]
struct Slot {
    job: Option<Arc<Job>>,
    generation: u64,
    closing: bool,
}

struct Shared {
    slot: Mutex<Slot>,
    changed: Condvar,
}

/// A fixed set of hashing threads. Jobs come from one caller at a time; others wait their turn.
pub struct HashPool {
    shared: Arc<Shared>,
    turn: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic elsewhere is reported through `worker_panicked`; the data under these locks stays consistent.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HashPool {
    /// Starts `workers` threads named `plover-hash-N`. With 0 the calling thread does all the work.
    ///
    /// # Panics
    /// When the system cannot start a thread.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        let shared = Arc::new(Shared { slot: Mutex::new(Slot::default()), changed: Condvar::new() });
        let workers = (0..workers)
            .map(|number| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("plover-hash-{number}"))
                    .spawn(move || worker(&shared))
                    .expect("the system starts a hash worker")
            })
            .collect();
        Self { shared, turn: Mutex::new(()), workers }
    }

    /// How many threads help the caller.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// The hashes of `pages`, in their order. CPU-bound: it ends by itself.
    ///
    /// # Panics
    /// When a page lies beyond the RAM file.
    #[must_use]
    pub fn hash_pages(&self, kind: HashKind, ram: &GuestRam, pages: &[PageNumber]) -> Vec<PageHashValue> {
        assert!(
            pages.iter().all(|page| page.index() < ram.pages()),
            "a page to hash lies beyond the {} pages of RAM",
            ram.pages()
        );
        let _turn = lock(&self.turn);
        let job = Arc::new(Job {
            kind,
            zero_hash: kind.zero_page(),
            ram: ram.clone(),
            pages: pages.to_vec(),
            next_chunk: AtomicUsize::new(0),
            results: Mutex::new(Results {
                hashes: vec![[0; HASH_BYTES]; pages.len()],
                pages_left: pages.len(),
                worker_panicked: false,
            }),
            finished: Condvar::new(),
        });
        // One chunk is not worth waking anybody.
        if !self.workers.is_empty() && pages.len() > CHUNK_PAGES {
            let mut slot = lock(&self.shared.slot);
            slot.generation += 1;
            slot.job = Some(Arc::clone(&job));
            drop(slot);
            self.shared.changed.notify_all();
        }
        job.work();
        let hashes = job.wait();
        lock(&self.shared.slot).job = None;
        hashes
    }
}

impl Drop for HashPool {
    fn drop(&mut self) {
        lock(&self.shared.slot).closing = true;
        self.shared.changed.notify_all();
        for worker in self.workers.drain(..) {
            // A worker that panicked has already made its caller panic.
            drop(worker.join());
        }
    }
}

fn worker(shared: &Shared) {
    let mut seen = 0;
    loop {
        let job = {
            let mut slot = lock(&shared.slot);
            while !slot.closing && (slot.generation == seen || slot.job.is_none()) {
                slot = shared.changed.wait(slot).unwrap_or_else(PoisonError::into_inner);
            }
            if slot.closing {
                return;
            }
            seen = slot.generation;
            slot.job.clone()
        };
        if let Some(job) = job {
            job.work();
        }
    }
}

/// Tells the waiting caller when a worker dies in the middle of a chunk.
struct PanicGuard<'a>(&'a Job);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(&self.0.results).worker_panicked = true;
            self.0.finished.notify_all();
        }
    }
}

impl Job {
    fn work(&self) {
        let _guard = PanicGuard(self);
        let hash = self.kind.function();
        let mut page = [0; PAGE_BYTES];
        let mut chunk_hashes = Vec::with_capacity(CHUNK_PAGES);
        loop {
            let start = self.next_chunk.fetch_add(1, Ordering::Relaxed) * CHUNK_PAGES;
            let Some(rest) = self.pages.get(start..).filter(|rest| !rest.is_empty()) else {
                return;
            };
            let chunk = &rest[..rest.len().min(CHUNK_PAGES)];
            chunk_hashes.clear();
            let hole = chunk[0]..self.first_backed(chunk);
            for &number in chunk {
                if hole.contains(&number) {
                    chunk_hashes.push(self.zero_hash);
                    continue;
                }
                self.ram.read_page(number, &mut page);
                chunk_hashes.push(hash(&page));
            }
            let mut results = lock(&self.results);
            results.hashes[start..start + chunk.len()].copy_from_slice(&chunk_hashes);
            results.pages_left -= chunk.len();
            if results.pages_left == 0 {
                self.finished.notify_all();
            }
        }
    }

    /// The chunk's first page and what follows up to this one is a hole in the RAM file. Asked only when the chunk is one run of
    /// pages, as when all of RAM is hashed; dirty pages are not holes.
    fn first_backed(&self, chunk: &[PageNumber]) -> PageNumber {
        let (first, last) = (chunk[0], chunk[chunk.len() - 1]);
        if chunk.len() == CHUNK_PAGES && last.index() == first.index() + CHUNK_PAGES - 1 {
            self.ram.next_backed(first)
        } else {
            first
        }
    }

    fn wait(&self) -> Vec<PageHashValue> {
        let mut results = lock(&self.results);
        while results.pages_left > 0 {
            assert!(!results.worker_panicked, "a hash worker panicked");
            results = self.finished.wait(results).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut results.hashes)
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
