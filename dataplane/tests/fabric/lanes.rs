//! Links whose messages take a lane beside the connection: who gets one, and what becomes of those who do not.

use crate::common::{GROUP, Node, RawHello, Seen, drive, framed, listen, replicas_over};
use dataplane::fabric::{
    Fabric, FabricConfig, FabricEvent, Listener, LostReason, PeerId, RefusalCode, SendError, Transport,
};
use dataplane::wait::now_us;
use std::net::SocketAddr;

const B: PeerId = PeerId(1);

/// Replica 1 alone; the group's file says shared memory.
fn lone_acceptor() -> (Listener, Node) {
    let listener = listen("node1", 101);
    let addrs = ["127.0.0.1:1".parse::<SocketAddr>().unwrap(), listener.local_addr()];
    let node = Node::with(&listener, replicas_over(&addrs, &[Transport::Shm]), 1, FabricConfig::default());
    (listener, node)
}

fn shm_pair() -> (Listener, Listener, Node, Node) {
    let (left, right) = (listen("node0", 100), listen("node1", 101));
    let addrs = [left.local_addr(), right.local_addr()];
    let replicas = replicas_over(&addrs, &[Transport::Shm]);
    let mut a = Node::with(&left, replicas.clone(), 0, FabricConfig::default());
    let mut b = Node::with(&right, replicas, 1, FabricConfig::default());
    drive(&mut [&mut a, &mut b], |n| n.iter().all(|node| node.connections().len() == 1));
    (left, right, a, b)
}

#[test]
fn messages_pass_without_a_look_at_the_sockets() {
    let (_left, _right, mut a, mut b) = shm_pair();
    assert_eq!((a.fabric.transport(B), b.fabric.transport(PeerId(0))), (Transport::Shm, Transport::Shm));
    assert!(a.fabric.has_memory_lanes() && b.fabric.has_memory_lanes());
    for number in 0..1000u32 {
        a.fabric.send(B, &[&number.to_le_bytes()]).unwrap();
        let mut received = Vec::new();
        b.fabric.poll_lanes(now_us(), &mut |event| match event {
            FabricEvent::Message { bytes, .. } => received.push(bytes.to_vec()),
            other => panic!("{other:?}"),
        });
        assert_eq!(received, [number.to_le_bytes()]);
    }
    assert_eq!(a.fabric.send(B, &[]), Err(SendError::BadLength { bytes: 0 }));
    assert_eq!(a.seen, [Seen::Connected(1, 101)]);
}

#[test]
fn no_file_is_left_in_dev_shm() {
    let ours = || {
        let names = std::fs::read_dir("/dev/shm").unwrap().flatten().map(|entry| entry.file_name());
        names.filter(|name| name.to_string_lossy().starts_with("plover-lane-")).collect::<Vec<_>>()
    };
    let (_left, _right, mut a, mut b) = shm_pair();
    // Others may be setting up a lane just now; theirs go as well.
    drive(&mut [&mut a, &mut b], |_| ours().is_empty());
}

#[test]
fn what_was_sent_before_the_end_arrives_before_the_loss() {
    let (_left, _right, mut a, b) = shm_pair();
    let Node { fabric: mut dying, .. } = b;
    (0..100u8).for_each(|number| dying.send(PeerId(0), &[&[number]]).unwrap());
    drop(dying);
    drive(&mut [&mut a], |n| !n[0].lost().is_empty());
    assert_eq!(a.messages().len(), 100);
    assert!(matches!(a.seen.last(), Some(Seen::Lost(1, LostReason::Closed))), "{:?}", a.seen.last());
}

#[test]
fn two_nodes_that_want_different_transports_are_told() {
    let (listener, mut node) = lone_acceptor();
    let mut peer = RawHello::good(7).dial(listener.local_addr());
    let (code, _, text) = peer.read_answer();
    assert_eq!(code, RefusalCode::Transport as u8);
    assert!(text.contains("uses shm between the replicas 0 and 1 of the group vm1"), "{text}");
    assert!(text.contains("node0 wants tcp") && text.contains("listed alike"), "{text}");
    node.poll_ahead(0);
    assert!(node.seen.is_empty());
    let mut peer = RawHello { transport: 77, ..RawHello::good(7) }.dial(listener.local_addr());
    assert_eq!(peer.read_answer().0, RefusalCode::NotPlover as u8);
}

#[test]
fn a_lane_that_does_not_come_up_is_said_on_both_sides() {
    let (listener, mut node) = lone_acceptor();
    let mut peer = RawHello { transport: 1, ..RawHello::good(7) }.dial(listener.local_addr());
    drive(&mut [&mut node], |n| n[0].fabric.last_heard_us(PeerId(0)).is_some());
    assert_eq!(peer.read_answer(), (0, 101, String::new()));
    // Its offer: ring sizes, no file.
    let offer = peer.read(4 + 1 + 8);
    assert_eq!(offer[..9], *b"\x09\0\0\0\x01SHM1");
    assert!(!node.fabric.is_connected(PeerId(0)) && node.seen.is_empty(), "not before the lane is up");
    let file = "plover-lane-00112233445566778899aabbccddeeff";
    peer.write(&framed(&[&offer[4..], file.as_bytes()].concat()));
    drive(&mut [&mut node], |n| !n[0].seen.is_empty());
    let Seen::Refused(0, refusal) = &node.seen[0] else { panic!("{:?}", node.seen) };
    assert_eq!(refusal.code, RefusalCode::Lane);
    assert!(refusal.text.contains(file) && refusal.text.contains("take shm out of their transports"), "{refusal}");
    assert_eq!(node.fabric.trouble(PeerId(0)), Some(refusal.text.as_str()));
    let head = peer.read(5);
    let told = peer.read(u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize - 1);
    assert_eq!((head[4], String::from_utf8(told).unwrap()), (3, refusal.text.clone()));
    assert_eq!(node.seen.len(), 1, "nothing was connected, so nothing is lost");
}

#[test]
fn a_peer_that_leaves_or_dawdles_in_the_set_up_is_no_loss() {
    let (listener, mut node) = lone_acceptor();
    let mut peer = RawHello { transport: 1, ..RawHello::good(7) }.dial(listener.local_addr());
    drive(&mut [&mut node], |n| n[0].fabric.last_heard_us(PeerId(0)).is_some());
    peer.read_answer();
    peer.read(13);
    drop(peer);
    drive(&mut [&mut node], |n| n[0].fabric.trouble(PeerId(0)).is_some());
    assert!(node.seen.is_empty(), "{:?}", node.seen);
    // One that never makes its offer.
    let hello = RawHello { transport: 1, group: GROUP.to_owned(), ..RawHello::good(8) };
    let mut peer = hello.dial(listener.local_addr());
    node.poll_ahead(0);
    drive(&mut [&mut node], |n| {
        n[0].seen.iter().any(|seen| matches!(seen, Seen::Refused(..))) || n[0].lost().len() > 9
    });
    let Seen::Refused(0, refusal) = &node.seen[0] else { panic!("{:?}", node.seen) };
    assert!(refusal.text.contains("took too long"), "{refusal}");
    peer.read_answer();
}
