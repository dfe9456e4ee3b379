//! `TransferMode`: how much of what may differ the leader sends.

use std::fmt;
use std::str::FromStr;

use super::SHORT_HASH_BYTES;
use crate::hash::HASH_BYTES;

/// How much of the union of the dirty sets crosses the wire. The leader's choice; the follower obeys it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransferMode {
    /// Both sides hash the union's pages, and of those that differ only the blocks that differ are sent.
    #[default]
    Delta,
    /// Both sides hash the union's pages, and those that differ are sent whole.
    Pages,
    /// Nothing is hashed or compared: every page of the union is sent. This is what checkpointing to a passive replica
    /// does (Remus, QEMU's micro-checkpointing), and what the other modes are measured against.
    All,
}

impl TransferMode {
    /// Every mode.
    pub const EVERY: [Self; 3] = [Self::Delta, Self::Pages, Self::All];

    /// The number that stands for this mode on the wire.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Delta => 1,
            Self::Pages => 2,
            Self::All => 3,
        }
    }

    /// The mode behind a number from the wire.
    #[must_use]
    pub fn from_code(code: u8) -> Option<Self> {
        Self::EVERY.into_iter().find(|mode| mode.code() == code)
    }

    /// Bytes of a page's hash that the follower sends.
    #[must_use]
    pub fn hash_bytes(self) -> usize {
        match self {
            Self::Delta => SHORT_HASH_BYTES,
            Self::Pages | Self::All => HASH_BYTES,
        }
    }

    /// Whether pages are compared before they are sent.
    #[must_use]
    pub fn compares(self) -> bool {
        self != Self::All
    }
}

impl fmt::Display for TransferMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Delta => "delta",
            Self::Pages => "pages",
            Self::All => "all",
        })
    }
}

impl FromStr for TransferMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::EVERY
            .into_iter()
            .find(|mode| mode.to_string() == name)
            .ok_or_else(|| format!("no transfer mode named {name:?}; use delta, pages or all"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_codes_come_back() {
        for mode in TransferMode::EVERY {
            assert_eq!(mode.to_string().parse(), Ok(mode));
            assert_eq!(TransferMode::from_code(mode.code()), Some(mode));
        }
        assert!("some".parse::<TransferMode>().is_err());
        assert_eq!(TransferMode::from_code(0), None);
    }
}
