//! Where results go, and what they are results of.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::row::Row;

/// The directory `target/perf` of the workspace: results, and scratch files on the disk that is measured.
#[must_use]
pub fn directory() -> PathBuf {
    workspace().join("target").join("perf")
}

/// The top directory of the repository.
#[must_use]
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace")
}

/// The commit that is checked out, with `+dirty` if tracked files differ from it; `unknown` outside of git.
#[must_use]
pub fn commit() -> String {
    let git = |arguments: &[&str]| {
        let mut command = Command::new("git");
        let output = command.current_dir(workspace()).args(arguments).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if changes.is_empty() => commit,
        _ => commit + "+dirty",
    }
}

/// Appends `row` to `results.ndjson` in `directory`, which is made if it is missing. One write, so rows of two
/// processes do not mix.
///
/// # Errors
/// The file cannot be written, with its path.
pub fn append(directory: &Path, row: &Row) -> Result<()> {
    let path = directory.join("results.ndjson");
    let line = serde_json::to_string(row)? + "\n";
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(directory)?;
        let mut file = File::options().append(true).create(true).open(&path)?;
        file.write_all(line.as_bytes())
    };
    write().with_context(|| format!("cannot append to {}", path.display()))
}

/// A directory that is removed with its contents when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes an empty directory for `name` in `parent`, of this process alone.
    ///
    /// # Errors
    /// It cannot be made, or a left-over of the same name cannot be removed.
    pub fn new(parent: &Path, name: &str) -> Result<Scratch> {
        let me = std::process::id();
        remove_left_overs(parent, name, me)?;
        let path = parent.join(format!("{name}-{me}"));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Scratch(path))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// Removes what killed processes left, and a process of the same number.
fn remove_left_overs(parent: &Path, name: &str, me: u32) -> Result<()> {
    for entry in fs::read_dir(parent).into_iter().flatten() {
        let entry = entry.with_context(|| format!("cannot read {}", parent.display()))?;
        let number = |file: &str| file.strip_prefix(name)?.strip_prefix('-')?.parse::<u32>().ok();
        let Some(process) = entry.file_name().to_str().and_then(number) else { continue };
        if process == me || !Path::new("/proc").join(process.to_string()).exists() {
            fs::remove_dir_all(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dead_processes_left_is_removed_and_nothing_else() {
        let outer = Scratch::new(&std::env::temp_dir(), "plover-perf-scratch").unwrap();
        // Process numbers are smaller than this.
        let (dead, alive) = (outer.path().join("x-4200000000"), outer.path().join("x-1"));
        let other = outer.path().join("x-y-4200000000");
        for directory in [&dead, &alive, &other] {
            fs::create_dir(directory).unwrap();
        }
        let inner = Scratch::new(outer.path(), "x").unwrap();
        assert!(inner.path().exists() && !dead.exists() && alive.exists() && other.exists());
    }

    #[test]
    fn rows_are_appended_one_per_line() {
        let scratch = Scratch::new(&std::env::temp_dir(), "plover-perf-results").unwrap();
        let directory = scratch.path().join("perf");
        let row = Row {
            id: "x".to_owned(),
            value: 1.0,
            unit: "us".to_owned(),
            peer: None,
            peer_value: None,
            ratio: None,
            runs: 1,
            spread: 0.0,
            commit: commit(),
            smoke: true,
        };
        append(&directory, &row).unwrap();
        append(&directory, &row).unwrap();
        let text = fs::read_to_string(directory.join("results.ndjson")).unwrap();
        let rows: Vec<Row> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows, [row.clone(), row]);
        let path = scratch.path().to_owned();
        drop(scratch);
        assert!(!path.exists());
    }
}
