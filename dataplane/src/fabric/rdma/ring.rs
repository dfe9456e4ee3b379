//! The accounting of a ring that the peer fills with one-sided writes: no I/O, both ends.
//!
//! The sender owns the places in the receiver's ring and keeps a mirror of it, from which the device writes; a place is
//! used again only when the receiver has said that it took the record (a credit) and the own device that it needs
//! the mirror no more (a completion). Records are contiguous: one that does not fit before the ring's end begins at its
//! start, and both sides count what was skipped. Each record is one write with immediate data, so the receiver learns of
//! it by a completion and never polls memory whose order of writing nobody promises.
//!
//! A credit is the number of records taken so far. It rides on every record of the other direction, and goes as an
//! empty write of its own when a quarter of the records or of the ring has been taken without one. The counts bound
//! everything: places, work requests at both ends, completions. Rejected: credits written to a cell that the
//! sender polls (it could not sleep, and the order is not promised), and bytes as credit (the receives are a resource too).

use std::collections::VecDeque;

/// Places are multiples of this.
pub const PLACE_BYTES: usize = 16;
/// In front of each record's payload.
pub const HEADER_BYTES: usize = 16;
/// Records on their way in one direction.
pub const MAX_RECORDS: usize = 512;
/// Empty writes with credits that the peer may not have seen yet. While it does not look, we can take no more than
/// the [`MAX_RECORDS`] and the ring's bytes that it had sent and as many again under credits that it saw before:
/// `2 × (4 + 4)`, twice over.
pub const MAX_CREDITS: usize = 32;
/// Receives are posted again in batches of this.
pub const REPOST: usize = 32;
/// Receives that are posted, or will be in the next batch.
pub const RECEIVES: usize = MAX_RECORDS + MAX_CREDITS + REPOST;
/// Work requests that the own device has not completed.
pub const SEND_WORK: usize = MAX_RECORDS + MAX_CREDITS;
/// The smallest ring, bytes.
pub const MIN_RING_BYTES: usize = 4096;
/// The largest ring, bytes; places fit in the immediate data.
pub const MAX_RING_BYTES: usize = 1 << 30;

/// In the immediate data: a credit, not a record.
const CREDIT: u32 = 1 << 31;
/// In [`Header::flags`]: the message goes on in the next record.
const MORE: u32 = 1;

// Neither end can get stuck: of the records that block a sender at most a quarter is taken but not yet credited, and at most
// a quarter sent but not signalled, so the rest always comes back.
const _: () = assert!(SEND_WORK / 4 + MAX_RECORDS / 4 < MAX_RECORDS);
const _: () = assert!(MAX_RING_BYTES / PLACE_BYTES <= CREDIT as usize);

/// The peer wrote what no peer of ours writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A completion of ours that no work request of ours can have.
    #[error("the device completes work request {id}, and {first}..{end} are posted")]
    Completion {
        /// Its number.
        id: u64,
        /// The first that is not completed.
        first: u64,
        /// Behind the last.
        end: u64,
    },
    /// A credit for records that were not sent, or fewer than before.
    #[error("it credits {credited} records, and {sent} were on their way")]
    Credit {
        /// Records more than with the credit before.
        credited: u32,
        /// Records that could have been taken.
        sent: u64,
    },
    /// A record that is not where the last one ended.
    #[error("a record of {bytes} bytes lies at {offset}, where none can be; the last one ended at {end}")]
    Place {
        /// Its place, bytes.
        offset: usize,
        /// Its length.
        bytes: usize,
        /// The right place, or the ring's start.
        end: usize,
    },
    /// The header is not that of this record.
    #[error(
        "the header of record {number} says length {length_bytes}, flags {flags:#x}, number {said}; {bytes} bytes came"
    )]
    Header {
        /// The record's number, as counted here.
        number: u64,
        /// As the header says.
        length_bytes: u32,
        /// As the header says.
        flags: u32,
        /// As the header says.
        said: u32,
        /// As the completion says.
        bytes: usize,
    },
}

/// In front of each record; four numbers of 32 bits, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Payload.
    pub length_bytes: u32,
    /// [`MORE`] or nothing.
    flags: u32,
    /// The record's number, modulo 2³².
    number: u32,
    /// The writer's credit: records that it has taken, modulo 2³².
    credit: u32,
}

impl Header {
    /// As written.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields = [self.length_bytes, self.flags, self.number, self.credit];
        for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    /// As read; any bytes are a header.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Header {
        let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Header { length_bytes: field(0), flags: field(4), number: field(8), credit: field(12) }
    }

    /// Whether the message goes on in the next record.
    pub fn goes_on(self) -> bool {
        self.flags & MORE != 0
    }
}

fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(PLACE_BYTES)
}

/// The most payload of one record in a ring of that size.
pub fn max_payload_bytes(ring_bytes: usize) -> usize {
    ring_bytes / 8 - HEADER_BYTES
}

/// What the immediate data of a write says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Immediate {
    /// A record at this place, bytes.
    Record {
        /// From the ring's start.
        offset: usize,
    },
    /// The low 31 bits of the count of records taken.
    Credit {
        /// The count.
        count: u32,
    },
}

impl Immediate {
    /// As sent, in host byte order.
    pub fn encode(self) -> u32 {
        match self {
            Immediate::Record { offset } => (offset / PLACE_BYTES) as u32,
            // The peer knows the rest.
            Immediate::Credit { count } => CREDIT | count,
        }
    }

    /// Any number is one of the two.
    pub fn decode(bits: u32) -> Immediate {
        match bits & CREDIT {
            0 => Immediate::Record { offset: bits as usize * PLACE_BYTES },
            _ => Immediate::Credit { count: bits & !CREDIT },
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Sent {
    /// Where the next record begins, counted from the beginning of time.
    end: u64,
    /// Its work request.
    work: u64,
}

/// A record that may be written now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Its place in the ring and in the mirror, bytes.
    pub offset: usize,
    /// To be written in front of the payload.
    pub header: Header,
    /// For the work request.
    pub work: Work,
}

/// A work request of the send queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Its number; to be given to [`Sender::complete`].
    pub id: u64,
    /// Whether the device is to report its completion.
    pub signal: bool,
}

/// The sending end.
#[derive(Debug)]
pub struct Sender {
    ring_bytes: u64,
    /// Where the next record begins at the earliest, counted from the beginning of time.
    head: u64,
    /// Up to where places may be used again.
    freed: u64,
    sent: u64,
    credited: u64,
    /// Records that are not both credited and completed.
    waiting: VecDeque<Sent>,
    work_posted: u64,
    work_completed: u64,
    unsignalled: usize,
    unsignalled_bytes: u64,
}

impl Sender {
    /// For a peer's ring.
    ///
    /// # Panics
    /// When the size is not a power of two in [`MIN_RING_BYTES`]..=[`MAX_RING_BYTES`].
    pub fn new(ring_bytes: usize) -> Sender {
        assert!(ring_bytes.is_power_of_two() && (MIN_RING_BYTES..=MAX_RING_BYTES).contains(&ring_bytes));
        Sender {
            ring_bytes: ring_bytes as u64,
            head: 0,
            freed: 0,
            sent: 0,
            credited: 0,
            waiting: VecDeque::with_capacity(MAX_RECORDS),
            work_posted: 0,
            work_completed: 0,
            unsignalled: 0,
            unsignalled_bytes: 0,
        }
    }

    /// Takes the place of the next record. `None`: there is none before a credit or a completion.
    ///
    /// # Panics
    /// When the payload is empty or exceeds [`max_payload_bytes`].
    pub fn reserve(&mut self, payload_bytes: usize, goes_on: bool, credit: u32) -> Option<Slot> {
        assert!((1..=max_payload_bytes(self.ring_bytes as usize)).contains(&payload_bytes), "the caller cuts messages");
        // The last places are for credits.
        let work_in_use = self.work_posted - self.work_completed;
        if self.waiting.len() == MAX_RECORDS || work_in_use >= (SEND_WORK - MAX_CREDITS) as u64 {
            return None;
        }
        let taken = padded(HEADER_BYTES + payload_bytes) as u64;
        let at = self.head % self.ring_bytes;
        let skipped = if at + taken > self.ring_bytes { self.ring_bytes - at } else { 0 };
        let end = self.head + skipped + taken;
        if end - self.freed > self.ring_bytes {
            return None;
        }
        let offset = ((self.head + skipped) % self.ring_bytes) as usize;
        let work = self.take_work(end - self.head);
        self.waiting.push_back(Sent { end, work: work.id });
        let header = Header {
            length_bytes: payload_bytes as u32,
            flags: if goes_on { MORE } else { 0 },
            number: self.sent as u32,
            credit,
        };
        self.head = end;
        self.sent += 1;
        Some(Slot { offset, header, work })
    }

    /// Takes a work request for an empty write. `None`: there is none before a completion.
    pub fn reserve_credit(&mut self) -> Option<Work> {
        (self.work_posted - self.work_completed < SEND_WORK as u64).then(|| self.take_work(0))
    }

    /// Whether the device may still have something to send.
    pub fn has_work(&self) -> bool {
        self.work_posted > self.work_completed
    }

    fn take_work(&mut self, bytes: u64) -> Work {
        self.unsignalled += 1;
        self.unsignalled_bytes += bytes;
        let signal = self.unsignalled >= SEND_WORK / 4 || self.unsignalled_bytes >= self.ring_bytes / 8;
        if signal {
            (self.unsignalled, self.unsignalled_bytes) = (0, 0);
        }
        let id = self.work_posted;
        self.work_posted += 1;
        Work { id, signal }
    }

    /// The device has completed this work request, and thus those before it.
    ///
    /// # Errors
    /// [`Violation::Completion`]: there is no such request.
    pub fn complete(&mut self, id: u64) -> Result<(), Violation> {
        let (first, end) = (self.work_completed, self.work_posted);
        if !(first..end).contains(&id) {
            return Err(Violation::Completion { id, first, end });
        }
        self.work_completed = id + 1;
        self.free();
        Ok(())
    }

    /// The credit that came with a record.
    ///
    /// # Errors
    /// [`Violation::Credit`].
    pub fn credit_by_header(&mut self, header: Header) -> Result<(), Violation> {
        self.credit(header.credit, u32::MAX)
    }

    /// A credit that came by itself.
    ///
    /// # Errors
    /// [`Violation::Credit`].
    pub fn credit_by_immediate(&mut self, count: u32) -> Result<(), Violation> {
        self.credit(count, !CREDIT)
    }

    /// The peer has taken `count` records, of which the wire has the bits in `mask`.
    fn credit(&mut self, count: u32, mask: u32) -> Result<(), Violation> {
        let more = count.wrapping_sub(self.credited as u32) & mask;
        let sent = self.sent - self.credited;
        if u64::from(more) > sent {
            return Err(Violation::Credit { credited: more, sent });
        }
        self.credited += u64::from(more);
        self.free();
        Ok(())
    }

    fn free(&mut self) {
        let mut number = self.sent - self.waiting.len() as u64;
        while let Some(record) = self.waiting.front() {
            if number >= self.credited || record.work >= self.work_completed {
                break;
            }
            self.freed = record.end;
            self.waiting.pop_front();
            number += 1;
        }
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct Receiver {
    ring_bytes: u64,
    /// Where the last record ended, counted from the beginning of time.
    tail: u64,
    taken: u64,
    /// What the peer has been told.
    told: u64,
    told_tail: u64,
}

impl Receiver {
    /// For the own ring.
    pub fn new(ring_bytes: usize) -> Receiver {
        Receiver { ring_bytes: ring_bytes as u64, tail: 0, taken: 0, told: 0, told_tail: 0 }
    }

    /// Checks where a record of `bytes` bytes, header included, is said to lie. The caller reads it from there, and
    /// then asks [`take`](Self::take).
    ///
    /// # Errors
    /// [`Violation::Place`].
    pub fn locate(&self, offset: usize, bytes: usize) -> Result<(), Violation> {
        let end = (self.tail % self.ring_bytes) as usize;
        let (ring, taken) = (self.ring_bytes as usize, padded(bytes));
        let right = if end + taken > ring { 0 } else { end };
        let longest = HEADER_BYTES + max_payload_bytes(ring);
        if offset != right || !(HEADER_BYTES + 1..=longest).contains(&bytes) {
            return Err(Violation::Place { offset, bytes, end });
        }
        Ok(())
    }

    /// Checks the header of the located record and counts the record as taken.
    ///
    /// # Errors
    /// [`Violation::Header`].
    pub fn take(&mut self, offset: usize, bytes: usize, header: Header) -> Result<(), Violation> {
        let right = header.length_bytes as usize == bytes - HEADER_BYTES
            && header.flags & !MORE == 0
            && header.number == self.taken as u32;
        if !right {
            let Header { length_bytes, flags, number: said, .. } = header;
            return Err(Violation::Header { number: self.taken, length_bytes, flags, said, bytes });
        }
        let at = self.tail % self.ring_bytes;
        let skipped = if offset as u64 == at { 0 } else { self.ring_bytes - at };
        self.tail += skipped + padded(bytes) as u64;
        self.taken += 1;
        Ok(())
    }

    /// Whether a credit is to be sent by itself.
    pub fn credit_is_due(&self) -> bool {
        self.taken - self.told >= (MAX_RECORDS / 4) as u64 || self.tail - self.told_tail >= self.ring_bytes / 4
    }

    /// The credit as it is now.
    pub fn credit(&self) -> u32 {
        self.taken as u32
    }

    /// The present credit is on its way.
    pub fn told(&mut self) {
        (self.told, self.told_tail) = (self.taken, self.tail);
    }
}

#[cfg(test)]
mod tests;
