//! Huge pages for the length of a measurement.

use std::fs;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages of 2 MiB that were added to the system's, and are taken away again by a helper process when this is dropped or
/// its process dies, however that happens.
#[derive(Debug)]
pub struct HugePages {
    restorer: Child,
}

impl HugePages {
    /// Adds `pages` to what is there.
    ///
    /// # Errors
    /// Not root, or too little free memory; nothing has changed then.
    pub fn reserve(pages: u64) -> Result<HugePages> {
        let before = count()?;
        // It waits for the end of its input, which is the end of us; and signals from the terminal are not for it.
        let line = format!("trap '' INT TERM HUP; cat >/dev/null; echo {before} >{COUNT}");
        let restorer = Command::new("setsid")
            .args(["sh", "-c", &line])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the process that gives huge pages back (setsid is in util-linux)")?;
        let reserved = HugePages { restorer };
        fs::write(COUNT, (before + pages).to_string()).with_context(|| format!("cannot write {COUNT}"))?;
        let now = count()?;
        ensure!(now >= before + pages, "the kernel found {} huge pages of {pages}", now.saturating_sub(before));
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

fn count() -> Result<u64> {
    let text = fs::read_to_string(COUNT).with_context(|| format!("cannot read {COUNT}"))?;
    text.trim().parse().with_context(|| format!("{COUNT} holds no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_given_back() {
        let before = count().unwrap();
        match HugePages::reserve(3) {
            Ok(reserved) => {
                assert_eq!(count().unwrap(), before + 3);
                drop(reserved);
            }
            Err(error) => eprintln!("no huge pages to be had here: {error:#}"),
        }
        assert_eq!(count().unwrap(), before);
        // More than any machine has: refused, and what was found is given back.
        assert!(HugePages::reserve(1 << 40).is_err());
        assert_eq!(count().unwrap(), before);
    }
}
