//! `fabric.rdma.rtt`: a message there and back over the RDMA lane, against bare RDMA WRITE, in one guest with soft-RoCE.
//!
//! Few machines have an RDMA device, and Debian's kernel in a guest has one. Emulated, it is slow; what both sides share
//! is the same, so the ratio says what the lane adds. The guest alternates the two sides and prints what it measured
//! (`rig-rdma-guest rtt`); this module boots it and reads that.

use anyhow::{Context, Result, ensure};
use rig::{Artifacts, Deadline, Testbed, program, rdma_guest};
use serde::Deserialize;

use crate::Effort;
use crate::group::Sink;
use crate::sample::{Better, Figure, compare};

/// Its row.
pub(super) const ID: &str = "fabric.rdma.rtt";
/// Under TCG on a busy machine.
const LIMIT_SECS: u64 = 300;

/// A line of the guest's.
#[derive(Deserialize)]
struct Run {
    ours_us: f64,
    bare_us: f64,
}

/// Measures; where no guest can be booted it says so, and measures nothing.
///
/// # Errors
/// The guest fails.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    if let Some(why) = obstacle() {
        eprintln!("********** fabric.rdma.rtt is not measured: {why} **********");
        return Ok(());
    }
    let runs = measure(effort)?;
    let figure = Figure { id: ID, unit: "us", better: Better::Lower };
    let (mut ours, mut bare) = (runs.iter().map(|run| run.ours_us), runs.iter().map(|run| run.bare_us));
    let row = compare(
        figure,
        effort,
        "bare RDMA WRITE ping-pong",
        || ours.next().context("the guest measured too few runs"),
        || bare.next().context("the guest measured too few runs"),
    )?;
    sink(row)
}

fn obstacle() -> Option<String> {
    if !rig::is_root() {
        return Some("guests need root".to_owned());
    }
    let missing = Artifacts::locate().err().or_else(|| program(rdma_guest::PROGRAM).err());
    missing.map(|error| error.to_string())
}

/// In the order of [`compare`], a warm-up of each first.
fn measure(effort: Effort) -> Result<Vec<Run>> {
    let bed = Testbed::new()?;
    let ip = rig::testbed::GUEST_IP;
    let (runs, trips) = (effort.runs() + 1, effort.pick(2_000, 50));
    let words = ["rtt", &ip.to_string(), &runs.to_string(), &trips.to_string()];
    let guest = rdma_guest::boot(bed.host(0), "rtt", ip, "", &words)?;
    let outcome = guest.wait(Deadline::after_secs(LIMIT_SECS))?;
    ensure!(outcome.status == Some(0), "the guest ended with this on its console:\n{}", outcome.console);
    let lines = outcome.console.lines().filter(|line| line.starts_with('{'));
    lines.map(|line| serde_json::from_str(line).with_context(|| format!("«{line}» is no run"))).collect()
}
