//! `GuestRam`: our own shared mapping of the whole RAM file.
//!
//! QEMU maps the same file, and its vCPUs write it whenever the guest runs. So this module never forms a
//! Rust reference to guest memory: pages are copied out into private buffers and in from them, and every
//! comparison and checksum works on a private copy. Only CityHash reads pages where they are, through raw pointers
//! and each word for itself, because the copy would cost a third of the time of hashing.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::SeekFrom;
use thiserror::Error;

use crate::page::{PAGE_BYTES, PageNumber};

const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// Why a RAM file could not be mapped.
#[derive(Debug, Error)]
pub enum RamError {
    /// The file's size could not be read.
    #[error("cannot read the size of the guest's RAM file")]
    Stat(#[source] io::Error),
    /// Not a whole number of pages, empty, or beyond 16 TiB.
    #[error("the guest's RAM file has {bytes} bytes; it must be a positive multiple of {PAGE_BYTES} below 16 TiB")]
    Size {
        /// The file's size.
        bytes: u64,
    },
    /// The file is not as long as the caller was told.
    #[error(
        "the guest's RAM file has {bytes} bytes, but {expected} were announced; give all replicas the same memory size"
    )]
    Length {
        /// The file's size.
        bytes: u64,
        /// What the caller expected.
        expected: u64,
    },
    /// mmap failed.
    #[error("cannot map {bytes} bytes of the guest's RAM file")]
    Map {
        /// How much.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
    fd: OwnedFd,
}

// SAFETY: the mapping is plain shared memory that lives until drop; it is only accessed through raw pointers, by byte
// copies and by volatile or plain reads of words in place (hash/city.rs), which any thread may do. Others write it
// meanwhile: vCPUs, QEMU, and the device of this process through a mapping of its own (see `GuestRam::read_page`).
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a reference into the mapping.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and bytes are exactly what mmap returned, and no pointer into it outlives self.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// The guest's RAM as the backend sees it. Cheap to clone; clones share the mapping.
///
/// Writes through it do not show up in any [`crate::tracker::DirtyTracker`], which watches QEMU's page
/// tables. That is wanted for applying a transfer; whoever writes on behalf of the guest (RX rings) must
/// mark the page dirty in a set of its own, after the write.
#[derive(Clone)]
pub struct GuestRam {
    mapping: Arc<Mapping>,
    pages: usize,
    /// The file lives on tmpfs (memfd included), where a hole is a page of zeros that nobody ever touched.
    sparse: bool,
}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GuestRam({} pages)", self.pages)
    }
}

impl GuestRam {
    /// Maps the whole file behind `fd` (memfd, tmpfs or hugetlbfs), which must have `expected_bytes` if given.
    ///
    /// # Errors
    /// When the size is not what it must be or the mapping fails.
    pub fn new(fd: OwnedFd, expected_bytes: Option<u64>) -> Result<Self, RamError> {
        let file = File::from(fd);
        let bytes = file.metadata().map_err(RamError::Stat)?.len();
        let fd = OwnedFd::from(file);
        if let Some(expected) = expected_bytes
            && expected != bytes
        {
            return Err(RamError::Length { bytes, expected });
        }
        let pages = bytes / PAGE_BYTES as u64;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES as u64) || pages > u64::from(u32::MAX) {
            return Err(RamError::Size { bytes });
        }
        let sparse = rustix::fs::fstatfs(&fd).is_ok_and(|file_system| file_system.f_type == TMPFS_MAGIC);
        // SAFETY: a new mapping at an address of the kernel's choice; fd is open and the length is the file's.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(RamError::Map { bytes, source: io::Error::last_os_error() });
        }
        let base = NonNull::new(base.cast::<u8>()).expect("mmap never returns null without MAP_FIXED");
        Ok(Self { mapping: Arc::new(Mapping { base, bytes: bytes as usize, fd }), pages: pages as usize, sparse })
    }

    /// The first page at or after `from` that has memory behind it (`pages()` if none has). The pages before it
    /// are zero, and reading them would allocate them: a sparse guest would be blown up to its full size.
    ///
    /// Says `from` itself where the file system cannot tell.
    #[must_use]
    pub fn next_backed(&self, from: PageNumber) -> PageNumber {
        if !self.sparse {
            return from;
        }
        // The seek position of the file is shared with QEMU, which does not use it for its RAM.
        match rustix::fs::seek(self.fd(), SeekFrom::Data(from.file_offset() as u64)) {
            Ok(offset) => PageNumber((offset / PAGE_BYTES as u64) as u32),
            Err(rustix::io::Errno::NXIO) => PageNumber(self.pages as u32),
            Err(_) => from,
        }
    }

    /// How many pages the RAM file has.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// The RAM file, for finding QEMU's mapping of it.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        use std::os::fd::AsFd;
        self.mapping.fd.as_fd()
    }

    /// Copies a page out.
    ///
    /// The guest may write it at the same time. The copy then holds a mixture of old and new bytes,
    /// which is harmless where it is used: such a page is in the next harvest and is looked at again.
    ///
    /// # Panics
    /// When the page lies beyond the RAM file, or `into` is not one page long.
    pub fn read_page(&self, page: PageNumber, into: &mut [u8]) {
        assert_eq!(into.len(), PAGE_BYTES, "a page is copied whole");
        let from = self.page_pointer(page);
        // SAFETY: `from` points at PAGE_BYTES mapped bytes (page_pointer checks) and `into` is a private
        // buffer of the same length, so they do not overlap. A concurrent writer is another process's vCPU
        // (or our own `write_page` for a page whose content the caller then discards): no Rust reference
        // to the source exists on either side, every bit pattern is a valid u8, and the copy goes through
        // a raw pointer into memory that the compiler knows nothing about.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), PAGE_BYTES) };
    }

    /// Overwrites a page. Only for a guest that does not run.
    ///
    /// # Panics
    /// When the page lies beyond the RAM file, or `from` is not one page long.
    pub fn write_page(&self, page: PageNumber, from: &[u8]) {
        assert_eq!(from.len(), PAGE_BYTES, "a page is written whole");
        let into = self.page_pointer(page);
        // SAFETY: as in read_page with the roles exchanged; the mapping is writable.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into, PAGE_BYTES) };
    }

    /// Makes a page zero. Only for a guest that does not run.
    ///
    /// # Panics
    /// When the page lies beyond the RAM file.
    pub fn zero_page(&self, page: PageNumber) {
        // SAFETY: page_pointer gives PAGE_BYTES writable mapped bytes.
        unsafe { std::ptr::write_bytes(self.page_pointer(page), 0, PAGE_BYTES) };
    }

    /// Begins to fetch a page that is read soon. The first lines are enough: the core's own prefetching follows a stream
    /// within a page, but does not begin one (measured: 4 lines are as good as 1 or 8, all 64 are worse than none).
    pub(crate) fn prefetch(&self, page: PageNumber) {
        #[cfg(target_arch = "x86_64")]
        for line in 0..4 {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: the address is within the mapping, and prefetching has no effect that a program could see.
            unsafe { _mm_prefetch(self.page_pointer(page).add(line * 64).cast::<i8>(), _MM_HINT_T0) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = page;
    }

    /// Where a page is mapped: PAGE_BYTES readable and writable bytes.
    ///
    /// # Panics
    /// When the page lies beyond the RAM file.
    pub(crate) fn page_pointer(&self, page: PageNumber) -> *mut u8 {
        assert!(page.index() < self.pages, "{page} is beyond {} pages", self.pages);
        // SAFETY: the offset is below pages * PAGE_BYTES, which is the length of the mapping.
        unsafe { self.mapping.base.as_ptr().add(page.file_offset()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn memfd(bytes: u64) -> OwnedFd {
        let fd = memfd_create("plover-ram-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fd
    }

    #[test]
    fn pages_go_in_and_come_out_and_neighbours_stay() {
        let fd = memfd(3 * 4096);
        let ram = GuestRam::new(fd.try_clone().unwrap(), Some(3 * 4096)).unwrap();
        let other = GuestRam::new(fd, None).unwrap();
        ram.write_page(PageNumber(1), &[7; PAGE_BYTES]);
        let mut page = [1; PAGE_BYTES];
        other.read_page(PageNumber(1), &mut page);
        assert_eq!(page, [7; PAGE_BYTES], "both mappings show one file");
        for neighbour in [0, 2] {
            other.read_page(PageNumber(neighbour), &mut page);
            assert_eq!(page, [0; PAGE_BYTES]);
        }
        other.zero_page(PageNumber(1));
        ram.read_page(PageNumber(1), &mut page);
        assert_eq!(page, [0; PAGE_BYTES]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        assert!(matches!(GuestRam::new(memfd(0), None), Err(RamError::Size { bytes: 0 })));
        assert!(matches!(GuestRam::new(memfd(5000), None), Err(RamError::Size { .. })));
        assert!(matches!(GuestRam::new(memfd(8192), Some(4096)), Err(RamError::Length { .. })));
    }

    #[test]
    #[should_panic(expected = "beyond 1 pages")]
    fn a_page_beyond_the_file_is_a_bug() {
        GuestRam::new(memfd(4096), None).unwrap().zero_page(PageNumber(1));
    }
}
