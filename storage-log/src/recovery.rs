//! Reading a log back.
//!
//! A crash can leave only the last group commit of the last segment incomplete, because each commit is
//! synced before the next begins and a segment before its successor is made. So a bad record is a torn
//! write, and is cut, only if it is in the last segment and no valid record behind it belongs to
//! a later commit (blocks of one commit may reach the disk in any order). Anything else is damage to
//! bytes that may have been acknowledged: opening is refused, since an acceptor that forgets is worse
//! than one that is missing.

use crate::memory::{drop_prefix, set_entry};
use crate::record::{self, Kind, SEGMENT_HEADER_BYTES, SegmentId, segment_number};
use crate::writer::SegmentInfo;
use crate::{IndexRange, LogError, Recovered, StoredEntry};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Where the writer goes on, and what was found.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    pub recovered: Recovered,
    pub range: IndexRange,
    pub segments: Vec<SegmentInfo>,
    /// The last segment, to be appended to.
    pub tail: Option<SegmentId>,
}

/// Reads all segments in `dir` and cuts a torn tail.
pub(crate) fn scan(dir: &Path) -> Result<Scan, LogError> {
    let mut scan = Scan::default();
    let numbers = list(dir)?;
    for pair in numbers.windows(2) {
        if pair[1] != pair[0] + 1 {
            let file = dir.join(SegmentId { number: pair[0] + 1, salt: 0 }.file_name());
            let problem = "the file is missing while older and newer ones are there".to_owned();
            return Err(LogError::Damaged { file, offset: 0, problem });
        }
    }
    for &number in &numbers {
        scan_segment(dir, number, numbers.last() == Some(&number), &mut scan)?;
    }
    Ok(scan)
}

fn list(dir: &Path) -> Result<Vec<u64>, LogError> {
    let mut numbers = Vec::new();
    let entries = std::fs::read_dir(dir).map_err(|error| LogError::io("listing", dir, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| LogError::io("listing", dir, error))?;
        numbers.extend(entry.file_name().to_str().and_then(segment_number));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn scan_segment(dir: &Path, number: u64, is_last: bool, scan: &mut Scan) -> Result<(), LogError> {
    let path = dir.join(SegmentId { number, salt: 0 }.file_name());
    let bytes = std::fs::read(&path).map_err(|error| LogError::io("reading", &path, error))?;
    let Some(id) = SegmentId::decode_header(&bytes).filter(|id| id.number == number) else {
        // The header is synced before the first record is written.
        if is_last && bytes.len() <= SEGMENT_HEADER_BYTES {
            scan.recovered.torn_bytes += bytes.len() as u64;
            return std::fs::remove_file(&path).map_err(|error| LogError::io("removing", &path, error));
        }
        return Err(LogError::Damaged { file: path, offset: 0, problem: "its header is wrong".to_owned() });
    };
    let mut info = SegmentInfo { number, bytes: 0, last_index: None };
    let mut offset = SEGMENT_HEADER_BYTES;
    while offset < bytes.len() {
        match record::find(&bytes, id, offset) {
            Ok(found) => {
                apply(&found, scan, &mut info, &path, offset as u64)?;
                offset += found.size();
            }
            Err(_) if is_last && !later_commit_follows(&bytes, id, offset) => {
                scan.recovered.torn_bytes += (bytes.len() - offset) as u64;
                cut(&path, offset as u64)?;
                break;
            }
            Err(problem) => {
                return Err(LogError::Damaged { file: path, offset: offset as u64, problem: problem.to_owned() });
            }
        }
    }
    info.bytes = offset as u64;
    scan.segments.push(info);
    scan.tail = Some(id);
    Ok(())
}

fn apply(
    found: &record::Found<'_>,
    scan: &mut Scan,
    info: &mut SegmentInfo,
    path: &Path,
    offset: u64,
) -> Result<(), LogError> {
    match found.kind {
        Kind::State => scan.recovered.state = Some(found.payload.to_vec()),
        Kind::Truncate => {
            scan.range.truncate(found.index);
            drop_prefix(&mut scan.recovered.entries, found.index);
        }
        Kind::Entry => {
            let index = found.index;
            if !scan.range.accepts(index) {
                let problem = format!("entry {index} follows entry {:?}", scan.range);
                return Err(LogError::Damaged { file: PathBuf::from(path), offset, problem });
            }
            scan.range.set(index);
            SegmentInfo::note_entry(&mut scan.segments, info, index);
            let entry = StoredEntry { index, view: found.view, bytes: found.payload.to_vec() };
            set_entry(&mut scan.recovered.entries, entry);
        }
    }
    Ok(())
}

/// Whether a record behind the bad one at `bad` proves that the bad one had been synced.
fn later_commit_follows(bytes: &[u8], id: SegmentId, bad: usize) -> bool {
    (bad + 1..bytes.len()).any(|at| {
        record::may_begin(&bytes[at..]) && record::find(bytes, id, at).is_ok_and(|found| found.commit > bad as u64)
    })
}

/// Cuts a torn tail for good before anything is written behind it.
fn cut(path: &Path, offset: u64) -> Result<(), LogError> {
    let cut = || -> std::io::Result<()> {
        let file = File::options().write(true).open(path)?;
        file.set_len(offset)?;
        file.sync_all()
    };
    cut().map_err(|error| LogError::io("cutting the torn end of", path, error))
}
