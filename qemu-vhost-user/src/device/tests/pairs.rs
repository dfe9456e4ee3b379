//! Several pairs of queues: frames for the guest go where their flow says, frames from it come in turns.

use super::bed::frame;
use super::mapped::MappedBed;
use crate::device::features::Features;
use crate::device::link::Command;
use crate::device::net::{Inject, RingIndex};
use crate::device::steer::pair_of;

const PAIRS: usize = 4;

/// Offers all receive buffers of all pairs.
fn offer_all(bed: &mut MappedBed) {
    for ring in &mut bed.rx {
        while ring.free() > 0 {
            ring.offer(true);
        }
    }
}

/// What each pair's guest side received.
fn received(bed: &mut MappedBed) -> Vec<Vec<Vec<u8>>> {
    let mut bytes = [0; 512];
    let drain = |ring: &mut super::mapped::MappedRing| {
        std::iter::from_fn(|| ring.reap(&mut bytes).map(|len| bytes[12..len].to_vec())).collect()
    };
    bed.rx.iter_mut().map(drain).collect()
}

#[test]
fn frames_for_the_guest_follow_their_flow() {
    let mut bed = MappedBed::started(Features::offered(), PAIRS);
    assert_eq!(bed.device.queue_pairs(), PAIRS);
    let frames: Vec<Vec<u8>> = (0..100).map(|number| frame(number, 100)).collect();
    let expected = |pairs: usize| -> Vec<Vec<Vec<u8>>> {
        let of = |pair| frames.iter().filter(move |frame| pair_of(frame, pairs) == pair);
        (0..PAIRS).map(|pair| of(pair).map(|frame| frame[12..].to_vec()).collect()).collect()
    };
    offer_all(&mut bed);
    assert_eq!(bed.device.inject_batch(frames.iter().map(Vec::as_slice)), (100, Inject::Done));
    let got = received(&mut bed);
    assert_eq!(got, expected(PAIRS));
    assert!(got.iter().all(|frames| frames.len() > 10), "all pairs have work");
    // The guest takes the last pair out of use: its flows go to the others.
    for index in [RingIndex::receive(3), RingIndex::transmit(3)] {
        bed.device.execute(Command::SetEnabled { index, enabled: false });
    }
    assert_eq!(bed.device.queue_pairs(), 3);
    offer_all(&mut bed);
    assert_eq!(bed.device.inject_batch(frames.iter().map(Vec::as_slice)), (100, Inject::Done));
    assert_eq!(received(&mut bed), expected(3));
}

#[test]
fn a_full_pair_holds_up_what_comes_after_and_nothing_is_lost() {
    let mut bed = MappedBed::started(Features::offered(), 2);
    let frames: Vec<Vec<u8>> = (0..50).map(|number| frame(number, 60)).collect();
    // Three buffers on each.
    for ring in &mut bed.rx {
        (0..3).for_each(|_| _ = ring.offer(true));
    }
    let (done, outcome) = bed.device.inject_batch(frames.iter().map(Vec::as_slice));
    assert_eq!(outcome, Inject::NoBuffers);
    let full = pair_of(&frames[done], 2);
    assert_eq!(frames[..done].iter().filter(|frame| pair_of(frame, 2) == full).count(), 3);
    let mut total = received(&mut bed);
    offer_all(&mut bed);
    assert_eq!(bed.device.inject_batch(frames[done..].iter().map(Vec::as_slice)), (50 - done, Inject::Done));
    for (all, more) in total.iter_mut().zip(received(&mut bed)) {
        all.extend(more);
    }
    let of = |pair| frames.iter().filter(move |frame| pair_of(frame, 2) == pair).map(|frame| frame[12..].to_vec());
    assert_eq!(total, [of(0).collect::<Vec<_>>(), of(1).collect()]);
}

#[test]
fn frames_from_the_guest_come_in_turns_and_in_order_within_a_pair() {
    let collect = |budget: usize| {
        let mut bed = MappedBed::started(Features::offered(), PAIRS);
        for (pair, ring) in bed.tx.iter_mut().enumerate() {
            // A busy pair and idle ones.
            for number in 0..if pair == 1 { 60 } else { 5 } {
                ring.send(&frame(1000 * pair as u32 + number, 60), true);
            }
        }
        let mut got = Vec::new();
        while bed.device.collect_tx(budget, &mut |frame| {
            got.push(frame.to_vec());
            true
        }) > 0
        {}
        got
    };
    for budget in [1, 7, 32, 1000] {
        let got = collect(budget);
        assert_eq!(got.len(), 75);
        assert_eq!(got, collect(budget), "the order depends on nothing but the rings");
        for (pair, count) in [(0, 5), (1, 60), (2, 5), (3, 5)] {
            let sent: Vec<Vec<u8>> = (0..count).map(|number| frame(1000 * pair + number, 60)).collect();
            let of_pair: Vec<_> = got.iter().filter(|frame| sent.contains(frame)).cloned().collect();
            assert_eq!(of_pair, sent);
        }
        // A busy pair does not keep the last one waiting for longer than a turn.
        let last = got.iter().position(|got| *got == frame(3000, 60)).unwrap();
        assert!(last <= 5 + 32 + 5, "{last}");
    }
}
