//! Wire form of a [`DirtySet`]: `u64` pages, `u8` form, then runs or raw words, whichever is smaller.
//!
//! Runs are pairs of LEB128 (gap since the end of the last run, length). The decoder is total: any bytes
//! give a set or an error, and it allocates only what the receiver's own RAM size asks for.

use super::{DirtySet, WORD_BITS};
use crate::transfer::WireError;
use crate::wire::{Reader, put_varint};

const FORM_RUNS: u8 = 0;
const FORM_WORDS: u8 = 1;
const HEAD_BYTES: usize = 9;

impl DirtySet {
    /// The longest wire form of a set over `pages` pages, in bytes.
    #[must_use]
    pub fn max_encoded_bytes(pages: usize) -> usize {
        HEAD_BYTES + pages.div_ceil(WORD_BITS) * 8
    }

    /// Appends the wire form to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.pages as u64).to_le_bytes());
        let form_at = out.len();
        out.push(FORM_RUNS);
        let raw_bytes = self.words.len() * 8;
        let mut last_end = 0;
        for (first, count) in self.runs() {
            put_varint(out, (first - last_end) as u64);
            put_varint(out, count as u64);
            last_end = first + count;
            if out.len() - form_at - 1 > raw_bytes {
                out.truncate(form_at);
                out.push(FORM_WORDS);
                self.words.iter().for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
                return;
            }
        }
    }

    /// Reads a wire form over exactly `pages` pages.
    ///
    /// # Errors
    /// When the bytes are not the wire form of such a set.
    pub fn decode(bytes: &[u8], pages: usize) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let theirs = reader.u64("page count")?;
        if theirs != pages as u64 {
            return Err(WireError::Value { field: "page count", value: theirs });
        }
        let mut set = Self::new(pages);
        match reader.u8("form")? {
            FORM_RUNS => set.decode_runs(&mut reader)?,
            FORM_WORDS => set.decode_words(&mut reader)?,
            form => {
                return Err(WireError::Value { field: "form of a dirty set", value: form.into() });
            }
        }
        reader.end()?;
        Ok(set)
    }

    fn decode_runs(&mut self, reader: &mut Reader<'_>) -> Result<(), WireError> {
        let mut at = 0u64;
        while !reader.0.is_empty() {
            let first = at.checked_add(reader.varint("gap")?);
            let count = reader.varint("run length")?;
            let end = first.and_then(|first| first.checked_add(count));
            let (Some(first), Some(end)) = (first, end) else {
                return Err(WireError::Value { field: "run length", value: count });
            };
            if end > self.pages as u64 || count == 0 {
                return Err(WireError::Value { field: "run length", value: count });
            }
            self.insert_range(first as usize, count as usize);
            at = end;
        }
        Ok(())
    }

    fn decode_words(&mut self, reader: &mut Reader<'_>) -> Result<(), WireError> {
        for word in &mut self.words {
            *word = reader.u64("bitmap word")?;
        }
        let used = self.pages % WORD_BITS;
        if let Some(&last) = self.words.last()
            && used != 0
            && last >> used != 0
        {
            return Err(WireError::Value { field: "last bitmap word", value: last });
        }
        Ok(())
    }
}
