//! An interrupt for frames that were sent waits, may be spared, and is never lost.

use proptest::prelude::*;

use super::bed::{Bed, RAM_BYTES, frame, take_count};
use crate::device::features::Features;
use crate::device::moderation::{DIALOGUE_WAIT_US, RECEIVER_WAIT_US, SMALL_FRAME_BYTES, WAIT_US};
use crate::device::net::{Inject, VNET_HEADER_BYTES};

const EVENT_IDX: u64 = 1 << 29;
/// When the tests begin.
const START_US: u64 = 5_000_000;

/// A device whose guest has had the interrupts that a started ring owes.
fn bed(features: u64, size: u16) -> Bed {
    let mut bed = Bed::started(Features(features | Features::offered().0 & !EVENT_IDX), size);
    bed.device.flush_signals_in_time(START_US);
    assert_eq!(bed.calls.each_ref().map(take_count), [1, 1], "after a start at once");
    bed.tx.want_interrupt(&bed.memory);
    bed.rx.want_interrupt(&bed.memory);
    bed
}

fn send(bed: &mut Bed, frames: u32) {
    for number in 0..frames {
        bed.send(&frame(number, 60), &[72], false).unwrap();
    }
    assert_eq!(bed.device.collect_tx(64, &mut |_| true), frames as usize);
}

fn receive(bed: &mut Bed) {
    bed.offer_rx(&[2000], false).unwrap();
    assert_eq!(bed.device.inject(&frame(1, 60)), Inject::Done);
}

/// The interrupts that are sent at `now_us`: for receiving, for sending.
fn flush(bed: &mut Bed, now_us: u64) -> [u64; 2] {
    bed.device.flush_signals_in_time(now_us);
    bed.calls.each_ref().map(take_count)
}

#[test]
fn it_waits_and_then_comes_once() {
    for features in [0, EVENT_IDX] {
        let mut bed = bed(features, 16);
        assert_eq!(bed.device.signal_due_us(), u64::MAX);
        send(&mut bed, 1);
        assert_eq!(flush(&mut bed, START_US), [0, 0]);
        let due = START_US + WAIT_US;
        assert_eq!(bed.device.signal_due_us(), due);
        send(&mut bed, 1);
        assert_eq!(flush(&mut bed, due - 1), [0, 0], "what comes later does not put it off");
        assert_eq!(bed.device.signal_due_us(), due);
        assert_eq!(flush(&mut bed, due), [0, 1]);
        assert_eq!(bed.device.signal_due_us(), u64::MAX);
        assert_eq!(flush(&mut bed, due + 1), [0, 0]);
    }
}

#[test]
fn a_guest_that_wants_none_gets_none_and_nothing_is_due() {
    for features in [0, EVENT_IDX] {
        let mut bed = bed(features, 16);
        bed.tx.refuse_interrupts(&bed.memory);
        send(&mut bed, 1);
        assert_eq!(flush(&mut bed, START_US), [0, 0]);
        assert_eq!(bed.device.signal_due_us(), u64::MAX);
    }
}

#[test]
fn a_guest_in_a_dialogue_that_frees_its_buffers_itself_gets_none_and_no_sleep_is_short() {
    let mut bed = bed(EVENT_IDX, 16);
    let mut now = START_US;
    for _ in 0..100 {
        receive(&mut bed);
        assert_eq!(flush(&mut bed, now), [1, 0]);
        // With what came the guest looks at what it has sent.
        bed.tx.reap(&bed.memory);
        assert!(bed.rx.reap(&bed.memory).is_some());
        bed.tx.want_interrupt(&bed.memory);
        bed.rx.want_interrupt(&bed.memory);
        send(&mut bed, 1);
        assert_eq!(flush(&mut bed, now), [0, 0]);
        assert_eq!(bed.device.signal_due_us(), now + DIALOGUE_WAIT_US);
        now += 4 * WAIT_US;
    }
}

#[test]
fn an_answer_that_others_follow_or_that_is_long_waits_no_longer_than_other_frames() {
    for features in [0, EVENT_IDX] {
        let mut bed = bed(features, 16);
        receive(&mut bed);
        assert_eq!(flush(&mut bed, START_US), [1, 0]);
        send(&mut bed, 1);
        assert_eq!(flush(&mut bed, START_US), [0, 0]);
        send(&mut bed, 1);
        assert_eq!(flush(&mut bed, START_US), [0, 0]);
        assert_eq!(bed.device.signal_due_us(), START_US + WAIT_US);
        assert_eq!(flush(&mut bed, START_US + WAIT_US), [0, 1]);
        for (bytes, wait_us) in [(SMALL_FRAME_BYTES, DIALOGUE_WAIT_US), (SMALL_FRAME_BYTES + 1, WAIT_US)] {
            while bed.tx.reap(&bed.memory).is_some() {}
            while bed.rx.reap(&bed.memory).is_some() {}
            bed.tx.want_interrupt(&bed.memory);
            receive(&mut bed);
            let now = 2 * START_US + bytes as u64 * DIALOGUE_WAIT_US;
            flush(&mut bed, now);
            let frame = frame(1, bytes - VNET_HEADER_BYTES);
            bed.send(&frame, &[bytes as u32], false).unwrap();
            assert_eq!(bed.device.collect_tx(64, &mut |_| true), 1);
            assert_eq!(flush(&mut bed, now), [0, 0]);
            assert_eq!(bed.device.signal_due_us(), now + wait_us);
            assert_eq!(flush(&mut bed, now + wait_us), [0, 1]);
        }
    }
}

#[test]
fn a_guest_that_only_takes_its_frames_is_told_after_the_longest_wait() {
    let mut bed = bed(EVENT_IDX, 16);
    send(&mut bed, 1);
    assert_eq!(flush(&mut bed, START_US), [0, 0]);
    for after_us in (1..RECEIVER_WAIT_US).step_by(WAIT_US as usize - 1) {
        receive(&mut bed);
        let [_, sent] = flush(&mut bed, START_US + after_us);
        assert_eq!(sent, 0);
        bed.rx.reap(&bed.memory).unwrap();
    }
    assert_eq!(flush(&mut bed, START_US + RECEIVER_WAIT_US), [0, 1]);
}

#[test]
fn many_do_not_wait() {
    for features in [0, EVENT_IDX] {
        let mut bed = bed(features, 16);
        send(&mut bed, 3);
        assert_eq!(flush(&mut bed, START_US), [0, 0]);
        send(&mut bed, 1);
        assert_eq!(flush(&mut bed, START_US), [0, 1], "a quarter of the ring");
    }
}

#[test]
fn it_comes_when_the_ring_stops_and_at_each_ordinary_flush() {
    let mut bed = bed(EVENT_IDX, 16);
    send(&mut bed, 1);
    assert_eq!(flush(&mut bed, START_US), [0, 0]);
    bed.device.flush_signals();
    assert_eq!(take_count(&bed.calls[1]), 1);
    assert_eq!(bed.device.signal_due_us(), u64::MAX);
    bed.tx.reap(&bed.memory).unwrap();
    bed.tx.want_interrupt(&bed.memory);
    send(&mut bed, 1);
    assert_eq!(flush(&mut bed, START_US), [0, 0]);
    bed.stop();
    assert_eq!(take_count(&bed.calls[1]), 1, "else it is in neither guest's state");
    assert_eq!(bed.device.signal_due_us(), u64::MAX);
}

#[test]
fn the_used_ring_is_recorded_although_the_interrupt_waits() {
    let mut bed = bed(EVENT_IDX, 16);
    bed.dirty_pages();
    send(&mut bed, 1);
    assert_eq!(flush(&mut bed, START_US), [0, 0]);
    let page = super::bed::Memory::offset(bed.tx.used()) / 4096;
    assert!(page < RAM_BYTES / 4096 && bed.dirty_pages().contains(&page));
}

#[derive(Debug, Clone)]
enum Op {
    Send,
    Receive,
    /// The guest frees what it has sent, and may then ask for an interrupt.
    Reap {
        ask: bool,
    },
    Refuse,
    /// The reactor's turn, so much later.
    Turn {
        later_us: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => Just(Op::Send),
        2 => Just(Op::Receive),
        3 => any::<bool>().prop_map(|ask| Op::Reap { ask }),
        1 => Just(Op::Refuse),
        6 => prop_oneof![Just(0), 1..2 * WAIT_US, 1..2 * RECEIVER_WAIT_US, 1..2 * DIALOGUE_WAIT_US].prop_map(|later_us| Op::Turn { later_us }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    /// A driver that has asked for an interrupt, looked once more, and sleeps: it is interrupted for the next frame that has
    /// left, at the latest after the wait of receivers if the reactor takes a turn when one is due. After the longer one of a
    /// dialogue only if that frame follows what it was given, and is the only one.
    #[test]
    fn no_sleeping_sender_is_forgotten(event_idx in any::<bool>(), ops in prop::collection::vec(op(), 1..80)) {
        let mut bed = bed(if event_idx { EVENT_IDX } else { 0 }, 16);
        let mut now = START_US;
        // Asleep since the guest asked; waiting since a frame has left after that.
        let (mut asleep, mut waiting_since) = (true, None);
        let (mut limit_us, mut heard) = (RECEIVER_WAIT_US, false);
        for op in ops {
            match op {
                Op::Send => {
                    if bed.send(&frame(1, 60), &[72], false).is_some() {
                        bed.device.collect_tx(64, &mut |_| true);
                        bed.device.flush_signals_in_time(now);
                        let answer = std::mem::take(&mut heard) && waiting_since.is_none();
                        limit_us = if answer { DIALOGUE_WAIT_US } else { RECEIVER_WAIT_US };
                        waiting_since = waiting_since.or(asleep.then_some(now));
                    }
                }
                Op::Receive => {
                    while bed.rx.reap(&bed.memory).is_some() {}
                    receive(&mut bed);
                    heard = true;
                    bed.device.flush_signals_in_time(now);
                }
                Op::Reap { ask } => {
                    while bed.tx.reap(&bed.memory).is_some() {}
                    waiting_since = None;
                    asleep = ask;
                    match ask {
                        true => bed.tx.want_interrupt(&bed.memory),
                        false => bed.tx.refuse_interrupts(&bed.memory),
                    }
                    take_count(&bed.calls[1]);
                }
                Op::Refuse => {
                    bed.tx.refuse_interrupts(&bed.memory);
                    (asleep, waiting_since) = (false, None);
                }
                Op::Turn { later_us } => {
                    let end = now + later_us;
                    while bed.device.signal_due_us() <= end {
                        let due = bed.device.signal_due_us();
                        prop_assert!(due > now, "else the reactor would not sleep at all");
                        now = due;
                        bed.device.flush_signals_in_time(now);
                    }
                    now = end;
                    bed.device.flush_signals_in_time(now);
                }
            }
            if take_count(&bed.calls[1]) > 0 {
                (asleep, waiting_since) = (false, None);
            }
            if let Some(since) = waiting_since {
                prop_assert!(now < since + limit_us, "not interrupted since {since}, now {now}");
                prop_assert!(bed.device.signal_due_us() <= since + limit_us);
            }
        }
    }
}
