//! `cargo xtask test`: everything that must hold, cheapest first, stopping at the first failure.
//!
//! End-to-end tests are those marked `#[ignore = "e2e: …"]`: a plain `cargo test` anywhere shows them as ignored with that reason,
//! and this command runs them, optimised, as root, and beside one another only where xtask/nextest.toml says so. Long runs on demand
//! read an environment variable of their own and do a short version without it.

mod selection;

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::progress::{Background, cargo, loud_step, output, run};
use crate::{fuzz, perf, setup, simulate, tidy};
use selection::{SMALL_TEST, checked, has_dpdk, released};

/// Crates with code that is compiled only where SPDK is installed.
const SPDK_PARTS: [&str; 8] = ["-p", "spdk-sys", "-p", "storage-log", "-p", "rig", "--features", "rig/spdk"];

const DPDK_SKIPPED: &str = "SKIPPED: uplinks that DPDK drives, because there is no DPDK (Debian: libdpdk-dev and dpdk)";

/// Which parts to run; without any flag all of them.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only what needs neither root nor the test bed
    #[arg(long, conflicts_with = "e2e")]
    fast: bool,
    /// Only the end-to-end tests
    #[arg(long)]
    e2e: bool,
    /// Run only tests whose name contains one of these
    filters: Vec<String>,
}

/// Runs the parts.
///
/// # Errors
/// At the first part that fails.
pub fn test(arguments: &Arguments) -> Result<()> {
    std::env::set_current_dir(setup::workspace())?;
    let bed = if !arguments.fast && rig::is_root() { Some(begin_set_up()?) } else { None };
    let nextest = has_nextest();
    if !nextest {
        println!("cargo-nextest is not installed: using cargo test, which is slower and has no time limits");
        println!("  (to install it: cargo install --locked cargo-nextest)");
    }
    if !arguments.e2e {
        checks()?;
        fast_tests(nextest, &arguments.filters)?;
    }
    if !arguments.fast && !arguments.e2e && arguments.filters.is_empty() {
        simulate::prove(simulate::PROOF_SEEDS, &[])?;
        fuzz::in_ci()?;
    }
    if !arguments.fast {
        e2e_tests(nextest, &arguments.filters, bed)?;
    }
    println!("== all passed");
    Ok(())
}

/// Installs what is missing, because that decides what is compiled, and begins to make the test bed: it is needed late, and
/// downloads while others compile.
fn begin_set_up() -> Result<Background> {
    setup::install_missing()?;
    let target = setup::workspace().join("target");
    fs::create_dir_all(&target).with_context(|| format!("cannot create {}", target.display()))?;
    let xtask = std::env::current_exe().context("cannot find this program")?;
    Background::start(Command::new(xtask).arg("setup"), target.join("setup.log"))
}

fn checks() -> Result<()> {
    loud_step("format", || run(cargo().args(["fmt", "--all", "--check"])))?;
    loud_step("tidiness", tidy::tidy)?;
    let lints = ["--all-targets", "--", "-D", "warnings"];
    loud_step("lints", || run(checked_cargo(&["clippy"]).args(lints)))?;
    if has_dpdk() {
        let without = ["clippy", "--workspace", perf::PEERS];
        loud_step("lints of what is compiled without DPDK", || run(cargo().args(without).args(lints)))?;
    }
    if has_spdk() {
        loud_step("lints of the SPDK engine", || run(cargo().args(["clippy"]).args(SPDK_PARTS).args(lints)))?;
    }
    Ok(())
}

fn fast_tests(nextest: bool, filters: &[String]) -> Result<()> {
    loud_step("unit, property and simulation tests", || {
        if nextest {
            let words = ["nextest", "run", "--no-tests", "pass", "--config-file", "xtask/nextest.toml"];
            run(checked_cargo(&words).args(filters))
        } else {
            one_filter(filters)?;
            run(checked_cargo(&["test", "--lib", "--bins", "--tests"]).args(filters))
        }
    })?;
    if has_spdk() {
        let spdk = ["test", "-p", "storage-log", "--features", "spdk", "--lib", "spdk::"];
        loud_step("unit tests of the SPDK engine", || run(cargo().args(spdk)))?;
    }
    if filters.is_empty() {
        loud_step("examples in the documentation", || run(&mut checked_cargo(&["test", "--doc", "--quiet"])))?;
        loud_step("measurements work", || smoke(&["core", "fabric"]))?;
    }
    Ok(())
}

/// That groups of measurements work, not what they measure: with the build that the fast tests use, which is there already and
/// checks more.
fn smoke(groups: &[&str]) -> Result<()> {
    run(checked_cargo(&["build"]).args(["--bin", perf::PROGRAM]).args(SMALL_TEST))?;
    groups.iter().try_for_each(|group| perf::smoke(group))
}

fn e2e_tests(nextest: bool, filters: &[String], bed: Option<Background>) -> Result<()> {
    let Some(bed) = bed else {
        bail!(
            "the end-to-end tests make network namespaces and mounts, so they need root; start this again as root, \
             or leave them out with «cargo xtask test --fast»"
        );
    };
    loud_step("test bed", || bed.finish())?;
    dpdk_tests(filters)?;
    if filters.is_empty() {
        loud_step("measurements of syncvm work", || smoke(&["syncvm"]))?;
        loud_step("measurements against peers work", || smoke(&["log", "consensus"]))?;
    }
    loud_step("programs under test, and the end-to-end tests", || {
        run(cargo().args(["build", "--lib", "--bins"]).args(released()?))?;
        if has_spdk() {
            run(cargo().args(["build", "--release"]).args(SPDK_PARTS).args(["--bin", rig::nvme_guest::PROGRAM]))?;
        }
        Ok(())
    })?;
    if filters.is_empty() {
        loud_step("measurements with guests work", || smoke(&["dataplane", "services", "failover"]))?;
    }
    loud_step("end-to-end tests", || {
        let mut command = cargo();
        if nextest {
            let config = ["--config-file", "xtask/nextest.toml", "--profile", "e2e", "--run-ignored", "only"];
            run(command.args(["nextest", "run"]).args(config).args(released()?).args(filters))
        } else {
            one_filter(filters)?;
            run(command.arg("test").args(released()?).args(filters).args(["--", "--ignored", "--test-threads=1"]))
        }
    })?;
    if !has_spdk() {
        // Again and here, because nextest shows no output of tests that pass.
        println!("{}", rig::nvme_guest::SKIPPED);
    }
    Ok(())
}

/// Ports that DPDK drives. Behind the set-up, which makes the switch that they are connected to.
fn dpdk_tests(filters: &[String]) -> Result<()> {
    if !has_dpdk() {
        println!("{DPDK_SKIPPED}");
        return Ok(());
    }
    // One process, because DPDK starts once in it.
    loud_step("tests of what needs DPDK", || run(checked_cargo(&["test", "--test", "dpdk"]).arg("--").args(filters)))
}

/// Whether an SPDK is installed; what needs one is left out otherwise.
fn has_spdk() -> bool {
    rig::nvme_guest::spdk_version().is_some()
}

/// Builds the daemon, its agent and the rig's clients, optimised: what the demo and the measurements start.
///
/// # Errors
/// What cargo says.
pub fn build_programs() -> Result<()> {
    run(cargo().args(["build", "--release", "--workspace", "--exclude", "xtask"]))
}

fn one_filter(filters: &[String]) -> Result<()> {
    if filters.len() > 1 {
        bail!("cargo test takes one filter only; install cargo-nextest for more");
    }
    Ok(())
}

fn has_nextest() -> bool {
    output(cargo().args(["nextest", "--version"])).is_ok()
}

/// A cargo command on the unoptimised build.
fn checked_cargo(words: &[&str]) -> Command {
    let mut command = cargo();
    // Where SPDK is, with a DPDK of its own.
    command.args(words).args(checked()).env_remove("PKG_CONFIG_PATH");
    command
}
