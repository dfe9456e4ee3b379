//! The short way of the usual frames and the long way of all others do the same: to the guest's memory, to the record of what
//! was written, to the counters, and in what they find wrong. Descriptors and heads are corrupted here; an available index that
//! jumps is not, because the two look at it at different times (see `corruption` for what it leads to).

use proptest::prelude::*;

use super::bed::{Bed, RAM_BYTES, frame};
use crate::device::features::Features;
use crate::device::net::Inject;

const VERSION_1: u64 = 1 << 32;

#[derive(Debug, Clone)]
enum Op {
    OfferRx { lens: Vec<u32>, indirect: bool },
    Send { lens: Vec<u32>, indirect: bool },
    Inject { lens: Vec<usize> },
    Collect { budget: usize, refuse_after: usize },
    Corrupt { at: u64, bytes: Vec<u8> },
    ReapAll,
    Flush,
    Polling(bool),
}

fn op() -> impl Strategy<Value = Op> {
    let lens =
        || prop_oneof![4 => prop::collection::vec(20..3000u32, 1..2), 1 => prop::collection::vec(1..900u32, 1..4)];
    let indirect = || prop::bool::weighted(0.2);
    prop_oneof![
        6 => (lens(), indirect()).prop_map(|(lens, indirect)| Op::OfferRx { lens, indirect }),
        6 => (lens(), indirect()).prop_map(|(lens, indirect)| Op::Send { lens, indirect }),
        4 => prop::collection::vec(8..1500usize, 0..40).prop_map(|lens| Op::Inject { lens }),
        4 => (0..40usize, 0..40usize).prop_map(|(budget, refuse_after)| Op::Collect { budget, refuse_after }),
        1 => (prop_oneof![0..0x200u64, 0x4004..0x4030u64, 0x1_0000..0x1_0200u64, 0x1_4004..0x1_4030u64],
              prop::collection::vec(any::<u8>(), 1..5)).prop_map(|(at, bytes)| Op::Corrupt { at, bytes }),
        3 => Just(Op::ReapAll),
        2 => Just(Op::Flush),
        1 => any::<bool>().prop_map(Op::Polling),
    ]
}

/// Carries out `op` and returns everything that can be seen of it.
fn run(bed: &mut Bed, op: &Op, number: &mut u32, corrupted: &mut bool) -> String {
    *number += 1;
    match op {
        Op::OfferRx { lens, indirect } => format!("{:?}", bed.offer_rx(lens, *indirect)),
        Op::Send { lens, indirect } => {
            let bytes = frame(*number, lens.iter().sum::<u32>() as usize);
            format!("{:?}", bed.send(&bytes[12..], lens, *indirect))
        }
        Op::Inject { lens } => {
            let frames: Vec<Vec<u8>> = lens.iter().map(|len| frame(*number, *len)[..*len].to_vec()).collect();
            let (done, outcome) = bed.device.inject_batch(frames.iter().map(Vec::as_slice));
            assert!(done == frames.len() || outcome != Inject::Done);
            format!("{done} {outcome:?}")
        }
        Op::Collect { budget, refuse_after } => {
            let mut got = Vec::new();
            let accepted = bed.device.collect_tx(*budget, &mut |frame| {
                got.push(frame.to_vec());
                got.len() <= *refuse_after
            });
            format!("{accepted} {got:?}")
        }
        Op::Corrupt { at, bytes } => {
            *corrupted = true;
            bed.memory.write(*at, bytes);
            String::new()
        }
        // The driver's own checks hold only while its ring is sound.
        Op::ReapAll if *corrupted => String::new(),
        Op::ReapAll => {
            let rx: Vec<_> = std::iter::from_fn(|| bed.rx.reap(&bed.memory)).collect();
            let tx: Vec<_> = std::iter::from_fn(|| bed.tx.reap(&bed.memory)).collect();
            format!("{rx:?} {tx:?}")
        }
        Op::Flush => {
            bed.device.flush_signals();
            format!("{:?}", bed.calls.each_ref().map(super::bed::take_count))
        }
        Op::Polling(on) => {
            bed.device.set_polling(*on);
            format!("{}", bed.device.arm())
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]
    #[test]
    fn bursts_do_what_single_frames_do(
        bits in prop::sample::subsequence(vec![1u64 << 29, 1 << 28, 1 << 15, 1 << 35], 0..=4),
        size in prop::sample::select(vec![1u16, 4, 16]),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let features = Features(bits.iter().sum::<u64>() | VERSION_1);
        let [mut short, mut long] = [(); 2].map(|()| Bed::started(features, size));
        long.device.no_bursts = true;
        let mut numbers = [0; 2];
        let mut corrupted = [false; 2];
        for op in &ops {
            let op = match op {
                Op::OfferRx { lens, indirect } => {
                    Op::OfferRx { lens: lens.clone(), indirect: *indirect && features.indirect() }
                }
                Op::Send { lens, indirect } => {
                    Op::Send { lens: lens.clone(), indirect: *indirect && features.indirect() }
                }
                other => other.clone(),
            };
            let seen = run(&mut short, &op, &mut numbers[0], &mut corrupted[0]);
            prop_assert_eq!(seen, run(&mut long, &op, &mut numbers[1], &mut corrupted[1]));
            prop_assert_eq!(short.device.counters(), long.device.counters());
            prop_assert_eq!(short.device.is_running(), long.device.is_running());
        }
        short.device.flush_signals();
        long.device.flush_signals();
        prop_assert_eq!(short.dirty_pages(), long.dirty_pages());
        let what = |bed: &mut Bed| {
            let broken = |event: &_| matches!(event, crate::device::net::DeviceEvent::Broken(_));
            let events: Vec<_> = bed.events().into_iter().filter(broken).collect();
            format!("{events:?}")
        };
        prop_assert_eq!(what(&mut short), what(&mut long));
        let [mut left, mut right] = [(); 2].map(|()| vec![0; RAM_BYTES as usize]);
        short.memory.read(0, &mut left);
        long.memory.read(0, &mut right);
        prop_assert!(left == right, "the guests' memories differ");
    }
}
