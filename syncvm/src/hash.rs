//! Page hashes: 128 bits that stand for a page's content (PLOVER §5.2).
//!
//! 128 bits because equality of hashes is taken as equality of pages: with 2^50 compared pages the chance of
//! one false match is below 2^-28. 64 bits would not do. Both hashes are keyless; guests are not treated as
//! adversaries of their own replication.

mod cache;
mod city;
mod pool;

use std::fmt;
use std::str::FromStr;

pub use cache::SlotHasher;
pub use pool::HashPool;

use crate::page::PAGE_BYTES;

/// Bytes of one page hash.
pub const HASH_BYTES: usize = 16;

/// The hash of one page.
pub type PageHashValue = [u8; HASH_BYTES];

/// A function from content to 128 bits.
pub trait PageHash {
    /// Hashes one page, or anything else.
    fn hash(page: &[u8]) -> PageHashValue;
}

/// CityHash 1.1 128 bit, the design's choice (PLOVER §5.2 uses CityHash).
pub struct City128;

impl PageHash for City128 {
    fn hash(page: &[u8]) -> PageHashValue {
        match page.try_into() {
            Ok(page) => city::hash_page(page),
            Err(_) => cityhash_rs::cityhash_110_128(page).to_le_bytes(),
        }
    }
}

/// XXH3 128 bit: faster than CityHash on one page in cache, no faster on pages that come from memory (docs/performance.md).
pub struct Xxh3_128;

impl PageHash for Xxh3_128 {
    fn hash(page: &[u8]) -> PageHashValue {
        xxhash_rust::xxh3::xxh3_128(page).to_le_bytes()
    }
}

/// Which hash a group uses. Both sides use the leader's choice, which travels with its dirty set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashKind {
    /// [`City128`].
    #[default]
    City128,
    /// [`Xxh3_128`].
    Xxh3_128,
}

impl HashKind {
    /// The hash function itself, so that loops branch once and not per page.
    #[must_use]
    pub fn function(self) -> fn(&[u8]) -> PageHashValue {
        match self {
            Self::City128 => City128::hash,
            Self::Xxh3_128 => Xxh3_128::hash,
        }
    }

    /// The digest of a list of hashes: equal digests, equal hashes.
    #[must_use]
    pub fn of_hashes(self, hashes: &[PageHashValue]) -> PageHashValue {
        self.function()(hashes.as_flattened())
    }

    /// The hash of a page of zeros.
    #[must_use]
    pub fn zero_page(self) -> PageHashValue {
        self.function()(&[0; PAGE_BYTES])
    }

    /// The number that stands for this hash on the wire.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::City128 => 1,
            Self::Xxh3_128 => 2,
        }
    }

    /// The hash behind a number from the wire.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::City128, Self::Xxh3_128].into_iter().find(|kind| kind.code() == code)
    }
}

impl fmt::Display for HashKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::City128 => "city128",
            Self::Xxh3_128 => "xxh3-128",
        })
    }
}

impl FromStr for HashKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "city128" => Ok(Self::City128),
            "xxh3-128" => Ok(Self::Xxh3_128),
            _ => Err(format!("no page hash named {name:?}; use city128 or xxh3-128")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_name_and_function() {
        let page: Vec<u8> = (0..PAGE_BYTES).map(|i| (i % 251) as u8).collect();
        let mut other = page.clone();
        other[4095] ^= 1;
        for kind in [HashKind::City128, HashKind::Xxh3_128] {
            assert_eq!(kind.to_string().parse::<HashKind>(), Ok(kind));
            assert_ne!(kind.function()(&page), kind.function()(&other));
            assert_eq!(kind.zero_page(), kind.function()(&[0; PAGE_BYTES]));
            assert_eq!(HashKind::from_code(kind.code()), Some(kind));
        }
        assert_ne!(City128::hash(&page), Xxh3_128::hash(&page));
        assert_eq!(HashKind::from_code(0), None);
        assert!("md5".parse::<HashKind>().is_err());
    }
}
