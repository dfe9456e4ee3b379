//! Our vhost-user-net device against DPDK's `net_vhost`, with DPDK's `net_virtio_user` as the guest of both.
//!
//! Two CPUs: the guest's testpmd has one, the backend the other. The rate is the backend's, counted over windows of
//! [`WINDOW`]; a run's value is its best window, because a disturbance (the two CPUs do not run at the same time for a
//! moment) can only lower it, and a window's length is taken from before its first look to after its last, which can only
//! lower it as well. On a quiet machine the best window is hardly above the others.

mod backend;
mod guest;
mod member;
mod ordered;
mod testpmd;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::Effort;
use crate::group::Sink;
use crate::pin::two_cpus;
use crate::results::Scratch;
use crate::sample::{Better, Figure, compare_best};
use backend::Backend;
use huge_pages::HugePages;
use testpmd::{Counts, MEMORY_MIB, Options, Testpmd};

/// Long against a look at the counters, short against a run.
const WINDOW: Duration = Duration::from_millis(20);
/// Time for caches and memory pools to settle.
const WARM_UP: Duration = Duration::from_millis(100);
/// Time for what is under way to arrive after the sender has stopped.
const SETTLE: Duration = Duration::from_millis(50);
/// Descriptors in a queue, testpmd's own choice.
const QUEUE_SIZE: usize = 256;
/// Frames that may be in queues when a run is stopped: both queues full.
const IN_FLIGHT: u64 = 2 * QUEUE_SIZE as u64;
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

    /// Frames that the backend has dealt with. In `io` each frame counts once, when it is given back.
    fn work(self, backend: Counts) -> u64 {
        if self == Mode::Tx { backend.received } else { backend.sent }
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
    // For two processes, and a few for what DPDK cannot place in one piece.
    let huge = HugePages::reserve(2 * (MEMORY_MIB / 2 + 16));
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
        let runs = self.effort.pick(7, 1);
        sink(compare_best(figure, self.effort, runs, PEER, || self.ours(), || self.peer())?)
    }

    fn ours(&self) -> Result<f64> {
        let socket = self.directory.join("ours.sock");
        let backend = Backend::start(socket.clone(), self.mode, self.ordered, self.frame_bytes, self.cpus[1])?;
        let mut guest = self.guest(&socket)?;
        backend.wait_until_running()?;
        self.begin(&mut guest)?;
        let rate = self.best_window(&|| Ok(backend.counts()));
        // Who makes up frames stops first, so that the other gets all of them.
        backend.quieten();
        let outcome = self.settle(&mut guest).and_then(|guest| self.check(guest, backend.counts()));
        backend.finish()?;
        outcome.and(rate)
    }

    fn peer(&self) -> Result<f64> {
        let socket = self.directory.join("peer.sock");
        // The one before was killed and left it.
        let _ = std::fs::remove_file(&socket);
        let port = format!("net_vhost0,iface={}", socket.display());
        let mut peer = self.start("peer", &port, self.mode.names().2, self.cpus[1])?;
        let mut guest = self.guest(&socket)?;
        peer.command("start")?;
        self.begin(&mut guest)?;
        let rate = self.best_window(&|| peer.counts());
        if self.mode == Mode::Rx {
            peer.command("stop")?;
        }
        let outcome = self.settle(&mut guest).and_then(|guest| self.check(guest, peer.counts()?));
        outcome.and(rate)
    }

    fn guest(&self, socket: &Path) -> Result<Testpmd> {
        let port = format!("net_virtio_user0,path={},queue_size={QUEUE_SIZE}", socket.display());
        self.start("guest", &port, self.mode.names().1, self.cpus[0])
    }

    fn start(&self, name: &str, port: &str, forward: &str, cpu: usize) -> Result<Testpmd> {
        let Run { frame_bytes, huge, directory, .. } = *self;
        Testpmd::start(Options { name, port, forward, frame_bytes, cpu, huge, directory })
    }

    fn begin(&self, guest: &mut Testpmd) -> Result<()> {
        guest.command(if self.mode == Mode::Io { "start tx_first" } else { "start" })?;
        std::thread::sleep(WARM_UP);
        Ok(())
    }

    /// The best window's rate in millions of frames per second.
    fn best_window(&self, counts: &dyn Fn() -> Result<Counts>) -> Result<f64> {
        let mut best = 0f64;
        let end = Instant::now() + self.effort.pick(Duration::from_secs(1), Duration::from_millis(200));
        let mut before = (Instant::now(), self.mode.work(counts()?));
        while Instant::now() < end {
            std::thread::sleep(WINDOW);
            let next_start = Instant::now();
            let work = self.mode.work(counts()?);
            let seconds = before.0.elapsed().as_secs_f64();
            best = best.max((work - before.1) as f64 / seconds / 1e6);
            before = (next_start, work);
        }
        Ok(best)
    }

    /// Has the guest stop, and waits until nothing moves any more.
    fn settle(&self, guest: &mut Testpmd) -> Result<Counts> {
        if self.mode == Mode::Rx {
            std::thread::sleep(SETTLE);
        }
        guest.command("stop")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut before = guest.counts()?;
        loop {
            std::thread::sleep(SETTLE);
            let now = guest.counts()?;
            if now == before {
                return Ok(now);
            }
            ensure!(Instant::now() < deadline, "the guest goes on after it was stopped");
            before = now;
        }
    }

    /// What one side sent, the other has received.
    fn check(&self, guest: Counts, backend: Counts) -> Result<()> {
        let (to_guest, from_guest) = (guest.received.abs_diff(backend.sent), guest.sent.abs_diff(backend.received));
        ensure!(
            to_guest <= IN_FLIGHT && from_guest <= IN_FLIGHT,
            "frames are missing: the guest counts {guest:?}, the backend {backend:?}"
        );
        (self.mode.work(backend) > 0).then_some(()).context("no frame passed")
    }
}
