//! One split virtqueue, device side (virtio 1.2 §2.7).
//!
//! Everything in a ring is written by the guest and may change at any time, so each value is read once, checked, and only
//! then used; whatever is wrong becomes a [`RingFault`] and never a panic. The `virtio-queue` crate was tried first: its chain
//! iterator ends quietly on a loop, a bad index or a nested table, so a corrupt chain looks like a short one; it looks up
//! the guest address of every ring field at each access; and it knows no NO_INTERRUPT flag.
//!
//! The ring's position is not state of ours: at start it comes from SET_VRING_BASE and from the used index in guest memory, at
//! stop it goes back to QEMU. Buffers are copied and completed in ring order at once, so nothing is ever in flight and the
//! INFLIGHT protocol feature is not needed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use vm_memory::Bytes;

use super::features::Features;
use super::memory::{Area, GuestRam, Piece, fence_before_marks};

/// Most descriptors in one indirect table. QEMU's own limit (VIRTQUEUE_MAX_SIZE); Linux uses 19 or fewer for a frame.
const MAX_INDIRECT_DESCRIPTORS: u32 = 1024;
/// Largest ring that virtio allows (virtio 1.2 §2.7).
pub(crate) const MAX_RING_SIZE: u16 = 32768;

pub(super) const DESCRIPTOR_BYTES: usize = 16;
const USED_ELEMENT_BYTES: usize = 8;
pub(super) const RING_HEADER_BYTES: usize = 4;
/// While kicks are unwanted, the index at which one would be due is moved on this often: it must never be reached.
const SILENCE_ENTRIES: u16 = 0x4000;

/// What a guest did wrong in a ring.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum RingFault {
    /// The driver offers more chains than the ring has entries, or took some back.
    #[error("the available index went from {seen} to {now} while the device is at {position} of {size}")]
    AvailableIndex {
        /// Index read before.
        seen: u16,
        /// Index read now.
        now: u16,
        /// Next entry that the device takes.
        position: u16,
        /// Entries in the ring.
        size: u16,
    },
    /// A chain begins or goes on at a descriptor that the table does not have.
    #[error("descriptor {index} in a table of {entries}")]
    DescriptorIndex {
        /// Index that was named.
        index: u16,
        /// Entries in the table.
        entries: u32,
    },
    /// A chain has more descriptors than its table, so it loops.
    #[error("the descriptor chain is longer than its table of {entries} entries: it loops")]
    Loop {
        /// Entries in the table.
        entries: u32,
    },
    /// A buffer or an indirect table is not in guest RAM.
    #[error("a buffer of {len} bytes at guest address {address:#x} is outside the guest's memory")]
    OutsideMemory {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A buffer of no bytes.
    #[error("a buffer of zero bytes at guest address {address:#x}")]
    EmptyBuffer {
        /// Guest-physical address.
        address: u64,
    },
    /// A device-writable buffer in the transmit ring, or a device-readable one in the receive ring.
    #[error("a buffer at guest address {address:#x} has the wrong direction for this ring")]
    Direction {
        /// Guest-physical address.
        address: u64,
    },
    /// An indirect descriptor where none may be.
    #[error("indirect descriptor refused: {why}")]
    Indirect {
        /// Which rule it breaks.
        why: &'static str,
    },
    /// A transmitted chain is too short for the virtio-net header and an Ethernet header.
    #[error("a transmitted chain of {len} bytes has no room for the virtio-net header")]
    NoHeader {
        /// Length of the chain in bytes.
        len: u64,
    },
}

/// Why a ring cannot be started where QEMU says it is.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum LayoutError {
    /// Not a power of two in 1..=32768.
    #[error("ring size {0} is not a power of two between 1 and {MAX_RING_SIZE}")]
    Size(u32),
    /// Not in the memory table.
    #[error("the {part} at QEMU address {address:#x} is not in guest memory")]
    Outside {
        /// Which part of the ring.
        part: &'static str,
        /// Address that QEMU sent.
        address: u64,
    },
    /// Alignment of virtio 1.2 §2.7.
    #[error("the {part} at QEMU address {address:#x} is not aligned")]
    Misaligned {
        /// Which part of the ring.
        part: &'static str,
        /// Address that QEMU sent.
        address: u64,
    },
    /// The position that QEMU gives does not fit the ring in memory.
    #[error(transparent)]
    Position(#[from] RingFault),
}

/// Where a ring is, as SET_VRING_NUM, SET_VRING_ADDR and SET_VRING_BASE say. Addresses are QEMU's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct RingPlace {
    pub size: u32,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub base: u16,
}

/// Which way the data of a ring goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Buffers are filled by the device.
    ToGuest,
    /// Buffers are read by the device.
    FromGuest,
}

#[derive(Clone, Copy)]
pub(super) struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    next: u16,
}

impl Descriptor {
    /// From its two words, as little-endian numbers.
    #[inline]
    pub fn from_words(address: u64, rest: u64) -> Self {
        Self { address, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

/// A split ring in operation.
#[derive(Debug)]
pub(crate) struct Ring {
    pub(super) ram: Arc<GuestRam>,
    direction: Direction,
    size: u16,
    pub(super) descriptors: Area,
    pub(super) available: Area,
    used: Area,
    event_idx: bool,
    indirect: bool,
    /// The region of guest memory where the last buffer was.
    pub(super) region: usize,
    /// Next entry of the available ring to take.
    pub(super) next_avail: u16,
    /// The available index as last read: entries up to here may be taken.
    seen_avail: u16,
    /// Next entry of the used ring to write.
    next_used: u16,
    /// The used index as the guest can see it.
    published: u16,
    /// The used index up to which the used ring's pages are marked as written.
    settled: u16,
    /// The used index when the guest was last interrupted, or found to want no interrupt. None: it may have missed one.
    signalled: Option<u16>,
    /// The available index at which the guest was last asked to kick. None: kicks are off.
    armed: Option<u16>,
    /// Kicks are never asked for, because somebody looks all the time.
    polling: bool,
    /// A frame waits for more receive buffers than are offered.
    pub starving: bool,
    /// The used index when the guest was last told that no kick is wanted.
    silenced: u16,
}

impl Ring {
    /// Checks where the ring is and takes its position from guest memory. Touches nothing else.
    pub fn open(
        ram: Arc<GuestRam>,
        place: RingPlace,
        direction: Direction,
        features: Features,
    ) -> Result<Self, LayoutError> {
        let size = u16::try_from(place.size).ok().filter(|size| size.is_power_of_two() && *size <= MAX_RING_SIZE);
        let size = size.ok_or(LayoutError::Size(place.size))?;
        let area = |part, address, len: usize, align| {
            let area = ram.guest_of_user(address).and_then(|guest| ram.area(guest, len as u32));
            let area = area.ok_or(LayoutError::Outside { part, address })?;
            if area.is_aligned(align) { Ok(area) } else { Err(LayoutError::Misaligned { part, address }) }
        };
        let entries = usize::from(size);
        let descriptors = area("descriptor table", place.descriptors, DESCRIPTOR_BYTES * entries, 16)?;
        // Both rings end with the event index, which virtio reserves whether or not EVENT_IDX is on.
        let available = area("available ring", place.available, RING_HEADER_BYTES + 2 * entries + 2, 2)?;
        let used = area("used ring", place.used, RING_HEADER_BYTES + USED_ELEMENT_BYTES * entries + 2, 4)?;
        let next_used = used.load_u16(2, Ordering::Acquire);
        let mut ring = Self {
            ram,
            direction,
            size,
            descriptors,
            available,
            used,
            event_idx: features.event_idx(),
            indirect: features.indirect(),
            region: 0,
            next_avail: place.base,
            seen_avail: place.base,
            next_used,
            published: next_used,
            settled: next_used,
            signalled: None,
            armed: None,
            polling: false,
            starving: false,
            silenced: next_used,
        };
        ring.refresh()?;
        Ok(ring)
    }

    /// The position to hand back to QEMU: the next entry of the available ring. All before it have been completed.
    pub fn position(&self) -> u16 {
        self.next_avail
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The memory that the buffers of this ring are in.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Reads the available index. Returns whether more chains are offered than before.
    fn refresh(&mut self) -> Result<bool, RingFault> {
        let now = self.available.load_u16(2, Ordering::Acquire);
        let offered = now.wrapping_sub(self.next_avail);
        // Also when it went back: then a re-check loop could run for as long as the guest likes.
        if offered > self.size || offered < self.seen_avail.wrapping_sub(self.next_avail) {
            return Err(RingFault::AvailableIndex {
                seen: self.seen_avail,
                now,
                position: self.next_avail,
                size: self.size,
            });
        }
        let more = now != self.seen_avail;
        self.seen_avail = now;
        Ok(more)
    }

    /// The head of the chain `ahead` places after the next one, which is not consumed. None if the guest offers no such chain.
    pub fn peek(&mut self, ahead: u16) -> Result<Option<u16>, RingFault> {
        if ahead >= self.seen_avail.wrapping_sub(self.next_avail) {
            self.refresh()?;
            if ahead >= self.seen_avail.wrapping_sub(self.next_avail) {
                return Ok(None);
            }
        }
        let entry = usize::from(self.next_avail.wrapping_add(ahead) & (self.size - 1));
        let head = self.available.load_u16(RING_HEADER_BYTES + 2 * entry, Ordering::Relaxed);
        if head >= self.size {
            return Err(RingFault::DescriptorIndex { index: head, entries: u32::from(self.size) });
        }
        Ok(Some(head))
    }

    /// Appends the pieces of guest memory that a chain consists of to `pieces`, and returns their length in bytes.
    pub fn walk(&self, head: u16, pieces: &mut Vec<Piece>) -> Result<u64, RingFault> {
        let mut total = 0;
        let mut table = Table { place: None, entries: u32::from(self.size) };
        let mut index = head;
        let mut left = table.entries;
        loop {
            let descriptor = self.descriptor(&table, index)?;
            if descriptor.has(VRING_DESC_F_INDIRECT) {
                table = self.indirect_table(&table, &descriptor)?;
                left = table.entries;
                index = 0;
                continue;
            }
            self.add_pieces(&descriptor, pieces)?;
            total += u64::from(descriptor.len);
            left -= 1;
            if !descriptor.has(VRING_DESC_F_NEXT) {
                return Ok(total);
            }
            if left == 0 {
                return Err(RingFault::Loop { entries: table.entries });
            }
            index = descriptor.next;
        }
    }

    fn descriptor(&self, table: &Table, index: u16) -> Result<Descriptor, RingFault> {
        if u32::from(index) >= table.entries {
            return Err(RingFault::DescriptorIndex { index, entries: table.entries });
        }
        let offset = usize::from(index) * DESCRIPTOR_BYTES;
        let Some(piece) = table.place else {
            return Ok(self.own_descriptor(index));
        };
        let mut raw = [0; DESCRIPTOR_BYTES];
        self.ram.slice(piece).read_slice(&mut raw, offset).expect("the index was checked against the table");
        let (address, rest) = raw.split_at(8);
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("half of sixteen bytes"));
        Ok(Descriptor::from_words(word(address), word(rest)))
    }

    /// A descriptor of the ring's own table. Panics if the index is not below the ring's size.
    #[inline]
    pub(super) fn own_descriptor(&self, index: u16) -> Descriptor {
        let offset = usize::from(index) * DESCRIPTOR_BYTES;
        // Each half is read once; the guest may change it in between, and what comes of that is checked like everything else.
        Descriptor::from_words(self.descriptors.load_u64(offset), self.descriptors.load_u64(offset + 8))
    }

    /// Checks an indirect descriptor (virtio 1.2 §2.7.5.3).
    fn indirect_table(&self, from: &Table, descriptor: &Descriptor) -> Result<Table, RingFault> {
        let Descriptor { address, len, .. } = *descriptor;
        let refuse = |why| Err(RingFault::Indirect { why });
        if !self.indirect {
            return refuse("the guest has not accepted INDIRECT_DESC");
        }
        if from.place.is_some() {
            return refuse("it is inside an indirect table");
        }
        if descriptor.has(VRING_DESC_F_NEXT) {
            return refuse("it also names a next descriptor");
        }
        let entries = len / DESCRIPTOR_BYTES as u32;
        if entries == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES as u32) || entries > MAX_INDIRECT_DESCRIPTORS {
            return refuse("the table's length is not 1 to 1024 descriptors");
        }
        let place = self.ram.locate(address, len).filter(|piece| piece.len == len);
        let place = place.ok_or(RingFault::OutsideMemory { address, len })?;
        Ok(Table { place: Some(place), entries })
    }

    fn add_pieces(&self, descriptor: &Descriptor, pieces: &mut Vec<Piece>) -> Result<(), RingFault> {
        let Descriptor { address, len, .. } = *descriptor;
        if descriptor.has(VRING_DESC_F_WRITE) != (self.direction == Direction::ToGuest) {
            return Err(RingFault::Direction { address });
        }
        if len == 0 {
            return Err(RingFault::EmptyBuffer { address });
        }
        let (mut at, mut left) = (address, len);
        while left > 0 {
            let piece = self.ram.locate(at, left).ok_or(RingFault::OutsideMemory { address, len })?;
            pieces.push(piece);
            left -= piece.len;
            // Cannot wrap: locate found the piece in a region that does not.
            at += u64::from(piece.len);
        }
        Ok(())
    }

    /// Whether chains are known that were not taken yet.
    pub fn holds_chains(&self) -> bool {
        self.seen_avail != self.next_avail
    }

    /// How many of `wanted` chains the guest offers, and whether those are all that it does. An index that is wrong becomes a
    /// fault only when no chain is left that was offered before it.
    #[inline]
    pub(super) fn offered(&mut self, wanted: usize) -> Result<(usize, bool), RingFault> {
        let known = usize::from(self.seen_avail.wrapping_sub(self.next_avail));
        if known >= wanted {
            return Ok((wanted, false));
        }
        match self.refresh() {
            Err(fault) if known == 0 => Err(fault),
            Err(_) => Ok((known, false)),
            Ok(_) => {
                let known = usize::from(self.seen_avail.wrapping_sub(self.next_avail));
                Ok((known.min(wanted), known < wanted))
            }
        }
    }

    /// Begins to fetch what comes next: the place of this burst's `count` used elements, and the descriptors of the burst after
    /// it as far as they are offered. Nothing that the driver is still writing: that would take the line from under its hands.
    #[inline]
    pub(super) fn prefetch_ahead(&self, count: usize) {
        let mask = self.size - 1;
        let used = usize::from(self.next_used & mask);
        self.used.prefetch::<true>(RING_HEADER_BYTES + USED_ELEMENT_BYTES * used, USED_ELEMENT_BYTES * count);
        let next = self.next_avail.wrapping_add(count as u16);
        let known = usize::from(self.seen_avail.wrapping_sub(next)).min(count);
        for ahead in 0..known {
            let entry = usize::from(next.wrapping_add(ahead as u16) & mask);
            let head = self.available.load_u16(RING_HEADER_BYTES + 2 * entry, Ordering::Relaxed) & mask;
            self.descriptors.prefetch::<false>(usize::from(head) * DESCRIPTOR_BYTES, 1);
        }
    }

    /// Takes the next chain off the available ring and puts it on the used ring, where the guest sees it after `publish`.
    #[inline]
    pub fn complete(&mut self, head: u16, written: u32) {
        let entry = usize::from(self.next_used & (self.size - 1));
        let offset = RING_HEADER_BYTES + USED_ELEMENT_BYTES * entry;
        self.used.store_pair(offset, [u32::from(head), written]);
        self.next_used = self.next_used.wrapping_add(1);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Shows the guest everything completed so far (virtio 1.2 §2.7.8.2). The record of it waits for `settle`.
    #[inline]
    pub fn publish(&mut self) {
        if self.published != self.next_used {
            self.used.store_u16(2, self.next_used, Ordering::Release);
            self.published = self.next_used;
            self.starving = false;
        }
    }

    /// Records what `publish` has written to the used ring. Behind it, the caller may mark what else it wrote before.
    #[inline]
    pub fn settle(&mut self) {
        let (start, end) = (self.settled, self.published);
        if start == end {
            return;
        }
        self.settled = end;
        fence_before_marks();
        let entry = |index: u16| RING_HEADER_BYTES + USED_ELEMENT_BYTES * usize::from(index & (self.size - 1));
        let (first, last) = (entry(start), entry(end.wrapping_sub(1)));
        if first <= last && end.wrapping_sub(start) <= self.size {
            self.used.mark(first, last + USED_ELEMENT_BYTES - first);
        } else {
            // Around the ring's end: all of it, which is rarely more than its two or three pages.
            self.used.mark(RING_HEADER_BYTES, USED_ELEMENT_BYTES * usize::from(self.size));
        }
        self.used.mark(2, 2);
        if self.polling && end.wrapping_sub(self.silenced) >= SILENCE_ENTRIES {
            self.silence();
        }
    }

    /// Asks the guest to kick when it offers more than has been seen. Returns true when it already has: then the kick may never
    /// come, and the caller must look again (virtio 1.2 §2.7.10). While polling it does nothing, not even look: each look takes
    /// the line with the index from the driver, which needs it for what it is about to offer.
    #[inline]
    pub fn arm(&mut self) -> Result<bool, RingFault> {
        if self.polling {
            return Ok(false);
        }
        if self.armed != Some(self.seen_avail) {
            if self.event_idx {
                self.store_event(self.seen_avail);
            } else if self.armed.is_none() {
                self.store_flags(0);
            }
            self.armed = Some(self.seen_avail);
        }
        self.refresh()
    }

    /// Tells the guest that it need not kick, because the device is looking anyway. Only a hint.
    #[inline]
    pub fn disarm(&mut self) {
        // With EVENT_IDX a kick is wanted only at the index that was asked for, so there is nothing to switch off.
        if !self.event_idx && self.armed.is_some() {
            self.store_flags(VRING_USED_F_NO_NOTIFY as u16);
            self.armed = None;
        }
    }

    /// With `true` no kick is asked for until this is called with `false`; the next `arm` then asks for one again.
    pub fn set_polling(&mut self, polling: bool) {
        self.polling = polling;
        self.armed = None;
        if polling {
            self.silence();
        }
    }

    /// What [`Self::set_polling`] was called with.
    #[inline]
    pub fn is_polling(&self) -> bool {
        self.polling
    }

    /// Makes every kick needless that the guest may still believe to be wanted.
    #[cold]
    fn silence(&mut self) {
        self.silenced = self.next_used;
        if self.event_idx {
            // The driver is at or ahead of `next_avail`: it would have to go all the way round to pass the one before.
            self.store_event(self.next_avail.wrapping_sub(1));
        } else {
            self.store_flags(VRING_USED_F_NO_NOTIFY as u16);
        }
    }

    fn store_event(&mut self, index: u16) {
        self.store_and_mark(RING_HEADER_BYTES + USED_ELEMENT_BYTES * usize::from(self.size), index);
    }

    fn store_flags(&mut self, flags: u16) {
        self.store_and_mark(0, flags);
    }

    fn store_and_mark(&mut self, offset: usize, value: u16) {
        self.used.store_u16(offset, value, Ordering::Relaxed);
        // Also for `arm`: a request must be visible before the index is read again; pairs with the driver's barrier.
        fence_before_marks();
        self.used.mark(offset, 2);
    }

    /// Whether the guest wants an interrupt for what was published since the last call (virtio 1.2 §2.7.7). Settles.
    #[inline]
    pub fn wants_signal(&mut self) -> bool {
        self.settle();
        let Some(old) = self.signalled.replace(self.published) else {
            // First call after a start: an interrupt may have been lost with the device's previous life.
            return true;
        };
        old != self.published && self.wants_signal_between(old, self.published)
    }

    /// The used index as the guest sees it.
    pub fn published(&self) -> u16 {
        self.published
    }

    /// How many entries the guest can see that `wants_signal` was not asked for yet; after a start, more than any ring has.
    pub fn unsignalled(&self) -> u16 {
        self.signalled.map_or(u16::MAX, |old| self.published.wrapping_sub(old))
    }

    /// Whether the guest wants no interrupt for what was published up to `index`. Then none will be due for that. Settles.
    #[inline]
    pub fn forgives(&mut self, index: u16) -> bool {
        self.settle();
        let Some(old) = self.signalled else { return false };
        let forgives = old == index || !self.wants_signal_between(old, index);
        if forgives {
            self.signalled = Some(index);
        }
        forgives
    }

    #[inline]
    fn wants_signal_between(&self, old: u16, new: u16) -> bool {
        // The used index must be visible before the driver's wish is read; pairs with the driver's barrier. The fence between the
        // two is the one in `settle`.
        if !self.event_idx {
            return u32::from(self.available.load_u16(0, Ordering::Relaxed)) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let event = self.available.load_u16(RING_HEADER_BYTES + 2 * usize::from(self.size), Ordering::Relaxed);
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }
}

/// A descriptor table: the ring's own, or an indirect one.
struct Table {
    place: Option<Piece>,
    entries: u32,
}
