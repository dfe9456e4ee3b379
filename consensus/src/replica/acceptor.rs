//! What a replica does for others: promise, store, acknowledge (R1, R2, R5, R9, R11).

use super::{Phase, Replica};
use crate::effects::{Effects, Notice};
use crate::entry::Base;
use crate::ids::{Index, ReplicaId, View, Viewstamp};
use crate::message::Message;
use crate::spare::Entries;

impl Replica {
    pub(super) fn on_prepare(&mut self, from: ReplicaId, view: View, genesis_nonce: u64, out: &mut Effects) {
        if view.owner(self.config.replicas) != from || view == View(0) {
            return;
        }
        self.seen = self.seen.max(view);
        if self.learner {
            let forms = self.blank && from == self.config.genesis_leader && genesis_nonce == self.nonce;
            if !forms {
                return;
            }
            self.learner = false;
        }
        if view < self.promised {
            out.messages.push((from, Message::Nack { promised: self.promised }));
            return;
        }
        if view > self.promised {
            self.promise(view, out);
            self.become_follower(self.config.failure_timeout_us);
        }
        self.promise_due = Some(from);
        self.answer_prepare(out);
    }

    /// Raises the promise. Whoever led or campaigned in a lower view stops.
    pub(super) fn promise(&mut self, view: View, out: &mut Effects) {
        if matches!(self.phase, Phase::Leader(_)) {
            self.lose_lead(out);
        }
        self.promised = view;
        self.leader = None;
        self.seen = self.seen.max(view);
        // Every leader's log holds what is committed (R5).
        self.matched = self.commit;
        self.acked = Index(0);
        self.ack_due = false;
        self.promise_due = None;
        self.persist_state(true, out);
    }

    pub(super) fn answer_prepare(&mut self, out: &mut Effects) {
        if self.durability.is_bound()
            && let Some(to) = self.promise_due.take()
        {
            let message = Message::Promise { view: self.promised, last: self.log.last(), commit: self.commit };
            out.messages.push((to, message));
        }
    }

    /// Whether a message of the leader of `view` counts. Adopts the view if it is new.
    pub(super) fn follow(&mut self, from: ReplicaId, view: View, out: &mut Effects) -> bool {
        if view.owner(self.config.replicas) != from || view == View(0) {
            return false;
        }
        if view < self.promised {
            out.messages.push((from, Message::Nack { promised: self.promised }));
            return false;
        }
        if view > self.promised {
            self.promise(view, out);
        }
        self.leader_heard_us = self.now_us;
        if self.leader != Some(from) {
            self.become_follower(self.config.failure_timeout_us);
            self.leader = Some(from);
            self.cold_start = false;
            out.notices.push(Notice::Following { view, leader: from });
        }
        true
    }

    pub(super) fn on_accept(
        &mut self,
        from: ReplicaId,
        prev: Viewstamp,
        (commit, base): (Index, Index),
        entries: &mut Entries,
        out: &mut Effects,
    ) {
        let mut prev = prev;
        let own_base = self.log.base().viewstamp();
        if prev.index < own_base.index {
            // Covered entries are committed, and every leader's log holds them.
            let skip = (own_base.index.0 - prev.index.0).min(entries.len() as u64) as usize;
            entries.drain(..skip);
            prev = own_base;
        }
        if !self.log.holds(prev) {
            let index = prev.index.min(self.log.last().index);
            let have = Viewstamp { view: self.log.view_at(index).unwrap_or_default(), index };
            let message = Message::Reject { view: self.promised, prev: prev.index, have, commit: self.commit };
            out.messages.push((from, message));
            return;
        }
        self.matched = self.matched.max(self.take_entries(prev.index, entries, out));
        self.advance_commit(commit.min(self.matched), out);
        self.truncate(base, out);
        self.ack_due = true;
        self.promote_if_caught_up(out);
        self.answer_accept(out);
    }

    /// Takes the entries that follow `after`, which is known to match, and returns the last index that now does.
    /// Entries that are already here stay, so that a message that was overtaken never shortens the log.
    pub(super) fn take_entries(&mut self, after: Index, entries: &mut Entries, out: &mut Effects) -> Index {
        let mut index = after;
        for (view, entry) in entries.drain(..) {
            index = index.next();
            match self.log.view_at(index) {
                Some(have) if have == view => continue,
                Some(_) => self.cut(index),
                None => {}
            }
            self.append(view, entry, out);
        }
        index
    }

    pub(super) fn on_install_base(&mut self, base: Base, out: &mut Effects) {
        self.adopt_base(base, out);
        self.matched = self.matched.max(base.index);
        self.ack_due = true;
        self.promote_if_caught_up(out);
        self.answer_accept(out);
    }

    /// Learns that everything through `base` is committed, and jumps there if its entry is not in the log.
    ///
    /// A jump drops the whole log. What it held above the base followed an entry that lost against the committed
    /// one, so that none of it can be chosen (R11).
    pub(super) fn adopt_base(&mut self, base: Base, out: &mut Effects) {
        if base.index <= self.commit {
            return;
        }
        if self.log.holds(base.viewstamp()) {
            self.advance_commit(base.index, out);
            return;
        }
        self.log.reset(base);
        self.void_log();
        (self.commit, self.committed, self.matched) = (base.index, base, base.index);
        self.guest_intact = false;
        self.persist_state(true, out);
        out.notices.push(Notice::Jumped { base: base.index });
    }

    pub(super) fn answer_accept(&mut self, out: &mut Effects) {
        let Some(leader) = self.leader.filter(|leader| *leader != self.config.me) else {
            return;
        };
        if !self.durability.is_bound() {
            return;
        }
        let through = self.matched.min(self.durability.index());
        if self.ack_due || through > self.acked {
            self.ack_due = false;
            self.acked = through;
            self.told_consumed = self.consumed;
            let (view, voting, consumed) = (self.promised, !self.learner, self.consumed);
            out.messages.push((leader, Message::AcceptOk { view, through, voting, consumed }));
        }
    }
}
