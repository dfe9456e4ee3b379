//! The key that all nodes share, and its file.
//!
//! The file may hold more keys, one per line: a node dials with the first and takes them all. So a key is changed node by
//! node, and at no time does one refuse another.

use rustix::fs::{FileType, Mode, OFlags};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const KEY_BYTES: usize = 32;
/// A longer file is something else.
const MAX_FILE_BYTES: u64 = 4096;
/// A change of keys needs two.
const MAX_KEYS: usize = 4;

/// A secret that is common to all nodes, and others that are taken from peers as well. Clones share the memory.
#[derive(Clone, PartialEq, Eq)]
pub struct FabricKey(Arc<[[u8; KEY_BYTES]]>);

/// Why a key file cannot be used or written.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// There is none.
    #[error(
        "there is no fabric key at {path}: make one with `plover keygen {path}` on one node and copy it to all the \
         others (or set `insecure = true` on all nodes, which leaves guest memory readable on the network)"
    )]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// Others than the owner may read it.
    #[error(
        "the fabric key {path} can be read by others (mode {mode:04o}): chmod 600 {path}, and think about a new key"
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Somebody else owns it, and could replace it.
    #[error(
        "the fabric key {path} belongs to the user with the number {owner}, plover runs as {us}: chown {us} {path}"
    )]
    Owner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who we are.
        us: u32,
    },
    /// Not what a key looks like.
    #[error(
        "the fabric key {path} is not 64 hexadecimal digits, or up to {MAX_KEYS} lines of them; write a new one with \
         `plover keygen`"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
    },
    /// `keygen` never replaces a key.
    #[error(
        "{path} exists already; a key is never overwritten. Give another path, and see docs/operations.md on changing the key"
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("the fabric key {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl FabricKey {
    /// A key of these bytes, which must be random.
    pub fn from_bytes(bytes: [u8; KEY_BYTES]) -> FabricKey {
        FabricKey(Arc::new([bytes]))
    }

    /// A fresh random key.
    ///
    /// # Errors
    /// The kernel's random source failed.
    pub fn generate() -> io::Result<FabricKey> {
        let mut bytes = [0; KEY_BYTES];
        let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        // The kernel never splits requests of up to 256 bytes.
        assert_eq!(got, KEY_BYTES, "the kernel gave half a key");
        Ok(FabricKey::from_bytes(bytes))
    }

    /// Reads the key file, which must belong to the user that we run as and be closed to all others.
    ///
    /// # Errors
    /// [`KeyError`], with the remedy.
    pub fn load(path: &Path) -> Result<FabricKey, KeyError> {
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => KeyError::Missing { path: path.to_owned() },
            _ => KeyError::Io { path: path.to_owned(), source },
        };
        let malformed = || KeyError::Malformed { path: path.to_owned() };
        // Nonblocking, so that a FIFO in its place cannot keep us.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| io(errno.into()))?);
        // Of the open file, not of the path, which could have been changed since.
        let metadata = file.metadata().map_err(io)?;
        if FileType::from_raw_mode(metadata.mode()) != FileType::RegularFile {
            return Err(malformed());
        }
        let us = rustix::process::geteuid().as_raw();
        if metadata.uid() != us {
            return Err(KeyError::Owner { path: path.to_owned(), owner: metadata.uid(), us });
        }
        let mode = metadata.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned(), mode });
        }
        let mut text = Vec::new();
        file.take(MAX_FILE_BYTES).read_to_end(&mut text).map_err(io)?;
        parse(&text).ok_or_else(malformed)
    }

    /// Writes a fresh key to a new file that only its owner can read.
    ///
    /// # Errors
    /// The file exists already, or cannot be written.
    pub fn create(path: &Path) -> Result<FabricKey, KeyError> {
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::AlreadyExists => KeyError::Exists { path: path.to_owned() },
            _ => KeyError::Io { path: path.to_owned(), source },
        };
        let key = FabricKey::generate().map_err(io)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|errno| io(errno.into()))?;
        let mut file = File::from(opened);
        let written = writeln!(file, "{}", key.hex()).and_then(|()| file.sync_all());
        if let Err(error) = written {
            // Half a key is worse than none.
            let _ = std::fs::remove_file(path);
            return Err(io(error));
        }
        Ok(key)
    }

    /// The key as its file has it.
    fn hex(&self) -> String {
        self.to_dial().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The key to dial with.
    pub(super) fn to_dial(&self) -> &[u8; KEY_BYTES] {
        &self.0[0]
    }

    /// The keys that a peer may have; the first is the likeliest.
    pub(super) fn to_accept(&self) -> &[[u8; KEY_BYTES]] {
        &self.0
    }
}

/// Shows no key: it would end up in logs.
impl std::fmt::Debug for FabricKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FabricKey(secret)")
    }
}

/// Lines of 64 hexadecimal digits, at least one; white space around them.
fn parse(text: &[u8]) -> Option<FabricKey> {
    let lines = text.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let keys: Option<Vec<_>> = lines.map(parse_line).collect();
    let keys = keys.filter(|keys| (1..=MAX_KEYS).contains(&keys.len()))?;
    Some(FabricKey(keys.into()))
}

fn parse_line(digits: &[u8]) -> Option<[u8; KEY_BYTES]> {
    if digits.len() != 2 * KEY_BYTES {
        return None;
    }
    let mut bytes = [0; KEY_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16);
        *byte = (digit(0)? << 4 | digit(1)?) as u8;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("plover-key-{test}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_new_key_is_private_never_overwritten_and_loads() {
        let folder = Folder::new("new");
        let path = folder.0.join("fabric.key");
        assert!(matches!(FabricKey::load(&path), Err(KeyError::Missing { .. })));
        let key = FabricKey::create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(FabricKey::load(&path).unwrap() == key);
        assert!(FabricKey::generate().unwrap() != key);
        let error = FabricKey::create(&path).unwrap_err();
        assert!(matches!(error, KeyError::Exists { .. }), "{error}");
        assert!(FabricKey::load(&path).unwrap() == key, "the old key is still there");
        assert_eq!(format!("{key:?}"), "FabricKey(secret)");
    }

    #[test]
    fn a_key_that_others_may_read_is_refused_with_the_remedy() {
        let folder = Folder::new("mode");
        let path = folder.0.join("fabric.key");
        FabricKey::create(&path).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o601] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = FabricKey::load(&path).unwrap_err().to_string();
            assert!(error.contains("chmod 600") && error.contains(&format!("{mode:04o}")), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        FabricKey::load(&path).unwrap();
    }

    #[test]
    fn a_key_of_another_user_is_refused() {
        if !rustix::process::geteuid().is_root() {
            // Only root can give a file away; the check itself is the same for everybody.
            return;
        }
        let folder = Folder::new("owner");
        let path = folder.0.join("fabric.key");
        FabricKey::create(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
        let error = FabricKey::load(&path).unwrap_err();
        assert!(matches!(error, KeyError::Owner { owner: 65534, us: 0, .. }), "{error}");
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let folder = Folder::new("form");
        let path = folder.0.join("fabric.key");
        let good = "0123456789abcdefABCDEF9876543210".repeat(2);
        let cases = [("", false), (&good[1..], false), (&format!("{good}0"), false), (&good, true)];
        let more = [(&*format!("  {good}\n"), true), (&*good.replace('a', "g"), false), (&*"x".repeat(9000), false)];
        let lines = |count| [format!("{good}\n").repeat(count), "\n\n".to_owned()].concat();
        let several = [(&*lines(4), true), (&*lines(5), false), (&*format!("{good}\nold"), false), ("\n", false)];
        for (text, fine) in cases.into_iter().chain(more).chain(several) {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            assert_eq!(FabricKey::load(&path).is_ok(), fine, "{text:?}");
        }
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(matches!(FabricKey::load(&path), Err(KeyError::Malformed { .. })));
    }
}
