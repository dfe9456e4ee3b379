//! `DivergentList`: which pages of the union differ, told by the leader so that the follower can digest their blocks.
//!
//! Both sides know the union as an ascending list, so a page is named by its place in that list: one bit. The list also
//! carries what makes 4-byte hashes enough on the way there: one 128-bit hash over the full hashes of all pages that the
//! leader takes for equal. The follower has the same hashes; if its own hash over them differs, a short hash has let a
//! difference through, and nothing of the exchange counts. The list of the union is hashed in front, because places mean
//! nothing unless both sides have the same one.

use xxhash_rust::xxh3::Xxh3;

use super::WireError;
use crate::dirty::DirtySet;
use crate::hash::PageHashValue;
use crate::page::PageNumber;
use crate::wire::Reader;

/// Bytes of a page hash that are compared first.
pub const SHORT_HASH_BYTES: usize = 4;

/// The part of a page hash that is compared first.
#[must_use]
pub fn short(hash: &PageHashValue) -> [u8; SHORT_HASH_BYTES] {
    [hash[0], hash[1], hash[2], hash[3]]
}

/// One 128-bit hash over a series of page hashes.
#[derive(Clone, Default)]
pub struct HashOfHashes(Xxh3);

impl HashOfHashes {
    /// Page numbers hashed at a time.
    const CHUNK_PAGES: usize = 1024;

    /// Begins with the pages that the places of a [`DivergentList`] mean.
    #[must_use]
    pub fn over(union: &[PageNumber]) -> Self {
        let mut hash = Self::default();
        let mut numbers = [0; 4 * Self::CHUNK_PAGES];
        for pages in union.chunks(Self::CHUNK_PAGES) {
            let numbers = &mut numbers[..4 * pages.len()];
            for (into, page) in numbers.chunks_exact_mut(4).zip(pages) {
                into.copy_from_slice(&page.0.to_le_bytes());
            }
            hash.0.update(numbers);
        }
        hash
    }

    /// Adds the next page's hash.
    pub fn add(&mut self, hash: &PageHashValue) {
        self.0.update(hash);
    }

    /// The hash over all so far.
    #[must_use]
    pub fn value(&self) -> [u8; 16] {
        self.0.digest128().to_le_bytes()
    }
}

impl std::fmt::Debug for HashOfHashes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HashOfHashes({:02x?})", self.value())
    }
}

/// The body of [`super::Kind::Divergent`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DivergentList {
    /// Over the union and the full hashes of its pages that are not in the list, in order.
    pub equal_hash: [u8; 16],
    /// Places in the union.
    places: DirtySet,
    /// Which of these pages, counted from the first of the list, are zero on the leader.
    zero: DirtySet,
}

impl DivergentList {
    /// The list of the places in a union of `union_pages` pages that `divergent` gives in ascending order, each with
    /// whether that page is zero on the leader.
    pub fn new(union_pages: usize, divergent: &[(usize, bool)], equal_hash: [u8; 16]) -> Self {
        let mut places = DirtySet::new(union_pages);
        let mut zero = DirtySet::new(divergent.len());
        for (index, &(place, is_zero)) in divergent.iter().enumerate() {
            places.insert(PageNumber(place as u32));
            if is_zero {
                zero.insert(PageNumber(index as u32));
            }
        }
        Self { equal_hash, places, zero }
    }

    /// The places in ascending order, each with whether that page is zero.
    pub fn iter(&self) -> impl Iterator<Item = (usize, bool)> + '_ {
        self.places.iter().enumerate().map(|(at, place)| (place.index(), self.zero.contains(PageNumber(at as u32))))
    }

    /// Whether the page at this place of the union is in the list.
    #[must_use]
    pub fn contains(&self, place: usize) -> bool {
        u32::try_from(place).is_ok_and(|place| self.places.contains(PageNumber(place)))
    }

    /// How many pages are in the list.
    #[must_use]
    pub fn len(&self) -> usize {
        self.zero.pages()
    }

    /// Whether no page differs.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The longest wire form for a union of this many pages.
    #[must_use]
    pub fn max_encoded_bytes(union_pages: usize) -> usize {
        16 + 8 + 2 * DirtySet::max_encoded_bytes(union_pages)
    }

    /// The wire form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.equal_hash.to_vec();
        let mut places = Vec::new();
        self.places.encode(&mut places);
        out.extend_from_slice(&(places.len() as u64).to_le_bytes());
        out.extend_from_slice(&places);
        self.zero.encode(&mut out);
        out
    }

    /// Reads the wire form for a union of `union_pages` pages.
    ///
    /// # Errors
    /// When the bytes are no list over such a union.
    pub fn decode(bytes: &[u8], union_pages: usize) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let mut equal_hash = [0; 16];
        equal_hash.copy_from_slice(reader.take(16, "hash of the equal pages")?);
        let length = usize::try_from(reader.u64("length of the list")?).unwrap_or(usize::MAX);
        let places = DirtySet::decode(reader.take(length, "divergent pages")?, union_pages)?;
        let zero = DirtySet::decode(reader.0, places.count())?;
        Ok(Self { equal_hash, places, zero })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]
        #[test]
        fn lists_come_back(flags in prop::collection::vec(0u8..3, 0..300), equal_hash in any::<[u8; 16]>()) {
            let divergent: Vec<(usize, bool)> =
                flags.iter().enumerate().filter(|(_, flag)| **flag > 0).map(|(at, flag)| (at, *flag == 2)).collect();
            let list = DivergentList::new(flags.len(), &divergent, equal_hash);
            prop_assert_eq!(list.iter().collect::<Vec<_>>(), divergent);
            let wire = list.encode();
            prop_assert!(wire.len() <= DivergentList::max_encoded_bytes(flags.len()));
            prop_assert_eq!(DivergentList::decode(&wire, flags.len()), Ok(list.clone()));
            prop_assert!(DivergentList::decode(&wire, flags.len() + 1).is_err());
            for place in 0..flags.len() + 70 {
                prop_assert_eq!(list.contains(place), flags.get(place).is_some_and(|flag| *flag > 0));
            }
        }

        #[test]
        fn decoder_survives_arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..120), length in 0u64..40, pages in 0usize..80) {
            let _ = DivergentList::decode(&bytes, pages);
            let mut wire = vec![0; 16];
            wire.extend(length.to_le_bytes());
            wire.extend((pages as u64).to_le_bytes());
            wire.extend(bytes);
            if let Ok(list) = DivergentList::decode(&wire, pages) {
                prop_assert!(list.iter().all(|(place, _)| place < pages));
            }
        }
    }
}
