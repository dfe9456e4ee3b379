//! The mutation proof: wrong variants of the consensus core from `consensus/mutants.toml`, each of which the
//! simulator must notice. The product contains none of them: a copy of the crate's sources under `target/mutants`
//! gets a switch at each place, so that one program holds all variants. A copy per variant is simpler and was too
//! slow: forty times the crate to compile.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::progress::{cargo, run, step};

/// Relative to the workspace, which is the current directory.
const SOURCES: &str = "consensus/src";
const LIST: &str = "consensus/mutants.toml";
const SCRATCH: &str = "target/mutants";
/// A variant may go round in circles inside one step, where the simulator cannot count events.
const RUN_DEADLINE: Duration = Duration::from_secs(300);
const POLL_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Deserialize)]
struct List {
    mutant: Vec<Mutant>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    name: String,
    rule: String,
    file: String,
    #[serde(default)]
    before: String,
    find: String,
    replace: String,
}

/// Makes the variants, builds them and runs each until it is noticed.
///
/// # Errors
/// When one cannot be made, or is not noticed within `seeds`.
pub fn prove(seeds: u64, only: &[String]) -> Result<()> {
    let text = fs::read_to_string(LIST).with_context(|| format!("cannot read {LIST}"))?;
    let list: List = toml::from_str(&text).with_context(|| format!("{LIST} is not understood"))?;
    let wanted =
        |mutant: &Mutant| only.is_empty() || only.iter().any(|word| *word == mutant.name || *word == mutant.rule);
    let mutants: Vec<Mutant> = list.mutant.into_iter().filter(wanted).collect();
    ensure!(!mutants.is_empty(), "no variant in {LIST} has such a name or rule");
    step(format!("{} variants", mutants.len()), || write_all(&mutants))?;
    let manifest = format!("{SCRATCH}/Cargo.toml");
    run(cargo().args(["build", "--quiet", "--release", "--offline", "--manifest-path", &manifest]))?;
    run_with_deadline(Command::new(format!("{SCRATCH}/target/release/variants")).arg(seeds.to_string()))
}

fn write_all(mutants: &[Mutant]) -> Result<()> {
    let scratch = Path::new(SCRATCH);
    let mut placed = vec![false; mutants.len()];
    for file in files_below(Path::new(SOURCES))? {
        let name = file.strip_prefix(SOURCES).expect("it was found there");
        let mut text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for (at, mutant) in mutants.iter().enumerate().filter(|(_, mutant)| name == Path::new(&mutant.file)) {
            text = with_switch(&text, at, mutant).with_context(|| format!("variant {} of {LIST}", mutant.name))?;
            placed[at] = true;
        }
        if name == Path::new("lib.rs") {
            text += SWITCH;
        }
        write(&scratch.join("src").join(name), &text)?;
    }
    if let Some((mutant, _)) = mutants.iter().zip(placed).find(|(_, placed)| !placed) {
        bail!("variant {} of {LIST}: there is no file {} below {SOURCES}", mutant.name, mutant.file);
    }
    let row = |mutant: &Mutant| format!("    ({:?}, {:?}),\n", mutant.name, mutant.rule);
    let table: String = mutants.iter().map(row).collect();
    write(&scratch.join("src/main.rs"), &RUNNER.replace("    // variants\n", &table))?;
    // The same versions as everywhere; cargo strikes out what is not needed here.
    write(&scratch.join("Cargo.lock"), &fs::read_to_string("Cargo.lock").context("cannot read Cargo.lock")?)?;
    write(&scratch.join("Cargo.toml"), MANIFEST)
}

/// Puts a switch between the right expression and the wrong one.
fn with_switch(text: &str, number: usize, mutant: &Mutant) -> Result<String> {
    let (before, find, replace) = (&mutant.before, &mutant.find, &mutant.replace);
    let place = format!("{before}{find}");
    let found = text.matches(&place).count();
    ensure!(found == 1, "what to replace occurs {found} times in {}: adapt the list", mutant.file);
    let switch = format!("{before}(if crate::variant_is({number}) {{ {replace} }} else {{ {find} }})");
    Ok(text.replace(&place, &switch))
}

fn files_below(folder: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() { files.extend(files_below(&path)?) } else { files.push(path) }
    }
    Ok(files)
}

/// Leaves a file alone that is right already, so that cargo builds only what changed.
fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let folder = path.parent().expect("every path here has one");
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn run_with_deadline(command: &mut Command) -> Result<()> {
    let deadline = Instant::now() + RUN_DEADLINE;
    let mut child = command.spawn().context("cannot start the variants")?;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => bail!("not all variants were noticed, or they broke off ({status})"),
            None if Instant::now() >= deadline => {
                child.kill()?;
                child.wait()?;
                bail!("the variants ran for {} s; one goes round in circles in one step", RUN_DEADLINE.as_secs());
            }
            None => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

const MANIFEST: &str = r#"[package]
name = "variants"
version = "0.0.0"
edition = "2024"

[workspace]

[lints.rust]
warnings = "allow"

[dependencies]
crc-fast = { version = "1.10", default-features = false, features = ["std"] }
crc32c = "0.6"
thiserror = "2"

[profile.release]
opt-level = 2
debug = false
"#;

/// Which variant a thread runs; the last number is none of them.
const SWITCH: &str = r#"
thread_local! {
    pub static VARIANT: std::cell::Cell<usize> = const { std::cell::Cell::new(usize::MAX) };
}

pub(crate) fn variant_is(number: usize) -> bool {
    VARIANT.get() == number
}
"#;

/// The program: every variant runs seeds from 1 on until one shows a violation.
const RUNNER: &str = r#"
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use variants::sim::{self, Options};

/// Name and rule.
const VARIANTS: &[(&str, &str)] = &[
    // variants
];

/// A panic is an assertion of the core, or of the simulator, that failed.
fn noticed(seeds: u64) -> Option<(u64, String)> {
    (1..=seeds).find_map(|seed| match std::panic::catch_unwind(|| sim::run(&Options::new(seed))) {
        Ok(Ok(_)) => None,
        Ok(Err(violation)) => Some((seed, violation.what.clone())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
            Some((seed, format!("panic: {}", text.unwrap_or_default())))
        }
    })
}

fn main() {
    let seeds: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).expect("a number of seeds");
    std::panic::set_hook(Box::new(|_| {}));
    let (next, unnoticed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some((name, rule)) = VARIANTS.get(number) else { break };
                variants::VARIANT.set(number);
                match noticed(seeds) {
                    Some((seed, what)) => println!("   {rule:>4} {name:<48} seed {seed}: {what}"),
                    None => {
                        unnoticed.store(true, Ordering::Relaxed);
                        println!("   {rule:>4} {name:<48} UNNOTICED in {seeds} seeds");
                    }
                }
            });
        }
    });
    std::process::exit(i32::from(unnoticed.into_inner()));
}
"#;
