//! net_tap: the kernel is the peer, with its own sockets and its own opinion on checksums.

use crate::common::{in_namespace, ip, large_segment, receive};
use crate::open;
use crate::packet::{finished, udp};
use dataplane::VNET_HEADER_BYTES;
use dataplane::uplink::af_packet::AfPacket;
use dataplane::uplink::offload::Segments;
use dataplane::uplink::{OffloadFlags, Uplink};
use std::net::UdpSocket;
use std::time::Duration;

const GUEST: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const GUEST_ADDRESS: [u8; 4] = [10, 9, 0, 2];
const HOST_ADDRESS: [u8; 4] = [10, 9, 0, 1];

fn host_mac(interface: &str) -> [u8; 6] {
    let output = std::process::Command::new("ip").args(["-o", "link", "show", interface]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mac = text.split("link/ether ").nth(1).expect("an Ethernet interface").split(' ').next().unwrap();
    let bytes: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

#[test]
fn a_socket_of_the_kernel_and_a_guest_talk() {
    in_namespace(|| {
        let mut port = open("net_tap_talk,iface=plvdpdk0", Some(GUEST));
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/plvdpdk0/disable_ipv6", "1");
        ip("addr add 10.9.0.1/24 dev plvdpdk0");
        ip("link set plvdpdk0 up");
        ip("neigh add 10.9.0.2 lladdr 52:54:00:00:00:01 dev plvdpdk0");
        let socket = UdpSocket::bind("10.9.0.1:4000").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mac = host_mac("plvdpdk0");

        assert!(port.sends_checksums(), "this driver does");
        // Out: the port computes the checksum, and the kernel drops a datagram with a wrong one.
        for bytes in [0, 1, 17, 1000, 1472] {
            let payload: Vec<u8> = (0..bytes).map(|i| (i * 31 % 251) as u8).collect();
            let frame = udp([mac, GUEST], [GUEST_ADDRESS, HOST_ADDRESS], [5000, 4000], &payload);
            assert!(port.send(&frame).unwrap());
            port.flush().unwrap();
            let mut buf = [0; 2000];
            let (len, from) = socket.recv_from(&mut buf).unwrap();
            assert_eq!((&buf[..len], from.to_string().as_str()), (&payload[..], "10.9.0.2:5000"));
        }

        // In: from a guest that takes hints on checksums and one that does not.
        for csum in [false, true] {
            port.set_offload(OffloadFlags { csum, ..OffloadFlags::default() }).unwrap();
            socket.send_to(&[7; 333], "10.9.0.2:5000").unwrap();
            let is_ours = |frame: &[u8]| frame.len() == VNET_HEADER_BYTES + 42 + 333;
            let frame = std::iter::repeat_with(|| receive(&mut port)).find(|frame| is_ours(frame)).unwrap();
            let hint = if csum { 2 } else { 0 };
            assert_eq!(frame[..VNET_HEADER_BYTES], [hint, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            let mut wanted = udp([GUEST, mac], [HOST_ADDRESS, GUEST_ADDRESS], [4000, 5000], &[7; 333]);
            // The kernel chooses this one, and with it the checksum of the header.
            let id = VNET_HEADER_BYTES + 18;
            wanted[id..id + 8].copy_from_slice(&frame[id..id + 8]);
            assert_eq!(frame[VNET_HEADER_BYTES..], finished(&wanted)[VNET_HEADER_BYTES..]);
        }
    });
}

#[test]
fn a_large_packet_reaches_the_kernel_in_pieces() {
    in_namespace(|| {
        let mut port = open("net_tap_large,iface=plvdpdk0", None);
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/plvdpdk0/disable_ipv6", "1");
        let mut peer = AfPacket::open("plvdpdk0", None).unwrap();
        let large = large_segment();
        let segments = Segments::of(&large).unwrap();
        assert!(port.send(&large).unwrap());
        port.flush().unwrap();
        for at in 0..segments.len() {
            let mut piece = vec![0; segments.bytes(at)];
            segments.write(&large, at, &mut piece);
            assert!(receive(&mut peer)[VNET_HEADER_BYTES..] == piece[VNET_HEADER_BYTES..], "piece {at}");
        }
    });
}
