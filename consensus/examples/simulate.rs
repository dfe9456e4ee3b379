//! Runs seeds of the simulator on several threads; what `cargo xtask simulate` starts, optimised.
//!
//! `simulate --seeds N [--threads T] [--first S] [--trace]`. Ends at the first seed that fails, with a line that
//! replays it.

use std::num::NonZero;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use consensus::sim::{self, Options, Summary};

/// Progress is said after so many seeds.
const PROGRESS_SEEDS: u64 = 5000;

struct Arguments {
    first: u64,
    seeds: u64,
    threads: u64,
    trace: bool,
}

fn arguments() -> Result<Arguments, String> {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    let mut arguments = Arguments { first: 1, seeds: 10_000, threads: cores as u64, trace: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let text = words.next().ok_or_else(|| format!("{word} wants a number"))?;
            text.parse::<u64>().map_err(|_| format!("{word} {text}: must be a number"))
        };
        match word.as_str() {
            "--first" => arguments.first = number()?,
            "--seeds" => arguments.seeds = number()?,
            "--threads" => arguments.threads = number()?.max(1),
            "--trace" => arguments.trace = true,
            _ => return Err(format!("{word} is no option; use --first S, --seeds N, --threads T, --trace")),
        }
    }
    Ok(arguments)
}

/// Runs one seed; a panic of the core is a violation too.
fn run(seed: u64, trace: bool) -> Result<Summary, String> {
    match std::panic::catch_unwind(|| sim::run(&Options { trace, ..Options::new(seed) })) {
        Ok(result) => result.map_err(|violation| violation.to_string()),
        Err(_) => Err(format!(
            "seed {seed}: an assertion of the core failed, see above\n\
             replay: cargo xtask simulate --first {seed} --seeds 1 --trace"
        )),
    }
}

fn main() -> ExitCode {
    let arguments = match arguments() {
        Ok(arguments) => arguments,
        Err(text) => {
            eprintln!("error: {text}");
            return ExitCode::FAILURE;
        }
    };
    let (next, done, failed) = (AtomicU64::new(arguments.first), AtomicU64::new(0), AtomicBool::new(false));
    let end = arguments.first.saturating_add(arguments.seeds);
    let total = Mutex::new(Summary::default());
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..arguments.threads {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        break;
                    }
                    match run(seed, arguments.trace) {
                        Ok(summary) => total.lock().expect("no thread panics with it").add(&summary),
                        Err(text) => {
                            if !failed.swap(true, Ordering::Relaxed) {
                                println!("{text}");
                            }
                        }
                    }
                    let count = done.fetch_add(1, Ordering::Relaxed) + 1;
                    if count % PROGRESS_SEEDS == 0 {
                        println!("{count} seeds, {:.1} s", start.elapsed().as_secs_f32());
                    }
                }
            });
        }
    });
    let total = total.into_inner().expect("no thread panics with it");
    println!("{} seeds in {:.1} s: {total}", done.into_inner(), start.elapsed().as_secs_f32());
    if failed.into_inner() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
