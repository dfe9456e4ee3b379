//! Transfer below the page: what it costs, and that no short hash or digest that agrees falsely is ever believed.

use std::sync::{Arc, Mutex};

use crate::common::*;
use proptest::prelude::{ProptestConfig, any, prop, proptest};
use syncvm::exchange::{Guest, SyncError};
use syncvm::hash::HashKind;
use syncvm::transfer::{
    BlockSize, Header, Kind, Piece, SHORT_HASH_BYTES, Terms, TransferError, TransferMode, decode_digests, digest_page,
};
use syncvm::{DirtySet, PAGE_BYTES, PageNumber};

/// Two equal guests that write nothing by themselves.
fn calm_pair(seed: u64, pages: usize) -> (Leader, Follower) {
    let (mut leader, mut follower) = pair(seed, pages);
    leader.guest.writes_per_run = 0;
    follower.guest.writes_per_run = 0;
    good_sync(&mut leader, &mut follower, 1);
    (leader, follower)
}

fn write(guest: &FakeGuest, page: u32, at: usize, bytes: &[u8]) {
    let mut content = [0; PAGE_BYTES];
    guest.ram.read_page(PageNumber(page), &mut content);
    content[at..at + bytes.len()].copy_from_slice(bytes);
    guest.ram.write_page(PageNumber(page), &content);
    guest.dirty.lock().unwrap().insert(PageNumber(page));
}

fn page_of(guest: &FakeGuest, page: u32) -> Vec<u8> {
    let mut content = vec![0; PAGE_BYTES];
    guest.ram.read_page(PageNumber(page), &mut content);
    content
}

/// Puts a body in the place of each message of one kind.
fn replace(kind: Kind, body: impl Fn(&Header, &[u8]) -> Vec<u8> + Send + 'static) -> Option<Mangle> {
    Some(Box::new(move |got, message| {
        if got == kind {
            let (header, present) = Header::decode(message).unwrap();
            let body = body(&header, present);
            message.truncate(Header::BYTES);
            message.extend(body);
        }
    }))
}

/// Digests as the leader has them for its own page: every block agrees, falsely or not.
fn lying_digests(page: Vec<u8>) -> impl Fn(&Header, &[u8]) -> Vec<u8> + Send + 'static {
    move |header, body| {
        let (size, _) = decode_digests(body).unwrap();
        let mut lie = vec![size.code()];
        digest_page(&page, size, header.seed(), &mut lie);
        lie
    }
}

fn short_hash(page: &[u8]) -> Vec<u8> {
    HashKind::City128.function()(page)[..SHORT_HASH_BYTES].to_vec()
}

#[test]
fn a_short_hash_that_agrees_falsely_ends_the_syncvm_and_the_next_compares_whole_hashes() {
    for kind in [Kind::Hashes, Kind::AheadHashes] {
        let (mut leader, mut follower) = calm_pair(1, PAGES);
        leader.config.background_hashing = kind == Kind::AheadHashes;
        write(&leader.guest, 5, 100, b"only here");
        let lie = short_hash(&page_of(&leader.guest, 5));
        let outcome = mangled_sync(&mut leader, &mut follower, 2, None, replace(kind, move |_, _| lie.clone()));
        assert!(!check_after_fault(&leader, &follower, &outcome, 1), "nothing was applied");
        assert!(matches!(outcome.1, Err(SyncError::Transfer(TransferError::FalselyEqual))), "{:?}", outcome.1);
        assert!(matches!(outcome.0, Err(SyncError::PeerAborted { needs_rejoin: false, .. })), "{:?}", outcome.0);
        let (led, _) = good_sync(&mut leader, &mut follower, 3);
        assert_eq!((led.transfer, led.divergent_pages), (TransferMode::Pages, 1));
        write(&leader.guest, 6, 100, b"only here");
        let (led, _) = good_sync(&mut leader, &mut follower, 4);
        assert_eq!((led.transfer, led.divergent_pages, led.sent_blocks), (TransferMode::Delta, 1, 1));
    }
}

#[test]
fn a_failure_of_another_kind_does_not_ask_more_of_the_link() {
    let (mut leader, mut follower) = calm_pair(1, PAGES);
    write(&leader.guest, 5, 100, b"only here");
    let outcome = sync(&mut leader, &mut follower, 2, Some(Fault { at_message: 3, how: Break::Refused }));
    assert!(outcome.0.is_err());
    let (led, _) = good_sync(&mut leader, &mut follower, 3);
    assert_eq!((led.transfer, led.divergent_pages), (TransferMode::Delta, 1));
}

/// The same set with `page` in place of what was in it.
fn another_set(pages: usize, page: u32) -> impl Fn(&Header, &[u8]) -> Vec<u8> + Send + 'static {
    move |_, body| {
        let (terms, _) = Terms::decode(body).unwrap();
        let (mut set, mut wire) = (DirtySet::new(pages), Vec::new());
        set.insert(PageNumber(page));
        set.encode(&mut wire);
        let piece = Piece { total_bytes: wire.len() as u64, offset_bytes: 0, bytes: &wire };
        [&terms.encode(), piece.head().as_slice(), &wire].concat()
    }
}

#[test]
fn a_union_that_is_not_the_same_on_both_sides_is_refused() {
    for (zero, kind) in [false, true].into_iter().flat_map(|zero| [(zero, Kind::DirtySet), (zero, Kind::AheadSet)]) {
        let (mut leader, mut follower) = calm_pair(9, PAGES);
        leader.config.background_hashing = kind == Kind::AheadSet;
        let content = if zero { [0; PAGE_BYTES] } else { [3; PAGE_BYTES] };
        write(&leader.guest, 5, 0, &content);
        write(&follower.guest, 5, 0, &[7; PAGE_BYTES]);
        write(&follower.guest, 6, 0, &[9; PAGE_BYTES]);
        follower.guest.dirty.lock().unwrap().clear();
        // Both unions have one page, but not the same.
        let outcome = mangled_sync(
            &mut leader,
            &mut follower,
            2,
            replace(kind, another_set(PAGES, 6)),
            replace(kind, another_set(PAGES, 5)),
        );
        assert!(!check_after_fault(&leader, &follower, &outcome, 1), "nothing was applied");
        assert!(matches!(outcome.1, Err(SyncError::Transfer(TransferError::FalselyEqual))), "{:?}", outcome.1);
    }
}

#[test]
fn what_saving_the_followers_devices_writes_is_compared() {
    for mode in TransferMode::EVERY {
        let (mut leader, mut follower) = calm_pair(10, PAGES);
        leader.config.transfer = mode;
        follower.guest.save_writes = Some(PageNumber(9));
        // The first is found out; from then on it is saved before anything is compared.
        let outcome = sync(&mut leader, &mut follower, 2, None);
        assert!(matches!(outcome.1, Err(SyncError::SavingWrites { pages: 1 })), "{:?}", outcome.1);
        assert!(outcome.0.is_err() && leader.guest.running && follower.guest.running);
        assert_eq!((follower.observer.applied, leader.observer.acknowledged), (1, 1));
        for number in 3..6 {
            let (led, followed) = good_sync(&mut leader, &mut follower, number);
            assert!(followed.dirty_local >= 1 && led.union_pages >= 1, "{followed:?}");
        }
    }
}

#[test]
fn a_save_that_writes_nothing_is_not_waited_for_and_one_that_fails_does_no_harm() {
    for mode in TransferMode::EVERY {
        let (mut leader, mut follower) = calm_pair(11, PAGES);
        leader.config.transfer = mode;
        write(&leader.guest, 5, 100, b"only here");
        follower.guest.leftover = Some("a timer".to_owned());
        for refuse in [Some(Refusal::Save), None] {
            follower.guest.refuse = refuse;
            let outcome = sync(&mut leader, &mut follower, 2 + u64::from(refuse.is_none()), None);
            assert!(!check_after_fault(&leader, &follower, &outcome, 1));
            let expected = match &outcome.1 {
                Err(SyncError::Guest(_)) => refuse.is_some(),
                Err(SyncError::Leftovers { .. }) => refuse.is_none(),
                _ => false,
            };
            assert!(expected, "{:?}", outcome.1);
        }
    }
}

#[test]
fn a_digest_that_agrees_falsely_costs_a_whole_page() {
    let (mut leader, mut follower) = calm_pair(2, PAGES);
    write(&leader.guest, 5, 100, b"only here");
    let lie = replace(Kind::Digests, lying_digests(page_of(&leader.guest, 5)));
    let outcome = mangled_sync(&mut leader, &mut follower, 2, None, lie);
    assert!(check_after_fault(&leader, &follower, &outcome, 1));
    let (led, followed) = (outcome.0.unwrap(), outcome.1.unwrap());
    assert_eq!((led.sent_blocks, led.resent_pages, followed.resent_pages), (0, 1, 1));
    assert_eq!(led.bytes_sent, followed.bytes_received);
    assert_eq!(follower.observer.applied, 2);
}

#[test]
fn a_page_that_is_wrong_even_after_the_recheck_is_never_accepted() {
    let (mut leader, mut follower) = calm_pair(3, PAGES);
    write(&leader.guest, 5, 100, b"only here");
    let page = page_of(&leader.guest, 5);
    let (digests, hash) = (lying_digests(page.clone()), short_hash(&page));
    let liar: Option<Mangle> = Some(Box::new(move |kind, message| {
        let (header, body) = Header::decode(message).unwrap();
        let lie = match kind {
            Kind::Digests => digests(&header, body),
            Kind::Recheck => [&body[..16], &hash].concat(),
            _ => return,
        };
        message.truncate(Header::BYTES);
        message.extend(lie);
    }));
    let outcome = mangled_sync(&mut leader, &mut follower, 2, None, liar);
    assert!(!check_after_fault(&leader, &follower, &outcome, 1));
    assert!(matches!(outcome.1, Err(SyncError::Transfer(TransferError::Content))), "{:?}", outcome.1);
    let (led, _) = good_sync(&mut leader, &mut follower, 3);
    assert_eq!(led.transfer, TransferMode::Pages);
}

#[test]
fn a_channel_that_breaks_in_a_recheck_does_no_harm() {
    // Messages 0 to 7 lead to the first end message; then recheck, pages, end, acknowledgement.
    for at_message in 7..13 {
        for how in [Break::Refused, Break::Lost, Break::Uncertain] {
            let (mut leader, mut follower) = calm_pair(4, PAGES);
            write(&leader.guest, 5, 100, b"only here");
            let (a, mut b) = channel_pair(Some(Fault { at_message, how }));
            b.mangle = replace(Kind::Digests, lying_digests(page_of(&leader.guest, 5)));
            leader.replace_channel(a);
            follower.replace_channel(b);
            let outcome = sync_on_present_channel(&mut leader, &mut follower, 2);
            check_after_fault(&leader, &follower, &outcome, 1);
            assert!(outcome.0.is_err() || at_message >= 11, "{how:?} at {at_message}");
            good_sync(&mut leader, &mut follower, 3);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(96) })]
    #[test]
    fn a_flipped_bit_anywhere_is_harmless_or_refused(
        seed in any::<u64>(), nth in 0usize..9, at in any::<prop::sample::Index>(), bit in 0u8..8, lie in any::<bool>()
    ) {
        let (mut leader, mut follower) = pair(seed, PAGES);
        good_sync(&mut leader, &mut follower, 1);
        // Which pages are dirty is taken on trust: the bulk connection is reliable. All else is checked end to end.
        let count = Arc::new(Mutex::new(0));
        let flip = || -> Option<Mangle> {
            let count = Arc::clone(&count);
            Some(Box::new(move |kind, message| {
                let mut count = count.lock().unwrap();
                *count += 1;
                let body = message.len() - Header::BYTES;
                if *count == nth + 1 && body > 0 && !matches!(kind, Kind::AheadSet | Kind::DirtySet | Kind::Abort) {
                    message[Header::BYTES + at.index(body)] ^= 1 << bit;
                }
                if lie && kind == Kind::Digests {
                    // Digests of anything: most blocks are sent, and those that agree falsely are found.
                    message[Header::BYTES + 1..].fill(0);
                }
            }))
        };
        let outcome = mangled_sync(&mut leader, &mut follower, 2, flip(), flip());
        check_after_fault(&leader, &follower, &outcome, 1);
        good_sync(&mut leader, &mut follower, 3);
        good_sync(&mut leader, &mut follower, 4);
    }
}

/// Dirties `dirty` pages on both sides; in every fifth the guests then differ as `differ` says.
fn diverge(
    leader: &Leader,
    follower: &Follower,
    dirty: u32,
    rng: &mut Rng,
    differ: impl Fn(&FakeGuest, u32, &mut Rng),
) {
    let stride = leader.guest.ram().pages() as u32 / dirty;
    for nth in 0..dirty {
        let page = nth * stride + rng.below(stride as usize) as u32;
        let content: Vec<u8> = (0..PAGE_BYTES / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
        write(&leader.guest, page, 0, &content);
        write(&follower.guest, page, 0, &content);
        if rng.below(5) == 0 {
            differ(&leader.guest, page, rng);
        }
    }
}

#[test]
fn bytes_sent_follow_the_blocks_that_differ() {
    let pages = 24_000;
    let one_block = |guest: &FakeGuest, page: u32, rng: &mut Rng| {
        let bytes: Vec<u8> = (0..32).flat_map(|_| rng.next().to_le_bytes()).collect();
        write(guest, page, rng.below(16) * 256, &bytes);
    };
    let scattered = |guest: &FakeGuest, page: u32, rng: &mut Rng| {
        for _ in 0..8 {
            write(guest, page, rng.below(512) * 8, &rng.next().to_le_bytes());
        }
    };
    let whole = |guest: &FakeGuest, page: u32, rng: &mut Rng| {
        let bytes: Vec<u8> = (0..PAGE_BYTES / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
        write(guest, page, 0, &bytes);
    };
    type Differ<'a> = &'a dyn Fn(&FakeGuest, u32, &mut Rng);
    let patterns: [(Differ<'_>, BlockSize, f64); 3] =
        [(&one_block, BlockSize::B256, 1.3), (&scattered, BlockSize::B64, 0.6), (&whole, BlockSize::B256, 1.05)];
    for (differ, best, bound) in patterns {
        let (mut leader, mut follower) = calm_pair(5, pages);
        let mut rng = Rng(7);
        for number in 2..4 {
            diverge(&leader, &follower, 3000, &mut rng, differ);
            let (led, followed) = good_sync(&mut leader, &mut follower, number);
            assert_eq!((led.union_pages, led.transfer), (3000, TransferMode::Delta));
            assert!((500..700).contains(&led.divergent_pages), "{led:?}");
            assert_eq!((led.sent_blocks, led.block_bytes), (followed.sent_blocks, followed.block_bytes));
            let bytes = led.bytes_sent + led.bytes_received - led.device_bytes as u64;
            let share = bytes as f64 / followed.differing_bytes as f64;
            // The first syncvm has taught the follower which block size fits.
            if number == 3 {
                assert_eq!(led.block_bytes, best.bytes());
                assert!(share < bound, "{bytes} bytes for {} that differ ({share:.2})", followed.differing_bytes);
            }
        }
    }
}

#[test]
fn pages_that_become_zero_cost_bits() {
    let (mut leader, mut follower) = calm_pair(6, 2000);
    let noise = |rng: &mut Rng| (0..PAGE_BYTES / 8).flat_map(|_| rng.next().to_le_bytes()).collect::<Vec<u8>>();
    let mut rng = Rng(8);
    for page in 0..500 {
        write(&leader.guest, page * 3, 0, &noise(&mut rng));
    }
    good_sync(&mut leader, &mut follower, 2);
    for page in 0..500 {
        write(&leader.guest, page * 3, 0, &[0; PAGE_BYTES]);
    }
    let (led, followed) = good_sync(&mut leader, &mut follower, 3);
    assert_eq!((led.zero_pages, followed.zero_pages, led.sent_blocks), (500, 500, 0));
    let bytes = led.bytes_sent + led.bytes_received - led.device_bytes as u64;
    assert!(bytes < 500 * 12, "short hashes, runs of the dirty set, bits: {bytes}");
    assert_eq!(followed.differing_bytes, 500 * 4096);
}
