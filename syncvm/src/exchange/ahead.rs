//! Comparing ahead of the stop: the two sides harvest, tell each other what is dirty, hash it and compare while their guests
//! still run, and the leader copies what differs. At the stop they harvest again, and only pages that either guest wrote between
//! the two harvests are told, hashed, compared and copied again. The second harvest finds little.
//!
//! What was said before the stop holds of a page that neither second harvest has: each side read it after its first harvest,
//! so the page was the same when it was hashed, when it was copied and at the stop ([`SlotHasher`] says why). A page that
//! either second harvest has is treated as if nothing had been said. Both sides know both harvests and so agree which these are.
//! Should they ever not, the follower finds that the hashes over all equal pages and over all patched pages are not the leader's.
//!
//! The stop is shorter by most of what is done in it, the whole exchange longer by one harvest and one round trip; that is why it is
//! left out where little is dirty, and where the guest is idle: nobody minds the stop then, and its clients wait for the whole
//! exchange. The leader decides, by the last union, which both know, and by its own guest; a follower that finds it of another
//! mind stops later than it could have, or stands still while it compares ahead.

use super::{Channel, Deadlines, ExchangeConfig, Guest, Link, SyncError};
use crate::dirty::DirtySet;
use crate::hash::SlotHasher;
use crate::page::PageNumber;
use crate::pairing::Pairing;
use crate::transfer::{Header, Kind, Terms, TransferMode};

/// Most pages that are compared ahead: some 20 ms of hashing. The guests' output is held meanwhile, and their guests go on dirtying pages.
const MOST_PAGES: usize = 32_768;

/// Most pages that are copied ahead: 64 MiB, which the staging area keeps in any case.
pub(super) const MOST_COPIES: usize = 16_384;

/// Dirty pages that are worth a harvest more: one of so many. A harvest takes 1.4 to 3 ns for each page of RAM, hashing 600 ns
/// for each dirty one: from here on a fifth is spent of what is saved of the stop. At one of 128, a Redis guest on two busy cores did
/// it now and then and was no faster.
const ONE_OF: usize = 40;

/// What the two sides said to each other before the stop.
pub(super) struct Ahead {
    /// The peer's dirty set.
    theirs: DirtySet,
    /// The pages that were compared, ascending.
    pub pages: Vec<PageNumber>,
    /// The pages of which nothing more has to be said: compared, and as they were. None before [`Self::whole_set`].
    settled: DirtySet,
    /// Leader: the follower's hashes of the pages, as they came.
    pub hashes: Vec<u8>,
}

impl Ahead {
    fn new(ours: &DirtySet, theirs: DirtySet) -> Self {
        let mut union = theirs.clone();
        union.union_with(ours);
        let pages: Vec<PageNumber> = union.iter().take(MOST_PAGES).collect();
        Self { settled: DirtySet::new(union.pages()), theirs, pages, hashes: Vec::new() }
    }

    /// The leader's beginning: it says what is dirty, and learns it of the follower.
    pub fn ask<C: Channel>(
        link: &mut Link<C>,
        header: &Header,
        terms: &Terms,
        ours: &DirtySet,
        deadlines: &Deadlines,
    ) -> Result<Self, SyncError> {
        link.send_set(header, Kind::AheadSet, terms, ours, deadlines)?;
        let (_, mut theirs) = link.recv_set(header, Kind::AheadSet, terms, deadlines)?;
        theirs.symmetric_difference_with(ours);
        Ok(Self::new(ours, theirs))
    }

    /// The follower's beginning, once it has the leader's set.
    pub fn answer<C: Channel>(
        link: &mut Link<C>,
        header: &Header,
        terms: &Terms,
        ours: &DirtySet,
        leader: DirtySet,
        deadlines: &Deadlines,
    ) -> Result<Self, SyncError> {
        let mut difference = leader.clone();
        difference.symmetric_difference_with(ours);
        link.send_set(header, Kind::AheadSet, terms, &difference, deadlines)?;
        Ok(Self::new(ours, leader))
    }

    /// The peer's whole dirty set: what it said before and what it and we `wrote` since, as harvested at the stop.
    fn whole_set(&mut self, we_wrote: &DirtySet, mut they_wrote: DirtySet) -> DirtySet {
        self.settled.clear();
        self.pages.iter().for_each(|page| self.settled.insert(*page));
        self.settled.subtract(we_wrote);
        self.settled.subtract(&they_wrote);
        they_wrote.union_with(&self.theirs);
        they_wrote
    }

    /// Whether nothing more has to be said of this page.
    fn is_settled(&self, page: PageNumber) -> bool {
        self.settled.contains(page)
    }
}

/// The peer's whole dirty set, from what it says at the stop and what we say there.
pub(super) fn whole_set(ahead: &mut Option<Ahead>, ours: &DirtySet, theirs: DirtySet) -> DirtySet {
    match ahead {
        Some(ahead) => ahead.whole_set(ours, theirs),
        None => theirs,
    }
}

/// Whether the follower's hash of this page is due at the stop.
pub(super) fn is_due(ahead: Option<&Ahead>, page: PageNumber) -> bool {
    !ahead.is_some_and(|ahead| ahead.is_settled(page))
}

/// Looks up the follower's hashes of pages that are not due, in ascending order, of `hash_bytes` each.
pub(super) fn their_hashes<'a>(
    ahead: Option<&'a Ahead>,
    hash_bytes: usize,
) -> impl FnMut(PageNumber) -> Option<&'a [u8]> {
    let mut at = 0;
    move |page| {
        let ahead = ahead.filter(|ahead| ahead.is_settled(page))?;
        at += ahead.pages[at..].iter().take_while(|known| **known < page).count();
        Some(&ahead.hashes[at * hash_bytes..][..hash_bytes])
    }
}

/// Harvests into the pairing. A harvest that fails may have lost pages, so every page counts as dirty.
pub(super) fn harvest<G: Guest>(
    guest: &mut G,
    pairing: &mut Pairing,
    hasher: &mut SlotHasher,
) -> Result<(), SyncError> {
    let harvested = hasher.harvest(pairing.pending(), |into| guest.harvest(into));
    if harvested.is_err() {
        pairing.pending().fill();
    }
    Ok(harvested?)
}

/// Whether this guest can be harvested while it runs, and that tells anything.
pub(super) fn is_possible<G: Guest>(guest: &G) -> bool {
    guest.harvest_tells_pages_apart() && !guest.harvest_needs_stop()
}

/// Whether pages are to be compared ahead, and that is worth it going by the `usual` number of pages of a guest with so many.
pub(super) fn is_wanted(config: &ExchangeConfig, transfer: TransferMode, usual: usize, ram_pages: usize) -> bool {
    config.background_hashing && transfer.compares() && usual * ONE_OF >= ram_pages
}
