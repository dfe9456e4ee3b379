//! A guest and its backend that stay, and run for a window now and then.
//!
//! Ours and the peer's stand side by side, on the same two CPUs. Outside of its windows a side stands still (its processes are
//! stopped, our thread is parked), so that a window of ours and the next one of the peer are a few ms apart, and whatever
//! changes more slowly (how near the two CPUs are, the clock, a neighbour) hits both. The rate is counted by the guest,
//! which is the same program on both sides and is asked in the same way.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::backend::Backend;
use super::testpmd::{Counts, Options, Testpmd};
use super::{Mode, Run};

/// Long against a look at the counters, short against what the machine does by itself.
const WINDOW: Duration = Duration::from_millis(50);
/// Before the first look: caches fill again.
const WARM_UP: Duration = Duration::from_millis(10);
/// Time for what is under way to arrive after the sender has stopped.
const SETTLE: Duration = Duration::from_millis(50);
/// Descriptors in a queue, testpmd's own choice.
const QUEUE_SIZE: usize = 256;
/// Frames that may be in queues when a run is stopped: both queues full.
const IN_FLIGHT: u64 = 2 * QUEUE_SIZE as u64;

enum Behind {
    Ours(Backend),
    Peer(Testpmd),
}

/// See the module. It stands still between the calls.
pub struct Side {
    mode: Mode,
    guest: Testpmd,
    behind: Behind,
}

impl Side {
    /// Our device.
    ///
    /// # Errors
    /// It or testpmd does not start.
    pub fn ours(run: &Run<'_>) -> Result<Side> {
        let socket = run.directory.join("ours.sock");
        let backend = Backend::start(socket.clone(), run.mode, run.ordered, run.frame_bytes, run.cpus[1])?;
        let guest = guest(run, "guest-ours", &socket)?;
        backend.wait_until_running()?;
        backend.halt();
        Side { mode: run.mode, guest, behind: Behind::Ours(backend) }.begin()
    }

    /// DPDK's `net_vhost`.
    ///
    /// # Errors
    /// As [`ours`](Self::ours).
    pub fn peer(run: &Run<'_>) -> Result<Side> {
        let socket = run.directory.join("peer.sock");
        // The one before was killed and left it.
        let _ = std::fs::remove_file(&socket);
        let port = format!("net_vhost0,iface={}", socket.display());
        let mut peer = start(run, "peer", &port, run.mode.names().2, run.cpus[1])?;
        let guest = guest(run, "guest-peer", &socket)?;
        peer.command("start")?;
        Side { mode: run.mode, guest, behind: Behind::Peer(peer) }.begin()
    }

    fn begin(mut self) -> Result<Side> {
        self.guest.command(if self.mode == Mode::Io { "start tx_first" } else { "start" })?;
        // It says nothing when it has begun.
        std::thread::sleep(SETTLE);
        // A window that does not count: memory pools settle.
        self.window()?;
        Ok(self)
    }

    /// The guest first: frames that it does not take yet would pile up, and be measured as a queue that never gets shorter.
    fn go_on(&self) -> Result<()> {
        self.guest.go_on()?;
        match &self.behind {
            Behind::Ours(backend) => backend.go_on(),
            Behind::Peer(peer) => peer.go_on()?,
        }
        Ok(())
    }

    fn halt(&self) -> Result<()> {
        match &self.behind {
            Behind::Ours(backend) => backend.halt(),
            Behind::Peer(peer) => peer.halt()?,
        }
        self.guest.halt()
    }

    /// Lets it run for a window; millions of frames per second.
    ///
    /// # Errors
    /// testpmd does not answer.
    pub fn window(&mut self) -> Result<f64> {
        self.go_on()?;
        std::thread::sleep(WARM_UP);
        let (start, before) = (Instant::now(), self.guest.counts()?);
        std::thread::sleep(WINDOW);
        // From before the first look to before the last: looks take about the same time.
        let (end, after) = (Instant::now(), self.guest.counts()?);
        self.halt()?;
        let frames = self.mode.work(after) - self.mode.work(before);
        Ok(frames as f64 / (end - start).as_secs_f64() / 1e6)
    }

    /// Ends it.
    ///
    /// # Errors
    /// Frames are lost or wrong.
    pub fn finish(mut self) -> Result<()> {
        self.go_on()?;
        // Who makes up frames stops first, so that the other gets all of them.
        match &mut self.behind {
            Behind::Ours(backend) => backend.quieten(),
            Behind::Peer(peer) if self.mode == Mode::Rx => peer.command("stop")?,
            Behind::Peer(_) => {}
        }
        let guest = self.settle()?;
        let counts = match &self.behind {
            Behind::Ours(backend) => backend.counts(),
            Behind::Peer(peer) => peer.counts()?,
        };
        check(self.mode, guest, counts)?;
        match self.behind {
            Behind::Ours(backend) => backend.finish(),
            Behind::Peer(_) => Ok(()),
        }
    }

    /// Has the guest stop, and waits until nothing moves any more.
    fn settle(&mut self) -> Result<Counts> {
        if self.mode == Mode::Rx {
            std::thread::sleep(SETTLE);
        }
        self.guest.command("stop")?;
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut before = self.guest.counts()?;
        loop {
            std::thread::sleep(SETTLE);
            let now = self.guest.counts()?;
            if now == before {
                return Ok(now);
            }
            ensure!(Instant::now() < deadline, "the guest goes on after it was stopped");
            before = now;
        }
    }
}

fn guest(run: &Run<'_>, name: &str, socket: &std::path::Path) -> Result<Testpmd> {
    let port = format!("net_virtio_user0,path={},queue_size={QUEUE_SIZE}", socket.display());
    start(run, name, &port, run.mode.names().1, run.cpus[0])
}

fn start(run: &Run<'_>, name: &str, port: &str, forward: &str, cpu: usize) -> Result<Testpmd> {
    let Run { frame_bytes, huge, directory, .. } = *run;
    Testpmd::start(Options { name, port, forward, frame_bytes, cpu, huge, directory })
}

/// What one side sent, the other has received.
fn check(mode: Mode, guest: Counts, backend: Counts) -> Result<()> {
    let (to_guest, from_guest) = (guest.received.abs_diff(backend.sent), guest.sent.abs_diff(backend.received));
    ensure!(
        to_guest <= IN_FLIGHT && from_guest <= IN_FLIGHT,
        "frames are missing: the guest counts {guest:?}, the backend {backend:?}"
    );
    (mode.work(guest) > 0).then_some(()).context("no frame passed")
}
