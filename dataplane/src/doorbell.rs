//! Waking a reactor only when it sleeps: the half of the sleep/wake protocol for sources in memory.
//!
//! The consumer arms the bell, looks at the source once more, and only then sleeps on the bell's descriptor. The producer
//! publishes, then rings: a system call if the bell is armed, two instructions otherwise. Each side does its store before a
//! full fence and its load after it, so at least one of them sees the other: either the producer signals, or the consumer's
//! second look finds what was published. virtio's notification suppression is the same protocol (virtio 1.2 §2.7.10).
//! The loom model below tries every order of the two; without either fence it finds the lost wake-up.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::sync::{AtomicBool, Ordering, fence};
use crate::wait::EventFd;

/// What a bell wakes by.
pub trait Signal {
    /// Makes the sleeper's wait end, now or when it comes to wait.
    fn signal(&self);
}

impl Signal for EventFd {
    fn signal(&self) {
        EventFd::signal(self);
    }
}

/// See the module. Any number of producers, one consumer.
#[derive(Debug)]
pub struct Doorbell<S = EventFd> {
    armed: AtomicBool,
    signal: S,
}

impl Doorbell {
    /// A bell that is armed: its consumer has not looked at anything yet.
    ///
    /// # Errors
    /// Those of [`EventFd::new`].
    pub fn new() -> io::Result<Doorbell> {
        Ok(Doorbell::over(EventFd::new()?))
    }

    /// Consumer: takes back all signals, after the descriptor was found readable.
    pub fn drain(&self) {
        self.signal.drain();
    }
}

impl<S: Signal> Doorbell<S> {
    fn over(signal: S) -> Doorbell<S> {
        Doorbell { armed: AtomicBool::new(true), signal }
    }

    /// Consumer: from here on producers signal. Sources must be looked at once more before sleeping.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Consumer: it looks by itself from here on; a signal may still come.
    pub fn disarm(&self) {
        self.armed.store(false, Ordering::Relaxed);
    }

    /// Producer: something was published.
    pub fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.armed.load(Ordering::Relaxed) {
            self.signal.signal();
        }
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::wait::{Interest, Poller};

    #[test]
    fn only_an_armed_bell_costs_a_signal() {
        let bell = Doorbell::new().unwrap();
        let poller = Poller::new().unwrap();
        poller.add(&bell, 1, Interest::Read).unwrap();
        let mut ready = Vec::new();
        bell.disarm();
        bell.ring();
        poller.wait(Some(0), &mut ready).unwrap();
        assert!(ready.is_empty());
        bell.arm();
        bell.ring();
        poller.wait(Some(1_000_000), &mut ready).unwrap();
        assert_eq!(ready.len(), 1);
        bell.drain();
        poller.wait(Some(0), &mut ready).unwrap();
        assert!(ready.is_empty());
    }

    #[test]
    fn a_sleeper_misses_nothing_that_threads_publish() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicU64, Ordering};
        const ITEMS: u64 = 20_000;
        let (bell, published) = (Arc::new(Doorbell::new().unwrap()), Arc::new(AtomicU64::new(0)));
        let poller = Poller::new().unwrap();
        poller.add(&*bell, 1, Interest::Read).unwrap();
        let producer = std::thread::spawn({
            let (bell, published) = (bell.clone(), published.clone());
            move || {
                for _ in 0..ITEMS {
                    published.fetch_add(1, Ordering::Relaxed);
                    bell.ring();
                }
            }
        });
        let (mut seen, mut ready) = (0, Vec::new());
        while seen < ITEMS {
            bell.arm();
            let now = published.load(Ordering::Relaxed);
            if now == seen {
                poller.wait(Some(5_000_000), &mut ready).unwrap();
                assert!(!ready.is_empty(), "slept for 5 s although something may have been published");
                bell.drain();
            }
            bell.disarm();
            seen = published.load(Ordering::Relaxed);
        }
        producer.join().unwrap();
    }
}

#[cfg(all(test, loom))]
mod loom_model {
    use super::*;
    use loom::sync::atomic::AtomicUsize;
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    /// An eventfd as loom can follow it: a level that a wait waits for.
    struct Level {
        raised: Mutex<bool>,
        changed: Condvar,
    }

    impl Level {
        fn wait_and_drain(&self) {
            let mut raised = self.raised.lock().unwrap();
            while !*raised {
                raised = self.changed.wait(raised).unwrap();
            }
            *raised = false;
        }
    }

    impl Signal for Level {
        fn signal(&self) {
            *self.raised.lock().unwrap() = true;
            self.changed.notify_one();
        }
    }

    /// A producer publishes `items` one by one while a consumer takes them and sleeps whenever `ready_to_sleep`, called after
    /// a look that found nothing, finds nothing either. loom fails a run in which both cannot go on.
    fn exchange(items: usize, ring: fn(&Doorbell<Level>), arm: fn(&Doorbell<Level>)) {
        let level = Level { raised: Mutex::new(false), changed: Condvar::new() };
        let bell = Arc::new(Doorbell::over(level));
        bell.disarm();
        let published = Arc::new(AtomicUsize::new(0));
        let producer = thread::spawn({
            let (bell, published) = (bell.clone(), published.clone());
            move || {
                for _ in 0..items {
                    published.fetch_add(1, Ordering::Relaxed);
                    ring(&bell);
                }
            }
        });
        let mut seen = 0;
        while seen < items {
            arm(&bell);
            if published.load(Ordering::Relaxed) == seen {
                bell.signal.wait_and_drain();
            }
            bell.disarm();
            seen = published.load(Ordering::Relaxed);
        }
        producer.join().unwrap();
    }

    #[test]
    fn loom_no_wake_up_is_lost() {
        loom::model(|| exchange(2, Doorbell::ring, Doorbell::arm));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn loom_a_producer_without_its_fence_loses_one() {
        let ring = |bell: &Doorbell<Level>| {
            if bell.armed.load(Ordering::Relaxed) {
                bell.signal.signal();
            }
        };
        loom::model(move || exchange(1, ring, Doorbell::arm));
    }

    #[test]
    #[should_panic(expected = "deadlock")]
    fn loom_a_consumer_without_its_fence_loses_one() {
        let arm = |bell: &Doorbell<Level>| bell.armed.store(true, Ordering::Relaxed);
        loom::model(move || exchange(1, Doorbell::ring, arm));
    }
}
