//! Entry points: `cargo xtask setup|test|tidy|demo|perf`.

mod progress;
mod setup;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Set-up, tests, demo and measurements of Plover"
)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Fetches and builds what tests and demo need into target/rig (once)
    Setup {
        /// Make everything again, from the packages that the mirror has now
        #[arg(long)]
        refresh: bool,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Task::Setup { refresh } => setup::run(refresh),
    }
}
