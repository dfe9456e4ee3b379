//! Judging the end of a log: torn, doubtful or damaged (see the module above).

use super::copies::{Copies, Look, read_all};
use crate::LogError;
use crate::block::{BLOCK_BYTES, Content, SegmentId, Trailer, examine};
use crate::segment::{Header, Members, SegmentNumber};
use crate::volume::Volume;

/// What lies at the first block that no copy has.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct End {
    pub torn_bytes: u64,
    pub doubtful: bool,
    pub damage: Option<String>,
}

/// Judges the last segment, whose blocks below `end` are there.
pub(super) fn judge(copies: &Copies, header: &Header, members: Members, end: u32) -> End {
    if end >= header.blocks {
        return End::default();
    }
    let blocks = copies.blocks().min(header.blocks).max(end + 1);
    let behind = || (end + 1..blocks).filter_map(|at| copies.trailer(at));
    if behind().any(|trailer| trailer.group_start > end) {
        let problem = "a block is damaged or was never written, although later ones were".to_owned();
        return End { damage: Some(problem), ..End::default() };
    }
    // The group that the block belongs to, by its other blocks; of itself if nothing else is left of it.
    let group_end = |trailer: &Trailer| trailer.group_start.saturating_add(trailer.group_blocks);
    let before = copies.trailer(end - 1).filter(|trailer| group_end(trailer) > end);
    let group = before.or_else(|| behind().next());
    let extent = group.map_or(end..end + 1, |group| group.group_start..group_end(&group).min(blocks));
    let torn_bytes = (behind().count() as u64) * BLOCK_BYTES as u64;
    let looks = |at: u32| (0..copies.legs()).map(move |leg| (leg, copies.look(leg, at)));
    let unwritten = |at: u32| looks(at).any(|(leg, look)| members.contains(leg) && look == Look::Never);
    if extent.clone().any(unwritten) {
        let bad = u64::from(looks(end).any(|(_, look)| look == Look::Bad)) * BLOCK_BYTES as u64;
        return End { torn_bytes: torn_bytes + bad, ..End::default() };
    }
    End { torn_bytes: torn_bytes + BLOCK_BYTES as u64, doubtful: true, damage: None }
}

/// Whether a segment behind the last one was begun and something happened to its header, so that what was acknowledged in
/// it may be lost. `last` is the last segment and the members; `None` if no copy has any header.
pub(super) fn beginning_lost<V: Volume>(
    legs: &[Option<V>],
    last: Option<(SegmentNumber, Members)>,
) -> Result<bool, LogError> {
    let (last, members) = last.unwrap_or_default();
    let (mut lost, mut proved, mut damage) = (false, false, None);
    for (leg, volume) in legs.iter().enumerate() {
        let Some(volume) = volume else { continue };
        let is_member = members.contains(leg);
        let mut may_be = volume.has_unreadable();
        for (number, due) in volume.segments().into_iter().filter(|number| *number > last).zip(last + 1..) {
            // Places are made one after the other, so one that is missing before another was taken away.
            may_be |= number != due && (is_member || last == 0);
            may_be |= match first_group(volume, number, last)? {
                FirstGroup::Nothing => false,
                FirstGroup::Doubtful => true,
                FirstGroup::Displaced => is_member || last == 0,
                FirstGroup::Followed => {
                    let problem = "its header is damaged, although later blocks were written".to_owned();
                    let file = volume.describe(number);
                    damage.get_or_insert(LogError::Damaged { file, offset: 0, problem });
                    true
                }
            };
        }
        lost |= may_be;
        // All members get a group before it is acknowledged: one that lacks it proves that it was not.
        proved |= is_member && !may_be;
    }
    match damage {
        Some(error) if !proved => Err(error),
        // A copy that went on alone once, and not even its header tells.
        Some(_) => Ok(true),
        None => Ok(lost && !proved),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum FirstGroup {
    /// Never written, torn, or from an earlier time.
    Nothing,
    /// Its header is bad, and nothing proves that the group was torn.
    Doubtful,
    /// It holds blocks of another segment that is not known: files were exchanged or renamed.
    Displaced,
    /// Its header is not there, and later groups are.
    Followed,
}

/// What a segment without a valid header of this log holds.
fn first_group<V: Volume>(volume: &V, number: SegmentNumber, last: SegmentNumber) -> Result<FirstGroup, LogError> {
    let bytes = read_all(volume, number)?;
    let blocks = bytes.as_chunks::<BLOCK_BYTES>().0;
    let content = |at: usize| blocks.get(at).map_or(Content::Bad, |block| examine(block, at as u32));
    let header_bad = match content(0) {
        Content::Bad => true,
        Content::Blank => false,
        // Valid: of a copy that went another way, and lost.
        Content::Whole(trailer) if trailer.segment.number == number && Header::read(&blocks[0], trailer).is_some() => {
            return Ok(FirstGroup::Nothing);
        }
        Content::Whole(trailer) => trailer.segment.number == number,
    };
    // What is left of an earlier use of the place is of an earlier segment; without any header nobody knows of which.
    let oldest_strange = if last == 0 { number } else { last };
    let is_displaced = |trailer: Trailer| trailer.segment.number > oldest_strange && trailer.segment.number != number;
    if (0..blocks.len()).any(|at| matches!(content(at), Content::Whole(trailer) if is_displaced(trailer))) {
        return Ok(FirstGroup::Displaced);
    }
    let id = |at: usize| match content(at) {
        Content::Whole(trailer) => Some(trailer.segment),
        _ => None,
    };
    // With a header that is merely not there, the blocks must be of one writing: others may be left of an earlier one.
    let of_one_writing = |trailer: &Trailer| header_bad || id(1) == Some(trailer.segment);
    let ours: Vec<Trailer> = (1..blocks.len())
        .filter_map(|at| match content(at) {
            Content::Whole(trailer) if trailer.segment.number == number => Some(trailer),
            _ => None,
        })
        .filter(of_one_writing)
        .collect();
    let newest = ours.iter().max_by_key(|trailer| trailer.group_start);
    if newest.is_some_and(|trailer| trailer.group_start > 0) {
        return Ok(FirstGroup::Followed);
    }
    let is_unwritten = |at: usize, id: SegmentId| match content(at) {
        Content::Blank => true,
        Content::Whole(trailer) => trailer.segment != id,
        Content::Bad => false,
    };
    let extent = |group: &Trailer| 1..(group.group_blocks as usize).min(blocks.len());
    let torn = newest.is_some_and(|group| extent(group).any(|at| is_unwritten(at, group.segment)));
    Ok(if header_bad && !torn { FirstGroup::Doubtful } else { FirstGroup::Nothing })
}
