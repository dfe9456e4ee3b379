//! `IdleDetector`: is the guest idle? (PLOVER §5.1)
//!
//! Fed with samples of the vCPU threads' CPU clocks (their sum, read inside QEMU by the agent), it says `Idle`
//! once the clocks advanced as slowly as an empty guest's over a threshold. Pure: it reads no clock.
//! Rejected: the run state of the vCPU threads seen from outside; it is cheap, but gives false idles
//! between two requests.

/// What counts as idle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IdleConfig {
    /// How long the guest must have been quiet, in µs. PLOVER §5.1: 100 µs.
    pub threshold_us: u64,
    /// The largest share of one CPU that an idle guest uses (timer ticks, housekeeping).
    pub max_busy_fraction: f64,
}

impl Default for IdleConfig {
    fn default() -> Self {
        Self { threshold_us: 100, max_busy_fraction: 0.05 }
    }
}

/// What the samples so far say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Nothing can be said: too few samples, or a sample was missing.
    Unknown,
    /// The guest computed within the last threshold.
    Busy,
    /// The guest was quiet for at least the threshold.
    Idle,
}

/// Judges CPU clock samples. One per guest.
#[derive(Debug)]
pub struct IdleDetector {
    config: IdleConfig,
    /// Start of the present window: (time in µs, CPU clock in ns).
    window: Option<(u64, u64)>,
    verdict: Activity,
}

impl IdleDetector {
    /// A detector that knows nothing yet.
    #[must_use]
    pub fn new(config: IdleConfig) -> Self {
        Self { config, window: None, verdict: Activity::Unknown }
    }

    /// Forgets all samples, for example after the guest was stopped and resumed.
    pub fn reset(&mut self) {
        self.window = None;
        self.verdict = Activity::Unknown;
    }

    /// Takes a sample at `now_us`: the vCPUs' CPU time so far in ns, or `None` if it could not be read.
    pub fn sample(&mut self, now_us: u64, cpu_ns: Option<u64>) -> Activity {
        let Some(cpu_ns) = cpu_ns else {
            self.reset();
            return self.verdict;
        };
        let Some((start_us, start_ns)) = self.window else {
            self.window = Some((now_us, cpu_ns));
            return self.verdict;
        };
        if now_us < start_us || cpu_ns < start_ns {
            // A clock that runs backwards belongs to another QEMU process: start over.
            self.reset();
            self.window = Some((now_us, cpu_ns));
            return self.verdict;
        }
        let elapsed_us = now_us - start_us;
        let busy_ns = (cpu_ns - start_ns) as f64;
        let judged_us = elapsed_us.max(self.config.threshold_us);
        if busy_ns > judged_us as f64 * 1000.0 * self.config.max_busy_fraction {
            // Too much already: no need to wait for the window's end.
            self.verdict = Activity::Busy;
            self.window = Some((now_us, cpu_ns));
        } else if elapsed_us >= self.config.threshold_us {
            self.verdict = Activity::Idle;
            self.window = Some((now_us, cpu_ns));
        }
        self.verdict
    }

    /// The last verdict.
    #[must_use]
    pub fn activity(&self) -> Activity {
        self.verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detector() -> IdleDetector {
        IdleDetector::new(IdleConfig::default())
    }

    #[test]
    fn quiet_for_the_threshold_is_idle_and_not_before() {
        let mut idle = detector();
        assert_eq!(idle.sample(0, Some(0)), Activity::Unknown);
        assert_eq!(idle.sample(50, Some(1_000)), Activity::Unknown);
        assert_eq!(idle.sample(99, Some(4_000)), Activity::Unknown);
        assert_eq!(idle.sample(100, Some(5_000)), Activity::Idle, "5 % exactly");
        assert_eq!(idle.sample(120, Some(9_999)), Activity::Idle);
        assert_eq!(idle.sample(130, Some(10_001)), Activity::Busy, "at once");
    }

    #[test]
    fn a_busy_guest_is_never_idle_and_becomes_idle_one_threshold_after_it_stops() {
        let mut idle = detector();
        for step in 0..1000u64 {
            assert_ne!(idle.sample(step * 10, Some(step * 9_000)), Activity::Idle);
        }
        let cpu = 999 * 9_000;
        assert_eq!(idle.sample(9_990 + 99, Some(cpu)), Activity::Busy);
        assert_eq!(idle.sample(9_990 + 100, Some(cpu)), Activity::Idle);
    }

    #[test]
    fn missing_samples_and_backward_clocks_start_over() {
        let mut idle = detector();
        idle.sample(0, Some(0));
        assert_eq!(idle.sample(200, Some(0)), Activity::Idle);
        assert_eq!(idle.sample(210, None), Activity::Unknown);
        assert_eq!(idle.sample(220, Some(0)), Activity::Unknown);
        assert_eq!(idle.sample(320, Some(0)), Activity::Idle);
        assert_eq!(idle.activity(), Activity::Idle);
        assert_eq!(idle.sample(330, Some(5_001)), Activity::Busy);
        assert_eq!(idle.sample(340, Some(10)), Activity::Unknown, "a new QEMU");
        assert_eq!(idle.sample(440, Some(10)), Activity::Idle);
    }
}
