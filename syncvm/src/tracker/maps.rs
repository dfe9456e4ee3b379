//! Finds where a process maps the RAM file, from `/proc/PID/maps`.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;

use super::TrackerError;
use crate::dirty::DirtySet;
use crate::page::PAGE_BYTES;

const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;

/// One mapping of (a part of) the RAM file in the traced process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Virtual address of its first byte in that process.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// The page of the RAM file at its start.
    pub first_page: usize,
    /// Bytes of one page of its page table: more than [`PAGE_BYTES`] for huge pages. Cuts must not divide one.
    pub granule_bytes: u64,
}

impl Mapping {
    /// Address after its last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start + self.bytes
    }

    /// The page of the RAM file at `address`, which must lie within.
    pub(super) fn page_at(&self, address: u64) -> usize {
        self.first_page + ((address - self.start) / PAGE_BYTES as u64) as usize
    }

    /// This mapping in parts of at most `limit_bytes`, or of one granule if that is larger.
    pub(super) fn cut(self, limit_bytes: u64) -> impl Iterator<Item = Mapping> {
        let step = (limit_bytes / self.granule_bytes).max(1).saturating_mul(self.granule_bytes);
        let parts = self.bytes.div_ceil(step);
        (0..parts).map(move |part| {
            let offset = part * step;
            let start = self.start + offset;
            Mapping { start, bytes: step.min(self.bytes - offset), first_page: self.page_at(start), ..self }
        })
    }
}

/// All shared writable mappings of the file `ram` in process `pid`.
///
/// # Errors
/// When the process cannot be looked at or does not map the file.
pub fn find_mappings(pid: u32, ram: BorrowedFd<'_>) -> Result<Vec<Mapping>, TrackerError> {
    let path = format!("/proc/{pid}/maps");
    let failed = |source| TrackerError::Proc { path: path.clone(), source };
    let granule_bytes = granule_bytes(ram);
    let file = File::from(ram.try_clone_to_owned().map_err(failed)?);
    let metadata = file.metadata().map_err(failed)?;
    let text = std::fs::read_to_string(&path).map_err(failed)?;
    let mappings: Vec<Mapping> =
        text.lines().filter_map(|line| parse_line(line, metadata.dev(), metadata.ino(), granule_bytes)).collect();
    if mappings.is_empty() {
        return Err(TrackerError::NotMapped { pid });
    }
    Ok(mappings)
}

/// The size of the pages that hugetlbfs gives to the file, which is also its block size; else that of ours.
fn granule_bytes(ram: BorrowedFd<'_>) -> u64 {
    match rustix::fs::fstatfs(ram) {
        Ok(file_system) if file_system.f_type == HUGETLBFS_MAGIC => file_system.f_bsize as u64,
        _ => PAGE_BYTES as u64,
    }
}

/// `start-end perms offset major:minor inode path`, all numbers but the inode in hexadecimal.
fn parse_line(line: &str, device: u64, inode: u64, granule_bytes: u64) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let this_device = libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let this_inode: u64 = fields.next()?.parse().ok()?;
    let shared = permissions.contains('w') && permissions.ends_with('s');
    if !shared || this_device != device || this_inode != inode {
        return None;
    }
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    let first_page = (offset / PAGE_BYTES as u64) as usize;
    Some(Mapping { start, bytes: end.checked_sub(start)?, first_page, granule_bytes })
}

/// The mappings cut to the file, which together must cover every page of it.
pub(super) fn covering(mappings: &[Mapping], pid: u32, pages: usize) -> Result<Vec<Mapping>, TrackerError> {
    let mut covered = DirtySet::new(pages);
    let mut cut = Vec::new();
    for mapping in mappings {
        let room = pages.saturating_sub(mapping.first_page) as u64 * PAGE_BYTES as u64;
        let bytes = mapping.bytes.min(room);
        if bytes > 0 {
            covered.insert_range(mapping.first_page, bytes as usize / PAGE_BYTES);
            cut.push(Mapping { bytes, ..*mapping });
        }
    }
    if !covered.is_all() {
        return Err(TrackerError::PartlyMapped { pid, mapped: covered.count(), pages });
    }
    Ok(cut)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_maps_are_understood_and_others_ignored() {
        let line = "7f00a000-7f00c000 rw-s 00001000 00:01 4242                       /memfd:ram (deleted)";
        let expected = Mapping { start: 0x7f00_a000, bytes: 0x2000, first_page: 1, granule_bytes: 4096 };
        assert_eq!(parse_line(line, libc::makedev(0, 1), 4242, 4096), Some(expected));
        assert_eq!(parse_line(line, libc::makedev(0, 1), 4243, 4096), None);
        assert_eq!(parse_line(line, libc::makedev(0, 2), 4242, 4096), None);
        let private = line.replace("rw-s", "rw-p");
        assert_eq!(parse_line(&private, libc::makedev(0, 1), 4242, 4096), None);
        assert_eq!(parse_line("garbage", 0, 0, 4096), None);
    }

    #[test]
    fn a_partial_mapping_is_refused() {
        let mapping = Mapping { start: 0x1000, bytes: 0x3000, first_page: 0, granule_bytes: 4096 };
        assert_eq!(covering(&[mapping], 1, 3).unwrap(), [mapping]);
        assert_eq!(covering(&[mapping], 1, 2).unwrap()[0].bytes, 0x2000);
        assert!(matches!(covering(&[mapping], 1, 4), Err(TrackerError::PartlyMapped { mapped: 3, pages: 4, .. })));
    }
    #[test]
    fn parts_cover_a_mapping_and_divide_no_granule() {
        const MIB: u64 = 1 << 20;
        for granule_bytes in [4096, 2 * MIB, 1024 * MIB] {
            let whole = Mapping { start: 1 << 40, bytes: 5 * 1024 * MIB, first_page: 512, granule_bytes };
            for limit_bytes in [1, 100 * MIB + 4096, 128 * MIB, u64::MAX] {
                if granule_bytes == 4096 && limit_bytes == 1 {
                    continue;
                }
                let parts: Vec<Mapping> = whole.cut(limit_bytes).collect();
                let mut at = whole.start;
                for part in &parts {
                    assert_eq!((part.start, part.first_page), (at, whole.page_at(at)));
                    assert!(part.bytes <= limit_bytes.max(granule_bytes) && part.bytes.is_multiple_of(granule_bytes));
                    at = part.end();
                }
                assert_eq!(at, whole.end());
                assert!(limit_bytes < u64::MAX || parts.len() == 1);
            }
        }
    }
}
