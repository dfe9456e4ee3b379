//! A batch of frames: the payload of one `Input` entry of the log.
//!
//! Layout: `u32` count, then per frame `u32` length and the bytes, all little-endian. The builder writes straight into the
//! memory that becomes the payload, as a rule room in an [`Arena`](crate::arena::Arena), so that a TAP read lands there without
//! another copy. Rejected: an index of offsets in front (it forces a second pass or a copy).

use std::ops::DerefMut;

use crate::cache_line;
use crate::coalesce;
use crate::frame::{MAX_FRAME_BYTES, PushError, VNET_HEADER_BYTES, check_length};

const COUNT_BYTES: usize = 4;
const LENGTH_BYTES: usize = 4;
/// The walk through a payload knows the place of a length only when it has the one before, and would wait for memory each time.
const FETCH_AHEAD_BYTES: usize = 1024;
/// Memory of an arena was last used long ago, and short frames are written faster than the processor fetches it by itself. Two lines
/// for each frame, because a short one with its length is longer than one line; longer ones the processor does follow.
const CLAIM_AHEAD_BYTES: [usize; 2] = [2048, 2048 + 64];

/// The least memory for a [`BatchBuilder`]: the largest frame must fit into an empty batch.
pub const MIN_BATCH_BYTES: usize = COUNT_BYTES + LENGTH_BYTES + MAX_FRAME_BYTES;

/// How far a batch is.
#[derive(Debug)]
struct Filling {
    /// Bytes of the batch so far.
    used: usize,
    count: u32,
    /// Frame bytes handed out by `spare`, not yet committed.
    offered: usize,
    /// Bytes of the last frame, which ends where the batch does; 0 before there is one.
    last: usize,
}

impl Filling {
    const EMPTY: Filling = Filling { used: COUNT_BYTES, count: 0, offered: 0, last: 0 };
}

#[inline]
fn spare<'m>(memory: &'m mut [u8], filling: &mut Filling, max: usize) -> Option<&'m mut [u8]> {
    let start = filling.used + LENGTH_BYTES;
    let end = start.checked_add(max).filter(|&end| end <= memory.len())?;
    filling.offered = max;
    Some(&mut memory[start..end])
}

/// A builder whose kind of memory does not matter.
#[derive(Debug)]
pub(crate) struct Building<'a> {
    memory: &'a mut [u8],
    filling: &'a mut Filling,
}

impl Building<'_> {
    #[inline]
    pub(crate) fn spare(&mut self, max: usize) -> Option<&mut [u8]> {
        spare(self.memory, self.filling, max)
    }

    #[inline]
    pub(crate) fn offered(&self, len: usize) -> &[u8] {
        let offered = self.filling.offered;
        assert!(len <= offered, "{len} bytes asked for, but only {offered} were handed out");
        let start = self.filling.used + LENGTH_BYTES;
        &self.memory[start..start + len]
    }

    #[inline]
    pub(crate) fn commit(&mut self, len: usize) -> Result<(), PushError> {
        let Filling { used, count, offered, last } = self.filling;
        assert!(len <= *offered, "commit of {len} bytes, but only {offered} were handed out");
        *offered = 0;
        check_length(len)?;
        let length = u32::try_from(len).expect("MAX_FRAME_BYTES fits u32");
        self.memory[*used..*used + LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
        *used += LENGTH_BYTES + len;
        *count += 1;
        *last = len;
        for ahead in CLAIM_AHEAD_BYTES {
            if let Some(ahead) = self.memory.get(*used + ahead) {
                cache_line::claim(ahead);
            }
        }
        Ok(())
    }

    /// Appends the first `len` bytes of what was handed out to the last frame, if they continue its TCP stream. Says whether.
    ///
    /// # Panics
    /// If no room of at least `len` bytes was given.
    pub(crate) fn join(&mut self, len: usize) -> bool {
        let Filling { used, offered, last, .. } = self.filling;
        assert!(len <= *offered, "joining {len} bytes, but only {offered} were handed out");
        let start = *used - *last;
        let next = *used + LENGTH_BYTES;
        let joined = coalesce::join(self.memory, start..*used, next..next + len);
        let Some(bytes) = joined else { return false };
        let length = u32::try_from(bytes).expect("an IP packet fits u32");
        self.memory[start - LENGTH_BYTES..start].copy_from_slice(&length.to_le_bytes());
        (*used, *last, *offered) = (start + bytes, bytes, 0);
        true
    }
}

/// Collects frames into one payload, in memory that is lent to it, or of its own (a vector, for tools and tests).
#[derive(Debug)]
pub struct BatchBuilder<M = Vec<u8>> {
    memory: M,
    filling: Filling,
}

impl BatchBuilder {
    /// A builder of payloads of at most `max_bytes` bytes.
    ///
    /// # Panics
    /// If `max_bytes` is below [`MIN_BATCH_BYTES`] or above 1 GiB.
    pub fn new(max_bytes: usize) -> BatchBuilder {
        BatchBuilder::within(vec![0; max_bytes])
    }

    /// The payload, copied; the builder is empty afterwards.
    pub fn finish(&mut self) -> Vec<u8> {
        let len = self.seal();
        self.memory[..len].to_vec()
    }
}

impl<M: DerefMut<Target = [u8]>> BatchBuilder<M> {
    /// A builder of one payload after the other, at the start of `memory`.
    ///
    /// # Panics
    /// If `memory` is smaller than [`MIN_BATCH_BYTES`] or larger than 1 GiB.
    pub fn within(memory: M) -> BatchBuilder<M> {
        let bytes = memory.len();
        assert!(bytes >= MIN_BATCH_BYTES, "a batch of {bytes} bytes cannot hold every frame");
        assert!(bytes <= 1 << 30, "a batch of {bytes} bytes is no batch");
        BatchBuilder { memory, filling: Filling::EMPTY }
    }

    pub(crate) fn building(&mut self) -> Building<'_> {
        Building { memory: &mut self.memory, filling: &mut self.filling }
    }

    /// Room for one frame of up to `max` bytes inside the batch, or `None` if the batch is too full.
    /// [`commit`](Self::commit) makes what was written there the next frame.
    #[inline]
    pub fn spare(&mut self, max: usize) -> Option<&mut [u8]> {
        spare(&mut self.memory, &mut self.filling, max)
    }

    /// Appends the first `len` bytes of what [`spare`](Self::spare) returned as a frame.
    ///
    /// # Errors
    /// [`PushError::BadLength`]; the batch is unchanged.
    ///
    /// # Panics
    /// If no spare room of at least `len` bytes was handed out since the last commit.
    #[inline]
    pub fn commit(&mut self, len: usize) -> Result<(), PushError> {
        self.building().commit(len)
    }

    /// Copies `frame` into the batch.
    ///
    /// # Errors
    /// [`PushError`]; the batch is unchanged.
    pub fn push(&mut self, frame: &[u8]) -> Result<(), PushError> {
        check_length(frame.len())?;
        self.spare(frame.len()).ok_or(PushError::Full)?.copy_from_slice(frame);
        self.commit(frame.len())
    }

    /// Frames in the batch.
    pub fn len(&self) -> usize {
        self.filling.count as usize
    }

    /// Whether the batch has no frame.
    pub fn is_empty(&self) -> bool {
        self.filling.count == 0
    }

    /// Bytes that the payload would have now.
    pub fn bytes(&self) -> usize {
        self.filling.used
    }

    /// Completes the payload where it lies: the first so many bytes of the memory. The builder is empty afterwards.
    pub fn seal(&mut self) -> usize {
        let Filling { used, count, .. } = std::mem::replace(&mut self.filling, Filling::EMPTY);
        self.memory[..COUNT_BYTES].copy_from_slice(&count.to_le_bytes());
        used
    }
}

/// Why bytes are not a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// The bytes end inside a count, a length or a frame.
    #[error("the batch ends at byte {at}, inside an item")]
    Truncated {
        /// Where the item that is cut off begins.
        at: usize,
    },
    /// A length that no frame has.
    #[error("the batch names a frame of {len} bytes at byte {at}")]
    BadLength {
        /// Where the length stands.
        at: usize,
        /// The length.
        len: usize,
    },
    /// Bytes follow the last frame.
    #[error("the batch has {bytes} bytes after its last frame")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

/// The frames of a payload in order. The whole payload is checked first, so either every frame
/// comes out or none does: two replicas can never take different prefixes of a damaged batch.
///
/// # Errors
/// [`BatchError`] for any bytes that a builder would not have made.
pub fn frames(payload: &[u8]) -> Result<Frames<'_>, BatchError> {
    let count = read_u32(payload, 0)?;
    let mut at = COUNT_BYTES;
    for _ in 0..count {
        let len = read_u32(payload, at)? as usize;
        if !(VNET_HEADER_BYTES..=MAX_FRAME_BYTES).contains(&len) {
            return Err(BatchError::BadLength { at, len });
        }
        if payload.len() - at - LENGTH_BYTES < len {
            return Err(BatchError::Truncated { at });
        }
        at += LENGTH_BYTES + len;
        if let Some(ahead) = payload.get(at + FETCH_AHEAD_BYTES) {
            cache_line::fetch(ahead);
        }
    }
    if at != payload.len() {
        return Err(BatchError::Trailing { bytes: payload.len() - at });
    }
    Ok(Frames { rest: &payload[COUNT_BYTES..] })
}

fn read_u32(bytes: &[u8], at: usize) -> Result<u32, BatchError> {
    let word = bytes.get(at..at + 4).ok_or(BatchError::Truncated { at })?;
    Ok(u32::from_le_bytes(word.try_into().expect("4 bytes")))
}

/// Iterator over the frames of a payload; see [`frames`].
#[derive(Debug, Clone, Default)]
pub struct Frames<'a> {
    /// Whole, checked frames with their lengths.
    rest: &'a [u8],
}

impl<'a> Frames<'a> {
    /// Goes on in a payload that [`frames`] has checked, at the place that [`left_bytes`](Self::left_bytes) gave.
    ///
    /// # Panics
    /// If the payload is shorter than that; the iterator, if the payload is another one.
    #[inline]
    pub fn resume(payload: &'a [u8], left_bytes: usize) -> Frames<'a> {
        Frames { rest: &payload[payload.len() - left_bytes..] }
    }

    /// Bytes of the payload behind the frames that came out, for [`resume`](Self::resume).
    #[inline]
    pub fn left_bytes(&self) -> usize {
        self.rest.len()
    }

    /// Whether none is left.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, rest) = self.rest.split_first_chunk::<LENGTH_BYTES>()?;
        let (frame, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        self.rest = rest;
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out(
            lens in prop::collection::vec(0usize..3000, 0..80),
            through_spare in any::<bool>(),
        ) {
            let mut builder = BatchBuilder::new(MIN_BATCH_BYTES);
            for round in 0..2u8 {
                let mut model: Vec<Vec<u8>> = Vec::new();
                for (i, &len) in lens.iter().enumerate() {
                    let frame: Vec<u8> = (0..len).map(|b| (b + i) as u8 ^ round).collect();
                    let result = if through_spare {
                        match builder.spare(4000) {
                            None => Err(PushError::Full),
                            Some(room) => {
                                room[..len].copy_from_slice(&frame);
                                builder.commit(len)
                            }
                        }
                    } else {
                        builder.push(&frame)
                    };
                    match result {
                        Ok(()) => model.push(frame),
                        Err(PushError::Full) => prop_assert!(builder.bytes() + 4004 > MIN_BATCH_BYTES),
                        Err(PushError::BadLength { len: bad }) => prop_assert!(bad == len && len < 12),
                    }
                }
                prop_assert_eq!(builder.len(), model.len());
                let expected = builder.bytes();
                let payload = builder.finish();
                prop_assert_eq!(payload.len(), expected);
                prop_assert!(builder.is_empty());
                let out: Vec<Vec<u8>> = frames(&payload).unwrap().map(<[u8]>::to_vec).collect();
                let mut first_half = frames(&payload).unwrap();
                first_half.by_ref().take(out.len() / 2).for_each(drop);
                let second_half = Frames::resume(&payload, first_half.left_bytes());
                prop_assert!(second_half.eq(out[out.len() / 2..].iter().map(Vec::as_slice)));
                prop_assert_eq!(out, model);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), count in 0u8..4) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = count;
            }
            if let Ok(frames) = frames(&bytes) {
                let total: usize = frames.map(|f| f.len() + 4).sum();
                prop_assert_eq!(total + 4, bytes.len());
            }
        }

        #[test]
        fn a_cut_or_extended_batch_is_refused(cut in 0usize..100) {
            let mut builder = BatchBuilder::new(MIN_BATCH_BYTES);
            builder.push(&[7; 40]).unwrap();
            builder.push(&[8; 52]).unwrap();
            let mut payload = builder.finish();
            prop_assert_eq!(payload.len(), 104);
            prop_assert!(frames(&payload[..cut]).is_err());
            payload.push(0);
            prop_assert_eq!(frames(&payload).err(), Some(BatchError::Trailing { bytes: 1 }));
        }
    }

    #[test]
    fn the_largest_frame_fits_an_empty_batch_of_the_smallest_size() {
        let mut builder = BatchBuilder::new(MIN_BATCH_BYTES);
        builder.push(&vec![1; MAX_FRAME_BYTES]).unwrap();
        assert_eq!(builder.push(&[0; 12]), Err(PushError::Full));
        assert_eq!(frames(&builder.finish()).unwrap().count(), 1);
        assert!(matches!(builder.push(&vec![1; MAX_FRAME_BYTES + 1]), Err(PushError::BadLength { .. })));
    }

    #[test]
    fn a_batch_in_an_arena_is_never_copied() {
        use crate::arena::{Arena, CHUNK_BYTES};
        use crate::region::{PageSize, Region};
        let mut arena = Arena::new(Region::map(2 * CHUNK_BYTES, PageSize::Normal, None).unwrap());
        let mut payloads = Vec::new();
        for round in 0..20u8 {
            let mut batch = BatchBuilder::within(arena.room(MIN_BATCH_BYTES, 1 << 18).unwrap());
            let place = batch.memory.as_ptr();
            batch.push(&[round; 100]).unwrap();
            let len = batch.seal();
            let payload = arena.freeze(len);
            assert_eq!(payload.as_ptr(), place);
            payloads.push(payload);
        }
        for (round, payload) in payloads.iter().enumerate() {
            assert_eq!(frames(payload).unwrap().collect::<Vec<_>>(), [[round as u8; 100]]);
        }
    }

    #[test]
    #[should_panic(expected = "handed out")]
    fn a_commit_beyond_the_offered_room_is_a_bug() {
        let mut builder = BatchBuilder::new(MIN_BATCH_BYTES);
        builder.spare(20);
        let _ = builder.commit(21);
    }
}
