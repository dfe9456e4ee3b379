//! Replicas with empty disks: a new group forms, or a wiped replica comes back (R12, R13).

use super::{Phase, Replica};
use crate::effects::{Effects, Notice};
use crate::ids::{ReplicaId, View, Viewstamp};
use crate::message::Message;

impl Replica {
    pub(super) fn say_hello(&self, out: &mut Effects) {
        for peer in self.config.peers() {
            out.messages.push((peer, Message::Hello { nonce: self.nonce, blank: self.blank }));
        }
    }

    pub(super) fn on_hello(&mut self, from: ReplicaId, nonce: u64, blank: bool, out: &mut Effects) {
        self.peers[from.slot()].blank_nonce = blank.then_some(nonce);
        if self.learner {
            self.form_group(out);
        } else if self.durability.is_bound() {
            // Sooner, it might forget that it votes, and two replicas would be without a vote (R2).
            out.messages.push((from, Message::HelloReply { nonce, promised: self.promised, last: self.log.last() }));
        }
    }

    pub(super) fn on_hello_reply(
        &mut self,
        from: ReplicaId,
        nonce: u64,
        (promised, last): (View, Viewstamp),
        out: &mut Effects,
    ) {
        if !self.learner || nonce != self.nonce || self.learn_target.is_some() {
            return;
        }
        let peer = &mut self.peers[from.slot()];
        (peer.hello, peer.blank_nonce) = (Some((promised, last)), None);
        let mut learned = Some((self.promised, Viewstamp::default()));
        for id in self.config.peers() {
            let answer = self.peers[id.slot()].hello;
            learned = learned.zip(answer).map(|((view, stamp), answer)| (view.max(answer.0), stamp.max(answer.1)));
        }
        let Some((view, target)) = learned else {
            self.form_group(out);
            return;
        };
        self.learn_target = Some(target);
        if view > self.promised {
            // A campaign to form a group is over: the group exists.
            self.become_follower(self.config.failure_timeout_us);
            self.promise(view, out);
        }
        self.promote_if_caught_up(out);
    }

    /// A learner that holds all that its former self may have acknowledged votes again.
    pub(super) fn promote_if_caught_up(&mut self, out: &mut Effects) {
        if self.learner && self.learn_target.is_some_and(|target| self.log.last() >= target) {
            self.learner = false;
            self.persist_state(true, out);
            out.notices.push(Notice::Promoted);
            self.campaign_if_leaderless(out);
        }
    }

    /// The genesis leader asks for the first view once every other replica is known to be blank, or to have
    /// promised and never accepted anything.
    pub(super) fn form_group(&mut self, out: &mut Effects) {
        let may = self.blank && self.config.me == self.config.genesis_leader && self.may_have_guest();
        if !may || !matches!(self.phase, Phase::Follower) {
            return;
        }
        let fresh = self.config.peers().all(|id| {
            let peer = &self.peers[id.slot()];
            peer.blank_nonce.is_some() || peer.hello.is_some_and(|(_, last)| last == Viewstamp::default())
        });
        if fresh {
            self.start_campaign(true, out);
        }
    }
}
