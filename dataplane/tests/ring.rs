//! The ring between two threads of one process: every size, every split, and an order that holds under load.

use dataplane::ring::{Assembly, Consumer, Heap, Kind, Memory, Producer};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::Ordering;

type Ends = (Producer<Arc<Heap>>, Consumer<Arc<Heap>>);

fn ends(bytes: usize) -> Ends {
    let heap = Arc::new(Heap::new(bytes));
    (Producer::new(Arc::clone(&heap)), Consumer::new(heap))
}

#[test]
fn an_empty_ring_has_room_for_the_longest_record_wherever_it_ends() {
    let (mut producer, mut consumer) = ends(256);
    let longest = vec![7; producer.max_record_bytes()];
    assert_eq!(longest.len(), 56);
    let mut into = Assembly::default();
    for filler in (0..=56).cycle().take(1000) {
        for bytes in [&longest[..filler], &longest] {
            into.clear();
            assert_eq!(producer.push(Kind::Last, &[bytes]), Ok(true));
            assert_eq!(consumer.take(&mut into), Ok(Some(Kind::Last)));
            assert_eq!(into.bytes(), bytes);
        }
        assert_eq!(consumer.take(&mut into), Ok(None));
    }
}

#[test]
#[should_panic(expected = "a record of 57 bytes")]
fn a_longer_record_is_a_mistake() {
    let _ = ends(256).0.push(Kind::Last, &[&[0; 57]]);
}

#[test]
fn two_threads_keep_the_order() {
    const RECORDS: u64 = if cfg!(miri) { 200 } else { 300_000 };
    let (mut producer, mut consumer) = ends(4096);
    let writer = std::thread::spawn(move || {
        for number in 0..RECORDS {
            let bytes = number.to_le_bytes();
            let filler = [number as u8; 300];
            while !producer.push(Kind::Last, &[&bytes, &filler[..number as usize % 300]]).unwrap() {
                std::thread::yield_now();
            }
        }
    });
    let mut into = Assembly::default();
    for number in 0..RECORDS {
        into.clear();
        while consumer.take(&mut into).unwrap().is_none() {
            std::thread::yield_now();
        }
        let (bytes, filler) = into.bytes().split_at(8);
        assert_eq!(bytes, number.to_le_bytes());
        assert!(filler.len() == number as usize % 300 && filler.iter().all(|&byte| byte == number as u8));
    }
    writer.join().unwrap();
}

/// As the ring makes them: lap, kind and length.
fn mark((lap, kind, length): (u64, u64, u64)) -> u64 {
    lap << 23 | kind << 21 | length
}

/// The words of a record that an earlier lap left are no record, whatever they are.
#[test]
fn old_payload_is_never_taken_for_a_record() {
    let (mut producer, mut consumer) = ends(512);
    let mut into = Assembly::default();
    for lap in 0..50u64 {
        let payload: Vec<u8> = (0..14).flat_map(|word| mark((lap + word / 3, 1 + word % 3, 8)).to_ne_bytes()).collect();
        for length in [112, 8, 60, 0, 112, 57, 1] {
            into.clear();
            assert_eq!(consumer.take(&mut into), Ok(None), "lap {lap}");
            assert_eq!(producer.push(Kind::Last, &[&payload[..length]]), Ok(true));
            assert_eq!(consumer.take(&mut into), Ok(Some(Kind::Last)));
            assert_eq!(into.bytes(), &payload[..length]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 5 } else { 256 }))]

    /// Against a queue: whatever is cut how, what comes out is what went in, and there is no room only when there is little.
    #[test]
    fn it_is_a_queue(
        steps in prop::collection::vec((prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..5), any::<bool>(), 0usize..4), 1..200),
    ) {
        let (mut producer, mut consumer) = ends(512);
        let mut queue = std::collections::VecDeque::new();
        let mut into = Assembly::default();
        for (parts, last, takes) in steps {
            let kind = if last { Kind::Last } else { Kind::More };
            let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            if producer.push(kind, &slices).unwrap() {
                queue.push_back((kind, parts.concat()));
            } else {
                prop_assert!(!queue.is_empty());
            }
            for _ in 0..takes {
                into.clear();
                let taken = consumer.take(&mut into).unwrap();
                prop_assert_eq!(taken.map(|kind| (kind, into.bytes().to_vec())), queue.pop_front());
            }
        }
    }

    /// Whatever a producer writes, the consumer neither panics nor reads beyond the ring.
    #[test]
    fn arbitrary_words_are_a_violation_or_bytes(words in prop::collection::vec(prop_oneof![any::<u64>(), (0u64..3, 0u64..4, 0u64..80).prop_map(mark)], 32)) {
        let heap = Arc::new(Heap::new(256));
        for (word, value) in heap.words().iter().zip(&words) {
            word.store(*value, Ordering::Relaxed);
        }
        let mut consumer = Consumer::new(heap);
        let mut into = Assembly::default();
        for _ in 0..100 {
            into.clear();
            if !matches!(consumer.take(&mut into), Ok(Some(_))) {
                break;
            }
            prop_assert!(into.bytes().len() <= 56);
        }
    }
}
