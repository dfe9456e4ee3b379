//! The cases of the bulk lane.

use super::bed::{Bed, End};
use crate::fabric::FabricConfig;
use crate::fabric::bulk::{BulkError, BulkLink, MAX_BULK_MESSAGE_BYTES};
use std::io::IoSlice;
use std::thread;
use std::time::{Duration, Instant};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(40)
}

fn ends(bed: &mut dyn Bed) -> (End, End) {
    (bed.end(0, &FabricConfig::default()), bed.end(1, &FabricConfig::default()))
}

/// Links of both ends; nothing has crossed yet.
fn links(left: &End, right: &End) -> (BulkLink, BulkLink) {
    let near = left.bulk.dial(left.peer, 3, 14, soon()).expect("it is there");
    let incoming = right.bulk.wait(soon()).expect("it was dialed");
    assert_eq!((incoming.peer, incoming.view, incoming.number), (right.peer, 3, 14));
    (near, incoming.link)
}

fn bytes_of(number: u16, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 255) as u8 ^ number as u8).collect()
}

fn send(link: &mut BulkLink, kind: u16, bytes: &[u8]) -> Result<(), BulkError> {
    let slices: Vec<IoSlice<'_>> = bytes.chunks(1 + bytes.len() / 3000).map(IoSlice::new).collect();
    link.send(kind, &slices, soon())
}

pub(super) fn messages(bed: &mut dyn Bed) {
    let (left, right) = ends(bed);
    let (mut near, mut far) = links(&left, &right);
    let lens = [0, 1, 4096, (256 << 10) - 8, (256 << 10) - 7, 300_000, MAX_BULK_MESSAGE_BYTES, 70_000];
    let echo = thread::spawn(move || {
        let mut buf = Vec::new();
        for _ in lens {
            let kind = far.recv(&mut buf, soon()).unwrap();
            send(&mut far, kind + 1, &buf).unwrap();
        }
        // And then only one way, more than any ring holds.
        for number in 0..12 {
            assert_eq!(far.recv(&mut buf, soon()).unwrap(), number);
            assert!(buf == bytes_of(number, MAX_BULK_MESSAGE_BYTES), "message {number}");
        }
        far
    });
    let mut buf = Vec::new();
    for (kind, len) in (0..).zip(lens) {
        let bytes = bytes_of(kind, len);
        send(&mut near, kind * 10, &bytes).unwrap();
        assert_eq!(near.recv(&mut buf, soon()).unwrap(), kind * 10 + 1);
        assert!(buf == bytes, "message of {len} bytes");
    }
    for number in 0..12 {
        send(&mut near, number, &bytes_of(number, MAX_BULK_MESSAGE_BYTES)).unwrap();
    }
    drop(echo.join().expect("the other side is content"));
}

pub(super) fn deadlines(bed: &mut dyn Bed) {
    let (left, right) = ends(bed);
    let (mut near, mut far) = links(&left, &right);
    let mut buf = Vec::new();
    // Before anything has crossed, a lane's set-up included.
    let error = far.recv(&mut buf, Instant::now() + Duration::from_millis(30)).unwrap_err();
    assert!(error.is_timeout(), "{error}");
    let sender = thread::spawn(move || {
        send(&mut near, 1, b"late").unwrap();
        near
    });
    assert_eq!(far.recv(&mut buf, soon()), Ok(1));
    assert_eq!(buf, b"late");
    let error = far.recv(&mut buf, Instant::now() + Duration::from_millis(30)).unwrap_err();
    assert!(error.is_timeout(), "{error}");
    // A receiver that stops costs the sender its deadline and the link.
    let mut near = sender.join().expect("it was received");
    let bytes = vec![0; MAX_BULK_MESSAGE_BYTES];
    let start = Instant::now();
    let error = loop {
        if let Err(error) = near.send(1, &[IoSlice::new(&bytes)], Instant::now() + Duration::from_millis(100)) {
            break error;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "nothing bounds what is in flight");
    };
    assert!(error.is_timeout(), "{error}");
    assert!(near.send(1, &[], soon()).is_err(), "half a message is out");
    // Cancellation ends a call that waits.
    let (near, mut far) = links(&left, &right);
    let (cancel, mut waiting) = (near.cancel_handle(), near);
    let waiter = thread::spawn(move || waiting.recv(&mut Vec::new(), soon()));
    let heard = far.recv(&mut Vec::new(), Instant::now() + Duration::from_millis(20)).unwrap_err();
    assert!(heard.is_timeout(), "{heard}");
    cancel.cancel();
    let error = waiter.join().expect("no panic").expect_err("nothing was sent");
    assert!(error.is_cancelled(), "{error}");
    let error = far.recv(&mut Vec::new(), soon()).unwrap_err();
    assert!(error.is_peer_lost(), "{error}");
}

pub(super) fn death(bed: &mut dyn Bed) {
    let (left, right) = ends(bed);
    for dialer_dies in [true, false] {
        // A receiver dies while it is sent to.
        let (near, far) = links(&left, &right);
        let (mut dies, mut stays) = if dialer_dies { (near, far) } else { (far, near) };
        let receiver = thread::spawn(move || dies.recv(&mut Vec::new(), soon()));
        let bytes = bytes_of(7, MAX_BULK_MESSAGE_BYTES);
        let start = Instant::now();
        let error = loop {
            if let Err(error) = send(&mut stays, 7, &bytes) {
                break error;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "nobody takes this");
        };
        assert!(error.is_peer_lost(), "{error}");
        assert_eq!(receiver.join().expect("no panic"), Ok(7));
        // A sender dies; what it sent whole arrives.
        let (near, far) = links(&left, &right);
        let (mut dies, mut stays) = if dialer_dies { (near, far) } else { (far, near) };
        let sender = thread::spawn(move || {
            for number in 0..3 {
                send(&mut dies, number, &bytes_of(number, 900_000)).unwrap();
            }
        });
        let mut buf = Vec::new();
        for number in 0..3 {
            assert_eq!(stays.recv(&mut buf, soon()), Ok(number));
            assert!(buf == bytes_of(number, 900_000), "message {number}");
        }
        sender.join().expect("it could send");
        let error = stays.recv(&mut buf, soon()).unwrap_err();
        assert!(error.is_peer_lost(), "{error}");
    }
}
