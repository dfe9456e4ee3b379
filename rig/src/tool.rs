//! Runs ip, nft and tc. They are what an administrator would type, so an error shows something to try by hand.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::error::Context;
use crate::{Result, RigError};

/// Runs a command, optionally with text on its standard input, and returns what it printed.
pub(crate) fn run(program: &str, arguments: &[&str], input: &str) -> Result<String> {
    let line = || format!("{program} {} {}", arguments.join(" "), input.trim()).trim().to_owned();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context(|| format!("cannot start «{program}»; run «cargo xtask setup»"))?;
    // A tool that ends early closes its input; its exit status tells the story better than the broken pipe.
    let mut stdin = child.stdin.take().expect("stdin was piped");
    drop(stdin.write_all(input.as_bytes()));
    drop(stdin);
    let output = child.wait_with_output().context(|| format!("cannot wait for «{}»", line()))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(RigError::Tool { line: line(), said })
}

/// Runs ip commands, one per line, in a network namespace.
pub(crate) fn ip_batch(namespace: &str, commands: &str) -> Result<()> {
    run("ip", &["-n", namespace, "-batch", "-"], commands).map(drop)
}
