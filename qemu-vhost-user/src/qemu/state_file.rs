//! The file through which device state leaves and enters QEMU: `xen-save-devices-state` and its counterpart take
//! file names only.
//!
//! It lies on tmpfs, where writing 60 KB costs microseconds and no disk wears out. Rejected: a memfd passed with
//! `add-fd` and named `/dev/fdset/N`: it works, but QEMU drops the set when the monitor's client goes away while the guest runs,
//! and the file offset is shared between both processes.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where the file goes if the run directory is not on tmpfs.
pub const FALLBACK_DIRECTORY: &str = "/dev/shm";
/// f_type of tmpfs, of linux/magic.h.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// A device state is some 60 KB; what is larger than this is not one.
const MAX_STATE_BYTES: u64 = 256 << 20;

/// Two files of one process never share a name.
static COUNTER: AtomicU32 = AtomicU32::new(0);

/// What went wrong with the file.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the device state file {}: {source}", path.display())]
pub struct StateFileError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// A file for device state; removed when dropped.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
}

impl StateFile {
    /// Makes an empty file with mode 0600 in `run_directory` if that is on tmpfs, otherwise in `/dev/shm`, otherwise
    /// in `run_directory` all the same (slower, still right). `owner` says whose it is (the VM's name).
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn create(run_directory: &Path, owner: &str) -> Result<StateFile, StateFileError> {
        let directory = [run_directory, Path::new(FALLBACK_DIRECTORY)]
            .into_iter()
            .find(|directory| is_tmpfs(directory))
            .unwrap_or(run_directory);
        let owner: String = owner.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        remove_stale(directory, &owner);
        let path = directory.join(format!("plover-{owner}-{}-{number}.state", std::process::id()));
        // What is there under this name was left by a dead process with our id.
        if let Err(source) = std::fs::remove_file(&path)
            && source.kind() != io::ErrorKind::NotFound
        {
            return Err(StateFileError { action: "replace", path, source });
        }
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(_) => Ok(StateFile { path }),
            Err(source) => Err(StateFileError { action: "create", path, source }),
        }
    }

    /// Its path, for [`crate::qemu::qmp::Qmp::save_devices_state`] and its counterpart.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces `state` with the file's content; a vector that is used again costs no allocation.
    ///
    /// # Errors
    /// If it cannot be read or is absurdly large.
    pub fn read_into(&self, state: &mut Vec<u8>) -> Result<(), StateFileError> {
        state.clear();
        let length = File::open(&self.path).and_then(|file| {
            let expected = file.metadata()?.len().min(MAX_STATE_BYTES);
            state.reserve(usize::try_from(expected).unwrap_or(0));
            file.take(MAX_STATE_BYTES + 1).read_to_end(state)
        });
        match length {
            Ok(length) if length as u64 <= MAX_STATE_BYTES => Ok(()),
            Ok(_) => Err(self.error("read", io::ErrorKind::FileTooLarge.into())),
            Err(source) => Err(self.error("read", source)),
        }
    }

    /// Replaces the file's content.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, state: &[u8]) -> Result<(), StateFileError> {
        OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&self.path)
            .and_then(|mut file| file.write_all(state))
            .map_err(|source| self.error("write", source))
    }

    fn error(&self, action: &'static str, source: io::Error) -> StateFileError {
        StateFileError { action, path: self.path.clone(), source }
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        // Nobody can act on a failure here; the name is replaced by the next process with this id.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes what processes that were killed left for the same owner; otherwise every kill would cost memory for good.
fn remove_stale(directory: &Path, owner: &str) {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let stale = entry
            .file_name()
            .to_str()
            .and_then(|name| maker_of(name, owner))
            .is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
        if stale {
            // Another process may have been faster; what stays is found the next time.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Process id in the name of a state file of this owner.
fn maker_of(name: &str, owner: &str) -> Option<u32> {
    let numbers = name.strip_prefix("plover-")?.strip_prefix(owner)?.strip_prefix('-')?;
    let (pid, count) = numbers.strip_suffix(".state")?.split_once('-')?;
    count.parse::<u32>().ok()?;
    pid.parse().ok()
}

fn is_tmpfs(directory: &Path) -> bool {
    directory.as_os_str() != OsStr::new("")
        && rustix::fs::statfs(directory).is_ok_and(|found| found.f_type as u64 == TMPFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_private_and_goes_away() {
        use std::os::unix::fs::PermissionsExt;
        let file = StateFile::create(&std::env::temp_dir(), "a vm/../x").expect("create");
        let other = StateFile::create(&std::env::temp_dir(), "a vm/../x").expect("create a second one");
        assert_ne!(file.path(), other.path());
        let mode = std::fs::metadata(file.path()).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut state = vec![1, 2, 3];
        file.write(b"long content").expect("write");
        file.write(b"short").expect("write");
        file.read_into(&mut state).expect("read");
        assert_eq!(state, b"short");
        let path = file.path().to_owned();
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn files_of_killed_processes_are_removed_and_others_stay() {
        let directory = std::env::temp_dir().join(format!("plover-stale-{}", std::process::id()));
        std::fs::create_dir(&directory).expect("make the directory");
        // No process can have this id: it is above the kernel's limit of 2^22.
        let names = [
            ("plover-vm-4194305-0.state", false),
            ("plover-vm-1-0.state", true),
            ("plover-vm-2-4194305-0.state", true),
            ("plover-other-4194305-0.state", true),
            ("plover-vm-4194305-0.state.keep", true),
        ];
        for (name, _) in names {
            std::fs::write(directory.join(name), "").expect("write");
        }
        remove_stale(&directory, "vm");
        let left = names.map(|(name, _)| (name, directory.join(name).exists()));
        std::fs::remove_dir_all(&directory).expect("removed");
        assert_eq!(left, names);
    }

    #[test]
    fn a_missing_directory_is_named() {
        let file = StateFile { path: PathBuf::from("/nonexistent/plover.state") };
        let error = file.read_into(&mut Vec::new()).expect_err("there is no such file");
        assert!(error.to_string().contains("/nonexistent/plover.state"), "{error}");
    }
}
