//! `perf GROUP [--smoke] [--only PREFIX] [--passes N]`: measures, prints a table and appends to `target/perf/results.ndjson`. Started by
//! `cargo xtask perf`, which builds it as it should be built.

use std::cell::RefCell;
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::{Result, ensure};
use clap::Parser;
use perf::group::{GROUPS, Group};
use perf::rows::Rows;
use perf::{Effort, results, table};

#[derive(Parser)]
#[command(name = "perf", about = "Measures Plover and its parts")]
struct Arguments {
    /// Group of measurements; «list» names them
    group: String,
    /// A few seconds only: shows that the measurement works, its figures mean nothing
    #[arg(long)]
    smoke: bool,
    /// Only rows whose id begins so; may be given several times
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,
    /// Of the group services: how often the guest is booted under each policy [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    passes: Option<u16>,
}

fn main() -> ExitCode {
    match perf::syncvm::was_guest() {
        Ok(true) => return ExitCode::SUCCESS,
        Ok(false) => {}
        Err(error) => {
            eprintln!("error: a synthetic guest: {error:#}");
            return ExitCode::FAILURE;
        }
    }
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    if arguments.group == "list" {
        for group in GROUPS {
            println!("{:<10} {}", group.name, group.about);
        }
        return Ok(());
    }
    let group = Group::find(&arguments.group)?;
    let effort = if arguments.smoke { Effort::Smoke } else { Effort::Full };
    let (directory, commit) = (results::directory(), results::commit());
    let measured = Rc::new(RefCell::new(Vec::new()));
    let kept = Rc::clone(&measured);
    let mut rows = Rows::new(arguments.only.clone(), move |mut row| {
        row.commit.clone_from(&commit);
        eprintln!("   measured {}", row.id);
        results::append(&directory, &row)?;
        kept.borrow_mut().push(row);
        Ok(())
    });
    rows.passes = arguments.passes.map(usize::from);
    let outcome = group.run(effort, &mut rows);
    let rows = measured.take();
    // Also after a failure: what was measured before it is good.
    if !rows.is_empty() {
        print!("{}", table::render(&rows));
    }
    if arguments.smoke {
        println!("smoke run: these figures mean nothing");
    }
    outcome?;
    ensure!(
        !rows.is_empty() || arguments.only.is_empty(),
        "no row of the group {} begins with {}; docs/performance.md names them",
        group.name,
        arguments.only.join(" or ")
    );
    Ok(())
}
