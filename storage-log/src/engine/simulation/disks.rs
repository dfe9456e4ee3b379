//! Disks that exist in memory: what is written is in a cache until it is flushed, and a power failure keeps any part of
//! the cache, block by block.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use rustix::fd::BorrowedFd;

use crate::LogError;
use crate::block::{BLOCK_BYTES, Block};
use crate::engine::Driver;
use crate::segment::SegmentNumber;
use crate::volume::{Access, Geometry, TELLING_BLOCKS, Volume};

#[derive(Debug, Clone)]
struct SimBlock {
    durable: Box<Block>,
    cached: Option<Box<Block>>,
}

#[derive(Debug, Default)]
struct Disk {
    segments: BTreeMap<SegmentNumber, Vec<SimBlock>>,
    spares: Vec<Vec<SimBlock>>,
    down: bool,
    /// What is not there yet cannot be made.
    full: bool,
}

/// A group on its way to a disk.
#[derive(Debug)]
struct Flight {
    number: SegmentNumber,
    at: usize,
    memory: *const u8,
    bytes: Range<usize>,
    before: Vec<u8>,
    /// Blocks that reached the cache.
    done: usize,
}

#[derive(Debug)]
pub(super) struct Disks {
    disks: Vec<Disk>,
    flights: Vec<Option<Flight>>,
    finished: Vec<(usize, bool)>,
    power: bool,
}

impl Disks {
    pub fn new(count: usize) -> Disks {
        Disks {
            disks: (0..count).map(|_| Disk::default()).collect(),
            flights: (0..count).map(|_| None).collect(),
            finished: Vec::new(),
            power: true,
        }
    }

    pub fn is_whole(&self, leg: usize) -> bool {
        !self.disks[leg].down
    }

    pub fn are_all_up(&self) -> bool {
        self.disks.iter().all(|disk| !disk.down)
    }

    /// From now on this disk answers everything with an error.
    pub fn fail(&mut self, leg: usize) {
        self.disks[leg].down = true;
        if self.flights[leg].take().is_some() {
            self.finished.push((leg, false));
        }
    }

    /// Disks that failed work again, with what they held.
    pub fn repair(&mut self) {
        self.disks.iter_mut().for_each(|disk| disk.down = false);
    }

    /// From now on there is no room for more segments than there are, or there is again.
    pub fn set_full(&mut self, full: bool) {
        self.disks.iter_mut().for_each(|disk| disk.full = full);
    }

    /// Some blocks of the groups on their way arrive; a group whose blocks are all there is flushed.
    pub fn advance(&mut self, mut draw: impl FnMut(u64) -> u64) {
        for leg in 0..self.disks.len() {
            let steps = draw(6);
            for _ in 0..steps {
                self.advance_one(leg);
            }
        }
    }

    fn advance_one(&mut self, leg: usize) {
        let Some(flight) = &mut self.flights[leg] else { return };
        // SAFETY: tests only; the engine's memory outlives its driver, which clears the flights when it is dropped.
        let now = unsafe { std::slice::from_raw_parts(flight.memory.add(flight.bytes.start), flight.bytes.len()) };
        assert_eq!(now, &flight.before[..], "bytes were changed while the device reads them");
        let disk = &mut self.disks[leg];
        let blocks = flight.before.len() / BLOCK_BYTES;
        if flight.done < blocks {
            let bytes = &flight.before[flight.done * BLOCK_BYTES..][..BLOCK_BYTES];
            let place = disk.segments.get_mut(&flight.number).expect("the place was prepared");
            place[flight.at + flight.done].cached = Some(Box::new(bytes.try_into().expect("a block's length")));
            flight.done += 1;
        } else {
            disk.flush();
            self.flights[leg] = None;
            self.finished.push((leg, true));
        }
    }

    /// Any part of what is cached becomes durable, in whole blocks.
    pub fn power_off(&mut self, mut draw: impl FnMut(u64) -> u64) {
        self.power = false;
        // Blocks of a group may arrive in any order, so some of those that were not even cached do too.
        for leg in 0..self.disks.len() {
            if let Some(flight) = self.flights[leg].take() {
                self.finished.push((leg, false));
                let rest = flight.done..flight.before.len() / BLOCK_BYTES;
                for nth in rest.filter(|_| draw(3) == 0) {
                    let bytes = &flight.before[nth * BLOCK_BYTES..][..BLOCK_BYTES];
                    let place = self.disks[leg].segments.get_mut(&flight.number).expect("the place was prepared");
                    place[flight.at + nth].cached = Some(Box::new(bytes.try_into().expect("a block's length")));
                }
            }
            for block in self.disks[leg].segments.values_mut().flatten() {
                if let Some(cached) = block.cached.take()
                    && draw(2) == 0
                {
                    block.durable = cached;
                }
            }
        }
    }

    pub fn power_on(&mut self) {
        self.power = true;
        self.finished.clear();
    }

    /// Changes a byte of a block that holds something. Returns whether there was one.
    pub fn rot(&mut self, leg: usize, mut draw: impl FnMut(u64) -> u64) -> bool {
        let disk = &mut self.disks[leg];
        let mut blocks: Vec<&mut SimBlock> = disk.segments.values_mut().flatten().collect();
        blocks.retain(|block| block.durable.iter().any(|byte| *byte != 0));
        if blocks.is_empty() {
            return false;
        }
        let at = draw(blocks.len() as u64) as usize;
        let byte = draw(BLOCK_BYTES as u64) as usize;
        blocks[at].durable[byte] ^= 1 << draw(8);
        true
    }

    /// Changes a bit of a block, or changes it back.
    pub fn flip(&mut self, leg: usize, segment: SegmentNumber, block: u32) {
        let blocks = self.disks[leg].segments.get_mut(&segment).expect("a segment that is there");
        blocks[block as usize].durable[9] ^= 1;
    }

    /// A segment is not there any more, nor its place.
    pub fn lose(&mut self, leg: usize, segment: SegmentNumber) {
        self.disks[leg].segments.remove(&segment).expect("a segment that is there");
    }

    fn check(&self, leg: usize) -> Result<(), LogError> {
        if self.disks[leg].down || !self.power {
            return Err(LogError::io("using", PathBuf::from("a simulated disk"), io::ErrorKind::NotConnected));
        }
        Ok(())
    }
}

impl Disk {
    fn flush(&mut self) {
        for block in self.segments.values_mut().flatten() {
            if let Some(cached) = block.cached.take() {
                block.durable = cached;
            }
        }
    }
}

/// Which disk.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    pub disks: Rc<RefCell<Disks>>,
    pub leg: usize,
}

pub(super) struct SimVolume {
    spec: Spec,
    geometry: Geometry,
}

impl Volume for SimVolume {
    type Spec = Spec;
    type Place = SegmentNumber;

    fn open(spec: &Spec, geometry: Geometry, access: Access) -> Result<SimVolume, LogError> {
        spec.disks.borrow().check(spec.leg)?;
        let volume = SimVolume { spec: spec.clone(), geometry };
        if access == Access::Rebuild {
            let mut disks = spec.disks.borrow_mut();
            let disk = &mut disks.disks[spec.leg];
            disk.spares.extend(std::mem::take(&mut disk.segments).into_values());
            let telling = disk.spares.iter_mut().flat_map(|blocks| &mut blocks[..TELLING_BLOCKS as usize]);
            telling.for_each(|block| *block = SimBlock { durable: Box::new([0; BLOCK_BYTES]), cached: None });
        }
        Ok(volume)
    }

    fn describe(&self, number: SegmentNumber) -> PathBuf {
        PathBuf::from(format!("disk {} segment {number}", self.spec.leg))
    }

    fn segments(&self) -> Vec<SegmentNumber> {
        self.spec.disks.borrow().disks[self.spec.leg].segments.keys().copied().collect()
    }

    fn has_unreadable(&self) -> bool {
        false
    }

    fn read(&self, number: SegmentNumber, block: u32, into: &mut [u8]) -> Result<usize, LogError> {
        let disks = self.spec.disks.borrow();
        disks.check(self.spec.leg)?;
        let from = disks.disks[self.spec.leg].segments.get(&number).map_or(&[][..], |blocks| blocks);
        let from = from.get(block as usize..).unwrap_or_default();
        let mut count = 0;
        for (into, from) in into.as_chunks_mut::<BLOCK_BYTES>().0.iter_mut().zip(from) {
            into.copy_from_slice(&from.cached.as_ref().unwrap_or(&from.durable)[..]);
            count += 1;
        }
        Ok(count)
    }

    fn write(&mut self, number: SegmentNumber, block: u32, from: &[u8]) -> Result<(), LogError> {
        let mut disks = self.spec.disks.borrow_mut();
        disks.check(self.spec.leg)?;
        let blocks = disks.disks[self.spec.leg].segments.get_mut(&number).expect("the place was prepared");
        for (nth, bytes) in from.as_chunks::<BLOCK_BYTES>().0.iter().enumerate() {
            blocks[block as usize + nth].cached = Some(Box::new(*bytes));
        }
        Ok(())
    }

    fn sync(&mut self, _number: SegmentNumber) -> Result<(), LogError> {
        let mut disks = self.spec.disks.borrow_mut();
        disks.check(self.spec.leg)?;
        disks.disks[self.spec.leg].flush();
        Ok(())
    }

    fn prepare(&mut self, number: SegmentNumber) -> Result<SegmentNumber, LogError> {
        let mut disks = self.spec.disks.borrow_mut();
        disks.check(self.spec.leg)?;
        let blank = SimBlock { durable: Box::new([0; BLOCK_BYTES]), cached: None };
        let disk = &mut disks.disks[self.spec.leg];
        if !disk.segments.contains_key(&number) {
            let spare = disk.spares.pop();
            if spare.is_none() && disk.full {
                return Err(LogError::space(&PathBuf::from("a simulated disk"), io::ErrorKind::StorageFull));
            }
            let blocks = spare.unwrap_or_else(|| vec![blank; self.geometry.segment_blocks as usize]);
            disk.segments.insert(number, blocks);
        }
        Ok(number)
    }

    fn release(&mut self, number: SegmentNumber) -> Result<(), LogError> {
        let mut disks = self.spec.disks.borrow_mut();
        disks.check(self.spec.leg)?;
        let disk = &mut disks.disks[self.spec.leg];
        disk.spares.extend(disk.segments.remove(&number));
        Ok(())
    }
}

pub(super) struct SimDriver {
    memory: *const u8,
    disks: Rc<RefCell<Disks>>,
    bound: Vec<SegmentNumber>,
}

impl SimDriver {
    pub fn new(memory: &[u8], disks: Rc<RefCell<Disks>>) -> SimDriver {
        let legs = disks.borrow().disks.len();
        SimDriver { memory: memory.as_ptr(), disks, bound: vec![0; legs] }
    }
}

impl Drop for SimDriver {
    fn drop(&mut self) {
        self.disks.borrow_mut().flights.iter_mut().for_each(|flight| *flight = None);
    }
}

impl Driver for SimDriver {
    type Place = SegmentNumber;

    fn bind(&mut self, leg: usize, place: &SegmentNumber) -> io::Result<()> {
        self.bound[leg] = *place;
        Ok(())
    }

    fn write(&mut self, leg: usize, bytes: Range<usize>, offset_bytes: u64) -> io::Result<()> {
        let mut disks = self.disks.borrow_mut();
        if disks.check(leg).is_err() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        assert!(disks.flights[leg].is_none(), "one group at a time");
        // SAFETY: as in `advance_one`.
        let before = unsafe { std::slice::from_raw_parts(self.memory.add(bytes.start), bytes.len()) }.to_vec();
        let at = (offset_bytes / BLOCK_BYTES as u64) as usize;
        disks.flights[leg] = Some(Flight { number: self.bound[leg], at, memory: self.memory, bytes, before, done: 0 });
        Ok(())
    }

    fn release(&mut self, leg: usize) -> bool {
        self.disks.borrow().flights[leg].is_none()
    }

    fn poll(&mut self, done: &mut dyn FnMut(usize, io::Result<()>)) {
        for (leg, fine) in self.disks.borrow_mut().finished.drain(..) {
            done(leg, if fine { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) });
        }
    }

    fn wait(&mut self, _timeout: Duration) -> io::Result<()> {
        let mut disks = self.disks.borrow_mut();
        for leg in 0..disks.disks.len() {
            disks.advance_one(leg);
        }
        Ok(())
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
