//! What a lane over RDMA must do, on one machine with a device: both ends in this process. Run in a guest with soft-RoCE.
//!
//! Cases panic when they fail, as tests do. What holds for every transport is not here but in the conformance suite.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_sys::{self as sys, Wc};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::lane::{Lane, LaneError, SetupContext};
use super::arena::Arena;
use super::lane::{PeerRing, RdmaLane};
use super::offer::Offer;
use super::ring::{HEADER_BYTES, Immediate, RECEIVES, SEND_WORK, Sender, max_payload_bytes};
use super::setup::RdmaSetup;
use crate::wait::now_us;

use super::verbs::{Depths, Id, Link, Memory, Write, status_text};

const RING_BYTES: usize = 1 << 18;
const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Nothing in here takes longer, under emulation and load.
const LIMIT: Duration = Duration::from_secs(60);

/// What must hold, and how it is tried on the device at an address.
pub type Case = (&'static str, fn(IpAddr));

/// All.
pub const CASES: [Case; 8] = [
    ("messages of all lengths arrive whole and in order", messages),
    ("a peer that does not take fills the lane, and nothing is lost", back_pressure),
    ("who sleeps is woken", wake_ups),
    ("a connection without the token is refused without effect", wrong_token),
    ("the end of the peer ends the lane", peer_ends),
    ("a write after deregistration fails and changes nothing", write_after_deregistration),
    ("a write after the end changes nothing", write_after_end),
    ("a peer that breaks the rules ends the lane", violations),
];

pub(super) fn context(address: IpAddr, we_dial: bool, ring_bytes: usize) -> SetupContext {
    let local = SocketAddr::new(address, 0);
    SetupContext {
        we_dial,
        local,
        peer: local,
        ring_bytes,
        max_message_bytes: MAX_MESSAGE_BYTES,
        max_queued_bytes: 1 << 17,
        deadline_us: now_us() + LIMIT.as_micros() as u64,
    }
}

/// Two lanes that are each other's peer.
pub(super) fn pair(address: IpAddr, ring_bytes: usize) -> [RdmaLane; 2] {
    let (mut dialer, dialers) = RdmaSetup::begin(&context(address, true, ring_bytes)).unwrap();
    let (mut listener, listeners) = RdmaSetup::begin(&context(address, false, ring_bytes)).unwrap();
    finish(&mut dialer, &dialers, &mut listener, &listeners)
}

fn finish(dialer: &mut RdmaSetup, dialers: &[u8], listener: &mut RdmaSetup, listeners: &[u8]) -> [RdmaLane; 2] {
    let start = Instant::now();
    let (mut first, mut second) = (None, None);
    loop {
        if first.is_none() {
            first = dialer.advance(listeners, now_us()).unwrap();
        }
        if second.is_none() {
            second = listener.advance(dialers, now_us()).unwrap();
        }
        match (first, second) {
            (Some(first), Some(second)) => return [first, second],
            unfinished => (first, second) = unfinished,
        }
        assert!(start.elapsed() < LIMIT, "the lanes are not up");
    }
}

/// Calls until it is true.
fn until(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < LIMIT, "gave up waiting for {what}");
    }
}

/// The bytes of message `number` of a length that follows from it.
fn message(number: u64) -> Vec<u8> {
    let mut word = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let longest = match number % 16 {
        0 => MAX_MESSAGE_BYTES,
        1..=3 => 2 * RING_BYTES,
        4..=7 => 5000,
        _ => 200,
    };
    let length = match number {
        16 => MAX_MESSAGE_BYTES,
        33 => max_payload_bytes(RING_BYTES),
        34 => max_payload_bytes(RING_BYTES) + 1,
        35 => 1,
        _ => 1 + (word >> 20) as usize % longest,
    };
    let mut bytes = vec![0; length];
    for chunk in bytes.chunks_mut(8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    bytes
}

fn messages(address: IpAddr) {
    const COUNT: u64 = 64;
    let mut lanes = pair(address, RING_BYTES);
    let (mut sent, mut received) = ([0; 2], [0; 2]);
    until("all messages", || {
        for end in [0, 1] {
            if sent[end] < COUNT {
                let bytes = message(sent[end]);
                let (front, back) = bytes.split_at(bytes.len() / 3);
                sent[end] += u64::from(lanes[end].send(&[front, &[], back]).is_ok());
            }
            let count = &mut received[end];
            lanes[end]
                .pump(&mut |bytes| {
                    assert!(bytes == message(*count), "message {count} arrives as it was sent");
                    *count += 1;
                })
                .unwrap();
        }
        received == [COUNT; 2]
    });
    assert!(lanes.iter().all(|lane| lane.queued_bytes() == 0), "all has left");
}

fn back_pressure(address: IpAddr) {
    let [mut from, mut to] = pair(address, RING_BYTES);
    for bytes in [1, 20_000] {
        let mut sent: u32 = 0;
        let piece = vec![7; bytes];
        // The peer does not look; its device alone takes what the ring holds.
        while from.send(&[&sent.to_le_bytes(), &piece]).is_ok() {
            sent += 1;
            from.pump(&mut |_| panic!("nobody sends")).unwrap();
            assert!(sent < 1 << 20, "the lane is bounded");
        }
        assert!(from.queued_bytes() > 0, "what does not fit waits");
        let mut received: u32 = 0;
        until("all messages", || {
            from.pump(&mut |_| panic!("nobody sends")).unwrap();
            to.pump(&mut |got| {
                assert!(got[..4] == received.to_le_bytes() && got[4..] == piece[..], "message {received}");
                received += 1;
            })
            .unwrap();
            received == sent
        });
    }
}

fn is_readable(lane: &RdmaLane, wait: Duration) -> bool {
    let fd = lane.event_fd().expect("an RDMA lane has one");
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let limit = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
    poll(&mut fds, Some(&limit)).unwrap() > 0
}

fn wake_ups(address: IpAddr) {
    let [mut from, mut to] = pair(address, RING_BYTES);
    // Also over the wrap of the ring and many credits.
    for round in 0..2000u32 {
        let mut got = 0;
        if !to.arm() {
            from.send(&[&round.to_le_bytes()]).unwrap();
            assert!(is_readable(&to, LIMIT), "round {round}: the sleeper is not woken");
        } else {
            from.send(&[&round.to_le_bytes()]).unwrap();
        }
        to.disarm();
        until("the message", || {
            got += to.pump(&mut |bytes| assert_eq!(bytes, round.to_le_bytes())).unwrap();
            from.pump(&mut |_| panic!("nobody sends")).unwrap();
            got == 1
        });
    }
    // What came before the arming is told by it.
    from.send(&[b"early"]).unwrap();
    until("arming to tell", || {
        let told = to.arm();
        to.disarm();
        told
    });
    until("the message", || to.pump(&mut |bytes| assert_eq!(bytes, b"early")).unwrap() == 1);
    // The peer's end wakes too.
    until("nothing more to come", || !to.arm());
    drop(from);
    assert!(is_readable(&to, LIMIT), "the end of the peer wakes the sleeper");
}

/// A connection as an outsider makes it: it knows the address and the port, and no token.
fn intrude(address: IpAddr, offer: &[u8], token: &[u8]) -> (Link, SocketAddr) {
    let id = Id::bind(address).unwrap();
    let memory = Memory::new(&id, RING_BYTES).unwrap();
    let to = Offer::decode(offer).unwrap().listens;
    id.resolve_addr(to, 2000).unwrap();
    await_event(&id, sys::CM_ADDR_RESOLVED);
    id.resolve_route(2000).unwrap();
    await_event(&id, sys::CM_ROUTE_RESOLVED);
    let link = Link::new(id, memory, Depths { sends: SEND_WORK, receives: RECEIVES }).unwrap();
    link.connect(token).unwrap();
    (link, to)
}

fn await_event(id: &Id, kind: u32) {
    let mut found = None;
    until("an event of the connection", || {
        found = id.next_event().unwrap();
        found.is_some()
    });
    let found = found.expect("awaited");
    assert_eq!(found.kind, kind, "{}", found.text());
}

fn wrong_token(address: IpAddr) {
    const REJECTED: u32 = 8;
    let (mut dialer, dialers) = RdmaSetup::begin(&context(address, true, RING_BYTES)).unwrap();
    let (mut listener, listeners) = RdmaSetup::begin(&context(address, false, RING_BYTES)).unwrap();
    for token in [&[0; 32][..], &[], &Offer::decode(&dialers).unwrap().token.0] {
        let (link, to) = intrude(address, &listeners, token);
        let mut answer = None;
        until("the refusal", || {
            assert!(
                listener.advance(&dialers, now_us()).unwrap().is_none(),
                "an outsider at {to} is taken for the peer"
            );
            answer = link.id().next_event().unwrap();
            answer.is_some()
        });
        let answer = answer.expect("awaited");
        assert_eq!(answer.kind, REJECTED, "{}", answer.text());
    }
    let [mut from, mut to] = finish(&mut dialer, &dialers, &mut listener, &listeners);
    from.send(&[b"the right one"]).unwrap();
    until("the message", || to.pump(&mut |bytes| assert_eq!(bytes, b"the right one")).unwrap() == 1);
}

fn end_of(lane: &mut RdmaLane) -> LaneError {
    let mut end = None;
    until("the end of the lane", || {
        end = lane.pump(&mut |_| {}).err();
        end.is_some()
    });
    let end = end.expect("awaited");
    assert_eq!(lane.pump(&mut |_| {}), Err(end.clone()), "the end is told again");
    assert!(lane.send(&[b"too late"]).is_err());
    end
}

fn peer_ends(address: IpAddr) {
    let [mut from, mut to] = pair(address, RING_BYTES);
    from.send(&[&[8; 5000]]).unwrap();
    from.send(&[b"last words"]).unwrap();
    drop(from);
    // Both are here before the end is told.
    let mut arrived = 0;
    until("the messages", || {
        arrived += to.pump(&mut |bytes| assert!(bytes == b"last words" || bytes == [8; 5000])).unwrap();
        arrived == 2
    });
    println!("   the lane says: {}", end_of(&mut to));
}

fn write_after_deregistration(address: IpAddr) {
    let [mut from, mut to] = pair(address, RING_BYTES);
    let (link, _) = to.take_apart();
    let arena = Arc::clone(link.memory().arena());
    // The queue pair stays, so that it is the registration, not the connection, that keeps the write out.
    link.deregister_ring();
    from.send(&[&[0xee; 500]]).unwrap();
    let end = end_of(&mut from).to_string();
    assert!(end.contains(&format!("status {}", sys::WC_REM_ACCESS_ERR)), "{end}");
    assert!(ring_is(&arena, 0), "the ring was written after its deregistration");
    println!("   the writer is told: {end}");
}

fn ring_is(arena: &Arena, value: u8) -> bool {
    let mut ring = Vec::new();
    arena.read_onto(0, RING_BYTES, &mut ring);
    ring.iter().all(|&byte| byte == value)
}

fn write_after_end(address: IpAddr) {
    let [mut from, mut to] = pair(address, RING_BYTES);
    // The memory outlives the lane here, so that one can see that nobody writes it.
    let arena = Arc::clone(to.take_apart().0.memory().arena());
    drop(to);
    arena.write(0, &vec![0x5a; RING_BYTES]);
    // The lane may not have noticed yet; its device tries.
    let (link, PeerRing { address: to, rkey }) = from.take_apart();
    let write = Write { id: 77, signal: true, immediate: None, from: 0, bytes: 4096, to, rkey };
    let outcome = match link.post_write(&write) {
        Ok(()) => status_of(link, 77),
        Err(error) => error.to_string(),
    };
    assert!(!outcome.contains("status 0"), "a write to a lane that is gone succeeds: {outcome}");
    assert!(ring_is(&arena, 0x5a), "the ring was written after its lane ended");
    println!("   the writer is told: {outcome}");
}

/// How the work request `id` ended.
fn status_of(link: &Link, id: u64) -> String {
    let mut found = None;
    until("a completion", || {
        let mut batch = [Wc::default(); 8];
        let count = link.poll(&mut batch).unwrap();
        found = batch[..count].iter().find(|done| done.wr_id == id).copied();
        found.is_some()
    });
    status_text(&found.expect("awaited"))
}

/// A peer whose device and connection are good, and who writes what no peer writes.
fn violations(address: IpAddr) {
    const AT: usize = RING_BYTES;
    let good = || Sender::new(RING_BYTES).reserve(64, false, 0).expect("the ring is empty");
    let record = |offset| Immediate::Record { offset }.encode();
    // The header, what of it is written to offset 0 of the ring, and the immediate data.
    let attempts: [(&str, [u8; HEADER_BYTES], usize, u32); 9] = [
        ("a place that is not next", good().header.encode(), 80, record(160)),
        ("a place beyond the ring", good().header.encode(), 80, record(RING_BYTES)),
        ("a place far beyond the ring", good().header.encode(), 80, record(u32::MAX as usize >> 1 << 4)),
        ("nothing at a place", good().header.encode(), 0, record(0)),
        ("less than a header", good().header.encode(), 8, record(0)),
        ("another length", with(good().header.encode(), 0, u32::MAX), 80, record(0)),
        ("unknown flags", with(good().header.encode(), 4, 6), 80, record(0)),
        ("another number", with(good().header.encode(), 8, 5), 80, record(0)),
        ("a credit for nothing", good().header.encode(), 0, Immediate::Credit { count: 3 }.encode()),
    ];
    for (what, header, bytes, immediate) in attempts {
        let [mut from, mut to] = pair(address, RING_BYTES);
        let (link, PeerRing { address: ring, rkey }) = from.take_apart();
        link.memory().arena().write(AT, &header);
        let write = Write { id: 0, signal: true, immediate: Some(immediate), from: 0, bytes, to: ring, rkey };
        link.post_write(&write).unwrap();
        let end = end_of(&mut to);
        assert!(matches!(end, LaneError::Violation { .. }), "{what}: {end}");
        println!("   {what}: {end}");
    }
}

fn with(mut header: [u8; HEADER_BYTES], at: usize, field: u32) -> [u8; HEADER_BYTES] {
    header[at..at + 4].copy_from_slice(&field.to_le_bytes());
    header
}

/// How much the device takes into its work requests, for the log.
pub fn inline_bytes(address: IpAddr) -> usize {
    let [mut lane, _peer] = pair(address, RING_BYTES);
    let (link, _) = lane.take_apart();
    assert!(link.completion_fd().as_fd().try_clone_to_owned().is_ok());
    link.inline_bytes()
}
