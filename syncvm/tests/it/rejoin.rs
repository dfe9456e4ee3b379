//! Live rounds: the leader's guest writes all the time, and the joiner ends equal all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::*;
use syncvm::exchange::{FollowerContext, Guest, Standing, SyncError};
use syncvm::rejoin::{AtLimit, RejoinPolicy, RejoinReport, RoundsEnd, follow_rejoin, lead_rejoin};
use syncvm::transfer::{Header, Kind};
use syncvm::{PAGE_BYTES, PageNumber};

const BIG: usize = 5000;

fn policy(target_pages: usize) -> RejoinPolicy {
    RejoinPolicy { target_pages, max_rounds: 6, ..RejoinPolicy::default() }
}

type Rounds = (Result<RejoinReport, SyncError>, Result<RejoinReport, SyncError>);

fn rejoin(
    leader: &mut Leader,
    follower: &mut Follower,
    number: u64,
    policy: &RejoinPolicy,
    fault: Option<Fault>,
) -> Rounds {
    let (a, b) = channel_pair(fault);
    leader.replace_channel(a);
    follower.replace_channel(b);
    std::thread::scope(|scope| {
        let following = scope.spawn(|| follow_rejoin(follower, Duration::from_secs(20)));
        let led = lead_rejoin(leader, number, policy);
        (led, following.join().unwrap())
    })
}

/// Writes random pages of a running guest until told to stop: page first, dirty bit after.
fn storm(guest: &FakeGuest, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<usize> {
    let (ram, dirty) = (guest.ram.clone(), Arc::clone(&guest.dirty));
    std::thread::spawn(move || {
        let mut rng = Rng(42);
        let mut writes = 0;
        loop {
            let page = PageNumber(rng.below(200) as u32);
            ram.write_page(page, &[rng.next() as u8; PAGE_BYTES]);
            dirty.lock().unwrap().insert(page);
            writes += 1;
            if stop.load(Ordering::Relaxed) {
                return writes;
            }
        }
    })
}

#[test]
fn a_joiner_ends_equal_although_the_guest_writes_all_the_time() {
    for needs_stop in [false, true] {
        let (mut leader, mut follower) = pair(1, BIG);
        leader.guest.writes_per_run = 900;
        leader.guest.run_a_while();
        leader.guest.writes_per_run = 12;
        leader.guest.needs_stop = needs_stop;
        let stop = Arc::new(AtomicBool::new(false));
        let writer = storm(&leader.guest, Arc::clone(&stop));
        let (led, followed) = rejoin(&mut leader, &mut follower, 5, &policy(10), None);
        stop.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > 0);
        let (led, followed) = (led.unwrap(), followed.unwrap());
        assert!(led.rounds >= 1 && led.left_pages <= 230, "{led:?}");
        assert!(matches!(led.end, Some(RoundsEnd::NotConverging | RoundsEnd::Limit | RoundsEnd::SmallEnough)));
        assert_eq!(
            (led.rounds, led.compared_pages, led.sent_pages),
            (followed.rounds, followed.compared_pages, followed.sent_pages)
        );
        assert!(led.sent_pages < led.compared_pages / 2, "what is right is not sent: {led:?}");
        assert_eq!(follower.standing(), Standing::Joining);
        assert!(leader.guest.running && !follower.guest.running);
        let (synced, _) = good_sync(&mut leader, &mut follower, 6);
        assert!(synced.union_pages < 300, "the rest only: {}", synced.union_pages);
        assert_eq!(follower.standing(), Standing::Whole);
        good_sync(&mut leader, &mut follower, 7);
    }
}

#[test]
fn rounds_that_break_anywhere_leave_a_joiner_that_does_not_run_and_can_be_completed() {
    for at_message in 0..12 {
        for how in [Break::Refused, Break::Lost, Break::Uncertain] {
            let (mut leader, mut follower) = pair(2, PAGES);
            good_sync(&mut leader, &mut follower, 1);
            let fault = Some(Fault { at_message, how });
            let (led, followed) = rejoin(&mut leader, &mut follower, 2, &policy(1), fault);
            assert!(leader.guest.running, "{how:?} at {at_message}");
            let begun = follower.standing() != Standing::Whole;
            assert!(!begun || !follower.guest.running, "a mixture does not run");
            assert!(led.is_ok() || followed.is_err() || how == Break::Uncertain);
            // Whatever was acknowledged of the rounds, the pairing knows the rest: a syncvm completes it.
            good_sync(&mut leader, &mut follower, 3);
            let (led, _) = rejoin(&mut leader, &mut follower, 4, &policy(1), None);
            led.unwrap();
            good_sync(&mut leader, &mut follower, 5);
        }
    }
}

#[test]
fn a_half_joined_replica_refuses_the_syncvm_of_another_pairing() {
    let (mut leader, mut joiner) = pair(3, PAGES);
    good_sync(&mut leader, &mut joiner, 1);
    // The joiner goes through the rounds of another leader, whose last syncvm never comes.
    let (mut other, _) = pair(4, PAGES);
    let (led, followed) = rejoin(&mut other, &mut joiner, 2, &policy(50), None);
    led.unwrap();
    followed.unwrap();
    let (led, followed) = sync(&mut leader, &mut joiner, 3, None);
    assert!(led.unwrap_err().needs_rejoin());
    assert!(matches!(followed, Err(SyncError::NotWhole { ours: Some(_), .. })));
    assert!(!joiner.guest.running && joiner.observer.applied == 1);
}

#[test]
fn device_state_that_a_load_would_leave_makes_a_follower_rejoin_untouched() {
    let (mut leader, mut follower) = pair(8, PAGES);
    good_sync(&mut leader, &mut follower, 1);
    follower.guest.leftover = Some("virtio/disabled of nic".into());
    let (led, followed) = sync(&mut leader, &mut follower, 2, None);
    assert!(led.unwrap_err().needs_rejoin());
    assert!(matches!(&followed, Err(SyncError::Leftovers { parts }) if parts.len() == 1));
    assert_eq!(follower.observer.applied, 1, "nothing was acknowledged or applied");
    assert_eq!(follower.guest.at_resume, follower.guest.at_stop, "its memory and devices are as they were");
    // The rejoin resets the devices, and then the two are equal again.
    rejoin(&mut leader, &mut follower, 3, &policy(50), None).1.unwrap();
    assert_eq!(follower.guest.leftover, None);
    good_sync(&mut leader, &mut follower, 4);
}

#[test]
fn a_joiner_with_an_empty_memory_gets_zero_pages_for_nothing() {
    let (mut leader, _) = pair(5, BIG);
    for page in 0..BIG as u32 {
        leader.guest.ram.zero_page(PageNumber(page));
    }
    let (_, b) = channel_pair(None);
    let mut full = FakeGuest::new(6, BIG);
    full.writes_per_run = 20_000;
    full.run_a_while();
    full.writes_per_run = 0;
    let mut joiner = FollowerContext::new(parts(full, b));
    let (led, _) = rejoin(&mut leader, &mut joiner, 2, &policy(50), None);
    let led = led.unwrap();
    assert!(led.sent_pages > 1000 && led.bytes_sent < 100_000, "{led:?}");
    good_sync(&mut leader, &mut joiner, 3);
    let (_, b) = channel_pair(None);
    let blank = FakeGuest { ram: new_ram(BIG), ..FakeGuest::new(7, BIG) };
    let mut blank = FollowerContext::new(parts(blank, b));
    assert_eq!(blank.guest.ram().pages(), BIG);
    rejoin(&mut leader, &mut blank, 4, &policy(50), None).0.unwrap();
    good_sync(&mut leader, &mut blank, 5);
}

#[test]
fn a_guest_that_rewrites_everything_in_every_round_still_joins() {
    let (mut leader, mut follower) = pair(9, PAGES);
    leader.guest.needs_stop = true;
    leader.guest.writes_per_run = 5000;
    leader.guest.calm_after_runs = Some(1);
    let (led, _) = rejoin(&mut leader, &mut follower, 1, &policy(1), None);
    let led = led.unwrap();
    assert_eq!((led.rounds, led.compared_pages), (2, 2 * PAGES as u64));
    // What is left is relative to round 1, and the joiner knows.
    assert_eq!(led.left_pages, 1);
    good_sync(&mut leader, &mut follower, 2);
    good_sync(&mut leader, &mut follower, 3);
}

/// Two guests that are equal and calm.
fn calm_pair(seed: u64) -> (Leader, Follower) {
    let (mut leader, mut follower) = pair(seed, BIG);
    (leader.guest.writes_per_run, follower.guest.writes_per_run) = (0, 0);
    good_sync(&mut leader, &mut follower, 1);
    (leader, follower)
}

#[test]
fn a_replica_that_is_mostly_right_costs_the_granules_that_are_not() {
    let (mut leader, mut follower) = calm_pair(11);
    // Two pages of one granule, and one of the last, which is a short one.
    for page in [600, 1000, BIG as u32 - 1] {
        follower.guest.ram.write_page(PageNumber(page), &[0x5a; PAGE_BYTES]);
    }
    let (led, followed) = rejoin(&mut leader, &mut follower, 2, &policy(50), None);
    let (led, followed) = (led.unwrap(), followed.unwrap());
    assert_eq!((led.compared_pages, led.sent_pages), (BIG as u64, 3));
    assert_eq!((followed.compared_pages, followed.sent_pages), (BIG as u64, 3));
    let hash_bytes = 16 * (BIG.div_ceil(512) + 512 + BIG % 512) as u64;
    assert!(led.bytes_received < hash_bytes + 300, "{} bytes, hashes are {hash_bytes}", led.bytes_received);
    assert!(led.bytes_sent < 3 * PAGE_BYTES as u64 + 1000, "{} bytes", led.bytes_sent);
    good_sync(&mut leader, &mut follower, 3);
}

#[test]
fn neither_side_is_silent_for_longer_than_a_batch_takes_to_hash() {
    let (mut leader, mut follower) = calm_pair(14);
    let granules = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&granules);
    let (a, mut b) = channel_pair(None);
    b.mangle = Some(Box::new(move |kind, message| {
        if kind == Kind::Granules {
            seen.lock().unwrap().push((message.len() - Header::BYTES) / 16);
        }
    }));
    leader.replace_channel(a);
    follower.replace_channel(b);
    std::thread::scope(|scope| {
        let following = scope.spawn(|| follow_rejoin(&mut follower, Duration::from_secs(20)));
        lead_rejoin(&mut leader, 2, &policy(50)).unwrap();
        following.join().unwrap().unwrap();
    });
    // 5000 pages in granules of 512: a batch has 8 of them, and the last granule is a short one.
    assert_eq!(*granules.lock().unwrap(), [8, 2]);
}

#[test]
fn a_granule_list_that_lies_is_found_out_by_the_syncvm_that_checks() {
    let (mut leader, mut follower) = calm_pair(12);
    let (led, _) = rejoin(&mut leader, &mut follower, 2, &policy(50), None);
    assert_eq!(led.unwrap().sent_pages, 0);
    // After the digests were compared and before the last syncvm: nobody harvests this write.
    follower.guest.ram.write_page(PageNumber(77), &[0x5a; PAGE_BYTES]);
    leader.config.verify = true;
    let (led, _) = sync(&mut leader, &mut follower, 3, None);
    assert!(matches!(led, Err(SyncError::Diverged { pages: 1, .. })), "{led:?}");
}

#[test]
fn a_rejoin_keeps_within_its_rate_and_says_how_far_it_is() {
    let (mut leader, mut follower) = calm_pair(13);
    for page in 0..2048 {
        follower.guest.ram.write_page(PageNumber(page), &[0x5a; PAGE_BYTES]);
        leader.guest.ram.write_page(PageNumber(page), &[0x5b; PAGE_BYTES]);
    }
    let capped = RejoinPolicy { mib_per_s: 20, ..policy(50) };
    let start = std::time::Instant::now();
    let (led, _) = rejoin(&mut leader, &mut follower, 2, &capped, None);
    assert!(led.unwrap().sent_pages >= 2048);
    // 8 MiB at 20 MiB/s are 400 ms, less the burst and the last message.
    assert!(start.elapsed() >= Duration::from_millis(230), "{:?}", start.elapsed());
    for observer in [&leader.observer, &follower.observer] {
        let last = observer.progress.last().unwrap();
        assert_eq!((last.done_pages, last.total_pages, last.left), (BIG, BIG, Duration::ZERO));
        assert!(observer.progress.windows(2).all(|two| two[0].done_pages <= two[1].done_pages));
    }
    good_sync(&mut leader, &mut follower, 3);
}

#[test]
fn a_joiner_that_starts_on_a_round_given_up_turns_to_the_present_one() {
    let (mut leader, mut follower) = pair(10, PAGES);
    let (a, b) = channel_pair(None);
    leader.replace_channel(a);
    follower.replace_channel(b);
    // Nobody follows: the leader gives attempt 1 up, and its messages stay in the channel.
    leader.config.silence_timeout = Duration::from_millis(30);
    lead_rejoin(&mut leader, 1, &policy(50)).unwrap_err();
    leader.config.silence_timeout = config().silence_timeout;
    let (led, followed) = std::thread::scope(|scope| {
        let following = scope.spawn(|| follow_rejoin(&mut follower, Duration::from_secs(20)));
        (lead_rejoin(&mut leader, 1, &policy(50)), following.join().unwrap())
    });
    led.unwrap();
    followed.unwrap();
    good_sync(&mut leader, &mut follower, 2);
}

#[test]
fn policy_decides_as_documented() {
    let policy =
        RejoinPolicy { max_rounds: 5, target_pages: 10, max_time: Duration::from_secs(1), ..RejoinPolicy::default() };
    let now = Duration::ZERO;
    assert_eq!(policy.decide(0, now, 0, 0), None, "round 0 always happens");
    assert_eq!(policy.decide(1, now, 10, 99), Some(RoundsEnd::SmallEnough));
    assert_eq!(policy.decide(1, now, 11, 11), None);
    assert_eq!(policy.decide(3, now, 11, 11), Some(RoundsEnd::NotConverging));
    assert_eq!(policy.decide(3, now, 11, 12), None);
    assert_eq!(policy.decide(5, now, 11, 12), Some(RoundsEnd::Limit));
    assert_eq!(policy.decide(1, Duration::from_secs(1), 11, 12), Some(RoundsEnd::Limit));
    let (mut leader, mut follower) = pair(8, PAGES);
    leader.guest.needs_stop = true; // every harvest lets the fake guest run and write
    let strict = RejoinPolicy { max_rounds: 2, target_pages: 0, at_limit: AtLimit::GiveUp, ..policy };
    let (led, followed) = rejoin(&mut leader, &mut follower, 1, &strict, None);
    assert!(matches!(led, Err(SyncError::NotConverging { .. })), "{led:?}");
    assert!(followed.is_err() && leader.guest.running);
}
