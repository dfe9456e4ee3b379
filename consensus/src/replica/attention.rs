//! A replica that was not run itself holds its own absence against nobody (R18).
//!
//! Silence counts only while somebody listens. On a host that is short of CPU, or on one whose hypervisor takes its time
//! away, the clock jumps: what the others said meanwhile may still wait in the sockets, or they stood still on the same
//! machine. So a replica wants to be stepped at least every [`look_us`](Replica::look_us), and whatever passes beyond that
//! between two steps is taken out of every time that it measures. A leader that is dead is hence suspected after the failure
//! timeout as ever, and a replica that is run rarely suspects nobody before it has looked several times and heard nothing.
//!
//! Rejected: to count everybody as heard after an absence, for on a busy host, with one after another, the dead would never
//! be noticed; and to leave it to the driver, which sees only some absences (those in a sleep, not those amid its work).

use super::{Phase, Replica};
use crate::effects::{Effects, Notice};

impl Replica {
    /// A replica is stepped at least this often if it is run at all: longer than heartbeats are apart, so that they
    /// spare those who hear them an extra step.
    fn look_us(&self) -> u64 {
        self.config.heartbeat_interval_us + self.config.heartbeat_interval_us / 2
    }

    /// When something is to be decided, but for the looks in between; `u64::MAX` when never. For model checkers, who pass all
    /// of that time in one move.
    #[doc(hidden)]
    pub fn decides_at_us(&self) -> u64 {
        match &self.phase {
            _ if self.failed => u64::MAX,
            Phase::Leader(leading) => {
                leading.handover.map_or(leading.heartbeat_us, |handover| handover.give_up_us.min(leading.heartbeat_us))
            }
            _ => self.deadline_us,
        }
    }

    /// When [`Event::Tick`](crate::Event::Tick) is due next; `u64::MAX` when never.
    pub fn next_deadline_us(&self) -> u64 {
        if self.failed { u64::MAX } else { self.decides_at_us().min(self.now_us.saturating_add(self.look_us())) }
    }

    /// Moves the clock. One that went back is taken to stand still.
    pub(super) fn advance(&mut self, now_us: u64, out: &mut Effects) {
        let passed_us = now_us.saturating_sub(self.now_us);
        self.now_us = self.now_us.max(now_us);
        let missed_us = passed_us.saturating_sub(self.look_us());
        if missed_us > 0 {
            self.was_absent(missed_us);
        }
        if missed_us >= self.config.failure_timeout_us && !self.failed {
            out.notices.push(Notice::Absent { for_us: passed_us });
        }
    }

    fn was_absent(&mut self, missed_us: u64) {
        let now_us = self.now_us;
        let heard_later = |at_us: &mut u64| *at_us = (*at_us).saturating_add(missed_us).min(now_us);
        let due_later = |at_us: &mut u64| *at_us = at_us.saturating_add(missed_us);
        heard_later(&mut self.leader_heard_us);
        self.peers.iter_mut().for_each(|peer| heard_later(&mut peer.heard_us));
        due_later(&mut self.deadline_us);
        due_later(&mut self.hinted_until_us);
        match &mut self.phase {
            Phase::Follower => {}
            // What the others granted may be about a leader who has been heard since: they are asked again, after what waits
            // in the sockets.
            Phase::PreVote { .. } => self.become_follower(self.config.campaign_retry_us),
            Phase::Candidate(candidate) => due_later(&mut candidate.give_up_us),
            // The heartbeat is overdue and goes at once.
            Phase::Leader(leading) => {
                if let Some(handover) = &mut leading.handover {
                    due_later(&mut handover.give_up_us);
                }
            }
        }
    }
}
