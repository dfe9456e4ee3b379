//! Where the load generators run, and what they find.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use rig::Host;
use rig::guest::artifacts_dir;

use crate::peers::output;
use crate::pin::pin;

/// Longest run of a load generator, far above what it is asked to take.
const LIMIT: Duration = Duration::from_secs(90);

/// What a load generator found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Operations per second.
    pub per_s: f64,
    /// The time within which half of them were answered.
    pub p50_us: f64,
    /// The time within which 99 % of them were answered.
    pub p99_us: f64,
    /// How many there were.
    pub operations: u64,
}

/// A place for load generators.
#[derive(Clone, Copy)]
pub struct Client<'a> {
    /// Its network namespace.
    pub host: &'a Host,
    /// The CPU.
    pub cpu: usize,
    /// For their output.
    pub directory: &'a Path,
    /// Where the guest serves.
    pub address: SocketAddr,
}

impl Client<'_> {
    /// Runs a program to its end, here.
    ///
    /// # Errors
    /// It fails or takes too long.
    pub fn output(&self, command: Command) -> Result<String> {
        self.here(|| output(command, self.directory, LIMIT))?
    }

    /// Does something in the client's network namespace and on its CPU.
    ///
    /// # Errors
    /// The namespace or the CPU cannot be entered.
    pub fn here<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.host.namespace().run(|| {
            pin(self.cpu)?;
            Ok(work())
        })?
    }

    /// The guest's address as words for a command line.
    pub fn words(&self) -> [String; 2] {
        [self.address.ip().to_string(), self.address.port().to_string()]
    }
}

/// A program out of the guests' packages, by their own loader; `path` is below their root.
///
/// # Errors
/// It is not there.
pub fn from_guests(path: &Path, arguments: &[&str]) -> Result<Command> {
    let root = artifacts_dir().join("guest-root");
    let program: PathBuf = root.join(path);
    ensure!(program.exists(), "{} is missing; run «cargo xtask setup»", program.display());
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|place| root.join(place));
    let search = libraries.map(|place| place.display().to_string()).join(":");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(root.join("lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(search).arg(program).args(arguments).stdin(Stdio::null());
    Ok(command)
}
