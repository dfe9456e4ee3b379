//! `cargo xtask perf GROUP`: builds the measuring harness optimised and hands over to it.

use std::process::Command;

use anyhow::Result;

use crate::progress::{loud_step, run};
use crate::setup;

/// What to measure.
#[derive(clap::Args)]
pub struct Arguments {
    /// Group of measurements; «list» names them
    group: String,
    /// A few seconds only: shows that the measurement works, its figures mean nothing
    #[arg(long)]
    smoke: bool,
}

/// Runs the group in a process of its own: xtask itself is not optimised.
///
/// # Errors
/// When the harness fails.
pub fn perf(arguments: &Arguments) -> Result<()> {
    loud_step(format!("perf {}", arguments.group), || run(&mut harness(&arguments.group, arguments.smoke)))
}

/// The command that measures `group`. The groups that exist need no test bed, so none is set up. A smoke run takes
/// the build that the tests use: it is there already, checks more, and figures do not matter.
pub fn harness(group: &str, smoke: bool) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(setup::workspace())
        .args(["run", "--quiet", "-p", "perf"])
        .args((!smoke).then_some("--release"))
        .args(["--", group])
        .args(smoke.then_some("--smoke"));
    command
}
