//! Memory that a device may write: a mapping of its own, on hugepages if there are any, locked.

use std::io;
use std::ptr::NonNull;
use std::sync::Once;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};

const HUGEPAGE_BYTES: usize = 2 << 20;

/// A private anonymous mapping, zeroed. Read and written only by copying, because a device and a peer write it too.
#[derive(Debug)]
pub struct Arena {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: nothing about a mapping belongs to a thread; all access goes through `&self` methods that copy.
unsafe impl Send for Arena {}
// SAFETY: as above. Concurrent copies race as the device's own writes do; users take what they read for any bytes.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps at least `bytes` and locks them.
    ///
    /// # Errors
    /// Of mmap or mlock: no memory, or the process may not lock as much (RLIMIT_MEMLOCK).
    pub fn new(bytes: usize) -> io::Result<Arena> {
        static SAID: Once = Once::new();
        let huge_bytes = bytes.next_multiple_of(HUGEPAGE_BYTES);
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let private = MapFlags::PRIVATE;
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory of ours.
        let map = |bytes, flags| unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags) };
        let huge = private | MapFlags::HUGETLB | MapFlags::HUGE_2MB | MapFlags::POPULATE;
        let mapped = map(huge_bytes, huge).map(|start| (start, huge_bytes)).or_else(|error| {
            SAID.call_once(|| {
                tracing::info!(
                    %error,
                    "no free hugepages of 2 MiB for the RDMA rings: they take normal pages (more: vm.nr_hugepages)"
                );
            });
            let bytes = bytes.next_multiple_of(rustix::param::page_size());
            map(bytes, private).map(|start| (start, bytes))
        });
        let (start, bytes) = mapped?;
        let start = NonNull::new(start.cast()).expect("the kernel maps nothing at address 0");
        let arena = Arena { start, bytes };
        // SAFETY: the range is the mapping just made. A fork would make the pages copy-on-write, and the device
        // would go on with the wrong copy.
        unsafe { madvise(arena.start.as_ptr().cast(), bytes, Advice::LinuxDontFork) }?;
        // SAFETY: as above.
        unsafe { mlock(arena.start.as_ptr().cast(), bytes) }?;
        Ok(arena)
    }

    /// The mapping's address, for the device.
    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// For registration.
    pub fn as_ptr(&self, offset: usize) -> *mut u8 {
        assert!(offset <= self.bytes);
        // SAFETY: within the mapping or one past its end.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Copies into the mapping.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn write(&self, offset: usize, from: &[u8]) {
        assert!(offset.checked_add(from.len()).is_some_and(|end| end <= self.bytes), "a write beyond the arena");
        // SAFETY: the range is in the mapping, which `from`, a reference, cannot overlap: no reference into it exists.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.start.as_ptr().add(offset), from.len()) }
    }

    /// Copies out of the mapping, behind what is in `into`.
    ///
    /// # Panics
    /// When the range is not in the mapping.
    pub fn read_onto(&self, offset: usize, bytes: usize, into: &mut Vec<u8>) {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.bytes), "a read beyond the arena");
        into.reserve(bytes);
        let length = into.len();
        // SAFETY: the source is in the mapping, the destination in the vector's spare room that was just reserved; the
        // copied bytes are what makes the new length valid. A peer may write meanwhile: any bytes will do.
        unsafe {
            let from = self.start.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(from, into.as_mut_ptr().add(length), bytes);
            into.set_len(length + bytes);
        }
    }

    /// Copies a few bytes out of the mapping.
    ///
    /// # Panics
    /// When the range is not in the mapping.
    pub fn read<const N: usize>(&self, offset: usize) -> [u8; N] {
        assert!(offset.checked_add(N).is_some_and(|end| end <= self.bytes), "a read beyond the arena");
        let mut bytes = [0; N];
        // SAFETY: the source is in the mapping, the destination is ours.
        unsafe { std::ptr::copy_nonoverlapping(self.start.as_ptr().add(offset), bytes.as_mut_ptr(), N) };
        bytes
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever registered it has an Arc of it until deregistration. munmap of a
        // mapping of ours does not fail.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::Arena;

    #[test]
    fn what_is_written_is_read() {
        let arena = Arena::new(5000).unwrap();
        assert!([2 << 20, 8192].contains(&arena.len()), "whole pages of either size, not {} bytes", arena.len());
        arena.write(arena.len() - 3, &[1, 2, 3]);
        let mut read = vec![9];
        arena.read_onto(arena.len() - 4, 4, &mut read);
        assert_eq!(read, [9, 0, 1, 2, 3]);
        assert_eq!(arena.read(arena.len() - 2), [2, 3]);
    }

    #[test]
    #[should_panic(expected = "beyond the arena")]
    fn nothing_is_read_beyond_the_end() {
        let arena = Arena::new(1).unwrap();
        arena.read_onto(arena.len() - 3, 4, &mut Vec::new());
    }

    #[test]
    #[should_panic(expected = "beyond the arena")]
    fn nothing_is_written_beyond_the_end() {
        let arena = Arena::new(1).unwrap();
        arena.write(usize::MAX, &[1]);
    }
}
