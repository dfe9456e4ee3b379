//! The log against the log in memory, over random histories with reopening, in a directory and on a device.

use std::time::Duration;

use crate::common::{SEGMENT, Scratch, append, entry, options, segments, settle};
use proptest::prelude::*;
use storage_log::{LegSpec, LogError, LogStore, MemoryLog, Options, Record, Ticket, open};

#[derive(Debug, Clone)]
enum Op {
    State(Vec<u8>),
    /// Appends `len` bytes, `back` entries before the end.
    Entry {
        back: u64,
        len: usize,
    },
    Truncate {
        back: u64,
    },
    /// A leap: everything forgotten, the next entry far ahead.
    Leap {
        ahead: u64,
    },
    Flush,
    Settle,
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        2 => prop::collection::vec(any::<u8>(), 0..60).prop_map(Op::State),
        12 => (prop_oneof![4 => Just(0u64), 1 => 0u64..8], prop_oneof![4 => 0usize..300, 1 => 0usize..20_000])
            .prop_map(|(back, len)| Op::Entry { back, len }),
        2 => (0u64..10).prop_map(|back| Op::Truncate { back }),
        1 => (0u64..50).prop_map(|ahead| Op::Leap { ahead }),
        2 => Just(Op::Flush),
        1 => Just(Op::Settle),
        1 => Just(Op::Reopen),
    ]
}

/// Plays a history on a log and on its model, and compares after each reopening.
fn play(ops: Vec<Op>, legs: &[LegSpec], options: Options) -> Result<(), TestCaseError> {
    let mut log = Some(open(legs, options).unwrap().0);
    let mut model = MemoryLog::new();
    let mut next = 1u64;
    let mut last_ticket = Ticket(0);
    for (step, op) in ops.into_iter().chain([Op::Reopen]).enumerate() {
        let file = log.as_mut().unwrap().as_mut();
        match op {
            Op::State(bytes) => {
                last_ticket = append(file, Record::State(&bytes));
                model.append(Record::State(&bytes)).unwrap();
            }
            Op::Entry { back, len } => {
                let index = next.saturating_sub(back).max(1);
                let bytes: Vec<u8> = (0..len).map(|b| (b * 7 + step) as u8).collect();
                let record = Record::Entry { index, view: step as u64, parts: [&bytes[..len / 2], &bytes[len / 2..]] };
                last_ticket = append(file, record);
                model.append(record).unwrap();
                next = index + 1;
            }
            Op::Truncate { back } => {
                let through = (next - 1).saturating_sub(back);
                file.truncate_prefix(through);
                model.truncate_prefix(through);
            }
            Op::Leap { ahead } => {
                let through = next + ahead;
                file.truncate_prefix(through);
                model.truncate_prefix(through);
                next = through + 1;
            }
            Op::Flush => file.flush(),
            Op::Settle => prop_assert!(settle(file, last_ticket)),
            Op::Reopen => {
                drop(log.take());
                last_ticket = Ticket(0);
                let (reopened, recovered) = open(legs, options).unwrap();
                prop_assert_eq!(recovered, model.snapshot());
                log = Some(reopened);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_directory_recovers_what_was_appended(ops in prop::collection::vec(op(), 1..120), blocks in 8u64..20) {
        let dir = Scratch::new();
        play(ops, &[dir.leg("log")], Options { max_bytes: 1 << 30, ..options(blocks * 4096) })?;
    }

    #[test]
    fn a_mirror_of_directory_and_device_does_too(ops in prop::collection::vec(op(), 1..80)) {
        let dir = Scratch::new();
        let device = dir.device("device", (1 << 20) + 400 * SEGMENT);
        play(ops, &[dir.leg("log"), device], Options { max_bytes: 400 * SEGMENT, ..options(SEGMENT) })?;
    }
}

#[test]
fn truncation_gives_space_back_and_keeps_the_state() {
    let dir = Scratch::new();
    let leg = dir.leg("log");
    let (mut log, _) = open(std::slice::from_ref(&leg), options(SEGMENT)).unwrap();
    append(&mut *log, Record::State(b"promise"));
    for index in 1..=200 {
        entry(&mut *log, index, 1, &[9; 2000]);
    }
    let last = entry(&mut *log, 201, 1, &[9; 2000]);
    assert!(settle(&mut *log, last));
    let before = log.status().disk_bytes;
    log.truncate_prefix(190);
    // A segment goes when the next one has begun.
    let mut last = last;
    for index in 202..=220 {
        last = entry(&mut *log, index, 1, &[9; 2000]);
    }
    assert!(settle(&mut *log, last));
    let after = log.status().disk_bytes;
    assert!(before > 400_000 && after < 200_000, "{before} bytes before, {after} after");
    drop(log);
    assert!(segments(leg.path()).len() as u64 <= after / SEGMENT + 2);
    let (_, recovered) = open(&[leg], options(SEGMENT)).unwrap();
    assert_eq!(recovered.state.as_deref(), Some(&b"promise"[..]));
    assert_eq!(recovered.entries.first().map(|e| e.index), Some(191));
    assert_eq!(recovered.entries.last().map(|e| e.index), Some(220));
}

#[test]
fn old_segments_are_used_again() {
    let dir = Scratch::new();
    let (mut log, _) = open(&[dir.leg("log")], options(SEGMENT)).unwrap();
    for index in 1..=2000 {
        let ticket = entry(&mut *log, index, 1, &[index as u8; 3000]);
        log.truncate_prefix(index - 1);
        if index % 8 == 0 {
            assert!(settle(&mut *log, ticket));
        }
    }
    let files = std::fs::read_dir(dir.path().join("log")).unwrap().count();
    assert!(files <= 8, "{files} files for a log of one entry");
    drop(log);
    let (_, recovered) = open(&[dir.leg("log")], options(SEGMENT)).unwrap();
    assert_eq!(recovered.entries.len(), 1);
    assert_eq!(recovered.entries[0].bytes, [2000u64 as u8; 3000]);
}

#[test]
fn a_full_log_refuses_entries_takes_states_and_recovers_by_truncation() {
    let dir = Scratch::new();
    let options = Options { max_bytes: 6 * SEGMENT, ..options(SEGMENT) };
    let (mut log, _) = open(&[dir.leg("log")], options).unwrap();
    let mut index = 0;
    let error = loop {
        match log.append(Record::Entry { index: index + 1, view: 1, parts: [&[1; 3000], &[]] }) {
            Ok(ticket) => assert!(settle(&mut *log, ticket)),
            // The next segment is being made.
            Err(LogError::QueueFull) => {
                log.wait(Ticket(index + 1), Duration::from_millis(20));
                continue;
            }
            Err(error) => break error,
        }
        index += 1;
    };
    assert!(error.is_full() && matches!(error, LogError::LogFull { .. }), "{error}");
    assert!(log.failed().is_none() && (20..30).contains(&index), "{index} entries");
    for _ in 0..10 {
        let ticket = append(&mut *log, Record::State(b"still votes"));
        assert!(settle(&mut *log, ticket));
    }
    log.truncate_prefix(index - 1);
    for more in 1..=30 {
        let ticket = entry(&mut *log, index + more, 1, &[2; 3000]);
        assert!(settle(&mut *log, ticket));
        log.truncate_prefix(index + more - 1);
    }
    assert!(log.status().disk_bytes <= 4 * SEGMENT, "{}", log.status().disk_bytes);
}

#[test]
fn the_queue_is_bounded_without_blocking() {
    let dir = Scratch::new();
    let options = Options { stage_bytes: 16 * 4096, ..options(1 << 20) };
    let (mut log, _) = open(&[dir.leg("log")], options).unwrap();
    // Nothing is flushed, so the bound is reached whatever the disk does.
    let mut ticket = Ticket(0);
    let mut index = 0;
    let error = loop {
        index += 1;
        match log.append(Record::Entry { index, view: 1, parts: [&[1; 900], &[]] }) {
            Ok(appended) => ticket = appended,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, LogError::QueueFull) && error.is_full());
    assert!((30..64).contains(&index), "{index}");
    assert_eq!(log.durable(), Ticket(0));
    assert!(settle(&mut *log, ticket));
    // The refused index is still the next one.
    let ticket = entry(&mut *log, index, 1, b"again");
    assert!(settle(&mut *log, ticket));
}

#[test]
fn two_logs_never_share_a_place() {
    let dir = Scratch::new();
    for leg in [dir.leg("log"), dir.device("device", 8 << 20)] {
        let legs = [leg];
        let (log, _) = open(&legs, options(SEGMENT)).unwrap();
        let error = open(&legs, options(SEGMENT)).err().unwrap();
        assert!(matches!(error, LogError::Locked { .. }));
        assert!(error.to_string().contains(legs[0].path().to_str().unwrap()), "{error}");
        drop(log);
        open(&legs, options(SEGMENT)).unwrap();
    }
}

#[test]
#[should_panic(expected = "would leave a gap")]
fn a_gap_is_a_bug_of_the_caller() {
    let dir = Scratch::new();
    let (mut log, _) = open(&[dir.leg("log")], options(SEGMENT)).unwrap();
    entry(&mut *log, 1, 1, b"a");
    entry(&mut *log, 3, 1, b"b");
}
