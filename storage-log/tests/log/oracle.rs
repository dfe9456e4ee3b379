//! The file log against the log in memory, over random histories with reopening.

use crate::common::{Scratch, options, settle};
use proptest::prelude::*;
use storage_log::{FileLog, LogError, LogStore, MemoryLog, Options, Record, Ticket};

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
        12 => (prop_oneof![4 => Just(0u64), 1 => 0u64..8], 0usize..300)
            .prop_map(|(back, len)| Op::Entry { back, len }),
        2 => (0u64..10).prop_map(|back| Op::Truncate { back }),
        1 => (0u64..50).prop_map(|ahead| Op::Leap { ahead }),
        2 => Just(Op::Flush),
        1 => Just(Op::Settle),
        1 => Just(Op::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn recovers_what_was_appended(ops in prop::collection::vec(op(), 1..120), segment_bytes in 200u64..3000) {
        let dir = Scratch::new();
        let options = options(segment_bytes);
        let mut log = Some(FileLog::open(dir.path(), options).unwrap().0);
        let mut model = MemoryLog::new();
        let mut next = 1u64;
        let mut last_ticket = Ticket(0);
        for (step, op) in ops.into_iter().chain([Op::Reopen]).enumerate() {
            let file = log.as_mut().unwrap();
            match op {
                Op::State(bytes) => {
                    last_ticket = file.append(Record::State(&bytes)).unwrap();
                    model.append(Record::State(&bytes)).unwrap();
                }
                Op::Entry { back, len } => {
                    let index = next.saturating_sub(back).max(1);
                    let bytes: Vec<u8> = (0..len).map(|b| (b * 7 + step) as u8).collect();
                    let record = Record::Entry { index, view: step as u64, parts: [&bytes[..len / 2], &bytes[len / 2..]] };
                    last_ticket = file.append(record).unwrap();
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
                    let (reopened, recovered) = FileLog::open(dir.path(), options).unwrap();
                    prop_assert_eq!(recovered, model.snapshot());
                    log = Some(reopened);
                }
            }
        }
    }
}

#[test]
fn truncation_gives_space_back_and_keeps_the_state() {
    let dir = Scratch::new();
    let (mut log, _) = FileLog::open(dir.path(), options(4096)).unwrap();
    log.append(Record::State(b"promise")).unwrap();
    for index in 1..=200 {
        crate::common::entry(&mut log, index, 1, &[9; 200]);
    }
    let last = crate::common::entry(&mut log, 201, 1, &[9; 200]);
    assert!(settle(&mut log, last));
    let before = log.disk_bytes();
    log.truncate_prefix(190);
    let last = crate::common::entry(&mut log, 202, 1, b"x");
    assert!(settle(&mut log, last));
    drop(log);
    let on_disk: u64 = std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(before > 40_000 && on_disk < 10_000, "{before} bytes before, {on_disk} after");
    let (log, recovered) = FileLog::open(dir.path(), options(4096)).unwrap();
    assert_eq!(recovered.state.as_deref(), Some(&b"promise"[..]));
    assert_eq!(recovered.entries.first().map(|e| e.index), Some(191));
    assert_eq!(recovered.entries.last().map(|e| e.index), Some(202));
    assert_eq!(log.disk_bytes(), on_disk);
}

#[test]
fn a_full_log_refuses_entries_takes_states_and_recovers_by_truncation() {
    let dir = Scratch::new();
    let options = Options { segment_bytes: 1000, max_bytes: 5000, queue_bytes: 1 << 20 };
    let (mut log, _) = FileLog::open(dir.path(), options).unwrap();
    let mut index = 0;
    let error = loop {
        let record = Record::Entry { index: index + 1, view: 1, parts: [&[1; 300], &[]] };
        match log.append(record) {
            Ok(ticket) => assert!(settle(&mut log, ticket)),
            Err(error) => break error,
        }
        index += 1;
    };
    assert!(error.is_full() && matches!(error, LogError::LogFull { max_bytes: 5000 }), "{error}");
    assert!(log.failed().is_none() && (10..20).contains(&index), "{index} entries");
    log.truncate_prefix(index - 1);
    let ticket = log.append(Record::State(b"still votes")).unwrap();
    assert!(settle(&mut log, ticket));
    crate::common::await_log(&log, |log| log.disk_bytes() < 2500);
    let ticket = crate::common::entry(&mut log, index + 1, 1, &[2; 300]);
    assert!(settle(&mut log, ticket));
}

#[test]
fn the_queue_is_bounded_without_blocking() {
    let dir = Scratch::new();
    let options = Options { queue_bytes: 10_000, ..Options::default() };
    let (mut log, _) = FileLog::open(dir.path(), options).unwrap();
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
    assert_eq!(ticket, Ticket(10));
    assert_eq!(log.durable(), Ticket(0));
    assert!(settle(&mut log, ticket));
    // The refused index is still the next one.
    let ticket = crate::common::entry(&mut log, 11, 1, b"again");
    assert!(settle(&mut log, ticket));
}

#[test]
fn two_logs_never_share_a_directory() {
    let dir = Scratch::new();
    let (log, _) = FileLog::open(dir.path(), Options::default()).unwrap();
    let error = FileLog::open(dir.path(), Options::default()).unwrap_err();
    assert!(matches!(error, LogError::Locked { .. }));
    assert!(error.to_string().contains(dir.path().to_str().unwrap()), "{error}");
    drop(log);
    FileLog::open(dir.path(), Options::default()).unwrap();
}

#[test]
#[should_panic(expected = "would leave a gap")]
fn a_gap_is_a_bug_of_the_caller() {
    let dir = Scratch::new();
    let (mut log, _) = FileLog::open(dir.path(), Options::default()).unwrap();
    crate::common::entry(&mut log, 1, 1, b"a");
    crate::common::entry(&mut log, 3, 1, b"b");
}
