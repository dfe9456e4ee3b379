//! Memory that a device reads and writes by itself.

use std::ffi::c_void;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;

use super::environment::Environment;
use super::error::{Result, SpdkError};

/// Zeroed memory on hugepages, aligned to [`ALIGNMENT_BYTES`](Self::ALIGNMENT_BYTES), of fixed address and size.
#[derive(Debug)]
pub struct DmaBuffer {
    memory: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the buffer owns its memory, which any thread may use; SPDK's allocator is locked.
unsafe impl Send for DmaBuffer {}

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
        Ok(Self { memory, bytes })
    }

    /// Where a range of it lies, for the device.
    ///
    /// # Panics
    /// If the range is not inside.
    pub(super) fn address(&self, range: &Range<usize>) -> *mut c_void {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {} bytes", self.bytes);
        // SAFETY: the start lies within the allocation or at its end.
        unsafe { self.memory.add(range.start) }.as_ptr().cast()
    }

    /// Leaves the memory to a device that may still use it.
    pub(super) fn leak(self) {
        std::mem::forget(self);
    }
}

impl Deref for DmaBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is ours, initialised and of this size. A device writes into it only between the submission and the
        // completion of a read, and `Device` hands out no reference to such memory meanwhile.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.bytes) }
    }
}

impl DerefMut for DmaBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and the reference is unique.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.bytes) }
    }
}

impl Drop for DmaBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` and freed once. `Device` leaks what a device may still use.
        unsafe { spdk_sys::plover_spdk_dma_free(self.memory.as_ptr().cast()) }
    }
}
