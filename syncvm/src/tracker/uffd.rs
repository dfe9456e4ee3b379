//! The tracker on userfaultfd's asynchronous write protection and `PAGEMAP_SCAN`.
//!
//! The agent makes the userfaultfd inside QEMU, because it acts on the address space of its maker; everything
//! else happens here. A harvest is atomic per page: the kernel reports a page as written and protects it
//! again under the page table lock, and flushes the TLBs before it returns, so that a write is either
//! in this harvest (and in memory before it returns) or in the next.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::maps::covering;
use super::sys::{self, PageRegion};
use super::{DirtyTracker, HarvestStats, Mapping, TrackerError, TrackerKind};
use crate::dirty::DirtySet;
use crate::page::PAGE_BYTES;

/// Ranges fetched by one call.
const REGIONS: usize = 4096;

/// Tracks a process that maps the RAM file and made the userfaultfd.
#[derive(Debug)]
pub struct UffdTracker {
    /// Tracking lasts as long as this is open.
    _uffd: OwnedFd,
    pagemap: File,
    mappings: Vec<Mapping>,
    regions: Vec<PageRegion>,
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
        let mut tracker = Self { _uffd: uffd, pagemap, mappings, regions: vec![PageRegion::default(); REGIONS] };
        // The first scan proves that PAGEMAP_SCAN exists, before anybody relies on it.
        tracker.harvest(&mut DirtySet::new(pages))?;
        Ok(tracker)
    }
}

fn kernel(request: &'static str, hint: &'static str) -> impl Fn(io::Error) -> TrackerError {
    move |source| TrackerError::Kernel { request, hint, source }
}

impl DirtyTracker for UffdTracker {
    fn harvest(&mut self, into: &mut DirtySet) -> Result<HarvestStats, TrackerError> {
        let mut stats = HarvestStats::default();
        for mapping in &self.mappings {
            let mut at = mapping.start;
            while at < mapping.end() {
                let scanned = sys::scan_written(self.pagemap.as_fd(), at, mapping.end(), &mut self.regions);
                let (filled, walked_to) = match scanned {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    other => other.map_err(kernel(
                        "PAGEMAP_SCAN",
                        " (it needs Linux 6.7 or later, and the mapping as it was at the start)",
                    ))?,
                };
                stats.calls += 1;
                for region in &self.regions[..filled] {
                    let count = ((region.end - region.start) / PAGE_BYTES as u64) as usize;
                    into.insert_range(mapping.page_at(region.start), count);
                    stats.pages += count;
                    stats.ranges += 1;
                }
                if walked_to <= at {
                    let stuck = io::Error::other("the scan does not advance");
                    return Err(kernel("PAGEMAP_SCAN", "")(stuck));
                }
                at = walked_to;
            }
        }
        Ok(stats)
    }

    fn kind(&self) -> TrackerKind {
        TrackerKind::Uffd
    }

    fn exact_while_running(&self) -> bool {
        true
    }
}
