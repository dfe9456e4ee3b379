//! Two ends with a faithful wire between them, driven at random; and each end against any nonsense.

use super::*;
use proptest::prelude::*;

const RING: usize = MIN_RING_BYTES;

#[derive(Debug, Clone, Copy)]
enum Arrival {
    Record { offset: usize, bytes: usize, header: Header },
    Credit(u32),
}

/// One replica: a sender, a receiver, what is on its way to it, and its device's work that is not completed.
struct End {
    sender: Sender,
    receiver: Receiver,
    arrivals: VecDeque<Arrival>,
    posted: VecDeque<Work>,
    /// Which record each byte of the peer's ring and of the mirror belongs to until the peer has read it and the device is done.
    peer_ring: Vec<Option<u64>>,
    sent: u64,
    read: u64,
    used_receives: usize,
    receives: usize,
}

impl End {
    fn new() -> End {
        End {
            sender: Sender::new(RING),
            receiver: Receiver::new(RING),
            arrivals: VecDeque::new(),
            posted: VecDeque::new(),
            peer_ring: vec![None; RING],
            sent: 0,
            read: 0,
            used_receives: 0,
            receives: RECEIVES,
        }
    }
}

struct Pair([End; 2]);

impl Pair {
    fn send(&mut self, from: usize, payload: usize) -> bool {
        let [me, peer] = self.both(from);
        let credit = me.receiver.credit();
        let Some(slot) = me.sender.reserve(payload, false, credit) else { return false };
        me.receiver.told();
        let bytes = HEADER_BYTES + payload;
        for byte in &mut me.peer_ring[slot.offset..slot.offset + bytes] {
            assert_eq!(*byte, None, "a place is used again that was not free");
            *byte = Some(me.sent);
        }
        me.sent += 1;
        me.posted.push_back(slot.work);
        let offset = match Immediate::decode(Immediate::Record { offset: slot.offset }.encode()) {
            Immediate::Record { offset } => offset,
            Immediate::Credit { .. } => panic!("a record became a credit"),
        };
        let header = Header::decode(slot.header.encode());
        peer.arrive(Arrival::Record { offset, bytes, header });
        true
    }

    fn both(&mut self, first: usize) -> [&mut End; 2] {
        let [a, b] = &mut self.0;
        if first == 0 { [a, b] } else { [b, a] }
    }

    /// The replica looks, and does what the lane does. `budget` records or credits.
    fn pump(&mut self, at: usize, budget: usize) {
        let [me, peer] = self.both(at);
        for _ in 0..budget {
            let Some(arrival) = me.arrivals.pop_front() else { break };
            me.used_receives += 1;
            match arrival {
                Arrival::Credit(count) => me.sender.credit_by_immediate(count).unwrap(),
                Arrival::Record { offset, bytes, header } => {
                    me.receiver.locate(offset, bytes).unwrap();
                    me.receiver.take(offset, bytes, header).unwrap();
                    me.sender.credit_by_header(header).unwrap();
                    for byte in &mut peer.peer_ring[offset..offset + bytes] {
                        assert_eq!(byte.take(), Some(me.read), "a record was overwritten before it was read");
                    }
                    me.read += 1;
                }
            }
        }
        if me.used_receives >= REPOST {
            me.receives += me.used_receives;
            me.used_receives = 0;
        }
        if me.receiver.credit_is_due()
            && let Some(work) = me.sender.reserve_credit()
        {
            me.posted.push_back(work);
            let Immediate::Credit { count } =
                Immediate::decode(Immediate::Credit { count: me.receiver.credit() }.encode())
            else {
                panic!("a credit became a record");
            };
            peer.arrive(Arrival::Credit(count));
            me.receiver.told();
        }
    }

    /// The device completes some of its work, in order.
    fn complete(&mut self, at: usize, count: usize) {
        let [me, _] = self.both(at);
        assert!(me.posted.len() <= SEND_WORK, "more work than the queue has places");
        let done: Vec<Work> = me.posted.drain(..count.min(me.posted.len())).collect();
        for work in done.into_iter().filter(|work| work.signal) {
            me.sender.complete(work.id).unwrap();
        }
    }
}

impl End {
    fn arrive(&mut self, arrival: Arrival) {
        self.receives = self.receives.checked_sub(1).expect("a write with immediate data finds no receive");
        self.arrivals.push_back(arrival);
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Send(usize, usize),
    Pump(usize, usize),
    Complete(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let payload = prop_oneof![3 => 1..40usize, 1 => 1..=max_payload_bytes(RING)];
    prop_oneof![
        4 => (0..2usize, payload).prop_map(|(at, bytes)| Step::Send(at, bytes)),
        1 => (0..2usize, 1..200usize).prop_map(|(at, budget)| Step::Pump(at, budget)),
        1 => (0..2usize, 1..200usize).prop_map(|(at, count)| Step::Complete(at, count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn nothing_is_overwritten_lost_or_stuck(steps in prop::collection::vec(step(), 1..2000)) {
        let mut pair = Pair([End::new(), End::new()]);
        for step in steps {
            match step {
                Step::Send(at, bytes) => drop(pair.send(at, bytes)),
                Step::Pump(at, budget) => pair.pump(at, budget),
                Step::Complete(at, count) => pair.complete(at, count),
            }
        }
        // When both look and the devices work, the longest record goes within two rounds, whatever was before.
        for at in [0, 1] {
            for round in 0.. {
                for end in [0, 1] {
                    pair.complete(end, usize::MAX);
                    pair.pump(end, usize::MAX);
                }
                if pair.send(at, max_payload_bytes(RING)) {
                    break;
                }
                prop_assert!(round < 2, "the sender is stuck");
            }
        }
        for _ in 0..2 {
            pair.pump(0, usize::MAX);
            pair.pump(1, usize::MAX);
        }
        prop_assert_eq!((pair.0[0].sent, pair.0[1].sent), (pair.0[1].read, pair.0[0].read));
    }

    #[test]
    fn any_immediate_and_header_is_taken_or_refused(
        immediate: u32, bytes: u32, header: [u8; HEADER_BYTES], good in 0..40usize, like_good: bool,
    ) {
        let mut pair = Pair([End::new(), End::new()]);
        for _ in 0..good {
            pair.send(0, 64);
            pair.pump(1, 1);
            pair.complete(0, 1);
        }
        let End { sender, receiver, .. } = &mut pair.0[1];
        match Immediate::decode(immediate) {
            // Nothing was sent by this end, so that nothing can be credited.
            Immediate::Credit { count } => prop_assert_eq!(sender.credit_by_immediate(count).is_ok(), count == 0),
            Immediate::Record { offset } => {
                let tail = good * 80;
                let (offset, bytes) = if like_good { (tail % RING, bytes as usize % 700) } else { (offset, bytes as usize) };
                if receiver.locate(offset, bytes).is_ok() {
                    prop_assert!(offset + bytes <= RING && bytes > HEADER_BYTES, "{offset} {bytes}");
                    let header = Header::decode(header);
                    let good_header = header.number as usize == good
                        && header.length_bytes as usize == bytes - HEADER_BYTES
                        && header.flags <= 1;
                    prop_assert_eq!(receiver.take(offset, bytes, header).is_ok(), good_header);
                }
            }
        }
    }
}

#[test]
fn a_sender_without_answers_stops_in_time() {
    for payload in [1, 100, max_payload_bytes(RING)] {
        let mut pair = Pair([End::new(), End::new()]);
        let mut sent = 0;
        while pair.send(0, payload) {
            pair.complete(0, usize::MAX);
            sent += 1;
        }
        assert_eq!(sent, (RING / padded(HEADER_BYTES + payload)).min(MAX_RECORDS), "records of {payload} bytes");
    }
    // Nor without completions.
    let mut pair = Pair([End::new(), End::new()]);
    while pair.send(0, 1) {
        pair.pump(1, 1);
        pair.pump(0, 1);
    }
    assert!(pair.0[0].posted.len() <= SEND_WORK && pair.0[0].sent >= (RING / 32) as u64);
}

#[test]
fn a_credit_for_what_was_not_sent_is_refused() {
    let mut sender = Sender::new(RING);
    for _ in 0..3 {
        sender.reserve(1, false, 0).unwrap();
    }
    assert_eq!(sender.credit_by_immediate(2), Ok(()));
    assert_eq!(sender.credit_by_immediate(4), Err(Violation::Credit { credited: 2, sent: 1 }));
    // Fewer than before.
    assert!(sender.credit_by_immediate(1).is_err());
    assert_eq!(sender.credit_by_immediate(3), Ok(()));
}

proptest! {
    #[test]
    fn only_what_was_posted_completes(posted in 1..100u64, ids in prop::collection::vec(prop_oneof![4 => 0..110u64, 1 => any::<u64>()], 1..50)) {
        let mut sender = Sender::new(RING);
        for _ in 0..posted {
            sender.reserve(1, false, 0).unwrap();
        }
        let mut first = 0;
        for id in ids {
            let right = (first..posted).contains(&id);
            let wrong = Violation::Completion { id, first, end: posted };
            prop_assert_eq!(sender.complete(id), if right { Ok(()) } else { Err(wrong) });
            first = if right { id + 1 } else { first };
            prop_assert_eq!(sender.has_work(), first < posted);
        }
    }
}

#[test]
fn counts_wrap_on_the_wire() {
    let mut sender = Sender::new(RING);
    let wrap = u64::from(u32::MAX >> 1);
    (sender.sent, sender.credited) = (wrap + 2, wrap);
    assert_eq!(sender.credit_by_immediate(1), Ok(()), "wraps past 2³¹");
    assert_eq!(sender.credited, wrap + 2);
}
