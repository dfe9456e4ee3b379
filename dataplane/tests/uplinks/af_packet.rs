//! A packet socket on one end of a veth pair; at the other end a bridge with a TAP, by which the kernel takes part.

use crate::common::*;
use crate::offload::in_software;
use dataplane::VNET_HEADER_BYTES;
use dataplane::batch::{self, BatchBuilder, MIN_BATCH_BYTES};
use dataplane::uplink::af_packet::{AfPacket, AfPacketError};
use dataplane::uplink::announce::rarp;
use dataplane::uplink::filter::Filter;
use dataplane::uplink::tap::Tap;
use dataplane::uplink::{Burst, Intake, OffloadFlags, Uplink, UplinkDrops};
use dataplane::wait::{Interest, Poller};
use std::time::{Duration, Instant};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 9];
const EVERYTHING: OffloadFlags = OffloadFlags { csum: true, tso4: true, tso6: true, ecn: true };

/// The uplink on a veth interface, and a TAP behind the other end.
fn pair(mac: Option<[u8; 6]>) -> (AfPacket, Tap) {
    ip("link add plvnic type veth peer name plvpeer");
    for name in ["plvnic", "plvpeer"] {
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    }
    make_bridge(BRIDGE);
    ip(&format!("link set plvpeer master {BRIDGE} up"));
    let mut tap = Tap::open("plvtest0", Some(BRIDGE)).unwrap();
    let mut uplink = AfPacket::open("plvnic", mac).unwrap();
    await_forwarding(&mut uplink, &mut tap);
    (uplink, tap)
}

/// The bridge forwards when it has noticed that the link is up. Afterwards nothing is on its way.
fn await_forwarding(uplink: &mut AfPacket, tap: &mut Tap) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let poller = Poller::new().unwrap();
    poller.add(uplink.fd().unwrap(), 1, Interest::Read).unwrap();
    let mut ready = Vec::new();
    loop {
        assert!(Instant::now() < deadline, "the bridge does not forward after 10 s");
        send(tap, &to(MAC, 0));
        poller.wait(Some(10_000), &mut ready).unwrap();
        if uplink.discard_burst(64).unwrap().frames > 0 {
            break;
        }
    }
    // What the bridge flooded before it knew better.
    tap.discard_burst(64).unwrap();
}

fn to(destination: [u8; 6], payload: u8) -> Vec<u8> {
    let mut frame = vec![0u8; VNET_HEADER_BYTES + 60];
    frame[VNET_HEADER_BYTES..][..6].copy_from_slice(&destination);
    // Nobody sends to it, so that the bridge floods whatever it learns.
    frame[VNET_HEADER_BYTES + 6..][..6].copy_from_slice(&[0x52, 0x54, 0, 0, 1, 0]);
    frame[VNET_HEADER_BYTES + 12..][..3].copy_from_slice(&[0x88, 0xb5, payload]);
    frame
}

fn send(uplink: &mut dyn Uplink, frame: &[u8]) {
    assert!(uplink.send(frame).unwrap());
    uplink.flush().unwrap();
}

#[test]
fn frames_for_the_guest_arrive_and_its_own_leave() {
    in_namespace(|| {
        let (mut uplink, mut tap) = pair(Some(MAC));
        send(&mut tap, &to(OTHER, 1));
        send(&mut tap, &to(MAC, 2));
        send(&mut tap, &to([0xff; 6], 3));
        send(&mut tap, &to([0x33, 0x33, 0, 0, 0, 1], 4));
        for (destination, payload) in [(MAC, 2), ([0xff; 6], 3), ([0x33, 0x33, 0, 0, 0, 1], 4)] {
            assert_eq!(receive(&mut uplink), to(destination, payload));
        }
        // A turn's worth of frames leaves in order, and none of them comes back.
        for payload in 0..100 {
            assert!(uplink.send(&to(OTHER, payload)).unwrap());
        }
        uplink.flush().unwrap();
        for payload in 0..100 {
            assert_eq!(receive(&mut tap)[VNET_HEADER_BYTES..], to(OTHER, payload)[VNET_HEADER_BYTES..]);
        }
        assert_eq!(uplink.discard_burst(9).unwrap(), Burst::default());
        assert_eq!(uplink.drops(), UplinkDrops::default());
    });
}

#[test]
fn every_address_and_a_tag_if_asked_for() {
    in_namespace(|| {
        let (mut uplink, mut tap) = pair(None);
        send(&mut tap, &to(OTHER, 1));
        assert_eq!(receive(&mut uplink), to(OTHER, 1));
        // The kernel takes the tag out on the way in, and it must be where it was.
        let mut tagged = to(OTHER, 2);
        tagged.splice(VNET_HEADER_BYTES + 12..VNET_HEADER_BYTES + 12, [0x81, 0, 0x60, 42]);
        send(&mut tap, &tagged);
        assert_eq!(receive(&mut uplink), tagged);
        let mut service = to(OTHER, 3);
        service.splice(VNET_HEADER_BYTES + 12..VNET_HEADER_BYTES + 12, [0x88, 0xa8, 0, 9, 0x81, 0, 0x60, 42]);
        send(&mut tap, &service);
        assert_eq!(receive(&mut uplink), service);
    });
}

#[test]
fn large_packets_pass_whole_or_in_pieces() {
    in_namespace(|| {
        let (mut uplink, mut tap) = pair(None);
        let large = large_segment();
        uplink.set_offload(EVERYTHING).unwrap();
        send(&mut tap, &large);
        let whole = receive(&mut uplink);
        assert!(whole == large, "{:x?} is not {:x?}", &whole[..70], &large[..70]);
        // Tagged: what the header counts from the start of the frame moves with the tag.
        let mut tagged = large.clone();
        tagged.splice(VNET_HEADER_BYTES + 12..VNET_HEADER_BYTES + 12, [0x81, 0, 0, 42]);
        (tagged[2], tagged[6]) = (58, 38);
        send(&mut tap, &tagged);
        let whole = receive(&mut uplink);
        assert!(whole == tagged, "{:x?} is not {:x?}", &whole[..74], &tagged[..74]);

        // Out: the kernel takes it whole, and cuts it for a TAP without offloads.
        let pieces = in_software(&large);
        send(&mut uplink, &large);
        for piece in &pieces {
            let (is, wanted) = (&receive(&mut tap)[VNET_HEADER_BYTES..], &piece[VNET_HEADER_BYTES..]);
            assert!(is == wanted, "{} {:x?} is not {} {:x?}", is.len(), &is[..54], wanted.len(), &wanted[..54]);
        }

        // In, for a guest without offloads: cut here, also when the batch is full midway.
        uplink.set_offload(OffloadFlags::default()).unwrap();
        send(&mut tap, &large);
        let mut batch = BatchBuilder::new(MIN_BATCH_BYTES);
        batch.push(&vec![1; MIN_BATCH_BYTES - 20_000]).unwrap();
        let poller = Poller::new().unwrap();
        poller.add(uplink.fd().unwrap(), 1, Interest::Read).unwrap();
        let mut ready = Vec::new();
        poller.wait(Some(10_000_000), &mut ready).unwrap();
        let mut filter = Filter::default();
        let first = uplink.recv_burst(&mut Intake::new(&mut batch, &mut filter), 9).unwrap();
        assert_eq!(first, Burst { frames: 1, more: true });
        let mut all = batch.finish();
        let mut received: Vec<Vec<u8>> = batch::frames(&all).unwrap().skip(1).map(<[u8]>::to_vec).collect();
        assert!(!received.is_empty() && received.len() < pieces.len(), "{} pieces", received.len());
        let rest = uplink.recv_burst(&mut Intake::new(&mut batch, &mut filter), 9).unwrap();
        assert_eq!(rest, Burst { frames: 0, more: false });
        all = batch.finish();
        received.extend(batch::frames(&all).unwrap().map(<[u8]>::to_vec));
        assert!(received == pieces);
        assert_eq!(uplink.drops(), UplinkDrops::default());
    });
}

#[test]
fn what_finds_no_room_is_counted() {
    in_namespace(|| {
        let (mut uplink, mut tap) = pair(Some(MAC));
        let sent = uplink.slots() + 100;
        for at in 0..sent {
            send(&mut tap, &to(MAC, at as u8));
        }
        let mut batch = BatchBuilder::new(1 << 20);
        let (mut received, mut filter) = (0, Filter::default());
        let deadline = Instant::now() + Duration::from_secs(10);
        while received + (uplink.drops().missed as usize) < sent {
            assert!(Instant::now() < deadline, "{received} of {sent} received, {:?}", uplink.drops());
            received += uplink.recv_burst(&mut Intake::new(&mut batch, &mut filter), 64).unwrap().frames;
            batch.finish();
        }
        assert_eq!((received, uplink.drops().missed), (uplink.slots(), 100));
        // And there is room again.
        send(&mut tap, &to(MAC, 7));
        assert_eq!(receive(&mut uplink), to(MAC, 7));
    });
}

#[test]
fn nonsense_costs_a_frame_and_not_those_around_it() {
    in_namespace(|| {
        let (mut uplink, mut tap) = pair(Some(MAC));
        let (good, mut bad) = (to(OTHER, 1), to(OTHER, 2));
        bad[1] = 77; // no such GSO type
        assert!(uplink.send(&good).unwrap());
        assert!(uplink.send(&bad).unwrap());
        let mut too_long = to(OTHER, 3);
        too_long.resize(4000, 0);
        assert!(uplink.send(&too_long).unwrap());
        assert!(!uplink.send(&good[..VNET_HEADER_BYTES + 3]).unwrap());
        assert!(uplink.send(&good).unwrap());
        uplink.flush().unwrap();
        assert_eq!(receive(&mut tap)[VNET_HEADER_BYTES..], good[VNET_HEADER_BYTES..]);
        assert_eq!(receive(&mut tap)[VNET_HEADER_BYTES..], good[VNET_HEADER_BYTES..]);
        assert_eq!(uplink.drops(), UplinkDrops { full: 0, refused: 3, missed: 0 });
    });
}

/// Polls as a reactor would, until the uplink says that it is gone.
fn wait_for_failure(uplink: &mut AfPacket) -> String {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        assert!(Instant::now() < deadline, "no error within 10 s");
        if let Err(error) = uplink.discard_burst(64) {
            return error.to_string();
        }
    }
}

#[test]
fn a_link_may_go_down_and_come_back_but_not_away() {
    in_namespace(|| {
        let (mut uplink, mut tap) = pair(Some(MAC));
        let frame = rarp(OTHER);
        set_up("plvnic", false);
        assert!(uplink.send(&frame).unwrap());
        uplink.flush().unwrap();
        assert_eq!(uplink.drops().refused, 1);
        for _ in 0..1000 {
            assert_eq!(uplink.discard_burst(64).unwrap().frames, 0);
        }
        set_up("plvnic", true);
        await_forwarding(&mut uplink, &mut tap);
        send(&mut tap, &to(MAC, 5));
        assert_eq!(receive(&mut uplink), to(MAC, 5));
        ip("link del plvnic");
        let text = wait_for_failure(&mut uplink);
        assert!(text.contains("the interface was removed"), "{text}");
        assert!(uplink.send(&frame).unwrap());
        assert!(uplink.flush().unwrap_err().to_string().contains("the interface was removed"));
    });
}

#[test]
fn each_obstacle_has_its_own_error() {
    in_namespace(|| {
        for name in ["", "sixteen-bytes-it", "a b", "a/b", "..", "eth%d"] {
            assert!(matches!(AfPacket::open(name, None), Err(AfPacketError::BadName { .. })), "{name:?}");
        }
        let error = AfPacket::open("plvnone", None).unwrap_err();
        assert!(matches!(error, AfPacketError::NoInterface { .. }), "{error}");
        let error = AfPacket::open("lo", None).unwrap_err();
        assert!(matches!(error, AfPacketError::NotEthernet { .. }), "{error}");
        ip("link add plvnic type veth peer name plvpeer");
        drop(AfPacket::open("plvnic", Some(MAC)).unwrap());
        // SAFETY: the raw call changes this thread's ids only; the thread ends after the test.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(result, 0);
        let error = AfPacket::open("plvnic", None).unwrap_err();
        assert!(matches!(error, AfPacketError::NotPermitted { .. }), "{error}");
        assert!(error.to_string().contains("CAP_NET_RAW"), "{error}");
    });
}
