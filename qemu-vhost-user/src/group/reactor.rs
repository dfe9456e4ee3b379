//! The reactor: one thread per group that runs to completion.
//!
//! A turn polls everything once in the order of the packet's way (uplink, propose, fabric, consensus, log, collect, guard,
//! deliver, decide, release, send), each stage within a budget, so that none starves the others. What happens between two
//! turns is the [`Idler`]'s word: nothing, a look at descriptors, or sleep. It blocks in one place only, the poller, until the
//! next event or the next deadline. The state has one owner per part: [`Ordering`] the log, [`Delivery`] what the guest has
//! consumed, [`Egress`] what is held, [`Lead`] what a leader is about, [`Follow`] what a secondary is about.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering as Atomic};
use std::sync::mpsc::Receiver;

use consensus::{Event, Notice, ReplicaId};
use dataplane::arena::Arena;
use dataplane::counters::LoopCounter;
use dataplane::fabric::{Fabric, FabricEvent, PeerFabric};
use dataplane::idle::{BREATHER_US, Found, Idler, Rest};
use dataplane::region::PageSize;
use dataplane::stages::{Stage, StageClock};
use dataplane::uplink::{Burst, OffloadFlags};
use dataplane::wait::{Bell, Interest, Poller, Ready, now_us};

use super::GroupError;
use super::delivery::Delivery;
use super::egress::Egress;
use super::follow::Follow;
use super::guest::LocalGuest;
use super::ingress::Ingress;
use super::lead::Lead;
use super::messages::{GuestReport, KIND_CONSENSUS, KIND_REPORT};
use super::ordering::Ordering;
use super::peers::{PeerEvent, Peers, Received};
use super::requests::SyncWaiters;
use super::totals::Totals;
use super::worker::{Report, Worker};
use crate::config::{NodeConfig, VmConfig};
use crate::control::GroupRequest;
use crate::device::{DeviceEvent, NetDevice};

/// Poller tokens; the fabric's own begin at [`TOKEN_FABRIC`].
const TOKEN_WAKE: u64 = 0;
const TOKEN_WORKER: u64 = 1;
const TOKEN_LOG: u64 = 2;
const TOKEN_DEVICE: u64 = 3;
const TOKEN_UPLINK: u64 = 4;
const TOKEN_KICKS: u64 = 8;
/// First token of the fabric.
pub const TOKEN_FABRIC: u64 = 64;

/// Peers hear how our guest is at least this often.
const REPORT_INTERVAL_US: u64 = 100_000;
/// Bulk progress is looked at this often.
const PROGRESS_INTERVAL_US: u64 = 10_000;
/// The loop looks at everything at least this often, whatever its deadlines say.
const LONGEST_SLEEP_US: u64 = 50_000;
/// Longest sleep while the uplink can only be polled.
const POLLED_SLEEP_US: u64 = 20;

/// A reactor that was kept from running for this long must not judge its peers by what it did not hear meanwhile.
const OWN_STALL_US: u64 = 20_000;
/// What the poller found ready. Every source is level-triggered or looked at in every turn, so nothing is lost by
/// leaving it for later.
#[derive(Debug, Clone, Copy)]
struct Due {
    wake: bool,
    worker: bool,
    device: bool,
    uplink: bool,
    fabric: bool,
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

/// All of the fabric, or what costs no system call.
type PollFabric = fn(&mut PeerFabric, u64, &mut dyn FnMut(FabricEvent<'_>));

/// All of one group on this node.
pub struct Reactor<'a> {
    pub(super) node: &'a NodeConfig,
    pub(super) vm: &'a VmConfig,
    pub(super) me: ReplicaId,
    pub(super) ordering: Ordering,
    pub(super) device: NetDevice,
    pub(super) ingress: Ingress,
    pub(super) egress: Egress,
    pub(super) arena: Arena,
    pub(super) pages: PageSize,
    pub(super) delivery: Delivery,
    pub(super) worker: Worker,
    pub(super) guest: LocalGuest,
    pub(super) peers: Peers,
    pub(super) lead: Option<Lead>,
    pub(super) follow: Follow,
    pub(super) totals: Totals,
    pub(super) last_error: Option<String>,
    pub(super) idler: Idler,
    pub(super) loops: LoopCounter,
    pub(super) stages: StageClock,
    pub(super) requests: Receiver<GroupRequest>,
    pub(super) wake: Arc<Bell>,
    pub(super) stopping: &'a AtomicBool,
    pub(super) poller: Arc<Poller>,
    pub(super) next_progress_us: u64,
    pub(super) next_report_us: u64,
    pub(super) reported: GuestReport,
    pub(super) bulk_seen: u64,
    pub(super) sync_waiters: SyncWaiters,
}

impl Reactor<'_> {
    /// Runs until the daemon ends (`Ok`) or the group must be started anew (`Err`).
    pub fn run(&mut self) -> Result<(), GroupError> {
        let system = |source| GroupError::System { what: "epoll", source };
        self.watch_all().map_err(system)?;
        // Ports without a descriptor can only be polled.
        let polled = Due { uplink: self.egress.uplink().fd().is_none(), ..Due::NOTHING };
        let mut ready: Vec<Ready> = Vec::with_capacity(64);
        let mut due = Due::EVERYTHING;
        let mut planned_us = now_us();
        while !self.stopping.load(Atomic::Acquire) {
            let now = now_us();
            if now.saturating_sub(planned_us) > OWN_STALL_US {
                self.forgive_silence(now);
            }
            let found = self.turn(now, due)?;
            let after = now_us();
            self.loops.end_loop(after, found.work);
            let rest = self.idler.after_turn(after, found);
            let sleep_us = match rest {
                // What came through memory since the turn would wake nobody.
                Rest::Sleep if self.ordering.fabric().arm() => 0,
                Rest::Sleep => self.next_deadline_us(after).saturating_sub(after).min(LONGEST_SLEEP_US),
                Rest::Breathe => BREATHER_US,
                Rest::Again | Rest::Look | Rest::Yield | Rest::Arm => 0,
            };
            let sleep_us = if polled.uplink { sleep_us.min(POLLED_SLEEP_US) } else { sleep_us };
            planned_us = after + sleep_us;
            self.watch_uplink(after);
            due = match rest {
                Rest::Again => Due::NOTHING,
                Rest::Yield => {
                    std::thread::yield_now();
                    self.look(0, &mut ready).map_err(system)?
                }
                Rest::Arm => {
                    self.arm();
                    self.look(0, &mut ready).map_err(system)?
                }
                Rest::Look | Rest::Sleep | Rest::Breathe => self.look(sleep_us, &mut ready).map_err(system)?,
            };
            due.uplink |= polled.uplink;
        }
        Ok(())
    }

    /// Puts every descriptor into the poller, once.
    fn watch_all(&mut self) -> std::io::Result<()> {
        self.poller.add(&*self.wake, TOKEN_WAKE, Interest::Read)?;
        self.poller.add(&*self.worker.report_bell, TOKEN_WORKER, Interest::Read)?;
        if let Some(event) = self.ordering.log().event_fd() {
            self.poller.add(event, TOKEN_LOG, Interest::ReadEdge)?;
        }
        self.poller.add(self.device.event_fd(), TOKEN_DEVICE, Interest::Read)?;
        match self.egress.uplink().fd() {
            Some(fd) => self.poller.add(fd, TOKEN_UPLINK, Interest::Read),
            None => Ok(()),
        }
    }

    /// Asks every source for notifications; the next turn looks at each once more. What is announced by a descriptor of its
    /// own (uplink, sockets, the log) needs no asking.
    fn arm(&mut self) {
        self.wake.arm();
        self.device.set_polling(false);
        // Whatever it finds, the next turn finds too.
        self.device.arm();
        self.worker.report_bell.arm();
    }

    /// Sleeps for at most `sleep_us` and says what is ready.
    fn look(&mut self, sleep_us: u64, ready: &mut Vec<Ready>) -> std::io::Result<Due> {
        self.poller.wait(Some(sleep_us), ready)?;
        if sleep_us > 0 {
            let now = now_us();
            self.idler.woke(now);
            self.loops.end_sleep(now);
            self.stages.skip();
        } else {
            self.stages.lap(Stage::Look, ready.len());
        }
        Ok(Due::of(ready))
    }

    /// One turn. What is not `due` costs no system call.
    fn turn(&mut self, now: u64, due: Due) -> Result<Found, GroupError> {
        if due.wake {
            self.wake.drain();
        }
        if !self.idler.armed() {
            self.wake.disarm();
            self.worker.report_bell.disarm();
            self.device.set_polling(true);
        }
        let inputs = if due.uplink { self.take_inputs(now) } else { Burst::default() };
        self.stages.lap(Stage::Uplink, inputs.frames);
        let wants_fabric = due.fabric || now >= self.ordering.fabric_deadline_us();
        let messages = match wants_fabric {
            true => self.poll_fabric(now, Fabric::poll),
            false if self.ordering.fabric().has_memory_lanes() => self.poll_fabric(now, Fabric::poll_lanes),
            false => 0,
        };
        self.stages.lap(Stage::Fabric, messages);
        let durable = self.ordering.poll_log(now);
        if now >= self.ordering.replica().next_deadline_us() {
            self.ordering.step(now, Event::Tick);
        }
        self.stages.lap(Stage::Log, durable);
        self.take_notices(now);
        let reports = self.take_worker_reports(now, due.worker);
        let alone = self.alone_proof();
        self.stages.lap(Stage::Decide, reports);
        let collected = self.egress.collect(&mut self.device, now, alone);
        self.stages.lap(Stage::Collect, collected.frames);
        if due.device {
            self.take_device_events();
        }
        let delivered = self.deliver(now);
        self.stages.lap(Stage::Deliver, delivered.frames);
        self.decide(now);
        self.stages.lap(Stage::Decide, 0);
        let released = self.egress.go_on_releasing(self.ordering.replica());
        let ended = self.end_turn();
        self.stages.lap(Stage::Release, released);
        ended?;
        let work = inputs.frames + messages + durable + reports + collected.frames + delivered.frames + released > 0;
        let more = inputs.more
            || messages > 0
            || collected.more
            || delivered.more
            || self.egress.is_releasing()
            || self.ordering.log_wants_polling();
        Ok(Found { work: work || more, more })
    }

    /// Roles, slots, requests, reports.
    fn decide(&mut self, now: u64) {
        self.tell_consumed(now);
        self.note_bulk_progress(now);
        self.plan_follow(now);
        self.plan_lead(now);
        self.take_requests(now);
        self.send_report(now);
    }

    /// Interrupts the guest and hands frames to the wire, once for all of the turn's; says whether the group can go on.
    fn end_turn(&mut self) -> Result<(), GroupError> {
        self.device.flush_signals();
        let flushed = self.egress.flush();
        if let Some(error) = self.ingress.failure.take().or(flushed.err()) {
            return Err(GroupError::Uplink { name: self.egress.uplink().name().to_owned(), reason: error.to_string() });
        }
        self.ordering.log_failure().map_or(Ok(()), Err)
    }

    /// This thread was not run: peers get one more heartbeat's time before they count as silent.
    fn forgive_silence(&mut self, now: u64) {
        tracing::debug!(vm = %self.vm.name, "the reactor was not run for a while");
        for peer in self.peers.ids() {
            if self.peers.get(peer).connected {
                self.ordering.step(now, Event::PeerHeard(peer));
            }
        }
    }

    fn next_deadline_us(&self, now: u64) -> u64 {
        let mut next = self.ordering.replica().next_deadline_us().min(self.next_report_us);
        next = next.min(self.ordering.fabric_deadline_us());
        next = next.min(self.follow.next_deadline_us(now));
        next = next.min(self.delivery.next_deadline_us());
        if let Some(lead) = &self.lead {
            next = next.min(lead.next_deadline_us(now));
        }
        next
    }

    /// The uplink is watched only while its frames are wanted, or can be thrown away at once.
    fn watch_uplink(&mut self, now: u64) {
        let wanted = !self.is_serving() || self.may_take_inputs(now);
        if self.ingress.set_watched(wanted) {
            let Some(fd) = self.egress.uplink().fd() else { return };
            let changed =
                if wanted { self.poller.add(fd, TOKEN_UPLINK, Interest::Read) } else { self.poller.remove(fd) };
            debug_assert!(changed.is_ok(), "the uplink is in the poller exactly while it is watched");
        }
    }

    /// Handles what the peers sent; returns how many messages and events.
    fn poll_fabric(&mut self, now: u64, poll: PollFabric) -> usize {
        let mut inbox = std::mem::take(&mut self.peers.inbox);
        let arena = &mut self.arena;
        poll(self.ordering.fabric(), now, &mut |event| inbox.take(event, arena));
        let count = inbox.len();
        inbox.drain(|peer, event| match event {
            PeerEvent::Connected => self.peer_connected(now, peer),
            PeerEvent::Lost(reason) => self.peer_lost(now, peer, reason),
            PeerEvent::Refused(reason) => self.peers.note_refusal(peer, reason),
            PeerEvent::Message(message) => self.peer_message(now, peer, message),
        });
        self.peers.inbox = inbox;
        count
    }

    fn peer_connected(&mut self, now: u64, peer: ReplicaId) {
        tracing::info!(vm = %self.vm.name, peer = %self.peers.name(peer), "connected");
        self.peers.connected(peer);
        self.ordering.step(now, Event::PeerConnected(peer));
        self.next_report_us = now;
    }

    fn peer_lost(&mut self, now: u64, peer: ReplicaId, reason: &str) {
        tracing::warn!(vm = %self.vm.name, peer = %self.peers.name(peer), reason, "connection lost");
        self.peers.lost(peer, now);
        // First, while consensus still knows who leads.
        self.exchange_partner_lost(peer);
        self.ordering.step(now, Event::PeerLost(peer));
    }

    fn peer_message(&mut self, now: u64, peer: ReplicaId, message: Received<'_>) {
        let Received::Passing(bytes) = message else {
            return self.ordering.receive(now, peer, &message);
        };
        match bytes.split_first() {
            Some((&KIND_CONSENSUS, rest)) => self.ordering.receive(now, peer, &Received::Passing(rest)),
            Some((&KIND_REPORT, rest)) => match GuestReport::decode(rest) {
                Ok(report) => self.peers.note_report(peer, report, now),
                Err(error) => tracing::warn!(peer = peer.0, %error, "a peer's report is not understood"),
            },
            _ => tracing::warn!(peer = peer.0, "a peer sent a message of an unknown kind; is it another version?"),
        }
    }

    fn take_notices(&mut self, now: u64) {
        while let Some(notice) = self.ordering.notices.pop_front() {
            tracing::info!(vm = %self.vm.name, ?notice, "consensus");
            match notice {
                Notice::Leading { view } => self.begin_lead(now, view),
                Notice::LostLead { .. } => self.end_lead(),
                Notice::Following { .. } => {
                    self.leave_exchange_of_another_view();
                    self.withdraw_fresh_guest(now);
                }
                Notice::Jumped { .. } => self.invalidate_guest(now, "the log that it needed is gone"),
                Notice::HandOverFailed { .. } => self.hand_over_failed(),
                Notice::Ineligible { .. } | Notice::Promoted => {}
            }
        }
        let replica = self.ordering.replica();
        self.worker.standing.set_view(replica.view(), replica.leader());
    }

    /// Handles what the worker says; returns how much that was. Its queue is in memory and looked at in every turn; the bell
    /// only ends a sleep.
    fn take_worker_reports(&mut self, now: u64, rung: bool) -> usize {
        if rung {
            self.worker.report_bell.drain();
        }
        let mut count = 0;
        while let Some(report) = self.worker.next_report() {
            count += 1;
            match report {
                Report::Attached { .. }
                | Report::Lost { .. }
                | Report::Running
                | Report::NotRunning { .. }
                | Report::Halted => {
                    self.guest_report(now, report);
                }
                Report::Stopped { number } => self.guest_stopped(number),
                Report::Joining
                | Report::Staged { .. }
                | Report::Applied { .. }
                | Report::Followed(_)
                | Report::FollowFailed { .. } => {
                    self.follow_report(now, report);
                }
                _ => self.lead_report(now, report),
            }
        }
        count
    }

    fn take_device_events(&mut self) {
        let (poller, events) = (&self.poller, &mut self.guest.device_events);
        // Kick descriptors must leave the poller at once: QEMU keeps its end open, and gives the number to another.
        self.device.handle_commands(&mut |event| match event {
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
        let mut events = std::mem::take(&mut self.guest.device_events);
        for event in events.drain(..) {
            self.device_event(event);
        }
        self.guest.device_events = events;
    }

    fn device_event(&mut self, event: DeviceEvent) {
        match event {
            DeviceEvent::Started { offloads, .. } => {
                self.guest.rings_started();
                self.delivery.forget_stall();
                let flags = OffloadFlags {
                    csum: offloads.checksum,
                    tso4: offloads.tso4,
                    tso6: offloads.tso6,
                    ecn: offloads.ecn,
                };
                if let Err(error) = self.egress.uplink().set_offload(flags) {
                    let name = self.egress.uplink().name().to_owned();
                    self.note_error(format!("uplink {name}: offloads not set: {error}"));
                }
            }
            DeviceEvent::Broken(error) => {
                self.note_error(format!("the guest's network device was stopped: {error}"));
            }
            _ => {}
        }
    }

    /// Bulk bytes are a sign of life: heartbeats can queue behind them on a slow link.
    fn note_bulk_progress(&mut self, now: u64) {
        if now < self.next_progress_us {
            return;
        }
        self.next_progress_us = now + PROGRESS_INTERVAL_US;
        let progress = self.worker.standing.progress();
        if progress != self.bulk_seen {
            self.bulk_seen = progress;
            if let Some(peer) = self.exchange_partner() {
                self.ordering.step(now, Event::PeerHeard(peer));
            }
        }
    }

    fn send_report(&mut self, now: u64) {
        let changed = self.guest.intact != self.reported.intact
            || self.guest.attached.is_some() != self.reported.attached
            || self.guest.problem != self.reported.problem;
        if !changed && now < self.next_report_us {
            return;
        }
        self.next_report_us = now + REPORT_INTERVAL_US;
        let report = self.own_report();
        let mut bytes = Vec::with_capacity(512);
        report.encode(&mut bytes);
        for peer in self.peers.ids() {
            self.ordering.send_plain(peer, &bytes);
        }
        self.reported = report;
    }

    /// For status and log.
    pub(super) fn note_error(&mut self, text: String) {
        tracing::warn!(vm = %self.vm.name, "{text}");
        self.last_error = Some(text);
    }
}
