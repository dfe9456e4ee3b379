//! Frames arrive exactly once, in order and unchanged, whatever the order of events.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::bed::{Bed, Memory, frame, take_count};
use crate::device::features::Features;
use crate::device::net::{DeviceEvent, Inject, MAX_FRAME_BYTES, RingIndex};

const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;
const MRG_RXBUF: u64 = 1 << 15;
const VERSION_1: u64 = 1 << 32;

/// What QEMU and a Linux guest agree on.
fn usual() -> Features {
    Features::offered()
}

/// What the guest sees of a frame that came in `buffers` chains.
fn as_received(frame: &[u8], buffers: u16) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    bytes[10..12].copy_from_slice(&buffers.to_le_bytes());
    bytes
}

#[test]
fn both_directions_carry_a_frame() {
    let mut bed = Bed::started(usual(), 8);
    assert!(bed.device.is_running());
    let sent = frame(1, 60);
    bed.send(&sent, &[12, 60], false).unwrap();
    let mut got = Vec::new();
    assert_eq!(
        bed.device.collect_tx(8, &mut |frame| {
            got.push(frame.to_vec());
            true
        }),
        1
    );
    assert_eq!(got, [sent]);
    assert_eq!(bed.tx.reap(&bed.memory), Some(vec![]));
    bed.offer_rx(&[1526], false).unwrap();
    let received = frame(2, 1000);
    assert_eq!(bed.device.inject(&received), Inject::Done);
    assert_eq!(bed.rx.reap(&bed.memory), Some(as_received(&received, 1)));
}

#[test]
fn a_large_frame_is_merged_over_several_buffers() {
    let mut bed = Bed::started(usual(), 8);
    for _ in 0..4 {
        bed.offer_rx(&[1000], false).unwrap();
    }
    let large = frame(3, 2500);
    assert_eq!(bed.device.inject(&large), Inject::Done);
    let parts: Vec<u8> = (0..3).flat_map(|_| bed.rx.reap(&bed.memory).unwrap()).collect();
    assert_eq!(parts, as_received(&large, 3));
    assert_eq!(bed.rx.reap(&bed.memory), None);
}

#[test]
fn a_frame_that_can_never_fit_is_dropped_and_counted() {
    let unmerged = Features(VERSION_1);
    for (features, count) in [(unmerged, 1), (usual(), 4)] {
        let mut bed = Bed::started(features, 4);
        for _ in 0..count {
            bed.offer_rx(&[500], false).unwrap();
        }
        assert_eq!(bed.device.inject(&frame(4, 3000)), Inject::Done);
        assert_eq!(bed.device.counters().rx_too_large, 1);
        assert_eq!(bed.rx.reap(&bed.memory), None, "no buffer is used up by it");
        assert_eq!(bed.device.inject(&frame(5, 400)), Inject::Done);
        assert_eq!(bed.rx.reap(&bed.memory), Some(as_received(&frame(5, 400), 1)));
    }
}

#[test]
fn lengths_that_no_frame_has_are_dropped_in_both_directions() {
    let mut bed = Bed::started(usual(), 8);
    assert_eq!(bed.device.inject(&[0; 11]), Inject::Done);
    assert_eq!(bed.device.inject(&vec![0; MAX_FRAME_BYTES + 1]), Inject::Done);
    assert_eq!(bed.device.counters().rx_too_large, 2);
    bed.send(&[0; 20], &[20], false).unwrap();
    bed.send(&vec![0; MAX_FRAME_BYTES + 1], &[60_000, MAX_FRAME_BYTES as u32 + 1 - 60_000], false).unwrap();
    bed.send(&frame(6, MAX_FRAME_BYTES - 12), &[60_000, MAX_FRAME_BYTES as u32 - 60_000], false).unwrap();
    assert_eq!(
        bed.device.collect_tx(8, &mut |got| {
            assert_eq!(got, frame(6, MAX_FRAME_BYTES - 12));
            true
        }),
        1
    );
    assert_eq!(bed.device.counters().tx_bad_length, 2);
}

#[test]
fn a_driver_of_before_virtio_1_has_a_short_header() {
    let mut bed = Bed::started(Features(0), 8);
    let whole = frame(7, 100);
    let short: Vec<u8> = [&whole[..10], &whole[12..]].concat();
    bed.send(&short, &[10, 100], false).unwrap();
    let expected = [&whole[..10], &[0, 0], &whole[12..]].concat();
    bed.device.collect_tx(8, &mut |got| {
        assert_eq!(got, expected);
        true
    });
    assert_eq!(bed.device.counters().tx_frames, 1);
    bed.offer_rx(&[200], false).unwrap();
    assert_eq!(bed.device.inject(&whole), Inject::Done);
    assert_eq!(bed.rx.reap(&bed.memory), Some(short));
}

#[test]
fn a_disabled_ring_discards_what_the_guest_sends_and_takes_nothing_for_it() {
    let mut bed = Bed::started(usual(), 8);
    for index in super::bed::BOTH {
        bed.device.execute(crate::device::link::Command::SetEnabled { index, enabled: false });
    }
    bed.offer_rx(&[2000], false).unwrap();
    assert_eq!(bed.device.inject(&frame(8, 60)), Inject::NotRunning);
    bed.send(&frame(9, 60), &[72], false).unwrap();
    assert_eq!(bed.device.collect_tx(8, &mut |_| panic!("discarded")), 0);
    assert_eq!(bed.device.counters().tx_disabled, 1);
    assert!(bed.tx.reap(&bed.memory).is_some(), "the guest gets its buffer back");
}

#[test]
fn everything_that_the_device_writes_is_recorded() {
    let mut bed = Bed::started(usual(), 8);
    bed.dirty_pages();
    let mut before = vec![0; super::bed::RAM_BYTES as usize];
    bed.offer_rx(&[9000, 9000], true).unwrap();
    bed.send(&frame(10, 60), &[72], false).unwrap();
    bed.memory.read(0, &mut before);
    assert_eq!(bed.device.inject(&frame(11, 12_000)), Inject::Done);
    assert_eq!(bed.device.collect_tx(8, &mut |_| true), 1);
    assert_eq!(bed.device.inject(&frame(12, 60)), Inject::NoBuffers);
    bed.device.flush_signals();
    let mut after = vec![0; before.len()];
    bed.memory.read(0, &mut after);
    let pages = bed.dirty_pages();
    assert!(pages.is_sorted());
    for page in 0..before.len() / 4096 {
        let range = page * 4096..(page + 1) * 4096;
        let file_page = Memory::offset(range.start as u64) / 4096;
        if before[range.clone()] != after[range] {
            assert!(pages.contains(&file_page), "page {page} was written but not recorded");
        }
    }
    assert!(pages.len() < 12, "pages recorded that were not written: {pages:?}");
    assert!(bed.dirty_pages().is_empty(), "draining clears");
}

#[test]
fn starting_and_stopping_are_reported_and_kicks_are_announced() {
    let mut bed = Bed::started(usual(), 8);
    let events = bed.events();
    assert!(
        matches!(
            events.as_slice(),
            [DeviceEvent::WatchKick { .. }, DeviceEvent::WatchKick { .. }, DeviceEvent::Started { offloads, .. }]
                if offloads.tun_flags() == 0b1111
        ),
        "{events:?}"
    );
    assert_eq!(take_count(&bed.kicks[1]), 1, "a started ring is kicked once by the device itself");
    bed.stop();
    let events = bed.events();
    assert!(
        matches!(
            events.as_slice(),
            [DeviceEvent::UnwatchKick { .. }, DeviceEvent::Stopped, DeviceEvent::UnwatchKick { .. }]
        ),
        "{events:?}"
    );
    assert_eq!(bed.device.inject(&frame(1, 60)), Inject::NotRunning);
    assert_eq!(bed.device.collect_tx(1, &mut |_| true), 0);
}

#[test]
fn a_stop_sends_the_interrupt_that_is_still_owed() {
    let mut bed = Bed::started(usual(), 8);
    bed.device.flush_signals();
    _ = take_count(&bed.calls[0]);
    bed.rx.want_interrupt(&bed.memory);
    bed.offer_rx(&[200], false).unwrap();
    assert_eq!(bed.device.inject(&frame(1, 60)), Inject::Done);
    bed.stop();
    assert_eq!(take_count(&bed.calls[0]), 1, "else it is in neither guest's state");
}

#[derive(Debug, Clone)]
enum Op {
    OfferRx { lens: Vec<u32>, indirect: bool },
    Send { cuts: Vec<usize>, len: usize, indirect: bool },
    Inject { len: usize },
    Collect { budget: usize, refuse_after: usize },
    ReapRx,
    ReapTx,
    Flush,
    Interrupts(bool),
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    let cuts = prop::collection::vec(1..2000usize, 0..4);
    prop_oneof![
        3 => (prop::collection::vec(1..3000u32, 1..4), any::<bool>()).prop_map(|(lens, indirect)| Op::OfferRx { lens, indirect }),
        3 => (cuts, 14..4000usize, any::<bool>()).prop_map(|(cuts, len, indirect)| Op::Send { cuts, len, indirect }),
        3 => (14..6000usize).prop_map(|len| Op::Inject { len }),
        3 => (0..6usize, 0..6usize).prop_map(|(budget, refuse_after)| Op::Collect { budget, refuse_after }),
        2 => Just(Op::ReapRx),
        2 => Just(Op::ReapTx),
        2 => Just(Op::Flush),
        1 => any::<bool>().prop_map(Op::Interrupts),
        1 => Just(Op::Restart),
    ]
}

/// What the driver has said about interrupts of a ring.
#[derive(Debug, Clone, Copy)]
enum Interrupts {
    /// It wants one for the next used element; so many were used since.
    Wanted(u16),
    /// It wants none.
    Refused,
    /// It has had one since it last said anything; more may come or not.
    Had,
}

/// The bed with what must come out of it.
struct Model {
    bed: Bed,
    number: u32,
    to_device: VecDeque<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
    indirect: bool,
    mergeable: bool,
    /// The device must be kicked by the next entry of the ring.
    kick_due: [bool; 2],
    interrupts: [Interrupts; 2],
}

impl Model {
    fn new(bits: u64, size: u16) -> Self {
        let mut bed = Bed::started(Features(bits | VERSION_1), size);
        bed.device.flush_signals();
        bed.calls.iter().for_each(|call| _ = take_count(call));
        for driver in [&bed.rx, &bed.tx] {
            driver.want_interrupt(&bed.memory);
        }
        Self {
            bed,
            number: 0,
            to_device: VecDeque::new(),
            to_guest: VecDeque::new(),
            indirect: bits & INDIRECT != 0,
            mergeable: bits & MRG_RXBUF != 0,
            kick_due: [false; 2],
            interrupts: [Interrupts::Wanted(0); 2],
        }
    }

    fn next_frame(&mut self, len: usize) -> Vec<u8> {
        self.number += 1;
        frame(self.number, len)
    }

    fn kicked(&mut self, ring: RingIndex, kicked: bool) {
        let due = std::mem::take(&mut self.kick_due[usize::from(ring.0)]);
        assert!(kicked || !due, "{ring} sleeps and was not woken");
    }

    fn used(&mut self, ring: RingIndex) {
        if let Interrupts::Wanted(count) = &mut self.interrupts[usize::from(ring.0)] {
            *count += 1;
        }
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::OfferRx { lens, indirect } => {
                if let Some(kicked) = self.bed.offer_rx(&lens, indirect && self.indirect) {
                    self.kicked(RingIndex::RX, kicked);
                }
            }
            Op::Send { cuts, len, indirect } => self.send(&cuts, len, indirect && self.indirect),
            Op::Inject { len } => self.inject(len),
            Op::Collect { budget, refuse_after } => _ = self.collect(budget, refuse_after),
            Op::ReapRx => _ = self.reap_rx(),
            Op::ReapTx => while self.bed.tx.reap(&self.bed.memory).is_some() {},
            Op::Flush => self.flush(),
            Op::Interrupts(wanted) => self.interrupts(wanted),
            Op::Restart => {
                self.bed.stop();
                self.bed.start();
                self.kick_due = [false; 2];
                self.flush_after_start();
            }
        }
        assert!(self.bed.device.is_running());
    }

    fn send(&mut self, cuts: &[usize], len: usize, indirect: bool) {
        let frame = self.next_frame(len);
        let (mut left, mut lens) = (frame.len(), Vec::new());
        for &cut in cuts.iter().filter(|_| frame.len() > 2000) {
            let cut = cut.min(left - 1);
            lens.push(cut as u32);
            left -= cut;
            if left == 1 {
                break;
            }
        }
        lens.push(left as u32);
        lens.retain(|len| *len > 0);
        if let Some(kicked) = self.bed.send(&frame, &lens, indirect) {
            self.to_device.push_back(frame);
            self.kicked(RingIndex::TX, kicked);
        }
    }

    fn inject(&mut self, len: usize) {
        let frame = self.next_frame(len);
        let before = self.bed.device.counters().rx_frames;
        self.kick_due[0] = false;
        match self.bed.device.inject(&frame) {
            Inject::Done if self.bed.device.counters().rx_frames > before => {
                self.to_guest.push_back(frame);
                self.used(RingIndex::RX);
            }
            Inject::Done => {}
            Inject::NoBuffers => self.kick_due[0] = true,
            Inject::NotRunning => panic!("the device runs"),
        }
    }

    fn collect(&mut self, budget: usize, refuse_after: usize) -> usize {
        let Self { bed, to_device, .. } = self;
        let (mut passed, mut refused) = (0, false);
        let accepted = bed.device.collect_tx(budget, &mut |got| {
            assert_eq!(Some(got), to_device.front().map(Vec::as_slice));
            refused = passed == refuse_after;
            if !refused {
                to_device.pop_front();
                passed += 1;
            }
            !refused
        });
        assert_eq!(accepted, passed);
        (0..accepted).for_each(|_| self.used(RingIndex::TX));
        if accepted < budget && !refused {
            assert!(self.to_device.is_empty(), "frames were left in the ring");
        }
        if budget > 0 {
            self.kick_due[1] = accepted < budget && !refused;
        }
        accepted
    }

    fn reap_rx(&mut self) -> usize {
        let mut count = 0;
        while let Some(mut got) = self.bed.rx.reap(&self.bed.memory) {
            let mut taken = 1;
            // The first buffers may be too short to say how many there are.
            while got.len() < 12 || taken < u16::from_le_bytes([got[10], got[11]]) {
                let more = self.bed.rx.reap(&self.bed.memory);
                got.extend(more.expect("all buffers of a frame come together"));
                taken += 1;
            }
            let buffers = u16::from_le_bytes([got[10], got[11]]);
            assert!(buffers == taken && (buffers == 1 || self.mergeable));
            let expected = self.to_guest.pop_front().expect("nothing arrives twice");
            assert_eq!(got, as_received(&expected, buffers));
            count += 1;
        }
        count
    }

    fn flush(&mut self) {
        self.bed.device.flush_signals();
        for ring in 0..2 {
            let signalled = take_count(&self.bed.calls[ring]);
            match self.interrupts[ring] {
                Interrupts::Wanted(0) | Interrupts::Refused => {
                    assert_eq!(signalled, 0, "an interrupt that nobody asked for");
                }
                Interrupts::Wanted(_) => {
                    assert_eq!(signalled, 1, "the guest waits for this interrupt");
                    self.interrupts[ring] = Interrupts::Had;
                }
                Interrupts::Had => {}
            }
        }
    }

    fn interrupts(&mut self, wanted: bool) {
        self.flush();
        self.reap_rx();
        while self.bed.tx.reap(&self.bed.memory).is_some() {}
        for (driver, state) in [&self.bed.rx, &self.bed.tx].into_iter().zip(&mut self.interrupts) {
            if wanted {
                driver.want_interrupt(&self.bed.memory);
            } else {
                driver.refuse_interrupts(&self.bed.memory);
            }
            *state = if wanted { Interrupts::Wanted(0) } else { Interrupts::Refused };
        }
    }

    fn flush_after_start(&mut self) {
        self.bed.device.flush_signals();
        for (call, state) in self.bed.calls.iter().zip(&mut self.interrupts) {
            assert!(take_count(call) >= 1, "an interrupt may have been lost with the last life of the ring");
            *state = Interrupts::Had;
        }
    }

    fn finish(&mut self) {
        while self.collect(64, usize::MAX) > 0 {}
        self.reap_rx();
        assert!(self.to_device.is_empty() && self.to_guest.is_empty());
        assert!(!self.bed.events().iter().any(|event| matches!(event, DeviceEvent::Broken(_))));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]
    #[test]
    fn frames_arrive_once_in_order_and_unchanged(
        bits in prop::sample::subsequence(vec![EVENT_IDX, INDIRECT, MRG_RXBUF], 0..=3),
        size in prop::sample::select(vec![1u16, 2, 4, 8, 16]),
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let mut model = Model::new(bits.iter().sum(), size);
        for op in ops {
            model.run(op);
        }
        model.finish();
    }
}
