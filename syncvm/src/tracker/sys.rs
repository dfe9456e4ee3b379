//! The kernel interfaces that no crate wraps: userfaultfd's asynchronous write protection and `PAGEMAP_SCAN`.
//!
//! Numbers and layouts from Linux `include/uapi/linux/userfaultfd.h` and `fs.h` (6.7).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

const UFFD_API: u64 = 0xAA;
pub const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
pub const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1;

pub const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// `_IOWR(kind, number, T)`.
const fn iowr<T>(kind: u8, number: u8) -> libc::Ioctl {
    (3 << 30 | (size_of::<T>() as u64) << 16 | (kind as u64) << 8 | number as u64) as libc::Ioctl
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PageRegion {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<PmScanArg>() == 96 && size_of::<PageRegion>() == 24);

/// # Safety
/// `argument` must be what `request` expects, including everything it points at.
unsafe fn ioctl<T>(fd: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the caller vouches for the argument; fd is open.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Opens the conversation with a userfaultfd.
pub fn uffd_api(uffd: BorrowedFd<'_>, features: u64) -> io::Result<()> {
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: UFFDIO_API takes a struct uffdio_api and follows no pointers.
    unsafe { ioctl(uffd, iowr::<UffdioApi>(0xAA, 0x3F), &mut api) }?;
    Ok(())
}

/// Registers a range of the userfaultfd's process for write protection.
pub fn uffd_register_wp(uffd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut register = UffdioRegister { range: UffdioRange { start, len }, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER takes a struct uffdio_register; the addresses in it are those of the
    // userfaultfd's own process, where an asynchronous write protection changes no behaviour.
    unsafe { ioctl(uffd, iowr::<UffdioRegister>(0xAA, 0x00), &mut register) }?;
    Ok(())
}

/// Write-protects a registered range.
pub fn uffd_write_protect(uffd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut protect = UffdioWriteprotect { range: UffdioRange { start, len }, mode: UFFDIO_WRITEPROTECT_MODE_WP };
    // SAFETY: as for registering.
    unsafe { ioctl(uffd, iowr::<UffdioWriteprotect>(0xAA, 0x06), &mut protect) }?;
    Ok(())
}

/// Finds the written pages of `start..end`, write-protects them again, and returns how many entries of
/// `regions` are filled and where the walk stopped.
pub fn scan_written(
    pagemap: BorrowedFd<'_>,
    start: u64,
    end: u64,
    regions: &mut [PageRegion],
) -> io::Result<(usize, u64)> {
    let mut scan = PmScanArg {
        size: size_of::<PmScanArg>() as u64,
        flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        start,
        end,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: PAGE_IS_WRITTEN,
        category_anyof_mask: 0,
        return_mask: PAGE_IS_WRITTEN,
    };
    // SAFETY: PAGEMAP_SCAN takes a struct pm_scan_arg and writes at most vec_len entries at vec, which is the
    // exclusively borrowed `regions`.
    let filled = unsafe { ioctl(pagemap, iowr::<PmScanArg>(b'f', 16), &mut scan) }?;
    Ok((filled as usize, scan.walk_end))
}
