//! What a syncvm peer sends: every decoder, and a whole transfer into the staging area in any order of messages.
//!
//! An input is messages of a kind byte, a length of two bytes and a body. The list of divergent pages is put together from
//! its body, because no fuzzer guesses the page counts in a list.

use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use syncvm::hash::HashKind;
use syncvm::transfer::{
    Abort, BlockSize, DeviceDelta, DivergentList, End, Header, Piece, Staging, Terms, Verdict, decode_digests,
    device_hash, differing_blocks,
};
use syncvm::{DirtySet, GuestRam, PAGE_BYTES, PageNumber};

const PAGES: usize = 16;

fn ram() -> &'static GuestRam {
    static RAM: OnceLock<GuestRam> = OnceLock::new();
    RAM.get_or_init(|| {
        let fd = memfd_create("plover-fuzz-transfer", MemfdFlags::CLOEXEC).expect("memory");
        ftruncate(&fd, (PAGES * PAGE_BYTES) as u64).expect("memory");
        GuestRam::new(fd, None).expect("memory")
    })
}

pub(crate) fn run(input: &[u8]) {
    let union: Vec<PageNumber> = (0..PAGES as u32).map(PageNumber).collect();
    let set = DirtySet::all(PAGES);
    let mut staging = Staging::new(PAGES);
    let mut blocks = None;
    let mut held = Vec::new();
    let mut rest = input;
    while let Some((&[kind, low, high], tail)) = rest.split_first_chunk::<3>() {
        let length = usize::from(u16::from_le_bytes([low, high])).min(tail.len());
        let (body, tail) = tail.split_at(length);
        rest = tail;
        match kind % 13 {
            0 => drop(Header::decode(body)),
            1 => drop(Terms::decode(body)),
            2 => drop(Abort::decode(body)),
            3 => drop(DirtySet::decode(body, body.len())),
            4 => drop(DivergentList::decode(body, PAGES)),
            5 => digests(body),
            6 => {
                blocks = BlockSize::from_code(kind >> 4).inspect(|_| begin_blocks(&mut staging, &union, body));
            }
            7 => drop(blocks.map(|size| staging.blocks_chunk(body, size))),
            8 => drop(staging.replacement(body)),
            9 if blocks.is_none() => drop(staging.page_chunk(body, &set)),
            10 => drop(staging.device_chunk(body, 1000)),
            11 => device_delta(&mut staging, &held, body),
            _ => finish(&mut staging, body, &mut held),
        }
    }
}

/// Two bits for a page: it differs, and it is zero.
fn begin_blocks(staging: &mut Staging, union: &[PageNumber], body: &[u8]) {
    let flags = body.iter().flat_map(|byte| [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6]);
    let divergent: Vec<(usize, bool)> = flags
        .take(PAGES)
        .enumerate()
        .filter(|(_, flags)| flags & 1 != 0)
        .map(|(at, flags)| (at, flags & 2 != 0))
        .collect();
    let list = DivergentList::new(PAGES, &divergent, [0; 16]);
    let wire = list.encode();
    assert_eq!(DivergentList::decode(&wire, PAGES).as_ref(), Ok(&list), "a list changes on its way");
    staging.begin_blocks(union, &list, &wire, HashKind::Xxh3_128);
    // All of them, or as many as there are.
    staging.copy_blocks(ram(), if body.len().is_multiple_of(2) { PAGES } else { body.len() });
}

fn digests(body: &[u8]) {
    if let Ok((size, digests)) = decode_digests(body) {
        for theirs in digests {
            assert_eq!(
                differing_blocks(&[0; PAGE_BYTES], theirs, size, 1).checked_shr(size.per_page() as u32).unwrap_or(0),
                0
            );
        }
    }
}

/// A delta to the device state `held` with the hash of what comes out, because no fuzzer guesses one.
fn device_delta(staging: &mut Staging, held: &[u8], body: &[u8]) {
    let mut wire = [&[0; 8], body].concat();
    if let Ok(state) = DeviceDelta::decode(&wire, 1000).and_then(|delta| delta.apply(held)) {
        assert!(state.len() <= 1000);
        wire[..8].copy_from_slice(&device_hash(&state).to_le_bytes());
        let head = Piece { total_bytes: wire.len() as u64, offset_bytes: 0, bytes: &wire }.head();
        let _ = staging.device_delta_chunk(&[&head, &wire[..]].concat(), 1000);
    }
    let _ = staging.device_delta_chunk(body, 1000);
}

/// An end message that says what is true as far as it can be guessed, and the rest as in `body`.
fn finish(staging: &mut Staging, body: &[u8], held: &mut Vec<u8>) {
    if let Ok(end) = End::decode(body)
        && staging.check(&end) == Ok(Verdict::Sound)
    {
        let transfer = staging.verified();
        assert_eq!(transfer.pages() as u64, end.pages);
        transfer.apply(ram(), || {});
        *held = transfer.device_state().to_vec();
        assert_eq!(staging.keep_device(), device_hash(held));
    }
    let _ = staging.short_hashes();
}
