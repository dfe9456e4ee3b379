//! The first of the two levels of a comparison of all RAM: one digest stands for a granule of 2 MiB.
//!
//! The joiner sends the digests of a batch of granules, the leader answers which differ, and the page hashes of those follow.
//! Both sides keep the page hashes that the digests were made of: nothing is hashed twice. On the leader's side a page may be
//! written after it was hashed; it is in the next harvest then, whatever was found here.

use crate::exchange::{BATCH_PAGES, Channel, Deadlines, FollowerContext, Guest, LeaderContext, Observer, SyncError};
use crate::hash::{HASH_BYTES, HashKind, PageHashValue};
use crate::page::PageNumber;
use crate::transfer::{Header, Kind, WireError};

/// Pages that one digest stands for: 2 MiB.
const GRANULE_PAGES: usize = 512;
/// Digests of a batch go in one message. Not of more: while a side hashes, the other hears nothing, and `sync_timeout_ms` may
/// be short.
const _: () = assert!(BATCH_PAGES.is_multiple_of(GRANULE_PAGES));

/// Pages of the granules that differ, and their hashes here.
type Rest = (Vec<PageNumber>, Vec<PageHashValue>);

fn digests(kind: HashKind, hashes: &[PageHashValue]) -> Vec<PageHashValue> {
    hashes.chunks(GRANULE_PAGES).map(|granule| kind.of_hashes(granule)).collect()
}

fn rest(section: &[PageNumber], hashes: &[PageHashValue], differs: &[u8]) -> Rest {
    let mut rest = (Vec::new(), Vec::new());
    for ((pages, hashes), differs) in section.chunks(GRANULE_PAGES).zip(hashes.chunks(GRANULE_PAGES)).zip(differs) {
        if *differs != 0 {
            rest.0.extend_from_slice(pages);
            rest.1.extend_from_slice(hashes);
        }
    }
    rest
}

/// The leader's side.
pub(super) fn lead<G: Guest, C: Channel, O: Observer>(
    ctx: &mut LeaderContext<G, C, O>,
    header: &Header,
    deadlines: &Deadlines,
    section: &[PageNumber],
    hashes: &[PageHashValue],
) -> Result<Rest, SyncError> {
    let ours = digests(ctx.config.hash, hashes);
    let theirs = ctx.link.expect(header, Kind::Granules, "digests of granules", deadlines)?;
    if theirs.len() != ours.len() * HASH_BYTES {
        return Err(WireError::Value { field: "number of digest bytes", value: theirs.len() as u64 }.into());
    }
    let pairs = ours.iter().zip(theirs.chunks_exact(HASH_BYTES));
    let differs: Vec<u8> = pairs.map(|(ours, theirs)| u8::from(ours != theirs)).collect();
    ctx.link.send(header, Kind::Differing, &[&differs], deadlines.next())?;
    Ok(rest(section, hashes, &differs))
}

/// The joiner's side.
pub(super) fn follow<G: Guest, C: Channel, O: Observer>(
    ctx: &mut FollowerContext<G, C, O>,
    header: &Header,
    deadlines: &Deadlines,
    section: &[PageNumber],
    hashes: &[PageHashValue],
) -> Result<Rest, SyncError> {
    let ours = digests(ctx.config.hash, hashes);
    ctx.link.send(header, Kind::Granules, &[ours.as_flattened()], deadlines.next())?;
    let differs = ctx.link.expect(header, Kind::Differing, "the granules that differ", deadlines)?;
    if differs.len() != ours.len() {
        return Err(WireError::Value { field: "number of granules", value: differs.len() as u64 }.into());
    }
    Ok(rest(section, hashes, differs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]
        #[test]
        fn exactly_the_granules_with_a_page_that_differs_are_left(
            pages in 1usize..2000, changed in prop::collection::vec(any::<prop::sample::Index>(), 0..4)
        ) {
            let section: Vec<PageNumber> = (0..pages as u32).map(PageNumber).collect();
            let ours: Vec<PageHashValue> = (0..pages).map(|page| (page as u128).to_le_bytes()).collect();
            let mut theirs = ours.clone();
            let changed: Vec<usize> = changed.iter().map(|at| at.index(pages)).collect();
            changed.iter().for_each(|&page| theirs[page][15] ^= 1 + (page % 3) as u8);
            for kind in [HashKind::City128, HashKind::Xxh3_128] {
                let (ours_digests, theirs_digests) = (digests(kind, &ours), digests(kind, &theirs));
                let differs: Vec<u8> = ours_digests.iter().zip(&theirs_digests).map(|(a, b)| u8::from(a != b)).collect();
                let (left, hashes) = rest(&section, &ours, &differs);
                // A page that was changed twice may be as it was.
                let differ = |page: &usize| ours[*page] != theirs[*page];
                let granules: std::collections::BTreeSet<usize> =
                    changed.iter().filter(|page| differ(page)).map(|page| page / GRANULE_PAGES).collect();
                let expected: Vec<PageNumber> =
                    section.iter().filter(|page| granules.contains(&(page.index() / GRANULE_PAGES))).copied().collect();
                prop_assert_eq!(&left, &expected);
                prop_assert!(left.iter().zip(&hashes).all(|(page, hash)| *hash == ours[page.index()]));
            }
        }
    }
}
