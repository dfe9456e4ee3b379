//! Huge pages of 2 MiB for the length of a test or a measurement.
//!
//! One process at a time has them, so that two of them do not give back what the other one reserved. A crate of its own,
//! because tests and measurements of crates need it that do not depend on another.

use std::fs::{self, File, TryLockError};
use std::io::{self, Error};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const COUNT: &str = "/proc/sys/vm/nr_hugepages";
/// How long another process may have them.
const PATIENCE: Duration = Duration::from_secs(240);
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

/// Huge pages that were added to the system's, and are taken away again by a helper process when this is dropped or
/// its process dies, however that happens.
#[derive(Debug)]
pub struct HugePages {
    restorer: Child,
}

impl HugePages {
    /// Adds `pages` to what is there, as soon as no other process has any.
    ///
    /// # Errors
    /// Not root, too little free memory, or another process keeps them for minutes; nothing has changed then.
    pub fn reserve(pages: u64) -> io::Result<HugePages> {
        let lock = lock(&std::env::temp_dir().join("plover-huge-pages.lock"))?;
        let before = count()?;
        // It waits for the end of its input, which is the end of us; and signals from the terminal are not for it. The lock is its
        // output: held until it has ended.
        let line = format!("trap '' INT TERM HUP; cat >/dev/null; echo {before} >{COUNT}");
        let restorer =
            Command::new("setsid").args(["sh", "-c", &line]).stdin(Stdio::piped()).stdout(lock).spawn().map_err(
                |error| with("cannot start the process that gives huge pages back (setsid is in util-linux)", &error),
            )?;
        let reserved = HugePages { restorer };
        let wanted = before.saturating_add(pages);
        fs::write(COUNT, wanted.to_string()).map_err(|error| with(&format!("cannot write {COUNT}"), &error))?;
        let now = count()?;
        if now < wanted {
            let found = now.saturating_sub(before);
            return Err(Error::other(format!("the kernel found {found} huge pages of {pages}")));
        }
        Ok(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        drop(self.restorer.stdin.take());
        if let Err(error) = self.restorer.wait() {
            eprintln!("cannot wait until huge pages are given back: {error}; look at {COUNT}");
        }
    }
}

fn lock(path: &std::path::Path) -> io::Result<File> {
    let name = path.display();
    let file = File::create(path).map_err(|error| with(&format!("cannot write {name}"), &error))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(with(&format!("cannot lock {name}"), &error)),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(Error::other(format!("another process keeps {name} locked")));
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_INTERVAL),
        }
    }
}

/// How many the system has.
///
/// # Errors
/// No number, or none that can be read.
pub fn count() -> io::Result<u64> {
    let text = fs::read_to_string(COUNT).map_err(|error| with(&format!("cannot read {COUNT}"), &error))?;
    text.trim().parse().map_err(|_| Error::other(format!("{COUNT} holds no number")))
}

fn with(what: &str, error: &Error) -> Error {
    Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_given_back() {
        // Whoever has some gives them back before the lock is free.
        let path = std::env::temp_dir().join("plover-huge-pages.lock");
        let mine = lock(&path).unwrap();
        let before = count().unwrap();
        drop(mine);
        match HugePages::reserve(3) {
            Ok(reserved) => {
                assert_eq!(count().unwrap(), before + 3);
                drop(reserved);
            }
            Err(error) => eprintln!("no huge pages to be had here: {error}"),
        }
        // More than any machine has: refused, and what was found is given back.
        assert!(HugePages::reserve(1 << 40).is_err());
        let _mine = lock(&path).unwrap();
        assert_eq!(count().unwrap(), before);
    }
}
