//! The leader orders no faster than the secondary's guest consumes (R16).

use super::{Phase, Replica};
use crate::effects::Effects;
use crate::ids::{Index, ReplicaId};

/// A secondary reports without being asked once it has consumed this part of what it may be behind.
const REPORTS_PER_LAG: u64 = 4;

/// How far the secondary's guest is behind the leader's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// Entries that it has not consumed.
    pub entries: u64,
    /// Their bytes.
    pub bytes: u64,
    /// For how long at least one of them has been there.
    pub for_us: u64,
}

impl Replica {
    /// How far the secondary's guest is behind, by what it last said. Nothing without a secondary: a witness is never
    /// waited for, and neither is a secondary once `Second(none)` is committed.
    pub fn second_lag(&self, now_us: u64) -> Lag {
        let Phase::Leader(leading) = &self.phase else {
            return Lag::default();
        };
        let Some(second) = self.committed.second.filter(|second| *second != self.config.me) else {
            return Lag::default();
        };
        let last = self.log.last().index;
        let consumed = self.peers[second.slot()].consumed.max(self.committed.second_base);
        let since_us = leading.lag_mark.filter(|(index, _)| *index > consumed).map(|(_, since_us)| since_us);
        Lag {
            entries: last.0.saturating_sub(consumed.0),
            bytes: self.log.bytes_between(consumed, last),
            for_us: since_us.map_or(0, |since_us| now_us.saturating_sub(since_us)),
        }
    }

    /// Whether inputs are refused because the secondary's guest is too far behind: in entries, in bytes or in
    /// time.
    pub fn second_lags(&self, now_us: u64) -> bool {
        let (lag, config) = (self.second_lag(now_us), &self.config);
        lag.entries >= config.second_lag_entries
            || lag.bytes >= config.second_lag_bytes
            || lag.for_us >= config.second_lag_us
    }

    /// A peer said what its guest has consumed. Taken as it is: less than before means that its process is another
    /// one, or that the message was overtaken, and then the next heartbeat's answer says more.
    pub(super) fn note_consumed(&mut self, from: ReplicaId, consumed: Index) {
        let (now_us, last) = (self.now_us, self.log.last().index);
        let consumed = consumed.min(last);
        self.peers[from.slot()].consumed = consumed;
        if self.committed.second == Some(from)
            && let Phase::Leader(leading) = &mut self.phase
            && leading.lag_mark.is_some_and(|(index, _)| index <= consumed)
        {
            leading.lag_mark = (consumed < last).then_some((last, now_us));
        }
    }

    pub(super) fn on_consumed(&mut self, index: Index, out: &mut Effects) {
        self.consumed = self.consumed.max(index);
        let news = self.consumed.0 - self.told_consumed.0;
        let bytes = self.log.bytes_between(self.told_consumed, self.consumed);
        if self.committed.second == Some(self.config.me)
            && (news >= self.config.second_lag_entries.div_ceil(REPORTS_PER_LAG)
                || bytes >= self.config.second_lag_bytes.div_ceil(REPORTS_PER_LAG))
        {
            self.ack_due = true;
            self.answer_accept(out);
        }
    }
}
