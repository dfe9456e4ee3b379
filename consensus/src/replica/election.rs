//! Who campaigns, and how it gets as far as the promises of a majority (R3, R4, R6, R7).

use super::{Candidate, Phase, Replica};
use crate::config::MAX_REPLICAS;
use crate::effects::Effects;
use crate::entry::Base;
use crate::ids::{ReplicaId, View};
use crate::message::Message;

/// A candidate waits for its own disk this many times as long as for the others.
const OWN_DISK_TIMEOUTS: u64 = 4;

impl Replica {
    /// Whether a log with these roles lets this replica lead (R6).
    pub(super) fn is_named_by(&self, roles: &Base) -> bool {
        let me = Some(self.config.me);
        if self.log.is_pristine() {
            me == Some(self.config.genesis_leader)
        } else {
            roles.second == me || roles.leader == me
        }
    }

    pub(super) fn may_have_guest(&self) -> bool {
        self.guest_intact || self.cold_start
    }

    fn may_campaign(&self) -> bool {
        self.may_have_guest()
            && !self.learner
            && (self.now_us < self.hinted_until_us || self.is_named_by(&self.log.tail_roles()))
    }

    fn leader_lives(&self) -> bool {
        match &self.phase {
            Phase::Leader(_) => self.has_quorum_contact(self.now_us),
            _ => self.leader.is_some_and(|leader| {
                !self.peers[leader.slot()].lost
                    && self.now_us.saturating_sub(self.leader_heard_us) < self.config.failure_timeout_us
            }),
        }
    }

    /// Something changed that may let this replica lead at once.
    pub(super) fn campaign_if_leaderless(&mut self, out: &mut Effects) {
        if !matches!(self.phase, Phase::Follower) || self.leader_lives() {
            return;
        }
        if self.learner {
            self.form_group(out);
        } else if self.may_campaign() {
            self.start_pre_vote(out);
        }
    }

    /// A replica that does not lead has waited long enough.
    pub(super) fn on_deadline(&mut self, out: &mut Effects) {
        let retry_us = self.config.campaign_retry_us + self.rng.below(self.config.campaign_retry_us);
        if let Phase::Candidate(candidate) = &self.phase {
            if self.now_us >= candidate.give_up_us {
                self.end_campaign(out);
            } else {
                self.deadline_us = self.now_us + retry_us;
                self.repeat_question(out);
            }
            return;
        }
        if self.learner {
            self.deadline_us = self.now_us + retry_us;
            self.say_hello(out);
            self.form_group(out);
        } else if self.leader_lives() {
            self.phase = Phase::Follower;
            // A little later than the timeout: the voters must have missed the same heartbeat.
            self.deadline_us = self.leader_heard_us + self.config.failure_timeout_us + retry_us / 4;
        } else if self.may_campaign() {
            self.start_pre_vote(out);
        } else {
            self.become_follower(self.config.failure_timeout_us);
            self.hint_at_named(out);
        }
    }

    /// Tells those whom this log names that they should lead: theirs may not say so yet (R7).
    pub(super) fn hint_at_named(&mut self, out: &mut Effects) {
        let roles = self.log.tail_roles();
        let named = if self.log.is_pristine() {
            [Some(self.config.genesis_leader), None]
        } else {
            [roles.second, roles.leader.filter(|leader| Some(*leader) != roles.second)]
        };
        for to in named.into_iter().flatten().filter(|to| *to != self.config.me) {
            out.messages.push((to, Message::TakeOver { view: self.promised, handover: false }));
        }
    }

    pub(super) fn on_take_over(&mut self, from: ReplicaId, view: View, handover: bool, out: &mut Effects) {
        self.seen = self.seen.max(view);
        if !self.may_have_guest() || self.learner || !matches!(self.phase, Phase::Follower | Phase::PreVote { .. }) {
            return;
        }
        let from_leader = handover && view == self.promised && self.leader == Some(from);
        if from_leader {
            self.hinted_until_us = self.now_us + self.config.failure_timeout_us;
            self.start_campaign(false, out);
        } else if !self.leader_lives() && matches!(self.phase, Phase::Follower) {
            self.hinted_until_us = self.now_us + self.config.failure_timeout_us;
            self.start_pre_vote(out);
        }
    }

    fn next_view(&self) -> Option<View> {
        self.promised.max(self.seen).next_owned_by(self.config.me, self.config.replicas)
    }

    fn start_pre_vote(&mut self, out: &mut Effects) {
        let Some(view) = self.next_view() else { return };
        self.become_follower(self.config.campaign_retry_us);
        self.phase = Phase::PreVote { view, granted: 0 };
        for peer in self.config.peers() {
            out.messages.push((peer, Message::PreVote { view }));
        }
        if self.config.is_majority(1) {
            self.start_campaign(false, out);
        }
    }

    pub(super) fn on_pre_vote(&mut self, from: ReplicaId, view: View, out: &mut Effects) {
        if self.learner {
            return;
        }
        // The asker lost its leader; that it is itself the leader we knew says as much.
        let granted = !self.leader_lives() || self.leader == Some(from);
        out.messages.push((from, Message::PreVoteReply { view, granted, promised: self.promised }));
    }

    pub(super) fn on_pre_vote_reply(
        &mut self,
        from: ReplicaId,
        view: View,
        granted: bool,
        promised: View,
        out: &mut Effects,
    ) {
        self.seen = self.seen.max(promised);
        let Phase::PreVote { view: asked, granted: votes } = &mut self.phase else {
            return;
        };
        if *asked != view || !granted {
            return;
        }
        *votes |= 1 << from.0;
        let count = votes.count_ones() as usize + 1;
        if self.config.is_majority(count) {
            self.start_campaign(false, out);
        }
    }

    /// Phase 1: promise to oneself, and ask the others once that is durable (R1). A group that forms persists nothing yet: should it turn out that this disk was wiped, it must
    /// still count as blank after a crash (R12).
    pub(super) fn start_campaign(&mut self, genesis: bool, out: &mut Effects) {
        let Some(view) = self.next_view() else { return };
        self.become_follower(self.config.campaign_retry_us);
        self.seen = view;
        if !genesis {
            self.promise(view, out);
        }
        self.phase = Phase::Candidate(Box::new(Candidate {
            view,
            votes: [None; MAX_REPLICAS],
            genesis,
            asked: genesis,
            fetching: None,
            fetch_from: self.commit.next(),
            give_up_us: self.now_us + OWN_DISK_TIMEOUTS * self.campaign_us(),
        }));
        self.repeat_question(out);
    }

    pub(super) fn campaign_us(&self) -> u64 {
        self.config.failure_timeout_us.max(4 * self.config.campaign_retry_us)
    }

    /// Asks the others as soon as this candidate's own promise is durable. Asked before, a voter could promise a
    /// view that no disk of the candidate knows, and forget it with its own disk: a later life of the candidate
    /// would lead the same view by the old promise (R13).
    pub(super) fn ask_once_durable(&mut self, out: &mut Effects) {
        let (bound, give_up_us) = (self.durability.is_bound(), self.now_us + self.campaign_us());
        if let Phase::Candidate(candidate) = &mut self.phase
            && !candidate.asked
            && bound
        {
            (candidate.asked, candidate.give_up_us) = (true, give_up_us);
            self.repeat_question(out);
        }
    }
}
