//! The tracker on userfaultfd's asynchronous write protection and `PAGEMAP_SCAN`.
//!
//! The agent makes the userfaultfd inside QEMU, because it acts on the address space of its maker; everything
//! else happens here. A harvest is atomic per page: the kernel reports a page as written and protects it
//! again under the page table lock, and flushes the TLBs before it returns, so that a write is either
//! in this harvest (and in memory before it returns) or in the next.
//!
//! The page tables are walked in ranges, each by one call at a time, so that the hash workers can share a large guest
//! among them ([`DirtyTracker::use_pool`]).
//!
//! Rejected: leaving pages that are written in most slots unprotected, so that the guest does not fault on them again. The
//! first write to a page after a harvest costs the guest about a microsecond (row `syncvm.first_write_us` of `perf syncvm`): a
//! small part of what a syncvm costs it as a rule, and each wrong guess has both sides hash a page for nothing. (Not tried
//! where it would gain most: a Redis of 100 000 keys under TCG spends a tenth of its vCPU on these faults.)

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::maps::covering;
use super::sys::{self, PageRegion};
use super::{DirtyTracker, HarvestStats, Mapping, TrackerError, TrackerKind};
use crate::dirty::DirtySet;
use crate::hash::HashPool;
use crate::page::PAGE_BYTES;

/// Regions fetched by one call.
const REGIONS: usize = 4096;
/// Guest memory walked as one task where several threads share the work: long enough to be worth handing out.
const RANGE_BYTES: u64 = 128 << 20;

/// Tracks a process that maps the RAM file and made the userfaultfd.
pub struct UffdTracker {
    /// Tracking lasts as long as this is open.
    _uffd: OwnedFd,
    pagemap: File,
    mappings: Vec<Mapping>,
    /// The mappings, cut for as many threads as there are.
    ranges: Vec<Mapping>,
    pool: Arc<HashPool>,
    /// One buffer per participant of the pool.
    regions: Vec<Mutex<Vec<PageRegion>>>,
}

/// Where the threads of one harvest put what they find.
struct Found<'a> {
    dirty: &'a mut DirtySet,
    stats: HarvestStats,
    error: Option<TrackerError>,
}

impl UffdTracker {
    /// Begins tracking: every page counts as clean from here on.
    ///
    /// # Errors
    /// When the kernel lacks something, the userfaultfd was already in use, or the mappings do not cover
    /// the RAM file.
    pub fn new(uffd: OwnedFd, pid: u32, mappings: &[Mapping], pages: usize) -> Result<Self, TrackerError> {
        let mappings = covering(mappings, pid, pages)?;
        let path = format!("/proc/{pid}/pagemap");
        let pagemap = File::open(&path).map_err(|source| TrackerError::Proc { path, source })?;
        let features =
            sys::UFFD_FEATURE_WP_ASYNC | sys::UFFD_FEATURE_WP_UNPOPULATED | sys::UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        sys::uffd_api(uffd.as_fd(), features)
            .map_err(kernel("UFFDIO_API with WP_ASYNC", " (it needs Linux 6.7 or later)"))?;
        for mapping in &mappings {
            sys::uffd_register_wp(uffd.as_fd(), mapping.start, mapping.bytes)
                .map_err(kernel("UFFDIO_REGISTER", " (is the userfaultfd QEMU's own?)"))?;
            sys::uffd_write_protect(uffd.as_fd(), mapping.start, mapping.bytes)
                .map_err(kernel("UFFDIO_WRITEPROTECT", ""))?;
        }
        let mut tracker = Self {
            _uffd: uffd,
            pagemap,
            mappings,
            ranges: Vec::new(),
            pool: Arc::new(HashPool::new(0)),
            regions: Vec::new(),
        };
        tracker.cut();
        // The first scan proves that PAGEMAP_SCAN exists, before anybody relies on it.
        tracker.harvest(&mut DirtySet::new(pages))?;
        Ok(tracker)
    }

    /// Cuts the mappings for the present number of threads.
    fn cut(&mut self) {
        let participants = self.pool.workers() + 1;
        let limit_bytes = if participants == 1 { u64::MAX } else { RANGE_BYTES };
        self.ranges = self.mappings.iter().flat_map(|mapping| mapping.cut(limit_bytes)).collect();
        self.regions = (0..participants).map(|_| Mutex::new(vec![PageRegion::default(); REGIONS])).collect();
    }

    /// Walks one range to its end.
    fn scan(&self, range: &Mapping, regions: &mut [PageRegion], found: &Mutex<Found<'_>>) -> Result<(), TrackerError> {
        let mut at = range.start;
        while at < range.end() {
            // EINTR is an error as any other: pages may have been protected again without being reported.
            let scanned = sys::scan_written(self.pagemap.as_fd(), at, range.end(), regions);
            let (filled, walked_to) = scanned.map_err(kernel(
                "PAGEMAP_SCAN",
                " (it needs Linux 6.7 or later, and the mapping as it was at the start)",
            ))?;
            let mut found = lock(found);
            found.stats.calls += 1;
            for region in &regions[..filled] {
                let count = ((region.end - region.start) / PAGE_BYTES as u64) as usize;
                found.dirty.insert_range(range.page_at(region.start), count);
                found.stats.pages += count;
                found.stats.ranges += 1;
            }
            if walked_to <= at {
                let stuck = io::Error::other("the scan does not advance");
                return Err(kernel("PAGEMAP_SCAN", "")(stuck));
            }
            at = walked_to;
        }
        Ok(())
    }
}

impl std::fmt::Debug for UffdTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "UffdTracker({} ranges, {} threads)", self.ranges.len(), self.regions.len())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic while it is held ends the harvest.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kernel(request: &'static str, hint: &'static str) -> impl Fn(io::Error) -> TrackerError {
    move |source| TrackerError::Kernel { request, hint, source }
}

impl DirtyTracker for UffdTracker {
    fn harvest(&mut self, into: &mut DirtySet) -> Result<HarvestStats, TrackerError> {
        let found = Mutex::new(Found { dirty: into, stats: HarvestStats::default(), error: None });
        self.pool.threads().run(self.ranges.len(), &|participant, task| {
            let mut regions = lock(&self.regions[participant]);
            if let Err(error) = self.scan(&self.ranges[task], &mut regions, &found) {
                lock(&found).error = Some(error);
            }
        });
        let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        found.error.map_or(Ok(found.stats), Err)
    }

    fn kind(&self) -> TrackerKind {
        TrackerKind::Uffd
    }

    fn exact_while_running(&self) -> bool {
        true
    }

    fn use_pool(&mut self, pool: &Arc<HashPool>) {
        self.pool = Arc::clone(pool);
        self.cut();
    }
}
