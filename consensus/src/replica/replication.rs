//! The leader's side of phase 2 (R8, R9).
//!
//! There is no timer that sends data again. A heartbeat names the last entry that was sent; a follower that
//! does not hold it says what it does hold, and the leader goes on from there. A peer whose disk is merely
//! slow holds everything and so costs no repeated traffic, which a timer could not tell from loss. After a
//! refusal one message goes alone until it matches: were all that are on their way sent again for each of the
//! refusals that they meet, a message that is overtaken would multiply without end.

use super::{Phase, Replica};
use crate::effects::{Effects, Notice};
use crate::ids::{Index, ReplicaId, View, Viewstamp};
use crate::message::Message;

impl Replica {
    /// Sends every peer what its windows allow.
    pub(super) fn replicate(&mut self, out: &mut Effects) {
        for peer in self.config.peers() {
            self.send_entries(peer, out);
        }
    }

    fn send_entries(&mut self, to: ReplicaId, out: &mut Effects) {
        let config = &self.config;
        while !self.peers[to.slot()].lost && self.peers[to.slot()].next <= self.log.last().index {
            let peer = &mut self.peers[to.slot()];
            if peer.next < self.log.first() {
                let base = *self.log.base();
                peer.next = base.index.next();
                peer.in_flight.clear();
                peer.in_flight.push_back(base.index);
                peer.probe = Some(base.index);
                out.messages.push((to, Message::InstallBase { view: self.promised, base }));
                continue;
            }
            let sent = peer.next.prev();
            let pipeline = if peer.probe.is_some() { 1 } else { config.pipeline_messages };
            if peer.in_flight.len() >= pipeline
                || sent.0.saturating_sub(peer.matched.0) >= config.peer_window_entries
                || self.log.bytes_between(peer.matched, sent) >= config.peer_window_bytes
            {
                return;
            }
            let mut entries = out.spare.take();
            self.log.batch(peer.next, config.batch_entries, config.batch_bytes, &mut entries);
            let through = Index(sent.0 + entries.len() as u64);
            peer.next = through.next();
            peer.in_flight.push_back(through);
            peer.told_commit = self.commit;
            let message = Message::Accept {
                view: self.promised,
                prev: Viewstamp {
                    view: self.log.view_at(sent).expect("the entry before a batch is here"),
                    index: sent,
                },
                commit: self.commit,
                base: self.log.base().index,
                entries,
            };
            out.messages.push((to, message));
        }
    }

    /// Says that this leader lives, what it has sent, and what is committed. Goes to lost peers too: the
    /// transport may have reconnected without a word.
    pub(super) fn send_heartbeat(&mut self, to: ReplicaId, out: &mut Effects) {
        let peer = &mut self.peers[to.slot()];
        let sent = peer.next.prev().max(self.log.first().prev());
        let Some(view) = self.log.view_at(sent) else {
            return;
        };
        peer.told_commit = self.commit;
        out.messages.push((
            to,
            Message::Accept {
                view: self.promised,
                prev: Viewstamp { view, index: sent },
                commit: self.commit,
                base: self.log.base().index,
                entries: Vec::new(),
            },
        ));
    }

    /// Tells the commit index to those who wait for it: the secondary, whose guest consumes the inputs, or
    /// everybody. Others learn it with the next entries or heartbeat.
    pub(super) fn tell_commit(&mut self, everybody: bool, out: &mut Effects) {
        for peer in self.config.peers() {
            let waits = everybody || self.committed.second == Some(peer);
            if waits && self.peers[peer.slot()].told_commit < self.commit {
                // Entries that may go now tell it as well.
                self.send_entries(peer, out);
                if self.peers[peer.slot()].told_commit < self.commit {
                    self.send_heartbeat(peer, out);
                }
            }
        }
    }

    pub(super) fn leader_tick(&mut self, out: &mut Effects) {
        let (now_us, view) = (self.now_us, self.promised);
        let Phase::Leader(leading) = &mut self.phase else {
            return;
        };
        if let Some(handover) = leading.handover.take_if(|handover| now_us >= handover.give_up_us) {
            out.notices.push(Notice::HandOverFailed { to: handover.to });
        }
        if now_us < leading.heartbeat_us {
            return;
        }
        leading.heartbeat_us = now_us + self.config.heartbeat_interval_us;
        if let Some(handover) = leading.handover {
            out.messages.push((handover.to, Message::TakeOver { view, handover: true }));
        }
        for peer in self.config.peers() {
            self.send_heartbeat(peer, out);
            self.send_entries(peer, out);
        }
    }

    fn leads(&self, view: View) -> bool {
        matches!(self.phase, Phase::Leader(_)) && view == self.promised
    }

    pub(super) fn on_accept_ok(
        &mut self,
        from: ReplicaId,
        view: View,
        (through, voting): (Index, bool),
        consumed: Index,
        out: &mut Effects,
    ) {
        if !self.leads(view) || through > self.log.last().index {
            return;
        }
        self.note_consumed(from, consumed);
        let peer = &mut self.peers[from.slot()];
        (peer.heard_us, peer.voting) = (self.now_us, voting);
        peer.matched = peer.matched.max(through);
        if voting {
            peer.counted = peer.counted.max(through);
        }
        peer.next = peer.next.max(peer.matched.next());
        while peer.in_flight.pop_front_if(|sent| *sent <= through).is_some() {}
        peer.probe.take_if(|probe| *probe <= through);
        self.commit_by_majority(out);
        self.send_entries(from, out);
    }

    pub(super) fn on_reject(
        &mut self,
        from: ReplicaId,
        view: View,
        (prev, have, commit): (Index, Viewstamp, Index),
        out: &mut Effects,
    ) {
        if !self.leads(view) {
            return;
        }
        let peer = &mut self.peers[from.slot()];
        peer.heard_us = self.now_us;
        if prev < peer.matched || prev >= peer.next {
            return; // Overtaken by an acknowledgement, or by another refusal that was acted upon.
        }
        if peer.probe.is_some_and(|probe| prev != probe && prev != peer.next.prev()) {
            return; // Neither the message that goes alone nor a heartbeat behind it was refused.
        }
        if have.index < peer.matched {
            (peer.matched, peer.counted) = (Index(0), Index(0)); // It lost its disk. Counting less is always safe.
        }
        let known = if self.log.holds(have) { have.index } else { commit };
        peer.next = known.max(peer.matched).next();
        peer.in_flight.clear();
        peer.probe = Some(peer.next.prev());
        self.send_entries(from, out);
    }

    pub(super) fn on_nack(&mut self, promised: View, out: &mut Effects) {
        self.seen = self.seen.max(promised);
        match &self.phase {
            Phase::Leader(_) if promised > self.promised => self.lose_lead(out),
            Phase::Candidate(candidate) if promised > candidate.view => self.become_follower(0),
            _ => {}
        }
    }
}
