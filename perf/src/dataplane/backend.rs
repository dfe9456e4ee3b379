//! Our device under a loop that does what testpmd's forwarding modes do, and nothing else.
//!
//! A thread of its own on a CPU of its own polls without a pause, as testpmd's does. It makes up frames where `txonly` does,
//! takes them where `rxonly` does, and copies them as often: once out of the guest's memory and once into it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use qemu_vhost_user::device::{self, DeviceEvent, Endpoint, FrameSink, NetDevice, Session, VNET_HEADER_BYTES};

use super::Mode;
use super::ordered::Group;
use super::testpmd::Counts;
use crate::pin;

/// As testpmd's.
const BURST_FRAMES: usize = 32;
/// Frames in our memory: a few bursts, as many as testpmd has in its caches.
const SLOTS: usize = 128;
const SLOT_BYTES: usize = 2048;
/// Bytes that `txonly` writes anew into each frame: the headers of Ethernet, IP and UDP.
pub const MADE_BYTES: usize = 14 + 20 + 8;
/// The first of them: two addresses, IPv4, no options.
pub const HEADERS: [u8; 16] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0];
/// One frame in so many is looked at.
const CHECK_EVERY: u64 = 1024;
/// Longest wait for the guest.
const PATIENCE: Duration = Duration::from_secs(30);

const GO: u8 = 0;
/// No more frames of our own.
const QUIET: u8 = 1;
const END: u8 = 2;
/// Nothing at all, and the CPU is free.
const HALT: u8 = 3;

#[derive(Debug, Default)]
struct Shared {
    order: AtomicU8,
    running: AtomicBool,
    received: AtomicU64,
    sent: AtomicU64,
}

/// The running loop.
#[derive(Debug)]
pub struct Backend {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Backend {
    /// Listens on `socket` and begins to poll on `cpu`. Frames flow once a guest is there. `ordered`: they go through a group
    /// of replicas first (`rx` only).
    ///
    /// # Errors
    /// The socket cannot be used, or no group forms.
    pub fn start(socket: PathBuf, mode: Mode, ordered: bool, frame_bytes: usize, cpu: usize) -> Result<Backend> {
        let group = ordered.then(|| Group::start(frame_bytes)).transpose()?;
        let (device, session) = device::open("perf", Endpoint::Listen(socket), || {})?;
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("backend".to_owned()).spawn(move || {
            pin::pin(cpu)?;
            Loop { device, _session: session, shared: theirs, frame_bytes, arena: Arena::new(), group }.run(mode)
        })?;
        Ok(Backend { shared, thread: Some(thread) })
    }

    /// Waits until the guest's rings run.
    ///
    /// # Errors
    /// They do not in time.
    pub fn wait_until_running(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.shared.running.load(Ordering::Acquire) {
            ensure!(Instant::now() < deadline, "testpmd's rings did not start within {} s", PATIENCE.as_secs());
            ensure!(self.thread.as_ref().is_some_and(|thread| !thread.is_finished()), "our loop has ended");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Frames so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        Counts { received: get(&self.shared.received), sent: get(&self.shared.sent) }
    }

    /// From now on it makes up no frames of its own.
    pub fn quieten(&self) {
        self.order(QUIET);
    }

    /// It stands still and leaves the CPU to others.
    pub fn halt(&self) {
        self.order(HALT);
    }

    /// It works again.
    pub fn go_on(&self) {
        self.order(GO);
    }

    fn order(&self, order: u8) {
        self.shared.order.store(order, Ordering::Release);
        if let Some(thread) = &self.thread {
            thread.thread().unpark();
        }
    }

    /// Ends it.
    ///
    /// # Errors
    /// What it found wrong.
    pub fn finish(mut self) -> Result<()> {
        self.order(END);
        let thread = self.thread.take().context("a backend ends once")?;
        thread.join().map_err(|_| anyhow!("our loop panicked"))?
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.order(END);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Loop {
    device: NetDevice,
    _session: Session,
    shared: Arc<Shared>,
    frame_bytes: usize,
    arena: Arena,
    group: Option<Group>,
}

impl Loop {
    fn run(mut self, mode: Mode) -> Result<()> {
        self.device.set_polling(true);
        self.arena.make_up(self.frame_bytes);
        loop {
            if self.device.has_commands() {
                self.take_commands()?;
            }
            let order = self.shared.order.load(Ordering::Relaxed);
            if order == HALT {
                std::thread::park();
                continue;
            }
            if let Some(group) = &mut self.group {
                match order {
                    END => return group.finish(&self.device),
                    _ => group.turn(&mut self.device, self.shared.running.load(Ordering::Relaxed) && order != QUIET)?,
                }
            } else {
                match (mode, order) {
                    (_, END) => return Ok(()),
                    (Mode::Rx, QUIET) => std::hint::spin_loop(),
                    (Mode::Rx, _) => self.send(),
                    (Mode::Tx, _) => self.receive()?,
                    (Mode::Io, _) => self.echo()?,
                }
            }
            self.device.flush_signals();
            let counters = self.device.counters();
            self.shared.received.store(counters.tx_frames, Ordering::Release);
            self.shared.sent.store(counters.rx_frames, Ordering::Release);
        }
    }

    fn take_commands(&mut self) -> Result<()> {
        let mut broken = None;
        self.device.handle_commands(&mut |event| {
            if let DeviceEvent::Broken(error) = event {
                broken = Some(error);
            }
        });
        self.shared.running.store(self.device.is_running(), Ordering::Release);
        broken.map_or(Ok(()), |error| Err(error.into()))
    }

    /// As `txonly`: headers are written anew, the rest of a frame is what was there.
    fn send(&mut self) {
        for _ in 0..BURST_FRAMES {
            self.arena.make_one(self.frame_bytes);
        }
        let (done, _) = self.device.inject_batch(self.arena.held());
        self.arena.release(done);
        // As testpmd: what finds no room is dropped.
        self.arena.release(usize::MAX);
    }

    /// As `rxonly`.
    fn receive(&mut self) -> Result<()> {
        self.device.collect(BURST_FRAMES, &mut self.arena);
        self.check()?;
        self.arena.release(usize::MAX);
        Ok(())
    }

    /// As `io`.
    fn echo(&mut self) -> Result<()> {
        let taken = self.device.collect(BURST_FRAMES, &mut self.arena);
        if taken == 0 {
            return Ok(());
        }
        self.check()?;
        self.device.inject_batch(self.arena.held());
        self.arena.release(usize::MAX);
        Ok(())
    }

    /// Now and then, whether a frame of the guest is one that testpmd makes: UDP in IPv4, of the length asked for.
    fn check(&mut self) -> Result<()> {
        let received = self.device.counters().tx_frames;
        if received / CHECK_EVERY == self.arena.checked {
            return Ok(());
        }
        self.arena.checked = received / CHECK_EVERY;
        let frame = self.arena.held().next().context("a frame was collected")?;
        let ether = &frame[VNET_HEADER_BYTES..];
        ensure!(ether.len() == self.frame_bytes, "a frame of {} bytes, not {}", ether.len(), self.frame_bytes);
        let [kind @ .., version] = [ether[12], ether[13], ether[14]];
        ensure!(kind == [8, 0] && version == 0x45 && ether[23] == 17, "not testpmd's frame: {:02x?}", &ether[..34]);
        let ip_bytes = usize::from(u16::from_be_bytes([ether[16], ether[17]]));
        ensure!(ip_bytes == self.frame_bytes - 14, "an IP packet of {ip_bytes} bytes in {}", self.frame_bytes);
        Ok(())
    }
}

/// A ring of slots for frames: those from `first` on are held.
struct Arena {
    bytes: Box<[u8]>,
    lens: [usize; SLOTS],
    first: usize,
    count: usize,
    made: u64,
    checked: u64,
}

impl Arena {
    fn new() -> Arena {
        let bytes = vec![0; SLOTS * SLOT_BYTES].into_boxed_slice();
        Arena { bytes, lens: [0; SLOTS], first: 0, count: 0, made: 0, checked: 0 }
    }

    fn slot(&self, ahead: usize) -> usize {
        (self.first + ahead) % SLOTS
    }

    fn held(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.count).map(|ahead| {
            let slot = self.slot(ahead);
            &self.bytes[slot * SLOT_BYTES..][..self.lens[slot]]
        })
    }

    fn release(&mut self, frames: usize) {
        let frames = frames.min(self.count);
        self.first = self.slot(frames);
        self.count -= frames;
    }

    fn make_up(&mut self, frame_bytes: usize) {
        for slot in self.bytes.chunks_mut(SLOT_BYTES) {
            slot[VNET_HEADER_BYTES..][..frame_bytes].fill(0x5a);
        }
    }

    /// Writes the headers of one more frame, whose source address counts.
    fn make_one(&mut self, frame_bytes: usize) {
        let Some(room) = self.room(VNET_HEADER_BYTES + frame_bytes) else { return };
        let mut headers = [0; VNET_HEADER_BYTES + MADE_BYTES];
        headers[VNET_HEADER_BYTES..][..16].copy_from_slice(&HEADERS);
        room[..headers.len()].copy_from_slice(&headers);
        let made = self.made;
        self.made += 1;
        let slot = self.slot(self.count) * SLOT_BYTES;
        self.bytes[slot + VNET_HEADER_BYTES + 26..][..8].copy_from_slice(&made.to_be_bytes());
        self.commit();
    }
}

impl FrameSink for Arena {
    fn room(&mut self, len_bytes: usize) -> Option<&mut [u8]> {
        if self.count == SLOTS || len_bytes > SLOT_BYTES {
            return None;
        }
        let slot = self.slot(self.count);
        self.lens[slot] = len_bytes;
        Some(&mut self.bytes[slot * SLOT_BYTES..][..len_bytes])
    }

    fn commit(&mut self) -> bool {
        self.count += 1;
        true
    }
}
