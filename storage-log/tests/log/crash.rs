//! Real deaths: kill -9 of a process that appends, and a file that may not grow.
//!
//! The child is this test binary again, told by an environment variable.

use crate::common::{Scratch, entry, options, settle};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use storage_log::{FileLog, LogStore, Record};

const DIR_VARIABLE: &str = "PLOVER_LOG_TEST_DIR";

fn spawn(test: &str, dir: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .env(DIR_VARIABLE, dir)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn child_dir() -> Option<std::path::PathBuf> {
    std::env::var_os(DIR_VARIABLE).map(Into::into)
}

/// What entry `index` holds.
fn payload(index: u64) -> Vec<u8> {
    (0..(index * 37 % 900) as usize).map(|b| (b as u64 ^ index) as u8).collect()
}

#[test]
#[ignore = "the child of acknowledged_entries_survive_kill_9"]
fn child_appends_until_killed() {
    let Some(dir) = child_dir() else { return };
    let (mut log, recovered) = FileLog::open(&dir, options(20_000)).unwrap();
    let mut index = recovered.entries.last().map_or(0, |last| last.index);
    let mut out = std::io::stdout().lock();
    loop {
        let mut ticket = log.append(Record::State(&index.to_le_bytes())).unwrap();
        for _ in 0..index % 5 + 1 {
            index += 1;
            ticket = entry(&mut log, index, 1, &payload(index));
        }
        assert!(settle(&mut log, ticket));
        writeln!(out, "acknowledged {index}").unwrap();
        out.flush().unwrap();
    }
}

#[test]
fn acknowledged_entries_survive_kill_9() {
    let dir = Scratch::on_disk();
    let mut acknowledged = 0;
    for round in 0..6 {
        let mut child = spawn("crash::child_appends_until_killed", dir.path());
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let wanted = 3 + round * 17;
        let mut seen = 0;
        for line in lines {
            let line = line.unwrap();
            // The harness may print in front of the first line.
            if let Some((_, index)) = line.split_once("acknowledged ") {
                acknowledged = index.parse().unwrap();
                seen += 1;
            }
            // Kill once, and read what was still in the pipe.
            if seen == wanted {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(seen >= wanted, "the child died by itself after {seen} lines");
        let (_, recovered) = FileLog::open(dir.path(), options(20_000)).unwrap();
        let last = recovered.entries.last().unwrap().index;
        assert!(last >= acknowledged, "entry {acknowledged} was acknowledged, the last one found is {last}");
        assert!(recovered.state.is_some());
        for (found, index) in recovered.entries.iter().zip(1..) {
            assert_eq!((found.index, &found.bytes), (index, &payload(index)));
        }
    }
}

#[test]
#[ignore = "the child of a_failed_write_is_final"]
fn child_hits_a_limit() {
    let Some(dir) = child_dir() else { return };
    // SAFETY: ignoring a signal installs no handler; this process runs this test only.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let limit = libc::rlimit { rlim_cur: 10_000, rlim_max: 10_000 };
    // SAFETY: the pointer is to a valid rlimit and is only read.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit) };
    assert_eq!(result, 0);
    let (mut log, _) = FileLog::open(&dir, options(1 << 20)).unwrap();
    let mut acknowledged = 0;
    for index in 1.. {
        let ticket = entry(&mut log, index, 1, &[7; 1000]);
        if !settle(&mut log, ticket) {
            break;
        }
        acknowledged = index;
    }
    let error = log.failed().expect("the write failed");
    assert!(!error.is_full() && error.to_string().contains("00000000000000000001.log"), "{error}");
    let durable = log.durable();
    assert_eq!(durable.0, acknowledged);
    // Small enough to fit below the limit, and still refused: the log is over.
    assert!(log.append(Record::State(b"x")).is_err());
    log.flush();
    assert_eq!(log.durable(), durable);
    println!("acknowledged {acknowledged}");
}

#[test]
fn a_failed_write_is_final() {
    let dir = Scratch::on_disk();
    let output = spawn("crash::child_hits_a_limit", dir.path()).wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let (_, index) = text.split_once("acknowledged ").expect("the child reports");
    let acknowledged: u64 = index.split_whitespace().next().unwrap().parse().unwrap();
    assert_eq!(acknowledged, 9);
    let (_, recovered) = FileLog::open(dir.path(), options(1 << 20)).unwrap();
    assert_eq!(recovered.entries.len() as u64, acknowledged);
    assert!(recovered.torn_bytes > 0, "the failed write left a part behind, and it was cut");
}
