//! Where the programs under test are: `plover`, its agent, and the rig's own clients.

use std::path::PathBuf;

use crate::{Result, RigError};

/// Finds a program or library (`plover`, `libplover_agent.so`, `rig-client`) of the same build as the running
/// program: for tests, which cargo puts into `target/PROFILE/deps`, beside what they test.
///
/// # Errors
/// [`RigError::NotBuilt`] with the command that builds it.
pub fn program(name: &str) -> Result<PathBuf> {
    find(name, |profile| profile.join(name))
}

/// Finds the optimised build of it: for xtask, which is itself not optimised.
///
/// # Errors
/// [`RigError::NotBuilt`] with the command that builds it.
pub fn release_program(name: &str) -> Result<PathBuf> {
    find(name, |profile| profile.with_file_name("release").join(name))
}

fn find(name: &str, place: impl Fn(PathBuf) -> PathBuf) -> Result<PathBuf> {
    let profile = || {
        let mut directory = std::env::current_exe().ok()?.parent()?.to_owned();
        if directory.ends_with("deps") {
            directory.pop();
        }
        Some(directory)
    };
    let found = profile().map(place).filter(|path| path.is_file());
    found.ok_or_else(|| RigError::NotBuilt { name: name.to_owned() })
}
