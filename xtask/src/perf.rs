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
    /// Of the group services: how often the guest is booted under each policy [default: 3]
    #[arg(long, value_name = "N")]
    passes: Option<u16>,
}

impl Arguments {
    /// Whether a row may be wanted whose id begins with `area`.
    fn wants_some(&self, area: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|prefix| prefix.starts_with(area) || area.starts_with(prefix))
    }

    fn wants_guests(&self) -> bool {
        rig::is_root() && self.wants_some("guest.")
    }

    fn wants_rdma(&self) -> bool {
        !self.smoke && rig::is_root() && self.wants_some("fabric.rdma")
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

/// A smoke run of `group` by programs that `cargo xtask test` has built: that it works, not what it measures.
///
/// # Errors
/// As [`perf`].
pub fn smoke(group: &str) -> Result<()> {
    fetch(&Arguments { group: group.to_owned(), smoke: true, only: Vec::new(), passes: None })?;
    let program = setup::workspace().join("target/debug").join(PROGRAM);
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
    let group = arguments.group.as_str();
    if matches!(group, "services" | "failover") || (group == "dataplane" && arguments.wants_guests()) {
        loud_step("programs that the guests run on", test::build_programs)?;
    }
    if group == "fabric" && arguments.wants_rdma() {
        let program = ["build", "--release", "-p", rig::rdma_guest::PROGRAM];
        loud_step("program that measures RDMA in a guest", || {
            run(cargo().current_dir(setup::workspace()).args(program))
        })?;
    }
    Ok(())
}

/// The command that measures. A smoke run need not be optimised: figures do not matter.
fn harness(arguments: &Arguments) -> Command {
    let Arguments { group, smoke, only, passes } = arguments;
    let smoke = *smoke;
    let mut command = cargo();
    command
        .current_dir(setup::workspace())
        .args(["run", "--quiet", "-p", PROGRAM])
        .args((smoke || group == "consensus").then_some(PEERS))
        .args((!smoke).then_some("--release"))
        .args(["--", group])
        .args(smoke.then_some("--smoke"))
        .args(only.iter().flat_map(|prefix| ["--only", prefix]))
        .args(passes.map(|passes| format!("--passes={passes}")));
    command
}
