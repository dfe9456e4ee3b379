//! A ring of byte records between one producer and one consumer: two threads, or two processes that share memory.
//!
//! The ring is made of cache lines. Each begins with a mark and has room for [`LINE_BYTES`] of payload; a record takes whole
//! lines and is never wrapped around the end. The mark of its first line holds kind, length and lap, and is written last: a
//! waiting consumer watches that one word, and a message of up to [`LINE_BYTES`] is one transfer of one cache line. The lap
//! tells a record from what an earlier lap left in its place, and the other lines' marks are no records of any lap, so
//! nothing needs to be cleared and old payload is never taken for a record. The consumer tells now and then how far it has
//! read, and the producer looks only when its last knowledge leaves no room.
//!
//! A ring may be large, for bursts, but as long as the consumer keeps up the producer goes back to its start early and
//! uses the first [`WINDOW_LINES`] only: those stay in both first-level caches. Measured on an EPYC: a round trip through
//! 4 KiB takes 1.6 times as long as one of a bare line, through 16 KiB and more 3.2 times.
//!
//! What a message costs is cache lines that change hands. A look at the next line before there is a record takes it from the
//! producer, who must then fetch it back to write: a consumer that expects an answer does better to wait a moment (the shm lane
//! does), and a producer that is about to answer to ask for its line early ([`Producer::claim`]). A record of one line is moved on
//! towards the shared cache. Each was measured; to claim the next line right after a record made a round trip longer.
//!
//! Every word is an atomic, so that a peer that writes when it should not makes garbage, never undefined behaviour; what
//! the peer wrote is read once and checked, and no word has two writers. Sleeping works as Dekker's algorithm does: each
//! side stores, fences, and then looks at what the other stored.
//!
//! Rejected: head and tail indices (two lines per message), records of words that clear the word behind them (the sender
//! needs a second line for itself before it can publish: a fifth of a round trip), a memcpy (a data race with a peer that
//! misbehaves), one mapping twice in a row to hide the wrap (no gain for short records), and a sleep flag that the waker
//! takes down (a second writer, and one more line that goes to and fro).
//! The loom tests (tests/loom.rs) run this very file.

use super::sync::cache_line::{self, LINE_WORDS};
use super::sync::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::Arc;

/// Bytes in a word.
pub const WORD_BYTES: usize = 8;
/// Payload of a line, bytes. Lines are the unit of positions: a mark, then payload.
pub const LINE_BYTES: usize = cache_line::LINE_BYTES;
const PAYLOAD_WORDS: usize = LINE_WORDS - 1;
/// A record takes at most this part of the ring; then an empty ring has room for any, wherever it ends.
const RECORD_SHARE: usize = 4;
/// The consumer tells its position whenever it has read so many lines, or this part of a small ring.
const TELL_LINES: usize = 8;
const TELL_SHARE: usize = 8;
/// What is used of the ring while the consumer keeps up, lines; half of a small ring.
const WINDOW_LINES: usize = 64;
/// The smallest ring, lines.
const MIN_LINES: usize = RECORD_SHARE;

/// The mark of a line that begins no record, and of one that was never written.
const NOTHING: u64 = 0;
/// A mark from its lowest bit: length, kind, lap. Laps count from 1.
const LENGTH_BITS: u32 = 21;
const KIND_BITS: u32 = 2;
const LAP_SHIFT: u32 = LENGTH_BITS + KIND_BITS;
/// No ring turns more often: a mark of that age could be taken for a new one. Months of nothing but messages.
const MAX_LAP: u64 = (1 << (u64::BITS - LAP_SHIFT)) - 1;
const KIND_SKIP: u64 = 3;

/// Keeps what different threads write apart: two lines of 64 bytes, because processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(C, align(128))]
struct Line<T>(T);

/// The words beside the records.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Control {
    /// Lines read; written by the consumer.
    consumed: Line<AtomicU64>,
    /// Odd: the consumer sleeps and wants to know of records. Another number for each sleep.
    sleeping: Line<AtomicU32>,
    /// The same of the producer, for room.
    starved: Line<AtomicU32>,
}

/// Where a ring lives. All zero at first.
pub trait Memory {
    /// The words beside the records.
    fn control(&self) -> &Control;
    /// Room for records: a power of two, at least 32, and always the same. Best at the start of a cache line.
    fn words(&self) -> &[AtomicU64];
}

/// A ring in this process' own memory.
#[derive(Debug)]
pub struct Heap {
    control: Control,
    words: Box<[AtomicU64]>,
}

impl Heap {
    /// An empty ring of that many bytes.
    ///
    /// # Panics
    /// If `bytes` is no power of two or less than 256.
    pub fn new(bytes: usize) -> Heap {
        Heap { control: Control::default(), words: (0..bytes / WORD_BYTES).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl Memory for Arc<Heap> {
    fn control(&self) -> &Control {
        &self.control
    }

    fn words(&self) -> &[AtomicU64] {
        &self.words
    }
}

/// Whether a record ends a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The message is complete with it.
    Last,
    /// More of the message follows.
    More,
}

impl Kind {
    fn number(self) -> u64 {
        match self {
            Kind::Last => 1,
            Kind::More => 2,
        }
    }

    fn of_number(number: u64) -> Option<Kind> {
        [Kind::Last, Kind::More].into_iter().find(|kind| kind.number() == number)
    }
}

/// The other side wrote what no other side of ours writes. The ring must not be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The consumer claims to have read what was not written, or to have gone back.
    #[error("it says that it has read up to line {said}, which is not in {from}..={to}")]
    Consumed {
        /// What it said.
        said: u64,
        /// What it had said before.
        from: u64,
        /// What was written.
        to: u64,
    },
    /// The producer wrote a header that is none.
    #[error("it wrote the mark {mark:#018x} at line {at}, which begins no record")]
    Mark {
        /// The mark.
        mark: u64,
        /// Where.
        at: usize,
    },
    /// The other side wrote a mark into the slot that nobody writes there, or not yet ([`turn`](super::turn)).
    #[error("it wrote the mark {mark:#018x} into the slot, where it has none to write")]
    Turn {
        /// The mark.
        mark: u64,
    },
    /// Nobody did anything wrong, but the laps cannot be counted any further.
    #[error("the ring is worn out after {MAX_LAP} laps")]
    WornOut,
}

/// Received bytes. Kept and used again; grows to the longest message seen.
#[derive(Debug, Default)]
pub struct Assembly {
    bytes: Vec<u8>,
    filled: usize,
}

impl Assembly {
    /// What was received since [`clear`](Self::clear).
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.filled]
    }

    /// Forgets it.
    pub fn clear(&mut self) {
        self.filled = 0;
    }

    /// As [`append`](Self::append), for few lines: they are read whole.
    #[inline]
    pub(crate) fn append_lines(&mut self, words: &[AtomicU64], length: usize) {
        let (lines, _) = words.as_chunks::<LINE_WORDS>();
        let end = self.filled + lines.len() * LINE_BYTES;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let (places, _) = self.bytes[self.filled..end].as_chunks_mut::<LINE_BYTES>();
        for (place, [_, payload @ ..]) in places.iter_mut().zip(lines) {
            read_words(place, payload);
        }
        self.filled += length;
    }

    /// The payload of a record of `length` bytes.
    fn append(&mut self, words: &[AtomicU64], length: usize) {
        let (lines, _) = words.as_chunks::<LINE_WORDS>();
        let end = self.filled + lines.len() * LINE_BYTES;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let (places, _) = self.bytes[self.filled..end].as_chunks_mut::<LINE_BYTES>();
        let whole = length / LINE_BYTES;
        let done = cache_line::read(&lines[..whole], &mut places[..whole]);
        for (place, [_, payload @ ..]) in places[done..whole].iter_mut().zip(&lines[done..]) {
            read_words(place, payload);
        }
        if let (Some(place), Some([_, payload @ ..])) = (places.get_mut(whole), lines.get(whole)) {
            read_words(place, &payload[..(length % LINE_BYTES).div_ceil(WORD_BYTES)]);
        }
        self.filled += length;
    }
}

fn read_words(place: &mut [u8; LINE_BYTES], words: &[AtomicU64]) {
    let (chunks, _) = place.as_chunks_mut::<WORD_BYTES>();
    for (chunk, word) in chunks.iter_mut().zip(words) {
        *chunk = word.load(Ordering::Relaxed).to_ne_bytes();
    }
}

/// This side's sleeps, which the other side sees.
#[derive(Debug, Default)]
struct Sleeper {
    number: u32,
}

impl Sleeper {
    /// Says that this side is about to sleep. What is looked at afterwards is as new as what the other side looks at.
    fn lie_down(&mut self, sign: &AtomicU32) {
        // Also when it lies already: who was rung for turns over to be rung for again.
        self.number = self.number.wrapping_add(1) | 1;
        sign.store(self.number, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    fn get_up(&mut self, sign: &AtomicU32) {
        if !self.number.is_multiple_of(2) {
            self.number = self.number.wrapping_add(1);
            sign.store(self.number, Ordering::Relaxed);
        }
    }
}

/// Wakes the other side, once per sleep.
#[derive(Debug, Default)]
struct Waker {
    /// Something was stored since the last look.
    news: bool,
    /// The sleep that was ended last.
    ended: u32,
}

impl Waker {
    /// As [`take_wake`](Self::take_wake), without the fence: misses a sleep that has just begun. The news stays news.
    fn take_early_wake(&mut self, sign: &AtomicU32) -> bool {
        let number = sign.load(Ordering::Relaxed);
        if number.is_multiple_of(2) || number == self.ended {
            return false;
        }
        self.ended = number;
        true
    }

    fn take_wake(&mut self, sign: &AtomicU32) -> bool {
        if !std::mem::take(&mut self.news) {
            return false;
        }
        cache_line::full_fence();
        self.take_early_wake(sign)
    }
}

/// The writing end.
#[derive(Debug)]
pub struct Producer<M> {
    memory: M,
    /// Of the ring.
    lines: usize,
    /// Lines written.
    written: u64,
    /// Lines that the consumer has read as far as we know.
    consumed: u64,
    /// Where in the ring it is worth trying to go back to the start.
    turn_at: usize,
    sleeper: Sleeper,
    waker: Waker,
}

impl<M: Memory> Producer<M> {
    /// The writing end of a ring that is all zero. There must be one only.
    ///
    /// # Panics
    /// If the memory's size is not what [`Memory::words`] says.
    pub fn new(memory: M) -> Producer<M> {
        let lines = checked_lines(&memory);
        let turn_at = window_lines(lines);
        Producer {
            memory,
            lines,
            written: 0,
            consumed: 0,
            turn_at,
            sleeper: Sleeper::default(),
            waker: Waker::default(),
        }
    }

    /// The longest payload of a record, bytes.
    pub fn max_record_bytes(&self) -> usize {
        max_record_bytes(self.lines)
    }

    /// Writes the concatenation of `parts` as one record; `false` if there is no room.
    ///
    /// # Errors
    /// [`Violation`].
    ///
    /// # Panics
    /// If the parts are longer than [`max_record_bytes`](Self::max_record_bytes).
    pub fn push(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<bool, Violation> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        assert!(length <= self.max_record_bytes(), "a record of {length} bytes");
        if !self.has_room(length)? {
            return Ok(false);
        }
        let need = record_lines(length);
        let turns = self.turns_early(need)?;
        let at = position(self.written, self.lines);
        let behind = self.lines - at;
        let start = if need <= behind && !turns { self.written } else { self.written + behind as u64 };
        if lap(start, self.lines) > MAX_LAP {
            return Err(Violation::WornOut);
        }
        let words = self.memory.words();
        let first = position(start, self.lines) * LINE_WORDS;
        write_payload(&words[first..][..need * LINE_WORDS], parts);
        words[first].store(mark(lap(start, self.lines), kind.number(), length), Ordering::Release);
        if start != self.written {
            let skip = mark(lap(self.written, self.lines), KIND_SKIP, 0);
            words[at * LINE_WORDS].store(skip, Ordering::Release);
        }
        if need == 1 {
            cache_line::hand_on(&words[first]);
        }
        self.written = start + need as u64;
        self.waker.news = true;
        Ok(true)
    }

    /// Where it writes.
    pub(crate) fn memory(&self) -> &M {
        &self.memory
    }

    /// Lines written.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Something was written beside the ring that the consumer is to be woken for.
    pub(crate) fn published(&mut self) {
        self.waker.news = true;
    }

    /// Fetches the line of the next record already now. It is in vain if the consumer looks there once more.
    pub fn claim(&self) {
        cache_line::claim(&self.memory.words()[position(self.written, self.lines) * LINE_WORDS]);
    }

    /// Whether to go back to the start though there is room behind: possible if the consumer has left it.
    fn turns_early(&mut self, need: usize) -> Result<bool, Violation> {
        let (capacity, window) = (self.lines, window_lines(self.lines));
        let at = position(self.written, capacity);
        if at < self.turn_at {
            if at < window {
                self.turn_at = window;
            }
            return Ok(false);
        }
        let wanted = (capacity - at + need) as u64;
        let written = self.written;
        let fits = |consumed| written - consumed + wanted <= capacity as u64;
        let turns = fits(self.consumed) || fits(self.look()?);
        if !turns {
            // The consumer is behind. It costs a look, so not with each record.
            self.turn_at = at + window;
        }
        Ok(turns)
    }

    /// Learns how far the consumer is.
    fn look(&mut self) -> Result<u64, Violation> {
        // Acquire: the consumer's reads are over before we write there.
        let said = self.memory.control().consumed.0.load(Ordering::Acquire);
        if said < self.consumed || said > self.written {
            return Err(Violation::Consumed { said, from: self.consumed, to: self.written });
        }
        self.consumed = said;
        Ok(said)
    }

    /// Whether a record of `length` bytes fits now.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn has_room(&mut self, length: usize) -> Result<bool, Violation> {
        let capacity = self.lines;
        let need = record_lines(length);
        let behind = capacity - position(self.written, capacity);
        let skipped = if need <= behind { 0 } else { behind };
        let wanted = (skipped + need) as u64;
        if self.written - self.consumed + wanted <= capacity as u64 {
            return Ok(true);
        }
        Ok(self.written - self.look()? + wanted <= capacity as u64)
    }

    /// Whether the consumer sleeps and is to be woken for what was written. Says so once.
    pub fn take_wake(&mut self) -> bool {
        self.waker.take_wake(&self.memory.control().sleeping.0)
    }

    /// As [`take_wake`](Self::take_wake), but costs next to nothing and misses a consumer that has just gone to sleep:
    /// [`take_wake`](Self::take_wake) must follow soon, and before this side sleeps.
    pub fn take_early_wake(&mut self) -> bool {
        self.waker.take_early_wake(&self.memory.control().sleeping.0)
    }

    /// Before sleeping until a record of `length` bytes fits. `true`: it fits already.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn arm(&mut self, length: usize) -> Result<bool, Violation> {
        self.sleeper.lie_down(&self.memory.control().starved.0);
        let fits = self.has_room(length)?;
        if fits {
            self.disarm();
        }
        Ok(fits)
    }

    /// No wake-up is wanted any more.
    pub fn disarm(&mut self) {
        self.sleeper.get_up(&self.memory.control().starved.0);
    }
}

/// The reading end.
#[derive(Debug)]
pub struct Consumer<M> {
    memory: M,
    /// Of the ring.
    lines: usize,
    /// Lines read.
    read: u64,
    /// Lines read that the producer was told of.
    told: u64,
    sleeper: Sleeper,
    waker: Waker,
}

impl<M: Memory> Consumer<M> {
    /// The reading end of a ring that is all zero. There must be one only.
    ///
    /// # Panics
    /// If the memory's size is not what [`Memory::words`] says.
    pub fn new(memory: M) -> Consumer<M> {
        let lines = checked_lines(&memory);
        Consumer { memory, lines, read: 0, told: 0, sleeper: Sleeper::default(), waker: Waker::default() }
    }

    /// Where it reads.
    pub(crate) fn memory(&self) -> &M {
        &self.memory
    }

    /// Lines read.
    pub(crate) fn position(&self) -> u64 {
        self.read
    }

    /// Lines of the ring.
    pub(crate) fn lines(&self) -> usize {
        self.lines
    }

    /// Takes the next record, if there is one, and appends its payload to `into`.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn take(&mut self, into: &mut Assembly) -> Result<Option<Kind>, Violation> {
        let mut at = position(self.read, self.lines);
        let Some(mut mark) = self.mark() else { return Ok(None) };
        if kind_number(mark) == KIND_SKIP && at != 0 {
            self.read += (self.lines - at) as u64;
            at = 0;
            let Some(next) = self.mark() else { return Ok(None) };
            mark = next;
        }
        let length = (mark & ((1 << LENGTH_BITS) - 1)) as usize;
        let need = record_lines(length);
        let fits = length <= max_record_bytes(self.lines) && need <= self.lines - at;
        let Some(kind) = Kind::of_number(kind_number(mark)).filter(|_| fits) else {
            return Err(Violation::Mark { mark, at });
        };
        into.append(&self.memory.words()[at * LINE_WORDS..][..need * LINE_WORDS], length);
        self.read += need as u64;
        if self.read - self.told >= TELL_LINES.min(self.lines / TELL_SHARE) as u64 {
            // Release: our reads are over before the producer writes there.
            self.memory.control().consumed.0.store(self.read, Ordering::Release);
            self.told = self.read;
            self.waker.news = true;
        }
        Ok(Some(kind))
    }

    /// The mark of the next line, if it is of this lap.
    fn mark(&self) -> Option<u64> {
        let mark = self.memory.words()[position(self.read, self.lines) * LINE_WORDS].load(Ordering::Acquire);
        (mark >> LAP_SHIFT == lap(self.read, self.lines)).then_some(mark)
    }

    /// Whether there is a record.
    pub fn has_record(&self) -> bool {
        self.mark().is_some()
    }

    /// Whether the producer sleeps and is to be woken for the room that was made. Says so once.
    pub fn take_wake(&mut self) -> bool {
        self.waker.take_wake(&self.memory.control().starved.0)
    }

    /// Before sleeping until there is a record. `true`: there is one already.
    pub fn arm(&mut self) -> bool {
        self.sleeper.lie_down(&self.memory.control().sleeping.0);
        let has_record = self.has_record();
        if has_record {
            self.disarm();
        }
        has_record
    }

    /// No wake-up is wanted any more.
    pub fn disarm(&mut self) {
        self.sleeper.get_up(&self.memory.control().sleeping.0);
    }
}

/// The lines of a ring.
fn checked_lines<M: Memory>(memory: &M) -> usize {
    let words = memory.words().len();
    assert!(words.is_power_of_two() && words >= MIN_LINES * LINE_WORDS, "a ring of {words} words");
    words / LINE_WORDS
}

fn position(count: u64, lines: usize) -> usize {
    count as usize & (lines - 1)
}

/// In which lap, from 1, line `count` is written.
fn lap(count: u64, lines: usize) -> u64 {
    (count >> lines.trailing_zeros()) + 1
}

fn mark(lap: u64, kind: u64, length: usize) -> u64 {
    lap << LAP_SHIFT | kind << LENGTH_BITS | length as u64
}

fn kind_number(mark: u64) -> u64 {
    mark >> LENGTH_BITS & ((1 << KIND_BITS) - 1)
}

fn record_lines(length: usize) -> usize {
    length.div_ceil(LINE_BYTES).max(1)
}

fn window_lines(lines: usize) -> usize {
    WINDOW_LINES.min(lines / 2)
}

fn max_record_bytes(lines: usize) -> usize {
    (lines / RECORD_SHARE * LINE_BYTES).min((1 << LENGTH_BITS) - 1)
}

/// Where payload is written next: the words of a record but for the marks.
struct Pen<'a> {
    words: &'a [AtomicU64],
    at: usize,
}

impl Pen<'_> {
    fn put(&mut self, bytes: &[u8; WORD_BYTES]) {
        if self.at.is_multiple_of(LINE_WORDS) {
            self.words[self.at].store(NOTHING, Ordering::Relaxed);
            self.at += 1;
        }
        self.words[self.at].store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        self.at += 1;
    }

    fn put_all(&mut self, words: &[[u8; WORD_BYTES]]) {
        let room = self.at.next_multiple_of(LINE_WORDS) - self.at;
        let (first, rest) = words.split_at(room.min(words.len()));
        first.iter().for_each(|word| self.put(word));
        let (whole, last) = rest.as_chunks::<PAYLOAD_WORDS>();
        let (lines, _) = self.words[self.at..][..whole.len() * LINE_WORDS].as_chunks::<LINE_WORDS>();
        let done = cache_line::fill(lines, whole.as_flattened().as_flattened().as_chunks().0);
        for ([mark, payload @ ..], words) in lines[done..].iter().zip(&whole[done..]) {
            mark.store(NOTHING, Ordering::Relaxed);
            for (word, bytes) in payload.iter().zip(words) {
                word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
            }
        }
        self.at += lines.len() * LINE_WORDS;
        last.iter().for_each(|word| self.put(word));
    }
}

/// Stores up to a line's payload in whole words; the last word is filled up with zeros.
#[inline]
pub(crate) fn write_line(words: &[AtomicU64], part: &[u8]) {
    let (chunks, tail) = part.as_chunks::<WORD_BYTES>();
    let payload = &words[1..];
    for (word, chunk) in payload.iter().zip(chunks) {
        word.store(u64::from_ne_bytes(*chunk), Ordering::Relaxed);
    }
    if !tail.is_empty() {
        payload[chunks.len()].store(last_word(part, tail), Ordering::Relaxed);
    }
}

/// The last bytes of `part`, which do not fill a word, as one. Without a copy of an unknown length where there is a word to read.
#[inline]
fn last_word(part: &[u8], tail: &[u8]) -> u64 {
    if let Some(word) = part.last_chunk::<WORD_BYTES>() {
        return u64::from_le_bytes(*word).unbounded_shr((u8::BITS as usize * (WORD_BYTES - tail.len())) as u32).to_le();
    }
    tail.iter().rev().fold(0, |word, &byte| word << u8::BITS | u64::from(byte)).to_le()
}

/// Stores the bytes of `parts` in whole words, and all marks but the first; the last word is filled up with zeros.
pub(crate) fn write_payload(words: &[AtomicU64], parts: &[&[u8]]) {
    let mut pen = Pen { words, at: 1 };
    let mut carry = [0; WORD_BYTES];
    let mut carried = 0;
    for &part in parts {
        let mut rest = part;
        if carried > 0 {
            let taken = rest.len().min(WORD_BYTES - carried);
            carry[carried..carried + taken].copy_from_slice(&rest[..taken]);
            carried += taken;
            rest = &rest[taken..];
            if carried < WORD_BYTES {
                continue;
            }
            pen.put(&carry);
        }
        let (chunks, tail) = rest.as_chunks::<WORD_BYTES>();
        pen.put_all(chunks);
        carry[..tail.len()].copy_from_slice(tail);
        carried = tail.len();
    }
    if carried > 0 {
        carry[carried..].fill(0);
        pen.put(&carry);
    }
}

#[cfg(test)]
#[path = "ring/tests.rs"]
mod tests;
