//! Torn writes are cut, damage is refused, and nothing panics.

use crate::common::{Scratch, entry, options, settle};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use storage_log::{FileLog, LogError, LogStore, Record, Recovered};

fn segments(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    files
}

/// One record per commit; returns the file's length after each, before the first included.
fn small_log(dir: &Path) -> Vec<u64> {
    let (mut log, _) = FileLog::open(dir, options(1 << 20)).unwrap();
    let mut ends = vec![log.disk_bytes()];
    let ticket = log.append(Record::State(b"state")).unwrap();
    assert!(settle(&mut log, ticket));
    ends.push(log.disk_bytes());
    for index in 1..=4 {
        let ticket = entry(&mut log, index, 1, &vec![index as u8; index as usize * 5]);
        assert!(settle(&mut log, ticket));
        ends.push(log.disk_bytes());
    }
    ends
}

/// What the first `records` records of the small log amount to.
fn expected(records: usize, torn_bytes: u64) -> Recovered {
    let entries = (1..records as u64).map(|index| storage_log::StoredEntry {
        index,
        view: 1,
        bytes: vec![index as u8; index as usize * 5],
    });
    Recovered { state: (records > 0).then(|| b"state".to_vec()), entries: entries.collect(), torn_bytes }
}

#[test]
fn every_cut_leaves_the_whole_records_before_it() {
    let origin = Scratch::new();
    let ends = small_log(origin.path());
    let bytes = std::fs::read(&segments(origin.path())[0]).unwrap();
    assert_eq!(bytes.len() as u64, *ends.last().unwrap());
    for cut in 0..=bytes.len() as u64 {
        let dir = Scratch::new();
        let file = dir.path().join("00000000000000000001.log");
        std::fs::write(&file, &bytes[..cut as usize]).unwrap();
        let records = ends.iter().filter(|&&end| end <= cut).count().saturating_sub(1);
        // A whole header without records is no torn write.
        let whole = if cut < ends[0] { 0 } else { ends[records] };
        let (mut log, recovered) = FileLog::open(dir.path(), options(1 << 20)).unwrap();
        assert_eq!(recovered, expected(records, cut - whole), "cut at {cut}");
        // Life goes on behind the cut.
        let ticket = entry(&mut log, records.max(1) as u64, 2, b"new");
        assert!(settle(&mut log, ticket), "cut at {cut}");
        drop(log);
        let (_, recovered) = FileLog::open(dir.path(), options(1 << 20)).unwrap();
        assert_eq!(recovered.entries.last().map(|e| e.bytes.as_slice()), Some(&b"new"[..]));
        assert_eq!((recovered.entries.len(), recovered.torn_bytes), (records.max(1), 0));
    }
}

#[test]
fn every_flipped_bit_is_noticed() {
    let origin = Scratch::new();
    let ends = small_log(origin.path());
    let bytes = std::fs::read(&segments(origin.path())[0]).unwrap();
    let last_commit = ends[ends.len() - 2];
    for bit in 0..bytes.len() * 8 {
        let dir = Scratch::new();
        let file = dir.path().join("00000000000000000001.log");
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&file, &flipped).unwrap();
        let result = FileLog::open(dir.path(), options(1 << 20));
        if (bit / 8) as u64 >= last_commit {
            // Indistinguishable from the write that a crash interrupted.
            let (_, recovered) = result.unwrap();
            assert_eq!(recovered, expected(4, bytes.len() as u64 - last_commit), "bit {bit}");
            continue;
        }
        let error = result.err().unwrap_or_else(|| panic!("bit {bit} was not noticed"));
        let LogError::Damaged { file: named, offset, .. } = &error else { panic!("bit {bit}: {error}") };
        let record = *ends.iter().rev().find(|&&end| end <= (bit / 8) as u64).unwrap_or(&0);
        assert_eq!((named, *offset), (&file, record), "bit {bit}");
        assert!(error.to_string().contains("let the replica join anew"), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), flipped, "a refused log stays as it is");
    }
}

#[test]
fn a_hole_inside_the_last_commit_is_a_torn_write() {
    let dir = Scratch::new();
    let (mut log, _) = FileLog::open(dir.path(), options(1 << 20)).unwrap();
    let ticket = entry(&mut log, 1, 1, b"acknowledged");
    assert!(settle(&mut log, ticket));
    let acknowledged = log.disk_bytes();
    entry(&mut log, 2, 1, &[2; 5000]);
    let ticket = entry(&mut log, 3, 1, &[3; 5000]);
    assert!(settle(&mut log, ticket));
    drop(log);
    // The disk wrote the second block of the commit, and the power failed before the first.
    let file = &segments(dir.path())[0];
    let mut bytes = std::fs::read(file).unwrap();
    bytes[acknowledged as usize..][..4096].fill(0);
    std::fs::write(file, &bytes).unwrap();
    let (_, recovered) = FileLog::open(dir.path(), options(1 << 20)).unwrap();
    assert_eq!(recovered.entries.len(), 1);
    assert_eq!(recovered.torn_bytes, bytes.len() as u64 - acknowledged);
}

/// Three segments or more, with entries in each.
fn long_log(dir: &Path) -> Vec<PathBuf> {
    let (mut log, _) = FileLog::open(dir, options(500)).unwrap();
    let mut ticket = log.append(Record::State(b"state")).unwrap();
    for index in 1..=12 {
        ticket = entry(&mut log, index, 1, &[index as u8; 100]);
    }
    assert!(settle(&mut log, ticket));
    drop(log);
    let files = segments(dir);
    assert!(files.len() >= 3);
    files
}

#[test]
fn a_closed_segment_is_never_cut() {
    for damage in ["shorter", "missing", "swapped"] {
        let dir = Scratch::new();
        let files = long_log(dir.path());
        match damage {
            "shorter" => {
                let bytes = std::fs::read(&files[1]).unwrap();
                std::fs::write(&files[1], &bytes[..bytes.len() - 1]).unwrap();
            }
            "missing" => std::fs::remove_file(&files[1]).unwrap(),
            _ => std::fs::rename(&files[0], &files[1]).unwrap(),
        }
        let error = FileLog::open(dir.path(), options(500)).err();
        let Some(LogError::Damaged { file, .. }) = &error else { panic!("{damage}: {error:?}") };
        // A first segment that is missing cannot be told from a truncated one; here the second names it.
        assert_eq!(*file, files[1], "{damage}");
    }
}

#[test]
fn a_new_segment_without_its_header_is_dropped() {
    let dir = Scratch::new();
    let files = long_log(dir.path());
    let (_, before) = FileLog::open(dir.path(), options(500)).unwrap();
    for len in [0, 1, 31, 32] {
        let next = dir.path().join(format!("{:020}.log", files.len() + 1));
        std::fs::write(&next, vec![0; len]).unwrap();
        let (_, recovered) = FileLog::open(dir.path(), options(500)).unwrap();
        assert_eq!(recovered.torn_bytes, len as u64);
        assert_eq!(recovered.entries, before.entries);
        assert!(!next.exists());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), keep in 0usize..200) {
        let dir = Scratch::new();
        small_log(dir.path());
        let file = &segments(dir.path())[0];
        let mut content = std::fs::read(file).unwrap();
        content.truncate(keep);
        content.extend(bytes);
        std::fs::write(file, &content).unwrap();
        let _ = FileLog::open(dir.path(), options(1 << 20));
    }
}
