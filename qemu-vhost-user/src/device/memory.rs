//! Guest memory as the device sees it: the shared files that QEMU hands over, each mapped once and whole, the table that
//! places parts of them at guest-physical addresses, and a record of every page that this process wrote.
//!
//! A file is mapped whole rather than region by region (vm-memory's `GuestMemoryMmap`), for three reasons: a second memory
//! table over the same file, which QEMU sends at every `cont` and when the firmware moves a window, costs no mmap and no page
//! faults; the dirty bits belong to the file, so no change of the table can lose one; and a region of a hugepage file need not
//! begin on a hugepage boundary.
//!
//! Guest memory is never a Rust reference to bytes: the guest changes it at any time. What is not on the packet path goes through
//! vm-memory's `VolatileSlice`, which marks what it writes. The packet path uses [`Area`] (atomics, for ring fields)
//! and [`GuestRam::fill`] and [`GuestRam::take`] (copies, for frames); they mark nothing by themselves, because a mark per write costs
//! a locked instruction that waits for every store before it. Instead a burst is written, then one fence is passed, then its pages
//! are marked: [`fence_before_marks`].

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::mm::{Advice, MapFlags, ProtFlags};
use thiserror::Error;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

/// Granularity of dirty tracking, in bytes; page numbers that leave this module count these.
pub const PAGE_BYTES: u64 = 4096;

/// Which file holds guest memory. Two mappings with one identity are the same memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RamIdentity {
    /// `st_dev` of the file.
    pub device: u64,
    /// `st_ino` of the file.
    pub inode: u64,
    /// Length of the file in bytes when it was mapped.
    pub length_bytes: u64,
}

/// Why a memory table was refused.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The descriptor could not be examined.
    #[error("guest memory region {region}: cannot stat the file that QEMU sent: {source}")]
    Stat {
        /// Position in the table.
        region: usize,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The region reaches past the end of its file, where an access would raise SIGBUS.
    #[error(
        "guest memory region {region} covers bytes {start:#x}+{size:#x} of a file of {length:#x} bytes; \
         give QEMU a memory-backend-file or memory-backend-memfd with share=on and the guest's whole size"
    )]
    PastEnd {
        /// Position in the table.
        region: usize,
        /// First byte in the file.
        start: u64,
        /// Length of the region in bytes.
        size: u64,
        /// Length of the file in bytes.
        length: u64,
    },
    /// The kernel refused the mapping.
    #[error("guest memory region {region}: cannot map {length:#x} bytes: {source}; is the memory backend share=on?")]
    Map {
        /// Position in the table.
        region: usize,
        /// Length of the file in bytes.
        length: u64,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// An address range wraps around or is empty.
    #[error("guest memory region {region}: the range {start:#x}+{size:#x} is empty or wraps around")]
    BadRange {
        /// Position in the table.
        region: usize,
        /// Start of the range.
        start: u64,
        /// Length in bytes.
        size: u64,
    },
    /// Two regions claim the same guest-physical addresses.
    #[error("guest memory regions overlap at guest-physical address {address:#x}")]
    Overlap {
        /// First address claimed twice.
        address: u64,
    },
}

/// One bit per page of a RAM file, set by every write of this process.
#[derive(Debug)]
pub(crate) struct DirtyBits {
    words: Vec<AtomicU64>,
}

impl DirtyBits {
    fn new(length_bytes: u64) -> Self {
        let words = length_bytes.div_ceil(PAGE_BYTES).div_ceil(64);
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Calls `sink` with each dirty page, ascending, and clears it.
    fn drain(&self, sink: &mut dyn FnMut(u64)) {
        for (number, word) in self.words.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::AcqRel);
            while bits != 0 {
                sink(number as u64 * 64 + u64::from(bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
        // The other half of `mark_fenced`: the pages are read after their bits were taken.
        fence(Ordering::SeqCst);
    }

    /// Marks what was written before the caller's last [`fence_before_marks`].
    ///
    /// A bit that is set already is left alone. That is right only behind the fence: either a drain that runs at the same time
    /// has yet to take the bit, and then its reader sees the bytes, which precede the fence; or it has taken it, and then it is
    /// seen here as clear and set again.
    #[inline]
    fn mark_fenced(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let last = (offset + len - 1) / PAGE_BYTES as usize;
        let mut page = offset / PAGE_BYTES as usize;
        while page <= last {
            let bit = 1 << (page % 64);
            match self.words.get(page / 64) {
                Some(word) if word.load(Ordering::Relaxed) & bit == 0 => _ = word.fetch_or(bit, Ordering::AcqRel),
                _ => {}
            }
            page += 1;
        }
    }
}

/// Stands between the writes of a burst and the marks of its pages, once for all of them.
#[inline]
pub(crate) fn fence_before_marks() {
    dataplane::full_fence();
}

impl<'a> WithBitmapSlice<'a> for DirtyBits {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyBits {
    // Always a read-modify-write, never «load, and skip if set»: the bit must become visible after the bytes do, also to a
    // drain that runs at the same time, and only the locked instruction orders the two.
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let last = offset.saturating_add(len - 1) / PAGE_BYTES as usize;
        for page in offset / PAGE_BYTES as usize..=last {
            if let Some(word) = self.words.get(page / 64) {
                word.fetch_or(1 << (page % 64), Ordering::AcqRel);
            }
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES as usize;
        self.words.get(page / 64).is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

/// A slice of guest memory that marks what is written through it.
pub(crate) type GuestSlice<'a> = VolatileSlice<'a, RefSlice<'a, DirtyBits>>;

/// A file with guest memory, mapped shared from its first to its last byte for as long as this object lives.
#[derive(Debug)]
pub struct RamFile {
    file: File,
    identity: RamIdentity,
    base: NonNull<u8>,
    length: usize,
    dirty: DirtyBits,
}

// SAFETY: `base` points to a mapping that this object owns until it is dropped, and every access to it goes through
// VolatileSlice, Area or the copies of GuestRam, which never make Rust references to its bytes; the other fields are Send and Sync themselves.
unsafe impl Send for RamFile {}
// SAFETY: as above; concurrent access is what guest memory is for.
unsafe impl Sync for RamFile {}

impl RamFile {
    fn identify(file: &File) -> std::io::Result<RamIdentity> {
        let metadata = file.metadata()?;
        Ok(RamIdentity { device: metadata.dev(), inode: metadata.ino(), length_bytes: metadata.len() })
    }

    fn map(file: File, identity: RamIdentity) -> std::io::Result<Self> {
        let length = usize::try_from(identity.length_bytes).map_err(std::io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that Rust knows of.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                0,
            )?
        };
        // Guest memory has no place in a core dump of the daemon; a kernel that refuses only makes dumps larger.
        // SAFETY: advice about the mapping made above; DONTDUMP does not change its contents.
        let _ = unsafe { rustix::mm::madvise(base, length, Advice::LinuxDontDump) };
        let base = NonNull::new(base.cast()).ok_or_else(|| std::io::Error::other("the kernel mapped page zero"))?;
        Ok(Self { file, identity, base, length, dirty: DirtyBits::new(identity.length_bytes) })
    }

    /// Which file this is.
    pub fn identity(&self) -> RamIdentity {
        self.identity
    }

    /// The file itself, for those who need a mapping of their own.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn is_same_file(&self, other: &RamFile) -> bool {
        (self.identity.device, self.identity.inode) == (other.identity.device, other.identity.inode)
    }

    /// All of the file.
    fn slice(&self) -> GuestSlice<'_> {
        // SAFETY: `base` and `length` are the mapping that lives as long as `self`, which the slice borrows.
        unsafe { VolatileSlice::with_bitmap(self.base.as_ptr(), self.length, self.dirty.slice_at(0), None) }
    }
}

impl Drop for RamFile {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that `map` made; slices of it borrow `self` and are gone.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok());
    }
}

/// The files that were seen and are still in use by somebody, so that a file is never mapped twice by one device.
#[derive(Debug, Default)]
struct Known {
    files: Vec<Weak<RamFile>>,
    /// The files of the present memory table. Kept over a lost connection: their dirty bits are still owed to syncvm.
    current: Vec<Arc<RamFile>>,
}

/// The pages of guest RAM that this process wrote, for the syncvm thread. Clones share one record.
///
/// Drain it while the rings are stopped: a page that is written during the drain stays recorded, but the reader may then see
/// either content. While rings run, the record is complete after each `NetDevice::flush_signals`.
#[derive(Debug, Clone, Default)]
pub struct BackendDirty {
    known: Arc<Mutex<Known>>,
}

impl BackendDirty {
    /// Holds the only lock that a device shares with other threads, as a session or a syncvm does now and then.
    #[cfg(test)]
    pub fn hold_lock(&self) -> impl Sized + '_ {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn current(&self) -> Vec<Arc<RamFile>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).current.clone()
    }

    /// The RAM file of the guest, if QEMU has sent a memory table and it consists of exactly one file. A protected VM has
    /// exactly one (`memory-backend=`); with more, page numbers alone would not name a page.
    pub fn ram_file(&self) -> Option<Arc<RamFile>> {
        match self.current().as_slice() {
            [only] => Some(Arc::clone(only)),
            _ => None,
        }
    }

    /// Identity of [`Self::ram_file`].
    pub fn ram_identity(&self) -> Option<RamIdentity> {
        self.ram_file().map(|file| file.identity())
    }

    /// Passes every dirty page of the RAM file to `sink` in ascending order, as offset in the file divided by
    /// [`PAGE_BYTES`], and clears it. Returns false when there is not exactly one RAM file; nothing is cleared then.
    pub fn drain(&self, sink: &mut dyn FnMut(u64)) -> bool {
        match self.ram_file() {
            Some(file) => {
                file.dirty.drain(sink);
                true
            }
            None => false,
        }
    }

    /// The file behind a descriptor from QEMU: the one already mapped if it is the same, else newly mapped.
    fn open(&self, file: File, region: usize) -> Result<Arc<RamFile>, MemoryError> {
        let identity = RamFile::identify(&file).map_err(|source| MemoryError::Stat { region, source })?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.files.retain(|file| file.strong_count() > 0);
        let present = known.files.iter().filter_map(Weak::upgrade).find(|ram| ram.identity == identity);
        if let Some(ram) = present {
            return Ok(ram);
        }
        let length = identity.length_bytes;
        let ram = RamFile::map(file, identity).map_err(|source| MemoryError::Map { region, length, source })?;
        let ram = Arc::new(ram);
        known.files.push(Arc::downgrade(&ram));
        Ok(ram)
    }

    fn replace_current(&self, files: Vec<Arc<RamFile>>) {
        // The old files are dropped after the lock is: unmapping gigabytes takes time.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut known.current, files);
        for (before, now) in old.iter().flat_map(|before| known.current.iter().map(move |now| (before, now))) {
            // A file that changed its length was mapped anew; the pages written through the old mapping are still owed.
            if before.is_same_file(now) && !Arc::ptr_eq(before, now) {
                before.dirty.drain(&mut |page| now.dirty.mark_dirty((page * PAGE_BYTES) as usize, 1));
            }
        }
        drop(known);
        drop(old);
    }
}

/// One line of QEMU's memory table.
#[derive(Debug)]
pub(crate) struct RegionSpec {
    /// Guest-physical address of the first byte.
    pub guest: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address of the first byte in QEMU's own address space, which SET_VRING_ADDR speaks of.
    pub user: u64,
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// The file.
    pub file: File,
}

#[derive(Debug)]
struct Region {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
    file: Arc<RamFile>,
}

/// A memory table: where in which file each guest-physical address is.
#[derive(Debug)]
pub(crate) struct GuestRam {
    /// Sorted by guest-physical address, not overlapping.
    regions: Vec<Region>,
}

impl GuestRam {
    /// Maps what is not mapped yet, and makes these files the ones that `dirty` reports.
    pub fn build(specs: Vec<RegionSpec>, dirty: &BackendDirty) -> Result<Self, MemoryError> {
        let mut regions = Vec::with_capacity(specs.len());
        for (region, spec) in specs.into_iter().enumerate() {
            for start in [spec.guest, spec.user, spec.offset] {
                if spec.size == 0 || start.checked_add(spec.size).is_none() {
                    return Err(MemoryError::BadRange { region, start, size: spec.size });
                }
            }
            let file = dirty.open(spec.file, region)?;
            let length = file.identity.length_bytes;
            if spec.offset + spec.size > length {
                return Err(MemoryError::PastEnd { region, start: spec.offset, size: spec.size, length });
            }
            regions.push(Region { guest: spec.guest, size: spec.size, user: spec.user, offset: spec.offset, file });
        }
        regions.sort_by_key(|region| region.guest);
        for pair in regions.windows(2) {
            if pair[0].guest + pair[0].size > pair[1].guest {
                return Err(MemoryError::Overlap { address: pair[1].guest });
            }
        }
        let mut files: Vec<Arc<RamFile>> = Vec::new();
        for region in &regions {
            if !files.iter().any(|file| file.identity == region.file.identity) {
                files.push(Arc::clone(&region.file));
            }
        }
        dirty.replace_current(files);
        Ok(Self { regions })
    }

    /// Guest-physical address of an address in QEMU's own address space.
    pub fn guest_of_user(&self, user: u64) -> Option<u64> {
        let region = self.regions.iter().find(|region| user >= region.user && user - region.user < region.size)?;
        Some(region.guest + (user - region.user))
    }

    /// The piece of memory that begins at `guest` and has `max_len` bytes or ends with its region. None outside RAM.
    pub fn locate(&self, guest: u64, max_len: u32) -> Option<Piece> {
        let after = self.regions.partition_point(|region| region.guest <= guest);
        let number = after.checked_sub(1)?;
        let region = &self.regions[number];
        let inside = guest - region.guest;
        if inside >= region.size {
            return None;
        }
        let len = u64::from(max_len).min(region.size - inside);
        Some(Piece { region: number as u32, len: len as u32, offset: (region.offset + inside) as usize })
    }

    /// An area of fixed place that lies in one region. None if it does not.
    pub fn area(&self, guest: u64, len: u32) -> Option<Area> {
        let piece = self.locate(guest, len).filter(|piece| piece.len == len)?;
        let file = Arc::clone(&self.regions[piece.region as usize].file);
        Some(Area { file, offset: piece.offset, len: len as usize })
    }

    /// A buffer that lies in one region. `hint` is the region where the last one was, which is nearly always the right one.
    #[inline]
    pub fn whole(&self, hint: &mut usize, guest: u64, len: u32) -> Option<Piece> {
        match self.whole_in(*hint, guest, len) {
            Some(piece) => Some(piece),
            None => self.find_whole(hint, guest, len),
        }
    }

    #[inline]
    fn whole_in(&self, number: usize, guest: u64, len: u32) -> Option<Piece> {
        let region = self.regions.get(number)?;
        // An address below the region gives a huge difference.
        let inside = guest.wrapping_sub(region.guest);
        if inside >= region.size || u64::from(len) > region.size - inside {
            return None;
        }
        Some(Piece { region: number as u32, len, offset: (region.offset + inside) as usize })
    }

    #[cold]
    fn find_whole(&self, hint: &mut usize, guest: u64, len: u32) -> Option<Piece> {
        let number = self.regions.partition_point(|region| region.guest <= guest).checked_sub(1)?;
        let piece = self.whole_in(number, guest, len)?;
        *hint = number;
        Some(piece)
    }

    /// Where `len` bytes at an offset of a piece are in this process. Panics if they are not in the piece or in its file.
    #[inline]
    fn host(&self, piece: Piece, at: usize, len: usize) -> NonNull<u8> {
        let file = &self.regions[piece.region as usize].file;
        assert!(at <= piece.len as usize && len <= piece.len as usize - at);
        assert!(piece.offset <= file.length && piece.len as usize <= file.length - piece.offset);
        // SAFETY: the file is mapped from its first to its last byte, and the place is inside as just checked.
        unsafe { file.base.add(piece.offset + at) }
    }

    /// Writes bytes at an offset of a piece. Marks nothing. Panics past the piece's end.
    #[inline]
    pub fn fill(&self, piece: Piece, at: usize, bytes: &[u8]) {
        let host = self.host(piece, at, bytes.len());
        // SAFETY: `host` checked that so many bytes are in the mapping, which `self` keeps. They are not Rust's memory, so they do
        // not overlap `bytes`; the guest may change them meanwhile, and nothing in Rust relies on it not to.
        unsafe { copy(bytes.as_ptr(), host.as_ptr(), bytes.len()) }
    }

    /// Reads the first bytes of a piece. Panics if there are fewer.
    #[inline]
    pub fn take(&self, piece: Piece, into: &mut [u8]) {
        let host = self.host(piece, 0, into.len());
        // SAFETY: as in `fill`, the other way round; `into` is exclusively ours.
        unsafe { copy(host.as_ptr(), into.as_mut_ptr(), into.len()) }
    }

    /// Begins to fetch the first `bytes` of a piece, for writing or for reading.
    #[inline]
    pub fn prefetch<const WRITE: bool>(&self, piece: Piece, bytes: usize) {
        prefetch_lines::<WRITE>(self.host(piece, 0, 0).as_ptr(), bytes.min(piece.len as usize));
    }

    /// Marks the first `len` bytes of a piece as written; only after [`fence_before_marks`].
    #[inline]
    pub fn mark(&self, piece: Piece, len: u32) {
        self.regions[piece.region as usize].file.dirty.mark_fenced(piece.offset, len as usize);
    }

    /// The bytes of a piece that `locate` of this same table returned.
    pub fn slice(&self, piece: Piece) -> GuestSlice<'_> {
        let file = &self.regions[piece.region as usize].file;
        file.slice().subslice(piece.offset, piece.len as usize).expect("locate checked the range")
    }
}

/// A contiguous piece of guest memory, found by [`GuestRam::locate`] or [`GuestRam::whole`]. The default is an empty one.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Piece {
    region: u32,
    /// Length in bytes.
    pub len: u32,
    /// Offset in the file of the region.
    offset: usize,
}

const CACHE_LINE_BYTES: usize = 64;
/// The processor's own prefetcher follows a longer copy by itself.
const MAX_PREFETCH_LINES: usize = 5;

/// The lines of `bytes` from `place` on, no other: a line too many is one more that the guest has to fetch back.
#[inline]
fn prefetch_lines<const WRITE: bool>(place: *const u8, bytes: usize) {
    let lines = (place as usize % CACHE_LINE_BYTES + bytes).div_ceil(CACHE_LINE_BYTES).min(MAX_PREFETCH_LINES);
    for line in 0..lines {
        prefetch::<WRITE>(place.wrapping_add(line * CACHE_LINE_BYTES));
    }
}

#[inline]
fn prefetch<const WRITE: bool>(place: *const u8) {
    // By hand, because the intrinsic for writing gives a prefetch for reading unless the build is told of a newer processor, and
    // the line then has to be asked for twice.
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::asm;
        // SAFETY: hints; they cannot fault at any address and change neither memory nor flags.
        unsafe {
            match WRITE {
                true => asm!("prefetchw [{}]", in(reg) place, options(nostack, preserves_flags, readonly)),
                false => asm!("prefetcht0 [{}]", in(reg) place, options(nostack, preserves_flags, readonly)),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Copies as memcpy does, without the call for short frames, which are the ones that come by the million.
///
/// # Safety
/// Both ranges are valid for `len` bytes and do not overlap.
#[inline]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    /// Two blocks that overlap in the middle cover every length from one block to two.
    ///
    /// # Safety
    /// As [`copy`], and `N <= len <= 2 * N`.
    #[inline]
    unsafe fn ends<const N: usize>(from: *const u8, to: *mut u8, len: usize) {
        // SAFETY: both blocks lie within the `len` bytes, because `N <= len`.
        unsafe {
            let head = from.cast::<[u8; N]>().read_unaligned();
            let tail = from.add(len - N).cast::<[u8; N]>().read_unaligned();
            to.cast::<[u8; N]>().write_unaligned(head);
            to.add(len - N).cast::<[u8; N]>().write_unaligned(tail);
        }
    }
    // SAFETY: each arm keeps the condition of `ends`.
    unsafe {
        match len {
            64..=128 => ends::<64>(from, to, len),
            32..=63 => ends::<32>(from, to, len),
            4..=8 => ends::<4>(from, to, len),
            _ => std::ptr::copy_nonoverlapping(from, to, len),
        }
    }
}

/// An area of guest memory whose place was checked once, such as one part of a ring.
#[derive(Debug)]
pub(crate) struct Area {
    file: Arc<RamFile>,
    offset: usize,
    len: usize,
}

impl Area {
    /// Whether the area begins at a multiple of `bytes` in this process, which atomic accesses need.
    pub fn is_aligned(&self, bytes: usize) -> bool {
        (self.file.base.as_ptr() as usize + self.offset).is_multiple_of(bytes)
    }

    /// The place of a `T`. Panics if it is not inside or not aligned: offsets come from our own arithmetic.
    #[inline]
    fn at<T>(&self, offset: usize) -> *mut T {
        assert!(offset <= self.len && size_of::<T>() <= self.len - offset, "ring offsets are inside their area");
        // SAFETY: `area` checked that the area lies in the mapping of `file`; the offset was checked just now.
        let place = unsafe { self.file.base.add(self.offset + offset) }.as_ptr().cast::<T>();
        assert!(place.is_aligned());
        place
    }

    /// Reads a little-endian u16. Panics if the offset is odd or outside the area: offsets come from our own arithmetic.
    #[inline]
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        // SAFETY: `at` gives an aligned place in a mapping that `self` keeps; all other accesses to ring fields are atomic, too.
        u16::from_le(unsafe { AtomicU16::from_ptr(self.at(offset)) }.load(order))
    }

    /// Reads a little-endian u64; same conditions.
    #[inline]
    pub fn load_u64(&self, offset: usize) -> u64 {
        // SAFETY: as in `load_u16`.
        u64::from_le(unsafe { AtomicU64::from_ptr(self.at(offset)) }.load(Ordering::Relaxed))
    }

    /// Writes a little-endian u16; same conditions as [`Self::load_u16`]. Marks nothing.
    #[inline]
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        // SAFETY: as in `load_u16`.
        unsafe { AtomicU16::from_ptr(self.at(offset)) }.store(value.to_le(), order);
    }

    /// Writes two little-endian u32 by one store, which is no atomic because such a pair need not be aligned to its size: nobody reads
    /// it before the index that is stored after it. Marks nothing. Panics outside the area.
    #[inline]
    pub fn store_pair(&self, offset: usize, pair: [u32; 2]) {
        let value = u64::from(pair[0]) | u64::from(pair[1]) << 32;
        assert!(offset <= self.len && size_of::<u64>() <= self.len - offset, "ring offsets are inside their area");
        // SAFETY: `area` checked that the area lies in the mapping of `file`, and the offset was checked just now. The bytes are not
        // Rust's memory, and we never read them.
        unsafe { self.file.base.add(self.offset + offset).as_ptr().cast::<u64>().write_unaligned(value.to_le()) }
    }

    /// Begins to fetch `bytes` from an offset on, for writing or for reading. Only a hint, so nothing is checked.
    #[inline]
    pub fn prefetch<const WRITE: bool>(&self, offset: usize, bytes: usize) {
        prefetch_lines::<WRITE>(self.file.base.as_ptr().wrapping_add(self.offset + offset), bytes);
    }

    /// Marks bytes as written; only after [`fence_before_marks`].
    #[inline]
    pub fn mark(&self, offset: usize, len: usize) {
        self.file.dirty.mark_fenced(self.offset + offset, len);
    }
}
