//! Cleans up after a test bed, also when its owner was killed with SIGKILL.
//!
//! The janitor is a shell process in a session of its own that waits on a pipe whose other end only the owner
//! holds. The same script is the ordinary clean-up, so the path that matters after a crash is the one that every
//! test exercises. Rejected: a re-exec of the test binary (its `main` is not ours) and PR_SET_CHILD_SUBREAPER
//! trees (they miss namespaces and mounts).

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::error::{Context, with_sources};
use crate::process::start_time;
use crate::wait::{Deadline, wait_until};
use crate::{Result, RigError};

const SCRIPT: &str = include_str!("janitor.sh");
/// Sockets live here, because a path below a deep checkout may exceed the 108 bytes that a socket address has.
const SOCKETS: &str = "/run/plover-rig";
/// Logs of failed runs that are kept for reading.
const KEPT_RUNS: usize = 8;
const CLEANUP_SECS: u64 = 20;

/// Names of one test bed. The owner's pid and start time make it unique and tell whether the owner is alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Id {
    owner: u32,
    started: u64,
    number: u32,
}

impl Id {
    /// For the `number`th test bed of this process.
    pub fn of_this_process(number: u32) -> Result<Self> {
        let owner = std::process::id();
        let started = start_time(owner).ok_or_else(|| RigError::Io {
            what: "cannot read /proc/self/stat".to_owned(),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        Ok(Self { owner, started, number })
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let id = Self {
            owner: u32::from_str_radix(parts.next()?, 16).ok()?,
            started: u64::from_str_radix(parts.next()?, 16).ok()?,
            number: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(id)
    }

    fn owner_is_alive(&self) -> bool {
        start_time(self.owner) == Some(self.started)
    }

    /// Where QMP, vhost-user and control sockets go.
    pub fn socket_dir(&self) -> PathBuf {
        Path::new(SOCKETS).join(self.to_string())
    }

    /// Where logs and data directories go.
    pub fn run_dir(&self) -> PathBuf {
        runs().join(self.to_string())
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, out: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(out, "{:x}-{:x}-{}", self.owner, self.started, self.number)
    }
}

/// What the janitor leaves when it is told to go to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    Nothing,
    Logs,
}

/// The waiting janitor of one test bed.
pub(crate) struct Janitor {
    child: Child,
    id: Id,
}

impl Janitor {
    /// Makes the directories and starts to watch over them. Nothing else may exist before this.
    pub fn start(id: &Id) -> Result<Self> {
        for directory in [id.socket_dir(), id.run_dir()] {
            fs::create_dir_all(&directory).context(|| format!("cannot create {}", directory.display()))?;
        }
        Ok(Self { child: spawn(id)?, id: id.clone() })
    }

    /// Has it leave the logs even if the owner dies before [`Janitor::finish`].
    pub fn keep_logs(&self) -> Result<()> {
        let mut pipe = self.child.stdin.as_ref().expect("stdin was piped");
        writeln!(pipe, "keep-logs").context(|| "the janitor has gone".to_owned())
    }

    /// Lets the janitor work and waits for it.
    pub fn finish(mut self, leave: Leave) -> Result<()> {
        let mut pipe = self.child.stdin.take().expect("stdin was piped");
        let word = match leave {
            Leave::Nothing => "all",
            Leave::Logs => "keep-logs",
        };
        writeln!(pipe, "{word}").context(|| "the janitor has gone".to_owned())?;
        drop(pipe);
        let status = wait_until(Deadline::after_secs(CLEANUP_SECS), "the janitor to clean up", || {
            self.child.try_wait().transpose()
        })?
        .context(|| "cannot wait for the janitor".to_owned())?;
        if status.success() {
            return Ok(());
        }
        let log = runs().join("janitor.log");
        let said = format!("{status}; see {}; the next run sweeps again", log.display());
        Err(RigError::Tool { line: format!("janitor of {}", self.id), said })
    }
}

fn spawn(id: &Id) -> Result<Child> {
    let log_path = runs().join("janitor.log");
    let log = File::options().create(true).append(true).open(&log_path);
    let log = log.context(|| format!("cannot open {}", log_path.display()))?;
    let log_too = log.try_clone().context(|| "cannot duplicate a file handle".to_owned())?;
    let mut command = Command::new("setsid");
    // A session of its own: Ctrl-C on the terminal reaches the owner, not the janitor.
    command.args(["sh", "-c", SCRIPT, "plover-rig-janitor", &id.to_string()]);
    command.arg(id.run_dir()).arg(id.socket_dir()).arg(id.owner.to_string());
    command.current_dir("/").stdin(Stdio::piped()).stdout(log).stderr(log_too);
    command.spawn().context(|| "cannot start the janitor (setsid, sh)".to_owned())
}

/// Removes what dead owners left whose janitor was killed as well, and old logs.
pub(crate) fn sweep() -> Result<()> {
    let left = |directory: &Path| -> Vec<Id> {
        let names = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.filter_map(|name| Id::parse(name.to_str()?)).filter(|id| !id.owner_is_alive()).collect()
    };
    for id in left(Path::new(SOCKETS)) {
        eprintln!("rig: removing what test bed {id} left behind (its owner is dead)");
        let janitor = Janitor { child: spawn(&id)?, id };
        // Its own janitor may be at work at the same time; then one of the two finds things gone.
        if let Err(error) = janitor.finish(Leave::Nothing) {
            eprintln!("rig: {}", with_sources(&error));
        }
    }
    let mut runs = left(&runs());
    runs.retain(|id| !id.socket_dir().exists());
    runs.sort_by_key(|id| id.started);
    for id in runs.iter().take(runs.len().saturating_sub(KEPT_RUNS)) {
        let directory = id.run_dir();
        fs::remove_dir_all(&directory).context(|| format!("cannot remove {}", directory.display()))?;
    }
    Ok(())
}

fn runs() -> PathBuf {
    crate::guest::target_dir().join("rig-run")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_names_its_owner() {
        let id = Id::of_this_process(7).unwrap();
        assert_eq!(Id::parse(&id.to_string()), Some(id.clone()));
        assert!(id.owner_is_alive());
        assert!(!Id { started: id.started + 1, ..id }.owner_is_alive(), "a reused pid is another owner");
        for other in ["", "janitor.log", "1-2", "1-2-3-4", "x-1-1"] {
            assert_eq!(Id::parse(other), None, "{other}");
        }
    }
}
