//! Hashing ahead of the stop: harvest and hash while the guest still runs, harvest again at the stop and hash only what was
//! written between. The second harvest finds little.
//!
//! Both sides do so at the same time, each for itself, when they are told to begin. The stop is shorter by most of the hashing, the whole
//! exchange longer by one harvest; that is why it is left out where little is dirty.

use std::time::{Duration, Instant};

use super::{ExchangeConfig, Guest, SyncError};
use crate::dirty::DirtySet;
use crate::hash::SlotHasher;
use crate::pairing::Pairing;

/// Longest time before the stop. The peer waits for this side's set meanwhile, and the guest's output is held.
const MOST: Duration = Duration::from_millis(20);

/// Dirty pages that are worth a harvest more: one of so many. A harvest takes 1.4 to 3 ns for each page of RAM, hashing 600 ns
/// for each dirty one: from here on a fifth is spent of what is saved of the stop. At one of 128, a Redis guest on two busy cores did
/// it now and then and was no faster.
const ONE_OF: usize = 40;

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

/// Hashes what the running guest has written, if that is switched on, of use, and worth it going by the `usual` number of pages.
pub(super) fn hash<G: Guest>(
    guest: &mut G,
    pairing: &mut Pairing,
    hasher: &mut SlotHasher,
    config: &ExchangeConfig,
    usual: usize,
) -> Result<(), SyncError> {
    let until = Instant::now() + MOST;
    let possible = guest.harvest_tells_pages_apart() && !guest.harvest_needs_stop();
    let worth_it = usual * ONE_OF >= pairing.pages();
    if !config.background_hashing || !config.transfer.compares() || !possible || !worth_it {
        return Ok(());
    }
    harvest(guest, pairing, hasher)?;
    let pending: &DirtySet = pairing.pending();
    hasher.hash_ahead(config.hash, guest.ram(), pending, until);
    Ok(())
}
