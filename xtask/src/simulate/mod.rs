//! `cargo xtask simulate`: consensus under simulated faults, from seeds; and the proof that it would notice.
//!
//! Both run in programs of their own: xtask itself is not optimised.

mod mutants;

use anyhow::Result;

use crate::progress::{cargo, loud_step, run};
use crate::setup;

/// A wrong variant must be noticed within so many seeds.
pub const PROOF_SEEDS: u64 = 10_000;

/// What to simulate.
#[derive(clap::Args)]
pub struct Arguments {
    /// How many seeds
    #[arg(long, default_value_t = 10_000)]
    seeds: u64,
    /// Threads; all cores if absent
    #[arg(long)]
    threads: Option<u64>,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// Show what happens up to the violation (for one seed)
    #[arg(long)]
    trace: bool,
    /// Run the wrong variants of the core instead: each must be noticed within the seeds
    #[arg(long)]
    mutants: bool,
    /// Only the wrong variants whose name or rule is one of these
    #[arg(long, requires = "mutants")]
    only: Vec<String>,
}

/// Runs seeds or wrong variants.
///
/// # Errors
/// When a seed shows a violation, or a wrong variant goes unnoticed.
pub fn simulate(arguments: &Arguments) -> Result<()> {
    std::env::set_current_dir(setup::workspace())?;
    if arguments.mutants {
        return prove(arguments.seeds, &arguments.only);
    }
    let mut command = cargo();
    command.args(["run", "--quiet", "--release", "-p", "consensus", "--example", "simulate", "--"]);
    command.args(["--seeds", &arguments.seeds.to_string(), "--first", &arguments.first.to_string()]);
    if let Some(threads) = arguments.threads {
        command.args(["--threads", &threads.to_string()]);
    }
    command.args(arguments.trace.then_some("--trace"));
    run(&mut command)
}

/// Makes and runs the wrong variants.
///
/// # Errors
/// When one cannot be made or goes unnoticed.
pub fn prove(seeds: u64, only: &[String]) -> Result<()> {
    loud_step("wrong variants of the core are noticed", || mutants::prove(seeds, only))
}
