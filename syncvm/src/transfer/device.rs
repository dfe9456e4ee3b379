//! `DeviceDelta`: what of the device state is not as it was the last time. Of some 60 kB a few hundred bytes are.
//!
//! The follower keeps the device state that it loaded last and says its hash with its dirty set; a leader that sent that one
//! last sends only the runs of bytes that differ. Neither has to know what became of an earlier exchange. The delta names the hash
//! of what must come out, so that two states of one hash can cost a syncvm but never load a wrong state.

use xxhash_rust::xxh3::xxh3_64;

use super::WireError;
use crate::wire::{Reader, put_varint};

/// Bytes that are compared at once where little differs.
const CHUNK_BYTES: usize = 64;

/// Equal bytes between two runs that are cheaper to send than another run.
const CLOSE_BYTES: usize = 3;

/// Names a device state.
#[must_use]
pub fn device_hash(state: &[u8]) -> u64 {
    xxh3_64(state)
}

/// The decoded wire form: hash of the new state, its length, and runs of a gap that is as before, a length and bytes.
#[derive(Clone, Copy, Debug)]
pub struct DeviceDelta<'a> {
    /// Of the new state.
    pub hash: u64,
    bytes: usize,
    runs: &'a [u8],
}

impl<'a> DeviceDelta<'a> {
    /// The wire form of what leads from `before` to `state`; nothing if that is no shorter than `state`.
    #[must_use]
    pub fn encode(before: &[u8], state: &[u8]) -> Option<Vec<u8>> {
        let mut out = device_hash(state).to_le_bytes().to_vec();
        put_varint(&mut out, state.len() as u64);
        let mut end = 0;
        while let Some(start) = next_difference(before, state, end) {
            put_varint(&mut out, (start - end) as u64);
            end = run_end(before, state, start);
            put_varint(&mut out, (end - start) as u64);
            out.extend_from_slice(&state[start..end]);
            if out.len() >= state.len() {
                return None;
            }
        }
        (out.len() < state.len()).then_some(out)
    }

    /// Reads the wire form of the delta to a state of at most `limit_bytes`.
    ///
    /// # Errors
    /// When the bytes do not begin like one.
    pub fn decode(bytes: &'a [u8], limit_bytes: usize) -> Result<Self, WireError> {
        let mut reader = Reader(bytes);
        let hash = reader.u64("hash of the device state")?;
        let bytes = reader.varint("bytes of device state")?;
        if bytes > limit_bytes as u64 {
            return Err(WireError::Value { field: "bytes of device state", value: bytes });
        }
        Ok(Self { hash, bytes: bytes as usize, runs: reader.0 })
    }

    /// The new state, going by the one before. Its hash is for the caller to check.
    ///
    /// # Errors
    /// When the runs do not fit the two, or what is beyond the old state is not in them.
    pub fn apply(&self, before: &[u8]) -> Result<Vec<u8>, WireError> {
        let mut reader = Reader(self.runs);
        let mut state = Vec::with_capacity(self.bytes.min(before.len() + self.runs.len()));
        while !reader.0.is_empty() {
            let gap = reader.varint("gap between runs")?;
            self.keep(before, gap, &mut state)?;
            let count = reader.varint("run length")?;
            if count == 0 || count > (self.bytes - state.len()) as u64 {
                return Err(WireError::Value { field: "run length", value: count });
            }
            state.extend_from_slice(reader.take(count as usize, "bytes of a run")?);
        }
        self.keep(before, (self.bytes - state.len()) as u64, &mut state)?;
        Ok(state)
    }

    /// Appends the next `count` bytes of the old state.
    fn keep(&self, before: &[u8], count: u64, state: &mut Vec<u8>) -> Result<(), WireError> {
        let at = state.len();
        let old = before.get(at..self.bytes.min(before.len())).unwrap_or_default();
        if count > old.len() as u64 {
            return Err(WireError::Value { field: "gap between runs", value: count });
        }
        state.extend_from_slice(&old[..count as usize]);
        Ok(())
    }
}

/// Where `state` is not as `before`, from `at` on.
fn next_difference(before: &[u8], state: &[u8], at: usize) -> Option<usize> {
    let (old, new) = (before.get(at..).unwrap_or_default(), &state[at..]);
    let chunks = new.chunks_exact(CHUNK_BYTES).zip(old.chunks_exact(CHUNK_BYTES));
    let skipped = CHUNK_BYTES * chunks.take_while(|(new, old)| new == old).count();
    let equal = new[skipped..].iter().zip(&old[skipped..]).take_while(|(new, old)| new == old).count();
    let next = at + skipped + equal;
    (next < state.len()).then_some(next)
}

/// The end of the run of differing bytes that begins at `start`, with small gaps in it.
fn run_end(before: &[u8], state: &[u8], start: usize) -> usize {
    let mut end = start + 1;
    while let Some(next) = next_difference(before, state, end)
        && next - end <= CLOSE_BYTES
    {
        end = next + 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: usize = 10_000;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]
        #[test]
        fn states_come_back(
            before in prop::collection::vec(any::<u8>(), 0..3000),
            writes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..30),
            length in 0usize..3300,
        ) {
            let mut state = before.clone();
            state.resize(length, 7);
            for (at, byte) in writes {
                if !state.is_empty() {
                    let at = at.index(state.len());
                    state[at] = byte;
                }
            }
            if let Some(wire) = DeviceDelta::encode(&before, &state) {
                prop_assert!(wire.len() < state.len());
                let delta = DeviceDelta::decode(&wire, LIMIT).unwrap();
                prop_assert_eq!(delta.hash, device_hash(&state));
                prop_assert!(delta.apply(&before).unwrap() == state);
                prop_assert!(DeviceDelta::decode(&wire, state.len().saturating_sub(1)).is_err());
            }
        }

        #[test]
        fn decoder_survives_arbitrary_bytes(
            bytes in prop::collection::vec(any::<u8>(), 0..60), length in 0u8..100, before in 0usize..100
        ) {
            let mut wire = vec![0; 8];
            wire.push(length);
            wire.extend(bytes);
            if let Ok(state) = DeviceDelta::decode(&wire, LIMIT).and_then(|delta| delta.apply(&vec![1; before])) {
                prop_assert_eq!(state.len(), usize::from(length));
            }
            let _ = DeviceDelta::decode(&wire[4..], LIMIT).and_then(|delta| delta.apply(&[]));
        }
    }

    #[test]
    fn a_delta_is_as_short_as_what_changed() {
        let before = vec![3; 60_000];
        let mut state = before.clone();
        for at in [100, 102, 5_000, 59_999] {
            state[at] = 4;
        }
        // Three runs: 3, 1 and 1 bytes, each with a gap and a length.
        let wire = DeviceDelta::encode(&before, &state).unwrap();
        assert_eq!(wire.len(), 8 + 3 + (1 + 1 + 3) + (2 + 1 + 1) + (3 + 1 + 1));
        let same = DeviceDelta::encode(&before, &before).unwrap();
        assert_eq!(same.len(), 11);
        assert_eq!(DeviceDelta::encode(&before, &[5; 60_000]), None, "nothing is as it was");
        assert_eq!(DeviceDelta::encode(&before, &[]), None, "nothing is shorter than nothing");
    }
}
