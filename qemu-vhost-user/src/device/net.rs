//! The vhost-user-net device as the reactor drives it: its rings and who may touch them. Frames pass in `traffic`.
//!
//! [`NetDevice`] belongs to one thread. Its session thread changes rings only through commands, which
//! [`NetDevice::handle_commands`] carries out between frames. A guest that corrupts a ring gets [`DeviceEvent::Broken`], its
//! device stands still, and starting the rings again (reset, reboot, reconnect) revives it.
//!
//! How the reactor uses it: put `event_fd` and the kicks announced by [`DeviceEvent::WatchKick`] into its poll set; when
//! `event_fd` is readable, call `handle_commands`; when a kick is, call `acknowledge_kick` and then `inject` or `collect_tx`;
//! at the end of each round call `flush_signals`. A started ring has its kick signalled once, so frames that waited are found.
//!
//! A reactor that never sleeps calls `set_polling(true)`: then the guest is not asked to kick. To sleep after all, it calls
//! `set_polling(false)` and then `arm`; if that finds something it must not sleep yet.

use std::collections::VecDeque;
use std::sync::Arc;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use thiserror::Error;

use super::features::{Features, Offloads};
use super::link::{Answer, Command, ReactorEnd, RingStart, drain, signal};
use super::memory::{BackendDirty, RamIdentity};
use super::moderation::{Debt, SMALL_FRAME_BYTES, are_many};
use super::ring::{Ring, RingFault};
use super::traffic::Scratch;

/// Length of the header in front of every frame: virtio_net_hdr_v1 (virtio 1.2 §5.1.6).
pub const VNET_HEADER_BYTES: usize = 12;
/// Longest frame, header included: header, 65535 bytes of IP packet, Ethernet header and VLAN tag.
pub const MAX_FRAME_BYTES: usize = VNET_HEADER_BYTES + 65535 + 18;
/// Shortest sensible transmission: header and Ethernet header.
pub(super) const MIN_FRAME_BYTES: usize = VNET_HEADER_BYTES + 14;
/// Offset of `num_buffers` in the header.
pub(super) const NUM_BUFFERS_OFFSET: usize = 10;
/// Most pairs of queues that a device has: as many as a guest of eight vCPUs wants.
pub const MAX_QUEUE_PAIRS: usize = 8;
/// One receive and one transmit queue per pair; the control queue is QEMU's own.
pub(super) const MAX_RINGS: usize = 2 * MAX_QUEUE_PAIRS;

/// Number of a virtqueue in its device. virtio-net: even numbers receive, odd ones transmit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RingIndex(pub u8);

impl RingIndex {
    /// The first queue that carries frames to the guest, and the only one of a device with one pair.
    pub const RX: Self = Self::receive(0);
    /// The same of the queues that carry frames from the guest.
    pub const TX: Self = Self::transmit(0);

    /// The queue of a pair that carries frames to the guest.
    pub const fn receive(pair: usize) -> Self {
        Self(2 * pair as u8)
    }

    /// The queue of a pair that carries frames from the guest.
    pub const fn transmit(pair: usize) -> Self {
        Self(2 * pair as u8 + 1)
    }

    /// All queues that a device may have.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..MAX_RINGS as u8).map(Self)
    }

    /// Whether the queue carries frames to the guest.
    pub fn is_receive(self) -> bool {
        self.0.is_multiple_of(2)
    }
}

impl std::fmt::Display for RingIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ring {} ({})", self.0, if self.is_receive() { "receive" } else { "transmit" })
    }
}

/// Why a device stands still although QEMU wants it to run.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum DeviceError {
    /// The guest corrupted a ring.
    #[error(
        "the guest's {ring} is corrupt at entry {position}: {fault}; the device is stopped until the guest resets it \
         (reload its virtio_net driver or reboot it)"
    )]
    Ring {
        /// Which ring.
        ring: RingIndex,
        /// Entry of the available ring that was being worked on.
        position: u16,
        /// What is wrong.
        fault: RingFault,
    },
    /// QEMU asked for something impossible.
    #[error("QEMU's request was refused and its connection closed: {0}")]
    Session(String),
}

/// What happened to the device; returned by [`NetDevice::handle_commands`].
#[derive(Debug, Clone)]
pub enum DeviceEvent {
    /// QEMU's connection is up.
    Connected,
    /// QEMU sent its memory table. The identity is None if guest RAM is not exactly one file; if it differs from an earlier
    /// one, this is another QEMU process or another guest.
    MemoryReady(Option<RamIdentity>),
    /// The rings run, at least those of the first pair.
    Started {
        /// What the guest accepted.
        features: Features,
        /// What the uplink should be set to.
        offloads: Offloads,
    },
    /// The rings no longer run: guest stopped, reset or gone.
    Stopped,
    /// QEMU's connection is down.
    Disconnected,
    /// The device stands still because somebody misbehaved.
    Broken(DeviceError),
    /// Watch this descriptor for kicks of the ring.
    WatchKick {
        /// Which ring.
        ring: RingIndex,
        /// Becomes readable when the guest kicks.
        kick: Arc<OwnedFd>,
    },
    /// Stop watching it. Must be done at once: QEMU keeps its end open, so an epoll set would report it for ever.
    UnwatchKick {
        /// Which ring.
        ring: RingIndex,
        /// What `WatchKick` gave.
        kick: Arc<OwnedFd>,
    },
}

/// What became of a frame for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inject {
    /// The guest has it, or it can never have it and the frame was dropped and counted.
    Done,
    /// No room: try this frame again, before any other, after a kick of the receive ring, which has been asked for.
    NoBuffers,
    /// The receive ring is not running; nothing was done.
    NotRunning,
}

/// Frames that passed or did not; counted since the device was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Frames that no buffers of the guest could ever hold.
    pub rx_too_large: u64,
    /// Frames passed on from the guest.
    pub tx_frames: u64,
    /// Transmissions longer than [`MAX_FRAME_BYTES`] or shorter than an Ethernet header.
    pub tx_bad_length: u64,
    /// Transmissions discarded because QEMU had disabled the ring (vhost-user: link down).
    pub tx_disabled: u64,
    /// Interrupts sent.
    pub signals: u64,
}

/// One ring and its descriptors.
#[derive(Default)]
pub(super) struct Slot {
    pub ring: Option<Box<Ring>>,
    /// The guest corrupted it; `ring` is kept for its position only.
    pub broken: bool,
    pub enabled: bool,
    pub kick: Option<Arc<OwnedFd>>,
    call: Option<OwnedFd>,
    /// The guest was interrupted since the ring was started.
    called: bool,
    error: Option<OwnedFd>,
    /// An interrupt that waits; of transmit rings only.
    debt: Option<Debt>,
    /// The guest was given frames since it sent some; of transmit rings only.
    heard: bool,
}

impl Slot {
    fn works(&self) -> bool {
        self.ring.is_some() && !self.broken && self.enabled
    }
}

/// A virtio-net device of one guest. See the module's description for how to drive it.
pub struct NetDevice {
    link: ReactorEnd,
    dirty: BackendDirty,
    pub(super) slots: [Slot; MAX_RINGS],
    pub(super) features: Features,
    /// Pairs that frames for the guest are spread over: as many from the first one on as are started and enabled. 0: the device
    /// does not run.
    pub(super) active_pairs: usize,
    /// Pairs that frames from the guest may be in, enabled or not.
    pub(super) pairs_in_use: usize,
    /// The pair whose turn to transmit it is.
    pub(super) next_transmit: usize,
    pub(super) polling: bool,
    /// The guest need not kick when it sends.
    hushed: bool,
    /// A ring is broken, so all stand still.
    pub(super) broken: bool,
    /// The longest frame that [`Self::collect_tx`] passed on since the last flush.
    pub(super) longest_tx_bytes: usize,
    pending: VecDeque<DeviceEvent>,
    pub(super) counters: Counters,
    pub(super) scratch: Scratch,
    /// Every frame goes the way of the unusual ones, to compare the two.
    #[cfg(test)]
    pub(super) no_bursts: bool,
}

impl NetDevice {
    pub(crate) fn new(link: ReactorEnd, dirty: BackendDirty) -> Self {
        Self {
            link,
            dirty,
            slots: Default::default(),
            features: Features::default(),
            active_pairs: 0,
            pairs_in_use: 0,
            next_transmit: 0,
            polling: false,
            hushed: false,
            broken: false,
            longest_tx_bytes: 0,
            pending: VecDeque::new(),
            counters: Counters::default(),
            scratch: Scratch::new(),
            #[cfg(test)]
            no_bursts: false,
        }
    }

    /// Readable when `handle_commands` should be called.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.link.wake().as_fd()
    }

    /// Where the guest signals new entries of a ring, if it does. The same as announced by [`DeviceEvent::WatchKick`].
    pub fn kick_fd(&self, ring: RingIndex) -> Option<BorrowedFd<'_>> {
        self.slots.get(usize::from(ring.0))?.kick.as_ref().map(|kick| kick.as_fd())
    }

    /// Takes a kick's count, so that a level-triggered poll falls silent. Needless with an edge-triggered one.
    pub fn acknowledge_kick(&self, ring: RingIndex) {
        if let Some(kick) = self.slots.get(usize::from(ring.0)).and_then(|slot| slot.kick.as_ref()) {
            drain(kick);
        }
    }

    /// Whether both rings of the first pair run and are enabled, and none is broken.
    pub fn is_running(&self) -> bool {
        self.active_pairs > 0
    }

    /// Pairs of queues that the guest has in use.
    pub fn queue_pairs(&self) -> usize {
        self.active_pairs
    }

    /// Whether the caller looks at the rings all the time. The guest is then never asked to kick, and `inject` and `collect` make
    /// no system call. After a change to false, [`Self::arm`] must be called before the caller waits for kicks.
    pub fn set_polling(&mut self, polling: bool) {
        if std::mem::replace(&mut self.polling, polling) != polling {
            for index in RingIndex::all() {
                self.note_polling(index);
            }
        }
    }

    /// Whether the caller looks at what the guest sends often enough without being asked to. The guest then does not kick for
    /// that, and what it is owed for frames that it sent may wait longer. Returns whether that is a change; after one to false,
    /// [`Self::arm`] must be called.
    pub fn set_hushed(&mut self, hushed: bool) -> bool {
        let changed = std::mem::replace(&mut self.hushed, hushed) != hushed;
        if changed {
            for pair in 0..MAX_QUEUE_PAIRS {
                self.note_polling(RingIndex::transmit(pair));
            }
        }
        changed
    }

    fn note_polling(&mut self, index: RingIndex) {
        let polling = self.polling || (self.hushed && !index.is_receive());
        if let Some(ring) = self.slots[usize::from(index.0)].ring.as_deref_mut()
            && ring.is_polling() != polling
        {
            ring.set_polling(polling);
        }
    }

    /// Asks the guest to kick when it sends something, and when it offers receive buffers if a frame waits for some. Returns true if it has done so meanwhile: the
    /// kick for that may never come, so look at the rings instead of waiting. Without effect while polling.
    pub fn arm(&mut self) -> bool {
        let mut found = false;
        for index in RingIndex::all() {
            let slot = &mut self.slots[usize::from(index.0)];
            let Some(ring) = slot.ring.as_deref_mut().filter(|_| !slot.broken) else {
                continue;
            };
            // Receive buffers matter only to a frame that waits for them.
            if index.is_receive() && !ring.starving {
                continue;
            }
            match ring.arm() {
                Ok(more) => found |= more || (!index.is_receive() && ring.holds_chains()),
                Err(fault) => self.break_ring(index, fault),
            }
        }
        found
    }

    /// What the guest accepted; of no meaning before [`DeviceEvent::Started`].
    pub fn features(&self) -> Features {
        self.features
    }

    /// What the uplink should be set to for this guest.
    pub fn offloads(&self) -> Offloads {
        self.features.offloads()
    }

    /// The record of pages that this device wrote.
    pub fn dirty(&self) -> BackendDirty {
        self.dirty.clone()
    }

    /// What passed so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether `handle_commands` has something to do: the same as a readable `event_fd`, without a system call.
    pub fn has_commands(&self) -> bool {
        self.link.has_news()
    }

    /// Carries out what the session asks for and reports what happened, in order. Never blocks.
    pub fn handle_commands(&mut self, sink: &mut impl FnMut(DeviceEvent)) {
        self.link.acknowledge();
        while let Some((command, responder)) = self.link.next() {
            let answer = self.execute(command);
            // The poll set must have let go of a kick before its descriptor goes back to the session and is closed.
            self.pending.drain(..).for_each(&mut *sink);
            responder.answer(answer);
        }
        self.pending.drain(..).for_each(sink);
    }

    /// Carries out one command.
    pub(super) fn execute(&mut self, command: Command) -> Answer {
        match command {
            Command::Connected => {
                self.stop_all();
                self.pending.push_back(DeviceEvent::Connected);
            }
            Command::Disconnected => {
                self.stop_all();
                self.pending.push_back(DeviceEvent::Disconnected);
            }
            Command::MemoryReady(identity) => self.pending.push_back(DeviceEvent::MemoryReady(identity)),
            Command::Refused(why) => {
                self.pending.push_back(DeviceEvent::Broken(DeviceError::Session(why)));
            }
            Command::StartRing { index, start } => self.start_ring(index, start),
            Command::StopRing { index } => return self.stop_ring(index),
            Command::SetCall { index, call } => self.set_call(index, call),
            Command::SetKick { index, kick } => self.set_kick(index, kick),
            Command::SetEnabled { index, enabled } => {
                if let Some(slot) = self.slots.get_mut(usize::from(index.0)) {
                    slot.enabled = enabled;
                }
                self.note_running();
            }
        }
        Answer::Done
    }

    fn start_ring(&mut self, index: RingIndex, start: RingStart) {
        let RingStart { ring, features, kick, call, error, enabled } = start;
        let Some(slot) = self.slots.get_mut(usize::from(index.0)) else {
            return;
        };
        slot.ring = Some(ring);
        slot.broken = false;
        slot.enabled = enabled;
        slot.call = call;
        slot.called = false;
        slot.error = error;
        self.features = features;
        self.note_polling(index);
        self.set_kick(index, kick);
        self.note_running();
    }

    /// Replaces the kick of a ring and signals the new one, because the old one may have held a kick that nobody saw.
    fn set_kick(&mut self, ring: RingIndex, kick: Option<OwnedFd>) {
        let Some(slot) = self.slots.get_mut(usize::from(ring.0)) else {
            return;
        };
        if let Some(old) = slot.kick.take() {
            self.pending.push_back(DeviceEvent::UnwatchKick { ring, kick: old });
        }
        if let Some(kick) = kick {
            signal(&kick);
            let kick = Arc::new(kick);
            slot.kick = Some(Arc::clone(&kick));
            self.pending.push_back(DeviceEvent::WatchKick { ring, kick });
        }
    }

    /// Replaces the other end of a ring's interrupts. QEMU masks one by sending another descriptor, and looks at the old
    /// one once: what that was given after the look would be lost, so the new one is given it too.
    fn set_call(&mut self, ring: RingIndex, call: Option<OwnedFd>) {
        let Some(slot) = self.slots.get_mut(usize::from(ring.0)) else {
            return;
        };
        if let Some(call) = call.as_ref().filter(|_| slot.called) {
            signal(call);
        }
        slot.call = call;
    }

    fn stop_ring(&mut self, index: RingIndex) -> Answer {
        self.signal_ring(index);
        self.set_kick(index, None);
        let Some(slot) = self.slots.get_mut(usize::from(index.0)) else {
            return Answer::Done;
        };
        let remains = slot.ring.take();
        slot.broken = false;
        slot.call = None;
        slot.error = None;
        self.note_running();
        Answer::Stopped { position: remains.as_ref().map(|ring| ring.position()), remains }
    }

    fn stop_all(&mut self) {
        for index in RingIndex::all() {
            drop(self.stop_ring(index));
        }
    }

    /// Counts the pairs and reports a change between running and not running.
    fn note_running(&mut self) {
        let was_running = self.is_running();
        self.broken = self.slots.iter().any(|slot| slot.broken);
        let pairs = self.slots.chunks(2);
        self.active_pairs = if self.broken { 0 } else { pairs.take_while(|pair| pair.iter().all(Slot::works)).count() };
        self.pairs_in_use = self.slots.iter().rposition(|slot| slot.ring.is_some()).map_or(0, |last| last / 2 + 1);
        if self.is_running() != was_running {
            self.pending.push_back(if was_running {
                DeviceEvent::Stopped
            } else {
                DeviceEvent::Started { features: self.features, offloads: self.offloads() }
            });
        }
    }

    /// Stops the device because of what the guest did.
    pub(super) fn break_ring(&mut self, index: RingIndex, fault: RingFault) {
        let slot = &mut self.slots[usize::from(index.0)];
        let position = slot.ring.as_ref().map_or(0, |ring| ring.position());
        slot.broken = true;
        if let Some(error) = &slot.error {
            signal(error);
        }
        self.note_running();
        self.pending.push_back(DeviceEvent::Broken(DeviceError::Ring { ring: index, position, fault }));
        // Has the reactor call handle_commands, which reports this.
        self.link.call_back();
    }

    /// Ends a round: records the pages that were written (see [`BackendDirty`]), and interrupts the guest for what was put into
    /// its rings since the last call where it wants that, with at most one system call per ring.
    #[inline]
    pub fn flush_signals(&mut self) {
        for ring in 0..2 * self.pairs_in_use as u8 {
            self.signal_ring(RingIndex(ring));
        }
    }

    /// As [`Self::flush_signals`], but an interrupt for frames that the guest sent may wait until [`Self::signal_due_us`] (see
    /// `moderation`). For a caller that calls this again by then.
    #[inline]
    pub fn flush_signals_in_time(&mut self, now_us: u64) {
        let small = std::mem::take(&mut self.longest_tx_bytes) <= SMALL_FRAME_BYTES;
        for pair in 0..self.pairs_in_use {
            let receive = RingIndex::receive(pair);
            let ring = self.slots[usize::from(receive.0)].ring.as_deref();
            // After a start an interrupt is due without a frame.
            let gives = ring.is_some_and(|ring| (1..=ring.size()).contains(&ring.unsignalled()));
            self.signal_ring(receive);
            let transmit = RingIndex::transmit(pair);
            self.slots[usize::from(transmit.0)].heard |= gives;
            if !self.may_wait(transmit, now_us, small) {
                self.signal_ring(transmit);
            }
        }
    }

    /// When [`Self::flush_signals_in_time`] must be called again.
    #[inline]
    pub fn signal_due_us(&self) -> u64 {
        let debts = self.slots[..2 * self.pairs_in_use].iter().filter_map(|slot| slot.debt);
        debts.map(|debt| debt.due_us()).min().unwrap_or(u64::MAX)
    }

    /// Whether a transmit ring's interrupt can wait, if one is due. `small`: no frame was longer.
    #[inline]
    fn may_wait(&mut self, index: RingIndex, now_us: u64, small: bool) -> bool {
        let slot = &mut self.slots[usize::from(index.0)];
        let Some(ring) = slot.ring.as_deref_mut().filter(|_| slot.call.is_some()) else { return false };
        ring.settle();
        let published = ring.published();
        if are_many(ring.unsignalled(), ring.size()) {
            slot.heard = false;
            return false;
        }
        if ring.unsignalled() > 0 && slot.debt.is_none_or(|debt| debt.upto() != published) {
            // Looked at once per change: each look takes the line from the driver. What was owed before may be forgiven now.
            let kept = slot.debt.take().filter(|debt| !ring.forgives(debt.upto()));
            let answer = std::mem::take(&mut slot.heard) && small && ring.unsignalled() == 1;
            if !ring.forgives(published) {
                slot.debt = Some(match kept {
                    Some(debt) => debt.extended(published),
                    None => Debt::new(now_us, published, answer),
                });
            }
        } else if let (Some(debt), true) = (&mut slot.debt, slot.heard) {
            debt.note_received();
        }
        if let (Some(debt), true) = (&mut slot.debt, self.hushed) {
            // Its frames leave later than that.
            debt.note_received();
        }
        slot.debt.is_none_or(|debt| now_us < debt.due_us())
    }

    #[inline]
    fn signal_ring(&mut self, index: RingIndex) {
        let Some(slot) = self.slots.get_mut(usize::from(index.0)) else {
            return;
        };
        slot.debt = None;
        let Some(ring) = slot.ring.as_deref_mut() else {
            return;
        };
        ring.settle();
        // Without a call descriptor the wish is kept, not answered: QEMU may send one later.
        if let Some(call) = &slot.call
            && ring.wants_signal()
        {
            signal(call);
            slot.called = true;
            self.counters.signals += 1;
        }
    }
}
