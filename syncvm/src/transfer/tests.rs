use super::*;
use crate::dirty::DirtySet;
use crate::ram::GuestRam;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const PAGES: usize = 600;

fn ram() -> GuestRam {
    let fd = memfd_create("plover-transfer-test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, (PAGES * PAGE_BYTES) as u64).unwrap();
    GuestRam::new(fd, None).unwrap()
}

/// 550 pages, every third of them zero: several messages.
fn sample() -> (Vec<(Kind, Vec<u8>)>, DirtySet, GuestRam) {
    let ram = ram();
    let mut set = DirtySet::new(PAGES);
    let pages: Vec<PageNumber> = (20..570).map(PageNumber).collect();
    for &page in &pages {
        set.insert(page);
        if page.0 % 3 != 0 {
            ram.write_page(page, &[page.0 as u8 | 1; PAGE_BYTES]);
        }
    }
    let mut outgoing = Outgoing::default();
    outgoing.copy_pages(&ram, &pages);
    outgoing.set_device(vec![9; 60_000]);
    let mut messages = Vec::new();
    outgoing
        .send_all(|_, kind, parts| {
            let body = parts.concat();
            assert!(body.len() <= MAX_BODY_BYTES);
            messages.push((kind, body));
            Ok::<(), ()>(())
        })
        .unwrap();
    (messages, set, ram)
}

fn collect<'a>(
    staging: &'a mut Staging,
    messages: &[(Kind, Vec<u8>)],
    union: &DirtySet,
) -> Result<VerifiedTransfer<'a>, TransferError> {
    staging.begin();
    let mut end = None;
    for (kind, body) in messages {
        match kind {
            Kind::Pages => staging.page_chunk(body, union)?,
            Kind::Device => staging.device_chunk(body, 1 << 20)?,
            Kind::End => end = Some(End::decode(body)?),
            other => panic!("unexpected {other:?}"),
        }
    }
    if staging.check(&end.expect("an end"))? == Verdict::Doubtful {
        return Err(TransferError::Content);
    }
    Ok(staging.verified())
}

#[test]
fn a_whole_transfer_arrives_as_it_was() {
    let (messages, union, source) = sample();
    assert!(messages.len() >= 4, "several page messages");
    let target = ram();
    for page in 0..PAGES as u32 {
        target.write_page(PageNumber(page), &[0xee; PAGE_BYTES]);
    }
    let mut staging = Staging::new(PAGES);
    for _reuse in 0..2 {
        let transfer = collect(&mut staging, &messages, &union).unwrap();
        assert_eq!((transfer.pages(), transfer.device_state().len()), (550, 60_000));
        let mut halves = 0;
        transfer.apply(&target, || halves += 1);
        assert_eq!(halves, 1);
    }
    let (mut a, mut b) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
    for page in (0..PAGES as u32).map(PageNumber) {
        source.read_page(page, &mut a);
        target.read_page(page, &mut b);
        assert_eq!(a == b, union.contains(page), "{page}");
    }
}

#[test]
fn copies_from_before_the_stop_are_taken_unless_the_page_was_written_since() {
    let (_, union, source) = sample();
    let zero = |page: PageNumber| page.0.is_multiple_of(3);
    let mut outgoing = Outgoing::default();
    // Pages that are not sent in the end are among them, and pages are missing.
    let ahead = (0..400).map(PageNumber).filter(|page| page.0 % 7 != 0);
    outgoing.copy_ahead(&source, ahead.clone().map(|page| (page, zero(page) || !union.contains(page))));
    let mut written = DirtySet::new(PAGES);
    for (page, fill) in [(30, 0xaa), (31, 0xbb), (32, 0), (100, 0xcc)] {
        source.write_page(PageNumber(page), &[fill; PAGE_BYTES]);
        written.insert(PageNumber(page));
    }
    let all: Vec<PageNumber> = union.iter().collect();
    let sent = || all.iter().map(|page| (*page, None));
    outgoing.copy_from(&source, sent(), Some(&written));
    let expected = ahead.filter(|page| union.contains(*page) && !written.contains(*page)).count();
    assert_eq!((outgoing.pages(), outgoing.used_ahead()), (550, expected));
    let mut messages = Vec::new();
    let mut send = |_, kind, parts: &[&[u8]]| {
        messages.push((kind, parts.concat()));
        Ok::<(), ()>(())
    };
    outgoing.send_all(&mut send).unwrap();
    let (target, mut staging) = (ram(), Staging::new(PAGES));
    collect(&mut staging, &messages, &union).unwrap().apply(&target, || ());
    let content = |ram: &GuestRam, page| {
        let mut bytes = [0; PAGE_BYTES];
        ram.read_page(page, &mut bytes);
        bytes
    };
    assert!(union.iter().all(|page| content(&source, page) == content(&target, page)));
    let nonzero = union.iter().map(|page| content(&source, page)).filter(|bytes| bytes[0] != 0);
    assert!(outgoing.nonzero_pages().eq(nonzero));
    outgoing.copy_from(&source, sent(), None);
    assert_eq!(outgoing.used_ahead(), 0, "copies are for one syncvm");
}

#[test]
fn a_lost_doubled_or_reordered_message_is_refused() {
    let (messages, union, _) = sample();
    let mut staging = Staging::new(PAGES);
    for index in 0..messages.len() - 1 {
        let mut lost = messages.clone();
        lost.remove(index);
        assert!(collect(&mut staging, &lost, &union).is_err(), "lost {index}");
        let mut doubled = messages.clone();
        doubled.insert(index, messages[index].clone());
        assert!(collect(&mut staging, &doubled, &union).is_err(), "doubled {index}");
    }
    let mut swapped = messages.clone();
    swapped.swap(0, 1);
    let refused = collect(&mut staging, &swapped, &union).unwrap_err();
    assert!(matches!(refused, TransferError::Checksum { .. }), "{refused}");
}

#[test]
fn pages_outside_the_union_are_refused() {
    let (messages, mut union, _) = sample();
    let mut smaller = DirtySet::new(PAGES);
    union.iter().filter(|page| page.0 != 300).for_each(|page| smaller.insert(page));
    union = smaller;
    let refused = collect(&mut Staging::new(PAGES), &messages, &union).unwrap_err();
    let page = PageNumber(300);
    assert_eq!(refused, TransferError::NotInUnion { page });
    let beyond = [1u32.to_le_bytes().as_slice(), &u32::MAX.to_le_bytes(), &[FLAG_ZERO]].concat();
    let refused = Staging::new(PAGES).page_chunk(&beyond, &DirtySet::all(PAGES));
    assert!(matches!(refused, Err(TransferError::NotInUnion { .. })));
}

#[test]
fn pages_for_blocks_are_copied_as_they_are_wanted() {
    let (_, _, ram) = sample();
    let union: Vec<PageNumber> = (0..PAGES as u32).map(PageNumber).collect();
    let divergent: Vec<(usize, bool)> = (0..100).map(|place| (3 * place, place % 4 == 0)).collect();
    let list = DivergentList::new(PAGES, &divergent, [0; 16]);
    let mut staging = Staging::new(PAGES);
    staging.begin_blocks(&union, &list, &list.encode(), crate::hash::HashKind::City128);
    let digests = |staging: &Staging, first, count| {
        let mut digests = Vec::new();
        staging.digests(first, count, BlockSize::default(), 1, &mut digests);
        digests
    };
    assert_eq!(staging.pages_of_blocks(), 75);
    assert!(
        digests(&staging, 0, 75).is_empty(),
        "nothing was copied: the first digests need not wait for the last page"
    );
    staging.copy_blocks(&ram, 10);
    let first = digests(&staging, 0, 75);
    assert_eq!(first.len(), 10 * digests(&staging, 0, 1).len());
    staging.copy_blocks(&ram, 1000);
    let all = digests(&staging, 0, 75);
    assert!(all.starts_with(&first) && all.len() == 75 * first.len() / 10);
    // As the guest's pages say.
    let (mut page, mut expected) = ([0; PAGE_BYTES], Vec::new());
    for (place, _) in divergent.iter().filter(|(_, zero)| !zero) {
        ram.read_page(union[*place], &mut page);
        crate::transfer::blocks::digest_page(&page, BlockSize::default(), 1, &mut expected);
    }
    assert_eq!(all, expected);
}

#[test]
fn headers_terms_and_aborts_come_back() {
    let header = Header { group: 1, view: 2, number: 3, scope: Scope::Sync, round: 4 };
    let mut message = header.encode().to_vec();
    message.push(7);
    assert_eq!(Header::decode(&message), Ok((header, &[7u8][..])));
    for (basis, transfer) in [(None, TransferMode::All), (Some(header.basis()), TransferMode::Delta)] {
        let terms = Terms {
            ram_pages: 5,
            hash: crate::hash::HashKind::Xxh3_128,
            verify: true,
            transfer,
            ahead: basis.is_none(),
            basis,
            device: basis.map(|basis| basis.number),
        };
        let mut body = terms.encode();
        assert_eq!(body.len(), Terms::BYTES);
        let piece = Piece { total_bytes: 1, offset_bytes: 0, bytes: &[8] };
        body.extend(piece.head());
        body.push(8);
        assert_eq!(Terms::decode(&body), Ok((terms, piece)));
    }
    let abort = Abort { needs_rejoin: true, hash_agreed_falsely: false, reason: "because".into() };
    assert_eq!(Abort::decode(&abort.encode()), Ok(abort.clone()));
    let abort = Abort { needs_rejoin: false, hash_agreed_falsely: true, ..abort };
    assert_eq!(Abort::decode(&abort.encode()), Ok(abort));
    for code in 0..40 {
        assert!(Kind::from_code(code).is_none_or(|kind| kind as u16 == code));
        assert_eq!(Kind::from_code(code).is_some(), (1..=21).contains(&code));
    }
}

#[test]
fn long_things_go_in_pieces_and_a_gap_is_noticed() {
    let whole: Vec<u8> = (0..3_000_000u32).map(|i| i as u8).collect();
    let pieces: Vec<Piece<'_>> = Piece::cut(&whole).collect();
    assert_eq!(pieces.len(), 3);
    let mut back = Vec::new();
    let done: Vec<bool> = pieces.iter().map(|p| p.append_to(&mut back, 1 << 22).unwrap()).collect();
    assert_eq!(done, [false, false, true]);
    assert_eq!(back, whole);
    assert!(pieces[2].append_to(&mut Vec::new(), 1 << 22).is_err(), "not the next");
    assert!(pieces[0].append_to(&mut Vec::new(), 1 << 20).is_err(), "too long");
    assert_eq!(Piece::cut(&[]).count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]
    #[test]
    fn decoders_survive_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let _ = (Header::decode(&bytes), Terms::decode(&bytes), End::decode(&bytes), Abort::decode(&bytes));
        let _ = PagesChunk::decode(&bytes).map(|chunk| chunk.pages().count());
        let mut staging = Staging::new(PAGES);
        let _ = staging.page_chunk(&bytes, &DirtySet::all(PAGES));
        let _ = staging.device_chunk(&bytes, 1000);
        let _ = staging.device_delta_chunk(&bytes, 1000);
    }

    #[test]
    fn any_flipped_bit_of_a_transfer_is_refused(at in any::<prop::sample::Index>(), which in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (mut messages, union, _) = sample();
        let message = which.index(messages.len());
        let byte = at.index(messages[message].1.len());
        messages[message].1[byte] ^= 1 << bit;
        prop_assert!(collect(&mut Staging::new(PAGES), &messages, &union).is_err());
    }
}
