//! Segments on an SPDK device: the layout of a raw device of the kernel's, so that a log can move between the two.

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::device::Device;
use super::error::SpdkError;
use crate::LogError;
use crate::segment::SegmentNumber;
use crate::volume::{Access, BlockIo, Geometry, RawVolume, Volume};

/// A device that the log's keeper and its driver share. Both belong to one thread and never call each other.
pub(crate) type SharedDevice = Rc<RefCell<Device>>;

/// One copy of the log.
#[derive(Debug, Clone)]
pub(crate) struct Leg {
    /// Its configured name.
    pub path: PathBuf,
    /// Or why it was not opened.
    pub device: Result<SharedDevice, SpdkError>,
}

/// Where a segment begins.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub device: SharedDevice,
    pub offset_bytes: u64,
}

/// For [`RawVolume`].
#[derive(Debug)]
pub(super) struct SpdkIo {
    path: PathBuf,
    device: SharedDevice,
}

impl BlockIo for SpdkIo {
    type Place = Place;

    fn path(&self) -> &Path {
        &self.path
    }

    fn capacity_bytes(&self) -> u64 {
        self.device.borrow().capacity_bytes()
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.device.borrow_mut().read_at(offset, into).map_err(io::Error::other)
    }

    fn write_at(&mut self, from: &[u8], offset: u64) -> io::Result<()> {
        self.device.borrow_mut().write_at(offset, from).map_err(io::Error::other)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.device.borrow_mut().flush().map_err(io::Error::other)
    }

    fn place(&self, offset: u64) -> Place {
        Place { device: Rc::clone(&self.device), offset_bytes: offset }
    }
}

/// See the module.
pub(crate) struct SpdkVolume(RawVolume<SpdkIo>);

impl Volume for SpdkVolume {
    type Spec = Leg;
    type Place = Place;

    fn open(leg: &Leg, geometry: Geometry, access: Access) -> Result<SpdkVolume, LogError> {
        let failed = |error| LogError::io("opening", &leg.path, io::Error::other(error));
        let device = Rc::clone(leg.device.as_ref().map_err(|error| failed(error.clone()))?);
        // A device that failed stays out until the process starts anew: a reset takes seconds, which this thread does not have.
        if let Some(failure) = device.borrow().failure() {
            return Err(failed(failure.clone()));
        }
        RawVolume::open(SpdkIo { path: leg.path.clone(), device }, geometry, access).map(SpdkVolume)
    }

    fn describe(&self, number: SegmentNumber) -> PathBuf {
        self.0.describe(number)
    }

    fn segments(&self) -> Vec<SegmentNumber> {
        self.0.segments()
    }

    fn has_unreadable(&self) -> bool {
        self.0.has_unreadable()
    }

    fn read(&self, number: SegmentNumber, block: u32, into: &mut [u8]) -> Result<usize, LogError> {
        self.0.read(number, block, into)
    }

    fn write(&mut self, number: SegmentNumber, block: u32, from: &[u8]) -> Result<(), LogError> {
        self.0.write(number, block, from)
    }

    fn sync(&mut self, number: SegmentNumber) -> Result<(), LogError> {
        self.0.sync(number)
    }

    fn prepare(&mut self, number: SegmentNumber) -> Result<Place, LogError> {
        self.0.prepare(number)
    }

    fn release(&mut self, number: SegmentNumber) -> Result<(), LogError> {
        self.0.release(number)
    }
}
