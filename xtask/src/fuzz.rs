//! `cargo xtask fuzz`: every target under libFuzzer, with coverage, on a stable compiler.
//!
//! The flags are those of cargo-fuzz without the sanitizer, which only nightly has: the code under test checks its bounds by
//! itself, and guest memory has unmapped pages around it. What a run finds goes to `target/fuzz`; a finding is shrunk by hand
//! or by libFuzzer, mended, and its input added to `fuzz/corpus`, where a test replays it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::progress::{cargo, loud_step, run};
use crate::setup;

/// What a stranger can send first: a minute each in CI. The others get what time is left.
const FIRST_IN_CI: [&str; 4] = ["vhost-user", "rings", "fabric-hello", "fabric-frames"];
const FIRST_SECONDS: u32 = 60;
const OTHERS_SECONDS: u32 = 15;
/// At the same time: CI has two cores.
const PARALLEL: usize = 2;
const FLAGS: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions",
];
/// One input may take this long, seconds; the targets' own deadlines are shorter or equal.
const INPUT_LIMIT_SECONDS: u32 = 15;
const MEMORY_LIMIT_MIB: u32 = 2048;
/// Longer inputs only make the search slower.
const MAX_INPUT_BYTES: u32 = 4096;
/// With it, the flags do not reach build scripts and macros.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// In the workspace's Cargo.toml.
const PROFILE: &str = "fuzz";

/// What to fuzz.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only these targets
    targets: Vec<String>,
    /// How long each runs
    #[arg(long, default_value_t = FIRST_SECONDS)]
    seconds: u32,
    /// Afterwards keep in fuzz/corpus what reaches new code, and nothing else
    #[arg(long)]
    keep: bool,
}

/// Runs the targets.
///
/// # Errors
/// When one of them crashes or hangs: with the command that repeats it.
pub fn fuzz(arguments: &Arguments) -> Result<()> {
    let all = targets()?;
    if let Some(unknown) = arguments.targets.iter().find(|name| !all.contains(name)) {
        bail!("no fuzz target is called {unknown}; there are: {}", all.join(", "));
    }
    let targets = if arguments.targets.is_empty() { &all } else { &arguments.targets };
    setup::install_missing()?;
    let program = build()?;
    for together in targets.chunks(PARALLEL) {
        let what = format!("fuzzing {} for {} s", together.join(" and "), arguments.seconds);
        loud_step(what, || run_together(&program, together, arguments.seconds))?;
    }
    if arguments.keep {
        for target in targets {
            loud_step(format!("keeping the corpus of {}", target), || keep(&program, target))?;
        }
    }
    Ok(())
}

/// The fuzz targets for a moment each, as part of the tests.
///
/// # Errors
/// As [`fuzz`].
pub fn in_ci() -> Result<()> {
    let (first, others) = targets()?.into_iter().partition(|name| FIRST_IN_CI.contains(&name.as_str()));
    fuzz(&Arguments { targets: first, seconds: FIRST_SECONDS, keep: false })?;
    fuzz(&Arguments { targets: others, seconds: OTHERS_SECONDS, keep: false })
}

/// Every target has a corpus of its name (a test of the crate `fuzz` holds that).
fn targets() -> Result<Vec<String>> {
    let corpora = setup::workspace().join("fuzz/corpus");
    let entries = fs::read_dir(&corpora).with_context(|| format!("cannot read {}", corpora.display()))?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

fn build() -> Result<PathBuf> {
    let directory = setup::workspace().join("target/fuzz");
    loud_step("building the fuzz targets with coverage", || {
        let mut cargo = cargo();
        cargo.current_dir(setup::workspace()).env("RUSTFLAGS", FLAGS.join(" ")).env("CARGO_TARGET_DIR", &directory);
        let words = ["build", "--profile", PROFILE, "-p", "fuzz", "--features", "libfuzzer", "--target", TRIPLE];
        run(cargo.args(words))?;
        Ok(directory.join(TRIPLE).join(PROFILE).join("fuzz"))
    })
}

fn run_together(program: &Path, targets: &[String], seconds: u32) -> Result<()> {
    let mut running = Vec::new();
    for target in targets {
        let log = log_of(target);
        let found = found_in(target);
        fs::create_dir_all(&found).with_context(|| format!("cannot create {}", found.display()))?;
        let output = fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = start(program, target);
        command.arg(format!("-max_total_time={seconds}")).arg(&found).arg(corpus_of(target));
        command.stdout(output.try_clone()?).stderr(output).stdin(Stdio::null());
        running.push((target, command.spawn().with_context(|| format!("cannot start {}", program.display()))?));
    }
    let mut failed = Vec::new();
    for (target, mut child) in running {
        let status = child.wait()?;
        let text = fs::read_to_string(log_of(target)).unwrap_or_default();
        let last = text.lines().rev().find(|line| line.starts_with('#')).unwrap_or("it did not start");
        println!("   {}: {last}", target);
        if !status.success() {
            let tail: Vec<_> = text.lines().rev().take(25).collect();
            println!("   {}", tail.into_iter().rev().collect::<Vec<_>>().join("\n   "));
            failed.push(target.as_str());
        }
    }
    let again = format!("PLOVER_FUZZ_TARGET=NAME target/fuzz/{TRIPLE}/{PROFILE}/fuzz FILE");
    ensure!(
        failed.is_empty(),
        "{} failed; the input is in target/fuzz/NAME-*, and «{again}» repeats it",
        failed.join(", ")
    );
    Ok(())
}

/// Replaces the corpus by the inputs that together reach everything that was reached.
fn keep(program: &Path, target: &str) -> Result<()> {
    let (corpus, found) = (corpus_of(target), found_in(target));
    let merged = found.with_extension("merged");
    fs::create_dir_all(&merged)?;
    let mut command = start(program, target);
    run(command.arg("-merge=1").arg(&merged).arg(&corpus).arg(&found))?;
    fs::remove_dir_all(&corpus)?;
    fs::create_dir_all(&corpus)?;
    for input in fs::read_dir(&merged)? {
        let input = input?;
        fs::copy(input.path(), corpus.join(input.file_name()))?;
    }
    Ok(fs::remove_dir_all(&merged)?)
}

fn start(program: &Path, target: &str) -> Command {
    let mut command = Command::new(program);
    let artifacts = setup::workspace().join("target/fuzz").join(format!("{}-", target));
    command
        .env("PLOVER_FUZZ_TARGET", target)
        .arg(format!("-max_len={MAX_INPUT_BYTES}"))
        .arg(format!("-timeout={INPUT_LIMIT_SECONDS}"))
        .arg(format!("-rss_limit_mb={MEMORY_LIMIT_MIB}"))
        .arg(format!("-artifact_prefix={}", artifacts.display()));
    command
}

fn corpus_of(target: &str) -> PathBuf {
    setup::workspace().join("fuzz/corpus").join(target)
}

fn found_in(target: &str) -> PathBuf {
    setup::workspace().join("target/fuzz/found").join(target)
}

fn log_of(target: &str) -> PathBuf {
    setup::workspace().join("target/fuzz").join(format!("{}.log", target))
}
