//! Device state below the whole: what its delta costs, and that a wrong one is never loaded.

use std::time::Duration;

use crate::common::*;
use syncvm::exchange::{FollowerContext, Part, SyncError, SyncReport};
use syncvm::transfer::{Header, Kind, Terms, TransferError, TransferMode, device_hash};

/// Bytes of messages about device state.
fn device_bytes(report: &SyncReport) -> u64 {
    report.traffic.bytes(Part::Device)
}

fn is_whole(report: &SyncReport) -> bool {
    device_bytes(report) == (Header::BYTES + 16 + report.device_bytes) as u64
}

#[test]
fn only_what_changed_of_the_device_state_crosses_the_wire() {
    let (mut leader, mut follower) = pair(1, PAGES);
    let (led, followed) = good_sync(&mut leader, &mut follower, 1);
    assert!(is_whole(&led) && is_whole(&followed), "the follower had none");
    for number in 2..6 {
        // A register is another one, on each side.
        let (led, followed) = good_sync(&mut leader, &mut follower, number);
        assert!(device_bytes(&led) < 80, "{led:?}");
        assert_eq!((led.device_bytes, led.traffic), (3000, followed.traffic));
    }
    // It grows and shrinks.
    for (number, length, news) in [(6, 3500, 500), (7, 200, 0), (8, 3000, 2800)] {
        leader.guest.device.resize(length, 9);
        let (led, _) = good_sync(&mut leader, &mut follower, number);
        assert_eq!(led.device_bytes, length);
        assert!((news..news + 80).contains(&device_bytes(&led)), "{led:?}");
    }
}

#[test]
fn other_modes_send_it_whole() {
    for transfer in [TransferMode::Pages, TransferMode::All] {
        let (mut leader, mut follower) = pair(2, PAGES);
        leader.config.transfer = transfer;
        for number in 1..4 {
            let (led, _) = good_sync(&mut leader, &mut follower, number);
            assert!(is_whole(&led), "{led:?}");
        }
        leader.config.transfer = TransferMode::Delta;
        let (led, _) = good_sync(&mut leader, &mut follower, 4);
        assert!(!is_whole(&led), "what came whole is what a delta goes by");
    }
}

/// The follower's context anew, as after a change of roles, with what it knows of the leader.
fn anew(follower: Follower) -> Follower {
    let (guest, channel, _, pairing) = follower.into_parts();
    FollowerContext::with_whole_guest(parts(guest, channel), pairing)
}

/// The follower says that it has the device state of this hash.
fn claim(hash: u64) -> Option<Mangle> {
    Some(Box::new(move |kind, message| {
        if matches!(kind, Kind::DirtySet | Kind::AheadSet) {
            let (terms, _) = Terms::decode(&message[Header::BYTES..]).unwrap();
            let lie = Terms { device: Some(hash), ..terms };
            message[Header::BYTES..Header::BYTES + Terms::BYTES].copy_from_slice(&lie.encode());
        }
    }))
}

#[test]
fn a_follower_without_the_last_state_gets_it_whole() {
    let (mut leader, mut follower) = pair(3, PAGES);
    good_sync(&mut leader, &mut follower, 1);
    let mut follower = anew(follower);
    let (led, _) = good_sync(&mut leader, &mut follower, 2);
    assert!(is_whole(&led));
    let (led, _) = good_sync(&mut leader, &mut follower, 3);
    assert!(!is_whole(&led));
    let outcome = mangled_sync(&mut leader, &mut follower, 4, None, claim(7));
    assert!(check_after_fault(&leader, &follower, &outcome, 1), "{outcome:?}");
    assert!(is_whole(&outcome.0.unwrap()), "the leader has no such state");
}

#[test]
fn a_state_that_does_not_come_out_as_the_leaders_is_never_loaded() {
    let (mut leader, mut follower) = pair(4, PAGES);
    good_sync(&mut leader, &mut follower, 1);
    let last = device_hash(&leader.guest.at_stop.1);
    // One with no state, and one with a state in which something else is equal by hash.
    let mut follower = anew(follower);
    let outcome = mangled_sync(&mut leader, &mut follower, 2, None, claim(last));
    assert!(!check_after_fault(&leader, &follower, &outcome, 0));
    assert!(matches!(outcome.1, Err(SyncError::Transfer(TransferError::Wire(_)))), "{:?}", outcome.1);
    leader.guest.device[100] ^= 1;
    good_sync(&mut leader, &mut follower, 3);
    leader.guest.device[100] ^= 1;
    let before = follower.observer.applied;
    let other: Option<Mangle> = Some(Box::new(|kind, message| {
        if kind == Kind::DeviceDelta {
            // The leader goes by another state: the hash of what is to come out is another.
            message[Header::BYTES + 16] ^= 1;
        }
    }));
    let outcome = mangled_sync(&mut leader, &mut follower, 4, other, None);
    assert!(!check_after_fault(&leader, &follower, &outcome, before));
    assert!(matches!(outcome.1, Err(SyncError::Transfer(TransferError::DeviceDelta))), "{:?}", outcome.1);
    let (led, _) = good_sync(&mut leader, &mut follower, 5);
    assert_eq!(led.transfer, TransferMode::Pages);
    assert!(is_whole(&led), "the next one does not rest on hashes");
}

#[test]
fn a_syncvm_that_failed_anywhere_leaves_both_sides_with_a_state_to_go_by() {
    for how in [Break::Refused, Break::Lost, Break::Uncertain] {
        for at_message in 0..9 {
            let (mut leader, mut follower) = pair(5, PAGES);
            leader.config.silence_timeout = Duration::from_millis(100);
            follower.config.silence_timeout = Duration::from_millis(100);
            good_sync(&mut leader, &mut follower, 1);
            let outcome = sync(&mut leader, &mut follower, 2, Some(Fault { at_message, how }));
            let applied = check_after_fault(&leader, &follower, &outcome, 1);
            let (led, _) = good_sync(&mut leader, &mut follower, 3);
            // Of syncvm 2 the leader has a state if it came to the copy. Then the follower has that too, or gets the next whole.
            if applied || at_message == 0 {
                assert!(!is_whole(&led), "{how:?} at {at_message}");
            }
            let (led, _) = good_sync(&mut leader, &mut follower, 4);
            assert!(!is_whole(&led), "{how:?} at {at_message}");
        }
    }
}
