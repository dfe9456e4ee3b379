//! What cargo compiles for the tests, chosen so that it compiles nothing twice.
//!
//! Which features a dependency gets depends on all packages of a command, and on whether a test is among its targets. `-p perf`, or
//! the programs without a test, would therefore compile most crates again, with other features: these were six minutes of a run.
//! So every command names the whole workspace and at least one test. Rejected: a crate that only unites features (cargo-hakari):
//! one more list to keep, in every dependency tree.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::progress::output;
use crate::{perf, setup};

/// How an end-to-end test is marked.
const MARK: &str = "#[ignore = \"e2e: ";
/// A test that needs little, for a command that wants a program.
pub const SMALL_TEST: [&str; 2] = ["--test", "corpus"];

/// The unoptimised build: lints, fast tests, measurements that only have to work.
pub fn checked() -> Vec<String> {
    let features = if has_dpdk() { format!("{},qemu-vhost-user/dpdk", perf::PEERS) } else { perf::PEERS.to_owned() };
    vec!["--workspace".to_owned(), features]
}

/// The optimised build of the end-to-end tests and of what they start, as users get it: without DPDK. xtask needs no such build.
///
/// # Errors
/// When a test is marked where this does not look.
pub fn released() -> Result<Vec<String>> {
    let words = ["--release", "--workspace", "--exclude", "xtask"].map(str::to_owned);
    let tests = e2e_targets()?.into_iter().flat_map(|name| ["--test".to_owned(), name]);
    Ok(words.into_iter().chain(tests).collect())
}

/// Whether what needs DPDK is compiled.
pub fn has_dpdk() -> bool {
    setup::has_library("libdpdk")
}

/// The test programs with end-to-end tests in them: looked up, so that a new one cannot be forgotten.
fn e2e_targets() -> Result<BTreeSet<String>> {
    let root = setup::workspace();
    let listing = ["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"];
    let mut targets = BTreeSet::new();
    for file in output(Command::new("git").current_dir(&root).args(listing))?.lines() {
        let path = root.join(file);
        // Deleted but not yet committed files are listed too.
        if !path.exists() {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {file}"))?;
        if text.lines().any(|line| line.trim_start().starts_with(MARK)) {
            match test_target(file) {
                Some(name) => targets.insert(name.to_owned()),
                None => bail!(
                    "{file}: end-to-end tests belong into a crate's tests/, where they can be compiled by themselves"
                ),
            };
        }
    }
    Ok(targets)
}

/// The integration test that a file belongs to: `CRATE/tests/NAME.rs` or `CRATE/tests/NAME/…`.
fn test_target(file: &str) -> Option<&str> {
    let (_, below) = file.split_once("/tests/").filter(|(package, _)| !package.contains("/src"))?;
    let name = below.split('/').next()?;
    Path::new(name).file_stem()?.to_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_belongs_to_an_integration_test_or_to_none() {
        assert_eq!(test_target("rig/tests/chaos.rs"), Some("chaos"));
        assert_eq!(test_target("storage-log/tests/log/devices.rs"), Some("log"));
        assert_eq!(test_target("rig/src/client/tests.rs"), None);
        assert_eq!(test_target("qemu-vhost-user/src/device/tests/traffic.rs"), None);
    }

    #[test]
    fn end_to_end_tests_are_found() {
        let found = e2e_targets().unwrap();
        for known in ["chaos", "log", "qemu_side"] {
            assert!(found.contains(known), "{found:?}");
        }
    }
}
