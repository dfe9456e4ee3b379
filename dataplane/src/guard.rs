//! The guard: output of the guest, held until somebody says that it may go (PLOVER §4.4).
//!
//! One ring of bytes in a [`Region`]; each frame is a record (header and bytes, contiguous) in it, written there by whoever
//! takes it from the guest, so holding a frame is one copy and no allocation. Frames belong to slots; [`Guard::seal`] ends a
//! slot and gives the mark by which it is released or thrown away. Which of the two and when is the
//! caller's policy. Rejected: a queue of `Vec`s (an allocation per frame on the packet path).

use crate::frame::{MAX_FRAME_BYTES, PushError, check_length};
use crate::region::Region;

/// Record header: length u32, position u32, slot u64, arrival u64.
const HEADER_BYTES: usize = 24;
/// Records start at multiples of this, so that a rest shorter than a header never splits one.
const ALIGN_BYTES: usize = 8;
/// In place of a length: the rest of the ring up to its end is unused.
const WRAP: u32 = u32::MAX;

/// The smallest capacity of a guard: two frames of the largest size.
pub const MIN_GUARD_BYTES: usize = 2 * (MAX_FRAME_BYTES + HEADER_BYTES);

/// Names a held frame: the n-th frame of its slot. Leader and secondary number alike as long as
/// their guests do, which is what a release on agreement compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FrameNumber {
    /// The slot, counted from 1.
    pub slot: u64,
    /// Place within the slot, counted from 0.
    pub position: u32,
}

/// The end of a slot; covers every frame pushed before it was made. Marks only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SlotMark(u64);

/// Holds frames in arrival order; see the module.
#[derive(Debug)]
pub struct Guard {
    ring: Region,
    /// Offset of the oldest record.
    head: usize,
    /// Offset where the next record goes.
    tail: usize,
    /// Length of the frame that room was given for.
    offered: usize,
    /// Bytes between head and tail, gaps included; tells full from empty.
    occupied: usize,
    frames: usize,
    /// Frame bytes held, without headers and gaps.
    bytes: usize,
    slot: u64,
    position: u32,
}

/// A decoded record header.
#[derive(Clone, Copy)]
struct Record {
    len: usize,
    slot: u64,
    arrival_us: u64,
}

impl Guard {
    /// A guard whose ring is `region`.
    ///
    /// # Panics
    /// If the region is smaller than [`MIN_GUARD_BYTES`].
    pub fn new(region: Region) -> Guard {
        let capacity_bytes = region.len();
        assert!(
            capacity_bytes >= MIN_GUARD_BYTES,
            "a guard of {capacity_bytes} bytes is smaller than two frames ({MIN_GUARD_BYTES})"
        );
        assert!(capacity_bytes.is_multiple_of(ALIGN_BYTES), "regions consist of pages");
        Guard { ring: region, head: 0, tail: 0, offered: 0, occupied: 0, frames: 0, bytes: 0, slot: 1, position: 0 }
    }

    /// Memory for a frame of exactly `len` bytes; [`commit`](Self::commit) holds what was written there.
    ///
    /// # Errors
    /// [`PushError`]; nothing has changed.
    pub fn room(&mut self, len: usize) -> Result<&mut [u8], PushError> {
        self.offered = 0;
        check_length(len)?;
        let need = record_bytes(len);
        if self.occupied == 0 {
            // An empty ring can start anywhere; the start leaves the most contiguous room.
            self.head = 0;
            self.tail = 0;
        }
        if self.occupied + self.gap_before(need) + need > self.ring.len() {
            return Err(PushError::Full);
        }
        self.offered = len;
        let at = self.place_of(need);
        Ok(&mut self.ring[at + HEADER_BYTES..at + HEADER_BYTES + len])
    }

    /// What was written to the memory that [`room`](Self::room) gave last; empty if it is committed or none was given.
    pub fn offered(&self) -> &[u8] {
        let at = self.place_of(record_bytes(self.offered));
        if self.offered == 0 { &[] } else { &self.ring[at + HEADER_BYTES..at + HEADER_BYTES + self.offered] }
    }

    /// Holds the frame that was written to the memory that [`room`](Self::room) gave last, as one that arrived at `now_us`, in
    /// the present slot.
    ///
    /// # Panics
    /// If no room was given since the last call.
    pub fn commit(&mut self, now_us: u64) -> FrameNumber {
        let frame_len = std::mem::take(&mut self.offered);
        assert!(frame_len > 0, "a frame is committed for which no room was given");
        let need = record_bytes(frame_len);
        let gap = self.gap_before(need);
        if gap > 0 {
            self.ring[self.tail..self.tail + 4].copy_from_slice(&WRAP.to_le_bytes());
            self.tail = 0;
        }
        let number = FrameNumber { slot: self.slot, position: self.position };
        let len = u32::try_from(frame_len).expect("checked against MAX_FRAME_BYTES");
        let header = &mut self.ring[self.tail..self.tail + HEADER_BYTES];
        header[0..4].copy_from_slice(&len.to_le_bytes());
        header[4..8].copy_from_slice(&number.position.to_le_bytes());
        header[8..16].copy_from_slice(&number.slot.to_le_bytes());
        header[16..24].copy_from_slice(&now_us.to_le_bytes());
        self.tail = (self.tail + need) % self.ring.len();
        self.occupied += gap + need;
        self.frames += 1;
        self.bytes += frame_len;
        self.position += 1;
        number
    }

    /// Holds a copy of `frame`, which arrived at `now_us`, in the present slot.
    ///
    /// # Errors
    /// [`PushError`]; nothing was held.
    pub fn push(&mut self, now_us: u64, frame: &[u8]) -> Result<FrameNumber, PushError> {
        self.room(frame.len())?.copy_from_slice(frame);
        Ok(self.commit(now_us))
    }

    /// Where a record of `need` bytes goes.
    fn place_of(&self, need: usize) -> usize {
        if self.gap_before(need) > 0 { 0 } else { self.tail }
    }

    /// Bytes that stay unused before a record of `need` bytes, because it does not fit before the ring's end.
    fn gap_before(&self, need: usize) -> usize {
        let to_end = self.ring.len() - self.tail;
        if need > to_end { to_end } else { 0 }
    }

    /// Ends the present slot (it may be empty) and starts the next one.
    pub fn seal(&mut self) -> SlotMark {
        let mark = SlotMark(self.slot);
        self.slot += 1;
        self.position = 0;
        mark
    }

    /// Gives every frame up to `through` and the time of its arrival to `visit`, in arrival order, and forgets it. Returns how
    /// many there were; a mark that was passed before has none.
    ///
    /// # Panics
    /// If `through` did not come from [`seal`](Self::seal) of this guard.
    pub fn release(&mut self, through: SlotMark, visit: impl FnMut(&[u8], u64)) -> usize {
        self.release_some(through, usize::MAX, visit)
    }

    /// As [`release`](Self::release), for at most `budget_frames`. Fewer means that none is left.
    ///
    /// # Panics
    /// As [`release`](Self::release).
    pub fn release_some(
        &mut self,
        through: SlotMark,
        budget_frames: usize,
        mut visit: impl FnMut(&[u8], u64),
    ) -> usize {
        assert!(through.0 < self.slot, "mark {} was not sealed; the present slot is {}", through.0, self.slot);
        let mut released = 0;
        while released < budget_frames
            && let Some((at, record)) = self.front()
        {
            if record.slot > through.0 {
                break;
            }
            visit(&self.ring[at + HEADER_BYTES..at + HEADER_BYTES + record.len], record.arrival_us);
            self.pop(at, record);
            released += 1;
        }
        released
    }

    /// Throws away every frame up to `through`; returns how many.
    ///
    /// # Panics
    /// As [`release`](Self::release).
    pub fn discard(&mut self, through: SlotMark) -> usize {
        self.release(through, |_, _| {})
    }

    /// Throws away everything, also the present slot's frames so far; returns how many. Slot
    /// numbers go on, so marks stay monotonic.
    pub fn discard_all(&mut self) -> usize {
        let frames = std::mem::take(&mut self.frames);
        self.head = 0;
        self.tail = 0;
        self.occupied = 0;
        self.bytes = 0;
        frames
    }

    /// Frame bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Frames held.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// Bytes of the ring that are free, record headers not counted. A frame that does not fit at
    /// the end of the ring needs more than its length.
    pub fn free_bytes(&self) -> usize {
        self.ring.len() - self.occupied
    }

    /// Arrival time of the oldest frame held.
    pub fn oldest_us(&self) -> Option<u64> {
        self.front().map(|(_, record)| record.arrival_us)
    }

    /// Where the oldest record is, past a wrap marker.
    fn front(&self) -> Option<(usize, Record)> {
        if self.frames == 0 {
            return None;
        }
        let at = if self.word(self.head) == WRAP { 0 } else { self.head };
        let long = |at: usize| u64::from_le_bytes(self.ring[at..at + 8].try_into().expect("8 bytes"));
        let record = Record { len: self.word(at) as usize, slot: long(at + 8), arrival_us: long(at + 16) };
        Some((at, record))
    }

    fn word(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.ring[at..at + 4].try_into().expect("4 bytes"))
    }

    fn pop(&mut self, at: usize, record: Record) {
        let gap = if at == self.head { 0 } else { self.ring.len() - self.head };
        let size = record_bytes(record.len);
        self.head = (at + size) % self.ring.len();
        self.occupied -= gap + size;
        self.frames -= 1;
        self.bytes -= record.len;
        assert!(self.frames > 0 || (self.occupied == 0 && self.bytes == 0), "the guard's counts disagree");
    }
}

fn record_bytes(frame_len: usize) -> usize {
    (HEADER_BYTES + frame_len).next_multiple_of(ALIGN_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::PageSize;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn small() -> Guard {
        Guard::new(Region::map(MIN_GUARD_BYTES, PageSize::Normal, None).unwrap())
    }

    #[derive(Debug, Clone)]
    enum Op {
        Push(usize),
        Seal,
        Release(usize),
        ReleaseSome(usize, usize),
        Discard(usize),
        DiscardAll,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            10 => (12usize..20_000).prop_map(Op::Push),
            2 => (12usize..=MAX_FRAME_BYTES).prop_map(Op::Push),
            3 => Just(Op::Seal),
            2 => any::<usize>().prop_map(Op::Release),
            2 => (any::<usize>(), 0usize..5).prop_map(|(pick, budget)| Op::ReleaseSome(pick, budget)),
            1 => any::<usize>().prop_map(Op::Discard),
            1 => Just(Op::DiscardAll),
        ]
    }

    /// The same guard as a queue of vectors.
    #[derive(Default)]
    struct Model {
        held: VecDeque<(u64, u64, Vec<u8>)>,
    }

    impl Model {
        fn take(&mut self, through: SlotMark) -> Vec<Vec<u8>> {
            self.take_some(through, usize::MAX)
        }

        fn take_some(&mut self, through: SlotMark, budget: usize) -> Vec<Vec<u8>> {
            let mut out = Vec::new();
            while out.len() < budget && self.held.front().is_some_and(|(slot, ..)| *slot <= through.0) {
                out.push(self.held.pop_front().unwrap().2);
            }
            out
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_queue_of_vectors(ops in prop::collection::vec(op(), 1..300)) {
            let mut guard = small();
            let mut model = Model::default();
            let mut marks: Vec<SlotMark> = Vec::new();
            let mut position = 0;
            for (step, op) in ops.into_iter().enumerate() {
                let now = step as u64 * 3;
                match op {
                    Op::Push(len) => {
                        let frame: Vec<u8> = (0..len).map(|b| (b ^ step) as u8).collect();
                        let room = guard.room(len).map(|room| room.copy_from_slice(&frame));
                        prop_assert_eq!(guard.offered(), if room.is_ok() { &frame[..] } else { &[] });
                        match room.map(|()| guard.commit(now)) {
                            Ok(number) => {
                                prop_assert!(guard.offered().is_empty());
                                let slot = marks.last().map_or(1, |m| m.0 + 1);
                                prop_assert_eq!(number, FrameNumber { slot, position });
                                position += 1;
                                model.held.push_back((slot, now, frame));
                            }
                            // Full may only be said when a gap plus the frame really do not fit.
                            Err(error) => prop_assert!(
                                error.is_full() && guard.free_bytes() < 2 * record_bytes(len),
                                "{} with {} free", error, guard.free_bytes()
                            ),
                        }
                    }
                    Op::Seal => {
                        let mark = guard.seal();
                        prop_assert!(marks.last().is_none_or(|last| *last < mark));
                        marks.push(mark);
                        position = 0;
                    }
                    Op::Release(pick) if !marks.is_empty() => {
                        let mark = marks[pick % marks.len()];
                        let mut out = Vec::new();
                        let count = guard.release(mark, |frame, _| out.push(frame.to_vec()));
                        prop_assert_eq!(count, out.len());
                        prop_assert_eq!(out, model.take(mark));
                    }
                    Op::ReleaseSome(pick, budget) if !marks.is_empty() => {
                        let mark = marks[pick % marks.len()];
                        let mut out = Vec::new();
                        let count = guard.release_some(mark, budget, |frame, _| out.push(frame.to_vec()));
                        prop_assert_eq!(count, out.len());
                        prop_assert_eq!(out, model.take_some(mark, budget));
                    }
                    Op::Discard(pick) if !marks.is_empty() => {
                        let mark = marks[pick % marks.len()];
                        prop_assert_eq!(guard.discard(mark), model.take(mark).len());
                    }
                    Op::Release(_) | Op::ReleaseSome(..) | Op::Discard(_) => {}
                    Op::DiscardAll => {
                        prop_assert_eq!(guard.discard_all(), model.held.len());
                        model.held.clear();
                    }
                }
                prop_assert_eq!(guard.frames(), model.held.len());
                prop_assert_eq!(guard.bytes(), model.held.iter().map(|(.., f)| f.len()).sum::<usize>());
                prop_assert_eq!(guard.oldest_us(), model.held.front().map(|(_, at, _)| *at));
            }
        }
    }

    #[test]
    fn an_empty_guard_takes_the_largest_frame_wherever_it_stood() {
        let mut guard = small();
        for _ in 0..10 {
            guard.push(0, &vec![3; 50_000]).unwrap();
            guard.push(0, &vec![4; MAX_FRAME_BYTES]).unwrap();
            let mark = guard.seal();
            assert_eq!(guard.release(mark, |_, _| {}), 2);
        }
    }

    #[test]
    fn refuses_frames_that_are_none() {
        let mut guard = small();
        assert_eq!(guard.push(0, &[0; 11]), Err(PushError::BadLength { len: 11 }));
        assert!(guard.push(0, &vec![0; MAX_FRAME_BYTES + 1]).is_err_and(|e| !e.is_full()));
    }

    #[test]
    fn room_that_is_not_committed_changes_nothing() {
        let mut guard = small();
        guard.push(0, &[1; 100]).unwrap();
        guard.room(50_000).unwrap().fill(9);
        guard.push(0, &[2; 60]).unwrap();
        let mark = guard.seal();
        let mut out = Vec::new();
        guard.release(mark, |frame, _| out.push(frame.to_vec()));
        assert_eq!(out, [vec![1; 100], vec![2; 60]]);
    }

    #[test]
    #[should_panic(expected = "no room was given")]
    fn committing_what_was_not_offered_is_a_bug() {
        let mut guard = small();
        let _ = guard.room(100);
        guard.commit(0);
        guard.commit(0);
    }

    #[test]
    #[should_panic(expected = "was not sealed")]
    fn releasing_the_present_slot_is_a_bug() {
        let mut other = small();
        let mark = other.seal();
        small().release(mark, |_, _| {});
    }
}
