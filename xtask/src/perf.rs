//! `cargo xtask perf GROUP`: builds the measuring harness optimised and hands over to it.

use std::process::Command;

use anyhow::{Result, ensure};

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

/// Sets up the test bed and runs the group in a process of its own: xtask itself is not optimised.
///
/// # Errors
/// When the harness fails.
pub fn perf(arguments: &Arguments) -> Result<()> {
    let program = setup::workspace().join("perf/src/main.rs");
    ensure!(
        program.exists(),
        "this version has no measurements yet ({} is missing)",
        program.display()
    );
    setup::run(false)?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(setup::workspace()).args([
        "run",
        "--release",
        "--quiet",
        "-p",
        "perf",
        "--",
    ]);
    command
        .arg(&arguments.group)
        .args(arguments.smoke.then_some("--smoke"));
    loud_step(format!("perf {}", arguments.group), || run(&mut command))
}
