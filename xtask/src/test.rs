//! `cargo xtask test`: everything that must hold, cheapest first, stopping at the first failure.
//!
//! End-to-end tests are those of `rig`, `qemu-vhost-user` and `storage-log` marked `#[ignore = "e2e: …"]`: a plain `cargo test` anywhere shows
//! them as ignored with that reason, and this command runs them, one at a time, optimised, as root. Long
//! runs on demand read an environment variable of their own and do a short version without it.

use std::process::Command;

use anyhow::{Result, bail};

use crate::progress::{loud_step, output, run};
use crate::{fuzz, perf, setup, simulate, tidy};

/// Crates with code that is compiled only where SPDK is installed.
const SPDK_PARTS: [&str; 8] = ["-p", "spdk-sys", "-p", "storage-log", "-p", "rig", "--features", "rig/spdk"];

/// Crates with code that is compiled only where DPDK is installed.
const DPDK_PARTS: [&str; 8] =
    ["-p", "dpdk-sys", "-p", "dataplane", "-p", "qemu-vhost-user", "--features", "qemu-vhost-user/dpdk"];
const DPDK_SKIPPED: &str = "SKIPPED: uplinks that DPDK drives, because there is no DPDK (Debian: libdpdk-dev and dpdk)";

/// The packages that have end-to-end tests.
const E2E: [&str; 6] = ["-p", "rig", "-p", "qemu-vhost-user", "-p", "storage-log"];

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
        e2e_tests(nextest, &arguments.filters)?;
    }
    println!("== all passed");
    Ok(())
}

fn checks() -> Result<()> {
    loud_step("format", || run(cargo().args(["fmt", "--all", "--check"])))?;
    let lints = ["--all-targets", "--", "-D", "warnings"];
    loud_step("lints", || run(cargo().args(["clippy", "--workspace", perf::PEERS]).args(lints)))?;
    if has_spdk() {
        loud_step("lints of the SPDK engine", || run(cargo().args(["clippy"]).args(SPDK_PARTS).args(lints)))?;
    }
    loud_step("tidiness", tidy::tidy)
}

fn fast_tests(nextest: bool, filters: &[String]) -> Result<()> {
    loud_step("unit, property and simulation tests", || {
        let mut command = cargo();
        if nextest {
            let config = ["--config-file", "xtask/nextest.toml", "--workspace", perf::PEERS];
            run(command.args(["nextest", "run", "--no-tests", "pass"]).args(config).args(filters))
        } else {
            one_filter(filters)?;
            run(command.args(["test", "--workspace", perf::PEERS, "--lib", "--bins", "--tests"]).args(filters))
        }
    })?;
    if has_spdk() {
        let spdk = ["test", "-p", "storage-log", "--features", "spdk", "--lib", "spdk::"];
        loud_step("unit tests of the SPDK engine", || run(cargo().args(spdk)))?;
    }
    if filters.is_empty() {
        loud_step("examples in the documentation", || run(cargo().args(["test", "--workspace", "--doc", "--quiet"])))?;
        loud_step("measurements work", || perf::smoke("core").and_then(|()| perf::smoke("fabric")))?;
    }
    Ok(())
}

fn e2e_tests(nextest: bool, filters: &[String]) -> Result<()> {
    if !rig::is_root() {
        bail!(
            "the end-to-end tests make network namespaces and mounts, so they need root; start this again as root, \
             or leave them out with «cargo xtask test --fast»"
        );
    }
    loud_step("test bed", || setup::run(false))?;
    dpdk_tests(filters)?;
    if filters.is_empty() {
        loud_step("measurements of syncvm work", || perf::smoke("syncvm"))?;
        loud_step("measurements against peers work", || perf::smoke("log").and_then(|()| perf::smoke("consensus")))?;
    }
    loud_step("programs under test", || {
        build_programs()?;
        if has_spdk() {
            run(cargo().args(["build", "--release"]).args(SPDK_PARTS).args(["--bin", rig::nvme_guest::PROGRAM]))?;
        }
        Ok(())
    })?;
    if filters.is_empty() {
        loud_step("measurements with guests work", || {
            perf::smoke("dataplane").and_then(|()| perf::smoke("services")).and_then(|()| perf::smoke("failover"))
        })?;
    }
    loud_step("end-to-end tests", || {
        let mut command = cargo();
        if nextest {
            let config = ["--config-file", "xtask/nextest.toml", "--profile", "e2e"];
            run(command
                .args(["nextest", "run", "--release", "--run-ignored", "only"])
                .args(config)
                .args(E2E)
                .args(filters))
        } else {
            one_filter(filters)?;
            let which = ["test", "--release", "--tests"];
            run(command.args(which).args(E2E).args(filters).args(["--", "--ignored", "--test-threads=1"]))
        }
    })?;
    if !has_spdk() {
        // Again and here, because nextest shows no output of tests that pass.
        println!("{}", rig::nvme_guest::SKIPPED);
    }
    Ok(())
}

/// What needs DPDK. Behind the set-up, which installs it.
fn dpdk_tests(filters: &[String]) -> Result<()> {
    if !setup::has_library("libdpdk") {
        println!("{DPDK_SKIPPED}");
        return Ok(());
    }
    let with_dpdk = |words: &[&str]| {
        let mut command = cargo();
        command.args(words).args(DPDK_PARTS).env_remove("PKG_CONFIG_PATH");
        command
    };
    loud_step("lints of what needs DPDK", || {
        run(with_dpdk(&["clippy"]).args(["--all-targets", "--", "-D", "warnings"]))
    })?;
    loud_step("tests of what needs DPDK", || {
        // One process, because DPDK starts once in it; the configuration of the daemon knows the feature.
        run(with_dpdk(&["test"]).args(["--test", "dpdk", "--lib", "--"]).args(dpdk_filters(filters)))
    })
}

/// Tests whose outcome depends on DPDK, or those that were asked for.
fn dpdk_filters(filters: &[String]) -> Vec<&str> {
    match filters {
        [] => vec!["dpdk", "config::", "kernel::", "loopback::", "switch::"],
        some => some.iter().map(String::as_str).collect(),
    }
}

/// Whether an SPDK is installed; what needs one is left out otherwise.
fn has_spdk() -> bool {
    rig::nvme_guest::spdk_version().is_some()
}

/// Builds the daemon, its agent and the rig's clients, optimised: what the demo and the end-to-end tests start.
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

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}
