//! What the server owes us: per key the last acknowledged write, and the writes that nobody knows about.
//!
//! Each connection owns its keys, so the last acknowledged write of a key is known exactly and a check is one comparison.
//! A connection that is lost takes its keys out of use (its next *generation* has fresh ones): requests of the old
//! connection may still lie in the server's receive queue and take effect at any later time, so a key that was
//! written by two connections would have no exact answer.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::value::{Token, key_name};

/// The keys of one connection between its establishment and its loss.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// Connection that owned them.
    pub connection: u16,
    /// How many connections of that number were lost before.
    pub generation: u16,
    /// Sequence number of the last acknowledged write per key; 0 means never written.
    pub acknowledged: Vec<u64>,
    /// Writes (key, sequence) sent after that and never answered: each may or may not have taken effect.
    pub maybe: Vec<(u32, u64)>,
}

impl Generation {
    /// Keys nobody has written yet.
    pub fn new(connection: u16, generation: u16, keys: u32) -> Generation {
        Generation { connection, generation, acknowledged: vec![0; keys as usize], maybe: Vec::new() }
    }

    /// The write with this sequence number.
    pub fn token(&self, sequence: u64) -> Token {
        Token::new(self.connection, self.generation, sequence)
    }

    /// Name of a key.
    pub fn key_name(&self, run: u32, key: u32) -> String {
        String::from_utf8_lossy(&key_name(run, self.connection, self.generation, key)).into_owned()
    }
}

/// Everything that a load left on the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Part of each key's name.
    pub run: u32,
    /// Size of each value.
    pub value_bytes: usize,
    /// All generations of all connections that sent something.
    pub generations: Vec<Generation>,
    /// Acknowledged writes already found missing, so that none is counted twice.
    pub missing: BTreeSet<Missing>,
}

/// Identity of an acknowledged write that a read did not find: connection, generation, key, sequence.
pub type Missing = (u16, u16, u32, u64);
