//! Reading a log back, from one copy or several.
//!
//! What is found is one of four things, and everything hangs on not mixing them up:
//! * *whole*: all blocks that should be there are, on some copy;
//! * *torn*: the last group is incomplete, and some block of it was never written on a copy that takes part. A group is
//!   acknowledged only after all of it is on all such copies, so nobody was told about this one. It is cut off;
//! * *doubtful*: the end is bad and nothing proves that it was torn, or a copy is missing that may have gone on without
//!   this one. What was acknowledged last may be lost, so this replica must ask its peers before it votes
//!   ([`Recovered::doubtful`]);
//! * *damaged*: bytes are bad that were durable before something else was written. Opening is refused, since
//!   an acceptor that forgets is worse than one that is missing.
//!
//! A log begins with the segment that its last header names, or with a later one if a record behind that header says so:
//! those before it have been given back since, and what lies in their places is not of the log any more.
//!
//! Nothing is written here. The gaps of single copies are reported, and filled by who opened the log.

mod copies;
mod tail;

use crate::block::SegmentId;
use crate::memory::{drop_prefix, set_entry};
use crate::record::{self, Chain, Flaw, Kind};
use crate::segment::{Header, Members, SegmentInfo, SegmentNumber, note_entry};
use crate::volume::Volume;
use crate::{IndexRange, LogError, Recovered, StoredEntry};
use copies::{Copies, Headers};

/// A block that a copy lacks and another has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gap {
    pub leg: usize,
    pub segment: SegmentId,
    pub number: SegmentNumber,
    pub block: u32,
}

/// What was found, and where the log goes on.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub recovered: Recovered,
    pub range: IndexRange,
    pub segments: Vec<SegmentInfo>,
    /// The segment of the last state.
    pub state_in: SegmentNumber,
    /// The segment that the log begins with.
    pub first: SegmentNumber,
    /// The header of the last segment; `None` if the log is new.
    pub last: Option<Header>,
    pub chain: Chain,
    pub gaps: Vec<Gap>,
    /// The copies that are here and have a part in the log.
    pub present: Members,
}

/// Takes each record as it is read: its segment, the block it begins in, and the record.
pub(crate) type Visit<'a> = &'a mut dyn FnMut(SegmentNumber, u32, &record::Found<'_>);

/// Reads all that the copies hold; `None` is one that cannot be opened.
pub(crate) fn scan<V: Volume>(legs: &[Option<V>], visit: Visit<'_>) -> Result<Scan, LogError> {
    let headers = Headers::read(legs)?;
    // Even if it was left out properly: it may have been used alone since, when this one was away.
    let is_one_missing = legs.iter().any(Option::is_none);
    let mut scan = Scan::default();
    let Some(last) = headers.last() else {
        scan.recovered.doubtful = is_one_missing || tail::beginning_lost(legs, None)?;
        return Ok(scan);
    };
    let beginning_lost = tail::beginning_lost(legs, Some((last.number(), last.members)))?;
    scan.first = first_needed(legs, &last)?;
    let first = scan.first;
    let missing = |number| match beginning_lost {
        // It was given back when the segment began whose header is lost.
        true if number == first => missing(legs, last.number() + 1),
        _ => missing(legs, number),
    };
    scan.last = Some(last);
    // What stands before one that is missing is not known to be of this log; so first those that are nowhere at all.
    let mut numbers = first..last.number();
    let gap = numbers.clone().find(|number| !headers.has_any(*number));
    if let Some(number) = gap.or_else(|| numbers.rfind(|number| headers.of(*number).is_none())) {
        return Err(missing(number));
    }
    for number in first..=last.number() {
        let Some(header) = headers.of(number) else { return Err(missing(number)) };
        if number == first {
            scan.chain = header.chain;
        }
        read_segment(legs, header, headers.of(number + 1), &last, &mut scan, visit)?;
    }
    let all_members = (0..32).filter(|&leg| last.members.contains(leg)).all(|leg| scan.present.contains(leg));
    let split = headers.are_split(&last);
    if split {
        tracing::warn!(
            "two copies of the log went on without one another; the newer one counts, and nothing is certain"
        );
    }
    scan.recovered.doubtful |= is_one_missing || split || !all_members || beginning_lost;
    Ok(scan)
}

/// The segment that the log begins with: the one that the last header names, or a later one that a record behind it does.
/// Something was written behind that one before anything was given back, so that no damage which leaves the log usable takes
/// it away.
fn first_needed<V: Volume>(legs: &[Option<V>], last: &Header) -> Result<SegmentNumber, LogError> {
    let (stream, _) = read_stream(&Copies::read(legs, last.id)?, last.blocks);
    let (mut first, mut at, mut chain) = (last.first, 0, last.chain);
    while let Ok(found) = record::find(&stream[at..], chain) {
        if found.kind == Kind::Begin {
            first = first.max(found.index);
        }
        at += found.size();
        chain = found.chain;
    }
    if first > last.number() {
        return Err(damaged(legs, last.number(), 0, format!("it says that the log begins with segment {first}")));
    }
    Ok(first)
}

impl Header {
    pub(crate) fn number(&self) -> SegmentNumber {
        self.id.number
    }
}

fn missing<V: Volume>(legs: &[Option<V>], number: SegmentNumber) -> LogError {
    let problem = "its header is damaged, or the segment is missing, while a newer one needs it".to_owned();
    damaged(legs, number, 0, problem)
}

fn damaged<V: Volume>(legs: &[Option<V>], number: SegmentNumber, block: u32, problem: String) -> LogError {
    let leg = legs.iter().flatten().next().expect("a log has at least one copy");
    let offset = u64::from(block) * crate::block::BLOCK_BYTES as u64;
    LogError::Damaged { file: leg.describe(number), offset, problem }
}

/// Where a block's bytes begin in the stream.
struct Mark {
    stream_at: usize,
    block: u32,
}

/// The bytes of a segment's blocks behind the header and below `wanted`, up to the first one that no copy has.
fn read_stream(copies: &Copies, wanted: u32) -> (Vec<u8>, Vec<Mark>) {
    let (mut stream, mut marks) = (Vec::new(), Vec::new());
    for block in 1..wanted {
        let Some(bytes) = copies.best(block) else { break };
        marks.push(Mark { stream_at: stream.len(), block });
        stream.extend_from_slice(bytes);
    }
    (stream, marks)
}

fn read_segment<V: Volume>(
    legs: &[Option<V>],
    header: Header,
    next: Option<Header>,
    last: &Header,
    scan: &mut Scan,
    visit: Visit<'_>,
) -> Result<(), LogError> {
    let number = header.number();
    if scan.chain != header.chain {
        return Err(damaged(legs, number, 0, "its first record does not follow the one before it".to_owned()));
    }
    let copies = Copies::read(legs, header.id)?;
    let wanted = next.map_or(header.blocks, |next| next.previous_blocks);
    let (stream, marks) = read_stream(&copies, wanted);
    let block = marks.len() as u32 + 1;
    scan.gaps.extend(copies.gaps(block));
    copies.legs_with_any(block).for_each(|leg| scan.present.insert(leg));
    scan.recovered.doubtful |= header.doubt;
    if next.is_some() && block < wanted {
        let problem = "a block is damaged or was never written, although later ones were".to_owned();
        return Err(damaged(legs, number, block, problem));
    }
    let end = if next.is_none() { tail::judge(&copies, &header, last.members, block) } else { tail::End::default() };
    if let Some(problem) = end.damage {
        return Err(damaged(legs, number, block, problem));
    }
    scan.segments.push(SegmentInfo { blocks: block, ..SegmentInfo::new(header.id) });
    let rest = apply_stream(&stream, &marks, header.id, scan, visit)
        .map_err(|(block, problem)| damaged(legs, number, block, problem))?;
    // After the records: a state that was written in doubt settles the doubt of then, not of now.
    scan.recovered.torn_bytes += end.torn_bytes;
    scan.recovered.doubtful |= end.doubtful;
    if next.is_none() {
        // The beginning of a record whose rest was in the group that is torn.
        scan.recovered.torn_bytes += rest as u64;
    }
    Ok(())
}

/// Applies the records of a segment. Returns the bytes of an incomplete record at the end.
fn apply_stream(
    stream: &[u8],
    marks: &[Mark],
    segment: SegmentId,
    scan: &mut Scan,
    visit: Visit<'_>,
) -> Result<usize, (u32, String)> {
    let mut at = 0;
    while at < stream.len() {
        let block = marks[marks.partition_point(|mark| mark.stream_at <= at) - 1].block;
        match record::find(&stream[at..], scan.chain) {
            Ok(found) => {
                visit(segment.number, block, &found);
                apply(&found, scan).map_err(|problem| (block, problem))?;
                scan.chain = found.chain;
                at += found.size();
            }
            Err(Flaw::CutOff) => return Ok(stream.len() - at),
            // Its blocks are whole, so this was not the disk.
            Err(Flaw::Wrong(problem)) => return Err((block, problem.to_owned())),
        }
    }
    Ok(0)
}

fn apply(found: &record::Found<'_>, scan: &mut Scan) -> Result<(), String> {
    if matches!(found.kind, Kind::State | Kind::StateCopy) {
        scan.state_in = scan.segments.last().map_or(0, |segment| segment.id.number);
    }
    match found.kind {
        Kind::State => {
            scan.recovered.state = Some(found.payload.to_vec());
            // Who opened the log in doubt has written down that it was.
            scan.recovered.doubtful = false;
        }
        Kind::StateCopy => scan.recovered.state = Some(found.payload.to_vec()),
        Kind::Truncate => {
            scan.range.truncate(found.index);
            for segment in &mut scan.segments {
                segment.last_index = segment.last_index.filter(|last| *last > found.index);
            }
            drop_prefix(&mut scan.recovered.entries, found.index);
        }
        Kind::Entry => {
            let index = found.index;
            if !scan.range.accepts(index) {
                return Err(format!("entry {index} follows entries {:?}", scan.range));
            }
            scan.range.set(index);
            note_entry(scan.segments.iter_mut(), index);
            let entry = StoredEntry { index, view: found.view, bytes: found.payload.to_vec() };
            set_entry(&mut scan.recovered.entries, entry);
        }
        // Looked at before everything else.
        Kind::Begin => {}
    }
    Ok(())
}
