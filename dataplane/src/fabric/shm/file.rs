//! The file behind a shared mapping: it has a name for the time of the set-up only.
//!
//! Whoever made it holds a lock on it meanwhile, which ends with the process: a file that can be locked is a dead
//! process' and is swept away.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{self, FallocateFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::fmt::Write;

const DIRECTORY: &str = "/dev/shm";
const PREFIX: &str = "plover-lane-";
const RANDOM_BYTES: usize = 16;
/// Names that a sweeper of another process took away before we had our lock.
const MAX_TRIES: usize = 8;

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    /// It cannot be made.
    #[error("cannot make a file of {bytes} bytes in {DIRECTORY}: {source}; is it mounted, and has it room?")]
    Create { bytes: usize, source: std::io::Error },
    /// The peer's file is not here.
    #[error(
        "there is no {DIRECTORY}/{name} here: shm is for replicas whose nodes share one host and its {DIRECTORY}; take shm \
         out of their transports otherwise"
    )]
    Absent { name: String },
    /// The peer's file cannot be opened.
    #[error("cannot open {DIRECTORY}/{name}: {source}; both nodes must run as one user")]
    Open { name: String, source: std::io::Error },
    /// The peer's file is not what a peer makes.
    #[error("{DIRECTORY}/{name} is not what a peer makes: {what}")]
    Foreign { name: String, what: String },
}

/// A name that only the files of this module have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileName(String);

impl FileName {
    fn random() -> Result<FileName, Errno> {
        let mut bytes = [0u8; RANDOM_BYTES];
        let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        assert_eq!(filled, RANDOM_BYTES, "the kernel gives up to 256 bytes whole");
        let mut name = PREFIX.to_owned();
        for byte in bytes {
            write!(name, "{byte:02x}").expect("strings take everything");
        }
        Ok(FileName(name))
    }

    /// `None`: not exactly such a name. So nothing that a peer says can lead elsewhere.
    pub fn parse(bytes: &[u8]) -> Option<FileName> {
        let digits = bytes.strip_prefix(PREFIX.as_bytes())?;
        let good =
            digits.len() == 2 * RANDOM_BYTES && digits.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        good.then(|| FileName(String::from_utf8_lossy(bytes).into_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn path(&self) -> String {
        format!("{DIRECTORY}/{}", self.0)
    }
}

/// A file of ours. Its name goes when it is dropped; mappings stay.
#[derive(Debug)]
pub(super) struct NamedFile {
    fd: OwnedFd,
    name: FileName,
}

impl NamedFile {
    /// A new file, all zero, with its memory reserved.
    ///
    /// # Errors
    /// [`FileError::Create`].
    pub fn create(bytes: usize) -> Result<NamedFile, FileError> {
        Self::try_create(bytes).map_err(|error| FileError::Create { bytes, source: error.into() })
    }

    fn try_create(bytes: usize) -> Result<NamedFile, Errno> {
        for _ in 0..MAX_TRIES {
            let name = FileName::random()?;
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let fd = fs::open(name.path(), flags, Mode::RUSR | Mode::WUSR)?;
            let file = NamedFile { fd, name };
            // A sweeper may have seen it between these two calls.
            if fs::flock(&file.fd, FlockOperation::NonBlockingLockShared).is_err() || fs::fstat(&file.fd)?.st_nlink != 1
            {
                continue;
            }
            // Not ftruncate: a page for which there is no memory would kill this process when it is touched.
            fs::fallocate(&file.fd, FallocateFlags::empty(), 0, bytes as u64)?;
            return Ok(file);
        }
        Err(Errno::AGAIN)
    }

    /// The open file.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Its name.
    pub fn name(&self) -> &FileName {
        &self.name
    }
}

impl Drop for NamedFile {
    fn drop(&mut self) {
        // A sweeper that took it for a dead process' file was faster; that can only be before the lock was taken.
        let _ = fs::unlink(self.name.path());
    }
}

/// Opens a peer's file of exactly `bytes` bytes.
///
/// # Errors
/// [`FileError`].
pub(super) fn open(name: &FileName, bytes: usize) -> Result<OwnedFd, FileError> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = fs::open(name.path(), flags, Mode::empty()).map_err(|error| match error {
        Errno::NOENT => FileError::Absent { name: name.0.clone() },
        error => FileError::Open { name: name.0.clone(), source: error.into() },
    })?;
    let foreign = |what: String| FileError::Foreign { name: name.0.clone(), what };
    let stat = fs::fstat(&fd).map_err(|error| foreign(error.to_string()))?;
    let user = rustix::process::geteuid().as_raw();
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(foreign("no regular file".to_owned()));
    }
    if stat.st_uid != user {
        return Err(foreign(format!("it belongs to user {}, this node runs as {user}", stat.st_uid)));
    }
    if stat.st_size != bytes as i64 {
        return Err(foreign(format!("it has {} bytes instead of {bytes}", stat.st_size)));
    }
    Ok(fd)
}

/// Removes the files of processes that died during a set-up. For the start of a process.
pub(in crate::fabric) fn sweep() {
    let Ok(entries) = std::fs::read_dir(DIRECTORY) else {
        return;
    };
    for entry in entries.flatten() {
        if let Some(name) = FileName::parse(entry.file_name().as_encoded_bytes()) {
            sweep_one(&name);
        }
    }
}

fn sweep_one(name: &FileName) {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(fd) = fs::open(name.path(), flags, Mode::empty()) else {
        return;
    };
    let ours = fs::fstat(fd.as_fd()).is_ok_and(|stat| stat.st_uid == rustix::process::geteuid().as_raw());
    if ours && fs::flock(&fd, FlockOperation::NonBlockingLockExclusive).is_ok() {
        tracing::info!(file = name.path(), "removed what a process left that died while it set up a lane");
        let _ = fs::unlink(name.path());
    }
}
