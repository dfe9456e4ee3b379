//! A ring of byte records between one producer and one consumer: two threads, or two processes that share memory.
//!
//! A record is a header word (kind and length) and its payload in whole words, never wrapped around the end. The header is
//! written last, so a waiting consumer watches one word, and a short message costs one or two transfers of a cache line,
//! not one more for an index. What makes that safe: before a record appears, the producer has cleared the word behind it,
//! so the consumer never takes old payload for a header. The consumer tells now and then how far it has read, and the
//! producer looks only when its last knowledge leaves no room.
//!
//! A ring may be large, for bursts, but as long as the consumer keeps up the producer goes back to its start early and
//! uses the first [`WINDOW_WORDS`] only: those stay in both first-level caches. Measured on an EPYC: a round trip through
//! 4 KiB takes 1.6 times as long as one of a bare line, through 16 KiB and more 3.2 times.
//!
//! Every word is an atomic, so that a peer that writes when it should not makes garbage, never undefined behaviour; what
//! the peer wrote is read once and checked, and no word has two writers. Sleeping works as Dekker's algorithm does: each
//! side stores, fences, and then looks at what the other stored.
//!
//! Rejected: head and tail indices (two lines per message), a memcpy (a data race with a peer that misbehaves), one
//! mapping twice in a row to hide the wrap (no gain for short records), and a sleep flag that the waker takes down (a
//! second writer, and one more line that goes to and fro).
//! The loom tests (tests/loom.rs) run this very file.

use super::sync::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::Arc;

/// Bytes in a word, the unit of positions.
pub const WORD_BYTES: usize = 8;
/// A record takes at most this part of the ring; then an empty ring has room for any, wherever it ends.
const RECORD_SHARE: usize = 4;
/// The consumer tells its position whenever it has read so many words, or this part of a small ring.
const TELL_WORDS: usize = 64;
const TELL_SHARE: usize = 8;
/// What is used of the ring while the consumer keeps up, words; half of a small ring.
const WINDOW_WORDS: usize = 512;
/// The smallest ring, words.
const MIN_WORDS: usize = 8;

const NOTHING: u64 = 0;
const KIND_SHIFT: u32 = 32;
const KIND_SKIP: u64 = 3;

/// Keeps what different threads write apart: two lines of 64 bytes, because processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(C, align(128))]
struct Line<T>(T);

/// The words beside the records.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Control {
    /// Words read; written by the consumer.
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
    /// Room for records: a power of two, at least 8, and always the same.
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
    /// If `bytes` is no power of two or less than 64.
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
}

/// The other side wrote what no other side of ours writes. The ring must not be used any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The consumer claims to have read what was not written, or to have gone back.
    #[error("it says that it has read up to word {said}, which is not in {from}..={to}")]
    Consumed {
        /// What it said.
        said: u64,
        /// What it had said before.
        from: u64,
        /// What was written.
        to: u64,
    },
    /// The producer wrote a header that is none.
    #[error("it wrote the record header {header:#018x} at word {at}, which is none")]
    Header {
        /// The header.
        header: u64,
        /// Where.
        at: usize,
    },
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

    fn append(&mut self, words: &[AtomicU64], length: usize) {
        let end = self.filled + words.len() * WORD_BYTES;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let (chunks, _) = self.bytes[self.filled..end].as_chunks_mut::<WORD_BYTES>();
        for (chunk, word) in chunks.iter_mut().zip(words) {
            *chunk = word.load(Ordering::Relaxed).to_ne_bytes();
        }
        self.filled += length;
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
    fn take_wake(&mut self, sign: &AtomicU32) -> bool {
        if !std::mem::take(&mut self.news) {
            return false;
        }
        fence(Ordering::SeqCst);
        let number = sign.load(Ordering::Relaxed);
        if number.is_multiple_of(2) || number == self.ended {
            return false;
        }
        self.ended = number;
        true
    }
}

/// The writing end.
#[derive(Debug)]
pub struct Producer<M> {
    memory: M,
    /// Words written.
    written: u64,
    /// Words that the consumer has read as far as we know.
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
        let words = memory.words().len();
        assert!(words.is_power_of_two() && words >= MIN_WORDS, "a ring of {words} words");
        let turn_at = window_words(words);
        Producer { memory, written: 0, consumed: 0, turn_at, sleeper: Sleeper::default(), waker: Waker::default() }
    }

    /// The longest payload of a record, bytes.
    pub fn max_record_bytes(&self) -> usize {
        max_record_words(&self.memory) * WORD_BYTES - WORD_BYTES
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
        let need = record_words(length);
        let turns = self.turns_early(need)?;
        let words = self.memory.words();
        let at = position(self.written, words);
        let start = if need <= words.len() - at && !turns { at } else { 0 };
        // First, so that whoever reads this record finds nothing behind it.
        words[(start + need) & (words.len() - 1)].store(NOTHING, Ordering::Relaxed);
        write_payload(&words[start + 1..start + need], parts);
        let header = kind.number() << KIND_SHIFT | length as u64;
        words[start].store(header, Ordering::Release);
        if start != at {
            words[at].store(KIND_SKIP << KIND_SHIFT, Ordering::Release);
            self.written += (words.len() - at) as u64;
        }
        self.written += need as u64;
        self.waker.news = true;
        Ok(true)
    }

    /// Whether to go back to the start though there is room behind: possible if the consumer has left it.
    fn turns_early(&mut self, need: usize) -> Result<bool, Violation> {
        let capacity = self.memory.words().len();
        let at = position(self.written, self.memory.words());
        if at < self.turn_at {
            if at < window_words(capacity) {
                self.turn_at = window_words(capacity);
            }
            return Ok(false);
        }
        let wanted = (capacity - at + need + 1) as u64;
        let written = self.written;
        let fits = |consumed| written - consumed + wanted <= capacity as u64;
        let turns = fits(self.consumed) || fits(self.look()?);
        if !turns {
            // The consumer is behind. It costs a look, so not with each record.
            self.turn_at = at + window_words(capacity);
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
        let capacity = self.memory.words().len();
        let need = record_words(length);
        let behind = capacity - position(self.written, self.memory.words());
        let skipped = if need <= behind { 0 } else { behind };
        // And the word behind the record, which is cleared.
        let wanted = (skipped + need + 1) as u64;
        if self.written - self.consumed + wanted <= capacity as u64 {
            return Ok(true);
        }
        Ok(self.written - self.look()? + wanted <= capacity as u64)
    }

    /// Whether the consumer sleeps and is to be woken for what was written. Says so once.
    pub fn take_wake(&mut self) -> bool {
        self.waker.take_wake(&self.memory.control().sleeping.0)
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
    /// Words read.
    read: u64,
    /// Words read that the producer was told of.
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
        let words = memory.words().len();
        assert!(words.is_power_of_two() && words >= MIN_WORDS, "a ring of {words} words");
        Consumer { memory, read: 0, told: 0, sleeper: Sleeper::default(), waker: Waker::default() }
    }

    /// Takes the next record, if there is one, and appends its payload to `into`.
    ///
    /// # Errors
    /// [`Violation`].
    pub fn take(&mut self, into: &mut Assembly) -> Result<Option<Kind>, Violation> {
        let words = self.memory.words();
        let mut at = position(self.read, words);
        let mut header = words[at].load(Ordering::Acquire);
        if header == KIND_SKIP << KIND_SHIFT && at != 0 {
            self.read += (words.len() - at) as u64;
            at = 0;
            header = words[at].load(Ordering::Acquire);
        }
        if header == NOTHING {
            return Ok(None);
        }
        let length = header as u32 as usize;
        let kind = [Kind::Last, Kind::More].into_iter().find(|kind| kind.number() == header >> KIND_SHIFT);
        let need = record_words(length);
        let Some(kind) = kind.filter(|_| need <= max_record_words(&self.memory).min(words.len() - at)) else {
            return Err(Violation::Header { header, at });
        };
        into.append(&words[at + 1..at + need], length);
        self.read += need as u64;
        if self.read - self.told >= TELL_WORDS.min(words.len() / TELL_SHARE) as u64 {
            // Release: our reads are over before the producer writes there.
            self.memory.control().consumed.0.store(self.read, Ordering::Release);
            self.told = self.read;
            self.waker.news = true;
        }
        Ok(Some(kind))
    }

    /// Whether there is a record.
    pub fn has_record(&self) -> bool {
        let words = self.memory.words();
        words[position(self.read, words)].load(Ordering::Acquire) != NOTHING
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

fn position(count: u64, words: &[AtomicU64]) -> usize {
    count as usize & (words.len() - 1)
}

fn record_words(length: usize) -> usize {
    1 + length.div_ceil(WORD_BYTES)
}

fn window_words(capacity: usize) -> usize {
    WINDOW_WORDS.min(capacity / 2)
}

fn max_record_words<M: Memory>(memory: &M) -> usize {
    memory.words().len() / RECORD_SHARE
}

/// Stores the bytes of `parts` in whole words; the last one is filled up with zeros.
fn write_payload(words: &[AtomicU64], parts: &[&[u8]]) {
    let mut words = words.iter();
    let mut store =
        |bytes| words.next().expect("the length was added up").store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
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
            store(carry);
        }
        let (chunks, tail) = rest.as_chunks::<WORD_BYTES>();
        chunks.iter().for_each(|chunk| store(*chunk));
        carry[..tail.len()].copy_from_slice(tail);
        carried = tail.len();
    }
    if carried > 0 {
        carry[carried..].fill(0);
        store(carry);
    }
}
