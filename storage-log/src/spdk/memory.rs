//! Memory that devices read and write by themselves.

use std::ffi::c_void;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

use super::environment::Environment;
use super::error::{Result, SpdkError};

/// Zeroed memory on hugepages, aligned to [`ALIGNMENT_BYTES`](Self::ALIGNMENT_BYTES), of fixed address and size. Devices that
/// were opened with it keep it allocated for as long as they may read from it.
#[derive(Debug)]
pub struct DmaBuffer {
    allocation: Arc<Allocation>,
}

impl DmaBuffer {
    /// What begins at a multiple of this in memory may be transferred with any sector size.
    pub const ALIGNMENT_BYTES: usize = 4096;

    /// Takes memory for `purpose`.
    ///
    /// # Errors
    /// [`SpdkError::NoMemory`].
    ///
    /// # Panics
    /// If `bytes` is 0.
    pub fn new(_environment: Environment, bytes: usize, purpose: &'static str) -> Result<Self> {
        assert!(bytes > 0, "an empty buffer for {purpose}");
        // SAFETY: the environment runs, as its proof says.
        let memory = unsafe { spdk_sys::plover_spdk_dma_alloc(bytes as u64, Self::ALIGNMENT_BYTES as u64) };
        let memory = NonNull::new(memory.cast()).ok_or(SpdkError::NoMemory { bytes, purpose })?;
        Ok(Self { allocation: Arc::new(Allocation { memory, bytes }) })
    }

    /// For devices: addresses only, no access.
    pub(super) fn share(&self) -> Arc<Allocation> {
        Arc::clone(&self.allocation)
    }
}

impl Deref for DmaBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let Allocation { memory, bytes } = *self.allocation;
        // SAFETY: the memory is initialised and of this size, and only this buffer gives references to it. A device writes into
        // it only between the submission and the completion of a read; `Device` lets nobody see its buffer for those meanwhile.
        unsafe { std::slice::from_raw_parts(memory.as_ptr(), bytes) }
    }
}

impl DerefMut for DmaBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let Allocation { memory, bytes } = *self.allocation;
        // SAFETY: as for `deref`, and the reference is unique.
        unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), bytes) }
    }
}

/// The memory of a buffer, which is freed with its last owner.
#[derive(Debug)]
pub(super) struct Allocation {
    memory: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its memory, which any thread may use and free: SPDK's allocator is locked.
unsafe impl Send for Allocation {}
// SAFETY: shared, it gives nothing but addresses.
unsafe impl Sync for Allocation {}

impl Allocation {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where a range of it lies, for the device.
    ///
    /// # Panics
    /// If the range is not inside.
    pub fn address(&self, range: &Range<usize>) -> *mut c_void {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        // SAFETY: the start lies within the allocation or at its end.
        unsafe { self.memory.add(range.start) }.as_ptr().cast()
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated by `DmaBuffer::new` and freed once. A `Device` leaks its share of what a device may still use.
        unsafe { spdk_sys::plover_spdk_dma_free(self.memory.as_ptr().cast()) }
    }
}
