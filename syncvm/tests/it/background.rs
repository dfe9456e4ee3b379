//! Hashing between syncvms while both guests write: the syncvms must not notice.

use std::time::{Duration, Instant};

use crate::common::*;
use syncvm::Pairing;
use syncvm::exchange::{FollowerContext, LeaderContext, Parts};
use syncvm::hash::HashKind;

fn with_background(guest: FakeGuest, channel: MemoryChannel) -> Parts<FakeGuest, MemoryChannel, Watcher> {
    let mut parts = parts(guest, channel);
    parts.config.background_hashing = true;
    parts
}

/// Turns of both sides for a while, with a guest that writes between them. How many there were.
fn slot(leader: &mut Leader, follower: &mut Follower, time: Duration) -> usize {
    let start = Instant::now();
    let mut turns = 0;
    while start.elapsed() < time {
        let next = leader.hash_in_background().unwrap().expect("it is switched on");
        if next <= Instant::now() {
            turns += 1;
            leader.guest.run_a_while();
        }
        if follower.hash_in_background().unwrap().is_some_and(|next| next <= Instant::now()) {
            follower.guest.run_a_while();
        }
        std::thread::yield_now();
    }
    turns
}

#[test]
fn pages_hashed_in_the_background_and_written_again_are_not_missed() {
    for pages in [PAGES, 1500] {
        let (a, b) = channel_pair(None);
        let parts = with_background(FakeGuest::new(1, pages), a);
        let mut leader = LeaderContext::new(parts, Pairing::fresh(pages));
        let mut follower = FollowerContext::new(with_background(FakeGuest::new(2, pages), b));
        assert!(follower.hash_in_background().unwrap().is_none(), "an empty guest has nothing to hash");
        good_sync(&mut leader, &mut follower, 1);
        let mut turns = 0;
        for number in 2..12 {
            leader.config.hash = if number == 7 { HashKind::Xxh3_128 } else { HashKind::City128 };
            turns += slot(&mut leader, &mut follower, Duration::from_millis(25));
            good_sync(&mut leader, &mut follower, number);
        }
        assert!(turns >= 10, "{turns} turns");
    }
}

#[test]
fn hashes_survive_a_syncvm_that_failed() {
    let (a, b) = channel_pair(None);
    let mut leader = LeaderContext::new(with_background(FakeGuest::new(3, PAGES), a), Pairing::fresh(PAGES));
    let mut follower = FollowerContext::new(with_background(FakeGuest::new(4, PAGES), b));
    good_sync(&mut leader, &mut follower, 1);
    let mut number = 2;
    for at_message in 0..8 {
        slot(&mut leader, &mut follower, Duration::from_millis(25));
        let _ = sync(&mut leader, &mut follower, number, Some(Fault { at_message, how: Break::Refused }));
        slot(&mut leader, &mut follower, Duration::from_millis(25));
        good_sync(&mut leader, &mut follower, number + 1);
        number += 2;
    }
}

#[test]
fn nothing_happens_in_the_background_unless_it_is_switched_on_and_the_guest_can_be_harvested_running() {
    let (mut leader, _) = pair(5, PAGES);
    assert!(leader.hash_in_background().unwrap().is_none());
    let (a, _) = channel_pair(None);
    let mut guest = FakeGuest::new(6, PAGES);
    guest.needs_stop = true;
    let mut leader = LeaderContext::new(with_background(guest, a), Pairing::fresh(PAGES));
    assert!(leader.hash_in_background().unwrap().is_none());
}
