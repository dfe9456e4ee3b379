//! Entry points: `cargo xtask setup|test|tidy|demo|simulate|fuzz|perf`.

mod demo;
mod fuzz;
mod perf;
mod progress;
mod setup;
mod simulate;
mod test;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set-up, tests, demo and measurements of Plover")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Fetch and build what tests and demo need into target/rig (once)
    Setup {
        /// Make everything again, from the packages that the mirror has now
        #[arg(long)]
        refresh: bool,
    },
    /// Check format, lints and tidiness, run all tests, the end-to-end ones as root
    Test(test::Arguments),
    /// Check file and function lengths, leftovers, stray and dead files, the changelog's form
    Tidy,
    /// Show a guest surviving the death of its leader
    Demo(demo::Arguments),
    /// Run consensus through simulated faults, from seeds
    Simulate(simulate::Arguments),
    /// Feed every parser of foreign input with what libFuzzer makes up
    Fuzz(fuzz::Arguments),
    /// Measure
    Perf(perf::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Task::Setup { refresh } => setup::run(refresh),
        Task::Test(arguments) => test::test(&arguments),
        Task::Tidy => tidy::tidy(),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Simulate(arguments) => simulate::simulate(&arguments),
        Task::Fuzz(arguments) => fuzz::fuzz(&arguments),
        Task::Perf(arguments) => perf::perf(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
