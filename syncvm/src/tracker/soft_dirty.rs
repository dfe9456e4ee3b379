//! The tracker on soft-dirty bits, for kernels without asynchronous write protection.
//!
//! Reading the bits and clearing them are two steps, so a page written between them is lost: a harvest is
//! exact only while the guest is stopped ([`DirtyTracker::exact_while_running`] says so). A page that is not
//! present in the process's page table has no bit, so it counts as dirty: the kernel may have taken it
//! out, bit included, to reclaim memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use super::maps::covering;
use super::{DirtyTracker, HarvestStats, Mapping, TrackerError, TrackerKind};
use crate::dirty::DirtySet;
use crate::page::PAGE_BYTES;

const SOFT_DIRTY: u64 = 1 << 55;
const PRESENT: u64 = 1 << 63;
const CLEAR_SOFT_DIRTY: &[u8] = b"4";
/// pagemap entries read at a time.
const ENTRIES: usize = 8192;

/// Tracks a process that maps the RAM file.
#[derive(Debug)]
pub struct SoftDirtyTracker {
    pagemap: File,
    clear_refs: File,
    path: String,
    mappings: Vec<Mapping>,
    entries: Vec<u8>,
}

impl SoftDirtyTracker {
    /// Begins tracking: every present page counts as clean from here on.
    ///
    /// # Errors
    /// When the process's files cannot be used or the mappings do not cover the RAM file.
    pub fn new(pid: u32, mappings: &[Mapping], pages: usize) -> Result<Self, TrackerError> {
        let open = |name: &str, write: bool| {
            let path = format!("/proc/{pid}/{name}");
            OpenOptions::new()
                .read(!write)
                .write(write)
                .open(&path)
                .map_err(|source| TrackerError::Proc { path, source })
        };
        let mut tracker = Self {
            pagemap: open("pagemap", false)?,
            clear_refs: open("clear_refs", true)?,
            path: format!("/proc/{pid}"),
            mappings: covering(mappings, pid, pages)?,
            entries: vec![0; ENTRIES * 8],
        };
        tracker.clear()?;
        Ok(tracker)
    }

    fn clear(&mut self) -> Result<(), TrackerError> {
        let written = self.clear_refs.write_all(CLEAR_SOFT_DIRTY);
        written.map_err(|source| TrackerError::Proc { path: format!("{}/clear_refs", self.path), source })
    }

    fn read(&mut self, into: &mut DirtySet, stats: &mut HarvestStats) -> io::Result<()> {
        for mapping in &self.mappings {
            let first = mapping.start / PAGE_BYTES as u64;
            let count = (mapping.bytes / PAGE_BYTES as u64) as usize;
            for chunk in (0..count).step_by(ENTRIES) {
                let take = ENTRIES.min(count - chunk);
                let bytes = &mut self.entries[..take * 8];
                self.pagemap.read_exact_at(bytes, (first + chunk as u64) * 8)?;
                stats.calls += 1;
                for (index, entry) in bytes.as_chunks::<8>().0.iter().enumerate() {
                    let entry = u64::from_le_bytes(*entry);
                    if entry & PRESENT == 0 || entry & SOFT_DIRTY != 0 {
                        into.insert_range(mapping.first_page + chunk + index, 1);
                        stats.pages += 1;
                    }
                }
            }
        }
        stats.ranges = stats.pages;
        Ok(())
    }
}

impl DirtyTracker for SoftDirtyTracker {
    fn harvest(&mut self, into: &mut DirtySet) -> Result<HarvestStats, TrackerError> {
        let mut stats = HarvestStats::default();
        self.read(into, &mut stats)
            .map_err(|source| TrackerError::Proc { path: format!("{}/pagemap", self.path), source })?;
        self.clear()?;
        stats.calls += 1;
        Ok(stats)
    }

    fn kind(&self) -> TrackerKind {
        TrackerKind::SoftDirty
    }

    fn exact_while_running(&self) -> bool {
        false
    }
}

/// Whether this kernel sets soft-dirty bits: a page of our own is dirtied and looked at. Clearing our own bits
/// disturbs nobody; nothing else here uses them.
pub(super) fn supported() -> bool {
    let probe = || -> io::Result<bool> {
        let bytes = 2 * PAGE_BYTES;
        let mut page = vec![1u8; bytes];
        let middle = page.as_ptr().align_offset(PAGE_BYTES);
        let number = (page.as_ptr() as u64 + middle as u64) / PAGE_BYTES as u64;
        let pagemap = File::open("/proc/self/pagemap")?;
        let is_dirty = || -> io::Result<bool> {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, number * 8)?;
            Ok(u64::from_le_bytes(entry) & SOFT_DIRTY != 0)
        };
        std::fs::write("/proc/self/clear_refs", CLEAR_SOFT_DIRTY)?;
        let before = is_dirty()?;
        std::hint::black_box(&mut page)[middle] = 2;
        Ok(!before && is_dirty()?)
    };
    probe().unwrap_or(false)
}
