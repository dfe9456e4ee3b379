//! `syncvm.hash_vs_memcpy`: hashing 10 000 pages of a guest's RAM on one core, against copying them.
//!
//! A copy of the same pages is the limit for anything that must look at every byte and put something down;
//! it writes 4096 bytes per page where a hash writes 16, so a good hash can beat it. 40 MB do not fit
//! into the caches of common machines, as dirty pages of a guest do not.

use std::hint::black_box;

use anyhow::{Result, ensure};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use syncvm::hash::{HashKind, HashPool, PageHashValue};
use syncvm::{GuestRam, PAGE_BYTES, PageNumber};

use crate::Effort;
use crate::group::Sink;
use crate::sample::{Better, Figure, compare, thread_cpu_time};

const PAGES: u32 = 10_000;

/// Measures both hashes.
///
/// # Errors
/// No memory, or a hash that is wrong.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    let ram = filled_ram(PAGES)?;
    let pages: Vec<PageNumber> = (0..PAGES).map(PageNumber).collect();
    // No workers: the calling thread does all the work, on one core like memcpy.
    let pool = HashPool::new(0);
    // Not zero, so that its pages are there before the first copy.
    let mut copy = vec![1; pages.len() * PAGE_BYTES];
    let passes = effort.pick(10, 1);
    for (id, kind) in
        [("syncvm.hash_vs_memcpy.city128", HashKind::City128), ("syncvm.hash_vs_memcpy.xxh3", HashKind::Xxh3_128)]
    {
        if !sink.wants(id) {
            continue;
        }
        let figure = Figure { id, unit: "GB/s", better: Better::Higher };
        let mut hashes = Vec::new();
        let row = compare(
            figure,
            effort,
            "memcpy",
            || {
                Ok(rate(passes, &pages, || {
                    hashes = pool.hash_pages(kind, black_box(&ram), black_box(&pages));
                    black_box(&hashes);
                }))
            },
            || Ok(rate(passes, &pages, || copy_pages(&ram, &pages, &mut copy))),
        )?;
        check(kind, &hashes, &copy)?;
        sink(row)?;
    }
    Ok(())
}

/// 10^9 bytes of pages per second of CPU time.
fn rate(passes: usize, pages: &[PageNumber], mut pass: impl FnMut()) -> f64 {
    let start = thread_cpu_time();
    for _ in 0..passes {
        pass();
    }
    (passes * pages.len() * PAGE_BYTES) as f64 / 1e9 / (thread_cpu_time() - start).as_secs_f64()
}

fn copy_pages(ram: &GuestRam, pages: &[PageNumber], into: &mut [u8]) {
    for (&page, into) in pages.iter().zip(into.chunks_exact_mut(PAGE_BYTES)) {
        black_box(ram).read_page(page, into);
    }
    black_box(into);
}

/// The copied pages must have the hashes that the pool found.
fn check(kind: HashKind, hashes: &[PageHashValue], copy: &[u8]) -> Result<()> {
    let expected = copy.chunks_exact(PAGE_BYTES).map(kind.function());
    ensure!(expected.eq(hashes.iter().copied()), "a page that was copied does not have its {kind} hash");
    Ok(())
}

/// RAM in a memfd as QEMU's is, every page there and different.
fn filled_ram(pages: u32) -> Result<GuestRam> {
    let fd = memfd_create("plover-perf-ram", MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, u64::from(pages) * PAGE_BYTES as u64)?;
    let ram = GuestRam::new(fd, None)?;
    // xorshift64 with a fixed seed.
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    let mut page = [0; PAGE_BYTES];
    for number in 0..pages {
        for word in page.chunks_exact_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes());
        }
        ram.write_page(PageNumber(number), &page);
    }
    Ok(ram)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_that_do_not_belong_to_the_copy_are_noticed() {
        let ram = filled_ram(100).unwrap();
        let pages: Vec<PageNumber> = (0..100).map(PageNumber).collect();
        let mut copy = vec![0; 100 * PAGE_BYTES];
        copy_pages(&ram, &pages, &mut copy);
        let hashes = HashPool::new(0).hash_pages(HashKind::City128, &ram, &pages);
        check(HashKind::City128, &hashes, &copy).unwrap();
        assert!(check(HashKind::Xxh3_128, &hashes, &copy).is_err());
        assert!(check(HashKind::City128, &hashes[1..], &copy).is_err());
        copy[99 * PAGE_BYTES + 7] ^= 1;
        assert!(check(HashKind::City128, &hashes, &copy).is_err());
    }
}
