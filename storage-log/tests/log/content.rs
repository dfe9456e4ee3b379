//! What a log should hold: the simplest model there is, and random histories to play on both.

use crate::common::{Rng, append};
use storage_log::{LogStore, Record, Recovered, StoredEntry, Ticket};

/// A step of a history.
#[derive(Debug, Clone)]
pub enum Op {
    State(Vec<u8>),
    Entry(StoredEntry),
    Truncate(u64),
}

impl Op {
    /// Plays the step on a log; a truncation has no ticket.
    pub fn play(&self, log: &mut dyn LogStore) -> Option<Ticket> {
        match self {
            Op::State(state) => Some(append(log, Record::State(state))),
            Op::Entry(StoredEntry { index, view, bytes }) => {
                let (a, b) = bytes.split_at(bytes.len() / 3);
                Some(append(log, Record::Entry { index: *index, view: *view, parts: [a, b] }))
            }
            Op::Truncate(through) => {
                log.truncate_prefix(*through);
                None
            }
        }
    }
}

/// The state and the entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Content {
    pub state: Option<Vec<u8>>,
    pub entries: Vec<StoredEntry>,
}

impl Content {
    pub fn of(recovered: &Recovered) -> Content {
        Content { state: recovered.state.clone(), entries: recovered.entries.clone() }
    }

    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::State(state) => self.state = Some(state.clone()),
            Op::Entry(entry) => {
                self.entries.retain(|old| old.index < entry.index);
                self.entries.push(entry.clone());
            }
            Op::Truncate(through) => self.entries.retain(|old| old.index > *through),
        }
    }

    /// For a message: what there is, without the bytes.
    pub fn brief(&self) -> String {
        let ends = self.entries.first().zip(self.entries.last());
        let ends = ends.map(|(first, last)| (first.index, last.index, last.view, last.bytes.len()));
        format!("state of {:?} bytes, entries {ends:?}", self.state.as_ref().map(Vec::len))
    }
}

/// A random history that follows from a seed and from where it begins.
pub struct Script {
    rng: Rng,
    pub content: Content,
    next: u64,
    states: bool,
}

impl Script {
    pub fn new(seed: u64, content: Content) -> Script {
        let next = content.entries.last().map_or(1, |last| last.index + 1);
        Script { rng: Rng(seed), content, next, states: true }
    }

    /// Entries only, from now on, which are never forgotten.
    pub fn without_states(&mut self) {
        self.states = false;
    }

    /// The next step; `content` is what it leads to.
    pub fn step(&mut self) -> Op {
        const MOST_BYTES: usize = 150_000;
        let op = self.choose(self.content.entries.iter().map(|entry| entry.bytes.len()).sum::<usize>() > MOST_BYTES);
        if let Op::Entry(entry) = &op {
            self.next = entry.index + 1;
        }
        self.content.apply(&op);
        op
    }

    fn choose(&mut self, is_long: bool) -> Op {
        let entries = &self.content.entries;
        if self.states && !entries.is_empty() && (is_long || self.rng.one_in(24)) {
            return Op::Truncate(entries[self.rng.below(entries.len() as u64) as usize].index);
        }
        if self.states && self.rng.one_in(10) {
            let len = self.rng.below(60) as usize;
            return Op::State(self.rng.bytes(len));
        }
        let back = if self.states && self.rng.one_in(8) { self.rng.below(8) } else { 0 };
        let first = entries.first().map_or(self.next, |first| first.index);
        let longest = [300, 300, 300, 300, 300, 300, 5000, 5000, 5000, 20_000][self.rng.below(10) as usize];
        let len = self.rng.below(longest) as usize;
        let index = self.next.saturating_sub(back).max(first);
        Op::Entry(StoredEntry { index, view: self.rng.below(1 << 40), bytes: self.rng.bytes(len) })
    }
}
