//! How fast a rejoin goes and how far it is.

use std::time::{Duration, Instant};

use crate::exchange::ChannelError;
use crate::transfer::{Header, MAX_BODY_BYTES};

/// What may have been saved up while less than the limit was sent.
const BURST: Duration = Duration::from_millis(100);

/// The longest wait before a message: an exchange that is cut off meanwhile, because the daemon ends or the peer is gone, is
/// noticed at the next message only.
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// Keeps what is sent within a rate.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_s: u64,
    /// When everything sent so far is paid for.
    paid: Instant,
}

impl Pace {
    /// At most so many MiB per second; 0: no limit.
    pub fn new(mib_per_s: u64) -> Self {
        Self { bytes_per_s: mib_per_s << 20, paid: Instant::now() }
    }

    /// The longest message, so that the peer hears something several times within `silence`, and no wait is long.
    pub fn message_bytes(&self, silence: Duration) -> usize {
        match self.bytes_per_s {
            0 => MAX_BODY_BYTES,
            rate => ((rate as f64 * LONGEST_WAIT.min(silence / 8).as_secs_f64()) as usize).min(MAX_BODY_BYTES),
        }
    }

    /// Waits until `bytes` more may be sent: not longer than the message before takes at the limit.
    ///
    /// # Errors
    /// That would be after the end of the exchange.
    pub fn wait_for(&mut self, bytes: usize, end: Instant) -> Result<(), ChannelError> {
        let now = Instant::now();
        let wait = self.charge(bytes, now);
        if now + wait > end {
            return Err(ChannelError::Timeout);
        }
        if !wait.is_zero() {
            std::thread::sleep(wait);
        }
        Ok(())
    }

    fn charge(&mut self, bytes: usize, now: Instant) -> Duration {
        if self.bytes_per_s == 0 {
            return Duration::ZERO;
        }
        let wait = self.paid.saturating_duration_since(now);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.paid = self.paid.max(earliest) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        wait
    }
}

/// How far a rejoin is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RejoinProgress {
    /// The round; 0 covers all of RAM.
    pub round: u32,
    /// Pages of it that are done.
    pub done_pages: usize,
    /// Its pages.
    pub total_pages: usize,
    /// When this round will end, at the pace so far. Later rounds are small unless the guest writes a lot.
    pub left: Duration,
}

/// Measures a round.
#[derive(Debug)]
pub(super) struct RoundClock {
    start: Instant,
    round: u32,
    done: usize,
    total: usize,
}

impl RoundClock {
    pub fn start(header: &Header, total: usize) -> Self {
        Self { start: Instant::now(), round: header.round & 0xffff, done: 0, total }
    }

    pub fn done(&mut self, pages: usize) {
        self.done += pages;
    }

    pub fn progress(&self) -> RejoinProgress {
        RejoinProgress {
            round: self.round,
            done_pages: self.done,
            total_pages: self.total,
            left: left(self.start.elapsed(), self.done, self.total),
        }
    }
}

fn left(elapsed: Duration, done: usize, total: usize) -> Duration {
    if done == 0 {
        return Duration::ZERO;
    }
    elapsed.mul_f64((total.saturating_sub(done)) as f64 / done as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_and_a_pause_gives_a_burst_and_no_more() {
        let mut pace = Pace::new(10);
        let start = pace.paid;
        let mut now = start;
        for _ in 0..50 {
            now += pace.charge(1 << 20, now);
        }
        // 50 MiB at 10 MiB/s; the last one is not waited for.
        let took = now.duration_since(start);
        assert!(took >= Duration::from_millis(4_800) && took <= Duration::from_millis(5_000), "{took:?}");
        now += Duration::from_secs(60);
        let again = now;
        for _ in 0..50 {
            now += pace.charge(1 << 20, now);
        }
        assert!(now.duration_since(again) >= Duration::from_millis(4_700));
        assert_eq!(Pace::new(0).charge(1 << 40, now), Duration::ZERO);
    }

    #[test]
    fn a_slow_rejoin_is_heard_within_the_silence_and_ends_in_time() {
        let silence = Duration::from_millis(80);
        assert_eq!(Pace::new(100).message_bytes(silence), 1 << 20);
        assert_eq!(Pace::new(1).message_bytes(silence), (1 << 20) / 100);
        assert_eq!(Pace::new(0).message_bytes(silence), MAX_BODY_BYTES);
        assert_eq!(Pace::new(1000).message_bytes(silence), MAX_BODY_BYTES);
        // However long a silence may be, nobody waits for that long without looking.
        let message_bytes = Pace::new(1).message_bytes(Duration::from_secs(600));
        assert_eq!(message_bytes, (1 << 20) / 20);
        let (mut pace, mut now) = (Pace::new(1), Instant::now());
        for _ in 0..20 {
            let wait = pace.charge(message_bytes, now);
            assert!(wait <= LONGEST_WAIT, "{wait:?}");
            now += wait;
        }
        let (mut pace, end) = (Pace::new(1), Instant::now() + Duration::from_millis(200));
        assert!(pace.wait_for(1 << 20, end).is_ok(), "the first is not waited for");
        assert!(matches!(pace.wait_for(1, end), Err(ChannelError::Timeout)), "a second is too long");
        assert!(Instant::now() < end, "known before");
    }

    #[test]
    fn the_time_left_follows_the_pace_so_far() {
        assert_eq!(left(Duration::from_secs(3), 0, 100), Duration::ZERO, "unknown");
        assert_eq!(left(Duration::from_secs(3), 25, 100), Duration::from_secs(9));
        assert_eq!(left(Duration::from_secs(3), 100, 100), Duration::ZERO);
    }
}
