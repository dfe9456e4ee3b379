//! What the command line asks of a group, and the answers.

use std::sync::mpsc::Sender;

use consensus::{Event, ReplicaId, Role};
use dataplane::stages::{Sizes, Stage};
use storage_log::LegState;

use super::lead::Rejoin;
use super::reactor::Reactor;
use super::slots::times;
use super::turns::Pace;
use super::worker::{Command, CrashAction};
use crate::control::{GroupRequest, Request, Response};
use crate::status::{GroupStatus, LogFigures, MemoryStatus, PeerStatus, ReactorStatus, StageStatus, SyncTotals};

/// Characters of a peer's problem in the one line that says why the VM is not protected.
const REASON_CHARS: usize = 200;

/// A planned hand-over under way: one last syncvm, then the secondary leads.
pub struct HandOver {
    reply: Sender<Response>,
    handed: bool,
}

impl HandOver {
    /// Another view began.
    pub fn done(self, vm: &str) {
        let response = if self.handed {
            Response::Done(format!("{vm}: the secondary has taken over"))
        } else {
            Response::Refused(format!("{vm}: another view began before the last syncvm; see `plover status {vm}`"))
        };
        let _ = self.reply.send(response);
    }
}

/// Those who wait for a syncvm to be acknowledged.
pub type SyncWaiters = Vec<Sender<Response>>;

impl Reactor<'_> {
    /// Answers what waits.
    pub(super) fn take_requests(&mut self, now: u64) {
        while let Ok(GroupRequest { request, reply }) = self.requests.try_recv() {
            let response = match request {
                Request::Status { .. } => Some(Response::Status(vec![self.status(now)])),
                Request::Failover { .. } => self.request_hand_over(&reply),
                Request::Sync { .. } => self.request_sync(&reply),
                Request::ColdStart { .. } => Some(self.cold_start(now)),
                Request::CrashPoint { phase, action, .. } => Some(self.arm_crash_point(&phase, &action)),
            };
            if let Some(response) = response {
                let _ = reply.send(response);
            }
        }
    }

    /// Why nothing can be asked of a secondary now, if so.
    fn no_secondary(&self) -> Option<String> {
        let name = &self.vm.name;
        if self.ordering.replica().leading().is_none() || self.lead.is_none() {
            let leader = self.ordering.replica().leader().map_or("nobody known", |id| self.peers.name(id));
            return Some(format!("{name}: this node does not lead; ask the leader ({leader})"));
        }
        if self.ordering.replica().second().is_none_or(|second| second == self.me) {
            return Some(format!("{name}: there is no secondary now; see `plover status {name}`"));
        }
        None
    }

    fn request_hand_over(&mut self, reply: &Sender<Response>) -> Option<Response> {
        if let Some(reason) = self.no_secondary() {
            return Some(Response::Refused(reason));
        }
        let lead = self.lead.as_mut().expect("just checked");
        if lead.hand_over.is_some() {
            return Some(Response::Refused(format!("{}: a failover is under way already", self.vm.name)));
        }
        lead.hand_over = Some(HandOver { reply: reply.clone(), handed: false });
        None
    }

    fn request_sync(&mut self, reply: &Sender<Response>) -> Option<Response> {
        if let Some(reason) = self.no_secondary() {
            return Some(Response::Refused(reason));
        }
        self.sync_waiters.push(reply.clone());
        self.lead.as_mut().expect("just checked").forced_sync = true;
        None
    }

    /// A syncvm was acknowledged: answer those who asked for it, and hand over if that was the last one.
    pub(super) fn sync_request_done(&mut self, now: u64, with: ReplicaId) {
        for waiter in self.sync_waiters.drain(..) {
            let text = format!("{}: syncvm acknowledged by {}", self.vm.name, self.peers.name(with));
            let _ = waiter.send(Response::Done(text));
        }
        let Some(hand_over) = self.lead.as_mut().and_then(|lead| lead.hand_over.as_mut()) else { return };
        // Only the syncvm that left the guest stopped is the last one; the request may have come during an earlier one.
        if !self.guest.stopped_for_hand_over {
            return;
        }
        if self.ordering.replica().second() != Some(with) {
            return self.hand_over_failed();
        }
        hand_over.handed = true;
        self.ordering.step(now, Event::HandOver { to: with });
    }

    /// Those who wait for a syncvm wait no more.
    pub(super) fn answer_waiters(&mut self, why: &str) {
        for waiter in self.sync_waiters.drain(..) {
            let _ = waiter.send(Response::Refused(format!("{}: no syncvm was done: {why}", self.vm.name)));
        }
    }

    /// The secondary did not take over: go on leading.
    pub(super) fn hand_over_failed(&mut self) {
        let Some(lead) = &mut self.lead else { return };
        if let Some(hand_over) = lead.hand_over.take() {
            let text = format!("{}: the secondary did not take over in time; this node leads on", self.vm.name);
            let _ = hand_over.reply.send(Response::Refused(text));
        }
        if std::mem::take(&mut self.guest.stopped_for_hand_over) {
            self.worker.send(Command::Resume);
        }
    }

    fn cold_start(&mut self, now: u64) -> Response {
        let name = &self.vm.name;
        if self.guest.intact {
            return Response::Refused(format!("{name}: this node has a whole guest; there is nothing to start"));
        }
        if let Some(reason) = self.peers.bar_cold_start() {
            return Response::Refused(format!("{name}: {reason}"));
        }
        match &self.guest.attached {
            Some(attached) if attached.fresh => {}
            Some(_) => {
                return Response::Refused(format!("{name}: this node's guest has run before; restart its QEMU first"));
            }
            None => {
                return Response::Refused(format!("{name}: no QEMU is attached; start it with `plover launch {name}`"));
            }
        }
        self.guest.cold_start = true;
        self.ordering.step(now, Event::AllowColdStart);
        self.claim_guest(now);
        Response::Done(format!("{name}: this node boots the guest afresh once a majority agrees"))
    }

    fn arm_crash_point(&mut self, phase: &str, action: &str) -> Response {
        if !self.node.debug_hooks {
            return Response::Refused(
                "crash points need debug_hooks = true in node.toml; never on a host that matters".into(),
            );
        }
        match (phase.parse(), action.parse::<CrashAction>()) {
            (Ok(phase), Ok(action)) => {
                self.worker.crash_points.arm(phase, action);
                Response::Done(format!("{action:?} at {phase}"))
            }
            (Err(_), _) => Response::Refused(format!("{phase:?} is no phase of syncvm")),
            (_, Err(error)) => Response::Refused(error),
        }
    }

    /// Whether the death of this leader would lose nothing, or why it would.
    fn protection(&self) -> Result<(), String> {
        let replica = self.ordering.replica();
        // One whose guest switched itself off leads no longer than it needs to make sure that nobody takes over.
        let leads = replica.leading().is_some() && !self.guest.powered_off;
        if let Some(problem) = self.guest.problem.as_ref().filter(|_| leads) {
            return Err(problem.clone());
        }
        let Some(lead) = self.lead.as_ref().filter(|_| leads) else {
            return match replica.leader() {
                Some(leader) if leader != self.me => Err(format!("ask the leader, {}", self.peers.name(leader))),
                _ if self.guest.powered_off => Err(format!(
                    "the guest has switched itself off; `plover cold-start {}` boots it again",
                    self.vm.name
                )),
                _ => Err("no leader; a leader needs a whole guest and a majority of nodes".into()),
            };
        };
        match (replica.second().filter(|second| *second != self.me), lead.rejoin) {
            (Some(second), _) if self.peers.get(second).connected => Ok(()),
            (Some(second), _) => Err(format!("secondary {} is not connected", self.peers.name(second))),
            (None, Rejoin::Resting) => Err(self.why_no_joiner()),
            (None, Rejoin::Rounds(peer) | Rejoin::Final(peer) | Rejoin::Naming(peer, _)) => {
                Err(format!("{} is being brought in", self.peers.name(peer)))
            }
        }
    }

    fn why_no_joiner(&self) -> String {
        let mut reasons = Vec::new();
        for peer in self.peers.iter() {
            let reason = match (&peer.refusal, &peer.report.problem) {
                (Some(refusal), _) => refusal.clone(),
                _ if !peer.connected => "not connected".into(),
                (_, Some(problem)) => problem.clone(),
                _ => "waiting".into(),
            };
            reasons.push(format!("{}: {}", peer.node, shortened(&reason)));
        }
        format!("no secondary ({})", reasons.join("; "))
    }

    fn status(&mut self, now: u64) -> GroupStatus {
        let loops = self.pace.loops.counts();
        let protection = self.protection();
        let replica = self.ordering.replica();
        let role = match (replica.leading(), replica.role()) {
            (Some(_), _) => "leader",
            // It led last and has not heard of anybody else.
            (None, Role::Leader) => "former leader",
            (None, Role::Secondary) => "secondary",
            (None, Role::Witness) => "witness",
        };
        let name = |id: ReplicaId| self.peers.name(id).to_owned();
        let guest = match (&self.guest.attached, self.guest.running) {
            (None, _) => self.guest.problem.clone().unwrap_or_else(|| "absent".into()),
            (Some(_), true) => "running".into(),
            (Some(attached), false) if attached.fresh => "prepared".into(),
            (Some(_), false) => "stopped".into(),
        };
        let (frames_out, uplink_dropped) = self.egress.counts();
        GroupStatus {
            vm: self.vm.name.clone(),
            node: self.node.name.clone(),
            role: role.to_owned(),
            view: replica.view().0,
            leader: replica.leader().map(name),
            secondary: replica.second().map(name),
            protected: protection.is_ok(),
            unprotected_reason: protection.err(),
            guest,
            guest_intact: self.guest.intact,
            commit_index: replica.commit_index().0,
            last_index: replica.last_index().0,
            applied_index: self.delivery.applied().0,
            base_index: replica.base().index.0,
            log: log_figures(&self.ordering.log().status()),
            held_frames: self.egress.guard().frames() as u64,
            held_bytes: self.egress.guard().bytes() as u64,
            frames_in: self.ingress.frames_in,
            frames_out,
            input_pauses: self.ingress.pauses,
            inputs_taken_over: self.delivery.taken_over,
            frames_dropped: self.delivery.frames_dropped + uplink_dropped,
            filter: self.ingress.filter_counts(&self.vm.uplink),
            policy: self.vm.policy.describe_sync(),
            tracker: self.guest.attached.as_ref().map(|attached| attached.tracker.clone()).unwrap_or_default(),
            rejoin: self.worker.standing.rejoin(),
            last_sync: self.totals.last(),
            totals: self.totals_with_held(),
            peers: self.peers.iter().map(|peer| self.peer_status(peer.id, now)).collect(),
            last_error: self.last_error.clone(),
            busy_us: loops.busy_us,
            idle_us: loops.idle_us,
            memory: self.memory_status(),
            reactor: reactor_status(&self.pace, &self.ingress.proposal_bytes),
        }
    }

    fn totals_with_held(&self) -> SyncTotals {
        let mut totals = self.totals.sums();
        totals.slot_times.push(times("held", self.egress.held_us()));
        totals
    }

    fn memory_status(&self) -> MemoryStatus {
        let (bytes, used) = self.arena.bytes();
        MemoryStatus {
            arena_bytes: bytes as u64,
            arena_used_bytes: used as u64,
            arena_refusals: self.arena.refusals(),
            pages: self.pages.to_string(),
        }
    }

    fn peer_status(&self, id: ReplicaId, now: u64) -> PeerStatus {
        let (peer, replica) = (self.peers.get(id), self.ordering.replica());
        let lag_entries = match replica.leading() {
            Some(_) => replica.last_index().0.saturating_sub(replica.match_index(id).0),
            None => 0,
        };
        PeerStatus {
            node: peer.node.clone(),
            connected: peer.connected,
            transport: self.ordering.transport(id).to_string(),
            silent_ms: self.ordering.peer_silent_us(id, now).map(|silent| silent / 1000),
            lag_entries,
            guest_intact: peer.report.intact,
            refusal: peer.refusal.clone(),
        }
    }
}

/// The beginning of a long reason: a whole device list belongs into the peer's line, not into everybody's.
fn shortened(reason: &str) -> String {
    let mut text: String = reason.chars().take(REASON_CHARS).collect();
    if text.len() < reason.len() {
        text.push('…');
    }
    text
}

/// What a reactor did with its time.
pub(super) fn reactor_status(pace: &Pace, proposals: &Sizes) -> ReactorStatus {
    let (loops, clock) = (pace.loops.counts(), &pace.stages);
    let stages = Stage::ALL.map(|stage| {
        let counts = clock.counts(stage);
        StageStatus {
            name: stage.name().to_owned(),
            busy_us: clock.to_us(counts.busy_cycles),
            idle_us: clock.to_us(counts.idle_cycles),
            sizes: filled(&counts.sizes),
        }
    });
    ReactorStatus {
        idle: pace.idler.strategy().to_string(),
        asleep_us: loops.asleep_us,
        busy_turns: loops.busy_loops,
        idle_turns: loops.idle_loops,
        stages: stages.into(),
        proposal_bytes: filled(proposals),
    }
}

/// The buckets up to the last one that is not zero.
fn filled(sizes: &Sizes) -> Vec<u64> {
    let end = sizes.buckets.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
    sizes.buckets[..end].to_vec()
}

fn log_figures(status: &storage_log::LogStatus) -> LogFigures {
    let state = |state: &LegState| match state {
        LegState::Complete => "complete".to_owned(),
        LegState::Rebuilding => "being rebuilt".to_owned(),
        LegState::Failed(error) => format!("FAILED: {error}"),
    };
    LogFigures {
        disk_bytes: status.disk_bytes,
        queued_bytes: status.queued_bytes,
        copies: status.legs.iter().map(|leg| (leg.path.display().to_string(), state(&leg.state))).collect(),
        no_room: status.no_room.as_ref().map(ToString::to_string),
    }
}
