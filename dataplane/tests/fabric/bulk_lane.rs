//! The bulk lane: transfers between blocking threads, deadlines, cancellation.

use crate::common::{GROUP, RawHello, RawPeer, encrypted, listen_with, replicas};
use dataplane::fabric::bulk::{BulkError, BulkLink, MAX_BULK_MESSAGE_BYTES};
use dataplane::fabric::{BulkPort, GroupPort, Listener, PeerId, RefusalCode, Security};
use std::io::IoSlice;
use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const B: PeerId = PeerId(1);

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

struct Pair {
    left: GroupPort,
    right: GroupPort,
    _listeners: [Listener; 2],
}

fn pair() -> Pair {
    pair_with(&encrypted())
}

fn pair_with(security: &Security) -> Pair {
    let listeners = [listen_with("node0", 100, security.clone()), listen_with("node1", 101, security.clone())];
    let addrs = listeners.each_ref().map(Listener::local_addr);
    let left = listeners[0].register(GROUP, replicas(&addrs), PeerId(0)).unwrap();
    let right = listeners[1].register(GROUP, replicas(&addrs), B).unwrap();
    Pair { left, right, _listeners: listeners }
}

fn connect(from: &BulkPort, to: &BulkPort) -> (BulkLink, BulkLink) {
    let link = from.dial(B, 4, 17, soon()).unwrap();
    let incoming = to.wait(soon()).unwrap();
    assert_eq!((incoming.peer, incoming.instance), (PeerId(0), 100));
    assert_eq!((incoming.view, incoming.number), (4, 17));
    (link, incoming.link)
}

/// A bulk connection by hand, and the link at its other end.
fn raw_link(pair: &Pair) -> (RawPeer, BulkLink) {
    let mut peer = RawHello { lane: 2, ..RawHello::good(100) }.dial(pair._listeners[1].local_addr());
    assert_eq!(peer.read_answer().0, 0);
    (peer, pair.right.bulk.wait(soon()).unwrap().link)
}

#[test]
fn messages_of_all_sizes_arrive_both_ways() {
    // Per record a length and a tag; the header has a record of its own.
    let overhead = |len: usize| 18 * (1 + len.div_ceil(65_519));
    of_all_sizes(&encrypted(), overhead);
}

#[test]
fn messages_of_all_sizes_arrive_in_the_clear() {
    of_all_sizes(&Security::Insecure, |_| 0);
}

fn of_all_sizes(security: &Security, overhead: impl Fn(usize) -> usize) {
    let pair = pair_with(security);
    let (mut near, mut far) = connect(&pair.left.bulk, &pair.right.bulk);
    let lens = [0, 1, 4096, 65_519, 65_520, MAX_BULK_MESSAGE_BYTES, 70_000];
    let echo = std::thread::spawn(move || {
        let mut buf = Vec::new();
        for _ in 0..lens.len() {
            let kind = far.recv(&mut buf, soon()).unwrap();
            far.send(kind + 1, &[IoSlice::new(&buf)], soon()).unwrap();
        }
        far.progress().load(Ordering::Relaxed)
    });
    let mut buf = Vec::new();
    for (kind, len) in (0..).zip(lens) {
        let bytes: Vec<u8> = (0..len).map(|b| (b * 31) as u8).collect();
        // More slices than one system call takes.
        let slices: Vec<IoSlice<'_>> = bytes.chunks(1 + len / 3000).map(IoSlice::new).collect();
        near.send(kind * 10, &slices, soon()).unwrap();
        assert_eq!(near.recv(&mut buf, soon()).unwrap(), kind * 10 + 1);
        assert!(buf == bytes, "message of {len} bytes");
    }
    let total: usize = lens.iter().map(|&len| 2 * (len + 8 + overhead(len))).sum();
    assert_eq!(echo.join().unwrap(), total as u64);
}

#[test]
fn a_timeout_before_a_message_leaves_the_link_usable() {
    let pair = pair();
    let (mut near, mut far) = connect(&pair.left.bulk, &pair.right.bulk);
    let mut buf = Vec::new();
    let error = far.recv(&mut buf, Instant::now() + Duration::from_millis(30)).unwrap_err();
    assert!(error.is_timeout());
    near.send(1, &[IoSlice::new(b"late")], soon()).unwrap();
    assert_eq!(far.recv(&mut buf, soon()).unwrap(), 1);
    assert_eq!(buf, b"late");
}

#[test]
fn a_receiver_that_stops_reading_costs_the_sender_its_deadline_and_the_link() {
    let pair = pair();
    let (mut near, _far) = connect(&pair.left.bulk, &pair.right.bulk);
    let bytes = vec![0; MAX_BULK_MESSAGE_BYTES];
    let start = Instant::now();
    let error = loop {
        let deadline = Instant::now() + Duration::from_millis(100);
        if let Err(error) = near.send(1, &[IoSlice::new(&bytes)], deadline) {
            break error;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "nothing bounds what is in flight");
    };
    assert!(error.is_timeout());
    // Half a message is out: the stream means nothing any more, whatever the deadline.
    assert!(near.send(1, &[], soon()).is_err());
}

#[test]
fn cancel_ends_a_blocked_call_at_once_and_the_peer_sees_a_loss() {
    let pair = pair();
    let (mut near, mut far) = connect(&pair.left.bulk, &pair.right.bulk);
    let cancel = near.cancel_handle();
    let waiting = std::thread::spawn(move || {
        let start = Instant::now();
        let error = near.recv(&mut Vec::new(), soon()).unwrap_err();
        (error, start.elapsed(), near)
    });
    cancel.cancel();
    let (error, elapsed, mut near) = waiting.join().unwrap();
    assert!(error.is_cancelled(), "{error}");
    assert!(elapsed < Duration::from_secs(10));
    assert!(near.send(1, &[], soon()).unwrap_err().is_cancelled());
    assert!(far.recv(&mut Vec::new(), soon()).unwrap_err().is_peer_lost());
}

#[test]
fn a_peer_that_dies_inside_a_message_is_a_loss() {
    let pair = pair();
    let header = [100u8, 0, 0, 0, 1, 0, 0, 0];
    let message = [&header[..], &[9; 100]].concat();
    for cut in [0, 3, 8, 50, 107, 8 + 18 + 100] {
        let (mut peer, mut link) = raw_link(&pair);
        // The header in a record of its own, as a peer of ours sends it.
        let wire = [peer.seal(&header), peer.seal(&message[8..])].concat();
        peer.write_raw(&wire[..cut]);
        drop(peer);
        let error = link.recv(&mut Vec::new(), soon()).unwrap_err();
        assert!(error.is_peer_lost(), "cut at {cut}: {error}");
        assert_eq!(link.recv(&mut Vec::new(), soon()).unwrap_err(), error);
    }
}

#[test]
fn records_need_not_end_where_messages_do() {
    let pair = pair();
    let (mut peer, mut link) = raw_link(&pair);
    let message = |kind: u8, len: u8| [&[len, 0, 0, 0, kind, 0, 0, 0], &vec![kind; len.into()][..]].concat();
    let stream = [message(1, 100), message(2, 0), message(3, 7)].concat();
    for cut in [1, 8, 50, 110, 120] {
        let (first, second) = stream.split_at(cut);
        peer.write(first);
        peer.write(second);
        let mut buf = Vec::new();
        for (kind, len) in [(1, 100), (2, 0), (3, 7)] {
            assert_eq!(link.recv(&mut buf, soon()).unwrap(), kind);
            assert_eq!(buf, vec![kind as u8; len]);
        }
    }
}

#[test]
fn a_changed_record_ends_the_transfer_and_brings_nothing() {
    let pair = pair();
    for at in [0, 1, 2, 20, 26 + 2, 26 + 60] {
        let (mut peer, mut link) = raw_link(&pair);
        let mut wire = [peer.seal(&[100, 0, 0, 0, 1, 0, 0, 0]), peer.seal(&[9; 100])].concat();
        wire[at] ^= 1;
        peer.write_raw(&wire);
        peer.stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut buf = Vec::new();
        let error = link.recv(&mut buf, soon()).unwrap_err();
        // A changed length may also make it wait for bytes that do not come.
        assert!(matches!(error, BulkError::Protocol(_)) || at < 2 && error.is_peer_lost(), "{at}: {error}");
        assert!(buf.is_empty());
        assert_eq!(link.recv(&mut buf, soon()).unwrap_err(), error);
    }
}

#[test]
fn an_oversize_announcement_is_refused_before_memory_is_taken() {
    let pair = pair();
    let (mut peer, mut link) = raw_link(&pair);
    peer.write(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let mut buf = Vec::new();
    assert!(matches!(link.recv(&mut buf, soon()), Err(BulkError::Protocol(_))));
    assert!(buf.capacity() < MAX_BULK_MESSAGE_BYTES);
}

#[test]
fn a_dial_is_refused_with_the_reason_or_times_out() {
    let mut pair = pair();
    drop(pair.right.control);
    let error = pair.left.bulk.dial(B, 1, 1, soon()).unwrap_err();
    let BulkError::Refused(refusal) = &error else { panic!("{error}") };
    assert_eq!(refusal.code, RefusalCode::UnknownGroup);

    // A listener that never answers.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let addrs = [pair._listeners[0].local_addr(), mute.local_addr().unwrap()];
    drop(pair.left.control);
    pair.left = pair._listeners[0].register(GROUP, replicas(&addrs), PeerId(0)).unwrap();
    let error = pair.left.bulk.dial(B, 1, 1, Instant::now() + Duration::from_millis(50)).unwrap_err();
    assert!(error.is_timeout(), "{error}");
    drop(mute);
    let error = pair.left.bulk.dial(B, 1, 1, soon()).unwrap_err();
    assert!(error.is_peer_lost() && error.to_string().contains("refused"), "{error}");
}

#[test]
fn waiting_for_a_connection_ends_at_the_deadline() {
    let pair = pair();
    assert!(pair.right.bulk.wait(Instant::now() + Duration::from_millis(20)).is_none());
}
