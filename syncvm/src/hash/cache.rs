//! `SlotHasher`: page hashes that are made before the stop, so that at the stop only pages written since need hashing.
//!
//! One rule makes them right: **harvest first, then read**. A page that is written after it was read, or while it is read, is in
//! a later harvest, and a harvest takes the hashes of its pages away; the last harvest is that of the stop, when nobody
//! writes any more.
//!
//! Rejected: harvests every few milliseconds of the slot, with a pace that adapts itself. The stop came out no shorter and the
//! whole syncvm by 0.7 of 17 ms, for a fifth of the guest's speed: each harvest costs it a fault for every page that it
//! writes again.

use std::sync::Arc;

use super::{HASH_BYTES, HashKind, HashPool, PageHashValue};
use crate::dirty::DirtySet;
use crate::page::PageNumber;
use crate::ram::GuestRam;

/// What was hashed ahead.
#[derive(Debug)]
struct Ahead {
    kind: HashKind,
    /// Ascending.
    pages: Vec<PageNumber>,
    /// One of each page.
    hashes: Vec<PageHashValue>,
    /// The pages that were written since the first of them was read, or just before, as far as harvested.
    written: DirtySet,
    /// There may be hashes.
    begun: bool,
}

impl Ahead {
    fn new(pages: usize) -> Self {
        Self {
            kind: HashKind::default(),
            pages: Vec::new(),
            hashes: Vec::new(),
            written: DirtySet::new(pages),
            begun: false,
        }
    }

    /// Looks up page after page; fastest when they ascend.
    fn lookup(&self) -> impl FnMut(PageNumber) -> Option<PageHashValue> + '_ {
        let mut at = 0;
        let mut last = None;
        move |page| {
            at = match last.replace(page) {
                Some(before) if before <= page => {
                    at + self.pages[at..].iter().take_while(|known| **known < page).count()
                }
                _ => self.pages.partition_point(|known| *known < page),
            };
            (self.pages.get(at) == Some(&page) && !self.written.contains(page)).then(|| self.hashes[at])
        }
    }
}

/// A [`HashPool`] for one guest, with the hashes that were made ahead.
pub struct SlotHasher {
    pool: Arc<HashPool>,
    /// None before the first time.
    ahead: Option<Ahead>,
    /// Pages to hash, where their hashes belong, and the hashes.
    turn: Vec<PageNumber>,
    places: Vec<usize>,
    turn_hashes: Vec<PageHashValue>,
}

impl SlotHasher {
    /// Nothing is hashed ahead.
    #[must_use]
    pub fn new(pool: Arc<HashPool>) -> Self {
        Self { pool, ahead: None, turn: Vec::new(), places: Vec::new(), turn_hashes: Vec::new() }
    }

    /// The pool alone, for what must not rest on what is known.
    #[must_use]
    pub fn pool(&self) -> &HashPool {
        &self.pool
    }

    /// Harvests into `into` by `harvest`; every harvest of the guest goes through here.
    ///
    /// # Errors
    /// As `harvest`, which may then have lost pages: no hash is known any more.
    pub fn harvest<E>(
        &mut self,
        into: &mut DirtySet,
        harvest: impl FnOnce(&mut DirtySet) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(ahead) = self.ahead.as_mut().filter(|ahead| ahead.begun) else { return harvest(into) };
        let result = harvest(&mut ahead.written);
        into.union_with(&ahead.written);
        if result.is_err() {
            self.forget();
        }
        result
    }

    /// No hash is known: an exchange is over, or this guest's memory was written by us.
    pub fn forget(&mut self) {
        if let Some(ahead) = &mut self.ahead {
            ahead.begun = false;
            ahead.pages.clear();
            ahead.hashes.clear();
            ahead.written.clear();
        }
    }

    /// From here on pages of the running guest are hashed by [`Self::hash_ahead`]. Forgets what was known.
    pub fn begin_ahead(&mut self, kind: HashKind, ram: &GuestRam) {
        self.forget();
        let ahead = self.ahead.get_or_insert_with(|| Ahead::new(ram.pages()));
        (ahead.kind, ahead.begun) = (kind, true);
    }

    /// Hashes `pages` of the running guest, which come after all that were hashed since [`Self::begin_ahead`], and returns the
    /// hashes. The guest was harvested before, through [`Self::harvest`].
    ///
    /// # Panics
    /// When a page lies beyond the RAM file, or nothing was begun.
    pub fn hash_ahead(&mut self, ram: &GuestRam, pages: &[PageNumber]) -> &[PageHashValue] {
        let ahead = self.ahead.as_mut().filter(|ahead| ahead.begun).expect("hashing ahead was begun");
        assert!(ahead.pages.last() < pages.first() || pages.is_empty(), "pages are hashed in their order");
        self.pool.hash_pages_into(ahead.kind, ram, pages, &mut self.turn_hashes);
        ahead.pages.extend_from_slice(pages);
        ahead.hashes.extend_from_slice(&self.turn_hashes);
        &self.turn_hashes
    }

    /// The pages that were written since [`Self::begin_ahead`], as far as harvested. None before it.
    pub fn written(&self) -> Option<&DirtySet> {
        self.ahead.as_ref().filter(|ahead| ahead.begun).map(|ahead| &ahead.written)
    }

    /// Puts the hashes of `pages` of the stopped guest, in their order, in place of what `hashes` holds: known ones, and the
    /// others from the pool. Says how many were known. Allocates only where there was too little room before.
    ///
    /// # Panics
    /// When a page lies beyond the RAM file.
    pub fn hash_pages_into(
        &mut self,
        kind: HashKind,
        ram: &GuestRam,
        pages: &[PageNumber],
        hashes: &mut Vec<PageHashValue>,
    ) -> usize {
        let Some(ahead) = self.ahead.as_ref().filter(|ahead| ahead.kind == kind && ahead.begun) else {
            self.pool.hash_pages_into(kind, ram, pages, hashes);
            return 0;
        };
        self.turn.clear();
        self.places.clear();
        hashes.clear();
        let mut lookup = ahead.lookup();
        for (place, &page) in pages.iter().enumerate() {
            let known = lookup(page);
            if known.is_none() {
                self.turn.push(page);
                self.places.push(place);
            }
            hashes.push(known.unwrap_or([0; HASH_BYTES]));
        }
        self.pool.hash_pages_into(kind, ram, &self.turn, &mut self.turn_hashes);
        for (place, hash) in self.places.iter().zip(&self.turn_hashes) {
            hashes[*place] = *hash;
        }
        pages.len() - self.turn.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_BYTES;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use std::convert::Infallible;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    const PAGES: usize = 700;

    fn ram() -> GuestRam {
        let fd = memfd_create("plover-cache-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, (PAGES * PAGE_BYTES) as u64).unwrap();
        GuestRam::new(fd, None).unwrap()
    }

    fn hasher(workers: usize) -> SlotHasher {
        SlotHasher::new(Arc::new(HashPool::new(workers)))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn hash_ahead(hasher: &mut SlotHasher, kind: HashKind, ram: &GuestRam, pages: &DirtySet) {
        hasher.begin_ahead(kind, ram);
        let pages: Vec<PageNumber> = pages.iter().collect();
        for pages in pages.chunks(100) {
            assert_eq!(hasher.hash_ahead(ram, pages).len(), pages.len());
        }
    }

    /// At the stop: every hash is that of the page as it is, known or not. Says how many were known.
    fn check(hasher: &mut SlotHasher, ram: &GuestRam, kind: HashKind, pages: &[PageNumber]) -> usize {
        let fresh = HashPool::new(0).hash_pages(kind, ram, pages);
        let mut hashes = vec![[7; HASH_BYTES]; 3];
        let known = hasher.hash_pages_into(kind, ram, pages, &mut hashes);
        assert!(hashes == fresh, "a hash is not that of its page");
        known
    }

    fn all_pages() -> Vec<PageNumber> {
        (0..PAGES as u32).map(PageNumber).collect()
    }

    #[test]
    fn what_races_with_a_writer_is_hashed_again() {
        let all = all_pages();
        let (mut known, mut rewritten) = (0, 0);
        for round in 0..60 {
            let (ram, mut hasher) = (ram(), hasher(round % 2));
            let dirty = Mutex::new(DirtySet::new(PAGES));
            let (running, stop) = (AtomicBool::new(false), AtomicBool::new(false));
            let harvest = |into: &mut DirtySet| {
                let mut dirty = dirty.lock().unwrap();
                into.union_with(&dirty);
                dirty.clear();
                Ok::<(), Infallible>(())
            };
            let mut pending = DirtySet::new(PAGES);
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let mut at = 0usize;
                    // Some pages again and again, some once; the page first, its bit after.
                    while !stop.load(Ordering::Relaxed) {
                        let page = if at.is_multiple_of(3) { 300 + at / 3 % 400 } else { at % 7 };
                        ram.write_page(PageNumber(page as u32), &[at as u8; PAGE_BYTES]);
                        dirty.lock().unwrap().insert(PageNumber(page as u32));
                        at += 1;
                        running.store(at > 200, Ordering::Relaxed);
                    }
                });
                let deadline = soon();
                while !running.load(Ordering::Relaxed) {
                    assert!(Instant::now() < deadline, "the writer does not write");
                    std::thread::yield_now();
                }
                hasher.harvest(&mut pending, harvest).unwrap();
                hash_ahead(&mut hasher, HashKind::City128, &ram, &pending);
                let ahead = pending.count();
                stop.store(true, Ordering::Relaxed);
                writer.join().unwrap();
                hasher.harvest(&mut pending, harvest).unwrap();
                let still = check(&mut hasher, &ram, HashKind::City128, &all);
                known += still;
                rewritten += ahead - still;
            });
        }
        assert!(known > 60 && rewritten > 60, "{known} known, {rewritten} written while or after they were hashed");
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u32, u8),
        Harvest(bool),
        Ahead(HashKind),
        Forget,
    }

    fn op() -> impl Strategy<Value = Op> {
        let kind = prop_oneof![9 => Just(HashKind::City128), 1 => Just(HashKind::Xxh3_128)];
        prop_oneof![
            10 => (0..PAGES as u32, any::<u8>()).prop_map(|(page, fill)| Op::Write(page, fill)),
            4 => prop_oneof![9 => Just(true), 1 => Just(false)].prop_map(Op::Harvest),
            4 => kind.prop_map(Op::Ahead),
            1 => Just(Op::Forget),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]
        #[test]
        fn whatever_happens_in_a_slot_the_hashes_at_the_stop_are_right(
            ops in prop::collection::vec(op(), 0..80),
            asked in prop::collection::vec(0..PAGES as u32, 0..40),
        ) {
            let (ram, mut hasher) = (ram(), hasher(0));
            let (mut dirty, mut pending) = (DirtySet::new(PAGES), DirtySet::new(PAGES));
            let mut kind = HashKind::City128;
            for op in ops {
                match op {
                    Op::Write(page, fill) => {
                        ram.write_page(PageNumber(page), &[fill; PAGE_BYTES]);
                        dirty.insert(PageNumber(page));
                    }
                    Op::Harvest(good) => {
                        // A harvest that fails reports nothing and has lost what there was.
                        let result = hasher.harvest(&mut pending, |into| {
                            if good { into.union_with(&dirty) }
                            dirty.clear();
                            good.then_some(()).ok_or(())
                        });
                        prop_assert_eq!(result.is_ok(), good);
                    }
                    Op::Ahead(next) => {
                        kind = next;
                        hash_ahead(&mut hasher, kind, &ram, &pending);
                    }
                    Op::Forget => hasher.forget(),
                }
            }
            hasher.harvest(&mut pending, |into| { into.union_with(&dirty); Ok::<(), ()>(()) }).unwrap();
            check(&mut hasher, &ram, kind, &all_pages());
            check(&mut hasher, &ram, HashKind::City128, &all_pages());
            // In any order, some more than once.
            let asked: Vec<PageNumber> = asked.into_iter().map(PageNumber).collect();
            check(&mut hasher, &ram, kind, &asked);
        }
    }

    #[test]
    fn pages_left_alone_need_no_hashing_at_the_stop() {
        let (ram, mut hasher, all) = (ram(), hasher(0), all_pages());
        let mut pending = DirtySet::all(PAGES);
        hash_ahead(&mut hasher, HashKind::City128, &ram, &pending);
        assert_eq!(check(&mut hasher, &ram, HashKind::City128, &all), PAGES);
        assert_eq!(check(&mut hasher, &ram, HashKind::Xxh3_128, &all), 0, "hashes of another kind do not count");
        let one = |into: &mut DirtySet| {
            into.insert(PageNumber(5));
            Ok::<(), ()>(())
        };
        hasher.harvest(&mut pending, one).unwrap();
        assert_eq!(check(&mut hasher, &ram, HashKind::City128, &all), PAGES - 1);
        hasher.forget();
        assert_eq!(check(&mut hasher, &ram, HashKind::City128, &all), 0);
    }
}
