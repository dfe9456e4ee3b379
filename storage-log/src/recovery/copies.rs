//! The copies of one segment side by side.

use std::collections::BTreeMap;

use super::Gap;
use crate::LogError;
use crate::block::{BLOCK_BYTES, Block, Content, SegmentId, Trailer, examine, stream};
use crate::segment::{Header, SegmentNumber};
use crate::volume::{CHUNK_BYTES, Volume, aligned_buffer};

/// What a copy holds in the place of a block of a certain segment and generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// The block.
    Ours(Trailer),
    /// Blank, or from an earlier time: the block was not written here.
    Never,
    /// Damage, or the file is too short.
    Bad,
    /// The copy has no such segment.
    Absent,
}

/// All headers of all copies, and those of them that are the log.
pub(crate) struct Headers {
    by_leg: Vec<BTreeMap<SegmentNumber, Header>>,
    last: Option<Header>,
    /// From `last` back, each the one that the next one names, as far as it is there.
    chain: BTreeMap<SegmentNumber, Header>,
}

impl Headers {
    pub fn read<V: Volume>(legs: &[Option<V>]) -> Result<Headers, LogError> {
        let mut by_leg = Vec::new();
        let mut log_id = None;
        for volume in legs {
            let mut of_leg = BTreeMap::new();
            for number in volume.iter().flat_map(Volume::segments) {
                let Some(volume) = volume else { break };
                let Some(header) = read_header(volume, number)? else { continue };
                if *log_id.get_or_insert(header.log_id) != header.log_id {
                    return Err(LogError::Foreign { path: volume.describe(number) });
                }
                of_leg.insert(number, header);
            }
            by_leg.push(of_leg);
        }
        let all = by_leg.iter().flat_map(|of_leg| of_leg.values().copied());
        let last = all.max_by_key(|header| (header.epoch, header.id.number));
        let mut headers = Headers { by_leg, last, chain: BTreeMap::new() };
        let mut next = last;
        while let Some(header) = next {
            headers.chain.insert(header.id.number, header);
            let before =
                SegmentId { number: header.id.number.saturating_sub(1), generation: header.previous_generation };
            next = headers
                .by_leg
                .iter()
                .find_map(|of_leg| of_leg.get(&before.number).filter(|it| it.id == before))
                .copied();
        }
        Ok(headers)
    }

    /// The header that was written last.
    pub fn last(&self) -> Option<Header> {
        self.last
    }

    /// The header of a segment of the log.
    pub fn of(&self, number: SegmentNumber) -> Option<Header> {
        self.chain.get(&number).copied()
    }

    /// Whether any copy has a header with this number, of this log or another.
    pub fn has_any(&self, number: SegmentNumber) -> bool {
        self.by_leg.iter().any(|of_leg| of_leg.contains_key(&number))
    }

    /// Whether a copy went on without the members of the log that ends with `last`, as they did without it. Then each may
    /// hold something acknowledged that the other lacks. A copy's newest header tells who had a part in it then.
    pub fn are_split(&self, last: &Header) -> bool {
        let newest = |of_leg: &BTreeMap<SegmentNumber, Header>| {
            of_leg.values().copied().max_by_key(|header| (header.epoch, header.id.number))
        };
        self.by_leg.iter().filter_map(newest).any(|header| {
            let is_ours = self.of(header.id.number).is_some_and(|ours| ours.id == header.id);
            !is_ours && header.members.0 & last.members.0 == 0
        })
    }
}

fn read_header<V: Volume>(volume: &V, number: SegmentNumber) -> Result<Option<Header>, LogError> {
    let mut buffer = aligned_buffer(BLOCK_BYTES)?;
    if volume.read(number, 0, &mut buffer)? == 0 {
        return Ok(None);
    }
    let block: &Block = buffer[..].try_into().expect("a block's length");
    Ok(match examine(block, 0) {
        Content::Whole(trailer) if trailer.segment.number == number => Header::read(block, trailer),
        _ => None,
    })
}

/// See the module.
pub(crate) struct Copies {
    id: SegmentId,
    /// The bytes of each copy that has the segment.
    legs: Vec<Option<Vec<u8>>>,
}

impl Copies {
    pub fn read<V: Volume>(legs: &[Option<V>], id: SegmentId) -> Result<Copies, LogError> {
        let read = |volume: &Option<V>| -> Result<Option<Vec<u8>>, LogError> {
            match volume {
                Some(volume) if volume.segments().contains(&id.number) => read_all(volume, id.number).map(Some),
                _ => Ok(None),
            }
        };
        let mut copies = Copies { id, legs: Vec::new() };
        let mut failure = None;
        for volume in legs {
            // A copy that cannot be read is as good as one that is not there, as long as there is another.
            let bytes = read(volume).unwrap_or_else(|error| {
                tracing::warn!(error = &error as &dyn std::error::Error, "a copy of the log cannot be read");
                failure = Some(error);
                None
            });
            copies.legs.push(bytes);
        }
        match failure {
            Some(error) if copies.legs.iter().all(Option::is_none) => Err(error),
            _ => Ok(copies),
        }
    }

    /// The blocks of the longest copy.
    pub fn blocks(&self) -> u32 {
        self.legs.iter().flatten().map(|bytes| bytes.len() / BLOCK_BYTES).max().unwrap_or(0) as u32
    }

    pub fn legs(&self) -> usize {
        self.legs.len()
    }

    fn block(&self, leg: usize, at: u32) -> Option<&Block> {
        let start = at as usize * BLOCK_BYTES;
        self.legs[leg]
            .as_ref()?
            .get(start..start + BLOCK_BYTES)
            .map(|bytes| bytes.try_into().expect("a block's length"))
    }

    pub fn look(&self, leg: usize, at: u32) -> Look {
        if self.legs[leg].is_none() {
            return Look::Absent;
        }
        match self.block(leg, at).map(|block| examine(block, at)) {
            Some(Content::Whole(trailer)) if trailer.segment == self.id => Look::Ours(trailer),
            Some(Content::Whole(_) | Content::Blank) => Look::Never,
            Some(Content::Bad) | None => Look::Bad,
        }
    }

    /// The trailer of a block on whichever copy has it.
    pub fn trailer(&self, at: u32) -> Option<Trailer> {
        (0..self.legs.len()).find_map(|leg| match self.look(leg, at) {
            Look::Ours(trailer) => Some(trailer),
            _ => None,
        })
    }

    /// The stream bytes of a block on whichever copy has it.
    pub fn best(&self, at: u32) -> Option<&[u8]> {
        (0..self.legs.len()).find_map(|leg| match self.look(leg, at) {
            Look::Ours(trailer) => self.block(leg, at).map(|block| stream(block, trailer)),
            _ => None,
        })
    }

    /// Copies that hold some of the blocks below `end`: they have a part in this log.
    pub fn legs_with_any(&self, end: u32) -> impl Iterator<Item = usize> + '_ {
        let ours = move |leg: usize| (0..end).any(|at| matches!(self.look(leg, at), Look::Ours(_)));
        (0..self.legs.len()).filter(move |leg| ours(*leg))
    }

    /// Blocks below `end` that a copy lacks.
    pub fn gaps(&self, end: u32) -> impl Iterator<Item = Gap> + '_ {
        let segment = self.id;
        let missing = move |(leg, block): &(usize, u32)| !matches!(self.look(*leg, *block), Look::Ours(_));
        let all = (0..self.legs.len()).flat_map(move |leg| (0..end).map(move |block| (leg, block)));
        all.filter(missing).map(move |(leg, block)| Gap { leg, segment, number: segment.number, block })
    }
}

/// All blocks of a segment.
pub(crate) fn read_all<V: Volume>(volume: &V, number: SegmentNumber) -> Result<Vec<u8>, LogError> {
    let mut buffer = aligned_buffer(CHUNK_BYTES)?;
    let mut bytes = Vec::new();
    loop {
        let blocks = volume.read(number, (bytes.len() / BLOCK_BYTES) as u32, &mut buffer)?;
        bytes.extend_from_slice(&buffer[..blocks * BLOCK_BYTES]);
        if blocks < buffer.len() / BLOCK_BYTES {
            return Ok(bytes);
        }
    }
}
