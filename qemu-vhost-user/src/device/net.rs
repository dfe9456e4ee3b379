//! The vhost-user-net device as the reactor drives it: frames in, frames out, no lock and no allocation in between.
//!
//! [`NetDevice`] belongs to one thread. Its session thread changes rings only through commands, which
//! [`NetDevice::handle_commands`] carries out between frames. A guest that corrupts a ring gets [`DeviceEvent::Broken`], its
//! device stands still, and starting the rings again (reset, reboot, reconnect) revives it.
//!
//! How the reactor uses it: put `event_fd` and the kicks announced by [`DeviceEvent::WatchKick`] into its poll set; when
//! `event_fd` is readable, call `handle_commands`; when a kick is, call `acknowledge_kick` and then `inject` or `collect_tx`;
//! at the end of each round call `flush_signals`. A started ring has its kick signalled once, so frames that waited are found.

use std::collections::VecDeque;
use std::sync::Arc;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use thiserror::Error;
use vm_memory::Bytes;

use super::features::{Features, Offloads};
use super::link::{Answer, Command, ReactorEnd, RingStart, drain, signal};
use super::memory::{BackendDirty, Piece, RamIdentity};
use super::ring::{Ring, RingFault};

/// Length of the header in front of every frame: virtio_net_hdr_v1 (virtio 1.2 §5.1.6).
pub const VNET_HEADER_BYTES: usize = 12;
/// Longest frame, header included: header, 65535 bytes of IP packet, Ethernet header and VLAN tag.
pub const MAX_FRAME_BYTES: usize = VNET_HEADER_BYTES + 65535 + 18;
/// Shortest sensible transmission: header and Ethernet header.
const MIN_FRAME_BYTES: usize = VNET_HEADER_BYTES + 14;
/// Offset of `num_buffers` in the header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// Number of a virtqueue in its device. virtio-net: even numbers receive, odd ones transmit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RingIndex(pub u8);

impl RingIndex {
    /// The queue that carries frames to the guest.
    pub const RX: Self = Self(0);
    /// The queue that carries frames from the guest.
    pub const TX: Self = Self(1);
    /// All queues of the device: one pair.
    pub const ALL: [Self; 2] = [Self::RX, Self::TX];
}

impl std::fmt::Display for RingIndex {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::RX => f.write_str("ring 0 (receive)"),
            Self::TX => f.write_str("ring 1 (transmit)"),
            Self(other) => write!(f, "ring {other}"),
        }
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
    /// Both rings run.
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
struct Slot {
    ring: Option<Box<Ring>>,
    /// The guest corrupted it; `ring` is kept for its position only.
    broken: bool,
    enabled: bool,
    kick: Option<Arc<OwnedFd>>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
}

impl Slot {
    fn works(&self) -> bool {
        self.ring.is_some() && !self.broken
    }
}

/// A virtio-net device of one guest. See the module's description for how to drive it.
pub struct NetDevice {
    link: ReactorEnd,
    dirty: BackendDirty,
    slots: [Slot; 2],
    features: Features,
    started: bool,
    pending: VecDeque<DeviceEvent>,
    counters: Counters,
    /// One transmitted frame.
    frame: Box<[u8]>,
    /// Pieces of guest memory of the frame in hand.
    pieces: Vec<Piece>,
    /// Receive chains of the frame in hand: head and room in bytes.
    chains: Vec<(u16, u64)>,
}

impl NetDevice {
    pub(crate) fn new(link: ReactorEnd, dirty: BackendDirty) -> Self {
        Self {
            link,
            dirty,
            slots: Default::default(),
            features: Features::default(),
            started: false,
            pending: VecDeque::new(),
            counters: Counters::default(),
            frame: vec![0; MAX_FRAME_BYTES].into_boxed_slice(),
            pieces: Vec::with_capacity(1024),
            chains: Vec::with_capacity(1024),
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

    /// Whether both rings run and are enabled.
    pub fn is_running(&self) -> bool {
        self.started
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

    /// Carries out what the session asks for and reports what happened, in order. Never blocks.
    pub fn handle_commands(&mut self, sink: &mut impl FnMut(DeviceEvent)) {
        drain(self.link.wake());
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
            Command::SetCall { index, call } => {
                if let Some(slot) = self.slots.get_mut(usize::from(index.0)) {
                    slot.call = call;
                }
            }
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
        slot.error = error;
        self.features = features;
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
        for index in RingIndex::ALL {
            drop(self.stop_ring(index));
        }
    }

    /// Reports a change between running and not running.
    fn note_running(&mut self) {
        let running = self.slots.iter().all(|slot| slot.works() && slot.enabled);
        if running != self.started {
            self.started = running;
            self.pending.push_back(if running {
                DeviceEvent::Started { features: self.features, offloads: self.offloads() }
            } else {
                DeviceEvent::Stopped
            });
        }
    }

    /// Stops the device because of what the guest did.
    fn break_ring(&mut self, index: RingIndex, fault: RingFault) {
        let slot = &mut self.slots[usize::from(index.0)];
        let position = slot.ring.as_ref().map_or(0, |ring| ring.position());
        slot.broken = true;
        if let Some(error) = &slot.error {
            signal(error);
        }
        self.note_running();
        self.pending.push_back(DeviceEvent::Broken(DeviceError::Ring { ring: index, position, fault }));
        // Has the reactor call handle_commands, which reports this.
        signal(self.link.wake());
    }

    /// Gives a frame to the guest: 12 bytes of virtio_net_hdr_v1, then Ethernet. `num_buffers` is filled in here.
    ///
    /// A frame shorter than the header, or one that the guest's buffers can never hold, is dropped and counted.
    pub fn inject(&mut self, frame: &[u8]) -> Inject {
        if !self.started {
            return Inject::NotRunning;
        }
        if !(VNET_HEADER_BYTES..=MAX_FRAME_BYTES).contains(&frame.len()) {
            self.counters.rx_too_large += 1;
            return Inject::Done;
        }
        match self.try_inject(frame) {
            Ok(done) => done,
            Err(fault) => {
                self.break_ring(RingIndex::RX, fault);
                Inject::NotRunning
            }
        }
    }

    fn try_inject(&mut self, frame: &[u8]) -> Result<Inject, RingFault> {
        let Self { slots, features, counters, pieces, chains, .. } = self;
        let Some(ring) = slots[usize::from(RingIndex::RX.0)].ring.as_deref_mut() else {
            return Ok(Inject::NotRunning);
        };
        let header_bytes = features.header_bytes();
        let need = (header_bytes + frame.len() - VNET_HEADER_BYTES) as u64;
        ring.disarm();
        loop {
            match find_room(ring, need, features.mergeable(), pieces, chains)? {
                Room::Enough => break,
                Room::Never => {
                    counters.rx_too_large += 1;
                    return Ok(Inject::Done);
                }
                Room::NotYet => {
                    if !ring.arm()? {
                        return Ok(Inject::NoBuffers);
                    }
                }
            }
        }
        let mut header = [0; VNET_HEADER_BYTES];
        header.copy_from_slice(&frame[..VNET_HEADER_BYTES]);
        header[NUM_BUFFERS_OFFSET..].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        scatter(ring, pieces, [&header[..header_bytes], &frame[VNET_HEADER_BYTES..]]);
        let mut left = need;
        for &(head, room) in chains.iter() {
            let written = left.min(room);
            ring.complete(head, written as u32);
            left -= written;
        }
        // All buffers of a frame become visible together (virtio 1.2 §5.1.6.4.1).
        ring.publish();
        counters.rx_frames += 1;
        Ok(Inject::Done)
    }

    /// Passes up to `budget_frames` frames from the guest to `sink`, oldest first: 12 bytes of virtio_net_hdr_v1, then
    /// Ethernet. A frame that `sink` refuses (false) stays in the ring, and the call ends. Returns how many were accepted.
    ///
    /// When the ring is empty the guest is asked to kick; when the budget or `sink` ended the call it is not, and the caller
    /// must call again by itself. While QEMU has the ring disabled, frames are consumed and discarded, as vhost-user demands.
    pub fn collect_tx(&mut self, budget_frames: usize, sink: &mut impl FnMut(&[u8]) -> bool) -> usize {
        if self.slots.iter().any(|slot| slot.broken) {
            return 0;
        }
        let mut accepted = 0;
        let result = self.try_collect(budget_frames, &mut accepted, sink);
        self.counters.tx_frames += accepted as u64;
        if let Some(ring) = self.slots[usize::from(RingIndex::TX.0)].ring.as_deref_mut() {
            ring.publish();
        }
        if let Err(fault) = result {
            self.break_ring(RingIndex::TX, fault);
        }
        accepted
    }

    fn try_collect(
        &mut self,
        budget_frames: usize,
        accepted: &mut usize,
        sink: &mut impl FnMut(&[u8]) -> bool,
    ) -> Result<(), RingFault> {
        let Self { slots, features, counters, frame, pieces, .. } = self;
        let slot = &mut slots[usize::from(RingIndex::TX.0)];
        let Some(ring) = slot.ring.as_deref_mut() else {
            return Ok(());
        };
        let header_bytes = features.header_bytes();
        for _ in 0..budget_frames {
            let Some(head) = next_or_arm(ring)? else {
                return Ok(());
            };
            if !slot.enabled {
                counters.tx_disabled += 1;
                ring.complete(head, 0);
                continue;
            }
            pieces.clear();
            let len = ring.walk(head, pieces)?;
            if len < header_bytes as u64 {
                return Err(RingFault::NoHeader { len });
            }
            let len = len + (VNET_HEADER_BYTES - header_bytes) as u64;
            if !(MIN_FRAME_BYTES as u64..=MAX_FRAME_BYTES as u64).contains(&len) {
                counters.tx_bad_length += 1;
                ring.complete(head, 0);
                continue;
            }
            let frame = &mut frame[..len as usize];
            gather(ring, pieces, header_bytes, frame);
            if !sink(frame) {
                return Ok(());
            }
            ring.complete(head, 0);
            *accepted += 1;
        }
        Ok(())
    }

    /// Interrupts the guest for what was put into its rings since the last call, where it wants that: at most one system call
    /// per ring.
    pub fn flush_signals(&mut self) {
        for index in RingIndex::ALL {
            self.signal_ring(index);
        }
    }

    fn signal_ring(&mut self, index: RingIndex) {
        let Some(slot) = self.slots.get_mut(usize::from(index.0)) else {
            return;
        };
        // Without a call descriptor the wish is kept, not answered: QEMU may send one later.
        if let (Some(ring), Some(call)) = (slot.ring.as_deref_mut(), &slot.call)
            && ring.wants_signal()
        {
            signal(call);
            self.counters.signals += 1;
        }
    }
}

/// Whether the receive ring has room for a frame.
enum Room {
    Enough,
    NotYet,
    Never,
}

/// Finds chains with `need` bytes of room, without consuming them: their memory goes to `pieces`, heads and sizes to `chains`.
fn find_room(
    ring: &mut Ring,
    need: u64,
    mergeable: bool,
    pieces: &mut Vec<Piece>,
    chains: &mut Vec<(u16, u64)>,
) -> Result<Room, RingFault> {
    pieces.clear();
    chains.clear();
    let mut room = 0;
    for ahead in 0..ring.size() {
        let Some(head) = ring.peek(ahead)? else {
            return Ok(Room::NotYet);
        };
        let bytes = ring.walk(head, pieces)?;
        chains.push((head, bytes));
        room += bytes;
        if room >= need {
            return Ok(Room::Enough);
        }
        if !mergeable {
            return Ok(Room::Never);
        }
    }
    // Every buffer that the ring can hold together is too small.
    Ok(Room::Never)
}

/// The next chain of a transmit ring; if there is none, the guest has been asked to kick.
fn next_or_arm(ring: &mut Ring) -> Result<Option<u16>, RingFault> {
    loop {
        if let Some(head) = ring.peek(0)? {
            ring.disarm();
            return Ok(Some(head));
        }
        // Ends: each turn needs entries that the guest added meanwhile, and peek finds those.
        if !ring.arm()? {
            return Ok(None);
        }
    }
}

/// Writes header and body over the pieces, which have room for both.
fn scatter(ring: &Ring, pieces: &[Piece], parts: [&[u8]; 2]) {
    let mut pieces = pieces.iter().copied();
    let mut target = None;
    let mut filled = 0;
    for mut bytes in parts {
        while !bytes.is_empty() {
            let piece: Piece = match target {
                Some(piece) => piece,
                None => pieces.next().expect("find_room found enough"),
            };
            let len = bytes.len().min(piece.len as usize - filled);
            ring.ram().slice(piece).write_slice(&bytes[..len], filled).expect("len is what is left of the piece");
            bytes = &bytes[len..];
            filled += len;
            target = Some(piece);
            if filled == piece.len as usize {
                (target, filled) = (None, 0);
            }
        }
    }
}

/// Copies a chain to `frame`, which is as long as the chain plus what a short header lacks; that part becomes zero.
fn gather(ring: &Ring, pieces: &[Piece], header_bytes: usize, frame: &mut [u8]) {
    let missing = VNET_HEADER_BYTES - header_bytes;
    let mut at = missing;
    for &piece in pieces {
        let end = at + piece.len as usize;
        ring.ram()
            .slice(piece)
            .read_slice(&mut frame[at..end], 0)
            .expect("the piece is read from its start to its end");
        at = end;
    }
    if missing > 0 {
        frame.copy_within(missing..VNET_HEADER_BYTES, 0);
        frame[header_bytes..VNET_HEADER_BYTES].fill(0);
    }
}
