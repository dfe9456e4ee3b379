//! What runs while a guest stands still allocates nothing once its buffers have grown.

use counting_allocator::{Counting, allocations};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use syncvm::hash::{HashKind, HashPool};
use syncvm::{GuestRam, PAGE_BYTES, PageNumber};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn hashing_into_a_buffer_that_is_large_enough_allocates_nothing() {
    const PAGES: u32 = 2000;
    let fd = memfd_create("plover-hash-test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, u64::from(PAGES) * PAGE_BYTES as u64).unwrap();
    let ram = GuestRam::new(fd, None).unwrap();
    let pages: Vec<PageNumber> = (0..PAGES).map(PageNumber).collect();
    let mut hashes = Vec::new();
    for workers in [0, 2] {
        let pool = HashPool::new(workers);
        pool.hash_pages_into(HashKind::City128, &ram, &pages, &mut hashes);
        let before = allocations();
        for kind in [HashKind::City128, HashKind::Xxh3_128] {
            pool.hash_pages_into(kind, &ram, &pages, &mut hashes);
        }
        assert_eq!(allocations() - before, 0, "{workers} workers");
    }
}
