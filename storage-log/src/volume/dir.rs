//! Segments as files of a directory: `NUMBER.log`, allocated and written once before they are used, so that the log's
//! own writes change no metadata and a flush costs no journal commit.
//!
//! A segment that is no longer needed becomes `NUMBER.spare` and then a later segment, which costs a rename instead of
//! writing it anew.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use super::{Access, CHUNK_BYTES, FilePlace, Geometry, TELLING_BLOCKS, aligned_buffer, lock, open_direct, read_full};
use crate::LogError;
use crate::block::BLOCK_BYTES;
use crate::segment::SegmentNumber;

/// Spare files that are kept; more are deleted.
const MAX_SPARES: usize = 2;

/// See the module.
pub(crate) struct DirVolume {
    dir: PathBuf,
    /// Also holds the lock.
    dir_fd: File,
    geometry: Geometry,
    files: BTreeMap<SegmentNumber, Arc<File>>,
    spares: Vec<PathBuf>,
    said_buffered: bool,
}

impl DirVolume {
    /// Opens the directory, which is created if it is missing.
    pub fn open(dir: &Path, geometry: Geometry, access: Access) -> Result<DirVolume, LogError> {
        if access != Access::Inspect {
            std::fs::create_dir_all(dir).map_err(|error| LogError::io("creating", dir, error))?;
        }
        let dir_fd = File::open(dir).map_err(|error| LogError::io("opening", dir, error))?;
        lock(&dir_fd, dir)?;
        let mut volume = DirVolume {
            dir: dir.to_owned(),
            dir_fd,
            geometry,
            files: BTreeMap::new(),
            spares: Vec::new(),
            said_buffered: false,
        };
        volume.list(access)?;
        Ok(volume)
    }

    fn list(&mut self, access: Access) -> Result<(), LogError> {
        let entries = std::fs::read_dir(&self.dir).map_err(|error| LogError::io("listing", &self.dir, error))?;
        for entry in entries {
            let path = entry.map_err(|error| LogError::io("listing", &self.dir, error))?.path();
            match (named(&path, ".log"), named(&path, ".spare"), named(&path, ".new")) {
                (Some(number), ..) if access == Access::Rebuild => {
                    self.forget(&path)?;
                    self.spares.push(self.retire(number)?);
                }
                (Some(number), ..) => {
                    let file = self.open_file(&path, access)?;
                    self.files.insert(number, Arc::new(file));
                }
                (_, Some(_), _) => {
                    if access == Access::Rebuild {
                        self.forget(&path)?;
                    }
                    self.spares.push(path);
                }
                // What a crash left while it was made.
                (.., Some(_)) if access != Access::Inspect => {
                    std::fs::remove_file(&path).map_err(|error| LogError::io("removing", &path, error))?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn open_file(&mut self, path: &Path, access: Access) -> Result<File, LogError> {
        let mut options = OpenOptions::new();
        options.read(true).write(access != Access::Inspect);
        let (file, direct) = open_direct(path, &options, 0, self.geometry.direct)
            .map_err(|error| LogError::io("opening", path, error))?;
        if self.geometry.direct && !direct && !std::mem::replace(&mut self.said_buffered, true) {
            tracing::warn!(
                dir = %self.dir.display(),
                "this file system does not do direct I/O; the log goes through the page cache"
            );
        }
        Ok(file)
    }

    /// Blanks the blocks that tell whose a file is. The log may have gone on from an older segment without this copy: then the
    /// file may get the number again that it had, and its header would be valid.
    fn forget(&mut self, path: &Path) -> Result<(), LogError> {
        let blank = aligned_buffer(TELLING_BLOCKS as usize * BLOCK_BYTES)?;
        let file = self.open_file(path, Access::Rebuild)?;
        let blanked = file.write_all_at(&blank, 0).and_then(|()| file.sync_data());
        blanked.map_err(|error| LogError::io("blanking", path, error))
    }

    fn path(&self, number: SegmentNumber, ending: &str) -> PathBuf {
        self.dir.join(format!("{number:020}{ending}"))
    }

    fn file(&self, number: SegmentNumber) -> Result<&Arc<File>, LogError> {
        let missing = || LogError::io("finding", self.path(number, ".log"), std::io::ErrorKind::NotFound);
        self.files.get(&number).ok_or_else(missing)
    }

    fn sync_dir(&self) -> Result<(), LogError> {
        self.dir_fd.sync_all().map_err(|error| LogError::io("syncing", &self.dir, error))
    }

    /// Makes a file that is as long as a segment and has all its blocks on the disk.
    fn create(&mut self, number: SegmentNumber) -> Result<PathBuf, LogError> {
        let path = self.path(number, ".new");
        let segment_bytes = self.geometry.segment_bytes();
        let make = |file: &File| -> Result<(), LogError> {
            let failed = |error: std::io::Error| LogError::space(&path, error);
            match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, segment_bytes) {
                // The file system cannot; writing does the same.
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) | Ok(()) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            let zeros = aligned_buffer(CHUNK_BYTES.min(segment_bytes as usize))?;
            let mut offset = 0;
            while offset < segment_bytes {
                let len = zeros.len().min((segment_bytes - offset) as usize);
                file.write_all_at(&zeros[..len], offset).map_err(failed)?;
                offset += len as u64;
            }
            file.sync_all().map_err(failed)
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        let (file, _) =
            open_direct(&path, &options, 0, self.geometry.direct).map_err(|error| LogError::space(&path, error))?;
        let made = make(&file);
        if made.is_err() {
            // So that the space which it took is free for others.
            let _ = std::fs::remove_file(&path);
        }
        made.map(|()| path)
    }

    /// Turns a segment's file into a spare one.
    fn retire(&self, number: SegmentNumber) -> Result<PathBuf, LogError> {
        let (from, to) = (self.path(number, ".log"), self.path(number, ".spare"));
        std::fs::rename(&from, &to).map_err(|error| LogError::io("renaming", from, error))?;
        Ok(to)
    }

    /// A spare file of the right size, or a new one.
    fn take_spare(&mut self, number: SegmentNumber) -> Result<PathBuf, LogError> {
        while let Some(path) = self.spares.pop() {
            let length = std::fs::metadata(&path).map(|data| data.len()).ok();
            if length == Some(self.geometry.segment_bytes()) {
                return Ok(path);
            }
            std::fs::remove_file(&path).map_err(|error| LogError::io("removing", &path, error))?;
        }
        self.create(number)
    }

    pub fn describe(&self, number: SegmentNumber) -> PathBuf {
        self.path(number, ".log")
    }

    pub fn segments(&self) -> Vec<SegmentNumber> {
        self.files.keys().copied().collect()
    }

    pub fn read(&self, number: SegmentNumber, block: u32, into: &mut [u8]) -> Result<usize, LogError> {
        let offset = u64::from(block) * BLOCK_BYTES as u64;
        let read = read_full(self.file(number)?, into, offset);
        let bytes = read.map_err(|error| LogError::io("reading", self.path(number, ".log"), error))?;
        Ok(bytes / BLOCK_BYTES)
    }

    pub fn write(&mut self, number: SegmentNumber, block: u32, from: &[u8]) -> Result<(), LogError> {
        let offset = u64::from(block) * BLOCK_BYTES as u64;
        let written = self.file(number)?.write_all_at(from, offset);
        written.map_err(|error| LogError::io("writing", self.path(number, ".log"), error))
    }

    pub fn sync(&mut self, number: SegmentNumber) -> Result<(), LogError> {
        self.file(number)?.sync_data().map_err(|error| LogError::io("syncing", self.path(number, ".log"), error))
    }

    pub fn prepare(&mut self, number: SegmentNumber) -> Result<FilePlace, LogError> {
        let path = self.path(number, ".log");
        let kept = self.files.get(&number).and_then(|file| file.metadata().ok());
        if kept.is_none_or(|data| data.len() != self.geometry.segment_bytes()) {
            let spare = self.take_spare(number)?;
            std::fs::rename(&spare, &path).map_err(|error| LogError::io("renaming", &spare, error))?;
            self.sync_dir()?;
            let file = self.open_file(&path, Access::Own)?;
            self.files.insert(number, Arc::new(file));
        }
        Ok(FilePlace { file: Arc::clone(self.file(number)?), offset_bytes: 0 })
    }

    pub fn release(&mut self, number: SegmentNumber) -> Result<(), LogError> {
        if self.files.remove(&number).is_none() {
            return Ok(());
        }
        if self.spares.len() < MAX_SPARES {
            let spare = self.retire(number)?;
            self.spares.push(spare);
        } else {
            let path = self.path(number, ".log");
            std::fs::remove_file(&path).map_err(|error| LogError::io("removing", path, error))?;
        }
        // No sync: should the old name come back after a crash, the log begins behind it all the same.
        Ok(())
    }
}

/// The number in a file's name, if it has that ending.
fn named(path: &Path, ending: &str) -> Option<SegmentNumber> {
    let digits = path.file_name()?.to_str()?.strip_suffix(ending)?;
    (digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit())).then(|| digits.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_is_rebuilt_has_no_old_header_where_its_number_comes_again() {
        let dir = std::env::temp_dir().join(format!("plover-log-dir-test-{}", std::process::id()));
        let geometry = Geometry { segment_blocks: 8, max_segments: 8, direct: false };
        for is_released in [false, true] {
            let mut volume = DirVolume::open(&dir, geometry, Access::Own).unwrap();
            volume.prepare(5).unwrap();
            volume.write(5, 0, &[7; 3 * BLOCK_BYTES]).unwrap();
            if is_released {
                volume.release(5).unwrap();
            }
            drop(volume);
            let mut volume = DirVolume::open(&dir, geometry, Access::Rebuild).unwrap();
            volume.prepare(5).unwrap();
            let mut blocks = [1; 3 * BLOCK_BYTES];
            assert_eq!(volume.read(5, 0, &mut blocks).unwrap(), 3);
            let (telling, rest) = blocks.split_at(TELLING_BLOCKS as usize * BLOCK_BYTES);
            assert!(telling.iter().all(|&byte| byte == 0), "released {is_released}");
            assert!(rest.iter().all(|&byte| byte == 7), "the place was not used again");
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn only_own_names_count() {
        assert_eq!(named(Path::new("/a/00000000000000000003.log"), ".log"), Some(3));
        for other in
            ["lock", "1.log", "0000000000000000000x.log", "99999999999999999999.log", "00000000000000000003.new"]
        {
            assert_eq!(named(Path::new(other), ".log"), None, "{other}");
        }
    }
}
