//! When to look for the answer to a message.
//!
//! A look that finds nothing takes the line away from the peer just when it is to write there, who must fetch it back first:
//! that costs as much as a message. A look that comes late costs no more than its lateness. So nobody looks for a moment after a
//! message was sent, and the moment follows what the peer takes: it grows by a step when an answer came, but not to the first
//! look, and shrinks by a tick when it came to that. Rejected: a fixed time (too short for one machine or too long for
//! another, and processors that are near or far by turns), and a mean of the times (half of all looks would come too early).

use crate::cycles::Cycles;

/// Ticks of the time stamp counter: at most 150 to 200 ns.
const MAX_TICKS: u64 = 400;
const FIRST_TICKS: u64 = 250;
const STEP_TICKS: u64 = 16;
/// Between two looks as long as an answer may still come: one to two µs.
const AGAIN_TICKS: u64 = 150;
const ANSWER_TICKS: u64 = 4000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// There is no answer to wait for.
    Idle,
    /// Nobody has looked yet.
    Early,
    /// It was in vain.
    Missed,
}

/// See the module. Times are given as functions, because a reading costs as much as all the rest.
#[derive(Debug)]
pub(super) struct Pause {
    ticks: u64,
    /// When the first message since the last look was sent.
    sent: Cycles,
    /// When the next look is due, ticks after that.
    due: u64,
    state: State,
}

impl Pause {
    pub fn new(now: Cycles) -> Pause {
        Pause { ticks: FIRST_TICKS, sent: now, due: 0, state: State::Idle }
    }

    /// A message was sent.
    #[inline]
    pub fn sent(&mut self, now: impl FnOnce() -> Cycles) {
        // Not from the last of many: who sends without end is to look, too.
        if self.state != State::Early {
            (self.sent, self.due, self.state) = (now(), self.ticks, State::Early);
        }
    }

    /// Whether a look would come too early.
    #[inline]
    pub fn is_early(&self, now: impl FnOnce() -> Cycles) -> bool {
        self.state != State::Idle && now().since(self.sent) < self.due
    }

    /// A look found something, or nothing.
    #[inline]
    pub fn looked(&mut self, found: bool, now: impl FnOnce() -> Cycles) {
        match self.state {
            State::Idle => {}
            State::Early if found => {
                self.ticks = self.ticks.saturating_sub(1);
                self.state = State::Idle;
            }
            State::Missed if found => {
                self.ticks = (self.ticks + STEP_TICKS).min(MAX_TICKS);
                self.state = State::Idle;
            }
            State::Early | State::Missed => {
                let passed = now().since(self.sent);
                self.due = passed + AGAIN_TICKS;
                self.state = if passed < ANSWER_TICKS { State::Missed } else { State::Idle };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cycles::CycleClock;

    /// Answers that take `answer` ticks, until the first look is as long after the message as it will be.
    fn settled(answer: u64) -> Pause {
        let start = CycleClock::new().now();
        let mut pause = Pause::new(start);
        for _ in 0..2000 {
            pause.sent(|| start);
            let looks = (0..ANSWER_TICKS).filter(|&ticks| !pause.is_early(|| start.plus(ticks)));
            let mut found = false;
            for ticks in looks.collect::<Vec<_>>() {
                if !found && !pause.is_early(|| start.plus(ticks)) {
                    found = ticks >= answer;
                    pause.looked(found, || start.plus(ticks));
                }
            }
            assert!(found && pause.state == State::Idle);
        }
        pause
    }

    #[test]
    fn the_first_look_comes_just_when_the_answer_does() {
        for answer in [50, 200, 350] {
            let ticks = settled(answer).ticks;
            assert!((answer - 1..=answer + STEP_TICKS).contains(&ticks), "{ticks} ticks for an answer after {answer}");
        }
        assert_eq!(settled(0).ticks, 0);
        assert!(settled(3000).ticks <= MAX_TICKS);
    }

    #[test]
    fn who_sends_without_end_looks_all_the_same() {
        let start = CycleClock::new().now();
        let mut pause = Pause::new(start);
        let looks = (0..10_000).filter(|&ticks| {
            pause.sent(|| start.plus(ticks));
            let looks = !pause.is_early(|| start.plus(ticks));
            if looks {
                pause.looked(false, || start.plus(ticks));
            }
            looks
        });
        assert!(looks.count() as u64 >= 10_000 / MAX_TICKS);
    }

    #[test]
    fn nobody_waits_for_an_answer_that_does_not_come() {
        let start = CycleClock::new().now();
        let mut pause = Pause::new(start);
        assert!(!pause.is_early(|| unreachable!("nothing was sent")));
        pause.sent(|| start);
        let mut looks = 0;
        for ticks in 0..2 * ANSWER_TICKS {
            if !pause.is_early(|| start.plus(ticks)) {
                pause.looked(false, || start.plus(ticks));
                looks += 1;
            }
        }
        assert!(looks > ANSWER_TICKS, "each look counts again");
        assert_eq!(pause.ticks, FIRST_TICKS, "and nothing was learnt");
    }
}
