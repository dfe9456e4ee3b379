//! `cargo xtask perf GROUP`: builds the measuring harness optimised and hands over to it.

use std::process::Command;

use anyhow::Result;

use crate::progress::{loud_step, run};
use crate::{setup, test};

/// What to measure.
#[derive(clap::Args)]
pub struct Arguments {
    /// Group of measurements; «list» names them
    group: String,
    /// A few seconds only: shows that the measurement works, its figures mean nothing
    #[arg(long)]
    smoke: bool,
    /// Only rows whose id begins so, as `vhost.io`; may be given several times
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,
}

impl Arguments {
    /// Whether a row may be wanted whose id begins with `area`.
    fn wants_some(&self, area: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|prefix| prefix.starts_with(area) || area.starts_with(prefix))
    }
}

/// Switches on what consensus is compared with. Half a minute of compilation, so that a plain `cargo test` leaves it
/// out; `cargo xtask test` checks it once, in the build that it makes anyway.
pub const PEERS: &str = "--features=perf/peers";

/// Runs the group in a process of its own: xtask itself is not optimised.
///
/// # Errors
/// When what it is compared with cannot be fetched, or the harness fails.
pub fn perf(arguments: &Arguments) -> Result<()> {
    let group = &arguments.group;
    if matches!(group.as_str(), "log" | "consensus") {
        setup::peers()?;
    }
    if group == "dataplane" {
        setup::dpdk()?;
        // Without root there are no guests; what is measured before them still is, then the harness says so.
        if rig::is_root() && arguments.wants_some("guest.") {
            setup::run(false)?;
            loud_step("programs that the guests run on", test::build_programs)?;
        }
    }
    if matches!(group.as_str(), "services" | "failover") {
        setup::run(false)?;
        if group == "services" {
            setup::load_generators()?;
        }
        loud_step("programs that the guests run on", test::build_programs)?;
    }
    if group == "fabric" && !arguments.smoke && rig::is_root() && arguments.wants_some("fabric.rdma") {
        // For RDMA, in a guest. The smoke run measures it if these are there already.
        setup::run(false)?;
        let program = ["build", "--release", "-p", rig::rdma_guest::PROGRAM];
        loud_step("program that measures RDMA in a guest", || {
            run(cargo().current_dir(setup::workspace()).args(program))
        })?;
    }
    loud_step(format!("perf {group}"), || run(&mut harness(arguments)))
}

/// A smoke run of `group`: that it works, not what it measures.
///
/// # Errors
/// As [`perf`].
pub fn smoke(group: &str) -> Result<()> {
    perf(&Arguments { group: group.to_owned(), smoke: true, only: Vec::new() })
}

/// The command that measures. A smoke run takes the build that the tests use: it is there already, checks
/// more, and figures do not matter.
fn harness(arguments: &Arguments) -> Command {
    let Arguments { group, smoke, only } = arguments;
    let smoke = *smoke;
    let mut command = cargo();
    command
        .current_dir(setup::workspace())
        .args(["run", "--quiet", "-p", "perf"])
        .args((smoke || group == "consensus").then_some(PEERS))
        .args((!smoke).then_some("--release"))
        .args(["--", group])
        .args(smoke.then_some("--smoke"))
        .args(only.iter().flat_map(|prefix| ["--only", prefix]));
    command
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}
