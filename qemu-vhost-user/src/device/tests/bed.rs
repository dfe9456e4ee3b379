//! A guest without a CPU: its memory is a memfd, its virtio-net driver the functions below. The driver reads and writes through
//! the file, never through the device's mapping, so it leaves no dirty bits and sees only what a guest would.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::fs::MemfdFlags;

use crate::device::features::Features;
use crate::device::link::{ANSWER_DEADLINE, Answer, Command, RingStart, SessionEnd, pair};
use crate::device::memory::{BackendDirty, GuestRam, RegionSpec};
use crate::device::net::{DeviceEvent, NetDevice, RingIndex};
use crate::device::ring::{Direction, Ring, RingPlace};

/// Size of the guest's RAM file.
pub const RAM_BYTES: u64 = 16 << 20;
/// The file's halves are swapped in guest-physical space, so buffers across the middle are in two regions.
pub const HALF: u64 = RAM_BYTES / 2;
/// QEMU's address of guest-physical zero.
pub const USER_BASE: u64 = 0x7f00_0000_0000;
/// Buffers of the chain with head `h` begin at `BUFFERS + h * CHAIN_BYTES`.
const BUFFERS: u64 = 0x10_0000;
const CHAIN_BYTES: u64 = 0x2_0000;

/// The rings of a device with one pair.
pub const BOTH: [RingIndex; 2] = [RingIndex::RX, RingIndex::TX];

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// What an eventfd has counted since the last look.
pub fn take_count(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_ne_bytes(count),
        Err(_) => 0,
    }
}

/// Guest memory from the guest's side.
pub struct Memory {
    pub file: File,
}

impl Memory {
    pub fn new() -> Self {
        let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(RAM_BYTES).unwrap();
        Self { file }
    }

    pub fn offset(guest: u64) -> u64 {
        (guest + HALF) % RAM_BYTES
    }

    pub fn write(&self, guest: u64, bytes: &[u8]) {
        for (at, byte) in (guest..).zip(bytes.chunks(1)) {
            if at == guest && Self::offset(at) + bytes.len() as u64 <= RAM_BYTES {
                return self.file.write_all_at(bytes, Self::offset(at)).unwrap();
            }
            self.file.write_all_at(byte, Self::offset(at)).unwrap();
        }
    }

    pub fn read(&self, guest: u64, bytes: &mut [u8]) {
        let split = (RAM_BYTES - Self::offset(guest)).min(bytes.len() as u64) as usize;
        let (first, second) = bytes.split_at_mut(split);
        self.file.read_exact_at(first, Self::offset(guest)).unwrap();
        if !second.is_empty() {
            self.file.read_exact_at(second, 0).unwrap();
        }
    }

    pub fn write_u16(&self, guest: u64, value: u16) {
        self.write(guest, &value.to_le_bytes());
    }

    pub fn read_u16(&self, guest: u64) -> u16 {
        let mut bytes = [0; 2];
        self.read(guest, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub fn regions(&self) -> Vec<RegionSpec> {
        let region = |guest, offset| RegionSpec {
            guest,
            size: HALF,
            user: USER_BASE + guest,
            offset,
            file: self.file.try_clone().unwrap(),
        };
        vec![region(0, HALF), region(HALF, 0)]
    }
}

/// One ring from the driver's side.
pub struct Driver {
    pub base: u64,
    pub size: u16,
    writable: bool,
    event_idx: bool,
    free: Vec<u16>,
    used_descriptors: HashMap<u16, Vec<u16>>,
    buffers: HashMap<u16, Vec<(u64, u32)>>,
    pub avail_idx: u16,
    used_seen: u16,
}

impl Driver {
    pub fn new(base: u64, size: u16, writable: bool, features: Features) -> Self {
        Self {
            base,
            size,
            writable,
            event_idx: features.event_idx(),
            free: (0..size).rev().collect(),
            used_descriptors: HashMap::new(),
            buffers: HashMap::new(),
            avail_idx: 0,
            used_seen: 0,
        }
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn available(&self) -> u64 {
        self.base + 0x4000
    }

    pub fn used(&self) -> u64 {
        self.base + 0x8000
    }

    pub fn place(&self, base: u16) -> RingPlace {
        RingPlace {
            size: self.size.into(),
            descriptors: USER_BASE + self.descriptors(),
            available: USER_BASE + self.available(),
            used: USER_BASE + self.used(),
            base,
        }
    }

    pub fn write_descriptor(
        &self,
        memory: &Memory,
        table: u64,
        index: u16,
        (addr, len): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let mut raw = Vec::with_capacity(16);
        raw.extend_from_slice(&addr.to_le_bytes());
        raw.extend_from_slice(&len.to_le_bytes());
        raw.extend_from_slice(&flags.to_le_bytes());
        raw.extend_from_slice(&next.to_le_bytes());
        memory.write(table + 16 * u64::from(index), &raw);
    }

    /// Offers a head without looking at what it points to. Returns whether the device asked for a kick.
    pub fn offer(&mut self, memory: &Memory, head: u16) -> bool {
        let entry = u64::from(self.avail_idx % self.size);
        memory.write_u16(self.available() + 4 + 2 * entry, head);
        let old = self.avail_idx;
        self.avail_idx = old.wrapping_add(1);
        memory.write_u16(self.available() + 2, self.avail_idx);
        if self.event_idx {
            let event = memory.read_u16(self.used() + 4 + 8 * u64::from(self.size));
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < 1
        } else {
            memory.read_u16(self.used()) & 1 == 0
        }
    }

    /// Builds a chain of buffers with these lengths. None if the ring has too few descriptors left.
    pub fn prepare(&mut self, memory: &Memory, lens: &[u32], indirect: bool) -> Option<u16> {
        let need = if indirect { 1 } else { lens.len() };
        if self.free.len() < need {
            return None;
        }
        let taken: Vec<u16> = (0..need).filter_map(|_| self.free.pop()).collect();
        let head = taken[0];
        let write = if self.writable { WRITE } else { 0 };
        // TX buffers lie above the RX ones; a gap of one byte keeps neighbours apart.
        let area = BUFFERS + CHAIN_BYTES * u64::from(head) + if self.writable { 0 } else { 0x40_0000 };
        let mut at = area + 0x1000;
        let mut buffers = Vec::new();
        for &len in lens {
            buffers.push((at, len));
            at += u64::from(len) + 1;
        }
        let table = if indirect { area } else { self.descriptors() };
        for (number, &buffer) in buffers.iter().enumerate() {
            let index = if indirect { number as u16 } else { taken[number] };
            let last = number + 1 == buffers.len();
            let next = if last {
                0
            } else if indirect {
                number as u16 + 1
            } else {
                taken[number + 1]
            };
            self.write_descriptor(memory, table, index, buffer, write | if last { 0 } else { NEXT }, next);
        }
        if indirect {
            let place = (table, 16 * lens.len() as u32);
            self.write_descriptor(memory, self.descriptors(), head, place, INDIRECT, 0);
        }
        self.used_descriptors.insert(head, taken);
        self.buffers.insert(head, buffers);
        Some(head)
    }

    /// Fills a chain's buffers with a frame of exactly their length.
    pub fn fill(&self, memory: &Memory, head: u16, mut frame: &[u8]) {
        for &(at, len) in &self.buffers[&head] {
            let (now, later) = frame.split_at(len as usize);
            memory.write(at, now);
            frame = later;
        }
        assert!(frame.is_empty());
    }

    /// Takes the next used element: the first `len` bytes of the chain's buffers.
    pub fn reap(&mut self, memory: &Memory) -> Option<Vec<u8>> {
        if memory.read_u16(self.used() + 2) == self.used_seen {
            return None;
        }
        let mut element = [0; 8];
        memory.read(self.used() + 4 + 8 * u64::from(self.used_seen % self.size), &mut element);
        let [a, b, c, d, e, f, g, h] = element;
        let (head, len) = (u32::from_le_bytes([a, b, c, d]) as u16, u32::from_le_bytes([e, f, g, h]));
        self.used_seen = self.used_seen.wrapping_add(1);
        self.free.extend(self.used_descriptors.remove(&head).expect("each chain is used once"));
        let buffers = self.buffers.remove(&head).unwrap();
        let mut bytes = vec![0; buffers.iter().map(|&(_, len)| len as usize).sum()];
        let mut at = 0;
        for (address, len) in buffers {
            memory.read(address, &mut bytes[at..at + len as usize]);
            at += len as usize;
        }
        assert!(len as usize <= bytes.len(), "more written than there was room");
        bytes.truncate(len as usize);
        Some(bytes)
    }

    /// Asks for an interrupt at the next used element.
    pub fn want_interrupt(&self, memory: &Memory) {
        memory.write_u16(self.available() + 4 + 2 * u64::from(self.size), self.used_seen);
        memory.write_u16(self.available(), 0);
    }

    /// Asks for none: by flag, or by naming an index that is far away.
    pub fn refuse_interrupts(&self, memory: &Memory) {
        let far = self.used_seen.wrapping_sub(1);
        memory.write_u16(self.available() + 4 + 2 * u64::from(self.size), far);
        memory.write_u16(self.available(), 1);
    }
}

/// A device with both rings, and the guest around it.
pub struct Bed {
    pub memory: Memory,
    pub device: NetDevice,
    pub dirty: BackendDirty,
    pub features: Features,
    pub rx: Driver,
    pub tx: Driver,
    pub calls: [OwnedFd; 2],
    pub kicks: [OwnedFd; 2],
    positions: [u16; 2],
    _session: SessionEnd,
}

impl Bed {
    pub fn new(features: Features, size: u16) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (session, reactor) = pair(stop, ANSWER_DEADLINE).unwrap();
        let dirty = BackendDirty::default();
        Self {
            memory: Memory::new(),
            device: NetDevice::new(reactor, dirty.clone()),
            dirty,
            features,
            rx: Driver::new(0, size, true, features),
            tx: Driver::new(0x1_0000, size, false, features),
            calls: [new_eventfd(), new_eventfd()],
            kicks: [new_eventfd(), new_eventfd()],
            positions: [0; 2],
            _session: session,
        }
    }

    pub fn started(features: Features, size: u16) -> Self {
        let mut bed = Self::new(features, size);
        bed.start();
        bed
    }

    pub fn open(&self, index: RingIndex) -> Result<Ring, crate::device::LayoutError> {
        let ram = Arc::new(GuestRam::build(self.memory.regions(), &self.dirty).unwrap());
        let (driver, direction) = match index {
            RingIndex::RX => (&self.rx, Direction::ToGuest),
            _ => (&self.tx, Direction::FromGuest),
        };
        Ring::open(ram, driver.place(self.positions[usize::from(index.0)]), direction, self.features)
    }

    /// Starts both rings where they stopped, as QEMU does.
    pub fn start(&mut self) {
        for index in BOTH {
            let number = usize::from(index.0);
            let start = RingStart {
                ring: Box::new(self.open(index).unwrap()),
                features: self.features,
                kick: Some(self.kicks[number].try_clone().unwrap()),
                call: Some(self.calls[number].try_clone().unwrap()),
                error: None,
                enabled: true,
            };
            self.device.execute(Command::StartRing { index, start });
        }
    }

    pub fn stop(&mut self) {
        for index in BOTH {
            if let Answer::Stopped { position: Some(position), .. } = self.device.execute(Command::StopRing { index }) {
                self.positions[usize::from(index.0)] = position;
            }
        }
    }

    pub fn events(&mut self) -> Vec<DeviceEvent> {
        let mut events = Vec::new();
        self.device.handle_commands(&mut |event| events.push(event));
        events
    }

    /// Pages written by the device since the last call.
    pub fn dirty_pages(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        assert!(self.dirty.drain(&mut |page| pages.push(page)));
        pages
    }

    /// The guest sends a frame in buffers of these lengths. Returns whether it kicked; None if the ring is full.
    pub fn send(&mut self, frame: &[u8], lens: &[u32], indirect: bool) -> Option<bool> {
        let head = self.tx.prepare(&self.memory, lens, indirect)?;
        self.tx.fill(&self.memory, head, frame);
        Some(self.tx.offer(&self.memory, head))
    }

    /// The guest offers a receive chain. Returns whether it kicked; None if the ring is full.
    pub fn offer_rx(&mut self, lens: &[u32], indirect: bool) -> Option<bool> {
        let head = self.rx.prepare(&self.memory, lens, indirect)?;
        Some(self.rx.offer(&self.memory, head))
    }
}

/// A frame of `len` bytes after the 12 of the header, whose content depends on its number.
pub fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut state = u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = vec![0; 12 + len];
    for byte in &mut bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 56) as u8;
    }
    bytes
}
