//! What drives a group's thread: turn after turn, and between two of them what the [`Idler`] says.
//!
//! The same for a replica ([`super::reactor`]) and for a VM that is not replicated ([`super::passthrough`]), so that the
//! difference between them is what replication costs. It blocks in one place only, the poller.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dataplane::counters::LoopCounter;
use dataplane::idle::{BREATHER_US, Found, IdleStrategy, Idler, Rest};
use dataplane::stages::{Stage, StageClock};
use dataplane::uplink::{OffloadFlags, Uplink};
use dataplane::wait::{Interest, Poller, Ready, now_us};

use super::GroupError;
use crate::device::{DeviceEvent, NetDevice, Offloads};

/// Poller tokens; the fabric's own begin at [`TOKEN_FABRIC`].
pub const TOKEN_WAKE: u64 = 0;
/// The worker's bell.
pub const TOKEN_WORKER: u64 = 1;
/// The log's eventfd.
pub const TOKEN_LOG: u64 = 2;
/// The device's commands.
pub const TOKEN_DEVICE: u64 = 3;
/// The uplink.
pub const TOKEN_UPLINK: u64 = 4;
/// First token of the guest's kicks.
const TOKEN_KICKS: u64 = 8;
/// First token of the fabric.
pub const TOKEN_FABRIC: u64 = 64;

const _: () = assert!(TOKEN_KICKS + 2 * crate::device::MAX_QUEUE_PAIRS as u64 <= TOKEN_FABRIC);

/// The loop looks at everything at least this often, whatever its deadlines say.
const LONGEST_SLEEP_US: u64 = 50_000;
/// Longest sleep while the uplink can only be polled.
const POLLED_SLEEP_US: u64 = 20;

/// What the poller found ready. Every source is level-triggered or looked at in every turn, so nothing is lost by
/// leaving it for later.
#[derive(Debug, Clone, Copy)]
pub struct Due {
    /// Somebody rang for the control requests.
    pub wake: bool,
    /// Somebody rang for the worker's reports.
    pub worker: bool,
    /// The device's session wants something.
    pub device: bool,
    /// The uplink has frames, or must be asked.
    pub uplink: bool,
    /// The fabric's sockets want something.
    pub fabric: bool,
}

impl Due {
    const EVERYTHING: Due = Due { wake: true, worker: true, device: true, uplink: true, fabric: true };
    const NOTHING: Due = Due { wake: false, worker: false, device: false, uplink: false, fabric: false };

    fn of(ready: &[Ready]) -> Due {
        let mut due = Due::NOTHING;
        for event in ready {
            match event.token {
                TOKEN_WAKE => due.wake = true,
                TOKEN_WORKER => due.worker = true,
                TOKEN_DEVICE => due.device = true,
                TOKEN_UPLINK => due.uplink = true,
                token => due.fabric |= token >= TOKEN_FABRIC,
            }
        }
        due
    }
}

/// The loop's own state.
pub struct Pace {
    /// What to do between two turns.
    pub idler: Idler,
    /// Turns and time.
    pub loops: LoopCounter,
    /// Time and sizes per stage.
    pub stages: StageClock,
    /// Where it sleeps.
    pub poller: Arc<Poller>,
    ready: Vec<Ready>,
}

impl Pace {
    /// Starts at `now_us`.
    pub fn new(idle: IdleStrategy, poller: Arc<Poller>, now_us: u64) -> Self {
        Self {
            idler: Idler::new(idle, now_us),
            loops: LoopCounter::new(now_us),
            stages: StageClock::new(),
            poller,
            ready: Vec::with_capacity(64),
        }
    }

    /// Sleeps for at most `sleep_us` and says what is ready.
    fn look(&mut self, sleep_us: u64) -> std::io::Result<Due> {
        self.poller.wait(Some(sleep_us), &mut self.ready)?;
        if sleep_us > 0 {
            let now = now_us();
            self.idler.woke(now);
            self.loops.end_sleep(now);
            self.stages.skip();
        } else {
            self.stages.lap(Stage::Look, self.ready.len());
        }
        Ok(Due::of(&self.ready))
    }
}

/// Something that is driven.
pub trait Turns {
    /// The loop's state, which lives beside what it drives so that turns can count.
    fn pace(&mut self) -> &mut Pace;

    /// One turn. What is not `due` costs no system call.
    fn turn(&mut self, now_us: u64, due: Due) -> Result<Found, GroupError>;

    /// When the next turn is due, whatever happens.
    fn next_deadline_us(&self, now_us: u64) -> u64;

    /// Asks every source for notifications; the next turn looks at each once more. What is announced by a descriptor of its
    /// own (uplink, sockets, the log) needs no asking.
    fn arm(&mut self);

    /// Immediately before a sleep: the last source asked, one that says at once whether it has something. It has: false.
    fn may_sleep(&mut self) -> bool {
        true
    }

    /// Before each look at the descriptors.
    fn before_look(&mut self, _now_us: u64) {}

    /// Sources without a descriptor are due in every turn.
    fn always_due(&mut self) -> AlwaysDue;
}

/// What can only be polled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AlwaysDue {
    /// The uplink has no descriptor.
    pub uplink: bool,
    /// Messages come through sockets: descriptors must be looked at even if the uplink has none.
    pub sockets: bool,
}

/// Runs until `stopping` (`Ok`) or until the group must be started anew (`Err`).
pub fn drive(driven: &mut impl Turns, stopping: &AtomicBool) -> Result<(), GroupError> {
    let system = |source| GroupError::System { what: "epoll", source };
    let always = driven.always_due();
    driven.pace().idler.set_by_descriptor(!always.uplink || always.sockets);
    let mut due = Due::EVERYTHING;
    while !stopping.load(Ordering::Acquire) {
        let now = now_us();
        let found = driven.turn(now, due)?;
        let after = now_us();
        driven.pace().loops.end_loop(after, found.work);
        let rest = driven.pace().idler.after_turn(after, found);
        let longest_us = if always.uplink { POLLED_SLEEP_US } else { LONGEST_SLEEP_US };
        let sleep_us = match rest {
            // What came through memory since the turn would wake nobody.
            Rest::Sleep if !driven.may_sleep() => 0,
            Rest::Sleep => driven.next_deadline_us(after).saturating_sub(after).min(longest_us),
            Rest::Breathe => BREATHER_US,
            Rest::Again | Rest::Look | Rest::Yield | Rest::Arm => 0,
        };
        driven.before_look(after);
        match rest {
            Rest::Yield => std::thread::yield_now(),
            Rest::Arm => driven.arm(),
            Rest::Again | Rest::Look | Rest::Sleep | Rest::Breathe => {}
        }
        due = if rest == Rest::Again { Due::NOTHING } else { driven.pace().look(sleep_us).map_err(system)? };
        due.uplink |= always.uplink;
    }
    Ok(())
}

/// Carries out what the device's session asks for and keeps the guest's kicks in the poller; the rest goes to `events`.
pub fn take_device_events(device: &mut NetDevice, poller: &Poller, events: &mut Vec<DeviceEvent>) {
    // Kick descriptors must leave the poller at once: QEMU keeps its end open, and gives the number to another.
    device.handle_commands(&mut |event| match event {
        DeviceEvent::WatchKick { ring, kick } => {
            if let Err(error) = poller.add(&*kick, TOKEN_KICKS + u64::from(ring.0), Interest::ReadEdge) {
                tracing::warn!(%error, ?ring, "a kick descriptor cannot be watched; the device is polled instead");
            }
        }
        DeviceEvent::UnwatchKick { kick, .. } => {
            let _ = poller.remove(&*kick);
        }
        event => events.push(event),
    });
}

/// Tells the uplink what the guest accepted. Returns what went wrong, for people.
pub fn set_offloads(uplink: &mut dyn Uplink, offloads: Offloads) -> Option<String> {
    let flags = OffloadFlags { csum: offloads.checksum, tso4: offloads.tso4, tso6: offloads.tso6, ecn: offloads.ecn };
    let refused = uplink.set_offload(flags).err()?;
    Some(format!("uplink {}: offloads not set: {refused}", uplink.name()))
}
