//! A VM that is not replicated: its frames pass straight through between uplink and device, ordered and held by nobody.
//!
//! `mode = "unreplicated"` protects nothing. It is what protection is compared with: the same loop, idle strategies, rings
//! and uplinks, without log, peers and syncvm. Also the quickest way to see whether a guest works on our device at all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dataplane::batch::{self, BatchBuilder};
use dataplane::idle::Found;
use dataplane::mailbox;
use dataplane::region::Region;
use dataplane::stages::{Sizes, Stage};
use dataplane::uplink::filter::Filter;
use dataplane::uplink::{Burst, Intake, Uplink};
use dataplane::wait::{Bell, Interest};

use super::GroupError;
use super::requests::reactor_status;
use super::stalls::Stalls;
use super::turns::{
    AlwaysDue, Due, Pace, TOKEN_DEVICE, TOKEN_UPLINK, TOKEN_WAKE, TOKEN_WORKER, Turns, drive, set_offloads,
    take_device_events,
};
use super::worker::{Command, Report, Worker};
use crate::config::{NodeConfig, VmConfig};
use crate::control::{GroupRequest, Request, Response};
use crate::device::{DeviceEvent, Inject, NetDevice};
use crate::status::GroupStatus;

/// Frames that are moved in one direction in one turn.
const BUDGET_FRAMES: usize = 256;
/// Memory of one burst from the uplink.
pub const BURST_BYTES: usize = 256 << 10;
/// How long a guest may offer no buffers before what waits for it is dropped, as a NIC's queue would.
const RX_STALL_LIMIT_US: u64 = 50_000;
/// A stalled delivery is looked at again after this time.
const RETRY_US: u64 = 1_000;

/// A guest that is attached, or why there is none.
enum Guest {
    Absent(String),
    Prepared,
    Running,
}

/// A burst from the uplink that the guest has not taken wholly yet.
#[derive(Default)]
struct Waiting {
    /// Bytes of the batch; 0 when nothing waits.
    bytes: usize,
    /// Frames of it that the guest has.
    done: usize,
}

/// What a VM that is not replicated consists of.
pub struct Parts<'a> {
    /// This node.
    pub node: &'a NodeConfig,
    /// The VM.
    pub vm: &'a VmConfig,
    /// Its device.
    pub device: NetDevice,
    /// Its port.
    pub uplink: Box<dyn Uplink>,
    /// Which inbound frames it gets.
    pub filter: Filter,
    /// Who looks after QEMU.
    pub worker: Worker,
    /// The loop's state.
    pub pace: Pace,
    /// Requests of the command line.
    pub requests: mailbox::Receiver<GroupRequest>,
    /// Rung for them.
    pub wake: Arc<Bell>,
    /// At least [`BURST_BYTES`].
    pub memory: Region,
}

/// See the module.
struct Passthrough<'a> {
    parts: Parts<'a>,
    waiting: Waiting,
    /// Receiving queues of the guest that take nothing.
    stalls: Stalls,
    uplink_watched: bool,
    /// The last burst did not empty the uplink, which may say so no more.
    uplink_has_more: bool,
    guest: Guest,
    tracker: String,
    last_error: Option<String>,
    events: Vec<DeviceEvent>,
    failure: Option<std::io::Error>,
    frames_in: u64,
    frames_out: u64,
    frames_dropped: u64,
}

/// Runs until the daemon ends (`Ok`) or the VM must be started anew (`Err`).
///
/// # Errors
/// The uplink is gone, or the system refused something basic.
pub fn run(parts: Parts<'_>, stopping: &AtomicBool) -> Result<(), GroupError> {
    tracing::warn!(
        vm = %parts.vm.name,
        "UNREPLICATED: mode = \"unreplicated\" protects nothing; if this node dies, the VM and everything in it is lost"
    );
    // Nobody else can have this guest.
    parts.worker.standing.may_run.store(true, Ordering::Release);
    let mut passthrough = Passthrough {
        parts,
        waiting: Waiting::default(),
        stalls: Stalls::default(),
        uplink_watched: true,
        uplink_has_more: false,
        guest: Guest::Absent("no QEMU has been attached yet; start it with `plover launch`".into()),
        tracker: String::new(),
        last_error: None,
        events: Vec::new(),
        failure: None,
        frames_in: 0,
        frames_out: 0,
        frames_dropped: 0,
    };
    passthrough.watch_all().map_err(|source| GroupError::System { what: "epoll", source })?;
    drive(&mut passthrough, stopping)
}

impl Turns for Passthrough<'_> {
    fn pace(&mut self) -> &mut Pace {
        &mut self.parts.pace
    }

    fn turn(&mut self, now: u64, due: Due) -> Result<Found, GroupError> {
        if due.wake {
            self.parts.wake.drain();
        }
        if !self.parts.pace.idler.armed() {
            self.parts.wake.disarm();
            self.parts.worker.report_bell.disarm();
            self.parts.device.set_polling(true);
        }
        let wanted = (due.uplink || self.uplink_has_more) && self.waiting.bytes == 0;
        let burst = if wanted { self.receive() } else { Burst::default() };
        self.parts.pace.stages.lap(Stage::Uplink, burst.frames);
        let delivered = self.deliver(now);
        self.parts.pace.stages.lap(Stage::Deliver, delivered);
        let collected = self.collect();
        if let Err(error) = self.parts.uplink.flush() {
            self.failure = Some(error);
        }
        self.parts.device.flush_signals();
        self.parts.pace.stages.lap(Stage::Collect, collected);
        let reports = self.look_after(due);
        self.parts.pace.stages.lap(Stage::Decide, reports);
        if let Some(error) = self.failure.take() {
            return Err(GroupError::Uplink { name: self.parts.uplink.name().to_owned(), reason: error.to_string() });
        }
        let more = (self.uplink_has_more && self.waiting.bytes == 0) || collected == BUDGET_FRAMES;
        Ok(Found { work: more || burst.frames + delivered + collected + reports > 0, more })
    }

    fn next_deadline_us(&self, now: u64) -> u64 {
        if self.waiting.bytes > 0 { now + RETRY_US } else { u64::MAX }
    }

    fn arm(&mut self) {
        self.parts.wake.arm();
        self.parts.worker.report_bell.arm();
        self.parts.device.set_polling(false);
        // Whatever it finds, the next turn finds too.
        self.parts.device.arm();
    }

    fn before_look(&mut self, _now: u64) {
        // What cannot be taken must not keep us awake.
        let wanted = self.waiting.bytes == 0;
        if std::mem::replace(&mut self.uplink_watched, wanted) != wanted
            && let Some(fd) = self.parts.uplink.fd()
        {
            let poller = &self.parts.pace.poller;
            let changed = if wanted { poller.add(fd, TOKEN_UPLINK, Interest::Read) } else { poller.remove(fd) };
            debug_assert!(changed.is_ok(), "the uplink is in the poller exactly while it is watched");
        }
    }

    fn always_due(&mut self) -> AlwaysDue {
        AlwaysDue { uplink: self.parts.uplink.fd().is_none(), sockets: false }
    }
}

impl Passthrough<'_> {
    fn watch_all(&mut self) -> std::io::Result<()> {
        let poller = &self.parts.pace.poller;
        poller.add(&*self.parts.wake, TOKEN_WAKE, Interest::Read)?;
        poller.add(&*self.parts.worker.report_bell, TOKEN_WORKER, Interest::Read)?;
        poller.add(self.parts.device.event_fd(), TOKEN_DEVICE, Interest::Read)?;
        match self.parts.uplink.fd() {
            Some(fd) => poller.add(fd, TOKEN_UPLINK, Interest::Read),
            None => Ok(()),
        }
    }

    /// Takes a burst from the uplink.
    fn receive(&mut self) -> Burst {
        let mut batch = BatchBuilder::within(&mut self.parts.memory[..BURST_BYTES]);
        let mut intake = Intake::new(&mut batch, &mut self.parts.filter);
        let burst = self.parts.uplink.recv_burst(&mut intake, BUDGET_FRAMES);
        let (frames, bytes) = (batch.len(), batch.seal());
        if frames > 0 {
            self.frames_in += frames as u64;
            self.waiting = Waiting { bytes, ..Waiting::default() };
        }
        let burst = burst.unwrap_or_else(|error| {
            self.failure = Some(error);
            Burst::default()
        });
        self.uplink_has_more = burst.more;
        burst
    }

    /// Gives the guest what waits for it. Returns how many frames were dealt with.
    fn deliver(&mut self, now: u64) -> usize {
        if self.waiting.bytes == 0 {
            return 0;
        }
        let mut rest = batch::frames(&self.parts.memory[..self.waiting.bytes]).expect("it was built in this thread");
        if let Some(last_done) = self.waiting.done.checked_sub(1) {
            rest.nth(last_done);
        }
        let before = self.waiting.done;
        while !rest.is_empty() {
            let (mut done, outcome) = self.parts.device.inject_batch(rest.clone());
            if self.stalls.is_any() {
                rest.clone().take(done).for_each(|frame| self.stalls.took(self.parts.device.receive_pair(frame)));
            }
            // A guest without a driver, or a queue that it has stopped reading: as a NIC, drop what is for it.
            let given_up = match outcome {
                Inject::Done => 0,
                Inject::NotRunning => rest.clone().skip(done).count(),
                Inject::NoBuffers => {
                    let queue = rest.clone().nth(done).map_or(0, |frame| self.parts.device.receive_pair(frame));
                    if !self.stalls.is_too_long(queue, now, RX_STALL_LIMIT_US) {
                        self.waiting.done += done;
                        return self.waiting.done - before;
                    }
                    self.stalls.dropped(queue);
                    1
                }
            };
            self.frames_dropped += given_up as u64;
            done += given_up;
            self.waiting.done += done;
            if let Some(last) = done.checked_sub(1) {
                rest.nth(last);
            }
        }
        self.stalls.nothing_waits();
        let dealt_with = self.waiting.done - before;
        self.waiting = Waiting::default();
        dealt_with
    }

    /// Sends what the guest has sent. Returns how many frames.
    fn collect(&mut self) -> usize {
        let Parts { device, uplink, .. } = &mut self.parts;
        let failure = &mut self.failure;
        let frames = device.collect_tx(BUDGET_FRAMES, &mut |frame| {
            // A frame that the port does not take is dropped and counted there, as a switch would.
            uplink.send(frame).map_err(|error| *failure = Some(error)).is_ok()
        });
        self.frames_out += frames as u64;
        frames
    }

    /// Everything that is not packets. Returns how much there was.
    fn look_after(&mut self, due: Due) -> usize {
        let mut count = 0;
        if due.device {
            let mut events = std::mem::take(&mut self.events);
            take_device_events(&mut self.parts.device, &self.parts.pace.poller, &mut events);
            count += events.len();
            events.drain(..).for_each(|event| self.device_event(event));
            self.events = events;
        }
        if due.worker {
            self.parts.worker.report_bell.drain();
        }
        while let Some(report) = self.parts.worker.next_report() {
            count += 1;
            self.worker_report(report);
        }
        while let Ok(GroupRequest { request, reply }) = self.parts.requests.try_recv() {
            count += 1;
            let _ = reply.send(self.answer(&request));
        }
        count
    }

    fn device_event(&mut self, event: DeviceEvent) {
        match event {
            DeviceEvent::Started { offloads, .. } => {
                if let Some(error) = set_offloads(&mut *self.parts.uplink, offloads) {
                    self.note_error(error);
                }
            }
            DeviceEvent::Broken(error) => self.note_error(format!("the guest's network device was stopped: {error}")),
            _ => {}
        }
    }

    fn worker_report(&mut self, report: Report) {
        match report {
            Report::Attached { fresh, running, tracker, .. } => {
                tracing::info!(vm = %self.parts.vm.name, fresh, running, "QEMU attached");
                self.tracker = tracker;
                self.guest = if running { Guest::Running } else { Guest::Prepared };
                if !running {
                    self.parts.worker.send(if fresh { Command::RunFresh } else { Command::Resume });
                }
            }
            Report::Lost { reason, .. } => {
                let known = matches!(&self.guest, Guest::Absent(known) if *known == reason);
                if !known {
                    self.note_error(format!("guest: {reason}"));
                }
                self.guest = Guest::Absent(reason);
            }
            Report::Running => self.guest = Guest::Running,
            Report::NotRunning { reason } => {
                self.guest = Guest::Prepared;
                self.note_error(format!("guest: {reason}"));
            }
            _ => unreachable!("the worker was asked for nothing else"),
        }
    }

    fn answer(&mut self, request: &Request) -> Response {
        match request {
            Request::Status { .. } => Response::Status(vec![self.status()]),
            _ => {
                let name = &self.parts.vm.name;
                Response::Refused(format!(
                    "{name}: it is not replicated (mode = \"unreplicated\"); there is nothing to do"
                ))
            }
        }
    }

    fn status(&mut self) -> GroupStatus {
        let loops = self.parts.pace.loops.counts();
        let drops = self.parts.uplink.drops();
        let (guest, intact) = match &self.guest {
            Guest::Absent(why) => (why.clone(), false),
            Guest::Prepared => ("prepared".into(), true),
            Guest::Running => ("running".into(), true),
        };
        GroupStatus {
            vm: self.parts.vm.name.clone(),
            node: self.parts.node.name.clone(),
            role: "unreplicated".into(),
            unprotected_reason: Some("mode = \"unreplicated\" protects nothing".into()),
            guest,
            guest_intact: intact,
            frames_in: self.frames_in,
            frames_out: self.frames_out.saturating_sub(drops.outbound()),
            frames_dropped: self.frames_dropped + drops.outbound(),
            tracker: self.tracker.clone(),
            last_error: self.last_error.clone(),
            busy_us: loops.busy_us,
            idle_us: loops.idle_us,
            reactor: reactor_status(&self.parts.pace, &Sizes::default()),
            ..GroupStatus::default()
        }
    }

    fn note_error(&mut self, text: String) {
        tracing::warn!(vm = %self.parts.vm.name, "{text}");
        self.last_error = Some(text);
    }
}
