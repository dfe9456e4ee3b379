//! A pair of rings, and a slot that both sides write in turns: the shortest way for a message that answers a message.
//!
//! In a ring an answer costs two transfers of a cache line, because each side writes lines of its own: the writer must fetch
//! the line from the reader, who had it last, and the reader fetches it back. In the slot the answer goes into the very lines
//! that the question came in, which its reader has got anyway: one transfer per message, as little as two processors can do.
//! Measured: where a bare line goes to and fro in 1, the slot takes 1.3 to 1.5, a line per direction 1.7 to 2.1.
//!
//! Who wrote last must not write again before the other has: the number in the slot's mark says whose turn it is, and it is
//! the only thing to check. What may not or does not fit goes through the ring as ever, so nothing waits for a turn. A
//! message in the slot says how far its writer had come in its ring, and is taken between the records before and after.
//! The reader looks at the slot, at the ring, and when that has a record at the slot again: what was written before
//! that record is visible by then.
//!
//! Rejected: turns that are passed on through the ring (the writer would have to fetch the slot first, and had nothing over
//! the ring), and a position of 64 bits (a word less for the payload; a mark is never more than a ring old).
//! The loom tests (tests/loom.rs) run this very file.

use super::ring::{
    Assembly, Consumer, Control, Heap, Kind, LINE_BYTES, Memory, Producer, Violation, write_line, write_payload,
};
use super::sync::cache_line::{self, LINE_WORDS};
use super::sync::{AtomicU64, Ordering};
use std::sync::Arc;

/// Lines of the slot: a pair, which processors fetch together.
pub const SLOT_LINES: usize = 2;
/// Words of the slot.
pub const SLOT_WORDS: usize = SLOT_LINES * LINE_WORDS;
/// The longest message in the slot.
pub const MAX_SLOT_BYTES: usize = SLOT_LINES * LINE_BYTES;

/// A mark from its lowest bit: length, number, position in the writer's ring.
const LENGTH_BITS: u32 = 8;
const NUMBER_BITS: u32 = 24;
const POSITION_SHIFT: u32 = LENGTH_BITS + NUMBER_BITS;
const _: () = assert!(MAX_SLOT_BYTES < 1 << LENGTH_BITS && POSITION_SHIFT == u32::BITS);

/// Memory of a direction that has the slot beside it; both directions have the same one.
pub trait SlotMemory: Memory {
    /// [`SLOT_WORDS`], all zero at first. Best at the start of a pair of cache lines.
    fn slot(&self) -> &[AtomicU64];
}

/// One direction of a pair in this process' own memory.
#[derive(Debug, Clone)]
pub struct HeapSide {
    ring: Arc<Heap>,
    slot: Arc<[AtomicU64]>,
}

impl HeapSide {
    /// An empty pair with rings of that many bytes: from the side that begins, and to it.
    ///
    /// # Panics
    /// As [`Heap::new`].
    pub fn pair(ring_bytes: usize) -> [HeapSide; 2] {
        let slot: Arc<[AtomicU64]> = (0..SLOT_WORDS).map(|_| AtomicU64::new(0)).collect();
        [(); 2].map(|()| HeapSide { ring: Arc::new(Heap::new(ring_bytes)), slot: Arc::clone(&slot) })
    }
}

impl Memory for HeapSide {
    fn control(&self) -> &Control {
        Memory::control(&self.ring)
    }

    fn words(&self) -> &[AtomicU64] {
        Memory::words(&self.ring)
    }
}

impl SlotMemory for HeapSide {
    fn slot(&self) -> &[AtomicU64] {
        &self.slot
    }
}

/// A message in the slot that was not taken yet.
#[derive(Debug, Clone, Copy)]
struct Pending {
    length: usize,
    /// What is to be taken from the ring before it, lines.
    behind: u32,
}

/// What there is to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// A whole message in the slot. Whatever else there may be, an answer is better written before it is looked for.
    Slot,
    /// Records in the ring.
    Records,
}

/// One side's end of both rings and of the slot.
#[derive(Debug)]
pub struct Ends<M> {
    out: Producer<M>,
    input: Consumer<M>,
    /// Of the last message in the slot, written by either side.
    number: u32,
    /// Whether this side may write there.
    our_turn: bool,
    pending: Option<Pending>,
    /// A message is begun in the ring and not complete.
    within_message: bool,
}

impl<M: SlotMemory> Ends<M> {
    /// An end of memory that is all zero. One side `begins`, the other does not.
    ///
    /// # Panics
    /// If the memory's sizes are not what [`Memory`] and [`SlotMemory`] say.
    pub fn new(out: M, input: M, begins: bool) -> Ends<M> {
        assert!(out.slot().len() == SLOT_WORDS && input.slot().len() == SLOT_WORDS, "a slot of another size");
        Ends {
            out: Producer::new(out),
            input: Consumer::new(input),
            number: 0,
            our_turn: begins,
            pending: None,
            within_message: false,
        }
    }

    /// The longest payload of a record, bytes.
    pub fn max_record_bytes(&self) -> usize {
        self.out.max_record_bytes()
    }

    /// Writes the concatenation of `parts` as one record; `false` if there is no room.
    ///
    /// # Errors
    /// [`Violation`].
    ///
    /// # Panics
    /// If the parts are longer than [`max_record_bytes`](Self::max_record_bytes).
    #[inline]
    pub fn push(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<bool, Violation> {
        if self.our_turn && kind == Kind::Last && !self.within_message {
            let length = parts.iter().map(|part| part.len()).sum();
            if length <= MAX_SLOT_BYTES {
                self.write(length, parts);
                return Ok(true);
            }
        }
        let pushed = self.out.push(kind, parts)?;
        if pushed {
            self.within_message = kind == Kind::More;
        }
        Ok(pushed)
    }

    #[inline]
    fn write(&mut self, length: usize, parts: &[&[u8]]) {
        self.number = next(self.number);
        self.our_turn = false;
        let need = length.div_ceil(LINE_BYTES).max(1) * LINE_WORDS;
        let mark = u64::from(self.out.written() as u32) << POSITION_SHIFT
            | u64::from(self.number) << LENGTH_BITS
            | length as u64;
        let words = &self.out.memory().slot()[..need];
        match parts {
            [part] if length <= LINE_BYTES => write_line(words, part),
            _ => write_payload(words, parts),
        }
        words[0].store(mark, Ordering::Release);
        words.iter().step_by(LINE_WORDS).for_each(cache_line::hand_on);
        self.out.published();
    }

    /// What the next [`take`](Self::take) takes. A line that an answer may be written into is fetched already now.
    ///
    /// # Errors
    /// [`Violation`].
    #[inline]
    pub fn find(&mut self) -> Result<Found, Violation> {
        self.look()?;
        if self.pending.is_some_and(|pending| pending.behind == self.input.position() as u32) {
            return Ok(Found::Slot);
        }
        if !self.input.has_record() {
            // What the slot's message comes behind was visible before it.
            return self.pending.map_or(Ok(Found::Nothing), |_| Err(self.out_of_turn()));
        }
        // To fetch a line takes as long as to handle a message, after which there is often an answer to write.
        self.out.claim();
        Ok(Found::Records)
    }

    /// Takes the next record, if there is one, and appends its payload to `into`, which is empty unless a message is begun.
    ///
    /// # Errors
    /// [`Violation`].
    #[inline]
    pub fn take(&mut self, into: &mut Assembly) -> Result<Option<Kind>, Violation> {
        self.look()?;
        if self.take_from_slot(into)? {
            return Ok(Some(Kind::Last));
        }
        if !self.input.has_record() {
            // What the slot's message comes behind was visible before it.
            return self.pending.map_or(Ok(None), |_| Err(self.out_of_turn()));
        }
        // What was written to the slot before that record is visible now.
        self.look()?;
        if self.take_from_slot(into)? {
            return Ok(Some(Kind::Last));
        }
        self.input.take(into)
    }

    #[inline]
    fn take_from_slot(&mut self, into: &mut Assembly) -> Result<bool, Violation> {
        let Some(Pending { length, behind }) = self.pending else { return Ok(false) };
        if behind != self.input.position() as u32 {
            return Ok(false);
        }
        if !into.bytes().is_empty() {
            return Err(self.out_of_turn());
        }
        let need = length.div_ceil(LINE_BYTES) * LINE_WORDS;
        into.append_lines(&self.input.memory().slot()[..need], length);
        self.pending = None;
        self.our_turn = true;
        Ok(true)
    }

    /// Learns of a message in the slot.
    #[inline]
    fn look(&mut self) -> Result<(), Violation> {
        if self.our_turn || self.pending.is_some() {
            return Ok(());
        }
        let mark = self.input.memory().slot()[0].load(Ordering::Acquire);
        let number = mark as u32 >> LENGTH_BITS;
        if number == self.number {
            return Ok(());
        }
        let length = mark as usize & ((1 << LENGTH_BITS) - 1);
        let behind = (mark >> POSITION_SHIFT) as u32;
        let lines = behind.wrapping_sub(self.input.position() as u32) as usize;
        if number != next(self.number) || length > MAX_SLOT_BYTES || lines > self.input.lines() {
            return Err(Violation::Turn { mark });
        }
        self.number = number;
        self.pending = Some(Pending { length, behind });
        Ok(())
    }

    #[cold]
    fn out_of_turn(&self) -> Violation {
        Violation::Turn { mark: self.input.memory().slot()[0].load(Ordering::Relaxed) }
    }

    /// Whether the other side sleeps and is to be woken, for a record or for room. Says so once.
    #[inline]
    pub fn take_wake(&mut self) -> bool {
        // Not lazily: both forget what they have looked at.
        self.out.take_wake() | self.input.take_wake()
    }

    /// As [`Producer::take_early_wake`].
    #[inline]
    pub fn take_early_wake(&mut self) -> bool {
        self.out.take_early_wake()
    }

    /// Before sleeping until there is a record and, with a length, until a record so long fits. `true`: do not sleep.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn arm(&mut self, length: Option<usize>) -> Result<bool, Violation> {
        let has_room = length.map_or(Ok(false), |length| self.out.arm(length))?;
        // Both, whatever the first says: the owner disarms both. The slot after the fence in between.
        let has_record = self.input.arm();
        self.look()?;
        Ok(has_room || has_record || self.pending.is_some())
    }

    /// No wake-up is wanted any more.
    #[inline]
    pub fn disarm(&mut self) {
        self.input.disarm();
        self.out.disarm();
    }
}

fn next(number: u32) -> u32 {
    (number + 1) & ((1 << NUMBER_BITS) - 1)
}
