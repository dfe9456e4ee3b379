//! A port whose output is its input (net_ring): order, bursts, losses, errors.

use crate::common::{large_segment, receive};
use crate::open;
use crate::packet::{finished, udp};
use dataplane::VNET_HEADER_BYTES;
use dataplane::batch::{self, BatchBuilder, MIN_BATCH_BYTES};
use dataplane::uplink::dpdk::{Dpdk, DpdkError};
use dataplane::uplink::filter::Filter;
use dataplane::uplink::offload::Segments;
use dataplane::uplink::{Burst, Intake, Uplink, UplinkDrops};

fn numbered(number: u32, bytes: usize) -> Vec<u8> {
    let mut frame = vec![0u8; VNET_HEADER_BYTES + bytes];
    frame[VNET_HEADER_BYTES + 14..][..4].copy_from_slice(&number.to_le_bytes());
    frame
}

#[test]
fn frames_come_back_in_order_and_no_more_than_asked_for() {
    let mut port = open("net_ring_order", None);
    assert!(port.fd().is_none(), "it can only be polled");
    assert!(port.is_link_up());
    let sent: Vec<Vec<u8>> = (0..100).map(|number| numbered(number, 60 + 14 * number as usize)).collect();
    for frame in &sent {
        assert!(port.send(frame).unwrap());
    }
    port.flush().unwrap();
    let (mut batch, mut filter) = (BatchBuilder::new(MIN_BATCH_BYTES), Filter::default());
    // Room for a few of them, then for the rest; the budget ends within a burst.
    batch.push(&vec![0; MIN_BATCH_BYTES - 1000]).unwrap();
    let first = port.recv_burst(&mut Intake::new(&mut batch, &mut filter), 64).unwrap();
    assert!(first.frames > 2 && first.frames < 32 && first.more, "{first:?}");
    let payload = batch.finish();
    let mut received: Vec<Vec<u8>> = batch::frames(&payload).unwrap().skip(1).map(<[u8]>::to_vec).collect();
    let mut batch = BatchBuilder::new(1 << 20);
    let second = port.recv_burst(&mut Intake::new(&mut batch, &mut filter), 40).unwrap();
    assert_eq!(second, Burst { frames: 40, more: true });
    let third = port.recv_burst(&mut Intake::new(&mut batch, &mut filter), 1000).unwrap();
    assert_eq!(third, Burst { frames: 60 - first.frames, more: false });
    let payload = batch.finish();
    received.extend(batch::frames(&payload).unwrap().map(<[u8]>::to_vec));
    assert!(received == sent);
    assert_eq!(port.drops(), UplinkDrops::default());
}

#[test]
fn a_full_port_drops_and_says_so() {
    let mut port = open("net_ring_full", None);
    let frame = numbered(0, 60);
    let total = 3 * port.slots() as u64;
    for _ in 0..total {
        port.send(&frame).unwrap();
    }
    port.flush().unwrap();
    let lost = port.drops().full;
    let mut received = 0;
    loop {
        let burst = port.discard_burst(64).unwrap();
        received += burst.frames as u64;
        if !burst.more {
            break;
        }
    }
    assert!(lost > 0 && received > 0, "{received} received, {lost} lost");
    assert_eq!(received + lost, total);
    // And there is room again, for all buffers are back.
    for number in 0..500 {
        assert!(port.send(&numbered(number, 60)).unwrap());
    }
    port.flush().unwrap();
    assert_eq!(receive(&mut port), numbered(0, 60));
    assert_eq!(port.drops().full, lost);
}

#[test]
fn what_the_port_cannot_send_is_cut_or_refused() {
    let mut port = open("net_ring_cut", None);
    let large = large_segment();
    let segments = Segments::of(&large).unwrap();
    assert!(!port.sends_checksums());
    let datagram = udp([[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]], [[10, 0, 0, 1], [10, 0, 0, 2]], [1, 2], &[7; 99]);
    assert!(port.send(&datagram).unwrap());
    assert!(port.send(&large).unwrap());
    port.flush().unwrap();
    assert_eq!(receive(&mut port), finished(&datagram));
    for at in 0..segments.len() {
        let mut piece = vec![0; segments.bytes(at)];
        segments.write(&large, at, &mut piece);
        assert!(receive(&mut port) == piece, "piece {at}");
    }
    let mut nonsense = large.clone();
    nonsense[1] = 77;
    assert!(!port.send(&nonsense).unwrap());
    assert!(!port.send(&numbered(0, 2000)).unwrap(), "longer than the port's MTU");
    assert!(!port.send(&numbered(0, 60)[..VNET_HEADER_BYTES + 3]).unwrap());
    port.flush().unwrap();
    assert_eq!(port.discard_burst(9).unwrap(), Burst::default());
    assert_eq!(port.drops(), UplinkDrops { full: 0, refused: 3, missed: 0 });
}

#[test]
fn each_obstacle_has_its_own_error_and_a_port_can_be_opened_again() {
    drop(open("net_ring_again", None));
    drop(open("net_ring_again", None));
    let error = Dpdk::open("net_nonesuch0", None).unwrap_err();
    assert!(matches!(error, DpdkError::NoPort { .. }), "{error}");
    assert!(error.to_string().contains("net_nonesuch0"), "{error}");
    for name in ["", ",iface=x", "net\0ring"] {
        assert!(matches!(Dpdk::open(name, None), Err(DpdkError::BadName { .. })), "{name:?}");
    }
}
