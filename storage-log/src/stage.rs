//! Staging: records become blocks, blocks become groups. No I/O.
//!
//! The log is a stream, so where a record will lie on the disk is known as soon as it is appended, and it is put at once
//! into the block that will be written. Blocks lie in a ring of memory that the device reads from. A *group* is a run of
//! blocks that is written by one write and made durable by one flush; the next group is written after that, so
//! everything before a group is durable when the group is written. A group ends where the caller flushes, at the end of
//! the ring, of a segment, or of [`MAX_GROUP_BLOCKS`]; records go on across groups but not across segments.
//!
//! Rejected: writing the last, partly filled block again with more records in it. It saves space, but a write that
//! tears would take acknowledged records with it. Nothing that was acknowledged is ever written over.

use std::collections::VecDeque;
use std::ops::DerefMut;

use crate::block::{BLOCK_BYTES, Block, DATA_BYTES, SegmentId, Trailer, seal};
use crate::record::{self, Chain, Kind, RECORD_HEADER_BYTES};
use crate::segment::{Header, SegmentNumber};

/// The longest group: the first record of a group does not wait for more than this to be written.
pub(crate) const MAX_GROUP_BLOCKS: u64 = 256;

/// Memory that the device can read from: page-aligned, of whole blocks.
pub(crate) type Memory = Box<dyn DerefMut<Target = [u8]>>;

/// A run of blocks to be written and flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Group {
    pub segment: SegmentId,
    /// Its first block in the segment.
    pub start: u32,
    pub blocks: u32,
    /// Where it lies in the ring, counted in blocks since the beginning.
    position: u64,
    /// The last ticket whose record ends in it or before it.
    pub ticket: u64,
    /// The segment that the log begins with, as this group or one before it says; 0 if none does.
    pub first: SegmentNumber,
    /// What to write as block 0, if it begins the segment; members and epoch are filled in when it is written.
    pub header: Option<Header>,
}

/// Where the stream stands.
#[derive(Debug, Clone, Copy)]
struct Place {
    segment: SegmentId,
    segment_blocks: u32,
    /// The block that is being filled, and the bytes in it.
    block: u32,
    filled: usize,
}

/// See the module.
pub(crate) struct Stage {
    memory: Memory,
    ring_blocks: u64,
    place: Option<Place>,
    chain: Chain,
    /// The first block of the open group, in the ring and in the segment.
    open: (u64, u32),
    header: Option<Header>,
    /// The ring's block that is being filled, and the oldest one that is still needed.
    head: u64,
    tail: u64,
    ready: VecDeque<Group>,
    ticket: u64,
    first: SegmentNumber,
}

impl Stage {
    /// `chain` continues the log that was found.
    pub fn new(memory: Memory, chain: Chain) -> Stage {
        let ring_blocks = (memory.len() / BLOCK_BYTES) as u64;
        assert!(ring_blocks >= 8 && memory.len().is_multiple_of(BLOCK_BYTES), "staging of {} bytes", memory.len());
        Stage {
            memory,
            ring_blocks,
            place: None,
            chain,
            open: (0, 0),
            header: None,
            head: 0,
            tail: 0,
            ready: VecDeque::with_capacity(64),
            ticket: 0,
            first: 0,
        }
    }

    pub fn chain(&self) -> Chain {
        self.chain
    }

    /// Blocks of the present segment that hold something, once the open group is closed.
    pub fn segment_blocks_used(&self) -> u32 {
        self.place.map_or(0, |place| place.block + u32::from(place.filled > 0))
    }

    /// Whether a record of this size fits behind the others in the present segment.
    pub fn fits_segment(&self, record_bytes: usize) -> bool {
        self.place.is_some_and(|place| {
            let left = u64::from(place.segment_blocks - place.block) * DATA_BYTES as u64 - place.filled as u64;
            record_bytes as u64 <= left
        })
    }

    /// Whether the ring has room for so many bytes of records, and a new segment's header if need be.
    pub fn fits_memory(&self, bytes: usize) -> bool {
        let need = bytes.div_ceil(DATA_BYTES) as u64 + 3;
        self.head + need - self.tail <= self.ring_blocks
    }

    /// Bytes staged and not yet released.
    pub fn staged_bytes(&self) -> u64 {
        let partial = self.place.map_or(0, |place| place.filled as u64);
        (self.head - self.tail) * BLOCK_BYTES as u64 + partial
    }

    /// Begins a segment; its header becomes the first block of a group.
    pub fn begin_segment(&mut self, header: Header) {
        self.close();
        self.place = Some(Place { segment: header.id, segment_blocks: header.blocks, block: 0, filled: 0 });
        self.open = (self.head, 0);
        self.header = Some(header);
        self.next_block();
    }

    /// Appends a record; the caller has made sure that it fits.
    pub fn append(&mut self, kind: Kind, numbers: (u64, u64), parts: &[&[u8]], ticket: u64) {
        let (head, chain) = record::head(self.chain, kind, numbers, parts);
        self.put(&head);
        parts.iter().for_each(|part| self.put(part));
        self.chain = chain;
        self.ticket = self.ticket.max(ticket);
    }

    /// Appends with which segment the log begins from here on.
    pub fn append_begin(&mut self, first: SegmentNumber) {
        self.append(Kind::Begin, (first, 0), &[], 0);
        self.first = first;
    }

    fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let place = self.place.as_mut().expect("a segment has begun");
            assert!(place.block < place.segment_blocks, "a record runs over the end of its segment");
            let take = bytes.len().min(DATA_BYTES - place.filled);
            let at = (self.head % self.ring_blocks) as usize * BLOCK_BYTES + place.filled;
            self.memory[at..at + take].copy_from_slice(&bytes[..take]);
            place.filled += take;
            bytes = &bytes[take..];
            if place.filled == DATA_BYTES {
                self.next_block();
            }
        }
    }

    /// The block is full: goes on to the next, and ends the group where it must end.
    fn next_block(&mut self) {
        let place = self.place.as_mut().expect("a segment has begun");
        place.block += 1;
        place.filled = 0;
        self.head += 1;
        assert!(self.head - self.tail <= self.ring_blocks, "the staging ring overflows");
        if self.head.is_multiple_of(self.ring_blocks) || self.head - self.open.0 >= MAX_GROUP_BLOCKS {
            self.close();
        }
    }

    /// Ends the open group, if there is something in it.
    pub fn close(&mut self) {
        let Some(place) = self.place.as_mut() else { return };
        let (position, start) = self.open;
        let last_used = place.filled;
        if last_used > 0 {
            place.block += 1;
            place.filled = 0;
            self.head += 1;
        }
        let blocks = (self.head - position) as u32;
        if blocks == 0 {
            return;
        }
        let header = self.header.take();
        let group =
            Group { segment: place.segment, start, blocks, position, ticket: self.ticket, first: self.first, header };
        self.open = (self.head, place.block);
        for nth in u32::from(header.is_some())..blocks {
            let used = if nth + 1 == blocks && last_used > 0 { last_used } else { DATA_BYTES };
            let trailer =
                Trailer { segment: group.segment, group_start: start, group_blocks: blocks, used: used as u16 };
            seal(self.block_mut(position + u64::from(nth)), trailer, start + nth);
        }
        self.ready.push_back(group);
    }

    fn block_mut(&mut self, position: u64) -> &mut Block {
        let at = (position % self.ring_blocks) as usize * BLOCK_BYTES;
        (&mut self.memory[at..at + BLOCK_BYTES]).try_into().expect("a block's length")
    }

    /// The group to write next.
    pub fn first_group(&self) -> Option<&Group> {
        self.ready.front()
    }

    /// Completes the header of the first group, if it has one, with what is known only now.
    pub fn complete_header(&mut self, complete: impl FnOnce(&mut Header)) {
        let Some(group) = self.ready.front_mut() else { return };
        let (position, blocks) = (group.position, group.blocks);
        if let Some(header) = &mut group.header {
            complete(header);
            let header = *header;
            header.seal_into(self.block_mut(position), blocks);
        }
    }

    /// Whether a group that waits begins a segment whose header can still be completed.
    pub fn has_header_waiting(&self, in_flight: bool) -> bool {
        self.header.is_some() || self.ready.iter().skip(usize::from(in_flight)).any(|group| group.header.is_some())
    }

    /// Where the bytes of a group lie in the memory.
    pub fn bytes_of(&self, group: &Group) -> std::ops::Range<usize> {
        let at = (group.position % self.ring_blocks) as usize * BLOCK_BYTES;
        at..at + group.blocks as usize * BLOCK_BYTES
    }

    /// The memory, for the device.
    pub fn memory(&self) -> &[u8] {
        &self.memory
    }

    /// The first group is durable: its memory is free.
    pub fn release(&mut self) -> Group {
        let group = self.ready.pop_front().expect("a group was written");
        self.tail = group.position + u64::from(group.blocks);
        let is_empty = self.tail == self.head && self.place.is_none_or(|place| place.filled == 0);
        if is_empty && self.header.is_none() {
            // Back to the beginning: memory that was just used is in the cache.
            self.head = self.head.next_multiple_of(self.ring_blocks);
            (self.tail, self.open.0) = (self.head, self.head);
        }
        group
    }
}

/// Bytes of the stream that a record takes.
pub(crate) fn record_bytes(payload_bytes: usize) -> usize {
    RECORD_HEADER_BYTES + payload_bytes
}

#[cfg(test)]
mod tests;
