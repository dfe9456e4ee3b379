//! Where frames live from arrival to release: bytes are written once, then shared by handles until the last one is dropped.
//!
//! A region is cut into chunks of equal size. Bytes go into the present chunk one behind the other, and a handle
//! ([`ArenaBytes`]) counts as a reference to its chunk; a chunk that nobody refers to any more is used again. That fits the
//! log, whose entries are freed in the order in which they came: a small batch takes its own size and pins no more than the
//! chunk it shares with its neighbours, and nothing is copied to be kept.
//!
//! One thread owns the arena, writes and recycles. Handles may be dropped on any thread: the count is that of an [`Arc`], and
//! the owner asks each chunk whether it is alone ([`Arc::get_mut`]), oldest first. Rejected: a lock-free list by which
//! other threads return chunks (a second mechanism beside the count, with orderings of its own to prove, for something that
//! happens once per 2 MiB); fixed buffers per frame as DPDK has them (a batch must be contiguous, because it is a message and
//! a log record); and a handle with its own vtable as in `bytes` (it needs an allocation per owner).
//!
//! An arena that is full gives nothing ([`Arena::room`]): who takes frames from an uplink leaves them there.

use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use std::collections::VecDeque;

use crate::region::Region;

/// Size of a chunk: one hugepage.
pub const CHUNK_BYTES: usize = 2 << 20;
/// Pieces begin at multiples of a cache line.
const ALIGN_BYTES: usize = 64;

/// One chunk. What lies below `frozen` never changes while anybody but the arena refers to the chunk.
#[derive(Debug)]
pub struct Chunk {
    base: NonNull<u8>,
    /// Bytes from the start that handles may read.
    frozen: AtomicUsize,
    /// Keeps the memory.
    _region: Arc<Region>,
}

// SAFETY: the memory is owned by the region that the chunk keeps alive. Shared access only reads below `frozen`, where
// nothing is written while the chunk is shared; the arena alone writes, above `frozen`.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl AsRef<[u8]> for Chunk {
    /// Everything that was frozen so far.
    fn as_ref(&self) -> &[u8] {
        // Acquire pairs with the release in `Arena::freeze`: a handle sees the bytes that it was made for.
        let frozen = self.frozen.load(Ordering::Acquire);
        // SAFETY: `frozen` bytes lie within the chunk and are initialised, and nobody writes to them while this reference
        // lives: the arena writes above `frozen` only, and lowers it only when it is alone with the chunk, which it is not
        // as long as somebody borrows from an `Arc` of it.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), frozen) }
    }
}

/// Bytes in an arena; a clone is a reference count.
#[derive(Debug, Clone)]
pub struct ArenaBytes {
    chunk: Arc<Chunk>,
    at: usize,
    len: usize,
}

impl ArenaBytes {
    /// The chunk, where the bytes begin in it, and how many they are.
    pub fn into_parts(self) -> (Arc<Chunk>, usize, usize) {
        (self.chunk, self.at, self.len)
    }
}

impl Deref for ArenaBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &(*self.chunk).as_ref()[self.at..self.at + self.len]
    }
}

/// See the module.
#[derive(Debug)]
pub struct Arena {
    current: Arc<Chunk>,
    /// Bytes of the current chunk that are in use.
    filled: usize,
    /// Bytes handed out by `room` and not yet frozen.
    offered: usize,
    /// All others, the one that was filled longest ago first.
    others: VecDeque<Arc<Chunk>>,
    exhausted: bool,
    refusals: u64,
}

impl Arena {
    /// An arena in `region`.
    ///
    /// # Panics
    /// If the region is smaller than two chunks.
    pub fn new(region: Region) -> Arena {
        let chunks = region.len() / CHUNK_BYTES;
        assert!(chunks >= 2, "an arena of {} bytes is smaller than two chunks of {CHUNK_BYTES}", region.len());
        let region = Arc::new(region);
        let chunk = |number: usize| {
            // SAFETY: within the region.
            let base = unsafe { region.base().add(number * CHUNK_BYTES) };
            Arc::new(Chunk { base, frozen: AtomicUsize::new(0), _region: Arc::clone(&region) })
        };
        let others = (1..chunks).map(chunk).collect();
        Arena { current: chunk(0), filled: 0, offered: 0, others, exhausted: false, refusals: 0 }
    }

    /// Room for at least `least` and at most `most` bytes, whatever they were before; `None` when there is none now. What was
    /// handed out before and not frozen is void.
    ///
    /// # Panics
    /// If `least` is more than `most`, or than a chunk has.
    pub fn room(&mut self, least: usize, most: usize) -> Option<&mut [u8]> {
        assert!(least <= most && least <= CHUNK_BYTES, "room for {least} to {most} bytes in chunks of {CHUNK_BYTES}");
        if !self.has_room(least) {
            self.refusals += 1;
            return None;
        }
        self.offered = most.min(CHUNK_BYTES - self.filled);
        // SAFETY: within the current chunk and at or above its `frozen` mark, so no handle reads there; only the arena
        // writes, and it is borrowed for as long as this slice lives. The memory is initialised from the start.
        Some(unsafe { std::slice::from_raw_parts_mut(self.current.base.add(self.filled).as_ptr(), self.offered) })
    }

    /// The first `len` bytes of the room that was handed out last, as they are now and stay.
    ///
    /// # Panics
    /// If no room for `len` bytes was handed out since the last call.
    pub fn freeze(&mut self, len: usize) -> ArenaBytes {
        assert!(len <= self.offered, "freezing {len} bytes, but only {} were handed out", self.offered);
        self.offered = 0;
        let at = self.filled;
        self.filled = (at + len).next_multiple_of(ALIGN_BYTES).min(CHUNK_BYTES);
        self.current.frozen.store(self.filled, Ordering::Release);
        ArenaBytes { chunk: Arc::clone(&self.current), at, len }
    }

    /// A copy of `bytes`; `None` when there is no room, or when a chunk is too small for them.
    pub fn put(&mut self, bytes: &[u8]) -> Option<ArenaBytes> {
        if bytes.len() > CHUNK_BYTES {
            self.refusals += 1;
            return None;
        }
        self.room(bytes.len(), bytes.len())?.copy_from_slice(bytes);
        Some(self.freeze(bytes.len()))
    }

    /// Whether there is room for `bytes` now; makes it, if that can be done. What was handed out and not frozen is void.
    ///
    /// # Panics
    /// If a chunk does not have so many bytes.
    pub fn has_room(&mut self, bytes: usize) -> bool {
        self.offered = 0;
        assert!(bytes <= CHUNK_BYTES, "room for {bytes} bytes in chunks of {CHUNK_BYTES}");
        self.exhausted = !self.make_room(bytes);
        !self.exhausted
    }

    /// Whether there was no room when it was last asked for.
    pub fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    /// How often there was no room.
    pub fn refusals(&self) -> u64 {
        self.refusals
    }

    /// Bytes of all chunks, and of those that somebody refers to.
    pub fn bytes(&self) -> (usize, usize) {
        let all = || self.others.iter().chain([&self.current]);
        let used = all().filter(|chunk| Arc::strong_count(chunk) > 1).count();
        (all().count() * CHUNK_BYTES, used * CHUNK_BYTES)
    }

    fn make_room(&mut self, bytes: usize) -> bool {
        if recycle(&mut self.current) {
            self.filled = 0;
        }
        if CHUNK_BYTES - self.filled >= bytes {
            return true;
        }
        // The oldest chunk is free first, as a rule. A full round leaves the order as it was.
        for _ in 0..self.others.len() {
            let mut chunk = self.others.pop_front().expect("the loop counts them");
            if recycle(&mut chunk) {
                self.others.push_back(std::mem::replace(&mut self.current, chunk));
                self.filled = 0;
                return true;
            }
            self.others.push_back(chunk);
        }
        false
    }
}

/// Empties a chunk that nobody refers to.
fn recycle(chunk: &mut Arc<Chunk>) -> bool {
    // `get_mut` synchronises with the drop of every other reference: whatever others read, they have read.
    let Some(chunk) = Arc::get_mut(chunk) else { return false };
    *chunk.frozen.get_mut() = 0;
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::PageSize;
    use proptest::prelude::*;
    use std::sync::mpsc::channel;

    fn arena(chunks: usize) -> Arena {
        Arena::new(Region::map(chunks * CHUNK_BYTES, PageSize::Normal, None).unwrap())
    }

    #[derive(Debug, Clone)]
    enum Op {
        Put(usize),
        Room(usize, usize),
        Drop(usize),
        Clone(usize),
        DropOldest,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (0usize..200_000).prop_map(Op::Put),
            2 => (0usize..=CHUNK_BYTES + 1).prop_map(Op::Put),
            3 => (0usize..100_000, 0usize..300_000).prop_map(|(least, more)| Op::Room(least, more)),
            3 => any::<usize>().prop_map(Op::Drop),
            2 => any::<usize>().prop_map(Op::Clone),
            6 => Just(Op::DropOldest),
        ]
    }

    fn pattern(step: usize, len: usize) -> Vec<u8> {
        (0..len).map(|at| (at / 7 + step * 31) as u8).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// What a handle shows never changes, so no byte is ever in two live pieces; and room is refused only when every
        /// chunk is in use.
        #[test]
        fn handles_keep_their_bytes(ops in prop::collection::vec(op(), 1..120)) {
            let mut arena = arena(3);
            let mut held: Vec<(ArenaBytes, Vec<u8>)> = Vec::new();
            for (step, op) in ops.into_iter().enumerate() {
                match op {
                    Op::Put(len) => {
                        let bytes = pattern(step, len);
                        match arena.put(&bytes) {
                            Some(handle) => held.push((handle, bytes)),
                            None => prop_assert!(len > CHUNK_BYTES || arena.is_exhausted() && in_use(&arena) == 3),
                        }
                    }
                    Op::Room(least, more) => {
                        let Some(room) = arena.room(least, least + more) else {
                            prop_assert!(arena.is_exhausted() && in_use(&arena) == 3);
                            continue;
                        };
                        prop_assert!((least..=least + more).contains(&room.len()));
                        let bytes = pattern(step, room.len());
                        room.copy_from_slice(&bytes);
                        // Half of it is given back, and must not disturb what comes next.
                        let kept = bytes.len() / 2;
                        held.push((arena.freeze(kept), bytes[..kept].to_vec()));
                    }
                    Op::Drop(pick) if !held.is_empty() => drop(held.swap_remove(pick % held.len())),
                    Op::Clone(pick) if !held.is_empty() => held.push(held[pick % held.len()].clone()),
                    Op::DropOldest if !held.is_empty() => drop(held.remove(0)),
                    Op::Drop(_) | Op::Clone(_) | Op::DropOldest => {}
                }
            }
            for (handle, bytes) in &held {
                prop_assert!(**handle == **bytes);
            }
            held.clear();
            prop_assert_eq!(arena.bytes(), (3 * CHUNK_BYTES, 0));
            prop_assert!(arena.put(&[1; CHUNK_BYTES]).is_some());
        }
    }

    fn in_use(arena: &Arena) -> usize {
        arena.bytes().1 / CHUNK_BYTES
    }

    #[test]
    fn a_full_arena_refuses_and_recovers_when_the_oldest_goes() {
        let mut arena = arena(2);
        let first = arena.put(&vec![1; CHUNK_BYTES]).unwrap();
        let second = arena.put(&vec![2; CHUNK_BYTES]).unwrap();
        assert!(arena.put(&[3]).is_none() && arena.is_exhausted());
        assert_eq!(arena.refusals(), 1);
        drop(first);
        let third = arena.put(&[3]).unwrap();
        assert!(!arena.is_exhausted());
        assert!(second.iter().all(|byte| *byte == 2) && *third == [3]);
    }

    #[test]
    fn small_pieces_share_a_chunk_and_are_used_again_in_place() {
        let mut arena = arena(2);
        for _ in 0..10_000 {
            let piece = arena.put(&[5; 300]).unwrap();
            assert_eq!((*piece).len(), 300);
        }
        let (chunk, at, _) = arena.put(&[6; 300]).unwrap().into_parts();
        assert_eq!(at, 0, "with nobody left, the chunk begins anew");
        assert_eq!((*chunk).as_ref()[..300], [6; 300]);
    }

    #[test]
    fn handles_outlive_the_arena() {
        let mut arena = arena(2);
        let piece = arena.put(&[9; 1000]).unwrap();
        drop(arena);
        assert_eq!(*piece, [9; 1000]);
    }

    /// Readers on other threads check what they got and drop it there, while the owner fills chunk after chunk.
    #[test]
    fn drops_on_other_threads_free_chunks_and_disturb_nobody() {
        const PIECES: usize = 2_000;
        let mut arena = arena(4);
        let (senders, readers): (Vec<_>, Vec<_>) = (0..2)
            .map(|_| {
                let (sender, receiver) = channel::<(ArenaBytes, u8)>();
                let reader = std::thread::spawn(move || {
                    receiver.iter().map(|(piece, byte)| assert!(piece.iter().all(|read| *read == byte))).count()
                });
                (sender, reader)
            })
            .unzip();
        let (mut sent, mut refused) = (0, 0u64);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while sent < PIECES {
            assert!(std::time::Instant::now() < deadline, "chunks do not come back: {refused} refusals");
            let byte = sent as u8;
            match arena.put(&vec![byte; 60_000]) {
                Some(piece) => {
                    senders[sent % 2].send((piece, byte)).unwrap();
                    sent += 1;
                }
                None => {
                    refused += 1;
                    std::thread::yield_now();
                }
            }
        }
        drop(senders);
        let read: usize = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
        assert_eq!(read, PIECES);
        assert_eq!(arena.bytes().1, 0);
    }

    #[test]
    #[should_panic(expected = "handed out")]
    fn freezing_more_than_was_handed_out_is_a_bug() {
        let mut arena = arena(2);
        arena.room(10, 10).unwrap();
        arena.freeze(11);
    }
}
