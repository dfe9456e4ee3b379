//! When the guest need not say that it has sent something: while what it sends is held anyway.
//!
//! Each kick wakes the reactor, and costs the guest a system call of its accelerator, hundreds of times per slot. But nobody
//! waits for held frames; they leave with their slot, and every turn takes what is there, whatever brought it about. So once
//! a frame was found the guest is looked at from time to time, and asked to kick again when it has stopped sending. NICs and
//! their drivers do the same (NAPI). Its idleness is not judged by what it sends, so slots end no later.
//!
//! The decisions only, with the time as a value; [`super::reactor`] carries them out.

/// Looked at so often: far less than a slot, and a full ring is unlikely to wait for longer.
const LOOK_US: u64 = 1_000;
/// A look that finds no more frames than this finds the guest at ease; beyond it the next one comes sooner in proportion.
const AT_EASE_FRAMES: u64 = 32;

/// Whether the guest kicks when it sends.
#[derive(Debug, Default)]
pub struct Hush {
    /// When it last was found to have sent something; `None` while it kicks.
    since_us: Option<u64>,
    next_look_us: u64,
}

impl Hush {
    /// A turn at `now_us` took `frames` from the guest, which are `held` or left at once. Returns whether the guest need not kick
    /// from now on.
    pub fn after_collect(&mut self, now_us: u64, frames: usize, held: bool) -> bool {
        if !held {
            self.since_us = None;
        } else if frames > 0 {
            self.since_us = Some(now_us);
        } else if self.since_us.is_some_and(|since_us| now_us >= since_us + LOOK_US) {
            self.since_us = None;
        }
        self.next_look_us = now_us + LOOK_US * AT_EASE_FRAMES / AT_EASE_FRAMES.max(frames as u64);
        self.since_us.is_some()
    }

    /// When the next turn is due.
    pub fn next_deadline_us(&self) -> u64 {
        if self.since_us.is_some() { self.next_look_us } else { u64::MAX }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_sends_is_looked_at_and_kicks_again_when_it_has_stopped() {
        let mut hush = Hush::default();
        assert!(!hush.after_collect(100, 0, true), "it has sent nothing");
        assert_eq!(hush.next_deadline_us(), u64::MAX);
        assert!(hush.after_collect(200, 3, true));
        assert_eq!(hush.next_deadline_us(), 200 + LOOK_US);
        assert!(hush.after_collect(900, 0, true), "not for long enough");
        assert!(hush.after_collect(1_000, 1, true));
        assert!(hush.after_collect(1_999, 0, true));
        assert!(!hush.after_collect(2_000, 0, true));
        assert_eq!(hush.next_deadline_us(), u64::MAX);
    }

    #[test]
    fn frames_that_leave_at_once_are_announced() {
        let mut hush = Hush::default();
        assert!(!hush.after_collect(0, 9, false));
        assert!(hush.after_collect(10, 9, true));
        assert!(!hush.after_collect(20, 9, false));
        assert_eq!(hush.next_deadline_us(), u64::MAX);
    }

    #[test]
    fn a_flood_is_looked_at_sooner() {
        let mut hush = Hush::default();
        hush.after_collect(0, 256, true);
        assert_eq!(hush.next_deadline_us(), LOOK_US / 8);
    }
}
