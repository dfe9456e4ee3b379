//! Which of the guest's receiving queues take nothing: since when, and which have had their time.
//!
//! Each queue has a time of its own, as in a NIC: a guest that leaves one queue without buffers loses that queue's frames, and
//! the others are held up once and not again and again. Rejected: one time for the whole device, which ends with every
//! frame that another queue takes.

use crate::device::MAX_QUEUE_PAIRS;

/// All queues of a device.
#[derive(Debug, Default)]
pub struct Stalls {
    queues: [Stall; MAX_QUEUE_PAIRS],
}

#[derive(Debug, Default, Clone, Copy)]
struct Stall {
    since_us: Option<u64>,
    /// It has had its time: its frames are dropped until it takes one.
    dropping: bool,
}

impl Stalls {
    /// Whether a frame waits for a queue.
    pub fn is_waiting(&self) -> bool {
        self.queues.iter().any(|stall| stall.since_us.is_some())
    }

    /// Whether anything is known of any queue.
    pub fn is_any(&self) -> bool {
        self.queues.iter().any(|stall| stall.since_us.is_some() || stall.dropping)
    }

    /// Whether the queue is one whose frames are dropped.
    pub fn is_dropping(&self, queue: usize) -> bool {
        self.queues[queue].dropping
    }

    /// The queue had no room for a frame at `now_us`; true once that has lasted for `limit_us`.
    pub fn is_too_long(&mut self, queue: usize, now_us: u64, limit_us: u64) -> bool {
        let stall = &mut self.queues[queue];
        stall.dropping || now_us.saturating_sub(*stall.since_us.get_or_insert(now_us)) >= limit_us
    }

    /// A frame for the queue is dropped. True for the first of an episode.
    pub fn dropped(&mut self, queue: usize) -> bool {
        let stall = &mut self.queues[queue];
        stall.since_us = None;
        !std::mem::replace(&mut stall.dropping, true)
    }

    /// The queue took a frame.
    pub fn took(&mut self, queue: usize) {
        self.queues[queue] = Stall::default();
    }

    /// Nothing waits any more; queues whose frames are dropped stay so.
    pub fn nothing_waits(&mut self) {
        self.queues.iter_mut().for_each(|stall| stall.since_us = None);
    }

    /// Whatever was not taken before may be taken now.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_takes_nothing_holds_the_others_up_once() {
        let mut stalls = Stalls::default();
        assert!(!stalls.is_too_long(2, 1000, 50) && stalls.is_waiting());
        assert!(!stalls.is_too_long(2, 1049, 50));
        assert!(stalls.is_too_long(2, 1050, 50) && stalls.dropped(2));
        // Frames that other queues take change nothing for it.
        stalls.took(0);
        stalls.nothing_waits();
        assert!(stalls.is_dropping(2) && !stalls.is_waiting());
        assert!(stalls.is_too_long(2, 1051, 50) && !stalls.dropped(2));
        assert!(!stalls.is_too_long(1, 1051, 50), "another queue has its own time");
        stalls.took(2);
        assert!(!stalls.is_too_long(2, 1052, 50));
        stalls.forget();
        assert!(!stalls.is_any());
    }
}
