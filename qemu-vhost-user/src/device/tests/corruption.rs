//! A guest may write anything into its rings: its device stops with a clear error, nothing else happens, and a new start of
//! the rings revives it.

use proptest::prelude::*;

use super::bed::{Bed, INDIRECT, NEXT, RAM_BYTES, WRITE, frame};
use crate::device::features::Features;
use crate::device::net::{DeviceError, DeviceEvent, Inject, RingIndex};
use crate::device::ring::{LayoutError, RingFault};

/// A place in guest memory that no ring uses.
const SOMEWHERE: u64 = 0x60_0000;

/// Offers a chain with these descriptors, the first being the head, and returns what the device finds wrong with it.
fn fault(ring: RingIndex, descriptors: &[((u64, u32), u16, u16)]) -> RingFault {
    fault_with(Features::offered(), ring, |bed| {
        let Bed { memory, rx, tx, .. } = bed;
        let driver = if ring == RingIndex::RX { rx } else { tx };
        for (index, &(place, flags, next)) in (0..).zip(descriptors) {
            driver.write_descriptor(memory, driver.descriptors(), index, place, flags, next);
        }
        driver.offer(memory, 0);
    })
}

fn fault_with(features: Features, ring: RingIndex, corrupt: impl FnOnce(&mut Bed)) -> RingFault {
    let mut bed = Bed::started(features, 8);
    bed.events();
    corrupt(&mut bed);
    if ring == RingIndex::RX {
        assert_eq!(bed.device.inject(&frame(1, 60)), Inject::NotRunning);
    } else {
        assert_eq!(bed.device.collect_tx(8, &mut |_| true), 0);
    }
    assert!(!bed.device.is_running());
    assert_eq!(bed.device.inject(&frame(2, 60)), Inject::NotRunning, "the other ring stands still, too");
    let events = bed.events();
    let [DeviceEvent::Stopped, DeviceEvent::Broken(DeviceError::Ring { ring: broken, fault, .. })] = events.as_slice()
    else {
        panic!("{events:?}");
    };
    assert_eq!(*broken, ring);
    // The guest resets the device and sets it up anew.
    bed.stop();
    for driver in [&bed.rx, &bed.tx] {
        bed.memory.write(driver.base, &[0; 0xc000]);
    }
    revive(bed, features);
    fault.clone()
}

/// Whatever happened to a device, rings that are set up anew work.
fn revive(mut bed: Bed, features: Features) {
    bed.stop();
    let mut fresh = Bed::new(features, 8);
    fresh.device = bed.device;
    fresh.dirty = bed.dirty;
    fresh.start();
    assert!(fresh.device.is_running());
    fresh.offer_rx(&[2000], false).unwrap();
    assert_eq!(fresh.device.inject(&frame(3, 60)), Inject::Done);
    assert!(fresh.rx.reap(&fresh.memory).is_some());
    fresh.send(&frame(4, 60), &[72], false).unwrap();
    assert_eq!(fresh.device.collect_tx(1, &mut |got| got == frame(4, 60)), 1);
}

#[test]
fn buffers_outside_memory_are_refused() {
    for (address, len) in [(RAM_BYTES, 100), (RAM_BYTES - 50, 100), (u64::MAX - 10, 100), (u64::MAX, u32::MAX)] {
        let expected = RingFault::OutsideMemory { address, len };
        assert_eq!(fault(RingIndex::TX, &[((address, len), 0, 0)]), expected);
        assert_eq!(fault(RingIndex::RX, &[((address, len), WRITE, 0)]), expected);
        let table = fault(RingIndex::TX, &[((address, 64), INDIRECT, 0)]);
        assert!(matches!(table, RingFault::OutsideMemory { .. }), "{table}");
    }
}

#[test]
fn loops_and_wild_indices_are_refused() {
    let here = (SOMEWHERE, 20);
    assert_eq!(fault(RingIndex::TX, &[(here, NEXT, 1), (here, NEXT, 0)]), RingFault::Loop { entries: 8 });
    let wild = RingFault::DescriptorIndex { index: 8, entries: 8 };
    assert_eq!(fault(RingIndex::TX, &[(here, NEXT, 8)]), wild);
    let head = fault_with(Features::offered(), RingIndex::RX, |bed| _ = bed.rx.offer(&bed.memory, 8));
    assert_eq!(head, wild);
}

#[test]
fn wrong_direction_and_empty_buffers_are_refused() {
    let address = SOMEWHERE;
    assert_eq!(fault(RingIndex::TX, &[((address, 80), WRITE, 0)]), RingFault::Direction { address });
    assert_eq!(fault(RingIndex::RX, &[((address, 80), 0, 0)]), RingFault::Direction { address });
    assert_eq!(fault(RingIndex::TX, &[((address, 0), 0, 0)]), RingFault::EmptyBuffer { address });
    assert_eq!(fault(RingIndex::TX, &[((address, 11), 0, 0)]), RingFault::NoHeader { len: 11 });
}

#[test]
fn malformed_indirect_tables_are_refused() {
    let indirect = |len, flags| fault(RingIndex::TX, &[((SOMEWHERE, len), INDIRECT | flags, 1)]);
    for (len, flags) in [(0, 0), (15, 0), (17, 0), (16 * 1025, 0), (16, NEXT)] {
        assert!(matches!(indirect(len, flags), RingFault::Indirect { .. }), "{len} {flags}");
    }
    let nested = fault_with(Features::offered(), RingIndex::TX, |bed| {
        bed.tx.write_descriptor(&bed.memory, SOMEWHERE, 0, (SOMEWHERE, 16), INDIRECT, 0);
        bed.tx.write_descriptor(&bed.memory, bed.tx.descriptors(), 0, (SOMEWHERE, 16), INDIRECT, 0);
        bed.tx.offer(&bed.memory, 0);
    });
    assert!(nested.to_string().contains("inside an indirect table"), "{nested}");
    let refused = fault_with(Features(1 << 32), RingIndex::TX, |bed| {
        bed.tx.write_descriptor(&bed.memory, bed.tx.descriptors(), 0, (SOMEWHERE, 16), INDIRECT, 0);
        bed.tx.offer(&bed.memory, 0);
    });
    assert!(refused.to_string().contains("not accepted INDIRECT_DESC"), "{refused}");
    let looped = fault_with(Features::offered(), RingIndex::TX, |bed| {
        bed.tx.write_descriptor(&bed.memory, SOMEWHERE, 0, (SOMEWHERE, 20), NEXT, 0);
        bed.tx.write_descriptor(&bed.memory, bed.tx.descriptors(), 0, (SOMEWHERE, 16), INDIRECT, 0);
        bed.tx.offer(&bed.memory, 0);
    });
    assert_eq!(looped, RingFault::Loop { entries: 1 });
}

#[test]
fn an_available_index_that_jumps_or_goes_back_is_refused() {
    let jump = fault_with(Features::offered(), RingIndex::TX, |bed| {
        bed.memory.write_u16(bed.tx.available() + 2, 9);
    });
    assert_eq!(jump, RingFault::AvailableIndex { seen: 0, now: 9, position: 0, size: 8 });
    let back = fault_with(Features::offered(), RingIndex::RX, |bed| {
        for _ in 0..3 {
            bed.offer_rx(&[20], false).unwrap();
        }
        assert_eq!(bed.device.inject(&frame(1, 500)), Inject::NoBuffers);
        bed.memory.write_u16(bed.rx.available() + 2, 1);
        assert_eq!(bed.device.inject(&frame(1, 500)), Inject::NotRunning);
    });
    let expected = RingFault::AvailableIndex { seen: 3, now: 1, position: 0, size: 8 };
    assert_eq!(back, expected);
}

#[test]
fn what_was_collected_before_a_fault_is_completed() {
    let mut bed = Bed::started(Features::offered(), 8);
    bed.send(&frame(1, 60), &[72], false).unwrap();
    bed.tx.offer(&bed.memory, 99);
    assert_eq!(bed.device.collect_tx(8, &mut |_| true), 1);
    assert!(bed.tx.reap(&bed.memory).is_some());
    let text = bed.events().iter().map(|event| format!("{event:?}")).collect::<String>();
    assert!(text.contains("DescriptorIndex"), "{text}");
}

#[test]
fn rings_in_impossible_places_do_not_start() {
    let start = |change: fn(&mut Bed)| {
        let mut bed = Bed::new(Features::offered(), 8);
        change(&mut bed);
        bed.open(RingIndex::RX).map(drop).unwrap_err()
    };
    for size in [0, 3, 40_000] {
        assert_eq!(
            start(match size {
                0 => |bed| bed.rx.size = 0,
                3 => |bed| bed.rx.size = 3,
                _ => |bed| bed.rx.size = 40_000,
            }),
            LayoutError::Size(size)
        );
    }
    assert!(matches!(start(|bed| bed.rx.base = RAM_BYTES), LayoutError::Outside { .. }));
    assert!(matches!(start(|bed| bed.rx.base = 4), LayoutError::Misaligned { .. }));
    let far = start(|bed| bed.memory.write_u16(bed.rx.available() + 2, 9));
    assert!(matches!(far, LayoutError::Position(_)), "{far}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]

    /// Arbitrary bytes in the rings: either the device goes on, or it stops; it never panics and never loops.
    #[test]
    fn garbage_never_panics(
        garbage in prop::collection::vec((0..0xc000u64, prop::collection::vec(any::<u8>(), 1..64)), 1..20),
        indices in prop::collection::vec(0..12u16, 4),
        bits in any::<bool>(),
        rounds in 1..6usize,
    ) {
        let features = if bits { Features::offered() } else { Features(1 << 32) };
        let mut bed = Bed::started(features, 8);
        for _ in 0..4 {
            bed.offer_rx(&[300, 300], bits).unwrap();
            bed.send(&frame(1, 60), &[12, 30, 30], bits).or_else(|| bed.send(&frame(1, 60), &[72], false));
        }
        for round in 0..rounds {
            for (driver, index) in [bed.rx.base, bed.tx.base].into_iter().zip(&indices[2 * (round % 2)..]) {
                for (at, bytes) in garbage.iter().skip(round) {
                    bed.memory.write(driver + at, bytes);
                }
                // Random indices are almost always refused at once; plausible ones lead deeper.
                bed.memory.write_u16(driver + 0x4000 + 2, *index);
            }
            bed.device.inject_batch([frame(1, 1000), frame(2, 100), frame(3, 200)].iter().map(Vec::as_slice));
            let collected = bed.device.collect_tx(100, &mut |_| true);
            prop_assert!(collected <= 16);
            bed.device.flush_signals();
            let running = bed.device.is_running();
            let broken = bed.events().iter().any(|event| matches!(event, DeviceEvent::Broken(_)));
            prop_assert_eq!(running, !broken && running);
            if !running {
                break;
            }
        }
        revive(bed, features);
    }

    /// The same with descriptors that are nearly right.
    #[test]
    fn wild_descriptors_never_panic(
        descriptors in prop::collection::vec(
            (prop_oneof![0..RAM_BYTES + 4096, any::<u64>()], prop_oneof![0..70_000u32, any::<u32>()], 0..8u16, 0..10u16),
            1..8,
        ),
        heads in prop::collection::vec(0..9u16, 1..8),
    ) {
        let mut bed = Bed::started(Features::offered(), 8);
        for (index, &(address, len, flags, next)) in (0..).zip(&descriptors) {
            for (driver, write) in [(&bed.rx, WRITE), (&bed.tx, 0)] {
                let flags = if flags & 4 == 0 { (flags & !WRITE) | write } else { flags };
                driver.write_descriptor(&bed.memory, driver.descriptors(), index, (address, len), flags, next);
            }
        }
        for &head in &heads {
            bed.rx.offer(&bed.memory, head);
            bed.tx.offer(&bed.memory, head);
        }
        for _ in 0..4 {
            bed.device.inject_batch([frame(1, 100), frame(2, 1000)].iter().map(Vec::as_slice));
            bed.device.collect_tx(100, &mut |_| true);
        }
        revive(bed, Features::offered());
    }
}
