//! `DirtySet`: which pages of the RAM file may have changed.
//!
//! One bit per page in a plain vector of words: 32 KiB per GiB, union at memory speed, no allocation after
//! creation. Rejected: roaring bitmaps and sorted lists, which win only for sets far sparser than what a
//! slot leaves behind, and cost allocations on the stop path. The compact form exists on the wire only.

mod encoding;

use crate::page::PageNumber;

const WORD_BITS: usize = 64;

/// A fixed-size set of pages. Two sets that meet must have the same size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtySet {
    pages: usize,
    words: Vec<u64>,
}

impl DirtySet {
    /// An empty set over `pages` pages.
    ///
    /// # Panics
    /// When `pages` does not fit a [`PageNumber`].
    #[must_use]
    pub fn new(pages: usize) -> Self {
        assert!(pages <= u32::MAX as usize, "{pages} pages exceed a PageNumber");
        Self { pages, words: vec![0; pages.div_ceil(WORD_BITS)] }
    }

    /// The set of all `pages` pages.
    #[must_use]
    pub fn all(pages: usize) -> Self {
        let mut set = Self::new(pages);
        set.insert_range(0, pages);
        set
    }

    /// How many pages the RAM file has (not how many are in the set).
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Adds one page.
    ///
    /// # Panics
    /// When the page lies beyond the RAM file.
    pub fn insert(&mut self, page: PageNumber) {
        assert!(page.index() < self.pages, "{page} is beyond {} pages", self.pages);
        self.words[page.index() / WORD_BITS] |= 1 << (page.index() % WORD_BITS);
    }

    /// Adds the pages `first..first + count`.
    ///
    /// # Panics
    /// When the range leaves the RAM file.
    pub fn insert_range(&mut self, first: usize, count: usize) {
        let end = first.checked_add(count).expect("page range overflows");
        assert!(end <= self.pages, "pages {first}..{end} are beyond {}", self.pages);
        let mut at = first;
        while at < end {
            let bit = at % WORD_BITS;
            let run = (WORD_BITS - bit).min(end - at);
            self.words[at / WORD_BITS] |= (u64::MAX >> (WORD_BITS - run)) << bit;
            at += run;
        }
    }

    /// Adds every page of `other`.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "dirty sets of different guests meet");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// Removes every page of `other`.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn subtract(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "dirty sets of different guests meet");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Keeps the pages that are in exactly one of the two sets: what has to be said to somebody who knows `other`.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn symmetric_difference_with(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "dirty sets of different guests meet");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine ^= theirs;
        }
    }

    /// Makes this set equal to `other` without allocating.
    ///
    /// # Panics
    /// When the sizes differ.
    pub fn copy_from(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "dirty sets of different guests meet");
        self.words.copy_from_slice(&other.words);
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds every page.
    pub fn fill(&mut self) {
        self.insert_range(0, self.pages);
    }

    /// Whether `page` is in the set; `false` beyond the RAM file.
    #[must_use]
    pub fn contains(&self, page: PageNumber) -> bool {
        page.index() < self.pages && self.words[page.index() / WORD_BITS] >> (page.index() % WORD_BITS) & 1 == 1
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Whether every page is in the set.
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.count() == self.pages
    }

    /// The pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = PageNumber> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                (rest != 0).then(|| {
                    let bit = rest.trailing_zeros();
                    rest &= rest - 1;
                    PageNumber(index as u32 * WORD_BITS as u32 + bit)
                })
            })
        })
    }

    /// The maximal runs `(first, count)` of neighbouring pages, ascending.
    fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next_where(at, false)?;
            let end = self.next_where(first, true).unwrap_or(self.pages);
            at = end;
            Some((first, end - first))
        })
    }

    /// The first page at or after `from` that is in the set, or that is not (`absent`).
    fn next_where(&self, from: usize, absent: bool) -> Option<usize> {
        let flip = if absent { u64::MAX } else { 0 };
        let mut index = from / WORD_BITS;
        let mut word = (self.words.get(index)? ^ flip) & (u64::MAX << (from % WORD_BITS));
        while word == 0 {
            index += 1;
            word = self.words.get(index)? ^ flip;
        }
        let at = index * WORD_BITS + word.trailing_zeros() as usize;
        (at < self.pages).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[derive(Clone, Debug)]
    enum Op {
        Insert(usize),
        Range(usize, usize),
        Union(Vec<usize>),
        Subtract(Vec<usize>),
        Difference(Vec<usize>),
        Clear,
        Fill,
    }

    fn op(pages: usize) -> impl Strategy<Value = Op> {
        prop_oneof![
            8 => (0..pages).prop_map(Op::Insert),
            8 => (0..=pages, 0..=pages).prop_map(|(a, b)| Op::Range(a.min(b), a.max(b) - a.min(b))),
            4 => prop::collection::vec(0..pages, 0..20).prop_map(Op::Union),
            4 => prop::collection::vec(0..pages, 0..20).prop_map(Op::Subtract),
            4 => prop::collection::vec(0..pages, 0..20).prop_map(Op::Difference),
            1 => Just(Op::Clear),
            1 => Just(Op::Fill),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]
        #[test]
        fn behaves_like_a_set_of_integers(
            (pages, ops) in (1usize..400).prop_flat_map(|p| (Just(p), prop::collection::vec(op(p), 0..30)))
        ) {
            let mut set = DirtySet::new(pages);
            let mut oracle = BTreeSet::new();
            for op in ops {
                match op {
                    Op::Insert(page) => { set.insert(PageNumber(page as u32)); oracle.insert(page); }
                    Op::Range(first, count) => { set.insert_range(first, count); oracle.extend(first..first + count); }
                    Op::Union(list) => {
                        let mut other = DirtySet::new(pages);
                        list.iter().for_each(|&page| other.insert(PageNumber(page as u32)));
                        set.union_with(&other);
                        oracle.extend(list);
                    }
                    Op::Subtract(list) => {
                        let mut other = DirtySet::new(pages);
                        list.iter().for_each(|&page| other.insert(PageNumber(page as u32)));
                        set.subtract(&other);
                        list.iter().for_each(|page| { oracle.remove(page); });
                    }
                    Op::Difference(list) => {
                        let theirs: BTreeSet<usize> = list.into_iter().collect();
                        let mut other = DirtySet::new(pages);
                        theirs.iter().for_each(|&page| other.insert(PageNumber(page as u32)));
                        set.symmetric_difference_with(&other);
                        oracle = &oracle ^ &theirs;
                    }
                    Op::Clear => { set.clear(); oracle.clear(); }
                    Op::Fill => { set.fill(); oracle.extend(0..pages); }
                }
                let listed: Vec<usize> = set.iter().map(PageNumber::index).collect();
                prop_assert_eq!(&listed, &oracle.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(set.count(), oracle.len());
                prop_assert_eq!(set.is_empty(), oracle.is_empty());
                prop_assert_eq!(set.is_all(), oracle.len() == pages);
                let from_runs: Vec<usize> = set.runs().flat_map(|(first, count)| first..first + count).collect();
                prop_assert_eq!(&from_runs, &listed);
                for page in 0..pages + 70 {
                    prop_assert_eq!(set.contains(PageNumber(page as u32)), oracle.contains(&page));
                }
                let mut wire = Vec::new();
                set.encode(&mut wire);
                prop_assert!(wire.len() <= DirtySet::max_encoded_bytes(pages));
                prop_assert_eq!(&DirtySet::decode(&wire, pages).unwrap(), &set);
                prop_assert!(DirtySet::decode(&wire, pages + 1).is_err());
            }
        }

        #[test]
        fn decoder_survives_arbitrary_bytes(
            bytes in prop::collection::vec(any::<u8>(), 0..200), pages in 0usize..300, aligned in any::<bool>()
        ) {
            // With the right page count in front the decoder gets past its first check.
            let mut wire = if aligned { (pages as u64).to_le_bytes().to_vec() } else { Vec::new() };
            wire.extend(bytes);
            if let Ok(set) = DirtySet::decode(&wire, pages) {
                prop_assert!(set.iter().all(|page| page.index() < pages));
            }
        }
    }

    #[test]
    fn full_and_sparse_sets_are_tiny_on_the_wire() {
        let mut wire = Vec::new();
        DirtySet::all(1 << 20).encode(&mut wire);
        assert!(wire.len() < 20, "{}", wire.len());
        let mut dense = DirtySet::new(4096);
        (0..4096).step_by(2).for_each(|page| dense.insert(PageNumber(page)));
        wire.clear();
        dense.encode(&mut wire);
        assert_eq!(wire.len(), 9 + 512, "raw words win");
    }
}
