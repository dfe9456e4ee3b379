//! `cargo xtask demo`: a guest on three hosts survives the death of its leader, shown to a person.
//!
//! Everything is real: the released programs, stock QEMU, a Redis in a Linux guest, a client that checks each answer. A run
//! that breaks off still prints what it measured; the missing figures break their promises, so that the table, the JSON
//! and the exit status tell the same.

mod baseline;
mod clients;
mod scenario;
mod syncvms;
mod watch;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rig::report::{DemoReport, Style};
use rig::{Cluster, ClusterOptions, Service, Testbed};

use crate::progress::{loud_step, step};
use crate::{setup, test};

use scenario::Scenario;

/// How long, from which seed, and what becomes of it.
#[derive(clap::Args)]
pub struct Arguments {
    /// Also write the result to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Seconds of load while protected; the other measurements take half of it, at most 5 s
    #[arg(long, value_name = "SECS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub duration: u64,
    /// Decides keys, values and times of failures
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Leave everything running at the end, until Ctrl-C, and print how to reach it
    #[arg(long)]
    pub keep: bool,
}

impl Arguments {
    /// The window of the promised figure.
    fn long_window(&self) -> Duration {
        Duration::from_secs(self.duration)
    }

    /// The window of everything else.
    fn short_window(&self) -> Duration {
        Duration::from_millis((self.duration * 500).clamp(1_000, 5_000))
    }
}

/// Which cores the guests and the client run on: the same in all measurements, so that they can be compared.
#[derive(Clone, Copy)]
struct Cores {
    leader: usize,
    secondary: usize,
    client: usize,
}

impl Cores {
    fn of_this_machine() -> Self {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let last = count - 1;
        Self { leader: 0, secondary: last.min(1), client: if count > 3 { 2 } else { last.min(1) } }
    }
}

/// Sets up what is missing and runs the demo. Its success is the demo's.
///
/// # Errors
/// When something cannot be set up, or the group did not survive.
pub fn run(arguments: &Arguments) -> Result<()> {
    if !rig::is_root() {
        return Err(rig::RigError::NotRoot.into());
    }
    let start = Instant::now();
    setup::run(false)?;
    loud_step("programs", test::build_programs)?;
    println!("== demo");
    let bed = step("three hosts and a client on one switch", || Ok(Testbed::new()?))?;
    let mut report = DemoReport {
        seed: arguments.seed,
        connections: clients::CONNECTIONS.into(),
        history_connections: clients::HISTORY_CONNECTIONS.into(),
        in_flight: clients::IN_FLIGHT,
        verification_incomplete: Some("the demo did not get that far".into()),
        ..DemoReport::default()
    };
    let outcome = perform(&bed, arguments, &mut report);
    report.duration_ms = start.elapsed().as_secs_f64() * 1000.0;
    print!("\n{}", report.render(Style::detect()));
    let written = arguments.json.as_deref().map_or(Ok(()), |path| write_json(path, &report));
    let verdict = outcome.and(written).and_then(|()| judge(&report));
    if verdict.is_err() {
        bed.keep_logs()?;
    }
    if arguments.keep {
        leave_running(&bed, &verdict)?;
    }
    verdict
}

fn perform(bed: &Testbed, arguments: &Arguments, report: &mut DemoReport) -> Result<()> {
    let cores = Cores::of_this_machine();
    baseline::measure(bed, arguments, cores, report)?;
    let mut options = ClusterOptions::new(Service::Redis, own_programs(bed)?);
    options.node = String::new();
    // The third host is free to use what is idle: it serves in no measurement of throughput.
    options.qemu_cores = vec![vec![cores.leader], vec![cores.secondary], Vec::new()];
    // A real host has cores beside the guest's; here the leader's guest keeps its own, as the baseline's does.
    options.daemon_cores = vec![cores.secondary];
    let cluster = Cluster::new(bed, options)?;
    let mut scenario = Scenario::new(&cluster, arguments, cores, report);
    let outcome = scenario.play();
    // What the clients found counts in any case.
    let found = scenario.finish();
    outcome.and(found)
}

/// Where this run's copy of the programs lies: a build while the demo runs must not mix versions.
fn programs_directory(bed: &Testbed) -> PathBuf {
    bed.directory().join("bin")
}

fn own_programs(bed: &Testbed) -> Result<PathBuf> {
    let directory = programs_directory(bed);
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    for name in ["plover", "libplover_agent.so", clients::PROGRAM] {
        let built = rig::release_program(name)?;
        fs::copy(&built, directory.join(name)).with_context(|| format!("cannot copy {}", built.display()))?;
    }
    Ok(directory)
}

fn write_json(path: &Path, report: &DemoReport) -> Result<()> {
    let mut text = serde_json::to_string_pretty(report).context("cannot write the report as JSON")?;
    text.push('\n');
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn judge(report: &DemoReport) -> Result<()> {
    let promises = report.promises();
    let broken: Vec<&str> =
        promises.iter().filter(|promise| !promise.kept).map(|promise| promise.name.as_str()).collect();
    if broken.is_empty() {
        return Ok(());
    }
    bail!("broken: {}", broken.join("; "))
}

/// Prints how to reach everything and waits for Ctrl-C, which ends this process and with it the test bed.
fn leave_running(bed: &Testbed, verdict: &Result<()>) -> Result<()> {
    let programs = programs_directory(bed);
    let client = bed.client().namespace().name();
    println!("\nStill running, until Ctrl-C. The guest's Redis, as the client sees it:");
    println!("  ip netns exec {client} redis-cli -h {}", rig::testbed::GUEST_IP);
    println!(
        "  ip netns exec {client} {} redis-load '{{\"address\":\"{}:6379\",\"duration_ms\":5000}}'",
        programs.join(clients::PROGRAM).display(),
        rig::testbed::GUEST_IP
    );
    println!("What each host says, and its logs:");
    for host in bed.hosts() {
        println!(
            "  {} --config {} status",
            programs.join("plover").display(),
            host.directory().join("node.toml").display()
        );
        println!("    {}", host.directory().display());
    }
    if let Err(error) = verdict {
        println!("This run FAILED: {error:#}");
    }
    loop {
        std::thread::park();
    }
}
