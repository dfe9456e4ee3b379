//! From the promises of a majority to leading: count, fetch the best log, check again, begin (R4, R5, R6).

use super::{Leading, Phase, Replica, Vote};
use crate::config::MAX_REPLICAS;
use crate::effects::{Effects, Notice};
use crate::entry::{Base, Entry};
use crate::ids::{Index, ReplicaId, View, Viewstamp};
use crate::message::Message;
use crate::spare::Entries;

impl Replica {
    /// Asks, or asks again, whatever the campaign waits for.
    pub(super) fn repeat_question(&mut self, out: &mut Effects) {
        let Phase::Candidate(candidate) = &self.phase else {
            return;
        };
        if !candidate.asked {
            return;
        }
        let view = candidate.view;
        if let Some((from, _)) = candidate.fetching {
            out.messages.push((from, Message::Fetch { view, from: candidate.fetch_from }));
            return;
        }
        for peer in self.config.peers().filter(|peer| candidate.votes[peer.slot()].is_none()) {
            let nonce = self.peers[peer.slot()].blank_nonce.filter(|_| candidate.genesis);
            out.messages.push((peer, Message::Prepare { view, genesis_nonce: nonce.unwrap_or(0) }));
        }
    }

    pub(super) fn on_promise(&mut self, from: ReplicaId, view: View, vote: Vote, out: &mut Effects) {
        if let Phase::Candidate(candidate) = &mut self.phase
            && candidate.view == view
        {
            candidate.votes[from.slot()] = Some(vote);
            self.count_votes(out);
        }
    }

    pub(super) fn count_votes(&mut self, out: &mut Effects) {
        let Phase::Candidate(candidate) = &mut self.phase else {
            return;
        };
        let votes = candidate.votes.iter().flatten().count() + 1;
        if candidate.fetching.is_some() || !self.config.is_majority(votes) {
            return;
        }
        if candidate.genesis {
            if votes == usize::from(self.config.replicas) {
                candidate.genesis = false;
                let view = candidate.view;
                self.learner = false;
                // Not `promise()`: that ends campaigns, and this one goes on once the record is durable.
                self.promised = view;
                self.persist_state(true, out);
            }
            return;
        }
        if !self.durability.is_bound() {
            return;
        }
        let best = (0..self.config.replicas)
            .filter_map(|id| candidate.votes[usize::from(id)].map(|vote| (ReplicaId(id), vote.last)))
            .max_by_key(|(_, last)| *last)
            .filter(|(_, last)| *last > self.log.last());
        if best.is_some() {
            (candidate.fetching, candidate.fetch_from) = (best, self.commit.next());
            self.repeat_question(out);
        } else {
            self.finish_recovery(out);
        }
    }

    pub(super) fn on_fetch(&mut self, from: ReplicaId, view: View, first: Index, out: &mut Effects) {
        // A log stands still only for the view that was promised and has not begun.
        if view != self.promised || view.owner(self.config.replicas) != from || self.learner {
            return;
        }
        if first < self.log.first() {
            out.messages.push((from, Message::FetchedBase { view, base: *self.log.base() }));
            return;
        }
        let index = first.prev();
        if let Some(before) = self.log.view_at(index) {
            let mut entries = out.spare.take();
            self.log.batch(first, self.config.batch_entries, self.config.batch_bytes, &mut entries);
            out.messages.push((from, Message::Fetched { view, prev: Viewstamp { view: before, index }, entries }));
        }
    }

    /// The entry up to which this campaign fetches from `from`, and the one that it wants next.
    fn fetch_target(&self, from: ReplicaId, view: View) -> Option<(Viewstamp, Index)> {
        match &self.phase {
            Phase::Candidate(candidate) if candidate.view == view => {
                let (voter, target) = candidate.fetching?;
                (voter == from).then_some((target, candidate.fetch_from))
            }
            _ => None,
        }
    }

    pub(super) fn on_fetched(
        &mut self,
        from: ReplicaId,
        view: View,
        prev: Viewstamp,
        entries: &mut Entries,
        out: &mut Effects,
    ) {
        let Some((target, wanted)) = self.fetch_target(from, view) else {
            return;
        };
        // One question and one answer at a time: a doubled answer must not double what follows.
        if prev.index.next() != wanted || !self.log.holds(prev) || entries.is_empty() {
            return;
        }
        let through = self.take_entries(prev.index, entries, out);
        self.fetch_on(target, through.next(), out);
    }

    /// Asks for the rest. A campaign that gets on is not given up.
    fn fetch_on(&mut self, target: Viewstamp, from: Index, out: &mut Effects) {
        if self.log.holds(target) {
            return self.finish_recovery(out);
        }
        let give_up_us = self.now_us + self.campaign_us();
        if let Phase::Candidate(candidate) = &mut self.phase {
            (candidate.fetch_from, candidate.give_up_us) = (from, give_up_us);
        }
        self.repeat_question(out);
    }

    pub(super) fn on_fetched_base(&mut self, from: ReplicaId, view: View, base: Base, out: &mut Effects) {
        let Some((target, _)) = self.fetch_target(from, view).filter(|(_, wanted)| *wanted <= base.index) else {
            return;
        };
        self.adopt_base(base, out);
        self.fetch_on(target, self.commit.next(), out);
    }

    /// The log is that of the best among a majority. Leads if it still names this replica (R6). Otherwise a
    /// vote that is still missing may bring a better log, so that the campaign ends only with the last vote or
    /// its time.
    fn finish_recovery(&mut self, out: &mut Effects) {
        let may_lead = self.may_lead();
        let Phase::Candidate(candidate) = &mut self.phase else {
            return;
        };
        candidate.fetching = None;
        let (view, votes) = (candidate.view, candidate.votes);
        if may_lead {
            self.begin_to_lead(view, votes, out);
        } else if votes.iter().flatten().count() + 1 == usize::from(self.config.replicas) {
            self.end_campaign(out);
        }
    }

    /// Gives up, and tells those whom the log that was found names.
    pub(super) fn end_campaign(&mut self, out: &mut Effects) {
        let Phase::Candidate(candidate) = &self.phase else {
            return;
        };
        let view = candidate.view;
        if self.may_lead() {
            self.become_follower(self.config.campaign_retry_us);
            return;
        }
        out.notices.push(Notice::Ineligible { view });
        self.hinted_until_us = 0;
        self.become_follower(self.config.failure_timeout_us);
        self.hint_at_named(out);
    }

    fn may_lead(&self) -> bool {
        self.may_have_guest() && self.is_named_by(&self.log.tail_roles())
    }

    fn begin_to_lead(&mut self, view: View, votes: [Option<Vote>; MAX_REPLICAS], out: &mut Effects) {
        let known = votes.iter().flatten().map(|vote| vote.commit).max().unwrap_or_default();
        self.advance_commit(known, out);
        let last = self.log.last().index;
        for id in self.config.peers() {
            let next = match votes[id.slot()] {
                Some(vote) if self.log.holds(vote.last) => vote.last.index.next(),
                Some(vote) => vote.commit.next(),
                None => last.next(),
            };
            let peer = &mut self.peers[id.slot()];
            (peer.next, peer.matched, peer.counted) = (next, Index(0), Index(0));
            (peer.told_commit, peer.consumed) = (Index(0), Index(0));
            (peer.voting, peer.heard_us) = (true, self.now_us);
            peer.in_flight.clear();
            peer.probe = None;
        }
        self.phase = Phase::Leader(Leading {
            noop: last.next(),
            serving: false,
            heartbeat_us: self.now_us + self.config.heartbeat_interval_us,
            handover: None,
            alone: false,
            syncvm: None,
            lag_mark: None,
        });
        self.leader = Some(self.config.me);
        self.append(view, Entry::Noop { leader: self.config.me }, out);
        self.replicate(out);
    }
}
