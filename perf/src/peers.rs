//! The programs that Plover is compared with: where they are, and how they are started so that they never stay.
//!
//! `cargo xtask perf` unpacks Debian's packages below `target/rig/peers` and installs nothing. A program runs under
//! `setpriv --pdeathsig`, so that the kernel ends it with the thread that started it, whatever becomes of that;
//! no `Drop` runs after a Ctrl-C or a kill -9.

use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::results::workspace;

/// Where Debian's packages have them; Ceph's, which fio links, lie in a directory of their own.
const LIBRARIES: [&str; 3] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"];

/// A command for an unpacked program, with its libraries in reach and no input.
///
/// # Errors
/// It was not unpacked.
pub fn command(program: &str) -> Result<Command> {
    let root = workspace().join("target").join("rig").join("peers");
    let mut command = unpacked(&root, program)?;
    command.stdin(Stdio::null());
    Ok(command)
}

/// A command for a program that is installed, or else was unpacked below `root`.
///
/// # Errors
/// It is neither.
pub fn installed_or_unpacked(root: &Path, program: &str) -> Result<Command> {
    let installed = Path::new("/usr/bin").join(program);
    if !installed.exists() {
        return unpacked(root, program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(installed);
    Ok(command)
}

fn unpacked(root: &Path, program: &str) -> Result<Command> {
    let path = root.join("usr/bin").join(program);
    ensure!(
        path.exists(),
        "{} is missing: start the measurement with «cargo xtask perf», which fetches it",
        path.display()
    );
    let search = LIBRARIES.map(|directory| root.join(directory).display().to_string());
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(path).env("LD_LIBRARY_PATH", search.join(":"));
    Ok(command)
}

/// Runs a program to its end and returns its standard output.
///
/// # Errors
/// It does not start, fails, or takes longer than `limit`; with what it said.
pub fn output(mut command: Command, directory: &Path, limit: Duration) -> Result<String> {
    // Into files, since nobody reads a pipe while we wait.
    let [stdout, stderr] = ["stdout", "stderr"].map(|name| directory.join(format!("peer.{name}")));
    let file = |path: &PathBuf| std::fs::File::create(path).with_context(|| format!("cannot make {}", path.display()));
    let said = |path: &PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let mut running = Running::start(command.stdout(file(&stdout)?).stderr(file(&stderr)?))?;
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = running.0.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            bail!("«{command:?}» did not end within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    ensure!(status.success(), "«{command:?}» failed ({status}): {}{}", said(&stdout), said(&stderr));
    Ok(said(&stdout))
}

/// A child that is killed when dropped.
#[derive(Debug)]
pub struct Running(Child);

impl Running {
    /// Starts it. It lives no longer than the calling thread.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Result<Running> {
        let child =
            command.spawn().with_context(|| format!("cannot start «{command:?}» (is util-linux installed?)"))?;
        Ok(Running(child))
    }

    /// Its process number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// The pipe to its input, once, if it was started with one.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.0.stdin.take()
    }

    /// Ends it now.
    pub fn kill(&mut self) {
        // An error means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// It has, with how.
    pub fn check(&mut self) -> Result<()> {
        match self.0.try_wait()? {
            Some(status) => bail!("a peer's process ended by itself ({status})"),
            None => Ok(()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Scratch;

    fn shell(line: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", line]);
        command
    }

    #[test]
    fn output_comes_back_and_failure_says_why() {
        let scratch = Scratch::new(&std::env::temp_dir(), "plover-perf-peers").unwrap();
        let limit = Duration::from_secs(20);
        assert_eq!(output(shell("echo 7"), scratch.path(), limit).unwrap(), "7\n");
        let error = output(shell("echo no disk >&2; exit 3"), scratch.path(), limit).unwrap_err().to_string();
        assert!(error.contains("no disk") && error.contains('3'), "{error}");
        let error = output(shell("exec sleep 60"), scratch.path(), Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
    }

    #[test]
    fn a_dropped_child_is_dead() {
        let mut running = Running::start(&mut shell("exec sleep 60")).unwrap();
        running.check().unwrap();
        let process = PathBuf::from(format!("/proc/{}", running.0.id()));
        assert!(process.exists());
        drop(running);
        assert!(!process.exists());
    }
}
