//! The syncvm exchange, steps 1–7 of the design, as straight-line code over two traits (PLOVER §4.4).
//!
//! [`lead_syncvm`] and [`follow_syncvm`] each run on a control thread while the guest is stopped. They strictly
//! alternate in sending, so that two full socket buffers can never wait for each other. Every wait ends
//! by a deadline, and every failure leaves the guests and the dirty sets such that the next syncvm repairs
//! everything.

mod ahead;
mod error;
mod follower;
mod leader;
mod link;
mod phase;
mod report;
mod verify;

use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use error::{ChannelError, GuestError, SyncError};
pub use follower::{FollowerContext, Standing, follow_syncvm};
pub use leader::{LeaderContext, lead_syncvm};
pub use phase::Phase;
pub use report::{Part, PhaseTimes, SyncReport, Traffic};

pub(crate) use leader::compare;
pub(crate) use link::Link;
pub(crate) use report::Stopwatch;

use crate::dirty::DirtySet;
use crate::hash::{HashKind, HashPool};
use crate::page::PageNumber;
use crate::ram::GuestRam;
use crate::rejoin::RejoinProgress;
use crate::transfer::{BlockSize, TransferMode};

/// Pages whose hashes travel in one message, and that are hashed before the next message is waited for:
/// large enough to keep all workers busy, small enough that comparing overlaps with hashing.
pub(crate) const BATCH_PAGES: usize = 4096;

/// An ordered, reliable, bidirectional message channel to the peer. It may break at any point.
pub trait Channel {
    /// Sends one message made of `parts`, at most [`crate::transfer::MAX_MESSAGE_BYTES`] in total.
    ///
    /// # Errors
    /// When it could not be handed over completely by `deadline`, or the peer is gone. The message may or
    /// may not have arrived then.
    fn send(&mut self, kind: u16, parts: &[IoSlice<'_>], deadline: Instant) -> Result<(), ChannelError>;

    /// Receives the next message into `buf` (replacing its content) and returns its kind.
    ///
    /// # Errors
    /// When none arrived by `deadline`, or the peer is gone.
    fn recv(&mut self, buf: &mut Vec<u8>, deadline: Instant) -> Result<u16, ChannelError>;
}

/// One replica's guest as syncvm needs it.
pub trait Guest {
    /// Stops the vCPUs and the device. Harmless when already stopped. On return nothing writes guest memory.
    ///
    /// # Errors
    /// When the guest may still run.
    fn stop(&mut self) -> Result<(), GuestError>;

    /// Lets the guest run.
    ///
    /// # Errors
    /// When it does not.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Adds every page written since the last harvest to `into`: by vCPUs and QEMU (the tracker), and by the
    /// backend itself. The backend must record a page **after** writing it: then a page that is harvested
    /// in between is recorded again.
    ///
    /// # Errors
    /// When pages may have been missed; the caller then treats every page as dirty.
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError>;

    /// Whether [`Self::harvest`] would lose pages written while it runs, so that a rejoin round must stop
    /// the guest for it. See [`crate::tracker::DirtyTracker::exact_while_running`].
    fn harvest_needs_stop(&self) -> bool {
        false
    }

    /// Whether [`Self::harvest`] tells written pages from others. If not, there is no use in harvesting before the stop.
    fn harvest_tells_pages_apart(&self) -> bool {
        true
    }

    /// Saves device and CPU state (everything except RAM) of the stopped guest.
    ///
    /// # Errors
    /// When there is no complete state.
    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError>;

    /// Loads device and CPU state into the stopped guest.
    ///
    /// # Errors
    /// When it was not loaded completely: the guest is lost until a rejoin.
    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// Says which pages were written past the hypervisor into the guest that has stood still since its last harvest; all of
    /// them. A load follows. A hypervisor that derives nothing from a page's content need not know.
    fn announce_written(&mut self, _pages: &mut dyn Iterator<Item = PageNumber>) {}

    /// Whether a load may leave something of the present device state as it is. A follower then saves that state at the stop.
    fn loads_have_leftovers(&self) -> bool {
        false
    }

    /// What of the device state `present` a load of `incoming` would leave as it is, by name: then a load does not make the
    /// two equal.
    fn leftovers(&self, _present: &[u8], _incoming: &[u8]) -> Vec<String> {
        Vec::new()
    }

    /// Puts the devices of the stopped guest into the state of a machine that was just switched on, so that the next load
    /// has no leftovers. May write RAM. Nothing to do for a guest that never has any.
    ///
    /// # Errors
    /// When the devices are in an unknown state.
    fn reset_devices(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    /// The guest's RAM.
    fn ram(&self) -> &GuestRam;
}

/// Who watches an exchange and decides what the local role allows.
pub trait Observer {
    /// Called between all steps. The rig's debug hook kills the process here; the product does nothing.
    fn crash_point(&mut self, _phase: Phase) {}

    /// Whether this replica's guest may run now (a deposed leader's may not).
    fn may_run(&mut self) -> bool;

    /// Leader: the guest runs again.
    fn resumed(&mut self) {}

    /// Leader: the follower acknowledged this syncvm in this view; held frames may leave.
    fn acknowledged(&mut self) {}

    /// Follower: the guest is exactly the leader's at the sync point; the guard is to be emptied. The guest
    /// does not run yet.
    fn applied(&mut self) {}

    /// Rejoin, both sides: how far it is.
    fn progress(&mut self, _progress: RejoinProgress) {}
}

impl<T: Channel + ?Sized> Channel for &mut T {
    fn send(&mut self, kind: u16, parts: &[IoSlice<'_>], deadline: Instant) -> Result<(), ChannelError> {
        (**self).send(kind, parts, deadline)
    }
    fn recv(&mut self, buf: &mut Vec<u8>, deadline: Instant) -> Result<u16, ChannelError> {
        (**self).recv(buf, deadline)
    }
}

/// How exchanges are done. Equal on both sides of a group where that matters; the exchange checks it.
#[derive(Clone, Debug)]
pub struct ExchangeConfig {
    /// The group, as a hash of its name.
    pub group: u64,
    /// Longest wait for one message.
    pub silence_timeout: Duration,
    /// Longest duration of one exchange.
    pub total_timeout: Duration,
    /// The page hash. The leader's setting counts, and the follower takes it over.
    pub hash: HashKind,
    /// Compare written pages before the stop, while the guest still runs (see `ahead.rs`). The leader's setting counts; the
    /// follower's is its guess of that.
    pub background_hashing: bool,
    /// The leader's guest runs again after the copy, not after the acknowledgement.
    pub early_resume: bool,
    /// How much of what may differ is sent. The leader's setting counts.
    pub transfer: TransferMode,
    /// The size of the blocks of [`TransferMode::Delta`], or the one that would have been the cheapest the last time. The
    /// follower's setting counts.
    pub blocks: Option<BlockSize>,
    /// Check invariant I4 after every syncvm: both sides hash all of RAM and compare device state before
    /// anyone runs. Implies no early resume. The leader's setting counts.
    pub verify: bool,
    /// Largest device state accepted, in bytes.
    pub max_device_bytes: usize,
}

impl ExchangeConfig {
    /// The defaults for a group.
    #[must_use]
    pub fn new(group: u64) -> Self {
        Self {
            group,
            silence_timeout: Duration::from_millis(1_000),
            total_timeout: Duration::from_secs(20),
            hash: HashKind::default(),
            background_hashing: true,
            early_resume: true,
            transfer: TransferMode::default(),
            blocks: None,
            verify: false,
            max_device_bytes: 64 << 20,
        }
    }

    pub(crate) fn deadlines(&self) -> Deadlines {
        Deadlines { end: Instant::now() + self.total_timeout, silence: self.silence_timeout }
    }
}

/// The end of an exchange, and the longest wait within it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadlines {
    pub end: Instant,
    pub silence: Duration,
}

impl Deadlines {
    /// The deadline of a wait that begins now.
    pub fn next(&self) -> Instant {
        (Instant::now() + self.silence).min(self.end)
    }
}

/// What both contexts are made of.
pub struct Parts<G, C, O> {
    /// This replica's guest.
    pub guest: G,
    /// The channel to the peer.
    pub channel: C,
    /// The owner's hooks.
    pub observer: O,
    /// How exchanges are done.
    pub config: ExchangeConfig,
    /// The present view; the owner replaces the context or sets it when the view changes.
    pub view: u64,
    /// The hash workers of this guest: one pool for all its exchanges.
    pub pool: Arc<HashPool>,
}
