//! What a leader is about, besides ordering inputs: who is secondary, what a syncvm leads to, when frames leave.
//!
//! A new leader first commits `Second(none)`: whoever was secondary is now itself or gone. From then on it serves
//! without the hold (or with it, if the operator says so) and brings a joiner in: rounds while the guest runs, one
//! syncvm, and `Second(joiner)`. From the stop of that syncvm on frames are held again, because the joiner may lead
//! from that state as soon as `Second(joiner)` is chosen.

use std::sync::atomic::Ordering;

use consensus::{Entry, Event, Index, Release, ReplicaId, View};
use dataplane::guard::SlotMark;
use dataplane::uplink::announce;

use super::egress::ReleaseProof;
use super::follow::Follow;
use super::guest::LocalGuest;
use super::reactor::Reactor;
use super::requests::HandOver;
use super::slots::Slots;
use super::worker::{Command, Report};
use crate::config::{Degraded, Policy};

/// A secondary that fails this many syncvms in a row is given up, and at once if it lets a deadline pass.
const SYNC_FAILURES_LIMIT: u32 = 3;
/// A newly named secondary may take this long to say that its guest is whole.
const INTACT_GRACE_US: u64 = 3_000_000;
/// Entries that the log keeps while this replica serves alone.
const ALONE_LOG_ENTRIES: u64 = 4096;
/// The guest's place is announced at once and again after these times: the first may meet a bridge that still forwards
/// to the dead side.
const ANNOUNCE_AFTER_US: [u64; 3] = [0, 50_000, 300_000];

/// A syncvm that this leader has under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeadSync {
    /// None.
    Resting,
    /// Proposed, not committed.
    Proposed {
        /// Its index.
        number: Index,
        /// With whom.
        with: ReplicaId,
    },
    /// The worker is at it.
    Running {
        /// Its index.
        number: Index,
        /// With whom.
        with: ReplicaId,
        /// End of the slot, once the guest stands still.
        mark: Option<SlotMark>,
        /// Since when the slot after it lasts.
        resumed_us: Option<u64>,
    },
}

/// How far the joiner is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejoin {
    /// Nobody is being brought in.
    Resting,
    /// Rounds, then its syncvm.
    Rounds(ReplicaId),
    /// Near enough; its syncvm is next or under way.
    Final(ReplicaId),
    /// Whole as of this syncvm; `Second` is to be committed.
    Naming(ReplicaId, Index),
}

/// A leader's mind.
pub struct Lead {
    /// The view it leads.
    pub view: View,
    none_index: Option<Index>,
    /// The syncvm under way.
    pub sync: LeadSync,
    /// The joiner.
    pub rejoin: Rejoin,
    /// The `Second` that names the joiner, once proposed.
    naming: Option<Index>,
    named_since_us: Option<u64>,
    pub(super) dropping: Option<Index>,
    failures: u32,
    announced: usize,
    serving_since_us: Option<u64>,
    /// When slots end.
    pub slots: Slots,
    /// A planned hand-over.
    pub hand_over: Option<HandOver>,
    /// A syncvm was asked for.
    pub forced_sync: bool,
}

impl Lead {
    fn new(view: View, now_us: u64, policy: &Policy) -> Self {
        Self {
            view,
            none_index: None,
            sync: LeadSync::Resting,
            rejoin: Rejoin::Resting,
            naming: None,
            named_since_us: None,
            dropping: None,
            failures: 0,
            announced: 0,
            serving_since_us: None,
            slots: Slots::new(policy, now_us),
            hand_over: None,
            forced_sync: false,
        }
    }

    /// When the next decision may be due.
    pub fn next_deadline_us(&self, now_us: u64) -> u64 {
        let announce = match (self.serving_since_us, ANNOUNCE_AFTER_US.get(self.announced)) {
            // Never in the past: planning may be held up for reasons of its own.
            (Some(since), Some(after)) => (since + after).max(now_us + 1_000),
            _ => u64::MAX,
        };
        let slot = if self.sync == LeadSync::Resting { self.slots.next_look_us(now_us) } else { u64::MAX };
        announce.min(slot)
    }
}

impl Reactor<'_> {
    /// Whether this replica leads, has the guest running or between two runs, and may order inputs.
    pub(super) fn is_serving(&self) -> bool {
        self.guest.intact
            && self.lead.as_ref().is_some_and(|lead| lead.serving_since_us.is_some())
            && self.ordering.replica().leading().is_some()
    }

    pub(super) fn begin_lead(&mut self, now: u64, view: View) {
        // An exchange with the old leader that was not acknowledged is void; one that was is applied first.
        self.leave_exchange_of_another_view();
        self.lead = Some(Lead::new(view, now, &self.vm.policy));
        if !self.guest.running && self.guest.attached.as_ref().is_some_and(|attached| attached.fresh) {
            // What was committed so far was for the guests that are lost.
            self.delivery.skip_through = self.ordering.replica().commit_index();
            self.worker.standing.may_run.store(true, Ordering::Release);
            self.worker.send(Command::RunFresh);
        } else if self.guest.intact {
            // It may have stood still so far, because of the policy.
            self.worker.standing.may_run.store(true, Ordering::Release);
            self.resume_to_lead();
            // Carried out behind a syncvm that is being applied.
            self.worker.send(Command::Leads);
        }
        self.ingress.forget_proposals();
    }

    /// Lets the guest run that is to lead, unless a syncvm is being applied to it: that one resumes it, or fails and
    /// brings us here again.
    pub(super) fn resume_to_lead(&mut self) {
        if resumes_to_lead(&self.guest, &self.follow) {
            // A syncvm or a hand-over may have left it standing.
            self.guest.stopped_for_hand_over = false;
            self.worker.send(Command::Resume);
        }
    }

    /// Another view began. The guest is left as it is: if nobody else comes to lead, this replica may again.
    pub(super) fn end_lead(&mut self) {
        let Some(lead) = self.lead.take() else { return };
        self.egress.set_held();
        self.guest.unwatch_idle();
        match lead.sync {
            LeadSync::Running { number, .. } => {
                self.worker.standing.cancel_exchange();
                self.delivery.pass_sync(number, self.me);
            }
            LeadSync::Proposed { number, .. } => self.delivery.pass_sync(number, self.me),
            LeadSync::Resting => {}
        }
        if matches!(lead.rejoin, Rejoin::Rounds(_)) {
            self.worker.standing.cancel_exchange();
        }
        if let Some(hand_over) = lead.hand_over {
            hand_over.done(&self.vm.name);
        }
        self.answer_waiters("another view began");
    }

    /// Everything that a leader decides, once per turn.
    pub(super) fn plan_lead(&mut self, now: u64) {
        let Some(view) = self.ordering.replica().leading() else { return };
        if self.lead.as_ref().is_none_or(|lead| lead.view != view) {
            return;
        }
        self.cancel_sync_with_the_dead(now);
        if !self.guest.intact && !self.follow.is_running() {
            return self.stop_leading(now);
        }
        if !self.none_committed(now) || !self.guest_ready() {
            return;
        }
        self.announce(now, view);
        self.drop_failed_secondary(now);
        match self.ordering.replica().second() {
            Some(second) => self.plan_slot(now, second),
            None => self.plan_rejoin(now, view),
        }
    }

    /// A partner that died in the middle of a syncvm is not waited for while our guest stands still.
    fn cancel_sync_with_the_dead(&mut self, now: u64) {
        let Some(LeadSync::Running { with, .. }) = self.lead.as_ref().map(|lead| lead.sync) else { return };
        if self.ordering.replica().peer_silent_us(with, now) > 2 * self.vm.policy.failure_timeout_ms * 1000 {
            self.worker.standing.cancel_exchange();
        }
    }

    /// The guest here is lost: somebody else may lead. If it has switched itself off nobody shall, so nobody may stay
    /// named secondary.
    fn stop_leading(&mut self, now: u64) {
        let lead = self.lead.as_ref().expect("planning needs a leader");
        let named = self.ordering.replica().second().filter(|second| *second != self.me);
        if !self.guest.powered_off || named.is_none() {
            return self.ordering.step(now, Event::StepDown);
        }
        if lead.dropping.is_none() {
            let proposed = self.ordering.propose(now, Entry::Second { replica: None, base: Index(0) });
            if let Some(lead) = &mut self.lead {
                lead.dropping = proposed;
            }
        }
    }

    /// The guest runs, or stands still only because a syncvm of ours is at it.
    fn guest_ready(&self) -> bool {
        !self.follow.is_running()
            && (self.guest.running
                || matches!(self.lead.as_ref().map(|lead| lead.sync), Some(LeadSync::Running { .. })))
    }

    /// `Second(none)` of this view: proposed once, and waited for.
    fn none_committed(&mut self, now: u64) -> bool {
        let lead = self.lead.as_ref().expect("planning needs a leader");
        match lead.none_index {
            Some(index) => self.ordering.replica().commit_index() >= index,
            None => {
                let proposed = self.ordering.propose(now, Entry::Second { replica: None, base: Index(0) });
                if let Some(lead) = &mut self.lead {
                    lead.none_index = proposed;
                }
                false
            }
        }
    }

    /// Tells the bridges where the guest is now.
    fn announce(&mut self, now: u64, view: View) {
        let lead = self.lead.as_mut().expect("planning needs a leader");
        let since = *lead.serving_since_us.get_or_insert(now);
        let Some(after) = ANNOUNCE_AFTER_US.get(lead.announced) else { return };
        if now < since + after {
            return;
        }
        lead.announced += 1;
        let mac = self.vm.mac_bytes().expect("checked when the file was read");
        if self.ordering.replica().leading() == Some(view) {
            self.egress.announce(&announce::rarp(mac));
        }
    }

    /// Commits `Second(none)` when the secondary is lost: silent, without a guest, or failing at every syncvm.
    fn drop_failed_secondary(&mut self, now: u64) {
        let Some(second) = self.ordering.replica().second().filter(|second| *second != self.me) else {
            return;
        };
        let timeout_us = self.vm.policy.failure_timeout_ms * 1000;
        let lead = self.lead.as_ref().expect("planning needs a leader");
        if lead.dropping.is_some() {
            return;
        }
        let peer = self.peers.get(second);
        let silent = self.ordering.replica().peer_silent_us(second, now) > 2 * timeout_us;
        let away = !peer.connected && now.saturating_sub(peer.lost_us) > timeout_us;
        // What it said before it was named, or on an earlier connection, says nothing about now.
        let guestless = lead.named_since_us.is_some_and(|since| {
            peer.connected
                && peer.reported
                && !peer.report.intact
                && (peer.seen_intact || now > since + INTACT_GRACE_US)
        });
        let failing = lead.failures >= SYNC_FAILURES_LIMIT;
        if !(silent || away || guestless || failing) {
            return;
        }
        let proposed = self.ordering.propose(now, Entry::Second { replica: None, base: Index(0) });
        if proposed.is_none() {
            return;
        }
        self.note_error(format!(
            "secondary {} is given up (silent {silent}, away {away}, without a whole guest {guestless}, failing {failing})",
            self.peers.name(second)
        ));
        self.worker.standing.cancel_exchange();
        self.peers.rest(second, now);
        let lead = self.lead.as_mut().expect("planning needs a leader");
        lead.dropping = proposed;
        lead.failures = 0;
    }

    /// A committed `Second` passed by.
    pub(super) fn second_named(&mut self, second: Option<ReplicaId>) {
        let now = dataplane::wait::now_us();
        if second.is_none() {
            self.answer_waiters("the secondary was lost");
            self.hand_over_failed();
        }
        let Some(lead) = &mut self.lead else {
            return self.leave_group_of_another_second(now, second);
        };
        lead.dropping = None;
        lead.failures = 0;
        match second {
            Some(peer) if matches!(lead.rejoin, Rejoin::Naming(named, _) if named == peer) => {
                lead.rejoin = Rejoin::Resting;
                lead.naming = None;
                lead.named_since_us = Some(now);
                lead.slots.begin(now);
                self.peers.get_mut(peer).seen_intact = self.peers.get(peer).report.intact;
                tracing::info!(vm = %self.vm.name, secondary = %self.peers.name(peer), "protected");
            }
            _ => lead.named_since_us = None,
        }
    }

    /// The log names another secondary than this follower: its guest is no longer kept equal to the leader's.
    fn leave_group_of_another_second(&mut self, now: u64, second: Option<ReplicaId>) {
        if second != Some(self.me) && self.guest.follows_another(self.me) {
            self.invalidate_guest(now, "the leader has given it up");
        }
    }

    /// Nobody needs inputs that this guest, the only one, has consumed: the log must not grow while it serves alone.
    fn truncate_alone(&mut self, now: u64) {
        let applied = self.delivery.applied();
        let entries = applied.0.saturating_sub(self.ordering.replica().base().index.0);
        let full = self.arena.is_exhausted() || self.ordering.log().is_filling_up();
        if entries > ALONE_LOG_ENTRIES || (entries > 0 && full) {
            self.ordering.step(now, Event::Truncate(applied));
        }
    }

    /// Proof that frames may leave at once.
    pub(super) fn alone_proof(&self) -> Option<ReleaseProof> {
        let lead = self.lead.as_ref()?;
        ReleaseProof::new(self.ordering.replica(), lead.view, Release::Alone)
    }

    /// Nobody is secondary: serve, and bring somebody in.
    fn plan_rejoin(&mut self, now: u64, view: View) {
        let joining = matches!(
            self.lead.as_ref().map(|lead| (lead.rejoin, lead.sync)),
            Some((Rejoin::Naming(..), _) | (_, LeadSync::Running { .. }))
        );
        if !joining
            && self.vm.policy.degraded == Degraded::Serve
            && let Some(proof) = ReleaseProof::new(self.ordering.replica(), view, Release::Alone)
        {
            self.egress.set_direct(view, proof);
        }
        if !joining {
            self.truncate_alone(now);
        }
        if self.lead.as_mut().is_some_and(|lead| lead.slots.suspend()) {
            self.guest.unwatch_idle();
        }
        let lead = self.lead.as_ref().expect("planning needs a leader");
        match (lead.rejoin, lead.sync) {
            (Rejoin::Resting, LeadSync::Resting) if lead.hand_over.is_none() => {
                let Some(own) = &self.guest.attached else { return };
                let (ordering, timeout_us) = (&self.ordering, self.vm.policy.failure_timeout_ms * 1000);
                let alive = |peer| ordering.peer_silent_us(peer, now).is_some_and(|silent| silent < timeout_us);
                if let Some(peer) = self.peers.joiner(&own.fingerprint, now, alive) {
                    self.set_rejoin(Rejoin::Rounds(peer));
                    let number = self.ordering.replica().commit_index();
                    self.worker.send(Command::LeadRejoin { view, peer, number });
                }
            }
            (Rejoin::Final(peer), LeadSync::Resting) => {
                self.propose_sync(now, peer, None);
            }
            (Rejoin::Naming(peer, base), _) if lead.naming.is_none() => {
                let naming = self.ordering.propose(now, Entry::Second { replica: Some(peer), base });
                if let Some(lead) = &mut self.lead {
                    lead.naming = naming;
                }
            }
            _ => {}
        }
    }

    /// The head of the queue is a `SyncVm` with another replica. Returns whether it is ours and blocks the queue.
    pub(super) fn reach_led_sync(&mut self, now: u64, number: Index) -> bool {
        let Some(lead) = &mut self.lead else { return false };
        match lead.sync {
            // Its partner was given up meanwhile: opening a connection to a dead host would cost a second.
            LeadSync::Proposed { number: present, .. } if present == number && lead.dropping.is_some() => {
                lead.sync = LeadSync::Resting;
                false
            }
            LeadSync::Proposed { number: present, with } if present == number => {
                lead.sync = LeadSync::Running { number, with, mark: None, resumed_us: None };
                lead.slots.stopping(now);
                let last = lead.hand_over.is_some();
                let (view, idle) = (lead.view, lead.slots.ends_idle());
                self.guest.stopped_for_hand_over = last;
                self.worker.send(Command::Lead { number, view, peer: with, last, idle });
                true
            }
            LeadSync::Running { number: present, resumed_us, .. } => present == number && resumed_us.is_none(),
            _ => false,
        }
    }

    /// The worker stopped our guest for the syncvm that we lead.
    pub(super) fn led_guest_stopped(&mut self, now: u64, number: Index, slot_end: SlotMark) {
        let Some(lead) = &mut self.lead else { return };
        if let LeadSync::Running { number: present, mark, .. } = &mut lead.sync
            && *present == number
        {
            *mark = Some(slot_end);
            lead.slots.stopped(now);
            // From this state on a joiner may come to lead.
            self.egress.set_held();
            self.delivery.end_slot();
        }
    }

    /// What the worker says while this replica leads.
    pub(super) fn lead_report(&mut self, now: u64, report: Report) {
        match report {
            Report::Resumed { number } => self.led_guest_resumed(now, number),
            Report::Acknowledged { number, view } => self.sync_acknowledged(now, number, view),
            Report::Led(report) => self.led(&report),
            Report::LeadFailed { number, error, diverged, silent } => {
                self.totals.diverged += u64::from(diverged);
                self.sync_failed(now, number, error, silent);
            }
            Report::RejoinReady { peer, summary } => {
                tracing::info!(vm = %self.vm.name, peer = %self.peers.name(peer), summary, "joiner is near");
                if self.rejoin_is(Rejoin::Rounds(peer)) {
                    self.set_rejoin(Rejoin::Final(peer));
                }
            }
            Report::RejoinFailed { peer, error } => {
                self.peers.rest(peer, now);
                self.note_error(format!("bringing in {}: {error}", self.peers.name(peer)));
                if self.rejoin_is(Rejoin::Rounds(peer)) {
                    self.set_rejoin(Rejoin::Resting);
                }
            }
            _ => unreachable!("only a leader's reports come here"),
        }
    }

    fn led_guest_resumed(&mut self, now: u64, number: Index) {
        self.delivery.pass_sync(number, self.me);
        let Some(lead) = &mut self.lead else { return };
        lead.slots.begin(now);
        if let LeadSync::Running { number: present, resumed_us, .. } = &mut lead.sync
            && *present == number
        {
            *resumed_us = Some(now);
        }
    }

    /// The other side has it all: the slot's frames may leave.
    fn sync_acknowledged(&mut self, now: u64, number: Index, view: View) {
        let reason = Release::SyncVm(number);
        let Some(proof) = ReleaseProof::new(self.ordering.replica(), view, reason) else { return };
        let Some(lead) = &mut self.lead else { return };
        let LeadSync::Running { number: present, with, mark: Some(mark), .. } = lead.sync else { return };
        if present != number {
            return;
        }
        lead.sync = LeadSync::Resting;
        lead.slots.acknowledged(now);
        lead.failures = 0;
        if self.guest.stopped_for_hand_over {
            // The lead, and with it the right to release, is about to pass on.
            self.egress.release_all(now, mark, proof);
        } else {
            self.egress.release(mark, view, reason, proof);
        }
        self.ordering.step(now, Event::Truncate(number));
        if self.rejoin_is(Rejoin::Final(with)) {
            self.set_rejoin(Rejoin::Naming(with, number));
        }
        self.sync_request_done(now, with);
    }

    fn sync_failed(&mut self, now: u64, number: Index, error: String, silent: bool) {
        self.totals.failed += 1;
        self.note_error(format!("syncvm {}: {error}", number.0));
        self.delivery.pass_sync(number, self.me);
        let Some(lead) = &mut self.lead else { return };
        let LeadSync::Running { number: present, with, .. } = lead.sync else { return };
        if present != number {
            return;
        }
        self.ordering.step(now, Event::SyncVmFailed(number));
        let Some(lead) = &mut self.lead else { return };
        self.guest.stopped_for_hand_over = false;
        lead.sync = LeadSync::Resting;
        lead.slots.failed();
        // Clients have waited for a whole deadline by then: not for another one.
        lead.failures += if silent { SYNC_FAILURES_LIMIT } else { 1 };
        if lead.rejoin == Rejoin::Final(with) {
            lead.rejoin = Rejoin::Resting;
            lead.failures = 0;
            self.peers.rest(with, now);
        }
    }

    /// A peer's connection broke: an exchange with it is over.
    pub(super) fn exchange_partner_lost(&mut self, peer: ReplicaId) {
        if self.exchange_partner() == Some(peer) {
            self.leave_exchange_of_another_view();
            if self.lead.is_some() {
                self.worker.standing.cancel_exchange();
            }
        }
    }

    /// With whom bulk data is exchanged now.
    pub(super) fn exchange_partner(&self) -> Option<ReplicaId> {
        let Some(lead) = &self.lead else { return self.ordering.replica().leader() };
        match (lead.sync, lead.rejoin) {
            (LeadSync::Proposed { with, .. } | LeadSync::Running { with, .. }, _) => Some(with),
            (_, Rejoin::Rounds(peer) | Rejoin::Final(peer) | Rejoin::Naming(peer, _)) => Some(peer),
            _ => None,
        }
    }

    fn rejoin_is(&self, rejoin: Rejoin) -> bool {
        self.lead.as_ref().is_some_and(|lead| lead.rejoin == rejoin)
    }

    fn set_rejoin(&mut self, rejoin: Rejoin) {
        if let Some(lead) = &mut self.lead {
            lead.rejoin = rejoin;
        }
    }
}

/// Whether a leader's guest is to be resumed now.
fn resumes_to_lead(guest: &LocalGuest, follow: &Follow) -> bool {
    guest.intact && !follow.is_running()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_whose_syncvm_fails_after_it_came_to_lead_is_resumed_then() {
        let number = Index(7);
        let mut guest = LocalGuest::new(100);
        guest.whole_since(Some(ReplicaId(0)), false);
        let mut follow =
            Follow::Running { number, mark: None, staged: false, abandoned: false, leader: Some(ReplicaId(0)) };
        // The leader dies; this replica leads before the worker has noticed.
        assert!(!resumes_to_lead(&guest, &follow), "the syncvm may still be applied");
        assert!(!follow.failed(Index(6)), "an older one");
        assert!(!resumes_to_lead(&guest, &follow));
        assert!(!follow.failed(number));
        assert!(resumes_to_lead(&guest, &follow), "or it stands still for good");
        guest.intact = false;
        assert!(!resumes_to_lead(&guest, &follow), "what broke off while it was applied never runs");
    }
}
