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

const MANY_PAGES: usize = 1500;
/// Of [`MANY_PAGES`]: enough to be worth a harvest, and most of them are not those of the time before.
const WRITES: usize = 150;

/// So many turns of the leader and some of the follower, while both guests write between them.
fn slot(leader: &mut Leader, follower: &mut Follower, wanted: usize) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut turns = 0;
    while turns < wanted {
        assert!(Instant::now() < deadline, "{turns} turns of {wanted}");
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
}

fn busy_guest(seed: u64) -> FakeGuest {
    FakeGuest { writes_per_run: WRITES, ..FakeGuest::new(seed, MANY_PAGES) }
}

fn busy_pair() -> (Leader, Follower) {
    let (a, b) = channel_pair(None);
    let leader = LeaderContext::new(with_background(busy_guest(1), a), Pairing::fresh(MANY_PAGES));
    (leader, FollowerContext::new(with_background(busy_guest(2), b)))
}

#[test]
fn pages_hashed_in_the_background_and_written_again_are_not_missed() {
    let (mut leader, mut follower) = busy_pair();
    assert!(follower.hash_in_background().unwrap().is_none(), "an empty guest has nothing to hash");
    good_sync(&mut leader, &mut follower, 1);
    for number in 2..12 {
        leader.config.hash = if number == 7 { HashKind::Xxh3_128 } else { HashKind::City128 };
        // A turn that harvests and one that hashes, at least twice.
        slot(&mut leader, &mut follower, 5);
        good_sync(&mut leader, &mut follower, number);
    }
}

#[test]
fn hashes_survive_a_syncvm_that_failed() {
    let (mut leader, mut follower) = busy_pair();
    good_sync(&mut leader, &mut follower, 1);
    for at_message in 0..8 {
        let number = 2 + 2 * at_message as u64;
        slot(&mut leader, &mut follower, 3);
        let _ = sync(&mut leader, &mut follower, number, Some(Fault { at_message, how: Break::Refused }));
        slot(&mut leader, &mut follower, 3);
        good_sync(&mut leader, &mut follower, number + 1);
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
