//! What a single commit costs without a log: one block written and synced, through an io_uring.
//!
//! Everything that can be done beforehand is: the file is allocated, written and registered, the buffer too,
//! and the write and the sync that waits for it are one submission. No log that writes one block and syncs can
//! be faster on the same file system.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::fs::OFlags;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// A loop through the file takes longer than the disk's cache remembers.
const BLOCKS: u64 = 1024;
/// A disk that takes longer for one sync is broken.
const DEADLINE: Duration = Duration::from_secs(30);
const WRITE: u64 = 1;
const SYNC: u64 = 2;

/// Aligned for O_DIRECT.
#[repr(align(4096))]
struct Block([u8; BLOCK_BYTES]);

/// The file and its ring.
pub struct BareUring {
    // Before the block and the file: what is in flight ends first.
    ring: IoUring,
    block: Box<Block>,
    _file: File,
    next_block: u64,
}

impl BareUring {
    /// Makes the file at `path` and registers it.
    pub fn create(path: &Path) -> Result<BareUring> {
        let file = create_written(path, BLOCKS * BLOCK_BYTES as u64)?;
        let ring = IoUring::new(8).context("io_uring is not to be had here (sysctl kernel.io_uring_disabled?)")?;
        let mut block = Box::new(Block([0x5A; BLOCK_BYTES]));
        let buffer = libc::iovec { iov_base: block.0.as_mut_ptr().cast(), iov_len: BLOCK_BYTES };
        // SAFETY: the block lives as long as the ring, its address does not change (a box), and nobody writes to it
        // while the kernel reads it: `commit` waits for both operations.
        unsafe { ring.submitter().register_buffers(&[buffer]) }.context("registering the buffer")?;
        ring.submitter().register_files(&[file.as_raw_fd()]).context("registering the file")?;
        Ok(BareUring { ring, block, _file: file, next_block: 0 })
    }

    /// Writes the next block and waits until it is durable.
    pub fn commit(&mut self) -> Result<()> {
        let offset = self.next_block % BLOCKS * BLOCK_BYTES as u64;
        self.next_block += 1;
        self.block.0[..8].copy_from_slice(&self.next_block.to_le_bytes());
        let write = opcode::WriteFixed::new(Fixed(0), self.block.0.as_ptr(), BLOCK_BYTES as u32, 0)
            .offset(offset)
            .build()
            .flags(squeue::Flags::IO_LINK)
            .user_data(WRITE);
        let sync = opcode::Fsync::new(Fixed(0)).flags(FsyncFlags::DATASYNC).build().user_data(SYNC);
        // SAFETY: file and buffer are registered and live as long as the ring.
        unsafe { self.ring.submission().push_multiple(&[write, sync]) }.context("the ring is full")?;
        let limit = Timespec::from(DEADLINE);
        self.ring.submitter().submit_with_args(2, &SubmitArgs::new().timespec(&limit)).context("io_uring_enter")?;
        let mut done = 0;
        for completion in self.ring.completion() {
            let expected = if completion.user_data() == WRITE { BLOCK_BYTES as i32 } else { 0 };
            let result = completion.result();
            ensure!(result == expected, "operation {} of io_uring gave {result}", completion.user_data());
            done += 1;
        }
        ensure!(done == 2, "{done} of 2 operations were done within {} s", DEADLINE.as_secs());
        Ok(())
    }
}

/// A file for O_DIRECT whose blocks are allocated and written, so that a write changes no metadata.
pub fn create_written(path: &Path, bytes: u64) -> Result<File> {
    let named = || format!("cannot make {}", path.display());
    let zeros = vec![0; 1 << 20];
    let file = File::options().write(true).create_new(true).open(path).with_context(named)?;
    let mut at = 0;
    while at < bytes {
        let length = (bytes - at).min(zeros.len() as u64);
        file.write_all_at(&zeros[..length as usize], at).with_context(named)?;
        at += length;
    }
    file.sync_all().with_context(named)?;
    let direct = OFlags::DIRECT.bits() as i32;
    File::options().read(true).write(true).custom_flags(direct).open(path).with_context(named)
}

/// The smallest unit in which the file system that holds `directory` takes direct writes.
pub fn direct_block_bytes(directory: &Path) -> Result<usize> {
    let path = directory.join("block-size");
    let file = create_written(&path, 2 * BLOCK_BYTES as u64)?;
    let block = Box::new(Block([0; BLOCK_BYTES]));
    let taken = [512, 1024, 2048, 4096].into_iter().find(|&bytes| {
        // At an offset that only such a unit allows.
        file.write_at(&block.0[..bytes], bytes as u64).is_ok_and(|written| written == bytes)
    });
    std::fs::remove_file(&path)?;
    taken.with_context(|| format!("{} takes no direct writes of up to 4 KiB", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{self, Scratch};

    #[test]
    fn blocks_are_in_the_file_in_order() {
        let scratch = Scratch::new(&results::directory(), "bare-uring-test").unwrap();
        let path = scratch.path().join("file");
        let mut bare = BareUring::create(&path).unwrap();
        for _ in 0..3 {
            bare.commit().unwrap();
        }
        let bytes = std::fs::read(&path).unwrap();
        let numbers = bytes.chunks(BLOCK_BYTES).map(|block| u64::from_le_bytes(block[..8].try_into().unwrap()));
        assert_eq!(numbers.take(4).collect::<Vec<_>>(), [1, 2, 3, 0]);
        assert_eq!(bytes.len() as u64, BLOCKS * BLOCK_BYTES as u64);
        let unit = direct_block_bytes(scratch.path()).unwrap();
        assert!(unit.is_power_of_two() && (512..=4096).contains(&unit));
    }
}
