use super::*;
use crate::fabric::lane::{Lane, LaneError, LaneFull};
use crate::ring::{Assembly, Consumer, Control, Heap, Kind, Memory, Producer};
use crate::turn::{SLOT_WORDS, SlotMemory};
use mapping::SharedRing;
use proptest::prelude::*;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU64, Ordering};

const RING_BYTES: usize = 4096;
const MAX_PUMP_RECORDS: usize = 256;
const MOST_RECORDS: usize = 8192;

/// As the ring makes them: lap, kind and length.
fn mark((lap, kind, length): (u64, u64, u64)) -> u64 {
    lap << 23 | kind << 21 | length
}

fn context(we_dial: bool) -> SetupContext {
    let addr = "127.0.0.1:1".parse().unwrap();
    SetupContext {
        we_dial,
        local: addr,
        peer: addr,
        ring_bytes: RING_BYTES,
        max_message_bytes: 20_000,
        max_queued_bytes: 30_000,
        deadline_us: u64::MAX,
    }
}

fn up(setup: &mut dyn LaneSetup, offer: &[u8]) -> Box<dyn Lane> {
    match setup.complete(offer, 0) {
        Ok(SetupProgress::Up(lane)) => lane,
        Ok(SetupProgress::Pending) => panic!("nothing to wait for"),
        Err(error) => panic!("{error}"),
    }
}

fn failed(setup: &mut dyn LaneSetup, offer: &[u8]) -> String {
    match setup.complete(offer, 0) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("a lane came up"),
    }
}

fn path_of(offer: &[u8]) -> String {
    format!("/dev/shm/{}", std::str::from_utf8(&offer[FIXED_BYTES..]).unwrap())
}

fn pair() -> (Box<dyn Lane>, Box<dyn Lane>) {
    let (mut dialer, offer) = begin(&context(true)).unwrap();
    let (mut acceptor, answer) = begin(&context(false)).unwrap();
    (up(&mut *dialer, &answer), up(&mut *acceptor, &offer))
}

fn pump(lane: &mut dyn Lane) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    lane.pump(&mut |bytes| messages.push(bytes.to_vec())).unwrap();
    messages
}

#[test]
fn the_name_is_there_for_the_time_of_the_set_up_only() {
    let (mut dialer, offer) = begin(&context(true)).unwrap();
    let path = path_of(&offer);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let (mut acceptor, answer) = begin(&context(false)).unwrap();
    let mut near = up(&mut *dialer, &answer);
    // The other side comes later.
    assert!(std::fs::exists(&path).unwrap());
    let mut far = up(&mut *acceptor, &offer);
    near.peer_is_up();
    assert!(!std::fs::exists(&path).unwrap());
    near.send(&[b"to ", b"you"]).unwrap();
    far.send(&[b"to me"]).unwrap();
    assert_eq!((pump(&mut *far), pump(&mut *near)), (vec![b"to you".to_vec()], vec![b"to me".to_vec()]));
}

#[test]
fn an_abandoned_set_up_leaves_no_file() {
    let (setup, offer) = begin(&context(true)).unwrap();
    drop(setup);
    assert!(!std::fs::exists(path_of(&offer)).unwrap());
    let (mut setup, offer) = begin(&context(true)).unwrap();
    let (_, answer) = begin(&context(false)).unwrap();
    drop(up(&mut *setup, &answer));
    assert!(!std::fs::exists(path_of(&offer)).unwrap());
}

#[test]
fn the_sweep_takes_what_the_dead_left_and_nothing_else() {
    let (_setup, offer) = begin(&context(true)).unwrap();
    let dead = format!("/dev/shm/plover-lane-{:032x}", std::process::id());
    let foreign = format!("/dev/shm/plover-lane-{:031x}", std::process::id());
    std::fs::write(&dead, b"").unwrap();
    std::fs::write(&foreign, b"").unwrap();
    sweep();
    let left = [std::fs::exists(&dead), std::fs::exists(&foreign), std::fs::exists(path_of(&offer))];
    std::fs::remove_file(&foreign).unwrap();
    assert_eq!(left.map(Result::unwrap), [false, true, true]);
}

#[test]
fn only_a_file_as_we_make_it_is_opened() {
    let (_setup, offer) = begin(&context(true)).unwrap();
    let (mut acceptor, _) = begin(&context(false)).unwrap();
    let path = path_of(&offer);
    let moved = format!("{path}.moved");
    // A link, even to a good file.
    std::fs::rename(&path, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, &path).unwrap();
    let link = failed(&mut *acceptor, &offer);
    std::fs::rename(&moved, &path).unwrap();
    assert!(link.contains("cannot open"), "{link}");
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
    assert!(failed(&mut *acceptor, &offer).contains("100 bytes instead of 12288"));
    std::fs::remove_file(&path).unwrap();
    let absent = failed(&mut *acceptor, &offer);
    assert!(absent.contains("share one host") && absent.contains(&path), "{absent}");
    for name in ["../../etc/passwd", "plover-lane-0123456789abcdef0123456789abcdeF", "plover-lane-", ""] {
        let offer = [&offer[..FIXED_BYTES], name.as_bytes()].concat();
        assert!(failed(&mut *acceptor, &offer).contains("none of ours"), "{name}");
    }
    let mut other_size = offer.clone();
    other_size[4] ^= 1;
    assert!(failed(&mut *acceptor, &other_size).contains("one version"));
}

#[test]
fn messages_beyond_the_ring_wait_and_then_there_is_no_more_room() {
    let (mut near, mut far) = pair();
    let message = |number: usize| vec![number as u8; 1 + number * 1777 % 20_000];
    let mut accepted = 0;
    while near.send(&[&message(accepted)]) == Ok(()) {
        accepted += 1;
    }
    assert_eq!(near.send(&[&message(accepted)]), Err(LaneFull));
    assert!(near.queued_bytes() > 10_000 && near.queued_bytes() <= 30_000 + 200);
    let mut received = Vec::new();
    while received.len() < accepted {
        let messages = pump(&mut *far);
        assert!(!messages.is_empty() || near.queued_bytes() > 0);
        received.extend(messages);
        pump(&mut *near);
    }
    assert!(received.iter().enumerate().all(|(number, bytes)| *bytes == message(number)));
    assert_eq!(near.queued_bytes(), 0);
}

#[test]
fn a_sleeper_is_rung_for_once() {
    let (mut near, mut far) = pair();
    near.send(&[b"1"]).unwrap();
    assert!(!near.take_doorbell(), "nobody sleeps");
    assert!(far.arm(), "there is something already");
    assert_eq!(pump(&mut *far).len(), 1);
    far.disarm();
    assert!(!far.arm());
    near.send(&[b"2"]).unwrap();
    assert!(near.take_doorbell() && !near.take_doorbell());
    near.send(&[b"3"]).unwrap();
    assert!(!near.take_doorbell(), "the bell has rung");
    far.disarm();
    assert_eq!(pump(&mut *far).len(), 2);
    // A sender without room sleeps too.
    while near.queued_bytes() == 0 {
        near.send(&[&[0; 500]]).unwrap();
    }
    assert!(!near.arm());
    pump(&mut *far);
    assert!(far.take_doorbell());
}

/// Not by one message after the other either; and whoever pumps or wants to sleep is told all the same.
#[test]
fn a_look_for_an_answer_is_put_off_for_a_moment_only() {
    let (mut near, mut far) = pair();
    near.send(&[b"1"]).unwrap();
    far.send(&[b"2"]).unwrap();
    assert!(near.arm());
    near.disarm();
    assert_eq!((pump(&mut *near), pump(&mut *far)), (vec![b"2".to_vec()], vec![b"1".to_vec()]));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    let mut heard = 0;
    while heard < 3 {
        assert!(std::time::Instant::now() < deadline, "it never looks");
        near.send(&[b"more"]).unwrap();
        far.send(&[b"more"]).unwrap();
        heard += near.poll(&mut |bytes| assert_eq!(bytes, b"more")).unwrap().messages;
        pump(&mut *far);
    }
}

/// A sleeper that lay down long ago is seen without a fence, and rung for once altogether.
#[test]
fn an_early_look_for_a_sleeper_does_not_ring_twice() {
    let (mut near, mut far) = pair();
    assert!(!far.arm());
    near.send(&[b"1"]).unwrap();
    assert!(near.take_early_doorbell() && !near.take_early_doorbell() && !near.take_doorbell());
    far.disarm();
    assert_eq!(pump(&mut *far).len(), 1);
    near.send(&[b"2"]).unwrap();
    assert!(!near.take_early_doorbell() && !near.take_doorbell());
    assert!(far.arm(), "there is something already");
}

/// What a late writer of a dead pair writes stays in that pair's memory.
#[test]
fn a_new_pair_never_gets_the_memory_of_a_dead_one() {
    let (near, mut late) = pair();
    drop(near);
    let (mut near, mut far) = pair();
    for _ in 0..100 {
        late.send(&[&[0xee; 900]]).unwrap();
        if late.queued_bytes() > 0 {
            break;
        }
    }
    near.send(&[b"good"]).unwrap();
    assert_eq!(pump(&mut *far), [b"good"]);
    assert!(pump(&mut *near).is_empty());
}

/// Whoever sends without a pause is not listened to without a pause.
#[test]
fn a_pump_ends_and_leaves_the_rest_to_the_next() {
    let ring_bytes = 8 << 20;
    let context = SetupContext { ring_bytes, max_message_bytes: 3 << 20, ..context(false) };
    let taken = |lane: &mut dyn Lane| {
        let mut lens = Vec::new();
        lane.pump(&mut |bytes| lens.push(bytes.len())).unwrap();
        lens
    };
    // Records.
    let (mut lane, out, _in) = hostile_with(&context);
    let mut producer = Producer::new(out);
    for _ in 0..MAX_PUMP_RECORDS + 1 {
        assert_eq!(producer.push(Kind::Last, &[b"1"]), Ok(true));
    }
    assert_eq!(taken(&mut *lane).len(), MAX_PUMP_RECORDS);
    assert!(lane.arm(), "there is more");
    assert_eq!(taken(&mut *lane).len(), 1);
    // Bytes; the first message may have more of them.
    let long = vec![7; 1 << 20];
    for kind in [Kind::More, Kind::More, Kind::Last, Kind::Last] {
        assert_eq!(producer.push(kind, &[&long]), Ok(true));
    }
    assert_eq!(taken(&mut *lane), [3 << 20]);
    assert!(lane.arm(), "there is more");
    assert_eq!(taken(&mut *lane), [1 << 20]);
    assert!(!lane.arm());
    lane.disarm();
    // A message that comes byte by byte.
    for _ in 0..MOST_RECORDS + 5 {
        assert_eq!(producer.push(Kind::More, &[b"1"]), Ok(true));
    }
    producer.push(Kind::Last, &[b"1"]).unwrap();
    assert_eq!(taken(&mut *lane), []);
    assert!(lane.arm(), "there is more");
    assert_eq!(taken(&mut *lane), [MOST_RECORDS + 6]);
}

/// A mapping whose dialing side is the test itself.
fn hostile() -> (Box<dyn Lane>, SharedRing, SharedRing) {
    hostile_with(&context(false))
}

fn hostile_with(context: &SetupContext) -> (Box<dyn Lane>, SharedRing, SharedRing) {
    let bytes = context.ring_bytes;
    let file = NamedFile::create(mapping::file_bytes(bytes)).unwrap();
    let mapping = Arc::new(Mapping::new(file.fd(), bytes).unwrap());
    let (mut acceptor, offer) = begin(context).unwrap();
    let lane = up(&mut *acceptor, &[&offer, file.name().as_str().as_bytes()].concat());
    (lane, SharedRing::new(&mapping, Direction::FromDialer), SharedRing::new(&mapping, Direction::ToDialer))
}

/// The peer's control words, with records of one's own.
#[derive(Clone)]
struct Rogue {
    control: Arc<SharedRing>,
    words: Arc<Heap>,
}

impl Memory for Rogue {
    fn control(&self) -> &Control {
        self.control.control()
    }

    fn words(&self) -> &[AtomicU64] {
        self.words.words()
    }
}

#[test]
fn a_peer_without_manners_ends_the_lane() {
    let violation = |lane: &mut dyn Lane| match lane.pump(&mut |_| panic!("nothing good was sent")) {
        Err(LaneError::Violation { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    // An endless message.
    let (mut lane, out, _in) = hostile();
    let mut producer = Producer::new(out);
    let mut pumped = 0;
    let what = loop {
        while producer.push(Kind::More, &[&[1; 800]]) == Ok(true) {}
        match lane.pump(&mut |_| panic!("it has no end")) {
            Ok(_) => pumped += 1,
            Err(error) => break error.to_string(),
        }
    };
    assert!(pumped < 20 && what.contains("message of"), "{what}");
    // An empty one, and an empty part of one.
    for (first, kind) in [(&b""[..], Kind::Last), (b"", Kind::More), (b"some", Kind::More), (b"some", Kind::Last)] {
        let (mut lane, out, _in) = hostile();
        let mut producer = Producer::new(out);
        if !first.is_empty() {
            producer.push(Kind::More, &[first]).unwrap();
        }
        producer.push(kind, &[]).unwrap();
        assert!(violation(&mut *lane).contains("empty record"));
    }
    // A mark that begins no record.
    let (mut lane, out, _in) = hostile();
    out.words()[0].store(mark((1, 3, 0)), Ordering::Relaxed);
    assert!(violation(&mut *lane).contains("0x0000000000e00000"));
    // An empty message in the slot, and a mark that is none.
    let (mut lane, out, _in) = hostile();
    out.slot()[0].store(1 << 8, Ordering::Relaxed);
    assert!(violation(&mut *lane).contains("empty record"));
    let (mut lane, out, _in) = hostile();
    out.slot()[0].store(2 << 8 | 1, Ordering::Relaxed);
    assert!(violation(&mut *lane).contains("0x0000000000000201 into the slot"));
    // A position beyond what was written.
    let (mut lane, _out, input) = hostile();
    let rogue = Rogue { control: Arc::new(input), words: Arc::new(Heap::new(RING_BYTES)) };
    let (mut producer, mut consumer) = (Producer::new(rogue.clone()), Consumer::new(rogue));
    for _ in 0..100 {
        assert_eq!(producer.push(Kind::Last, &[&[0; 800]]), Ok(true));
        consumer.take(&mut Assembly::default()).unwrap();
    }
    while lane.pump(&mut |_| ()).is_ok() {
        let _ = lane.send(&[&[0; 1000]]);
    }
    assert!(violation(&mut *lane).contains("has read up to line"));
    assert!(lane.arm(), "an end is something");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn arbitrary_memory_never_panics(
        slot in prop::collection::vec((0usize..SLOT_WORDS, prop_oneof![any::<u64>(), (0u64..3, 0u64..4, 0u64..120).prop_map(|(position, number, length)| position << 32 | number << 8 | length)]), 0..20),
        words in prop::collection::vec((0usize..RING_BYTES / 8, prop_oneof![any::<u64>(), (0u64..3, 0u64..4, 0u64..2000).prop_map(mark)]), 1..100),
    ) {
        let (mut lane, out, _in) = hostile();
        out.words()[0].store(mark((1, 1, 8)), Ordering::Relaxed);
        let mut slot = slot.into_iter();
        for (at, word) in words {
            out.words()[at].store(word, Ordering::Relaxed);
            if let Some((at, word)) = slot.next() {
                out.slot()[at].store(word, Ordering::Relaxed);
            }
            let _ = lane.send(&[b"x"]);
            if lane.pump(&mut |bytes| assert!(bytes.len() <= 20_000)).is_err() {
                break;
            }
        }
    }

    #[test]
    fn arbitrary_offers_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..80), keep in 0usize..21) {
        let (mut dialer, offer) = begin(&context(true)).unwrap();
        let (mut acceptor, _) = begin(&context(false)).unwrap();
        let offer = [&offer[..keep], &bytes].concat();
        prop_assert!(acceptor.complete(&offer, 0).is_err());
        if offer.len() != FIXED_BYTES {
            prop_assert!(dialer.complete(&offer, 0).is_err());
        }
    }
}
