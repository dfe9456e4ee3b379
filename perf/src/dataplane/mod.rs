//! Our vhost-user-net device against DPDK's `net_vhost`, with DPDK's `net_virtio_user` as the guest of both.
//!
//! Two CPUs: the guest's testpmd has one, the backend the other. Both set-ups stay for the whole row and get the CPUs in turns
//! ([`side`]), because a machine changes its mind about how near two of its CPUs are more often than a set-up can be made.

mod backend;
mod guest;
mod member;
mod ordered;
mod side;
mod testpmd;

use std::path::Path;

use anyhow::{Context, Result};

use crate::Effort;
use crate::group::Sink;
use crate::pin::two_cpus;
use crate::results::Scratch;
use crate::sample::{Better, Figure, paired};
use huge_pages::HugePages;
use side::Side;
use testpmd::{Counts, MEMORY_MIB};

/// Testpmds at a time: two guests and the peer.
const TESTPMDS: u64 = 3;
const PEER: &str = "DPDK net_vhost";

/// What happens, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The backend sends as fast as it can, the guest takes and drops.
    Rx,
    /// The guest sends as fast as it can, the backend takes and drops.
    Tx,
    /// Both send back what they receive; the guest begins with one burst.
    Io,
}

impl Mode {
    /// Name in row ids; testpmd's forwarding modes of guest and backend.
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Mode::Rx => ("rx", "rxonly", "txonly"),
            Mode::Tx => ("tx", "txonly", "rxonly"),
            Mode::Io => ("io", "io", "io"),
        }
    }

    /// Frames that the guest has dealt with. In `io` each frame counts once, when it comes back.
    fn work(self, guest: Counts) -> u64 {
        if self == Mode::Tx { guest.sent } else { guest.received }
    }
}

/// Measures everything.
///
/// # Errors
/// testpmd is missing or fails, or frames are lost or wrong; or what [`guest::run`] says.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    if sink.wants_some("vhost.") {
        devices(effort, sink)?;
    }
    if sink.wants_some("guest.") {
        guest::run(effort, sink)?;
    }
    Ok(())
}

fn devices(effort: Effort, sink: Sink<'_>) -> Result<()> {
    let cpus = two_cpus()?;
    if cpus[0] == cpus[1] {
        eprintln!("NOTE: one CPU only: guest and backend take turns, these figures mean nothing");
    }
    // For all processes, and a few for what DPDK cannot place in one piece; and the arenas of the replicas.
    let arenas = 3 * (member::ARENA_BYTES as u64 >> 21);
    let huge = HugePages::reserve(TESTPMDS * (MEMORY_MIB / 2 + 16) + arenas);
    if let Err(error) = &huge {
        eprintln!("NOTE: no huge pages ({error}): testpmd runs on normal pages, and both sides are slower for it");
    }
    let scratch = Scratch::new(&std::env::temp_dir(), "plover-perf-dataplane")?;
    for mode in [Mode::Rx, Mode::Tx, Mode::Io] {
        for frame_bytes in effort.pick(&[64, 1500][..], &[64][..]) {
            let run = Run {
                mode,
                ordered: false,
                frame_bytes: *frame_bytes,
                cpus,
                huge: huge.is_ok(),
                directory: scratch.path(),
                effort,
            };
            run.compare(sink)?;
        }
    }
    let (mode, directory) = (Mode::Rx, scratch.path());
    Run { mode, ordered: true, frame_bytes: 64, cpus, huge: huge.is_ok(), directory, effort }.compare(sink)
}

/// What to do in each run.
struct Run<'a> {
    mode: Mode,
    /// Ours go through a group of replicas before the guest gets them.
    ordered: bool,
    frame_bytes: usize,
    cpus: [usize; 2],
    huge: bool,
    directory: &'a Path,
    effort: Effort,
}

impl Run<'_> {
    fn compare(&self, sink: Sink<'_>) -> Result<()> {
        let ordered = if self.ordered { ".ordered" } else { "" };
        let id = format!("vhost.{}.{}{ordered}", self.mode.names().0, self.frame_bytes);
        if !sink.wants(&id) {
            return Ok(());
        }
        let figure = Figure { id: &id, unit: "Mpps", better: Better::Higher };
        let [mut ours, mut peer] = [Side::ours(self)?, Side::peer(self)?];
        let (mut values, mut peer_values) = (Vec::new(), Vec::new());
        for pair in 0..self.effort.pick(40, 3) {
            if pair % 2 == 0 {
                values.push(ours.window()?);
                peer_values.push(peer.window()?);
            } else {
                peer_values.push(peer.window()?);
                values.push(ours.window()?);
            }
        }
        ours.finish().context("ours")?;
        peer.finish().context(PEER)?;
        sink(paired(figure, self.effort, PEER, values, peer_values))
    }
}
