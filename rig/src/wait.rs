//! Waiting with a deadline. The only place of the rig that polls.

use std::time::{Duration, Instant};

use crate::{Result, RigError};

/// Between two looks at something that cannot wake us. Short against what tests measure, long against its cost.
const POLL_INTERVAL: Duration = Duration::from_millis(4);

/// A point in time after which waiting is an error.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    start: Instant,
    total: Duration,
}

impl Deadline {
    /// That long from now.
    pub fn after(total: Duration) -> Self {
        Self { start: Instant::now(), total }
    }

    /// That many seconds from now.
    pub fn after_secs(seconds: u64) -> Self {
        Self::after(Duration::from_secs(seconds))
    }

    /// What is left; zero when it has passed.
    pub fn remaining(&self) -> Duration {
        self.total.saturating_sub(self.start.elapsed())
    }

    /// Whether it has passed.
    pub fn passed(&self) -> bool {
        self.remaining().is_zero()
    }

    /// The error for somebody who waited for `what` until now.
    pub fn missed(&self, what: &str) -> RigError {
        RigError::Deadline { what: what.to_owned(), waited: self.start.elapsed(), hint: String::new() }
    }
}

/// Asks `ready` until it answers with a value. It is asked at least once, and once more at the deadline.
///
/// # Errors
/// [`RigError::Deadline`] naming `what`.
pub fn wait_until<T>(deadline: Deadline, what: &str, ready: impl FnMut() -> Option<T>) -> Result<T> {
    wait_until_every(POLL_INTERVAL, deadline, what, ready)
}

/// Like [`wait_until`] for questions that are expensive: at most one per `interval`.
///
/// # Errors
/// [`RigError::Deadline`] naming `what`.
pub fn wait_until_every<T>(
    interval: Duration,
    deadline: Deadline,
    what: &str,
    mut ready: impl FnMut() -> Option<T>,
) -> Result<T> {
    loop {
        let last = deadline.passed();
        if let Some(value) = ready() {
            return Ok(value);
        }
        if last {
            return Err(deadline.missed(what));
        }
        std::thread::sleep(interval.min(deadline.remaining()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_until_there_is_an_answer() {
        let mut asked = 0;
        let answer = wait_until(Deadline::after_secs(5), "three", || {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(answer.unwrap(), 3);
    }

    #[test]
    fn a_missed_deadline_says_for_what() {
        let error = wait_until(Deadline::after(Duration::ZERO), "a miracle", || None::<()>).unwrap_err();
        assert!(error.to_string().contains("a miracle"), "{error}");
    }
}
