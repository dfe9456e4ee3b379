//! Real TAPs on a real bridge.

use crate::common::*;
use dataplane::batch::{BatchBuilder, MIN_BATCH_BYTES};
use dataplane::uplink::announce::rarp;
use dataplane::uplink::filter::Filter;
use dataplane::uplink::tap::{Tap, TapError};
use dataplane::uplink::{Burst, Intake, OffloadFlags, Uplink, UplinkDrops};
use dataplane::{VNET_HEADER_BYTES, VnetHeader};
use std::time::{Duration, Instant};

#[test]
fn frames_cross_a_bridge_and_offloads_are_as_asked() {
    in_namespace(|| {
        make_bridge(BRIDGE);
        let mut a = Tap::open("plvtest0", Some(BRIDGE)).unwrap();
        let mut b = Tap::open("plvtest1", Some(BRIDGE)).unwrap();
        assert_eq!(a.name(), "plvtest0");
        let announcement = rarp([0x52, 0x54, 0, 0, 0, 9]);
        assert!(a.send(&announcement).unwrap());
        assert_eq!(receive(&mut b), announcement, "the host itself must not chatter into the link");

        // A guest without offloads gets segments of its MTU with checksums.
        let large = large_segment();
        assert!(a.send(&large).unwrap());
        let mut payload = Vec::new();
        while payload.len() < PAYLOAD_BYTES {
            let segment = receive(&mut b);
            assert!(segment.len() <= VNET_HEADER_BYTES + 54 + SEGMENT_BYTES);
            let header = VnetHeader::of(&segment).unwrap();
            assert_eq!((header.flags & 1, header.gso_type), (0, 0));
            payload.extend_from_slice(&segment[VNET_HEADER_BYTES + 54..]);
        }
        assert!(payload == large[VNET_HEADER_BYTES + 54..]);

        // A guest with them gets the frame as it was sent.
        b.set_offload(OffloadFlags { csum: true, tso4: true, tso6: true, ecn: true }).unwrap();
        assert!(a.send(&large).unwrap());
        let whole = receive(&mut b);
        let header = VnetHeader::of(&whole).unwrap();
        assert_eq!((header.flags & 1, header.gso_type, header.gso_size.get()), (1, 1, SEGMENT_BYTES as u16));
        assert!(whole[VNET_HEADER_BYTES + 54..] == large[VNET_HEADER_BYTES + 54..]);
        assert_eq!(header.num_buffers.get(), 0);
        assert_eq!(a.drops(), UplinkDrops::default());
    });
}

#[test]
fn nonsense_and_a_pulled_cable_cost_a_frame_and_not_the_port() {
    in_namespace(|| {
        make_bridge(BRIDGE);
        let mut a = Tap::open("plvtest0", Some(BRIDGE)).unwrap();
        let mut b = Tap::open("plvtest1", Some(BRIDGE)).unwrap();
        let good = rarp([0x52, 0x54, 0, 0, 0, 9]);
        let mut bad = good;
        bad[1] = 77; // no such GSO type
        assert!(!a.send(&bad).unwrap());
        assert!(!a.send(&good[..VNET_HEADER_BYTES + 3]).unwrap());
        assert_eq!(a.drops(), UplinkDrops { full: 0, refused: 2, missed: 0 });
        set_up("plvtest0", false);
        assert!(!a.send(&good).unwrap());
        assert_eq!(a.discard_burst(9).unwrap(), Burst::default());
        set_up("plvtest0", true);
        assert!(a.send(&good).unwrap());
        assert_eq!(receive(&mut b), good);
    });
}

#[test]
fn a_burst_ends_with_its_budget_or_with_the_room() {
    in_namespace(|| {
        make_bridge(BRIDGE);
        let mut a = Tap::open("plvtest0", Some(BRIDGE)).unwrap();
        let mut b = Tap::open("plvtest1", Some(BRIDGE)).unwrap();
        let frame = rarp([0x52, 0x54, 0, 0, 0, 9]);
        let mut send = |count| (0..count).for_each(|_| assert!(a.send(&frame).unwrap()));
        send(5);
        let mut batch = BatchBuilder::new(MIN_BATCH_BYTES + 100);
        assert_eq!(
            b.recv_burst(&mut Intake::new(&mut batch, &mut Filter::default()), 2).unwrap(),
            Burst { frames: 2, more: true }
        );
        // The next one could be of any size, and there is no room for the largest any more.
        assert_eq!(
            b.recv_burst(&mut Intake::new(&mut batch, &mut Filter::default()), 2).unwrap(),
            Burst { frames: 0, more: true }
        );
        batch.finish();
        assert_eq!(b.discard_burst(1).unwrap(), Burst { frames: 1, more: true });
        assert_eq!(b.discard_burst(9).unwrap(), Burst { frames: 2, more: false });
    });
}

#[test]
fn each_obstacle_has_its_own_error_and_leaves_nothing_behind() {
    in_namespace(|| {
        for name in ["", "sixteen-bytes-it", "a b", "a/b", "..", "tap%d"] {
            assert!(matches!(Tap::open(name, None), Err(TapError::BadName { .. })), "{name:?}");
        }
        let error = Tap::open("plvtest0", Some("nobridge")).unwrap_err();
        assert!(matches!(error, TapError::NoBridge { .. }), "{error}");
        assert!(error.to_string().contains("ip link add nobridge type bridge"), "{error}");
        let tap = open_freed("plvtest0");
        let error = Tap::open("plvtest0", None).unwrap_err();
        assert!(matches!(error, TapError::InUse { .. }), "{error}");
        let error = Tap::open("plvtest1", Some("plvtest0")).unwrap_err();
        assert!(matches!(error, TapError::NoBridge { .. }), "a TAP is no bridge: {error}");
        let error = Tap::open("lo", None).unwrap_err();
        assert!(matches!(error, TapError::InUse { .. }), "{error}");
        drop(tap);
        drop(open_freed("plvtest0"));
        // SAFETY: the raw call changes this thread's ids only; the thread ends after the test.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(result, 0);
        let error = Tap::open("plvtest0", None).unwrap_err();
        assert!(matches!(error, TapError::NotPermitted { .. }), "{error}");
        assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
    });
}

#[test]
fn several_queues_are_emptied_in_turn_and_belong_to_one() {
    in_namespace(|| {
        make_bridge(BRIDGE);
        let mut a = Tap::open_queues("plvtest0", Some(BRIDGE), 4).unwrap();
        let mut b = Tap::open_queues("plvtest1", Some(BRIDGE), 4).unwrap();
        for queues in [1, 4] {
            let error = Tap::open_queues("plvtest0", None, queues).unwrap_err();
            assert!(matches!(error, TapError::InUse { .. }), "{error}");
        }
        // Many flows: by their ports they spread over all queues, on the way out and on the way in.
        let flow = |port: u16, number: u8| {
            let mut frame = large_segment();
            frame.truncate(VNET_HEADER_BYTES + 60);
            frame[..VNET_HEADER_BYTES].fill(0);
            frame[VNET_HEADER_BYTES + 34..][..2].copy_from_slice(&port.to_be_bytes());
            frame[VNET_HEADER_BYTES + 59] = number;
            // A shorter packet, whose header adds up by a larger identification.
            let (old, new) = ((PAYLOAD_BYTES + 40) as u16, 46u16);
            frame[VNET_HEADER_BYTES + 16..][..2].copy_from_slice(&new.to_be_bytes());
            frame[VNET_HEADER_BYTES + 18..][..2].copy_from_slice(&(1 + old - new).to_be_bytes());
            frame
        };
        for number in 0..10 {
            for port in 0..40 {
                assert!(a.send(&flow(port, number)).unwrap());
            }
        }
        let mut next = [0; 40];
        for _ in 0..400 {
            let frame = receive(&mut b);
            let port = usize::from(frame[VNET_HEADER_BYTES + 35]);
            assert_eq!(frame[VNET_HEADER_BYTES + 59], next[port], "the frames of a flow stay in order");
            next[port] += 1;
        }
        assert_eq!(b.discard_burst(64).unwrap(), Burst::default());
        assert_eq!(a.drops(), UplinkDrops::default());
    });
}

/// Opens a TAP that was closed just now; a process that another test starts still has all descriptors for a moment.
fn open_freed(name: &str) -> Tap {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Tap::open(name, None) {
            Ok(tap) => return tap,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    }
}
