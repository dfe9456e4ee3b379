//! The control lane over real sockets: order, bounds, deaths and impostors.

use crate::common::{
    GROUP, Node, RawHello, RawPeer, Seen, drive, encrypted, framed, listen, listen_with, pair, pair_with, replicas,
};
use dataplane::fabric::{
    Fabric, FabricConfig, Listener, LostReason, MAX_CONTROL_MESSAGE_BYTES, PeerId, RefusalCode, Security, SendError,
};
use proptest::prelude::*;
use std::io::Write;
use std::net::SocketAddr;

const A: PeerId = PeerId(0);
const B: PeerId = PeerId(1);

/// Replica 1 alone; the address of replica 0 answers nobody.
fn lone_acceptor() -> (Listener, Node) {
    lone_acceptor_with(encrypted())
}

fn lone_acceptor_with(security: Security) -> (Listener, Node) {
    let listener = listen_with("node1", 101, security);
    let addrs = ["127.0.0.1:1".parse::<SocketAddr>().unwrap(), listener.local_addr()];
    let node = Node::new(&listener, &addrs, 1, FabricConfig::default());
    (listener, node)
}

/// A raw connection as replica 0, welcomed.
fn welcomed(listener: &Listener, node: &mut Node, instance: u64) -> RawPeer {
    welcomed_as(&RawHello::good(instance), listener, node)
}

fn welcomed_as(hello: &RawHello, listener: &Listener, node: &mut Node) -> RawPeer {
    let mut peer = hello.dial(listener.local_addr());
    let before = node.connections().len();
    drive(&mut [node], |n| n[0].connections().len() > before);
    assert_eq!(peer.read_answer(), (0, 101, String::new()));
    peer
}

#[test]
fn both_sides_learn_who_the_other_is() {
    let (_left, _right, a, b) = pair(&FabricConfig::default());
    assert_eq!(a.seen, [Seen::Connected(1, 101)]);
    assert_eq!(b.seen, [Seen::Connected(0, 100)]);
    assert!(a.fabric.is_connected(B) && a.fabric.trouble(B).is_none());
    assert!(a.fabric.last_heard_us(B).is_some());
}

#[test]
fn messages_arrive_whole_in_order_and_all_of_them_under_back_pressure() {
    under_back_pressure(&encrypted());
}

#[test]
fn messages_in_the_clear_arrive_as_well() {
    under_back_pressure(&Security::Insecure);
}

fn under_back_pressure(security: &Security) {
    let config = FabricConfig { max_queued_bytes: 5 << 20, ..FabricConfig::default() };
    let (_left, _right, mut a, mut b) = pair_with(&config, security);
    let message = |i: u32| {
        let len = [5, 60_000, 1, 1 << 20, 4000, MAX_CONTROL_MESSAGE_BYTES - 4][i as usize % 6];
        let mut bytes = vec![i as u8; len + 4];
        bytes[..4].copy_from_slice(&i.to_le_bytes());
        bytes
    };
    const COUNT: u32 = 90;
    let (mut next, mut full) = (0, 0);
    // Only the sender runs until it is full for the first time; then both.
    while full == 0 {
        match a.fabric.send(B, &[&message(next)]) {
            Ok(()) => next += 1,
            Err(error) => {
                assert_eq!(error, SendError::Full);
                assert!(a.fabric.queued_bytes(B) <= config.max_queued_bytes);
                full += 1;
            }
        }
        a.poll_ahead(0);
    }
    drive(&mut [&mut a, &mut b], |n| {
        while next < COUNT {
            let bytes = message(next);
            let (head, tail) = bytes.split_at(bytes.len() / 2);
            if n[0].fabric.send(B, &[head, &[], tail]).is_err() {
                break;
            }
            next += 1;
        }
        n[1].messages().len() == COUNT as usize
    });
    for (i, got) in b.messages().into_iter().enumerate() {
        assert!(got == message(i as u32), "message {i}");
    }
    drive(&mut [&mut a, &mut b], |n| n[0].fabric.queued_bytes(B) == 0);
    assert!(a.lost().is_empty() && b.lost().is_empty());
}

#[test]
fn many_parts_are_one_message_and_bad_lengths_are_refused() {
    let (_left, _right, mut a, mut b) = pair(&FabricConfig::default());
    let parts: Vec<Vec<u8>> = (0..20).map(|i| vec![i; i as usize]).collect();
    let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    a.fabric.send(B, &slices).unwrap();
    assert_eq!(a.fabric.send(B, &[]), Err(SendError::BadLength { bytes: 0 }));
    let long = vec![0; MAX_CONTROL_MESSAGE_BYTES + 1];
    assert_eq!(a.fabric.send(B, &[&long]), Err(SendError::BadLength { bytes: long.len() }));
    drive(&mut [&mut a, &mut b], |n| n[1].messages().len() == 1);
    assert_eq!(b.messages()[0], parts.concat());
}

#[test]
fn a_dead_peer_is_noticed_at_once_and_its_successor_is_let_in() {
    let (left, right, mut a, b) = pair(&FabricConfig::default());
    let addrs = [left.local_addr(), right.local_addr()];
    drop(b);
    drive(&mut [&mut a], |n| !n[0].lost().is_empty());
    assert_eq!(a.lost(), [&LostReason::Closed]);
    assert_eq!(a.fabric.send(B, &[b"x"]), Err(SendError::NotConnected));
    assert!(a.fabric.trouble(B).is_some());
    let mut b = Node::new(&right, &addrs, 1, FabricConfig::default());
    let config = FabricConfig { refused_retry_us: 50_000, ..FabricConfig::default() };
    drive(&mut [&mut a, &mut b], |n| n[0].connections().len() == 2 && n[1].connections().len() == 1);
    // And the dialing side comes back as another process.
    drop(a);
    drop(left);
    let left = listen("node0", 200);
    let mut a = Node::new(&left, &addrs, 0, config);
    drive(&mut [&mut a, &mut b], |n| n[1].connections().len() == 2 && n[0].connections().len() == 1);
    assert_eq!(b.connections(), [100, 200]);
    b.fabric.send(A, &[b"hello again"]).unwrap();
    drive(&mut [&mut a, &mut b], |n| n[0].messages() == [b"hello again"]);
}

#[test]
fn a_refused_dialer_learns_why_and_gets_in_when_it_is_mended() {
    let (left, right) = (listen("node0", 100), listen("node1", 101));
    let addrs = [left.local_addr(), right.local_addr()];
    let config = FabricConfig { refused_retry_us: 20_000, ..FabricConfig::default() };
    let mut a = Node::new(&left, &addrs, 0, config);
    let mut rounds = 0;
    drive(&mut [&mut a], |n| {
        rounds += 1;
        !n[0].seen.is_empty() && rounds > 60
    });
    let [Seen::Refused(1, reason)] = a.seen.as_slice() else { panic!("one refusal is said once: {:?}", a.seen) };
    assert_eq!(reason.code, RefusalCode::UnknownGroup);
    assert!(reason.text.contains("node1") && reason.text.contains("add it to"), "{reason}");
    assert_eq!(a.fabric.trouble(B), Some(reason.text.as_str()));
    let mut b = Node::new(&right, &addrs, 1, FabricConfig::default());
    drive(&mut [&mut a, &mut b], |n| n[0].connections().len() == 1);
}

#[test]
fn disconnect_reports_the_loss_and_connects_again() {
    let (_left, _right, mut a, mut b) = pair(&FabricConfig::default());
    b.fabric.disconnect(A);
    assert!(!b.fabric.is_connected(A));
    assert_eq!(b.fabric.send(A, &[b"x"]), Err(SendError::NotConnected));
    drive(&mut [&mut a, &mut b], |n| n.iter().all(|node| node.connections().len() == 2));
    assert_eq!(b.lost(), [&LostReason::Disconnected]);
    assert_eq!(a.lost(), [&LostReason::Closed]);
}

#[test]
fn what_does_not_belong_here_is_told_why() {
    let (listener, mut node) = lone_acceptor();
    type Change = fn(&mut RawHello);
    let cases: [(Change, u8, &str); 9] = [
        (|h| h.magic = *b"GET / HT", 1, "speaks Plover's fabric protocol"),
        (|h| h.version = 9, 2, "run the same release"),
        (|h| h.group = "other".to_owned(), 3, "does not serve the group other"),
        (|h| h.to = 2, 4, "must be listed alike"),
        (|h| h.from = 1, 4, "must be listed alike"),
        (|h| h.node = "node9".to_owned(), 5, "belongs to the node node0"),
        (|h| h.from = 5, 5, "has no replica 5"),
        (|h| h.node = "node1".to_owned(), 6, "two nodes must not have one name"),
        (|h| h.lane = 3, 1, "unknown lane"),
    ];
    for (change, code, text) in cases {
        let mut hello = RawHello::good(7);
        change(&mut hello);
        let mut stream = hello.dial(listener.local_addr());
        let (got, _, why) = stream.read_answer();
        assert_eq!(got, code, "{why}");
        assert!(why.contains(text), "{why}");
        assert!(stream.has_ended(), "the connection ends after the reason");
    }
    node.poll_ahead(0);
    assert_eq!(node.seen, []);
    welcomed(&listener, &mut node, 7);
}

#[test]
fn the_higher_replica_does_not_dial() {
    let listener = listen("node0", 100);
    let addrs = [listener.local_addr(), "127.0.0.1:1".parse().unwrap()];
    let _node = Node::new(&listener, &addrs, 0, FabricConfig::default());
    let hello = RawHello { from: 1, to: 0, node: "node1".to_owned(), ..RawHello::good(1) };
    let (code, _, why) = hello.dial(listener.local_addr()).read_answer();
    assert_eq!(code, RefusalCode::WrongReplica as u8, "{why}");
}

#[test]
fn registration_checks_the_configuration() {
    let listener = listen("node0", 100);
    let addrs = [listener.local_addr(), "127.0.0.1:1".parse().unwrap()];
    let refused = |list, me: u8| listener.register(GROUP, list, PeerId(me)).unwrap_err().to_string();
    assert!(refused(replicas(&addrs), 2).contains("not listed"));
    assert!(refused(replicas(&addrs), 1).contains("belongs to the node node1, but this node is node0"));
    let mut twice = replicas(&addrs);
    twice[1].node = "node0".to_owned();
    assert!(refused(twice, 0).contains("holds two replicas"));
    let port = listener.register(GROUP, replicas(&addrs), A).unwrap();
    assert!(refused(replicas(&addrs), 0).contains("served by this node already"));
    drop(port);
    listener.register(GROUP, replicas(&addrs), A).unwrap();
}

#[test]
fn silent_strangers_do_not_keep_peers_out_and_are_shown_the_door() {
    let (listener, mut node) = lone_acceptor();
    let part = [RawHello::good(1).preamble(), vec![7; 30]].concat();
    let mut strangers: Vec<RawPeer> = (0..100)
        .map(|i| {
            let mut stranger = RawPeer::connect(listener.local_addr());
            if i % 2 == 0 {
                stranger.write_raw(&part);
            }
            stranger
        })
        .collect();
    welcomed(&listener, &mut node, 7);
    for stranger in &mut strangers {
        assert!(stranger.has_ended());
    }
}

#[test]
fn an_oversize_announcement_ends_the_connection() {
    let (listener, mut node) = lone_acceptor();
    let mut stream = welcomed(&listener, &mut node, 7);
    stream.write(&framed(b"fine"));
    stream.write(&(MAX_CONTROL_MESSAGE_BYTES as u32 + 1).to_le_bytes());
    drive(&mut [&mut node], |n| !n[0].lost().is_empty());
    assert_eq!(node.messages(), [b"fine"]);
    assert_eq!(node.lost(), [&LostReason::Oversize { bytes: MAX_CONTROL_MESSAGE_BYTES as u64 + 1 }]);
}

#[test]
fn of_two_live_claimants_the_first_stays() {
    let (listener, mut node) = lone_acceptor();
    let mut first = welcomed(&listener, &mut node, 7);
    let mut second = RawHello::good(8).dial(listener.local_addr());
    let ping = framed(b"");
    // The first one lives: it pings while the second is judged.
    second.stream.set_nonblocking(true).unwrap();
    drive(&mut [&mut node], |_| {
        first.write(&ping);
        second.stream.peek(&mut [0]).is_ok()
    });
    second.stream.set_nonblocking(false).unwrap();
    let (code, _, why) = second.read_answer();
    assert_eq!(code, RefusalCode::SameName as u8);
    let addr = first.addr().to_string();
    assert!(why.contains("another node named node0 (instance 0000000000000007)") && why.contains(&addr), "{why}");
    assert!(node.lost().is_empty());
    first.write(&framed(b"still here"));
    drive(&mut [&mut node], |n| n[0].messages() == [b"still here"]);
}

/// Polls ahead of time until the listener has handed over what waits.
fn poll_ahead_until(node: &mut Node, ahead_us: u64, connections: usize) {
    let deadline = dataplane::wait::now_us() + 20_000_000;
    while node.connections().len() < connections {
        node.poll_ahead(ahead_us);
        assert!(dataplane::wait::now_us() < deadline, "{:?}", node.seen);
        std::thread::yield_now();
    }
}

#[test]
fn a_silent_claimant_gives_way_and_a_returning_one_too() {
    let (listener, mut node) = lone_acceptor();
    let _first = welcomed(&listener, &mut node, 7);
    // 150 ms of silence, and the newcomer with another instance is let in.
    let mut second = RawHello::good(8).dial(listener.local_addr());
    poll_ahead_until(&mut node, 150_000, 2);
    assert_eq!(second.read_answer().0, 0);
    // The same instance needs no silence: the process itself knows that its old connection is dead.
    let mut third = RawHello::good(8).dial(listener.local_addr());
    poll_ahead_until(&mut node, 150_000, 3);
    assert_eq!(third.read_answer().0, 0);
    assert_eq!(node.connections(), [7, 8, 8]);
    assert_eq!(node.lost(), [&LostReason::Replaced, &LostReason::Replaced]);
}

#[test]
fn silence_ends_a_connection_and_pings_prevent_it() {
    let (_left, _right, mut a, mut b) = pair(&FabricConfig::default());
    // Nobody sends a message for longer than the silence timeout; pings keep the connection.
    let until = dataplane::wait::now_us() + 1_200_000;
    drive(&mut [&mut a, &mut b], |_| dataplane::wait::now_us() > until);
    assert!(a.lost().is_empty() && b.lost().is_empty());
    assert!(a.messages().is_empty(), "a ping is no message");
    // One second passes for one side only, and the other does not run.
    b.poll_ahead(0);
    (1..=6).for_each(|step| b.poll_ahead(step * 200_000));
    assert!(matches!(b.lost()[..], [LostReason::Silent { silent_us: 1_000_000.. }]), "{:?}", b.lost());
}

#[test]
fn a_side_that_was_not_run_does_not_take_that_for_silence_for_ever() {
    let (_left, _right, mut a, mut b) = pair(&FabricConfig::default());
    // Both were not run for long, on one machine that stood still.
    a.poll_ahead(5_000_000);
    b.poll_ahead(5_000_000);
    assert!(a.lost().is_empty() && b.lost().is_empty(), "{:?} {:?}", a.lost(), b.lost());
    assert!(a.fabric.next_deadline_us() <= dataplane::wait::now_us() + 5_250_000, "it looks again in time");
    // It is seldom run, and the other never again.
    let polls = (1..=10).find(|poll| {
        b.poll_ahead(5_000_000 + poll * 400_000);
        !b.lost().is_empty()
    });
    assert!(matches!(polls, Some(3..=4)), "lost after {polls:?} polls: {:?}", b.lost());
}

/// A lone acceptor and a welcomed connection to it.
fn acceptor_and_peer(in_the_clear: bool) -> (Listener, Node, RawPeer) {
    let (security, hello) =
        if in_the_clear { (Security::Insecure, RawHello::clear(7)) } else { (encrypted(), RawHello::good(7)) };
    let (listener, mut node) = lone_acceptor_with(security);
    let peer = welcomed_as(&hello, &listener, &mut node);
    (listener, node, peer)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// A peer that dies anywhere in its stream: every whole message arrives, nothing else does.
    #[test]
    fn a_peer_may_die_at_any_byte(
        lens in prop::collection::vec(0usize..200, 1..6),
        cut in any::<prop::sample::Index>(),
        chunk in 1usize..100,
        in_the_clear: bool,
    ) {
        let (listener, mut node, mut peer) = acceptor_and_peer(in_the_clear);
        let messages: Vec<Vec<u8>> = lens.iter().map(|&len| vec![len as u8; len]).collect();
        let wire: Vec<Vec<u8>> = messages.iter().map(|message| peer.seal(&framed(message))).collect();
        let bytes = wire.concat();
        let cut = cut.index(bytes.len() + 1);
        for piece in bytes[..cut].chunks(chunk) {
            peer.write_raw(piece);
            node.poll_ahead(0);
        }
        // Not a mere drop: what the peer did not read would turn its end into a reset.
        peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
        drive(&mut [&mut node], |n| !n[0].lost().is_empty());
        drop((peer, listener));
        let mut end = 0;
        let whole = messages.iter().zip(&wire).take_while(|(_, wire)| { end += wire.len(); end <= cut });
        let whole = whole.map(|(message, _)| message);
        let expected: Vec<&[u8]> = whole.filter(|message| !message.is_empty()).map(Vec::as_slice).collect();
        prop_assert_eq!(node.messages(), expected);
        prop_assert_eq!(node.lost(), [&LostReason::Closed]);
    }

    /// Arbitrary bytes after the welcome end in a loss or wait for more; they never panic.
    #[test]
    fn arbitrary_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 1..300),
        in_the_clear: bool,
        sealed: bool,
    ) {
        let (_listener, mut node, mut peer) = acceptor_and_peer(in_the_clear);
        let bytes = if sealed { peer.seal(&bytes) } else { bytes };
        // The other side may close, and reset, in the middle.
        let _ = peer.stream.write_all(&bytes);
        drop(peer);
        drive(&mut [&mut node], |n| !n[0].lost().is_empty());
    }
}
