//! Where segments live: files in a directory, or slots of a device.
//!
//! All calls may block, so they are made when the log is opened and afterwards by the keeper's thread only. The engine
//! itself touches nothing but places that are ready to be written.

mod dir;
mod raw;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::LogError;
use crate::block::BLOCK_BYTES;
use crate::segment::SegmentNumber;

pub(crate) use dir::DirVolume;
#[cfg(feature = "spdk")]
pub(crate) use raw::BlockIo;
pub(crate) use raw::RawVolume;

/// Bytes that are read or written at once when time does not matter.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;
/// The first blocks of a place tell whose it is: the header, and in case that it is lost or was not written before a crash,
/// the one behind it, which is written next.
pub(crate) const TELLING_BLOCKS: u32 = 2;

/// What all places of one log have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    /// Blocks of a new segment.
    pub segment_blocks: u32,
    /// Segments at most.
    pub max_segments: u64,
    /// Bypass the page cache where that is possible.
    pub direct: bool,
}

impl Geometry {
    pub fn segment_bytes(&self) -> u64 {
        u64::from(self.segment_blocks) * BLOCK_BYTES as u64
    }
}

/// How a volume is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// To look at; nothing is changed, not even a blank place is prepared.
    Inspect,
    /// To be written; nobody else may have it.
    Own,
    /// As `Own`, and what it holds is worth nothing: a copy is rebuilt here.
    Rebuild,
}

/// See the module.
pub(crate) trait Volume: Sized {
    /// Names a volume before it is open.
    type Spec: Clone + std::fmt::Debug;
    /// Where a segment lies, as the engine's driver needs it.
    type Place: Clone;

    /// Opens a volume.
    fn open(spec: &Self::Spec, geometry: Geometry, access: Access) -> Result<Self, LogError>;

    /// What to call the place of a segment in messages.
    fn describe(&self, number: SegmentNumber) -> PathBuf;

    /// Segments that have a place here, ascending. What they hold is for the reader to find out.
    fn segments(&self) -> Vec<SegmentNumber>;

    /// Something is here that cannot even be named: a slot whose blocks are all damaged.
    fn has_unreadable(&self) -> bool;

    /// Reads whole blocks of a segment from `block` on. Returns how many there are, up to `into`'s length.
    fn read(&self, number: SegmentNumber, block: u32, into: &mut [u8]) -> Result<usize, LogError>;

    /// Writes whole blocks; durable after [`sync`](Self::sync).
    fn write(&mut self, number: SegmentNumber, block: u32, from: &[u8]) -> Result<(), LogError>;

    /// Makes the writes to a segment durable.
    fn sync(&mut self, number: SegmentNumber) -> Result<(), LogError>;

    /// Makes a place for a segment: allocated, durable under its name, its content old or blank.
    fn prepare(&mut self, number: SegmentNumber) -> Result<Self::Place, LogError>;

    /// Gives a place back; a later segment may take it.
    fn release(&mut self, number: SegmentNumber) -> Result<(), LogError>;
}

/// One copy of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LegSpec {
    /// A directory for the log alone; made if it is missing.
    Dir(PathBuf),
    /// A block device (or a file of fixed size) for the log alone; laid out at first use if it is blank.
    Device(PathBuf),
    /// A namespace of an NVMe controller that SPDK drives in this process (feature `spdk`), for the log alone:
    /// `spdk:0000:01:00.0`, or `spdk:0000:01:00.0/2` for the second one. Laid out as a device is.
    Nvme(PathBuf),
}

/// What names of NVMe namespaces begin with.
const NVME_PREFIX: &str = "spdk:";

impl LegSpec {
    /// A device by its configured name: a path, or «spdk:» and a PCI address.
    pub fn device(name: PathBuf) -> LegSpec {
        let is_nvme = name.to_str().is_some_and(|name| name.starts_with(NVME_PREFIX));
        if is_nvme { LegSpec::Nvme(name) } else { LegSpec::Device(name) }
    }

    /// PCI address and namespace; `None` if it is no NVMe namespace.
    #[cfg_attr(not(any(test, feature = "spdk")), expect(dead_code, reason = "for SPDK"))]
    pub(crate) fn nvme(&self) -> Option<(&str, u32)> {
        let LegSpec::Nvme(name) = self else { return None };
        let name = name.to_str()?.strip_prefix(NVME_PREFIX)?;
        let (address, namespace) = name.split_once('/').unwrap_or((name, "1"));
        let namespace = namespace.parse().ok().filter(|namespace| *namespace > 0)?;
        (!address.is_empty()).then_some((address, namespace))
    }

    /// The directory or device.
    pub fn path(&self) -> &Path {
        match self {
            LegSpec::Dir(path) | LegSpec::Device(path) | LegSpec::Nvme(path) => path,
        }
    }
}

/// Where a segment's bytes begin in a file or device.
#[derive(Debug, Clone)]
pub(crate) struct FilePlace {
    pub file: Arc<File>,
    pub offset_bytes: u64,
}

/// A directory or a device of the kernel's.
pub(crate) enum FileVolume {
    Dir(DirVolume),
    Device(RawVolume<raw::FileIo>),
}

macro_rules! either {
    ($self:ident, $volume:ident => $call:expr) => {
        match $self {
            FileVolume::Dir($volume) => $call,
            FileVolume::Device($volume) => $call,
        }
    };
}

impl Volume for FileVolume {
    type Spec = LegSpec;
    type Place = FilePlace;

    fn open(spec: &LegSpec, geometry: Geometry, access: Access) -> Result<FileVolume, LogError> {
        Ok(match spec {
            LegSpec::Dir(path) => FileVolume::Dir(DirVolume::open(path, geometry, access)?),
            LegSpec::Device(path) => {
                FileVolume::Device(RawVolume::open(raw::FileIo::open(path, geometry, access)?, geometry, access)?)
            }
            LegSpec::Nvme(name) => {
                let problem = if cfg!(feature = "spdk") {
                    format!("{} together with directories or devices of the kernel", name.display())
                } else {
                    format!(
                        "{}: this program is built without SPDK (cargo feature «spdk», docs/spdk.md)",
                        name.display()
                    )
                };
                return Err(LogError::BadOptions { problem });
            }
        })
    }

    fn describe(&self, number: SegmentNumber) -> PathBuf {
        either!(self, volume => volume.describe(number))
    }

    fn segments(&self) -> Vec<SegmentNumber> {
        either!(self, volume => volume.segments())
    }

    fn has_unreadable(&self) -> bool {
        match self {
            FileVolume::Dir(_) => false,
            FileVolume::Device(volume) => volume.has_unreadable(),
        }
    }

    fn read(&self, number: SegmentNumber, block: u32, into: &mut [u8]) -> Result<usize, LogError> {
        either!(self, volume => volume.read(number, block, into))
    }

    fn write(&mut self, number: SegmentNumber, block: u32, from: &[u8]) -> Result<(), LogError> {
        either!(self, volume => volume.write(number, block, from))
    }

    fn sync(&mut self, number: SegmentNumber) -> Result<(), LogError> {
        either!(self, volume => volume.sync(number))
    }

    fn prepare(&mut self, number: SegmentNumber) -> Result<FilePlace, LogError> {
        either!(self, volume => volume.prepare(number))
    }

    fn release(&mut self, number: SegmentNumber) -> Result<(), LogError> {
        either!(self, volume => volume.release(number))
    }
}

/// Takes the lock that shows that a place is in use.
///
/// It waits a moment for it: the kernel takes the io_uring of a process that was killed apart some time after it is gone,
/// and keeps its files until then; and a process that is being started holds ours until it runs its own program.
pub(crate) fn lock(file: &File, path: &Path) -> Result<(), LogError> {
    patiently(|| match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(LogError::Locked { path: path.to_owned() }),
        other => other.map_err(|error| LogError::io("locking", path, error)),
    })
}

/// Repeats what finds a place in use, for a while.
pub(crate) fn patiently<T>(mut try_it: impl FnMut() -> Result<T, LogError>) -> Result<T, LogError> {
    const PATIENCE: Duration = Duration::from_secs(2);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match try_it() {
            Err(LogError::Locked { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// Page-aligned memory, as direct I/O wants it.
pub(crate) fn aligned_buffer(bytes: usize) -> Result<memmap2::MmapMut, LogError> {
    memmap2::MmapMut::map_anon(bytes).map_err(|error| LogError::io("getting memory for", Path::new("the log"), error))
}

/// Reads until the buffer is full or the file ends; returns the bytes read.
pub(crate) fn read_full(file: &File, mut into: &mut [u8], mut offset: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while !into.is_empty() {
        match std::os::unix::fs::FileExt::read_at(file, into, offset) {
            Ok(0) => break,
            Ok(count) => {
                done += count;
                offset += count as u64;
                into = &mut into[count..];
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Opens with `flags`, and O_DIRECT if that is asked for and possible. Says which it was.
pub(crate) fn open_direct(
    path: &Path,
    options: &std::fs::OpenOptions,
    flags: libc::c_int,
    direct: bool,
) -> std::io::Result<(File, bool)> {
    use std::os::unix::fs::OpenOptionsExt;
    if direct {
        match options.clone().custom_flags(flags | libc::O_DIRECT).open(path) {
            Ok(file) => return Ok((file, true)),
            // The file system cannot.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((options.clone().custom_flags(flags).open(path)?, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nvme_namespaces_have_names_of_their_own() {
        let nvme = |name: &str| LegSpec::device(name.into()).nvme().map(|(address, id)| (address.to_owned(), id));
        assert_eq!(nvme("spdk:0000:01:00.0"), Some(("0000:01:00.0".to_owned(), 1)));
        assert_eq!(nvme("spdk:0000:01:00.0/2"), Some(("0000:01:00.0".to_owned(), 2)));
        for wrong in ["spdk:", "spdk:/1", "spdk:0000:01:00.0/0", "spdk:0000:01:00.0/x"] {
            assert!(matches!(LegSpec::device(wrong.into()), LegSpec::Nvme(_)) && nvme(wrong).is_none(), "{wrong}");
        }
        assert_eq!(LegSpec::device("/dev/nvme0n1".into()), LegSpec::Device("/dev/nvme0n1".into()));
    }
}
