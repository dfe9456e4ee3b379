//! `SyncReport`: what one syncvm did and what each part of it took.

use std::time::Instant;

use crate::transfer::{Kind, TransferMode};

/// Duration of each part in µs, in the order in which they happen. A part that a side does not have is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseTimes {
    /// Before the stop: harvesting, hashing, comparing and copying while the guest runs.
    pub ahead_us: u64,
    /// Stopping the guest.
    pub stop_us: u64,
    /// Saving the device state (on the follower only if a load might leave some of it).
    pub save_us: u64,
    /// Harvesting the dirty set.
    pub harvest_us: u64,
    /// Exchanging dirty sets; includes waiting for the peer's stop.
    pub exchange_us: u64,
    /// Hashing, exchanging hashes and comparing.
    pub compare_us: u64,
    /// Telling the follower which pages differ (leader), or learning it (follower).
    pub list_us: u64,
    /// Copying divergent pages to the staging area (leader).
    pub copy_us: u64,
    /// Resuming the guest.
    pub resume_us: u64,
    /// Receiving and comparing digests of blocks (leader), or making and sending them (follower).
    pub digest_us: u64,
    /// Sending (leader) or receiving and verifying (follower) the transfer.
    pub transfer_us: u64,
    /// From the last byte sent to the acknowledgement (leader), or sending it (follower).
    pub ack_us: u64,
    /// Writing pages into the guest (follower).
    pub apply_us: u64,
    /// Loading the device state (follower).
    pub load_us: u64,
    /// The check of invariant I4, if switched on.
    pub verify_us: u64,
}

/// What messages are about, for [`Traffic`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Which pages are dirty.
    Sets,
    /// Hashes of pages.
    Hashes,
    /// Which pages differ.
    List,
    /// Digests of blocks.
    Digests,
    /// Blocks and whole pages.
    Memory,
    /// Device state.
    Device,
    /// Everything else.
    Rest,
}

impl Part {
    /// Every part, in the order of their numbers.
    pub const EVERY: [Self; 7] =
        [Self::Sets, Self::Hashes, Self::List, Self::Digests, Self::Memory, Self::Device, Self::Rest];

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sets => "sets",
            Self::Hashes => "hashes",
            Self::List => "list",
            Self::Digests => "digests",
            Self::Memory => "memory",
            Self::Device => "device",
            Self::Rest => "rest",
        }
    }

    fn of(kind: Kind) -> Self {
        match kind {
            Kind::DirtySet | Kind::AheadSet => Self::Sets,
            Kind::Hashes | Kind::AheadHashes | Kind::Recheck => Self::Hashes,
            Kind::Divergent => Self::List,
            Kind::Digests => Self::Digests,
            Kind::Blocks | Kind::Pages => Self::Memory,
            Kind::Device | Kind::DeviceDelta => Self::Device,
            _ => Self::Rest,
        }
    }
}

/// Bytes that crossed the wire in either direction, headers included, by what they were about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic([u64; Part::EVERY.len()]);

impl Traffic {
    /// A message of `bytes` crossed.
    pub(crate) fn add(&mut self, kind: Kind, bytes: usize) {
        self.0[Part::of(kind) as usize] += bytes as u64;
    }

    /// Bytes of this part.
    #[must_use]
    pub fn bytes(&self, part: Part) -> u64 {
        self.0[part as usize]
    }
}

/// What one syncvm did, from the view of one side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SyncReport {
    /// Index of the `SyncVm` entry.
    pub number: u64,
    /// Pages dirty on this side, including those of failed attempts before.
    pub dirty_local: usize,
    /// Pages dirty on the other side.
    pub dirty_peer: usize,
    /// Pages dirty on either.
    pub union_pages: usize,
    /// What the leader chose to send.
    pub transfer: TransferMode,
    /// Pages whose hashes were compared: the union, or none with [`TransferMode::All`].
    pub compared_pages: usize,
    /// How many of these had been hashed on this side before the stop.
    pub known_hashes: usize,
    /// How many pages had been copied before the stop (leader).
    pub copied_ahead: usize,
    /// Pages of these that really differed.
    pub divergent_pages: usize,
    /// Pages that were sent: the divergent ones, or all of the union with [`TransferMode::All`].
    pub sent_pages: usize,
    /// How many of those were zero on the leader.
    pub zero_pages: usize,
    /// Bytes of one block, if blocks were sent.
    pub block_bytes: usize,
    /// Blocks that were sent.
    pub sent_blocks: usize,
    /// Pages that were sent whole because a digest had let a difference through.
    pub resent_pages: usize,
    /// Bytes of the 256-byte blocks in which the two guests differed (follower, if blocks were sent).
    pub differing_bytes: u64,
    /// Bytes of device state.
    pub device_bytes: usize,
    /// Bytes sent to the peer.
    pub bytes_sent: u64,
    /// Bytes received from it.
    pub bytes_received: u64,
    /// What they were about.
    pub traffic: Traffic,
    /// What sending all of the leader's dirty pages in full plus the device state would have cost.
    pub full_transfer_bytes: u64,
    /// Where the time went.
    pub phases: PhaseTimes,
    /// How long the guest stood still: from the call to stop to the return of resume. 0 if it still stands.
    pub guest_stop_us: u64,
    /// The whole exchange.
    pub total_us: u64,
    /// Invariant I4 was checked and holds.
    pub verified: bool,
    /// The guest runs.
    pub resumed: bool,
}

/// Measures laps.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    start: Instant,
    lap: Instant,
}

impl Stopwatch {
    pub fn start() -> Self {
        let start = Instant::now();
        Self { start, lap: start }
    }

    /// µs since the last lap.
    pub fn lap(&mut self) -> u64 {
        let now = Instant::now();
        let us = now.duration_since(self.lap).as_micros() as u64;
        self.lap = now;
        us
    }

    /// µs since the start.
    pub fn total(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }
}
