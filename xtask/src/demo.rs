//! `cargo xtask demo`: a guest on three hosts survives the death of its leader, shown to a person.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::{setup, test};

/// How long, from which seed, and what becomes of it.
#[derive(clap::Args)]
pub struct Arguments {
    /// Also write the result to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Seconds of load per phase
    #[arg(long, value_name = "SECS", default_value_t = 10)]
    pub duration: u64,
    /// Decides keys, values and times of failures
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Leave everything running at the end, until Ctrl-C, and print how to reach it
    #[arg(long)]
    pub keep: bool,
}

/// Sets up what is missing and runs the demo. Its success is the demo's.
///
/// # Errors
/// When something cannot be set up, or the group did not survive.
pub fn run(_arguments: &Arguments) -> Result<()> {
    if !rig::is_root() {
        return Err(rig::RigError::NotRoot.into());
    }
    setup::run(false)?;
    test::build_programs()?;
    bail!("this version can set up the demo but not run it yet")
}
