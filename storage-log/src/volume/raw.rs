//! Segments as slots of a raw device: 1 MiB with a superblock, then slots of one segment each.
//!
//! Which segment a slot holds, its blocks say themselves. When a device is laid out, all slots are filled with zeros once,
//! so that whatever stood there before is never taken for damage. A device that holds something else is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{
    Access, CHUNK_BYTES, FilePlace, Geometry, TELLING_BLOCKS, aligned_buffer, lock, open_direct, patiently, read_full,
};
use crate::LogError;
use crate::block::{BLOCK_BYTES, Block, Content, SegmentId, Trailer, array, examine, seal};
use crate::segment::SegmentNumber;

const MAGIC: [u8; 8] = *b"PLVRDEV1";
/// Slots begin here.
const SLOTS_AT_BYTES: u64 = 1 << 20;
const SUPERBLOCK_BYTES: usize = 16;

/// A device, with calls that block. Offsets and lengths are multiples of the block size.
pub(crate) trait BlockIo {
    /// What the engine's driver needs to write at an offset.
    type Place: Clone;

    /// For messages.
    fn path(&self) -> &Path;
    /// How large the device is.
    fn capacity_bytes(&self) -> u64;
    /// Fills `into`.
    fn read_at(&self, into: &mut [u8], offset: u64) -> std::io::Result<()>;
    /// Writes; durable after `flush`.
    fn write_at(&mut self, from: &[u8], offset: u64) -> std::io::Result<()>;
    /// Makes all writes durable.
    fn flush(&mut self) -> std::io::Result<()>;
    /// For the driver.
    fn place(&self, offset: u64) -> Self::Place;
}

/// See the module.
pub(crate) struct RawVolume<B> {
    io: B,
    segment_blocks: u32,
    slots: u32,
    taken: BTreeMap<SegmentNumber, u32>,
    /// Slots of which not one block is whole, and some are bad.
    unreadable: BTreeSet<u32>,
}

impl<B: BlockIo> RawVolume<B> {
    /// Reads the layout, or makes one on a blank device.
    pub fn open(io: B, geometry: Geometry, access: Access) -> Result<RawVolume<B>, LogError> {
        let mut volume =
            RawVolume { io, segment_blocks: 0, slots: 0, taken: BTreeMap::new(), unreadable: BTreeSet::new() };
        let mut first = aligned_buffer(SLOTS_AT_BYTES as usize)?;
        let read = volume.io.read_at(&mut first, 0);
        read.map_err(|error| LogError::io("reading", volume.io.path(), error))?;
        let block: &Block = first[..BLOCK_BYTES].try_into().expect("a block's length");
        match examine(block, 0) {
            Content::Whole(trailer) if block[..8] == MAGIC && usize::from(trailer.used) == SUPERBLOCK_BYTES => {
                volume.segment_blocks = u32::from_le_bytes(array(&block[8..12]));
                volume.slots = u32::from_le_bytes(array(&block[12..16]));
                volume.check_layout()?;
                if access != Access::Inspect && volume.segment_blocks != geometry.segment_blocks {
                    return Err(volume.other_layout(geometry));
                }
                if access == Access::Rebuild {
                    volume.forget_segments()?;
                } else {
                    volume.find_segments()?;
                }
            }
            _ if first.iter().all(|&byte| byte == 0) => {
                if access != Access::Inspect {
                    volume.lay_out(geometry)?;
                }
            }
            _ => return Err(LogError::Foreign { path: volume.io.path().to_owned() }),
        }
        Ok(volume)
    }

    fn check_layout(&self) -> Result<(), LogError> {
        let need = u64::from(self.slots).saturating_mul(self.slot_bytes()).saturating_add(SLOTS_AT_BYTES);
        if self.segment_blocks < 2 || self.slots < 3 || need > self.io.capacity_bytes() {
            let problem = format!(
                "its superblock says {} segments of {} blocks, which the device of {} bytes cannot hold",
                self.slots,
                self.segment_blocks,
                self.io.capacity_bytes()
            );
            return Err(LogError::Damaged { file: self.io.path().to_owned(), offset: 0, problem });
        }
        Ok(())
    }

    /// Segments of another size would run over the ends of the slots.
    fn other_layout(&self, geometry: Geometry) -> LogError {
        let (here, wanted) = (self.slot_bytes(), geometry.segment_bytes());
        let path = self.io.path().display();
        LogError::BadOptions {
            problem: format!("segments of {wanted} bytes on {path}, which has room for {here} each"),
        }
    }

    fn slot_bytes(&self) -> u64 {
        u64::from(self.segment_blocks) * BLOCK_BYTES as u64
    }

    fn offset(&self, slot: u32, block: u32) -> u64 {
        SLOTS_AT_BYTES + u64::from(slot) * self.slot_bytes() + u64::from(block) * BLOCK_BYTES as u64
    }

    fn lay_out(&mut self, geometry: Geometry) -> Result<(), LogError> {
        self.segment_blocks = geometry.segment_blocks;
        let room = self.io.capacity_bytes().saturating_sub(SLOTS_AT_BYTES) / self.slot_bytes();
        self.slots = u32::try_from(room.min(geometry.max_segments)).unwrap_or(u32::MAX);
        let path = self.io.path().to_owned();
        if self.slots < 3 {
            return Err(LogError::TooSmall { path, need_bytes: SLOTS_AT_BYTES + 3 * self.slot_bytes() });
        }
        tracing::info!(device = %path.display(), segments = self.slots, "laying out a blank device for the log");
        let mut layout = || -> std::io::Result<()> {
            let mut buffer = aligned_buffer(CHUNK_BYTES).map_err(std::io::Error::other)?;
            let (mut at, end) = (SLOTS_AT_BYTES, self.offset(self.slots, 0));
            while at < end {
                let len = buffer.len().min((end - at) as usize);
                self.io.write_at(&buffer[..len], at)?;
                at += len as u64;
            }
            self.io.flush()?;
            // Last, so that a device is either blank or laid out.
            let block: &mut Block = (&mut buffer[..BLOCK_BYTES]).try_into().expect("a block's length");
            block[..8].copy_from_slice(&MAGIC);
            block[8..12].copy_from_slice(&self.segment_blocks.to_le_bytes());
            block[12..16].copy_from_slice(&self.slots.to_le_bytes());
            let segment = SegmentId { number: 0, generation: 0 };
            let used = SUPERBLOCK_BYTES as u16;
            seal(block, Trailer { segment, group_start: 0, group_blocks: 1, used }, 0);
            self.io.write_at(&buffer[..BLOCK_BYTES], 0)?;
            self.io.flush()
        };
        layout().map_err(|error| LogError::io("laying out", path, error))
    }

    /// Blanks the blocks of every slot that tell whose it is: what the slots held is worth nothing.
    fn forget_segments(&mut self) -> Result<(), LogError> {
        let blank = aligned_buffer(TELLING_BLOCKS as usize * BLOCK_BYTES)?;
        let mut forget = || -> std::io::Result<()> {
            for slot in 0..self.slots {
                self.io.write_at(&blank, self.offset(slot, 0))?;
            }
            self.io.flush()
        };
        forget().map_err(|error| LogError::io("blanking", self.io.path(), error))
    }

    fn find_segments(&mut self) -> Result<(), LogError> {
        for slot in 0..self.slots {
            match self.segment_in(slot)? {
                Some(0) => {}
                Some(number) => {
                    self.taken.insert(number, slot);
                }
                None => drop(self.unreadable.insert(slot)),
            }
        }
        Ok(())
    }

    /// The segment in a slot by its first blocks, or by any other if one of those is damaged; 0 if it is blank.
    fn segment_in(&self, slot: u32) -> Result<Option<SegmentNumber>, LogError> {
        let mut buffer = aligned_buffer(CHUNK_BYTES)?;
        let (mut found, mut is_bad) = (None, false);
        let mut at = 0;
        while at < self.segment_blocks {
            let chunk = if at == 0 { TELLING_BLOCKS } else { (CHUNK_BYTES / BLOCK_BYTES) as u32 };
            let blocks = chunk.min(self.segment_blocks - at);
            let bytes = &mut buffer[..blocks as usize * BLOCK_BYTES];
            let read = self.io.read_at(bytes, self.offset(slot, at));
            read.map_err(|error| LogError::io("reading", self.io.path(), error))?;
            for (block, place) in bytes.as_chunks::<BLOCK_BYTES>().0.iter().zip(at..) {
                match examine(block, place) {
                    // The highest: the others are left of an earlier use.
                    Content::Whole(trailer) => found = found.max(Some(trailer.segment.number)),
                    Content::Blank => {}
                    Content::Bad => is_bad = true,
                }
            }
            at += blocks;
            if !is_bad {
                return Ok(found.or(Some(0)));
            }
        }
        Ok(found)
    }

    fn slot_of(&self, number: SegmentNumber) -> Result<u32, LogError> {
        let missing = || LogError::io("finding", self.describe(number), std::io::ErrorKind::NotFound);
        self.taken.get(&number).copied().ok_or_else(missing)
    }
}

impl<B: BlockIo> RawVolume<B> {
    pub fn describe(&self, number: SegmentNumber) -> PathBuf {
        match self.taken.get(&number) {
            Some(slot) => PathBuf::from(format!("{} (slot {slot}, segment {number})", self.io.path().display())),
            None => PathBuf::from(format!("{} (segment {number})", self.io.path().display())),
        }
    }

    pub fn segments(&self) -> Vec<SegmentNumber> {
        self.taken.keys().copied().collect()
    }

    pub fn has_unreadable(&self) -> bool {
        !self.unreadable.is_empty()
    }

    pub fn read(&self, number: SegmentNumber, block: u32, into: &mut [u8]) -> Result<usize, LogError> {
        let slot = self.slot_of(number)?;
        let blocks = (into.len() / BLOCK_BYTES).min(self.segment_blocks.saturating_sub(block) as usize);
        let read = self.io.read_at(&mut into[..blocks * BLOCK_BYTES], self.offset(slot, block));
        read.map_err(|error| LogError::io("reading", self.describe(number), error))?;
        Ok(blocks)
    }

    pub fn write(&mut self, number: SegmentNumber, block: u32, from: &[u8]) -> Result<(), LogError> {
        let slot = self.slot_of(number)?;
        assert!(from.len() <= (self.segment_blocks.saturating_sub(block) as usize) * BLOCK_BYTES, "beyond the slot");
        let written = self.io.write_at(from, self.offset(slot, block));
        written.map_err(|error| LogError::io("writing", self.describe(number), error))
    }

    pub fn sync(&mut self, number: SegmentNumber) -> Result<(), LogError> {
        self.io.flush().map_err(|error| LogError::io("syncing", self.describe(number), error))
    }

    pub fn prepare(&mut self, number: SegmentNumber) -> Result<B::Place, LogError> {
        if let Some(&slot) = self.taken.get(&number) {
            return Ok(self.io.place(self.offset(slot, 0)));
        }
        let used: Vec<u32> = self.taken.values().copied().collect();
        // What cannot be read is written over first, so that it raises no doubt again.
        let free = self.unreadable.pop_first().or_else(|| (0..self.slots).find(|slot| !used.contains(slot)));
        let full = || LogError::space(self.io.path(), std::io::ErrorKind::StorageFull);
        let slot = free.ok_or_else(full)?;
        self.taken.insert(number, slot);
        Ok(self.io.place(self.offset(slot, 0)))
    }

    pub fn release(&mut self, number: SegmentNumber) -> Result<(), LogError> {
        self.taken.remove(&number);
        Ok(())
    }
}

/// A block device, or a file that stands for one.
pub(crate) struct FileIo {
    path: PathBuf,
    file: Arc<File>,
    capacity_bytes: u64,
}

impl FileIo {
    /// Opens a device that nobody else has.
    pub fn open(path: &Path, geometry: Geometry, access: Access) -> Result<FileIo, LogError> {
        use std::os::unix::fs::FileTypeExt;
        let failed = |error| LogError::io("opening", path, error);
        let is_device = std::fs::metadata(path).map_err(failed)?.file_type().is_block_device();
        let mut options = OpenOptions::new();
        options.read(true).write(access != Access::Inspect);
        // On a block device this refuses one that is mounted.
        let flags = if is_device && access != Access::Inspect { libc::O_EXCL } else { 0 };
        let busy = |error: std::io::Error| match error.raw_os_error() {
            Some(libc::EBUSY) => LogError::Locked { path: path.to_owned() },
            _ => failed(error),
        };
        let (file, _) = patiently(|| open_direct(path, &options, flags, geometry.direct).map_err(busy))?;
        lock(&file, path)?;
        let capacity = std::io::Seek::seek(&mut &file, std::io::SeekFrom::End(0));
        let capacity_bytes = capacity.map_err(|error| LogError::io("measuring", path, error))?;
        Ok(FileIo { path: path.to_owned(), file: Arc::new(file), capacity_bytes })
    }
}

impl BlockIo for FileIo {
    type Place = FilePlace;

    fn path(&self) -> &Path {
        &self.path
    }

    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> std::io::Result<()> {
        let wanted = into.len();
        if read_full(&self.file, into, offset)? == wanted {
            Ok(())
        } else {
            Err(std::io::ErrorKind::UnexpectedEof.into())
        }
    }

    fn write_at(&mut self, from: &[u8], offset: u64) -> std::io::Result<()> {
        self.file.write_all_at(from, offset)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.sync_data()
    }

    fn place(&self, offset: u64) -> FilePlace {
        FilePlace { file: Arc::clone(&self.file), offset_bytes: offset }
    }
}
