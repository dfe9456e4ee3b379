//! Two rings and their slot between two ends in one thread: an order that holds both ways, and a peer without manners.

use dataplane::ring::{Assembly, Kind, Violation};
use dataplane::turn::{Ends, Found, HeapSide, MAX_SLOT_BYTES, SLOT_WORDS, SlotMemory};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;

const RING_BYTES: usize = 1024;

type End = Ends<HeapSide>;

fn pair() -> ([End; 2], HeapSide) {
    let [there, back] = HeapSide::pair(RING_BYTES);
    ([Ends::new(there.clone(), back.clone(), true), Ends::new(back, there.clone(), false)], there)
}

/// As a slot's mark is made.
fn mark(position: u64, number: u64, length: u64) -> u64 {
    position << 32 | number << 8 | length
}

fn take(end: &mut End) -> Option<Vec<u8>> {
    let mut into = Assembly::default();
    end.take(&mut into).unwrap().map(|kind| {
        assert_eq!(kind, Kind::Last);
        into.bytes().to_vec()
    })
}

#[test]
fn answers_take_the_slot_and_everything_else_the_ring() {
    let ([mut left, mut right], _) = pair();
    for length in [1, 7, 8, 9, 30, 55, 56, 57, 64, MAX_SLOT_BYTES] {
        let message: Vec<u8> = (1..=length as u8).collect();
        assert_eq!(left.push(Kind::Last, &[&message]), Ok(true));
        assert_eq!(right.find(), Ok(Found::Slot));
        assert_eq!(take(&mut right).as_deref(), Some(&message[..]));
        // In parts, too.
        let (head, tail) = message.split_at(length / 2);
        assert_eq!(right.push(Kind::Last, &[head, tail]), Ok(true));
        assert_eq!(left.find(), Ok(Found::Slot));
        assert_eq!(take(&mut left).as_deref(), Some(&message[..]));
    }
    assert_eq!(right.push(Kind::Last, &[b"not its turn"]), Ok(true));
    assert_eq!(left.find(), Ok(Found::Records));
    assert_eq!(left.push(Kind::Last, &[&[1; MAX_SLOT_BYTES + 1]]), Ok(true));
    assert_eq!(right.find(), Ok(Found::Records));
    // Within a message of several records, which the slot's would tear apart.
    assert_eq!(left.push(Kind::More, &[b"begun"]), Ok(true));
    assert_eq!(left.push(Kind::Last, &[b" and ended"]), Ok(true));
    let mut into = Assembly::default();
    assert_eq!(right.take(&mut into), Ok(Some(Kind::Last)));
    into.clear();
    assert_eq!(right.take(&mut into), Ok(Some(Kind::More)));
    assert_eq!(right.take(&mut into), Ok(Some(Kind::Last)));
    assert_eq!(into.bytes(), b"begun and ended");
    // Its turn has not passed by that.
    assert_eq!(left.push(Kind::Last, &[b"short"]), Ok(true));
    assert_eq!(right.find(), Ok(Found::Slot));
}

/// The number is short, and nothing depends on how often the turn has passed.
#[test]
fn turns_pass_for_longer_than_they_can_be_counted() {
    const TURNS: u64 = if cfg!(miri) { 100 } else { (1 << 24) + 10 };
    let ([mut left, mut right], memory) = pair();
    let mut into = Assembly::default();
    let (mut from, mut to) = (&mut left, &mut right);
    for turn in 0..TURNS {
        assert_eq!(from.push(Kind::Last, &[&turn.to_le_bytes()]), Ok(true));
        into.clear();
        assert_eq!(to.take(&mut into), Ok(Some(Kind::Last)));
        assert_eq!(into.bytes(), turn.to_le_bytes());
        std::mem::swap(&mut from, &mut to);
    }
    let number = memory.slot()[0].load(Ordering::Relaxed) >> 8 & 0xff_ffff;
    assert_eq!(number, TURNS & 0xff_ffff);
}

#[test]
fn a_mark_that_nobody_writes_ends_the_pair() {
    for bad in [mark(0, 2, 8), mark(0, 0xff_ffff, 8), mark(0, 1, 113), mark(17, 1, 8), mark(u64::from(u32::MAX), 1, 8)]
    {
        let ([_, mut right], memory) = pair();
        memory.slot()[0].store(bad, Ordering::Relaxed);
        assert_eq!(right.find(), Err(Violation::Turn { mark: bad }));
        assert_eq!(right.take(&mut Assembly::default()), Err(Violation::Turn { mark: bad }));
        assert_eq!(right.arm(None), Err(Violation::Turn { mark: bad }));
    }
    // Behind a record that is not there.
    let ([_, mut right], memory) = pair();
    memory.slot()[0].store(mark(1, 1, 8), Ordering::Relaxed);
    assert_eq!(right.find(), Err(Violation::Turn { mark: mark(1, 1, 8) }));
    // In the middle of a message.
    let ([mut left, mut right], memory) = pair();
    assert_eq!(left.push(Kind::More, &[b"begun"]), Ok(true));
    let mut into = Assembly::default();
    assert_eq!(right.take(&mut into), Ok(Some(Kind::More)));
    memory.slot()[0].store(mark(1, 1, 8), Ordering::Relaxed);
    assert_eq!(right.take(&mut into), Err(Violation::Turn { mark: mark(1, 1, 8) }));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 5 } else { 256 }))]

    /// Against a queue each way: whatever goes through the slot and whatever through the ring.
    #[test]
    fn it_is_a_queue_both_ways(steps in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..200), any::<bool>(), 0usize..3), 1..300)) {
        let ([mut left, mut right], _) = pair();
        let mut queues = [VecDeque::new(), VecDeque::new()];
        let mut assemblies = [Assembly::default(), Assembly::default()];
        for (from_left, bytes, last, takes) in steps {
            let (from, to, way) = if from_left { (&mut left, &mut right, 0) } else { (&mut right, &mut left, 1) };
            let kind = if last { Kind::Last } else { Kind::More };
            if from.push(kind, &[&bytes]).unwrap() {
                queues[way].push_back((kind, bytes));
            }
            let into = &mut assemblies[way];
            for _ in 0..takes {
                let before = into.bytes().len();
                let taken = to.take(into).unwrap().map(|kind| (kind, into.bytes()[before..].to_vec()));
                if matches!(taken, Some((Kind::Last, _))) {
                    into.clear();
                }
                prop_assert_eq!(taken, queues[way].pop_front());
            }
        }
    }

    /// Whatever is in the slot, it is a violation or bytes.
    #[test]
    fn arbitrary_slots_never_panic(marks in prop::collection::vec(prop_oneof![any::<u64>(), (0u64..20, 0u64..9, 0u64..120).prop_map(|(position, number, length)| mark(position, number, length))], 1..20)) {
        let ([mut left, mut right], memory) = pair();
        let mut into = Assembly::default();
        for (step, mark) in marks.into_iter().enumerate() {
            memory.slot()[step % SLOT_WORDS].store(mark, Ordering::Relaxed);
            memory.slot()[0].store(mark, Ordering::Relaxed);
            let _ = left.push(Kind::Last, &[&[7; 90][..step * 9 % 90]]);
            into.clear();
            if right.take(&mut into).is_err() {
                break;
            }
            prop_assert!(into.bytes().len() <= MAX_SLOT_BYTES);
            let _ = right.push(Kind::Last, &[b"x"]);
        }
    }
}
