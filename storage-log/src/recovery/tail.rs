//! Judging the end of a log: torn, doubtful or damaged (see the module above).

use super::copies::{Copies, Look, read_all};
use crate::LogError;
use crate::block::{BLOCK_BYTES, Content, SegmentId, examine};
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
    let of_group = |trailer: &crate::block::Trailer| trailer.group_start + trailer.group_blocks > end;
    let before = copies.trailer(end - 1).filter(of_group);
    let group = before.or_else(|| behind().next());
    let extent = group.map_or(end..end + 1, |group| group.group_start..group.group_start + group.group_blocks);
    let torn_bytes = (behind().count() as u64) * BLOCK_BYTES as u64;
    let looks = |at: u32| (0..copies.legs()).map(move |leg| (leg, copies.look(leg, at)));
    let unwritten = |at: u32| looks(at).any(|(leg, look)| members.contains(leg) && look == Look::Never);
    if extent.clone().any(unwritten) {
        let bad = u64::from(looks(end).any(|(_, look)| look == Look::Bad)) * BLOCK_BYTES as u64;
        return End { torn_bytes: torn_bytes + bad, ..End::default() };
    }
    End { torn_bytes: torn_bytes + BLOCK_BYTES as u64, doubtful: true, damage: None }
}

/// Whether the segment behind `last` was begun and its header is damaged, so that what was acknowledged in it may be
/// lost; or a whole slot cannot be read.
pub(super) fn beginning_lost<V: Volume>(
    legs: &[Option<V>],
    last: SegmentNumber,
    members: Members,
) -> Result<bool, LogError> {
    let mut lost = false;
    for (leg, volume) in legs.iter().enumerate() {
        let Some(volume) = volume else { continue };
        lost |= volume.has_unreadable();
        for number in volume.segments().into_iter().filter(|number| *number > last) {
            lost |= match first_group(volume, number)? {
                FirstGroup::Nothing => false,
                // All copies get a group before it is acknowledged: one that lacks it proves that it was not.
                FirstGroup::Doubtful => !elsewhere_unwritten(legs, number, leg, members)?,
                // A copy that went on alone once, and not even its header tells.
                FirstGroup::Followed if elsewhere_unwritten(legs, number, leg, members)? => true,
                FirstGroup::Followed => {
                    let problem = "its header is damaged, although later blocks were written".to_owned();
                    return Err(LogError::Damaged { file: volume.describe(number), offset: 0, problem });
                }
            };
        }
    }
    Ok(lost)
}

fn elsewhere_unwritten<V: Volume>(
    legs: &[Option<V>],
    number: SegmentNumber,
    but: usize,
    members: Members,
) -> Result<bool, LogError> {
    for (leg, volume) in legs.iter().enumerate() {
        if leg != but
            && members.contains(leg)
            && let Some(volume) = volume
            && first_group(volume, number)? == FirstGroup::Nothing
        {
            return Ok(true);
        }
    }
    Ok(false)
}

#[derive(Debug, PartialEq, Eq)]
enum FirstGroup {
    /// Never written, torn, or from an earlier time.
    Nothing,
    /// Its header is bad, and nothing proves that the group was torn.
    Doubtful,
    /// Its header is not there, and later groups are.
    Followed,
}

/// What a segment without a valid header of this log holds.
fn first_group<V: Volume>(volume: &V, number: SegmentNumber) -> Result<FirstGroup, LogError> {
    if !volume.segments().contains(&number) {
        return Ok(FirstGroup::Nothing);
    }
    let bytes = read_all(volume, number)?;
    let blocks = bytes.as_chunks::<BLOCK_BYTES>().0;
    let content = |at: usize| blocks.get(at).map_or(Content::Bad, |block| examine(block, at as u32));
    // Whole: of an earlier time, or of a copy that went another way and lost. Blank: not begun.
    if content(0) != Content::Bad {
        return Ok(FirstGroup::Nothing);
    }
    let ours: Vec<_> = (1..blocks.len())
        .filter_map(|at| match content(at) {
            Content::Whole(trailer) if trailer.segment.number == number => Some(trailer),
            _ => None,
        })
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
    let torn = newest.is_some_and(|group| (1..group.group_blocks as usize).any(|at| is_unwritten(at, group.segment)));
    Ok(if torn { FirstGroup::Nothing } else { FirstGroup::Doubtful })
}
