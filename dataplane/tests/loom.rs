//! The ring's and the slot's orderings and their sleep/wake protocol under loom: every interleaving of the small cases below, with every
//! value that a relaxed load may see. Their source is compiled into this test once more, with loom's atomics.
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
#[path = "../src/turn.rs"]
mod turn;

use loom::sync::Notify;
use loom::thread;
use ring::{Assembly, Consumer, Heap, Kind, Producer};
use std::sync::Arc;
use turn::{Found, HeapSide};

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

type End = turn::Ends<HeapSide>;

/// Both ends of a pair, the one that begins first.
fn pair() -> [End; 2] {
    let [there, back] = HeapSide::pair(RING_BYTES);
    [End::new(there.clone(), back.clone(), true), End::new(back, there, false)]
}

fn say(end: &mut End, value: u64) {
    assert!(end.max_record_bytes() >= size_of_val(&value));
    assert_eq!(end.push(Kind::Last, &[&value.to_ne_bytes()]), Ok(true));
}

/// The next message's value, checked for its form.
fn hear(end: &mut End) -> Option<u64> {
    let found = end.find().expect("the other side is ours");
    let mut into = Assembly::default();
    let kind = end.take(&mut into).expect("the other side is ours");
    // What comes between the two looks is taken; what was found is not lost.
    assert!(kind == Some(Kind::Last) || kind.is_none() && found == Found::Nothing);
    kind.map(|_| u64::from_ne_bytes(into.bytes().try_into().expect("messages of eight bytes")))
}

fn hear_soon(end: &mut End) -> u64 {
    loop {
        match hear(end) {
            Some(value) => return value,
            None => thread::yield_now(),
        }
    }
}

#[test]
fn what_goes_through_slot_and_ring_arrives_in_order_on_both_sides() {
    model(3, || {
        let [mut left, mut right] = pair();
        let answering = thread::spawn(move || {
            // Through the ring, because it is not its turn, or through the slot.
            say(&mut right, 10);
            for expected in [1, 2] {
                assert_eq!(hear_soon(&mut right), expected);
            }
            say(&mut right, 20);
            assert_eq!(hear_soon(&mut right), 3);
        });
        say(&mut left, 1);
        say(&mut left, 2);
        assert_eq!(hear_soon(&mut left), 10);
        say(&mut left, 3);
        assert_eq!(hear_soon(&mut left), 20);
        answering.join().unwrap();
        assert_eq!(hear(&mut left), None);
    });
}

/// A record that is there is no reason to take it before what the slot brought ahead of it.
#[test]
fn a_message_in_the_slot_is_taken_before_the_record_that_follows_it() {
    model(3, || {
        let [mut left, mut right] = pair();
        let writer = thread::spawn(move || {
            for value in 1..=3 {
                say(&mut left, value);
            }
        });
        for expected in 1..=3 {
            assert_eq!(hear_soon(&mut right), expected);
        }
        writer.join().unwrap();
    });
}

#[test]
fn both_sides_may_sleep_while_messages_go_through_the_slot() {
    model(2, || {
        let [mut left, mut right] = pair();
        let (left_bell, right_bell) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (ring_left, own_bell) = (Arc::clone(&left_bell), Arc::clone(&right_bell));
        let answering = thread::spawn(move || {
            let value = hear_asleep(&mut right, &own_bell);
            say(&mut right, value + 1);
            if right.take_early_wake() || right.take_wake() {
                ring_left.notify();
            }
        });
        say(&mut left, 7);
        if left.take_wake() {
            right_bell.notify();
        }
        assert_eq!(hear_asleep(&mut left, &left_bell), 8);
        answering.join().unwrap();
    });
}

fn hear_asleep(end: &mut End, bell: &Notify) -> u64 {
    loop {
        if let Some(value) = hear(end) {
            return value;
        }
        if !end.arm(None).unwrap() {
            bell.wait();
        }
        end.disarm();
    }
}
