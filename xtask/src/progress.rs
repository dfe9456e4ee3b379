//! What a person sees while xtask works: one line per step with its time, the tail of the output when a step fails.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

const SHOWN_TAIL_LINES: usize = 25;

/// Runs `work` under a line that says what happens and then how long it took.
pub fn step<T>(what: impl Display, work: impl FnOnce() -> Result<T>) -> Result<T> {
    print!("  {what} … ");
    std::io::stdout().flush().ok();
    let start = Instant::now();
    let result = work();
    let seconds = start.elapsed().as_secs_f32();
    match &result {
        Ok(_) => println!("{seconds:.1} s"),
        Err(_) => println!("FAILED after {seconds:.1} s"),
    }
    result
}

/// Like [`step`] for work that prints for itself: the time stands on a line of its own afterwards.
pub fn loud_step<T>(what: impl Display, work: impl FnOnce() -> Result<T>) -> Result<T> {
    println!("== {what}");
    let start = Instant::now();
    let result = work();
    let verdict = if result.is_ok() { "ok" } else { "FAILED" };
    println!("== {what}: {verdict}, {:.1} s", start.elapsed().as_secs_f32());
    result
}

/// The command as a person would type it.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Cargo, as if a person started it: `cargo run` has left the names of this package behind, which some build scripts look at and which
/// would have their crates compiled again.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command
}

/// Runs a command silently and returns its standard output.
///
/// # Errors
/// When it cannot be started or fails: with the command and the last lines of what it said.
pub fn output(command: &mut Command) -> Result<String> {
    let line = shown(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start «{line}»"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let said = format!("{stdout}{}", String::from_utf8_lossy(&output.stderr));
        let lines: Vec<&str> = said.lines().collect();
        let tail = lines[lines.len().saturating_sub(SHOWN_TAIL_LINES)..].join("\n    ");
        bail!("«{line}» failed ({}):\n    {tail}", output.status);
    }
    Ok(stdout)
}

/// Runs a command whose output goes to the terminal.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let line = shown(command);
    println!("   $ {line}");
    let status = command.status().with_context(|| format!("cannot start «{line}»"))?;
    if !status.success() {
        bail!("«{line}» failed ({status})");
    }
    Ok(())
}

/// A command that runs beside others. What it prints appears when it is waited for.
pub struct Background {
    line: String,
    child: Child,
    log: PathBuf,
}

impl Background {
    /// Starts the command; its output goes to the file `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command, log: PathBuf) -> Result<Self> {
        let line = shown(command);
        println!("   $ {line} &");
        let out = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
        let child = command.spawn().with_context(|| format!("cannot start «{line}»"))?;
        Ok(Self { line, child, log })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it failed.
    pub fn finish(mut self) -> Result<()> {
        let status = self.child.wait().with_context(|| format!("cannot wait for «{}»", self.line))?;
        print!("{}", fs::read_to_string(&self.log).unwrap_or_default());
        if !status.success() {
            bail!("«{}» failed ({status})", self.line);
        }
        Ok(())
    }
}

impl Drop for Background {
    /// Another step failed. What was begun is not broken off in the middle; it takes seconds.
    fn drop(&mut self) {
        // The failure is told already.
        let _ = self.child.wait();
    }
}

/// Is there an executable of this name on the PATH (or in the places that root's PATH may lack)?
pub fn on_path(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin:/usr/bin:/bin";
    path.split(':').any(|directory| Path::new(directory).join(program).is_file())
}
