//! `cargo xtask perf GROUP`: builds the measuring harness optimised and hands over to it.

use std::process::Command;

use anyhow::Result;

use crate::progress::{cargo, loud_step, run};
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

    fn wants_guests(&self) -> bool {
        match self.group.as_str() {
            "services" | "failover" => true,
            "dataplane" => rig::is_root() && self.wants_some("guest."),
            _ => false,
        }
    }

    fn wants_rdma(&self) -> bool {
        !self.smoke && rig::is_root() && self.wants_some("fabric.rdma")
    }

    /// How the harness and what it starts are compiled. Figures of a smoke run do not matter, but guests must not take for ever.
    fn profile(&self) -> &'static str {
        match (self.smoke, self.wants_guests()) {
            (false, _) => "release",
            (true, true) => test::E2E_PROFILE,
            (true, false) => "dev",
        }
    }
}

/// Switches on what consensus is compared with. Half a minute of compilation, so that a plain `cargo test` leaves it
/// out; `cargo xtask test` compiles it once, with everything else.
pub const PEERS: &str = "--features=perf/peers";

/// The harness, by the name that cargo gives it.
pub const PROGRAM: &str = "perf";

/// Runs the group in a process of its own: xtask itself is not optimised.
///
/// # Errors
/// When what it is compared with cannot be fetched, or the harness fails.
pub fn perf(arguments: &Arguments) -> Result<()> {
    fetch(arguments)?;
    build(arguments)?;
    loud_step(format!("perf {}", arguments.group), || run(&mut harness(arguments)))
}

/// A smoke run of `group` by programs that `cargo xtask test` has built in that directory of target/: that it works, not what it
/// measures.
///
/// # Errors
/// As [`perf`].
pub fn smoke(group: &str, built: &str) -> Result<()> {
    fetch(&Arguments { group: group.to_owned(), smoke: true, only: Vec::new() })?;
    let program = setup::workspace().join("target").join(built).join(PROGRAM);
    loud_step(format!("perf {group}"), || run(Command::new(program).args([group, "--smoke"])))
}

/// What guests run on, and what things are compared with.
fn fetch(arguments: &Arguments) -> Result<()> {
    match arguments.group.as_str() {
        "log" | "consensus" => setup::peers(),
        "dataplane" => {
            setup::dpdk()?;
            // Without root there are no guests; what is measured before them still is, then the harness says so.
            if arguments.wants_guests() { setup::run(false) } else { Ok(()) }
        }
        "services" => setup::run(false).and_then(|()| setup::load_generators()),
        "failover" => setup::run(false),
        // For RDMA, in a guest. The smoke run measures it if these are there already.
        "fabric" if arguments.wants_rdma() => setup::run(false),
        _ => Ok(()),
    }
}

/// The programs that guests run on or in; the harness itself is built when it is run.
fn build(arguments: &Arguments) -> Result<()> {
    if arguments.wants_guests() {
        loud_step("programs that the guests run on", || test::build_programs(arguments.profile()))?;
    }
    if arguments.group == "fabric" && arguments.wants_rdma() {
        let program = ["build", "--release", "-p", rig::rdma_guest::PROGRAM];
        loud_step("program that measures RDMA in a guest", || {
            run(cargo().current_dir(setup::workspace()).args(program))
        })?;
    }
    Ok(())
}

/// The command that measures.
fn harness(arguments: &Arguments) -> Command {
    let Arguments { group, smoke, only } = arguments;
    let smoke = *smoke;
    let profile = arguments.profile();
    let mut command = cargo();
    command
        .current_dir(setup::workspace())
        .args(["run", "--quiet", "--profile", profile, "-p", PROGRAM])
        .args((profile == "dev" || group == "consensus").then_some(PEERS))
        .args(["--", group])
        .args(smoke.then_some("--smoke"))
        .args(only.iter().flat_map(|prefix| ["--only", prefix]));
    command
}
