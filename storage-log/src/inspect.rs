//! Looking at a log without changing it, for operators: what it holds, whether it is whole.

use std::path::PathBuf;

use crate::record::Kind;
use crate::recovery::scan;
use crate::volume::{Access, FileVolume, LegSpec, Volume};
use crate::{LogError, Options, Recovered};

/// What a record is, as it stands in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// The state.
    State,
    /// The state again, at the beginning of a segment.
    StateCopy,
    /// An entry.
    Entry,
    /// Entries up to an index are forgotten.
    Truncate,
    /// Segments in front are needless.
    Begin,
}

/// A record, in the order of the log; also those that later ones supersede.
#[derive(Debug)]
pub struct InspectedRecord<'a> {
    /// The segment's number.
    pub segment: u64,
    /// The block of the segment in which it begins.
    pub block: u32,
    /// What it is.
    pub kind: RecordKind,
    /// The entry's index, or the last one forgotten.
    pub index: u64,
    /// The entry's view.
    pub view: u64,
    /// What it holds.
    pub payload: &'a [u8],
}

/// A segment that the log needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentSummary {
    /// Its number.
    pub number: u64,
    /// Blocks that count.
    pub blocks: u32,
    /// Where the first copy that is here has it.
    pub place: PathBuf,
}

/// What a log holds.
#[derive(Debug)]
pub struct Inspected {
    /// As [`open`](crate::open) would find it.
    pub recovered: Recovered,
    /// The segments, oldest first.
    pub segments: Vec<SegmentSummary>,
    /// Blocks that a copy lacks, by copy; `None` if it cannot be opened, with the reason.
    pub missing_blocks: Vec<Result<usize, LogError>>,
}

/// Reads a log that is not in use, giving every record to `visit`, and changes nothing.
///
/// # Errors
/// [`LogError`]: in use, damaged, or not accessible. Records before a damage have been visited.
pub fn inspect(legs: &[LegSpec], visit: &mut dyn FnMut(&InspectedRecord<'_>)) -> Result<Inspected, LogError> {
    let geometry = Options { direct: false, ..Options::default() }.geometry()?;
    #[cfg(feature = "spdk")]
    if !legs.is_empty() && legs.iter().all(|leg| matches!(leg, LegSpec::Nvme(_))) {
        return inspect_volumes(crate::spdk::inspect_legs(legs, geometry)?, visit);
    }
    inspect_volumes(legs.iter().map(|spec| FileVolume::open(spec, geometry, Access::Inspect)).collect(), visit)
}

fn inspect_volumes<V: Volume>(
    opened: Vec<Result<V, LogError>>,
    visit: &mut dyn FnMut(&InspectedRecord<'_>),
) -> Result<Inspected, LogError> {
    let (mut volumes, mut errors) = (Vec::new(), Vec::new());
    for opened in opened {
        match opened {
            Err(error @ LogError::Locked { .. }) => return Err(error),
            Err(error) => {
                volumes.push(None);
                errors.push(Some(error));
            }
            Ok(volume) => {
                volumes.push(Some(volume));
                errors.push(None);
            }
        }
    }
    if volumes.iter().all(Option::is_none) {
        let error = errors.into_iter().flatten().next();
        return Err(error.unwrap_or(LogError::BadOptions { problem: "no place at all".to_owned() }));
    }
    let scan = scan(&volumes, &mut |segment, block, found| {
        let kind = match found.kind {
            Kind::State => RecordKind::State,
            Kind::StateCopy => RecordKind::StateCopy,
            Kind::Entry => RecordKind::Entry,
            Kind::Truncate => RecordKind::Truncate,
            Kind::Begin => RecordKind::Begin,
        };
        let (index, view, payload) = (found.index, found.view, found.payload);
        visit(&InspectedRecord { segment, block, kind, index, view, payload });
    })?;
    let missing = |leg: usize| scan.gaps.iter().filter(|gap| gap.leg == leg).count();
    let missing_blocks = errors.into_iter().enumerate().map(|(leg, error)| error.map_or(Ok(missing(leg)), Err));
    let place = |number: u64| volumes.iter().flatten().next().map(|volume| volume.describe(number));
    let segments = scan.segments.iter().map(|segment| SegmentSummary {
        number: segment.id.number,
        blocks: segment.blocks,
        place: place(segment.id.number).unwrap_or_default(),
    });
    Ok(Inspected { segments: segments.collect(), missing_blocks: missing_blocks.collect(), recovered: scan.recovered })
}
