//! `SlotHasher`: page hashes that are made while the guest runs, so that at the stop only pages written since need hashing.
//!
//! Hashes are only kept within a slot and only for pages that this side wrote in it. One rule makes them right: **harvest first,
//! then read**. A page that is written after it was read, or while it is read, is in a later harvest, and a harvest
//! takes the hashes of its pages away; the last harvest is that of the stop, when nobody writes any more.
//!
//! Harvesting a running guest costs it a fault for each page that it writes again, and hashes of such pages are made for
//! nothing. So the time between two harvests adapts itself ([`Pace`]): it grows while much of what was hashed
//! is written again, or little is written at all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{HASH_BYTES, HashKind, HashPool, PageHashValue};
use crate::dirty::DirtySet;
use crate::page::PageNumber;
use crate::ram::GuestRam;

/// Pages hashed before the owner looks at its other work again: 0.1 to 0.3 ms on one core.
const TURN_PAGES: usize = 512;

/// When the next harvest of the running guest is due.
#[derive(Debug)]
struct Pace {
    period: Duration,
    due: Instant,
}

impl Pace {
    const LEAST: Duration = Duration::from_millis(5);
    const FIRST: Duration = Duration::from_millis(10);
    const MOST: Duration = Duration::from_millis(320);
    /// A harvest with fewer pages is hardly worth it.
    const FEW_PAGES: usize = 64;
    /// Harvests take at most this part of the time.
    const SHARE: u32 = 20;

    fn new() -> Self {
        Self { period: Self::FIRST, due: Instant::now() + Self::FIRST }
    }

    fn restart(&mut self) {
        self.due = Instant::now() + self.period;
    }

    /// A harvest that took `took` found `pages`, of which `hashed` had a hash that was made for nothing.
    fn adapt(&mut self, took: Duration, pages: usize, hashed: usize) {
        if hashed * 2 > pages || pages < Self::FEW_PAGES {
            self.period = (self.period * 2).min(Self::MOST);
        } else if hashed * 8 < pages {
            self.period = (self.period / 2).max(Self::LEAST);
        }
        self.period = self.period.max(took * Self::SHARE);
        self.restart();
    }
}

#[derive(Debug)]
struct Cache {
    kind: HashKind,
    hashes: Vec<PageHashValue>,
    /// Pages whose hash is known.
    valid: DirtySet,
    /// Pages written in this slot and not hashed since.
    written: DirtySet,
    /// The pages of one harvest.
    harvested: DirtySet,
    turn: Vec<PageNumber>,
    turn_hashes: Vec<PageHashValue>,
    pace: Pace,
}

/// A [`HashPool`] for one guest, with the hashes that were made in the background, if that is switched on.
pub struct SlotHasher {
    pool: Arc<HashPool>,
    cache: Option<Cache>,
}

impl SlotHasher {
    /// Without anything in the background.
    #[must_use]
    pub fn new(pool: Arc<HashPool>) -> Self {
        Self { pool, cache: None }
    }

    /// Switches hashing in the background on or off, for a guest with `pages` pages. Takes 16 bytes per page.
    pub fn set_background(&mut self, on: bool, pages: usize) {
        self.cache = on.then(|| Cache {
            kind: HashKind::default(),
            hashes: vec![[0; HASH_BYTES]; pages],
            valid: DirtySet::new(pages),
            written: DirtySet::new(pages),
            harvested: DirtySet::new(pages),
            turn: Vec::with_capacity(TURN_PAGES),
            turn_hashes: Vec::with_capacity(TURN_PAGES),
            pace: Pace::new(),
        });
    }

    /// The pool alone, for what must not rest on what is known.
    #[must_use]
    pub fn pool(&self) -> &HashPool {
        &self.pool
    }

    /// Whether hashes are made in the background.
    #[must_use]
    pub fn in_background(&self) -> bool {
        self.cache.is_some()
    }

    /// The hash of a page that was not written since it was made, as far as harvested.
    #[must_use]
    pub fn lookup(&self, kind: HashKind, page: PageNumber) -> Option<PageHashValue> {
        let cache = self.cache.as_ref()?;
        (cache.kind == kind && cache.valid.contains(page)).then(|| cache.hashes[page.index()])
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
        let Some(cache) = &mut self.cache else { return harvest(into) };
        cache.harvested.clear();
        let result = harvest(&mut cache.harvested);
        if result.is_err() {
            cache.valid.clear();
        }
        into.union_with(&cache.harvested);
        cache.valid.subtract(&cache.harvested);
        cache.written.union_with(&cache.harvested);
        result
    }

    /// A new slot begins, or this guest's memory was written by us: no hash is known.
    pub fn forget(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.valid.clear();
            cache.written.clear();
            cache.pace.restart();
        }
    }

    /// Whether a harvest of the running guest is due: everything harvested is hashed, and the time has come.
    #[must_use]
    pub fn harvest_is_due(&self, now: Instant) -> bool {
        self.cache.as_ref().is_some_and(|cache| cache.written.is_empty() && now >= cache.pace.due)
    }

    /// As [`Self::harvest`], while the guest runs; sets the time of the next one.
    ///
    /// # Errors
    /// As [`Self::harvest`].
    pub fn harvest_live<E>(
        &mut self,
        into: &mut DirtySet,
        harvest: impl FnOnce(&mut DirtySet) -> Result<(), E>,
    ) -> Result<(), E> {
        let known = |hasher: &Self| hasher.cache.as_ref().map_or(0, |cache| cache.valid.count());
        let (start, before) = (Instant::now(), known(self));
        let result = self.harvest(into, harvest);
        let hashed = before - known(self);
        if let Some(cache) = &mut self.cache {
            cache.pace.adapt(start.elapsed(), cache.harvested.count(), hashed);
        }
        result
    }

    /// Hashes some of the harvested pages. Says when to come again: at once, or when the next harvest is due.
    pub fn hash_some(&mut self, kind: HashKind, ram: &GuestRam) -> Option<Instant> {
        let cache = self.cache.as_mut()?;
        if cache.kind != kind {
            cache.kind = kind;
            cache.written.union_with(&cache.valid);
            cache.valid.clear();
        }
        cache.turn.clear();
        cache.turn.extend(cache.written.iter().take(TURN_PAGES));
        if cache.turn.is_empty() {
            return Some(cache.pace.due);
        }
        self.pool.hash_pages_into(kind, ram, &cache.turn, &mut cache.turn_hashes);
        for (page, hash) in cache.turn.iter().zip(&cache.turn_hashes) {
            cache.hashes[page.index()] = *hash;
            cache.valid.insert(*page);
        }
        cache.written.subtract(&cache.valid);
        Some(Instant::now())
    }

    /// The hashes of `pages` of the stopped guest, in their order: known ones, and the others from the pool.
    ///
    /// # Panics
    /// When a page lies beyond the RAM file.
    #[must_use]
    pub fn hash_pages(&self, kind: HashKind, ram: &GuestRam, pages: &[PageNumber]) -> Vec<PageHashValue> {
        let mut missing = Vec::new();
        let mut hashes = Vec::with_capacity(pages.len());
        if self.cache.is_some() {
            for (at, &page) in pages.iter().enumerate() {
                let known = self.lookup(kind, page);
                hashes.push(known.unwrap_or_default());
                if known.is_none() {
                    missing.push((at, page));
                }
            }
        }
        if missing.len() == pages.len() || self.cache.is_none() {
            self.pool.hash_pages_into(kind, ram, pages, &mut hashes);
            return hashes;
        }
        let unknown: Vec<PageNumber> = missing.iter().map(|(_, page)| *page).collect();
        let found = self.pool.hash_pages(kind, ram, &unknown);
        for ((at, _), hash) in missing.iter().zip(found) {
            hashes[*at] = hash;
        }
        hashes
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

    const PAGES: usize = 700;

    fn ram() -> GuestRam {
        let fd = memfd_create("plover-cache-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, (PAGES * PAGE_BYTES) as u64).unwrap();
        GuestRam::new(fd, None).unwrap()
    }

    fn hasher(workers: usize) -> SlotHasher {
        let mut hasher = SlotHasher::new(Arc::new(HashPool::new(workers)));
        hasher.set_background(true, PAGES);
        hasher
    }

    /// At the stop: every hash is that of the page as it is, known or not.
    fn check(hasher: &SlotHasher, ram: &GuestRam, kind: HashKind) -> usize {
        let pages: Vec<PageNumber> = (0..PAGES as u32).map(PageNumber).collect();
        let fresh = HashPool::new(0).hash_pages(kind, ram, &pages);
        assert!(hasher.hash_pages(kind, ram, &pages) == fresh, "a hash is not that of its page");
        pages.iter().filter(|page| hasher.lookup(kind, **page).is_some()).count()
    }

    #[test]
    fn what_races_with_a_writer_is_hashed_again() {
        for workers in [0, 1] {
            let (ram, mut hasher) = (ram(), hasher(workers));
            let dirty = Mutex::new(DirtySet::new(PAGES));
            let stop = AtomicBool::new(false);
            let harvest = |into: &mut DirtySet| {
                let mut dirty = dirty.lock().unwrap();
                into.union_with(&dirty);
                dirty.clear();
                Ok::<(), Infallible>(())
            };
            let mut pending = DirtySet::new(PAGES);
            let known = std::thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    let mut at = 0usize;
                    // Some pages again and again, some once; the page first, its bit after.
                    while !stop.load(Ordering::Relaxed) {
                        let page = if at.is_multiple_of(3) { 300 + at / 3 % 400 } else { at % 7 };
                        ram.write_page(PageNumber(page as u32), &[at as u8; PAGE_BYTES]);
                        dirty.lock().unwrap().insert(PageNumber(page as u32));
                        at += 1;
                    }
                });
                let start = Instant::now();
                let mut rounds = 0;
                while (rounds < 40 || pending.count() < 300) && start.elapsed() < Duration::from_secs(20) {
                    rounds += 1;
                    hasher.harvest_live(&mut pending, harvest).unwrap();
                    while !hasher.cache.as_ref().unwrap().written.is_empty() {
                        hasher.hash_some(HashKind::City128, &ram).unwrap();
                    }
                }
                stop.store(true, Ordering::Relaxed);
                writer.join().unwrap();
                hasher.harvest(&mut pending, harvest).unwrap();
                check(&hasher, &ram, HashKind::City128)
            });
            assert!(known < PAGES && pending.count() > 7, "{known} known of {}", pending.count());
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u32, u8),
        Harvest(bool),
        Hash(HashKind),
        Forget,
    }

    fn op() -> impl Strategy<Value = Op> {
        let kind = prop_oneof![9 => Just(HashKind::City128), 1 => Just(HashKind::Xxh3_128)];
        prop_oneof![
            10 => (0..PAGES as u32, any::<u8>()).prop_map(|(page, fill)| Op::Write(page, fill)),
            4 => prop_oneof![9 => Just(true), 1 => Just(false)].prop_map(Op::Harvest),
            4 => kind.prop_map(Op::Hash),
            1 => Just(Op::Forget),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]
        #[test]
        fn whatever_happens_in_a_slot_the_hashes_at_the_stop_are_right(ops in prop::collection::vec(op(), 0..80)) {
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
                    Op::Hash(next) => {
                        kind = next;
                        hasher.hash_some(kind, &ram);
                    }
                    Op::Forget => hasher.forget(),
                }
            }
            hasher.harvest(&mut pending, |into| { into.union_with(&dirty); Ok::<(), ()>(()) }).unwrap();
            check(&hasher, &ram, kind);
            check(&hasher, &ram, HashKind::City128);
        }
    }

    #[test]
    fn pages_left_alone_need_no_hashing_at_the_stop() {
        let (ram, mut hasher) = (ram(), hasher(0));
        let mut pending = DirtySet::new(PAGES);
        let all = |into: &mut DirtySet| {
            into.fill();
            Ok::<(), ()>(())
        };
        assert!(!hasher.harvest_is_due(Instant::now()), "a slot has just begun");
        let due = hasher.hash_some(HashKind::City128, &ram).unwrap();
        assert!(hasher.harvest_is_due(due));
        hasher.harvest_live(&mut pending, all).unwrap();
        assert!(!hasher.harvest_is_due(due + Duration::from_secs(9)), "hashing comes first");
        for _ in 0..PAGES.div_ceil(TURN_PAGES) {
            assert!(hasher.hash_some(HashKind::City128, &ram).unwrap() <= Instant::now());
        }
        assert!(hasher.hash_some(HashKind::City128, &ram).unwrap() > Instant::now(), "all is done");
        assert_eq!(check(&hasher, &ram, HashKind::City128), PAGES);
        assert_eq!(check(&hasher, &ram, HashKind::Xxh3_128), 0, "hashes of another kind do not count");
        hasher.forget();
        assert_eq!(check(&hasher, &ram, HashKind::City128), 0);
    }

    #[test]
    fn the_pace_follows_what_the_harvests_find() {
        let mut pace = Pace::new();
        let short = Duration::from_micros(10);
        for _ in 0..9 {
            pace.adapt(short, 1000, 900);
        }
        assert_eq!(pace.period, Pace::MOST, "written again and again");
        for _ in 0..9 {
            pace.adapt(short, 1000, 10);
        }
        assert_eq!(pace.period, Pace::LEAST);
        pace.adapt(short, 1000, 300);
        assert_eq!(pace.period, Pace::LEAST, "in between it stays");
        pace.adapt(short, 3, 0);
        assert_eq!(pace.period, Pace::LEAST * 2, "an idle guest");
        pace.adapt(Duration::from_millis(5), 1000, 10);
        assert_eq!(pace.period, Duration::from_millis(100), "a large guest");
    }
}
