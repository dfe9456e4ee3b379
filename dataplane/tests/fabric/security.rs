//! What the key protects from: strangers, recordings, changed bytes, and nodes that are set up differently.

use crate::common::{
    GROUP, Log, Node, RawHello, RawPeer, Seen, drive, encrypted, framed, listen, listen_with, replicas,
};
use dataplane::fabric::bulk::BulkError;
use dataplane::fabric::{Fabric, FabricConfig, FabricKey, Listener, LostReason, PeerId, RefusalCode, Security};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

const B: PeerId = PeerId(1);
const REMEDY: &str = "copy the same key file";

fn other_key() -> Security {
    Security::Encrypted(FabricKey::from_bytes([9; 32]))
}

/// Replica 1 alone, with the key.
fn acceptor() -> (Listener, Node) {
    let listener = listen("node1", 101);
    let addrs = [listener.local_addr(), listener.local_addr()];
    let node = Node::new(&listener, &addrs, 1, FabricConfig::default());
    (listener, node)
}

fn welcomed(listener: &Listener, node: &mut Node) -> RawPeer {
    let mut peer = RawHello::good(7).dial(listener.local_addr());
    let before = node.connections().len();
    drive(&mut [node], |n| n[0].connections().len() > before);
    assert_eq!(peer.read_answer().0, 0);
    peer
}

/// After whatever was tried: the first connection lives, nothing was delivered, and the port still works.
fn assert_no_effect(node: &mut Node, first: &mut RawPeer, before: &[Seen]) {
    first.write(&framed(b"still here"));
    drive(&mut [node], |n| !n[0].messages().is_empty());
    assert_eq!(node.seen[before.len()..], [Seen::Message(0, b"still here".to_vec())]);
}

/// Dials from node 0 with `ours` to node 1 with `theirs`, and returns the refusal that both heard of.
fn refused(ours: Security, theirs: Security) -> (RefusalCode, String, String) {
    let log = Log::start();
    let (left, right) = (listen_with("node0", 100, ours), listen_with("node1", 101, theirs));
    let addrs = [left.local_addr(), right.local_addr()];
    let mut a = Node::new(&left, &addrs, 0, FabricConfig::default());
    let mut b = Node::new(&right, &addrs, 1, FabricConfig::default());
    drive(&mut [&mut a, &mut b], |n| !n[0].seen.is_empty());
    let Seen::Refused(1, refusal) = &a.seen[0] else { panic!("{:?}", a.seen) };
    assert_eq!(a.fabric.trouble(B), Some(refusal.text.as_str()));
    assert!(!a.fabric.is_connected(B));
    assert_eq!(b.seen, [], "the refused one has no effect");
    let port = left.register("bulk", replicas(&addrs), PeerId(0)).unwrap();
    let error = port.bulk.dial(B, 1, 1, Instant::now() + Duration::from_secs(20)).unwrap_err();
    assert!(matches!(&error, BulkError::Refused(same) if same == refusal), "{error}");
    let lines = log.wait_for(&[&refusal.text, "refused a fabric connection", "addr=127.0.0.1:"]);
    (refusal.code, refusal.text.clone(), lines[0].clone())
}

#[test]
fn a_wrong_key_is_refused_and_both_sides_say_what_to_do() {
    let (code, text, line) = refused(other_key(), encrypted());
    assert_eq!(code, RefusalCode::WrongKey);
    assert!(text.contains("the fabric key differs") && text.contains(REMEDY), "{text}");
    assert!(line.contains("WARN"), "{line}");
}

#[test]
fn a_key_is_changed_node_by_node_without_a_refusal() {
    let hex = |byte: u8| format!("{byte:02x}").repeat(32);
    let (old, new) = (hex(1), hex(2));
    let both = |first: &str, second: &str| format!("{first}\n{second}\n");
    // Each step of each node, next to the other node one step behind or ahead.
    let steps = [old.clone(), both(&old, &new), both(&new, &old), new.clone()];
    for (ours, theirs) in steps.windows(2).flat_map(|pair| [(&pair[0], &pair[1]), (&pair[1], &pair[0])]) {
        let security = |text: &str| Security::Encrypted(key_file(text));
        let left = listen_with("node0", 100, security(ours));
        let right = listen_with("node1", 101, security(theirs));
        let addrs = [left.local_addr(), right.local_addr()];
        let mut a = Node::new(&left, &addrs, 0, FabricConfig::default());
        let mut b = Node::new(&right, &addrs, 1, FabricConfig::default());
        drive(&mut [&mut a, &mut b], |n| n.iter().all(|node| !node.seen.is_empty()));
        assert_eq!(a.seen, [Seen::Connected(1, 101)], "{ours} against {theirs}");
    }
    // Two steps at once are too many.
    let (code, ..) = refused(Security::Encrypted(key_file(&old)), Security::Encrypted(key_file(&new)));
    assert_eq!(code, RefusalCode::WrongKey);
}

/// A key as a node reads it.
fn key_file(text: &str) -> FabricKey {
    use std::os::unix::fs::OpenOptionsExt;
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("plover-keys-{}-{count}", std::process::id()));
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(&path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let key = FabricKey::load(&path);
    std::fs::remove_file(&path).unwrap();
    key.unwrap()
}

#[test]
fn a_node_that_encrypts_and_one_that_does_not_refuse_each_other() {
    for (ours, theirs) in [(Security::Insecure, encrypted()), (encrypted(), Security::Insecure)] {
        let (code, text, _) = refused(ours, theirs);
        assert_eq!(code, RefusalCode::Mode);
        assert!(text.contains("`insecure = true`") && text.contains("remove that"), "{text}");
    }
}

#[test]
fn the_warning_is_said_once_per_address_and_reason() {
    let log = Log::start();
    let listener = listen("node-of-the-rate-limit", 101);
    for _ in 0..20 {
        let hello = RawHello { key: [3; 32], ..RawHello::good(1) };
        assert_eq!(hello.dial(listener.local_addr()).read_answer().0, RefusalCode::WrongKey as u8);
    }
    // The tests of this program run side by side, but an unknown group is named in its line.
    for _ in 0..20 {
        let hello = RawHello { group: "of-the-rate-limit".to_owned(), ..RawHello::good(1) };
        assert_eq!(hello.dial(listener.local_addr()).read_answer().0, RefusalCode::UnknownGroup as u8);
    }
    let lines = log.wait_for(&["the node node-of-the-rate-limit does not serve the group of-the-rate-limit"]);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("WARN") && lines[0].contains("add it to the node's vms"), "{lines:?}");
}

#[test]
fn a_recorded_session_played_again_is_refused_and_has_no_effect() {
    let log = Log::start();
    let (listener, mut node) = acceptor();
    let mut first = welcomed(&listener, &mut node);
    // The same instance: would replace the live connection if it were believed.
    let recorded = first.sent.clone();
    let before = node.seen.clone();
    for end in [12 + 48, recorded.len()] {
        let mut replay = RawPeer::connect(listener.local_addr());
        replay.write_raw(&recorded[..end]);
        // The second Noise message is all that an attacker gets.
        assert_eq!(replay.read_raw(8 + 48)[..8], *b"PLVRNOIS");
        if end == recorded.len() {
            let addr = replay.addr().to_string();
            log.wait_for(&[&addr, "Forged", "repeats what it recorded"]);
            let mut rest = Vec::new();
            let _ = replay.stream.read_to_end(&mut rest);
            assert!(!contains(&rest, b"PLVR"), "the reason is for those who hold the key");
        }
    }
    assert_no_effect(&mut node, &mut first, &before);
}

#[test]
fn a_recorded_bulk_session_played_again_is_refused() {
    let (left, right) = (listen("node0", 100), listen("node1", 101));
    let addrs = [left.local_addr(), right.local_addr()];
    let port = right.register(GROUP, replicas(&addrs), B).unwrap();
    let mut first = RawHello { lane: 2, ..RawHello::good(7) }.dial(right.local_addr());
    assert_eq!(first.read_answer().0, 0);
    assert!(port.bulk.wait(Instant::now() + Duration::from_secs(20)).is_some());
    let mut replay = RawPeer::connect(right.local_addr());
    replay.write_raw(&first.sent.clone());
    replay.read_raw(8 + 48);
    let _ = replay.stream.read_to_end(&mut Vec::new());
    assert!(port.bulk.take().is_none());
}

#[test]
fn a_hello_that_ends_early_has_no_effect_and_is_logged() {
    let log = Log::start();
    let (listener, mut node) = acceptor();
    let mut first = welcomed(&listener, &mut node);
    let before = node.seen.clone();
    let hello = RawHello::good(7);
    for missing in [1, 10, 40] {
        let mut peer = hello.shake(listener.local_addr());
        let record = peer.seal(&hello.bytes());
        peer.write_raw(&record[..record.len() - missing]);
        peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(peer.has_ended());
    }
    // One line for all three: they come from one address.
    let lines = log.wait_for(&["closed it in the middle of its hello", "addr=127.0.0.1:"]);
    assert!(lines[0].contains("WARN") && lines[0].contains("NotPlover"), "{lines:?}");
    assert_no_effect(&mut node, &mut first, &before);
}

#[test]
fn a_hello_must_be_exactly_the_first_record() {
    let (listener, mut node) = acceptor();
    let mut first = welcomed(&listener, &mut node);
    let before = node.seen.clone();
    let hello = RawHello::good(7);
    let good = hello.bytes();
    for bytes in [&good[..good.len() - 1], &good[..1], &[&good[..], b"x"].concat(), &[0xff; 600]] {
        let mut peer = hello.shake(listener.local_addr());
        peer.write(bytes);
        let (code, _, why) = peer.read_answer();
        assert_eq!(code, RefusalCode::NotPlover as u8, "{why}");
    }
    // More may not follow before the answer.
    let mut peer = hello.shake(listener.local_addr());
    let wire = [peer.seal(&good), peer.seal(&framed(b"too early"))].concat();
    peer.write_raw(&wire);
    assert_eq!(peer.read_answer().0, RefusalCode::NotPlover as u8);
    assert_no_effect(&mut node, &mut first, &before);
}

#[test]
fn a_changed_doubled_or_missing_record_ends_the_connection() {
    type Change = fn([Vec<u8>; 3]) -> Vec<u8>;
    let changes: [(Change, usize); 5] = [
        (|[a, b, c]| [a, b, c].concat(), 3),
        (
            |[a, mut b, c]| {
                b[6] ^= 0x10;
                [a, b, c].concat()
            },
            1,
        ),
        (|[a, b, c]| [a.clone(), a, b, c].concat(), 1),
        (|[a, _, c]| [a, c].concat(), 1),
        (|[a, b, c]| [b, a, c].concat(), 0),
    ];
    for (change, delivered) in changes {
        let (listener, mut node) = acceptor();
        let mut peer = welcomed(&listener, &mut node);
        let records = [b"1", b"2", b"3"].map(|bytes| peer.seal(&framed(bytes)));
        peer.write_raw(&change(records));
        peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
        drive(&mut [&mut node], |n| !n[0].lost().is_empty());
        assert_eq!(node.messages().len(), delivered);
        match node.lost()[..] {
            [LostReason::Closed] => assert_eq!(delivered, 3),
            [LostReason::Forged(text)] => assert!(delivered < 3 && text.contains("did not encrypt"), "{text}"),
            _ => panic!("{:?}", node.lost()),
        }
    }
}

#[test]
fn nothing_of_what_is_said_crosses_the_wire_readably() {
    let (listener, mut node) = acceptor();
    let mut peer = welcomed(&listener, &mut node);
    peer.write(&framed(b"a secret to them"));
    node.fabric.send(PeerId(0), &[b"a secret to us"]).unwrap();
    drive(&mut [&mut node], |n| !n[0].messages().is_empty());
    while !contains(&peer.read(18), b"a secret to us") {}
    for bytes in [&peer.sent, &peer.received] {
        for word in [&b"secret"[..], GROUP.as_bytes(), b"node0", b"PLVRANSW"] {
            assert!(!contains(bytes, word), "{:?} in {bytes:?}", String::from_utf8_lossy(word));
        }
    }
}

fn contains(bytes: &[u8], word: &[u8]) -> bool {
    bytes.windows(word.len()).any(|window| window == word)
}

/// Node 0 dials a listener that the test plays; returns why there is no connection.
fn dial_impostor(play: fn(TcpStream)) -> String {
    let impostor = TcpListener::bind("127.0.0.1:0").unwrap();
    let left = listen("node0", 100);
    let addrs = [left.local_addr(), impostor.local_addr().unwrap()];
    let mut a = Node::new(&left, &addrs, 0, FabricConfig::default());
    let playing = std::thread::spawn(move || {
        let (mut stream, _) = impostor.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.read_exact(&mut [0; 12 + 48]).unwrap();
        play(stream);
    });
    drive(&mut [&mut a], |n| n[0].fabric.trouble(B).is_some());
    let trouble = a.fabric.trouble(B).unwrap().to_owned();
    assert!(!a.fabric.is_connected(B) && a.connections().is_empty(), "{trouble}");
    playing.join().unwrap();
    trouble
}

#[test]
fn what_answers_without_the_key_is_not_believed() {
    let trouble = dial_impostor(|mut stream| stream.write_all(&[b"PLVRNOIS", &[7; 48][..]].concat()).unwrap());
    assert!(trouble.contains("does not hold the fabric key") && trouble.contains(REMEDY), "{trouble}");
    let trouble = dial_impostor(|mut stream| stream.write_all(&[b"PLVRANSW", &[0; 16][..]].concat()).unwrap());
    assert!(trouble.contains("in the clear"), "a welcome without encryption: {trouble}");
    let trouble = dial_impostor(|mut stream| {
        let unknown_group = [b"PLVRANSW", &[3][..], &[0; 15]].concat();
        stream.write_all(&unknown_group).unwrap();
    });
    assert!(trouble.contains("in the clear"), "{trouble}");
    let trouble = dial_impostor(|mut stream| stream.write_all(b"HTTP/1.1 400 Bad Request").unwrap());
    assert!(trouble.contains("does not speak Plover's fabric protocol"), "{trouble}");
}

#[test]
fn a_recorded_answer_is_not_believed() {
    let (listener, mut node) = acceptor();
    let mut peer = welcomed(&listener, &mut node);
    peer.write(&framed(b"x"));
    static RECORDED: std::sync::Mutex<Vec<u8>> = std::sync::Mutex::new(Vec::new());
    RECORDED.lock().unwrap().clone_from(&peer.received);
    let trouble = dial_impostor(|mut stream| stream.write_all(&RECORDED.lock().unwrap()).unwrap());
    assert!(trouble.contains("does not hold the fabric key"), "{trouble}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Garbage at any point of the handshake is refused or waited for, and has no effect.
    #[test]
    fn garbage_has_no_effect(
        bytes in prop::collection::vec(any::<u8>(), 1..200),
        stage in 0..4,
    ) {
        let (listener, mut node) = acceptor();
        let mut first = welcomed(&listener, &mut node);
        let before = node.seen.clone();
        let hello = RawHello::good(7);
        let mut peer = match stage {
            0 | 1 => RawPeer::connect(listener.local_addr()),
            _ => hello.shake(listener.local_addr()),
        };
        let bytes = match stage {
            1 => [hello.preamble(), bytes].concat(),
            3 => peer.seal(&bytes),
            _ => bytes,
        };
        let _ = peer.stream.write_all(&bytes);
        let _ = peer.stream.shutdown(std::net::Shutdown::Write);
        let _ = peer.stream.read_to_end(&mut Vec::new());
        assert_no_effect(&mut node, &mut first, &before);
    }
}
