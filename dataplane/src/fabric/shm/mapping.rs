//! The shared memory of a pair: a ring for each direction.

use crate::ring::{Control, Memory, WORD_BYTES};
use crate::turn::{SLOT_WORDS, SlotMemory};
use rustix::fd::AsFd;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Both controls and the slot, and nothing else, are in the first page.
const HEAD_BYTES: usize = 4096;
const SLOT_OFFSET: usize = 1024;
const _: () = assert!(2 * size_of::<Control>() <= SLOT_OFFSET && HEAD_BYTES.is_multiple_of(align_of::<Control>()));
const _: () = assert!(SLOT_OFFSET + SLOT_WORDS * WORD_BYTES <= HEAD_BYTES && SLOT_OFFSET.is_multiple_of(128));

/// The size of a file with rings of `ring_bytes`.
pub(super) fn file_bytes(ring_bytes: usize) -> usize {
    HEAD_BYTES + 2 * ring_bytes
}

/// Which way a ring carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the side that dialed.
    FromDialer = 0,
    /// To it.
    ToDialer = 1,
}

/// Shared with the process of one peer and never used for another.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<c_void>,
    ring_bytes: usize,
}

// SAFETY: the mapping is not bound to a thread, and all that is handed out of it are atomics.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `file`, which the caller has made, or checked to be of [`file_bytes`].
    ///
    /// # Errors
    /// Those of mmap(2).
    ///
    /// # Panics
    /// If `ring_bytes` is no power of two of at least a page.
    pub fn new(file: impl AsFd, ring_bytes: usize) -> std::io::Result<Mapping> {
        assert!(ring_bytes.is_power_of_two() && ring_bytes >= HEAD_BYTES, "a ring of {ring_bytes} bytes");
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::POPULATE);
            mmap(std::ptr::null_mut(), file_bytes(ring_bytes), prot, flags, file, 0)?
        };
        Ok(Mapping { base: NonNull::new(base).expect("the kernel does not map page 0"), ring_bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with that length; whoever borrows from it holds it.
        let unmapped = unsafe { munmap(self.base.as_ptr(), file_bytes(self.ring_bytes)) };
        assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}

/// One of the rings.
#[derive(Debug)]
pub(super) struct SharedRing {
    mapping: Arc<Mapping>,
    direction: Direction,
}

impl SharedRing {
    pub fn new(mapping: &Arc<Mapping>, direction: Direction) -> SharedRing {
        SharedRing { mapping: Arc::clone(mapping), direction }
    }
}

impl Memory for SharedRing {
    fn control(&self) -> &Control {
        // SAFETY: the first page holds two of them (asserted above), aligned because pages are; they consist of atomics,
        // for which every bit pattern is valid and other processes' writes are allowed; `self` keeps the mapping.
        unsafe { self.mapping.base.cast::<Control>().add(self.direction as usize).as_ref() }
    }

    fn words(&self) -> &[AtomicU64] {
        let offset = HEAD_BYTES + self.direction as usize * self.mapping.ring_bytes;
        // SAFETY: within the mapping, whose file has at least file_bytes (it was made or checked so; a peer that cuts it
        // short afterwards can kill this process with SIGBUS, as it could with a signal: it runs as the same user), and
        // aligned. Atomics as above.
        unsafe {
            let first = self.mapping.base.byte_add(offset).cast::<AtomicU64>();
            std::slice::from_raw_parts(first.as_ptr(), self.mapping.ring_bytes / WORD_BYTES)
        }
    }
}

impl SlotMemory for SharedRing {
    fn slot(&self) -> &[AtomicU64] {
        // SAFETY: within the first page (asserted above) and aligned; the rest as above.
        unsafe {
            let first = self.mapping.base.byte_add(SLOT_OFFSET).cast::<AtomicU64>();
            std::slice::from_raw_parts(first.as_ptr(), SLOT_WORDS)
        }
    }
}
