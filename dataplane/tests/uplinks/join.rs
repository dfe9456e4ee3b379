//! What joining makes of a kernel's segments, another kernel takes for what was sent.

use crate::common::*;
use dataplane::batch::{self, BatchBuilder, MIN_BATCH_BYTES};
use dataplane::uplink::filter::Filter;
use dataplane::uplink::tap::Tap;
use dataplane::uplink::{Intake, OffloadFlags, Uplink};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

const PORT: u16 = 7777;
const STREAM_BYTES: usize = 4 << 20;
/// As a client of Redis writes a batch of requests.
const WRITE_BYTES: usize = 6848;
const LIMIT: Duration = Duration::from_secs(30);
/// Few enough that pieces of one write lie together in the TAP when it is looked at.
const LOOKS_APART: Duration = Duration::from_millis(1);

fn byte(place: usize) -> u8 {
    (place % 251) as u8
}

/// A TAP whose kernel side is in the namespace of this thread and has these addresses.
fn host(name: &str, last: u8) -> Tap {
    let mut tap = Tap::open(name, None).unwrap();
    tap.set_offload(OffloadFlags { csum: true, tso4: true, tso6: true, ecn: true }).unwrap();
    std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "0").unwrap();
    ip(&format!("addr add 10.9.9.{last}/24 dev {name}"));
    ip(&format!("addr add fd09::{last}/64 dev {name} nodad"));
    tap
}

/// Listens in a namespace of its own, hands its TAP over, and reads a stream to its end.
fn guest(address: &str, ready: &Sender<Tap>) {
    // SAFETY: unshare takes no pointers; a network namespace is a property of this thread alone.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
    let tap = host("plvtest1", 2);
    let listener = TcpListener::bind((address, PORT)).unwrap();
    listener.set_nonblocking(true).unwrap();
    ready.send(tap).unwrap();
    let deadline = Instant::now() + LIMIT;
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) => assert!(Instant::now() < deadline, "nobody connects"),
        }
        std::thread::sleep(LOOKS_APART);
    };
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), STREAM_BYTES);
    assert!(received.iter().enumerate().all(|(place, read)| *read == byte(place)), "the stream is another");
}

fn client(address: &str) {
    let address = std::net::SocketAddr::new(address.parse().unwrap(), PORT);
    let mut stream = TcpStream::connect_timeout(&address, LIMIT).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    let bytes: Vec<u8> = (0..STREAM_BYTES).map(byte).collect();
    bytes.chunks(WRITE_BYTES).for_each(|chunk| stream.write_all(chunk).unwrap());
}

/// Passes on what waits. Returns how many frames came, and how many they were when they left.
fn pass(from: &mut Tap, to: &mut Tap, batch: &mut BatchBuilder) -> (usize, usize) {
    let burst = from.recv_burst(&mut Intake::new(batch, &mut Filter::default()), 256).unwrap();
    let payload = batch.finish();
    let frames = batch::frames(&payload).unwrap();
    let sent = frames.map(|frame| assert!(to.send(frame).unwrap(), "the kernel refuses it")).count();
    (burst.frames, sent)
}

fn a_stream_arrives(to: &str) {
    let mut outside = host("plvtest0", 1);
    // What the kernel does by itself when round trips are long.
    ip("link set plvtest0 gso_max_segs 2");
    let (sender, receiver) = channel();
    let address = to.to_owned();
    let guest = std::thread::spawn(move || guest(&address, &sender));
    let mut inside = receiver.recv_timeout(LIMIT).unwrap();
    let address = to.to_owned();
    let client = std::thread::spawn(move || client(&address));
    let mut batch = BatchBuilder::new(4 * MIN_BATCH_BYTES);
    let (mut came, mut left) = (0, 0);
    let deadline = Instant::now() + LIMIT;
    while !guest.is_finished() {
        assert!(Instant::now() < deadline, "{came} frames came, and the stream has no end");
        let (pieces, frames) = pass(&mut outside, &mut inside, &mut batch);
        (came, left) = (came + pieces, left + frames);
        pass(&mut inside, &mut outside, &mut batch);
        std::thread::sleep(LOOKS_APART);
    }
    guest.join().unwrap();
    client.join().unwrap();
    println!("{came} frames became {left}");
    assert!(came > STREAM_BYTES / WRITE_BYTES, "{came} frames cannot be all");
    assert!(left * 2 < came, "of {came} frames, {left} remained");
}

#[test]
fn a_kernel_takes_what_was_joined_over_ipv4() {
    in_namespace(|| a_stream_arrives("10.9.9.2"));
}

#[test]
fn a_kernel_takes_what_was_joined_over_ipv6() {
    in_namespace(|| a_stream_arrives("fd09::2"));
}
