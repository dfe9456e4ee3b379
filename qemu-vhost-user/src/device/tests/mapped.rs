//! A guest's driver over a mapping of its own, for tests of millions of frames, of several pairs, and without system calls.
//! Each entry of a ring has one buffer, and frames go through the rings in order.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::device::features::Features;
use crate::device::link::{ANSWER_DEADLINE, Command, RingStart, SessionEnd, pair};
use crate::device::memory::{Area, BackendDirty, GuestRam, Piece};
use crate::device::net::{NetDevice, RingIndex};
use crate::device::ring::{Direction, Ring, RingPlace};
use crate::device::tests::bed::{Memory, USER_BASE, WRITE, new_eventfd};

const RING_STRIDE: u64 = 0x1_0000;
const BUFFERS: u64 = 0x20_0000;
const BUFFER_BYTES: u64 = 512;
pub const SIZE: u16 = 64;
const EVENT: usize = 4 + 8 * SIZE as usize;

/// One ring from the guest's side.
pub struct MappedRing {
    ram: Arc<GuestRam>,
    index: RingIndex,
    available: Area,
    used: Area,
    avail_idx: u16,
    used_seen: u16,
}

impl MappedRing {
    fn new(ram: &Arc<GuestRam>, index: RingIndex) -> Self {
        let base = u64::from(index.0) * RING_STRIDE;
        let area = |at, len| ram.area(base + at, len).unwrap();
        let ring = Self {
            ram: Arc::clone(ram),
            index,
            available: area(0x4000, 0x1000),
            used: area(0x8000, 0x1000),
            avail_idx: 0,
            used_seen: 0,
        };
        let flags = if index.is_receive() { WRITE } else { 0 };
        for entry in 0..SIZE {
            ring.describe(entry, BUFFER_BYTES as u32, flags);
        }
        ring
    }

    fn describe(&self, entry: u16, len: u32, flags: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&self.address(entry).to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        let place = u64::from(self.index.0) * RING_STRIDE + 16 * u64::from(entry);
        self.ram.fill(self.ram.whole(&mut 0, place, 16).unwrap(), 0, &raw);
    }

    fn address(&self, entry: u16) -> u64 {
        BUFFERS + (u64::from(self.index.0) * u64::from(SIZE) + u64::from(entry)) * BUFFER_BYTES
    }

    fn buffer(&self, entry: u16) -> Piece {
        self.ram.whole(&mut 0, self.address(entry), BUFFER_BYTES as u32).unwrap()
    }

    fn place(&self) -> RingPlace {
        let base = USER_BASE + u64::from(self.index.0) * RING_STRIDE;
        RingPlace { size: SIZE.into(), descriptors: base, available: base + 0x4000, used: base + 0x8000, base: 0 }
    }

    /// Entries that the guest can offer now.
    pub fn free(&self) -> u16 {
        SIZE - self.avail_idx.wrapping_sub(self.used_seen)
    }

    /// Offers the next entry. Returns whether the device wants a kick for it.
    pub fn offer(&mut self, event_idx: bool) -> bool {
        assert!(self.free() > 0);
        let entry = self.avail_idx % SIZE;
        self.available.store_u16(4 + 2 * usize::from(entry), entry, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.available.store_u16(2, self.avail_idx, Ordering::Release);
        std::sync::atomic::fence(Ordering::SeqCst);
        if event_idx {
            self.avail_idx.wrapping_sub(self.used.load_u16(EVENT, Ordering::Relaxed)).wrapping_sub(1) < 1
        } else {
            self.used.load_u16(0, Ordering::Relaxed) & 1 == 0
        }
    }

    /// Sends a frame with the next entry, which is free.
    pub fn send(&mut self, frame: &[u8], event_idx: bool) -> bool {
        let entry = self.avail_idx % SIZE;
        self.describe(entry, frame.len() as u32, 0);
        self.ram.fill(self.buffer(entry), 0, frame);
        self.offer(event_idx)
    }

    /// Takes the next used entry; a received frame goes to `into`. Returns its length.
    pub fn reap(&mut self, into: &mut [u8]) -> Option<usize> {
        if self.used.load_u16(2, Ordering::Acquire) == self.used_seen {
            return None;
        }
        let entry = self.used_seen % SIZE;
        let element = 4 + 8 * usize::from(entry);
        assert_eq!(self.used.load_u16(element, Ordering::Relaxed), entry, "completed in order");
        let len = usize::from(self.used.load_u16(element + 4, Ordering::Relaxed));
        self.ram.take(self.buffer(entry), &mut into[..len]);
        self.used_seen = self.used_seen.wrapping_add(1);
        Some(len)
    }

    /// Wants no interrupts from now on, so that the device has no reason for a system call.
    pub fn refuse_interrupts(&self) {
        self.available.store_u16(0, 1, Ordering::Relaxed);
    }
}

/// A device with some pairs running, and the guest's side of each.
pub struct MappedBed {
    pub device: NetDevice,
    pub dirty: BackendDirty,
    /// Receive rings by pair.
    pub rx: Vec<MappedRing>,
    /// Transmit rings by pair.
    pub tx: Vec<MappedRing>,
    _session: SessionEnd,
}

impl MappedBed {
    pub fn started(features: Features, pairs: usize) -> Self {
        let (session, reactor) = pair(Arc::default(), ANSWER_DEADLINE).unwrap();
        let (memory, dirty) = (Memory::new(), BackendDirty::default());
        // The guest's mapping is another one, whose dirty bits nobody asks for.
        let guest = Arc::new(GuestRam::build(memory.regions(), &BackendDirty::default()).unwrap());
        let ram = Arc::new(GuestRam::build(memory.regions(), &dirty).unwrap());
        let ring = |index| MappedRing::new(&guest, index);
        let rx: Vec<MappedRing> = (0..pairs).map(|pair| ring(RingIndex::receive(pair))).collect();
        let tx: Vec<MappedRing> = (0..pairs).map(|pair| ring(RingIndex::transmit(pair))).collect();
        let mut device = NetDevice::new(reactor, dirty.clone());
        for ring in rx.iter().chain(&tx) {
            let direction = if ring.index.is_receive() { Direction::ToGuest } else { Direction::FromGuest };
            let start = RingStart {
                ring: Box::new(Ring::open(Arc::clone(&ram), ring.place(), direction, features).unwrap()),
                features,
                kick: None,
                call: Some(new_eventfd()),
                error: None,
                enabled: true,
            };
            device.execute(Command::StartRing { index: ring.index, start });
        }
        Self { device, dirty, rx, tx, _session: session }
    }
}
