//! What a peer can send, without sockets: for fuzz targets and the properties in the unit tests.

use super::MAX_CONTROL_MESSAGE_BYTES;
use super::frames::Frames;
use super::hello::{Answer, Hello, Lane};
use super::lane::SetupContext;
use super::negotiation::Negotiation;
use super::secure::{Accept, Cipher, Dialer, FabricKey, Greeted, Records, Security};
use super::{PeerId, RefusalCode, Transport};
use crate::ring::{Assembly, Consumer, Heap, Memory, Producer};
use crate::turn::{Ends, HeapSide, SLOT_WORDS, SlotMemory};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// As long as what libFuzzer makes.
const RING_BYTES: usize = 4096;

/// One length of bytes at a time, so that every boundary is met.
const PIECES: [usize; 4] = [1, 7, 64, usize::MAX];

fn securities() -> [Security; 2] {
    [Security::Encrypted(FabricKey::from_bytes([7; 32])), Security::Insecure]
}

fn a_hello() -> Hello {
    let (group, node) = ("vm1".to_owned(), "node0".to_owned());
    let (lane, from, to, transport) = (Lane::Bulk, PeerId(0), PeerId(1), Transport::Tcp);
    Hello { lane, from, to, transport, instance: 1, view: 2, number: 3, group, node }
}

/// Both sides of an established connection, by a real handshake.
pub(super) fn ciphers() -> (Box<Cipher>, Box<Cipher>) {
    let [security, _] = securities();
    let (mut to_listener, mut to_dialer) = (Vec::new(), Vec::new());
    let mut dialer = Dialer::new(&security, &a_hello(), &mut to_listener);
    let mut accept = Accept::new(security);
    loop {
        let hello = accept.advance(&mut to_listener, &mut to_dialer).expect("a hello of ours is taken");
        if hello.is_some() {
            to_dialer.extend(accept.answer(&Answer::Welcome { instance: 1 }));
        }
        let greeted = dialer.advance(&mut to_dialer, &mut to_listener).expect("an answer of ours is taken");
        if let Some(Greeted::Welcome { cipher: Some(near), .. }) = greeted {
            return (near, accept.into_cipher().expect("the hello was taken"));
        }
    }
}

/// Everything that is read before the welcome, by either side.
///
/// # Panics
/// On a finding.
pub fn hello(bytes: &[u8]) {
    let _ = Hello::parse(bytes);
    let _ = Answer::parse(bytes);
    for security in securities() {
        for piece in PIECES {
            accept(security.clone(), bytes, piece);
            dial(&security, bytes, piece);
        }
    }
    hello_of_a_key_holder(bytes);
}

fn accept(security: Security, bytes: &[u8], piece: usize) {
    let encrypted = matches!(security, Security::Encrypted(_));
    let mut accept = Accept::new(security);
    let (mut received, mut out) = (Vec::new(), Vec::new());
    for piece in bytes.chunks(piece.min(bytes.len().max(1))) {
        received.extend_from_slice(piece);
        match accept.advance(&mut received, &mut out) {
            Ok(None) => {}
            Ok(Some(_)) => return assert!(!encrypted, "somebody without the key said hello"),
            Err(refusal) => {
                assert!(refusal.code != RefusalCode::Other && !refusal.text.is_empty());
                return drop(accept.answer(&Answer::Refused(refusal)));
            }
        }
    }
}

fn dial(security: &Security, bytes: &[u8], piece: usize) {
    let encrypted = matches!(security, Security::Encrypted(_));
    let (mut received, mut out) = (Vec::new(), Vec::new());
    let mut dialer = Dialer::new(security, &a_hello(), &mut out);
    for piece in bytes.chunks(piece.min(bytes.len().max(1))) {
        received.extend_from_slice(piece);
        match dialer.advance(&mut received, &mut out) {
            Ok(None) => assert!(dialer.missing_bytes(&received) > 0, "it waits for nothing"),
            Ok(Some(Greeted::Welcome { .. })) => return assert!(!encrypted, "somebody without the key said welcome"),
            Ok(Some(Greeted::Refused(_))) | Err(_) => return,
        }
    }
}

/// The bytes as the hello of somebody who holds the key: taken exactly if they are one.
fn hello_of_a_key_holder(bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    let [security, _] = securities();
    let (mut to_listener, mut to_dialer) = (Vec::new(), Vec::new());
    let mut dialer = Dialer::with_encoded(&security, bytes.to_vec(), &mut to_listener);
    let mut accept = Accept::new(security);
    let early = accept.advance(&mut to_listener, &mut to_dialer);
    assert!(matches!(early, Ok(None)), "the handshake comes first");
    let waiting = dialer.advance(&mut to_dialer, &mut to_listener);
    assert!(matches!(waiting, Ok(None)), "the answer comes last");
    match (accept.advance(&mut to_listener, &mut to_dialer), Hello::parse(bytes)) {
        (Ok(Some(got)), Ok(Some(sent))) => assert_eq!(got, sent),
        (Err(_), Ok(None) | Err(_)) => {}
        (got, sent) => panic!("{got:?} for {sent:?}"),
    }
}

/// The record layer, and the messages that the records bring on the control lane.
///
/// # Panics
/// On a finding.
pub fn frames(bytes: &[u8]) {
    for piece in PIECES {
        messages(bytes, piece);
    }
    let (mut near, mut far) = ciphers();
    // What no holder of the key wrote does not open.
    records(&mut far, bytes, &mut |_| panic!("forged bytes were delivered"));
    let mut wire = Vec::new();
    near.seal([bytes], &mut wire);
    let (_, mut far_again) = ciphers();
    records(&mut far_again, &wire, &mut |_| panic!("bytes of another connection were delivered"));
    let (mut near, mut far) = ciphers();
    wire.clear();
    near.seal([bytes], &mut wire);
    let mut stream = Vec::new();
    records(&mut far, &wire, &mut |plain| stream.extend_from_slice(plain));
    assert_eq!(stream, bytes, "a stream changed on its way through records");
}

/// What a peer says to set up a lane in memory, and what it may write into the ring then.
///
/// # Panics
/// On a finding.
pub fn lane(bytes: &[u8]) {
    let nowhere = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
    let context = SetupContext {
        we_dial: false,
        local: nowhere,
        peer: nowhere,
        ring_bytes: RING_BYTES,
        max_message_bytes: RING_BYTES,
        max_queued_bytes: 0,
        deadline_us: 0,
    };
    let (mut negotiation, _) = Negotiation::begin(Transport::Shm, &context).expect("the accepting side only waits");
    // Each message behind a byte that says how long it is.
    let mut rest = bytes;
    while let Some((&length, behind)) = rest.split_first() {
        let (message, behind) = behind.split_at(usize::from(length).min(behind.len()));
        let failed = negotiation.receive(message).is_err();
        let lane = negotiation.advance(0, &mut |_| panic!("nobody made a file, and yet it was mapped"));
        if failed || !matches!(lane, Ok(None)) {
            assert!(lane.map_or(true, |lane| lane.is_none()), "a lane out of nothing");
            break;
        }
        rest = behind;
    }
    ring_memory(bytes);
    slot_memory(bytes);
}

/// The slot, then the ring behind it.
fn slot_memory(bytes: &[u8]) {
    let [out, input] = HeapSide::pair(RING_BYTES);
    let (words, _) = bytes.as_chunks();
    let (slot, ring) = words.split_at(SLOT_WORDS.min(words.len()));
    for (word, value) in input.slot().iter().zip(slot).chain(input.words().iter().zip(ring)) {
        word.store(u64::from_le_bytes(*value), Ordering::Relaxed);
    }
    let mut end = Ends::new(out, input, false);
    let mut into = Assembly::default();
    for _ in 0..RING_BYTES {
        into.clear();
        match end.take(&mut into) {
            Ok(Some(_)) => assert!(into.bytes().len() <= end.max_record_bytes()),
            Ok(None) | Err(_) => break,
        }
    }
}

fn ring_memory(bytes: &[u8]) {
    let heap = Arc::new(Heap::new(RING_BYTES));
    let (words, _) = bytes.as_chunks();
    for (word, value) in heap.words().iter().zip(words) {
        word.store(u64::from_le_bytes(*value), Ordering::Relaxed);
    }
    let longest = Producer::new(Arc::clone(&heap)).max_record_bytes();
    let mut consumer = Consumer::new(heap);
    let mut into = Assembly::default();
    // Memory that never changes can be read round and round.
    for _ in 0..RING_BYTES {
        into.clear();
        match consumer.take(&mut into) {
            Ok(Some(_)) => assert!(into.bytes().len() <= longest),
            Ok(None) | Err(_) => break,
        }
    }
}

fn messages(bytes: &[u8], piece: usize) {
    let mut frames = Frames::new(&[]);
    let mut delivered = 0;
    for piece in bytes.chunks(piece.min(bytes.len().max(1))) {
        frames.room(piece.len())[..piece.len()].copy_from_slice(piece);
        frames.received(piece.len());
        let handed_out = frames.hand_out(&mut |message| {
            assert!((1..=MAX_CONTROL_MESSAGE_BYTES).contains(&message.len()));
            delivered += message.len() + 4;
        });
        if handed_out.is_err() {
            break;
        }
    }
    assert!(delivered <= bytes.len(), "more was delivered than came");
}

fn records(cipher: &mut Cipher, mut bytes: &[u8], deliver: &mut dyn FnMut(&[u8])) {
    let mut records = Records::new(&[]);
    let mut plain = vec![0; 1 << 16];
    while !bytes.is_empty() {
        let room = records.room();
        let take = room.len().min(bytes.len());
        room[..take].copy_from_slice(&bytes[..take]);
        records.received(take);
        bytes = &bytes[take..];
        while records.whole().is_some() {
            match records.open(cipher, &mut plain) {
                Ok(len) => deliver(&plain[..len]),
                Err(_) => return,
            }
        }
    }
}
