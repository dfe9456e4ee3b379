//! `Pairing`: what one replica knows about how its guest differs from its peer's.
//!
//! It is the accumulated dirty set plus the **basis** that the set is relative to. Dirty pages go in as they
//! are harvested and come out only when an exchange that covered them was acknowledged; an exchange that
//! fails puts them back. Losing the dirty set of an aborted exchange is the classic defect of this kind
//! of system: the next exchange then misses pages.
//!
//! The basis makes misuse visible. A pairing starts with every page in its set. Whenever an exchange covers
//! every page it gets a new basis, which the peer adopts; a set that is not everything is only
//! meaningful to a peer that stands on the same basis, and any other peer refuses it. So a set kept for
//! an old secondary cannot silently be used towards a new one.

use crate::dirty::DirtySet;

/// Names the exchange that last covered every page: where a pairing began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Basis {
    /// The view of that exchange.
    pub view: u64,
    /// Its number.
    pub number: u64,
    /// Its round (see [`crate::transfer::Header::round`]).
    pub round: u32,
}

/// The accumulated dirty set towards one peer.
///
/// It outlives roles: after a planned failover the old secondary's pairing serves the new leader and
/// the other way round, because both record what their own guest wrote since they were equal.
#[derive(Debug)]
pub struct Pairing {
    basis: Option<Basis>,
    pending: DirtySet,
    in_flight: DirtySet,
}

impl Pairing {
    /// A pairing with a peer of which nothing is known: every page may differ.
    #[must_use]
    pub fn fresh(pages: usize) -> Self {
        Self { basis: None, pending: DirtySet::all(pages), in_flight: DirtySet::new(pages) }
    }

    /// How many pages the RAM file has.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pending.pages()
    }

    /// What the set is relative to; `None` until an exchange covered every page.
    #[must_use]
    pub fn basis(&self) -> Option<Basis> {
        self.basis
    }

    /// Where harvested pages go.
    pub fn pending(&mut self) -> &mut DirtySet {
        &mut self.pending
    }

    /// How many pages the next exchange has to cover, as far as harvested.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        self.pending.count()
    }

    /// Forgets everything known about the peer: every page may differ again.
    pub fn forget_peer(&mut self) {
        self.basis = None;
        self.in_flight.clear();
        self.pending.fill();
    }

    /// Begins an exchange and returns the set that it has to cover. Pages harvested from now on belong to the
    /// next one. `basis` names the exchange and is taken if the set is every page.
    ///
    /// # Panics
    /// When an exchange is already open.
    pub(crate) fn open(&mut self, basis: Basis) -> &DirtySet {
        assert!(self.in_flight.is_empty(), "an exchange is already open");
        std::mem::swap(&mut self.pending, &mut self.in_flight);
        if self.in_flight.is_all() {
            self.basis = Some(basis);
        }
        &self.in_flight
    }

    /// The open exchange's set; empty if none is open.
    pub(crate) fn in_flight(&self) -> &DirtySet {
        &self.in_flight
    }

    /// The exchange was acknowledged: its pages are equal on both sides.
    pub(crate) fn commit(&mut self) {
        self.in_flight.clear();
    }

    /// The exchange failed: its pages stay to be covered.
    pub(crate) fn abort(&mut self) {
        self.pending.union_with(&self.in_flight);
        self.in_flight.clear();
    }

    /// Adopts the leader's basis: from now on the set means "since then".
    pub(crate) fn adopt(&mut self, basis: Option<Basis>) {
        self.basis = basis;
    }

    /// Starts over on the leader's basis with nothing dirty: round 0 of a rejoin covers every page.
    pub(crate) fn restart(&mut self, basis: Option<Basis>) {
        self.basis = basis;
        self.pending.clear();
        self.in_flight.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageNumber;

    fn basis(number: u64) -> Basis {
        Basis { view: 1, number, round: 0 }
    }

    #[test]
    fn an_aborted_exchange_loses_no_page() {
        let mut pairing = Pairing::fresh(100);
        assert!(pairing.open(basis(1)).is_all());
        pairing.commit();
        pairing.pending().insert(PageNumber(3));
        assert_eq!(pairing.open(basis(2)).count(), 1);
        pairing.pending().insert(PageNumber(4));
        pairing.abort();
        assert_eq!(pairing.pending_count(), 2);
        assert_eq!(pairing.open(basis(3)).count(), 2);
        pairing.pending().insert(PageNumber(3));
        pairing.commit();
        assert_eq!(pairing.pending_count(), 1, "written after the harvest");
        assert_eq!(pairing.basis(), Some(basis(1)), "only full coverage moves it");
        pairing.forget_peer();
        assert!(pairing.basis().is_none() && pairing.pending().is_all());
    }
}
