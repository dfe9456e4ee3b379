//! The sleep/wake protocol under loom: every interleaving of a producer and a sleeping consumer, with every value that a
//! relaxed load may see. The doorbell's source is compiled into this test once more, with loom's atomics; without either of its
//! fences loom finds the lost wake-up.

mod sync {
    pub use loom::sync::atomic::{AtomicBool, Ordering, fence};
}
#[path = "../src/doorbell.rs"]
mod doorbell;

use doorbell::{Doorbell, Signal};
use loom::sync::atomic::AtomicUsize;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;
use sync::Ordering;

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
fn no_wake_up_is_lost() {
    loom::model(|| exchange(2, Doorbell::ring, Doorbell::arm));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_producer_without_its_fence_loses_one() {
    let ring = |bell: &Doorbell<Level>| {
        if bell.armed.load(Ordering::Relaxed) {
            bell.signal.signal();
        }
    };
    loom::model(move || exchange(1, ring, Doorbell::arm));
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_consumer_without_its_fence_loses_one() {
    let arm = |bell: &Doorbell<Level>| bell.armed.store(true, Ordering::Relaxed);
    loom::model(move || exchange(1, Doorbell::ring, arm));
}
