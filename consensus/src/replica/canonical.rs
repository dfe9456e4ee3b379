//! For model checkers: one form for all replicas that differ only in what does not matter.

use super::{Phase, Replica};
use crate::ids::PersistId;
use crate::rng::Rng;

impl Replica {
    /// Moves this replica to a canonical time and forgets what its past leaves behind only in numbers, so that an
    /// explorer meets few states often instead of many once:
    ///
    /// * its clock stands at `failure_timeout_us`, and everything else keeps its distance to it;
    /// * a peer that was heard within the failure timeout was heard just now, as on a slower clock;
    /// * random numbers are drawn from the start again;
    /// * records are counted from the last durable one, so that [`Event::Persisted`](crate::Event::Persisted) names the
    ///   first record that is not yet durable by 1.
    ///
    /// Every step from there is one that a replica of some run could take. Not for drivers with a clock.
    #[doc(hidden)]
    pub fn make_canonical(&mut self) {
        let (now_us, timeout_us) = (self.now_us, self.config.failure_timeout_us);
        let past = |at_us: &mut u64| *at_us = if now_us.saturating_sub(*at_us) < timeout_us { timeout_us } else { 0 };
        let future = |at_us: &mut u64| *at_us = at_us.saturating_sub(now_us).saturating_add(timeout_us);
        future(&mut self.deadline_us);
        if self.hinted_until_us <= now_us {
            self.hinted_until_us = 0;
        } else {
            future(&mut self.hinted_until_us);
        }
        past(&mut self.leader_heard_us);
        for peer in &mut self.peers {
            past(&mut peer.heard_us);
        }
        match &mut self.phase {
            Phase::Candidate(candidate) => future(&mut candidate.give_up_us),
            Phase::Leader(leading) => {
                future(&mut leading.heartbeat_us);
                if let Some(handover) = &mut leading.handover {
                    future(&mut handover.give_up_us);
                }
                if let Some((_, since_us)) = &mut leading.lag_mark {
                    past(since_us);
                }
            }
            Phase::Follower | Phase::PreVote { .. } => {}
        }
        self.now_us = timeout_us;
        self.rng = Rng::new(self.config.seed);
        self.durability.count_from_durable();
    }
}

impl super::durable::Durability {
    fn count_from_durable(&mut self) {
        let durable = self.durable;
        let count = |id: PersistId| PersistId(id.0.saturating_sub(durable.0));
        (self.emitted, self.durable, self.binding) = (count(self.emitted), PersistId(0), count(self.binding));
        for (id, _) in &mut self.pending {
            *id = count(*id);
        }
    }
}
