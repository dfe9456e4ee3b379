//! Hashing ahead of the stop while both guests write: the syncvms must not notice.

use crate::common::*;
use syncvm::PAGE_BYTES;
use syncvm::PageNumber;
use syncvm::Pairing;
use syncvm::exchange::{FollowerContext, LeaderContext};
use syncvm::hash::HashKind;
use syncvm::transfer::TransferMode;

const MANY_PAGES: usize = 1500;
/// Of [`MANY_PAGES`]: enough to be worth a harvest more.
const WRITES: usize = 150;

fn busy_pair(races: bool) -> (Leader, Follower) {
    let (a, b) = channel_pair(None);
    let side = |seed, channel| {
        let mut guest = FakeGuest { writes_per_run: WRITES, ..FakeGuest::new(seed, MANY_PAGES) };
        guest.races = races;
        let mut parts = parts(guest, channel);
        parts.config.background_hashing = true;
        parts
    };
    let leader = LeaderContext::new(side(1, a), Pairing::fresh(MANY_PAGES));
    let mut pair = (leader, FollowerContext::new(side(2, b)));
    good_sync(&mut pair.0, &mut pair.1, 1);
    pair
}

#[test]
fn pages_written_while_or_after_they_were_hashed_are_not_missed() {
    let (mut leader, mut follower) = busy_pair(true);
    let (mut known, mut hashed_again, mut copied, mut copied_again) = ([0, 0], [0, 0], 0, 0);
    for number in 2..40 {
        leader.config.hash = if number % 9 == 7 { HashKind::Xxh3_128 } else { HashKind::City128 };
        leader.config.verify = number % 8 == 5;
        follower.config.verify = leader.config.verify;
        let (led, followed) = good_sync(&mut leader, &mut follower, number);
        copied += led.copied_ahead;
        copied_again += led.sent_pages - led.zero_pages - led.copied_ahead.min(led.sent_pages - led.zero_pages);
        for (side, report) in [led, followed].iter().enumerate() {
            known[side] += report.known_hashes;
            hashed_again[side] += report.compared_pages - report.known_hashes;
        }
    }
    let enough = |counts: [usize; 2]| counts.iter().all(|count| *count > 100);
    assert!(enough(known) && enough(hashed_again), "known {known:?}, hashed again {hashed_again:?}");
    assert!(copied > 100 && copied_again > 100, "{copied} copied ahead, {copied_again} at the stop");
}

/// Fills `pages` with `byte`.
fn fill(guest: &FakeGuest, pages: std::ops::Range<u32>, byte: u8) {
    for page in pages.map(PageNumber) {
        guest.ram.write_page(page, &[byte; PAGE_BYTES]);
        guest.dirty.lock().unwrap().insert(page);
    }
}

#[test]
fn what_a_syncvm_writes_makes_hashes_worthless() {
    for verify in [false, true] {
        let (mut leader, mut follower) = busy_pair(false);
        (leader.guest.writes_per_run, follower.guest.writes_per_run) = (0, 0);
        (leader.config.verify, follower.config.verify) = (verify, verify);
        good_sync(&mut leader, &mut follower, 2);
        // The leader has B, the follower A, and both know ...
        fill(&leader.guest, 100..300, 0xb);
        fill(&follower.guest, 100..300, 0xa);
        let (led, followed) = good_sync(&mut leader, &mut follower, 3);
        assert_eq!((led.divergent_pages, led.known_hashes, followed.known_hashes), (200, 200, 200));
        assert_eq!(led.copied_ahead, 200);
        // ... and now the leader has A: a follower that still believed in A would take B for it.
        fill(&leader.guest, 100..300, 0xa);
        leader.config.background_hashing = false;
        let (led, followed) = good_sync(&mut leader, &mut follower, 4);
        assert_eq!((led.divergent_pages, led.known_hashes, followed.known_hashes), (200, 0, 0));
        assert_eq!((led.verified, followed.verified), (verify, verify));
    }
}

#[test]
fn sides_of_another_mind_agree_all_the_same() {
    let (mut leader, mut follower) = busy_pair(false);
    for number in (2..20).step_by(3) {
        good_sync(&mut leader, &mut follower, number);
        // This one knows nothing of the last union: it stops at once, and answers a leader that compares ahead.
        let channel = channel_pair(None).0;
        let (guest, _, _, pairing) = follower.into_parts();
        follower = FollowerContext::with_whole_guest(parts(guest, channel), pairing);
        let (led, followed) = good_sync(&mut leader, &mut follower, number + 1);
        let known = [led.known_hashes, followed.known_hashes];
        assert!(led.compared_pages > WRITES && known == [led.compared_pages; 2], "{led:?} {followed:?}");
        // And this one stops at once with a follower that waits for it.
        let channel = channel_pair(None).0;
        let (guest, _, _, pairing) = leader.into_parts();
        leader = LeaderContext::new(parts(guest, channel), pairing);
        let (led, followed) = good_sync(&mut leader, &mut follower, number + 2);
        assert_eq!((led.known_hashes, followed.known_hashes, led.copied_ahead), (0, 0, 0));
    }
    // The two guests need not become idle together.
    for (number, (leader_idle, follower_idle)) in (30..).zip([(true, false), (false, true), (true, true)]) {
        (leader.idle, follower.idle) = (leader_idle, follower_idle);
        let (led, followed) = good_sync(&mut leader, &mut follower, number);
        let known = if leader_idle { 0 } else { led.compared_pages };
        assert_eq!((led.known_hashes, followed.known_hashes), (known, known), "{leader_idle} {follower_idle}");
        let guessed = [led.phases.ahead_us > 0, followed.phases.ahead_us > 0];
        assert_eq!(
            guessed,
            [!leader_idle, !follower_idle],
            "each goes by its own guest before it hears of the other's"
        );
    }
}

#[test]
fn a_syncvm_that_failed_leaves_no_hash_behind() {
    let (mut leader, mut follower) = busy_pair(true);
    for at_message in 0..8 {
        let number = 2 + 2 * at_message as u64;
        let _ = sync(&mut leader, &mut follower, number, Some(Fault { at_message, how: Break::Refused }));
        good_sync(&mut leader, &mut follower, number + 1);
    }
    for side in 0..2 {
        let guest = if side == 0 { &mut leader.guest } else { &mut follower.guest };
        // The first harvest is the one before the stop.
        guest.refuse = Some(Refusal::Harvest);
        let (led, _) = sync(&mut leader, &mut follower, 100 + side, None);
        assert!(led.is_err() && leader.guest.running && follower.guest.running);
        let (led, followed) = good_sync(&mut leader, &mut follower, 110 + side);
        let all = if side == 0 { led.dirty_local } else { followed.dirty_local };
        assert_eq!(all, MANY_PAGES, "pages may have been lost");
    }
}

#[test]
fn nothing_is_hashed_ahead_unless_it_is_switched_on_possible_and_of_use() {
    type Change = fn(&mut Leader);
    let changes: [(&str, Change); 6] = [
        ("idle", |leader| leader.idle = true),
        ("off", |leader| leader.config.background_hashing = false),
        ("stop", |leader| leader.guest.needs_stop = true),
        ("everything", |leader| leader.guest.tells_nothing = true),
        ("mc", |leader| leader.config.transfer = TransferMode::All),
        ("few", |leader| leader.guest.writes_per_run = 2),
    ];
    for (name, change) in changes {
        let (mut leader, mut follower) = busy_pair(false);
        (leader.guest.writes_per_run, follower.guest.writes_per_run) = (WRITES, 2);
        assert!(good_sync(&mut leader, &mut follower, 2).0.known_hashes > WRITES / 2);
        change(&mut leader);
        // What counts is how much the last one was about.
        good_sync(&mut leader, &mut follower, 3);
        good_sync(&mut leader, &mut follower, 4);
        let (led, _) = good_sync(&mut leader, &mut follower, 5);
        assert_eq!((led.known_hashes, led.compared_pages == 0), (0, name == "mc"), "{name}");
    }
}
