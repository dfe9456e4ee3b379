//! The ring's orderings and its sleep/wake protocol under loom: every interleaving of the small cases below, with every
//! value that a relaxed load may see. The ring's source is compiled into this test once more, with loom's atomics.
//!
//! What loom cannot see: it never lets a load see a store that comes later, so it would not notice if the consumer told of
//! its position too early (`consumed`, the release there and the acquire of the producer).

mod sync {
    pub use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

    /// Nothing is copied at once, so the ring does it word by word, which loom sees.
    pub mod cache_line {
        use super::AtomicU64;

        pub const LINE_WORDS: usize = 8;
        pub const LINE_BYTES: usize = 56;

        pub fn full_fence() {
            super::fence(super::Ordering::SeqCst);
        }

        pub fn claim(_: &AtomicU64) {}

        pub fn hand_on(_: &AtomicU64) {}

        pub fn fill(_: &[[AtomicU64; LINE_WORDS]], _: &[[u8; LINE_BYTES]]) -> usize {
            0
        }

        pub fn read(_: &[[AtomicU64; LINE_WORDS]], _: &mut [[u8; LINE_BYTES]]) -> usize {
            0
        }
    }
}
#[path = "../src/ring.rs"]
mod ring;

use loom::sync::Notify;
use loom::thread;
use ring::{Assembly, Consumer, Heap, Kind, Producer};
use std::sync::Arc;

/// The smallest ring: four lines, of which a record takes one.
const RING_BYTES: usize = 256;

type Ends = (Producer<Arc<Heap>>, Consumer<Arc<Heap>>);

fn ends() -> Ends {
    let heap = Arc::new(Heap::new(RING_BYTES));
    (Producer::new(Arc::clone(&heap)), Consumer::new(heap))
}

/// Runs `test` with every interleaving of up to `preemptions` involuntary switches.
fn model(preemptions: usize, test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(test);
}

fn push(producer: &mut Producer<Arc<Heap>>, value: u64) -> bool {
    producer.claim();
    producer.push(Kind::Last, &[&value.to_ne_bytes()]).expect("the consumer is ours")
}

/// The next record's value, checked for its form.
fn take(consumer: &mut Consumer<Arc<Heap>>) -> Option<u64> {
    let mut into = Assembly::default();
    let kind = consumer.take(&mut into).expect("the producer is ours")?;
    assert_eq!(kind, Kind::Last);
    let value = u64::from_ne_bytes(into.bytes().try_into().expect("records of eight bytes"));
    into.clear();
    Some(value)
}

#[test]
fn records_arrive_whole_and_in_order_around_the_end() {
    model(3, || {
        let (mut producer, mut consumer) = ends();
        // An empty record first, so that the other thread begins in the middle of a lap.
        let values = [0x0101, 0x0202, 0x0303, 0x0404, 0x0505];
        let mut into = Assembly::default();
        assert_eq!(producer.push(Kind::More, &[]), Ok(true));
        assert_eq!((consumer.take(&mut into), into.bytes()), (Ok(Some(Kind::More)), &[][..]));
        let writer = thread::spawn(move || {
            for value in values {
                while !push(&mut producer, value) {
                    thread::yield_now();
                }
            }
        });
        for expected in values {
            let value = loop {
                match take(&mut consumer) {
                    Some(value) => break value,
                    None => thread::yield_now(),
                }
            };
            assert_eq!(value, expected);
        }
        assert_eq!(take(&mut consumer), None);
        writer.join().unwrap();
    });
}

#[test]
fn a_consumer_that_goes_to_sleep_misses_no_record() {
    model(3, || sleeping_consumer(true, false));
}

/// The same for one that never says that it is awake.
#[test]
fn a_consumer_that_lies_down_again_and_again_misses_no_record() {
    model(3, || sleeping_consumer(false, false));
}

/// Nor one whose producer looks with a fence only once it has written everything.
#[test]
fn a_producer_may_look_for_sleepers_early_if_it_looks_again() {
    model(3, || sleeping_consumer(true, true));
}

fn sleeping_consumer(gets_up: bool, looks_early: bool) {
    let (mut producer, mut consumer) = ends();
    let bell = Arc::new(Notify::new());
    let ring = Arc::clone(&bell);
    let writer = thread::spawn(move || {
        for value in 1..=2 {
            assert!(push(&mut producer, value));
            if looks_early && producer.take_early_wake() || !looks_early && producer.take_wake() {
                ring.notify();
            }
        }
        if producer.take_wake() {
            ring.notify();
        }
    });
    let mut received = Vec::new();
    while received.len() < 2 {
        match take(&mut consumer) {
            Some(value) => received.push(value),
            None if consumer.arm() => {}
            // If no bell ever rings, loom says «deadlock».
            None => bell.wait(),
        }
        if gets_up {
            consumer.disarm();
        }
    }
    assert_eq!(received, [1, 2]);
    writer.join().unwrap();
}

#[test]
fn a_producer_that_goes_to_sleep_misses_no_room() {
    model(3, || {
        let (mut producer, mut consumer) = ends();
        for value in 0..4 {
            assert!(push(&mut producer, value));
        }
        assert!(!push(&mut producer, 4));
        let bell = Arc::new(Notify::new());
        let ring = Arc::clone(&bell);
        let reader = thread::spawn(move || {
            let mut received = 0;
            while received < 4 {
                assert_eq!(take(&mut consumer), Some(received));
                received += 1;
                if consumer.take_wake() {
                    ring.notify();
                }
            }
        });
        while !push(&mut producer, 4) {
            if !producer.arm(8).unwrap() {
                bell.wait();
            }
            producer.disarm();
        }
        reader.join().unwrap();
    });
}

#[test]
fn both_directions_may_go_to_sleep_at_once() {
    model(2, || {
        let (mut to_right, mut at_right) = ends();
        let (mut to_left, mut at_left) = ends();
        let (left_bell, right_bell) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (ring_left, own_bell) = (Arc::clone(&left_bell), Arc::clone(&right_bell));
        let right = thread::spawn(move || {
            let value = wait_for(&mut at_right, &own_bell);
            assert!(push(&mut to_left, value + 1));
            if to_left.take_wake() {
                ring_left.notify();
            }
        });
        assert!(push(&mut to_right, 7));
        if to_right.take_wake() {
            right_bell.notify();
        }
        assert_eq!(wait_for(&mut at_left, &left_bell), 8);
        right.join().unwrap();
    });
}

fn wait_for(consumer: &mut Consumer<Arc<Heap>>, bell: &Notify) -> u64 {
    loop {
        if let Some(value) = take(consumer) {
            return value;
        }
        if !consumer.arm() {
            bell.wait();
        }
        consumer.disarm();
    }
}
