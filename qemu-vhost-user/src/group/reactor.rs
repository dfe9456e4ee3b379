//! The reactor: one thread per group that runs to completion.
//!
//! A turn polls everything once in the order of the packet's way (uplink, propose, fabric, consensus, log, collect, guard,
//! deliver, decide, release, send), each stage within a budget, so that none starves the others. What happens between two
//! turns is in [`super::turns`]. The state has one owner per part: [`Ordering`] the log, [`Delivery`] what the guest has
//! consumed, [`Egress`] what is held, [`Lead`] what a leader is about, [`Follow`] what a secondary is about.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use consensus::{Event, Notice, ReplicaId};
use dataplane::arena::Arena;
use dataplane::fabric::{Fabric, FabricEvent, PeerFabric};
use dataplane::idle::Found;
use dataplane::mailbox;
use dataplane::region::PageSize;
use dataplane::stages::Stage;
use dataplane::uplink::Burst;
use dataplane::wait::{Bell, Interest};

use super::GroupError;
use super::delivery::Delivery;
use super::egress::{Collected, Egress};
use super::follow::Follow;
use super::guest::LocalGuest;
use super::hush::Hush;
use super::ingress::Ingress;
use super::lead::Lead;
use super::messages::{GuestReport, KIND_CONSENSUS, KIND_REPORT};
use super::ordering::Ordering;
use super::peers::{PeerEvent, Peers, Received};
use super::requests::SyncWaiters;
use super::totals::Totals;
use super::turns::{
    AlwaysDue, Due, Pace, TOKEN_DEVICE, TOKEN_LOG, TOKEN_UPLINK, TOKEN_WAKE, TOKEN_WORKER, Turns, drive, set_offloads,
    take_device_events,
};
use super::worker::{Report, Worker};
use crate::config::{NodeConfig, VmConfig};
use crate::control::GroupRequest;
use crate::device::{DeviceEvent, NetDevice};

/// Peers hear how our guest is at least this often.
const REPORT_INTERVAL_US: u64 = 100_000;
/// Bulk progress is looked at this often.
const PROGRESS_INTERVAL_US: u64 = 10_000;
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
    pub(super) hush: Hush,
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
    pub(super) pace: Pace,
    pub(super) requests: mailbox::Receiver<GroupRequest>,
    pub(super) wake: Arc<Bell>,
    pub(super) next_progress_us: u64,
    pub(super) next_report_us: u64,
    pub(super) reported: GuestReport,
    pub(super) bulk_seen: u64,
    pub(super) sync_waiters: SyncWaiters,
}

impl Turns for Reactor<'_> {
    fn pace(&mut self) -> &mut Pace {
        &mut self.pace
    }

    fn turn(&mut self, now: u64, due: Due) -> Result<Found, GroupError> {
        if due.wake {
            self.wake.drain();
        }
        if !self.pace.idler.armed() {
            self.wake.disarm();
            self.worker.report_bell.disarm();
            self.device.set_polling(true);
        }
        let inputs = if due.uplink || self.ingress.more { self.take_inputs(now) } else { Burst::default() };
        self.pace.stages.lap(Stage::Uplink, inputs.frames);
        let wants_fabric = due.fabric || now >= self.ordering.fabric_deadline_us();
        let messages = match wants_fabric {
            true => self.poll_fabric(now, Fabric::poll),
            false if self.ordering.fabric().has_memory_lanes() => self.poll_fabric(now, Fabric::poll_lanes),
            false => 0,
        };
        self.pace.stages.lap(Stage::Fabric, messages);
        let durable = self.ordering.poll_log(now);
        if now >= self.ordering.replica().next_deadline_us() {
            self.ordering.step(now, Event::Tick);
        }
        self.pace.stages.lap(Stage::Log, durable);
        self.take_notices(now);
        let reports = self.take_worker_reports(now, due.worker);
        let alone = self.alone_proof();
        self.pace.stages.lap(Stage::Decide, reports);
        let collected = self.egress.collect(&mut self.device, now, alone);
        let missed = self.hush(now, collected);
        self.pace.stages.lap(Stage::Collect, collected.frames);
        if due.device {
            self.take_device_events();
        }
        let delivered = self.deliver(now);
        self.pace.stages.lap(Stage::Deliver, delivered.frames);
        self.decide(now);
        self.pace.stages.lap(Stage::Decide, 0);
        let released = self.egress.go_on_releasing(now, self.ordering.replica());
        let ended = self.end_turn(now);
        self.pace.stages.lap(Stage::Release, released);
        ended?;
        let work = inputs.frames + messages + durable + reports + collected.frames + delivered.frames + released > 0;
        let more = inputs.more
            || messages > 0
            || collected.more
            || missed
            || delivered.more
            || self.egress.is_releasing()
            // The room that the release has just made is for a frame whose guest was not asked to kick.
            || (collected.refused && released > 0)
            || self.ordering.has_news()
            || self.ordering.log_wants_polling();
        Ok(Found { work: work || more, more })
    }

    fn next_deadline_us(&self, now: u64) -> u64 {
        let mut next = self.ordering.replica().next_deadline_us().min(self.next_report_us);
        next = next.min(self.ordering.fabric_deadline_us());
        next = next.min(self.follow.next_deadline_us(now));
        next = next.min(self.delivery.next_deadline_us());
        next = next.min(self.ingress.next_deadline_us(now));
        next = next.min(self.device.signal_due_us());
        next = next.min(self.hush.next_deadline_us());
        if let Some(lead) = &self.lead {
            next = next.min(lead.next_deadline_us(now));
        }
        next
    }

    fn arm(&mut self) {
        self.wake.arm();
        self.device.set_polling(false);
        // Whatever it finds, the next turn finds too.
        self.device.arm();
        self.worker.report_bell.arm();
    }

    /// The uplink is watched only while its frames are wanted, or can be thrown away at once.
    fn before_look(&mut self, now: u64) {
        let wanted = !self.is_serving() || self.may_take_inputs(now);
        if self.ingress.set_watched(wanted) {
            let Some(fd) = self.egress.uplink().fd() else { return };
            let changed = if wanted {
                self.pace.poller.add(fd, TOKEN_UPLINK, Interest::Read)
            } else {
                self.pace.poller.remove(fd)
            };
            debug_assert!(changed.is_ok(), "the uplink is in the poller exactly while it is watched");
        }
    }

    fn may_sleep(&mut self) -> bool {
        !self.ordering.fabric().arm()
    }

    fn always_due(&mut self) -> AlwaysDue {
        AlwaysDue { uplink: self.egress.uplink().fd().is_none(), sockets: true }
    }
}

impl Reactor<'_> {
    /// Runs until the daemon ends (`Ok`) or the group must be started anew (`Err`).
    pub fn run(&mut self, stopping: &AtomicBool) -> Result<(), GroupError> {
        self.watch_all().map_err(|source| GroupError::System { what: "epoll", source })?;
        drive(self, stopping)
    }

    /// Decides whether the guest need kick when it sends; returns whether it has sent something before it knew that it must.
    fn hush(&mut self, now: u64, collected: Collected) -> bool {
        // A frame that was refused waits for room in the guard, not for a look.
        let held = !self.egress.is_direct() && !collected.refused;
        let hushed = self.hush.after_collect(now, collected.frames, held);
        self.device.set_hushed(hushed) && !hushed && self.device.arm()
    }

    /// Puts every descriptor into the poller, once.
    fn watch_all(&mut self) -> std::io::Result<()> {
        self.pace.poller.add(&*self.wake, TOKEN_WAKE, Interest::Read)?;
        self.pace.poller.add(&*self.worker.report_bell, TOKEN_WORKER, Interest::Read)?;
        if let Some(event) = self.ordering.log().event_fd() {
            self.pace.poller.add(event, TOKEN_LOG, Interest::ReadEdge)?;
        }
        self.pace.poller.add(self.device.event_fd(), TOKEN_DEVICE, Interest::Read)?;
        match self.egress.uplink().fd() {
            Some(fd) => self.pace.poller.add(fd, TOKEN_UPLINK, Interest::Read),
            None => Ok(()),
        }
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
    fn end_turn(&mut self, now: u64) -> Result<(), GroupError> {
        self.device.flush_signals_in_time(now);
        let flushed = self.egress.flush();
        if let Some(error) = self.ingress.failure.take().or(flushed.err()) {
            return Err(GroupError::Uplink { name: self.egress.uplink().name().to_owned(), reason: error.to_string() });
        }
        self.ordering.log_failure().map_or(Ok(()), Err)
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
                Notice::Absent { for_us } => {
                    tracing::warn!(vm = %self.vm.name, for_ms = for_us / 1000, "not run for a while; is this host short of CPU?");
                }
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
                Report::Stopped { number } => self.guest_stopped(now, number),
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
        let mut events = std::mem::take(&mut self.guest.device_events);
        take_device_events(&mut self.device, &self.pace.poller, &mut events);
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
                if let Some(error) = set_offloads(self.egress.uplink(), offloads) {
                    self.note_error(error);
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
