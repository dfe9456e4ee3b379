//! How fast inputs are admitted: as they come, unless the secondary's guest falls behind.
//!
//! A secondary that is slower than the leader (a busy host, fewer cores) must not be lost, and must not make the
//! leader stand still for seconds either, which is what the hard limits of consensus (R16) do once they are reached.
//! So the further it is behind, the longer the leader pauses between two batches, and clients slow down because their
//! answers do. Rejected: a rate that is learnt from what the secondary consumes, because that comes in bursts, one
//! per slot, and says little about what it could.

use consensus::Lag;

/// A lag of this time is usual: while a syncvm is applied, the secondary consumes nothing, and it reports with its
/// next answer. That may be the one to a heartbeat, so with rare heartbeats more is usual: two of their intervals.
const USUAL_US: u64 = 100_000;
/// So many entries too.
const USUAL_ENTRIES: u64 = 512;
/// The pause grows by one part in so many of the time that the secondary is behind beyond the usual ...
const SHARE_OF_TIME: u64 = 8;
/// ... and by so much for each entry.
const US_PER_ENTRY: u64 = 20;
/// The longest pause: clients hear from the guest all the same, and their TCP does not give up.
const LONGEST_US: u64 = 100_000;

/// How long to wait after one batch of inputs before the next.
pub fn pause_us(lag: Lag, heartbeat_us: u64) -> u64 {
    let usual_us = USUAL_US.max(2 * heartbeat_us);
    let by_time_us = lag.for_us.saturating_sub(usual_us) / SHARE_OF_TIME;
    let by_entries_us = lag.entries.saturating_sub(USUAL_ENTRIES) * US_PER_ENTRY;
    by_time_us.saturating_add(by_entries_us).min(LONGEST_US)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEARTBEAT_US: u64 = 25_000;

    fn pause_us(lag: Lag) -> u64 {
        super::pause_us(lag, HEARTBEAT_US)
    }

    fn behind(entries: u64, for_us: u64) -> Lag {
        Lag { entries, for_us, bytes: 0 }
    }

    #[test]
    fn the_pause_grows_with_the_lag_and_has_an_end() {
        assert_eq!(pause_us(Lag::default()), 0);
        assert_eq!(pause_us(behind(USUAL_ENTRIES, USUAL_US)), 0);
        assert_eq!(pause_us(behind(1, 180_000)), 10_000);
        assert_eq!(pause_us(behind(1_012, 0)), 10_000);
        assert_eq!(pause_us(behind(1_012, 180_000)), 20_000);
        assert_eq!(pause_us(behind(u64::MAX / 64, u64::MAX)), LONGEST_US);
        let pauses: Vec<u64> = (0..3_000).map(|ms| pause_us(behind(ms, ms * 1_000))).collect();
        assert!(pauses.is_sorted());
        let steps = pauses.windows(2).map(|two| two[1] - two[0]);
        assert!(steps.max() < Some(200), "gradually");
    }

    #[test]
    fn a_secondary_that_only_heartbeats_ask_is_not_behind_between_them() {
        let rare_us = 15_000_000;
        assert_eq!(super::pause_us(behind(2, 2 * rare_us), rare_us), 0);
        assert_eq!(super::pause_us(behind(2, 2 * rare_us + 80_000), rare_us), 10_000);
    }
}
