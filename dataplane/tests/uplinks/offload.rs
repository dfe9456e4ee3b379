//! Segments and checksums made in software are those that the kernel makes.

use crate::common::*;
use dataplane::uplink::OffloadFlags;
use dataplane::uplink::Uplink;
use dataplane::uplink::offload::{Segments, is_needed};
use dataplane::uplink::tap::Tap;
use dataplane::{VNET_HEADER_BYTES, VnetHeader};

/// All frames that `frame` becomes in software.
pub fn in_software(frame: &[u8]) -> Vec<Vec<u8>> {
    assert!(is_needed(VnetHeader::of(frame).unwrap(), OffloadFlags::default()));
    let segments = Segments::of(frame).unwrap();
    let write = |at| {
        let mut into = vec![0xaa; segments.bytes(at)];
        segments.write(frame, at, &mut into);
        into
    };
    (0..segments.len()).map(write).collect()
}

/// All frames that the kernel makes of `frame` on its way to a guest that takes no large ones.
fn in_kernel(a: &mut Tap, b: &mut Tap, frame: &[u8], count: usize) -> Vec<Vec<u8>> {
    assert!(a.send(frame).unwrap());
    let without_hint = |mut frame: Vec<u8>| {
        // The kernel may add that it knows the checksum to be right.
        frame[..VNET_HEADER_BYTES].fill(0);
        frame
    };
    (0..count).map(|_| without_hint(receive(b))).collect()
}

/// A frame of `bytes` of payload behind these headers, whose checksum is left to do.
fn build(is_v6: bool, is_tcp: bool, bytes: usize, gso: Option<(u8, u16)>, tagged: bool) -> Vec<u8> {
    let mut packet = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    if tagged {
        packet.extend([0x81, 0, 0, 7]);
    }
    let transport_bytes = if is_tcp { 32 } else { 8 };
    let protocol = if is_tcp { 6 } else { 17 };
    let length = transport_bytes + bytes;
    let addresses: Vec<u8>;
    if is_v6 {
        packet.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        packet.extend((length as u16).to_be_bytes());
        packet.extend([protocol, 64]);
        addresses = (0..32).map(|i| 0xfd ^ i).collect();
        packet.extend(&addresses);
    } else {
        packet.extend([8, 0, 0x45, 0]);
        packet.extend((20 + length as u16).to_be_bytes());
        // An identification that overflows on the way.
        packet.extend([0xff, 0xfe, 0, 0, 64, protocol, 0, 0]);
        addresses = vec![10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend(&addresses);
        let at = packet.len() - 20;
        let sum = !ones_sum(&packet[at..]);
        packet[at + 10..at + 12].copy_from_slice(&sum.to_be_bytes());
    }
    let start = packet.len();
    packet.extend([0x10, 0, 0x20, 0]);
    if is_tcp {
        // Sequence numbers that wrap; CWR, ACK, PSH and FIN set; a timestamp option.
        packet.extend([0xff, 0xff, 0xff, 0, 1, 2, 3, 4, 0x80, 0x99, 1, 0, 0, 0, 0, 0]);
        packet.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    } else {
        packet.extend((length as u16).to_be_bytes());
        packet.extend([0, 0]);
    }
    packet.extend((0..bytes).map(|i| (i * 7 % 253) as u8));
    let mut pseudo = addresses;
    pseudo.extend((length as u32).to_be_bytes());
    pseudo.extend([0, protocol]);
    let field = if is_tcp { 16 } else { 6 };
    packet[start + field..start + field + 2].copy_from_slice(&ones_sum(&pseudo).to_be_bytes());
    let (kind, size) = gso.unwrap_or_default();
    let mut frame = vec![1, kind];
    for value in [if kind == 0 { 0 } else { start + transport_bytes }, size.into(), start, field, 0] {
        frame.extend((value as u16).to_le_bytes());
    }
    frame.extend(packet);
    frame
}

fn ones_sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[test]
fn software_does_what_the_kernel_does() {
    in_namespace(|| {
        make_bridge(BRIDGE);
        let mut a = Tap::open("plvtest0", Some(BRIDGE)).unwrap();
        let mut b = Tap::open("plvtest1", Some(BRIDGE)).unwrap();
        for (is_v6, is_tcp, bytes, gso, tagged) in [
            (false, true, 30_000, Some((1, 1448)), false),
            (false, true, 14_480, Some((1, 1448)), false),
            (false, true, 3_001, Some((1, 1000)), true),
            (true, true, 30_001, Some((4, 1428)), false),
            (true, true, 2_857, Some((4, 1428)), true),
            (false, true, 5_000, Some((0x81, 1448)), false),
            (false, true, 1_001, None, false),
            (true, true, 1_000, None, true),
            (false, false, 999, None, false),
            (true, false, 1_200, None, false),
        ] {
            let frame = build(is_v6, is_tcp, bytes, gso, tagged);
            let software = in_software(&frame);
            let kernel = in_kernel(&mut a, &mut b, &frame, software.len());
            let differing = (0..software.len()).find(|&at| software[at] != kernel[at]);
            if let Some(at) = differing {
                panic!(
                    "v6 {is_v6} tcp {is_tcp} {bytes} bytes {gso:?}, frame {at}:\n software {:x?}\n kernel   {:x?}",
                    &software[at][..software[at].len().min(100)],
                    &kernel[at][..kernel[at].len().min(100)]
                );
            }
        }
        assert_eq!(large_segment().len(), VNET_HEADER_BYTES + 54 + PAYLOAD_BYTES);
        assert_eq!(in_software(&large_segment()).len(), PAYLOAD_BYTES.div_ceil(SEGMENT_BYTES));
    });
}
