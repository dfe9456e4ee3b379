//! The cases.

use super::bed::{Bed, End, drive};
use crate::fabric::middleware::Random;
use crate::fabric::{FabricConfig, LostReason, MAX_CONTROL_MESSAGE_BYTES};
use crate::wait::now_us;

/// So long that no ping, and no silence, hides a lost wake-up, µs.
const NEVER_US: u64 = 600_000_000;
const LONG_SLEEP_US: u64 = 30_000_000;

/// The message with that number of a sender: all lengths up to the longest, short ones as often as long ones.
fn message(sender: u8, number: u64) -> Vec<u8> {
    let mut random = Random::new(u64::from(sender) << 32 | number);
    let longest = (MAX_CONTROL_MESSAGE_BYTES as u64) >> random.below(23);
    let length = 1 + random.below(longest) as usize;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend(random.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Two ends that are connected.
fn pair(bed: &mut dyn Bed, config: &FabricConfig) -> (End, End) {
    let mut left = bed.end(0, config);
    let mut right = bed.end(1, config);
    drive(&mut left, &mut right, |left, right| left.connected.len() == 1 && right.connected.len() == 1);
    (left, right)
}

/// Checks what came of `sender`, `received` messages after the connection began.
fn check(end: &mut End, sender: u8, received: &mut u64) {
    while let Some(bytes) = end.messages.pop_front() {
        let expected = message(sender, *received);
        assert!(bytes == expected, "message {received}: {} bytes instead of {}", bytes.len(), expected.len());
        *received += 1;
    }
}

/// Sends and receives `count` messages.
fn exchange(end: &mut End, count: u64) {
    let (other, me) = (end.peer.0, 1 - end.peer.0);
    let (mut sent, mut received) = (0, 0);
    while sent < count || received < count || end.fabric.queued_bytes(end.peer) > 0 {
        for _ in 0..8 {
            if sent < count && end.send(&message(me, sent)) {
                sent += 1;
            }
        }
        end.step(LONG_SLEEP_US);
        check(end, other, &mut received);
    }
    assert!(end.lost.is_empty(), "{:?}", end.lost);
}

pub(super) fn order_and_completeness(bed: &mut dyn Bed) {
    let (mut left, mut right) = pair(bed, &FabricConfig::default());
    std::thread::scope(|threads| {
        threads.spawn(|| exchange(&mut left, 200));
        threads.spawn(|| exchange(&mut right, 200));
    });
}

pub(super) fn back_pressure(bed: &mut dyn Bed) {
    let config = FabricConfig {
        max_queued_bytes: 5 << 20,
        silence_timeout_us: NEVER_US,
        replace_after_us: NEVER_US,
        ..FabricConfig::default()
    };
    let (mut left, mut right) = pair(bed, &config);
    let (mut sent, mut bytes) = (0, 0);
    loop {
        let next = message(0, sent);
        if !left.send(&next) {
            break;
        }
        sent += 1;
        bytes += next.len();
        assert!(bytes < 256 << 20, "nothing bounds what is under way");
        left.poll_ahead(0);
    }
    let queued = left.fabric.queued_bytes(left.peer);
    assert!(queued > 0 && queued <= (5 << 20) + MAX_CONTROL_MESSAGE_BYTES + 4096, "{queued} bytes are queued");
    let mut received = 0;
    drive(&mut left, &mut right, |_, right| {
        check(right, 0, &mut received);
        received == sent
    });
    assert!(left.send(&message(0, sent)), "it was drained");
    drive(&mut left, &mut right, |_, right| {
        check(right, 0, &mut received);
        received == sent + 1
    });
    assert!(left.lost.is_empty() && right.lost.is_empty());
}

fn quiet() -> FabricConfig {
    FabricConfig {
        ping_us: NEVER_US,
        silence_timeout_us: NEVER_US,
        replace_after_us: NEVER_US,
        max_queued_bytes: 5 << 20,
        ..FabricConfig::default()
    }
}

/// Both sleep for each message, at moments that differ; nothing but the message itself wakes them.
pub(super) fn wake_ups(bed: &mut dyn Bed) {
    const TRIPS: u64 = 2_000;
    let (mut left, mut right) = pair(bed, &quiet());
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for _ in 0..TRIPS {
                wait_for_message(&mut right);
                let message = right.messages.pop_front().expect("just waited for");
                assert!(right.send(&message));
            }
        });
        let mut random = Random::new(1);
        for trip in 0..TRIPS {
            let until_us = now_us() + random.below(100);
            while now_us() < until_us {
                std::hint::spin_loop();
            }
            assert!(left.send(&trip.to_le_bytes()));
            wait_for_message(&mut left);
            assert_eq!(left.messages.pop_front().as_deref(), Some(&trip.to_le_bytes()[..]));
        }
    });
}

fn wait_for_message(end: &mut End) {
    while end.messages.is_empty() {
        end.step(LONG_SLEEP_US);
    }
}

/// The sender sleeps with bytes in its queue; only the receiver's progress wakes it.
pub(super) fn wake_ups_for_room(bed: &mut dyn Bed) {
    const MESSAGES: u64 = 150;
    let (mut left, mut right) = pair(bed, &quiet());
    std::thread::scope(|threads| {
        threads.spawn(|| {
            let mut random = Random::new(2);
            let mut received = 0;
            while received < MESSAGES {
                right.step(LONG_SLEEP_US);
                check(&mut right, 0, &mut received);
                let until_us = now_us() + random.below(500);
                while now_us() < until_us {
                    std::hint::spin_loop();
                }
            }
        });
        for number in 0..MESSAGES {
            while !left.send(&message(0, number)) {
                left.step(LONG_SLEEP_US);
            }
        }
        while left.fabric.queued_bytes(left.peer) > 0 {
            left.step(LONG_SLEEP_US);
        }
    });
}

pub(super) fn death_of_the_acceptor(bed: &mut dyn Bed) {
    death(bed, 1);
}

pub(super) fn death_of_the_dialer(bed: &mut dyn Bed) {
    death(bed, 0);
}

/// One side dies and comes back; the other stays.
fn death(bed: &mut dyn Bed, mortal: u8) {
    const ROUNDS: usize = 25;
    let config = FabricConfig { retry_us: 2_000, refused_retry_us: 2_000, ..FabricConfig::default() };
    let mut random = Random::new(u64::from(mortal));
    let mut stays = bed.end(1 - mortal, &config);
    for round in 0..ROUNDS {
        let mut dies = bed.end(mortal, &config);
        drive(&mut stays, &mut dies, |stays, dies| stays.connected.len() > round && !dies.connected.is_empty());
        let (mut to_mortal, mut to_other, mut at_mortal, mut at_other) = (0, 0, 0, 0);
        for _ in 0..random.below(30) {
            match random.below(4) {
                0 => to_mortal += u64::from(stays.send(&message(1 - mortal, to_mortal))),
                1 => to_other += u64::from(dies.send(&message(mortal, to_other))),
                2 => stays.step(0),
                _ => dies.step(0),
            }
            check(&mut stays, mortal, &mut at_other);
            check(&mut dies, 1 - mortal, &mut at_mortal);
        }
        drop(dies);
        let died_us = now_us();
        while stays.lost.len() == round {
            stays.step(LONG_SLEEP_US);
        }
        assert!(now_us() - died_us < 900_000, "only the silence told: {:?}", stays.lost.last());
        check(&mut stays, mortal, &mut at_other);
        assert!(at_other <= to_other && at_mortal <= to_mortal);
        assert!(!stays.fabric.is_connected(stays.peer));
        assert_eq!((stays.lost.len(), stays.connected.len()), (round + 1, round + 1));
    }
    let mut instances = stays.connected.clone();
    instances.dedup();
    assert_eq!(instances.len(), ROUNDS, "each process is another instance");
}

pub(super) fn kill(bed: &mut dyn Bed) {
    let config = FabricConfig { retry_us: 2_000, refused_retry_us: 2_000, ..FabricConfig::default() };
    let mut random = Random::new(3);
    let mut left = bed.end(0, &config);
    for round in 0..4 {
        let Some(mut child) = bed.child() else {
            return;
        };
        let until = 1 + random.below(12);
        let mut received = 0;
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            while received < until {
                left.step(LONG_SLEEP_US);
                check(&mut left, 1, &mut received);
            }
        }));
        // At a random moment of its work, and in any case: it does not end by itself.
        let until_us = now_us() + random.below(2_000);
        while now_us() < until_us {
            std::hint::spin_loop();
        }
        child.kill().expect("it runs");
        child.wait().expect("it ran");
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let died_us = now_us();
        while left.lost.len() == round {
            left.step(LONG_SLEEP_US);
            check(&mut left, 1, &mut received);
        }
        assert!(now_us() - died_us < 900_000, "only the silence told: {:?}", left.lost.last());
        assert_eq!(left.connected.len(), round + 1);
    }
}

/// What a child does in [`kill`].
pub(super) fn flood(end: &mut End) {
    let mut sent = 0;
    while end.lost.is_empty() {
        if !end.connected.is_empty() {
            sent += u64::from(end.send(&message(1, sent)));
        }
        end.step(1_000);
    }
}

pub(super) fn reconnect(bed: &mut dyn Bed) {
    let config = FabricConfig { retry_us: 2_000, ..FabricConfig::default() };
    let (mut left, mut right) = pair(bed, &config);
    for round in 1..=20 {
        let (breaks, other) = if round % 2 == 0 { (&mut left, &mut right) } else { (&mut right, &mut left) };
        // In the middle of something.
        other.send(&message(0, 0));
        breaks.send(&message(1, 0));
        breaks.fabric.disconnect(breaks.peer);
        assert!(!breaks.fabric.is_connected(breaks.peer));
        drive(breaks, other, |breaks, other| breaks.connected.len() > round && other.connected.len() > round);
        assert_eq!((breaks.lost.len(), other.lost.len()), (round, round));
        assert_eq!(breaks.lost.last(), Some(&LostReason::Disconnected));
        breaks.messages.clear();
        other.messages.clear();
        assert!(breaks.send(b"anew"));
        drive(breaks, other, |_, other| !other.messages.is_empty());
        assert_eq!(other.messages.pop_front().as_deref(), Some(&b"anew"[..]), "nothing of an earlier connection");
    }
}

pub(super) fn silence(bed: &mut dyn Bed) {
    let config = FabricConfig { retry_us: 2_000, ..FabricConfig::default() };
    let (mut left, mut right) = pair(bed, &config);
    // Pings alone keep a connection for longer than the silence that ends it.
    let until_us = now_us() + 1_300_000;
    drive(&mut left, &mut right, |_, _| now_us() > until_us);
    assert!(left.lost.is_empty() && right.lost.is_empty(), "{:?} {:?}", left.lost, right.lost);
    (0..=6).for_each(|step| left.poll_ahead(step * 200_000));
    assert!(matches!(left.lost[..], [LostReason::Silent { silent_us: 1_000_000.. }]), "{:?}", left.lost);
    drive(&mut left, &mut right, |left, right| left.connected.len() == 2 && right.connected.len() == 2);
}
