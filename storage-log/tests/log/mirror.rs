//! A mirrored log: what one copy lost the other one has, and what may be lost is said.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::{DEADLINE, Rng, SEGMENT, Scratch, append, entry, settle};
use crate::content::Content;
use crate::damage::{ENDS, HARMS, apply};
use crate::sample::{Kind, Sample, Verdict, sample_options};
use storage_log::{LegSpec, LegState, LogError, LogStore, Record, Ticket, open};

const PAIRS: [[Kind; 2]; 3] = [[Kind::Dir, Kind::Dir], [Kind::Dir, Kind::Device], [Kind::Device, Kind::Device]];

#[test]
fn damage_to_one_copy_is_invisible_and_healed() {
    for (pair, ends) in PAIRS.iter().zip(ENDS) {
        let sample = Sample::new(pair, ends);
        let mut rng = Rng(3);
        for leg in 0..2 {
            for (at, _) in &sample.written {
                // Two ways for each block; all ways are met many times.
                for _ in 0..2 {
                    let harm = HARMS[rng.below(HARMS.len() as u64) as usize];
                    sample.restore();
                    apply(&sample, leg, *at, harm);
                    let what = format!("{harm:?} in {at:?} of copy {leg} of {pair:?}");
                    assert_eq!(sample.check(&what, true), Verdict::Whole, "{what}");
                    assert!(sample.is_healed(0) && sample.is_healed(1), "{what}: not healed");
                }
            }
        }
    }
}

#[test]
fn damage_to_both_copies_at_different_blocks_too() {
    for (pair, ends) in PAIRS.iter().zip(ENDS) {
        let sample = Sample::new(pair, ends);
        let mut rng = Rng(4);
        for round in 0..60 {
            sample.restore();
            for (at, _) in &sample.written {
                // Half of all blocks are harmed, each on one copy.
                let leg = rng.below(2) as usize;
                // If both blocks that tell whose a slot is tell something else, the slot is not found.
                let tells = matches!(pair[leg], Kind::Device) && at.block == 1;
                if rng.one_in(2) && !tells {
                    let harm = HARMS[rng.below(HARMS.len() as u64) as usize];
                    apply(&sample, leg, *at, harm);
                }
            }
            let what = format!("round {round} with {pair:?}");
            assert_eq!(sample.check(&what, true), Verdict::Whole, "{what}");
            assert!(sample.is_healed(0) && sample.is_healed(1), "{what}: not healed");
        }
    }
}

#[test]
fn damage_to_the_same_block_of_both_is_refused_or_in_doubt() {
    let mut seen = [0; 3];
    for (pair, ends) in PAIRS.iter().zip(ENDS) {
        let sample = Sample::new(pair, ends);
        let mut rng = Rng(5);
        for (at, _) in &sample.written {
            for _ in 0..4 {
                let harms = [0, 1].map(|_| HARMS[rng.below(HARMS.len() as u64) as usize]);
                sample.restore();
                apply(&sample, 0, *at, harms[0]);
                apply(&sample, 1, *at, harms[1]);
                let what = format!("{harms:?} in {at:?} of {pair:?}");
                match sample.check(&what, true) {
                    Verdict::Damaged(_) => seen[0] += 1,
                    Verdict::Doubtful => seen[1] += 1,
                    // Only if a copy says that it never had the block.
                    Verdict::Torn => seen[2] += 1,
                    // What is harmed with an older block may be that block.
                    Verdict::Whole => assert_eq!(at.segment, sample.first_segment(), "{what}"),
                    other => panic!("{what}: {other:?}"),
                }
            }
        }
    }
    assert!(seen[0] > 100 && seen[1] > 5, "{seen:?}");
}

/// Takes a copy away; `back` brings it back.
fn take_away(leg: &LegSpec) -> impl FnOnce() {
    let path = leg.path().to_owned();
    let away = path.with_extension("away");
    std::fs::rename(&path, &away).unwrap();
    // Neither a directory can be made there nor a log found in it.
    std::fs::write(&path, b"gone").unwrap();
    move || {
        std::fs::remove_file(&path).unwrap();
        std::fs::rename(&away, &path).unwrap();
    }
}

#[test]
fn a_copy_that_is_missing_leaves_doubt() {
    for missing in 0..2 {
        let sample = Sample::new(&[Kind::Dir, Kind::Dir], ENDS[0]);
        let back = take_away(&sample.legs[missing]);
        let (mut log, recovered) = open(&sample.legs, sample_options()).unwrap();
        assert!(recovered.doubtful && Content::of(&recovered) == *sample.all(), "it may have gone on alone");
        let index = recovered.entries.last().unwrap().index + 1;
        let ticket = entry(&mut *log, index, 10, b"in doubt");
        assert!(settle(&mut *log, ticket));
        drop(log);
        let (mut log, recovered) = open(&sample.legs, sample_options()).unwrap();
        assert!(recovered.doubtful, "not settled yet");
        let ticket = append(&mut *log, Record::State(b"settled"));
        assert!(settle(&mut *log, ticket));
        drop(log);
        let (log, recovered) = open(&sample.legs, sample_options()).unwrap();
        assert!(recovered.doubtful, "it may have been used alone since");
        drop(log);
        back();
        // What it lacks is filled in.
        let (_, recovered) = open(&sample.legs, sample_options()).unwrap();
        assert!(!recovered.doubtful);
        assert_eq!(recovered.entries.last().map(|entry| entry.index), Some(index));
        assert_eq!(recovered.state.as_deref(), Some(&b"settled"[..]));
    }
}

#[test]
fn an_empty_copy_beside_one_that_is_missing_is_no_new_log() {
    let sample = Sample::new(&[Kind::Dir, Kind::Dir], ENDS[0]);
    let _back = take_away(&sample.legs[0]);
    std::fs::remove_dir_all(sample.legs[1].path()).unwrap();
    let (_, recovered) = open(&sample.legs, sample_options()).unwrap();
    assert!(recovered.doubtful, "the other one may hold all that was promised");
}

#[test]
fn a_device_keeps_the_size_of_its_segments() {
    let sample = Sample::new(&[Kind::Device], ENDS[0]);
    let other = storage_log::Options { segment_bytes: 2 * SEGMENT, ..sample_options() };
    let error = open(&sample.legs, other).err().expect("they would run into each other");
    assert!(matches!(error, LogError::BadOptions { .. }), "{error}");
    assert_eq!(sample.check("with the right size", true), Verdict::Whole);
}

/// A log that goes on, and what it should hold.
struct Going {
    log: Box<dyn LogStore>,
    content: Vec<u64>,
    next: u64,
}

impl Going {
    /// Appends entries, waits for them, and forgets all but the last ones.
    fn on(&mut self) {
        let mut ticket = Ticket(0);
        for _ in 0..3 {
            ticket = entry(&mut *self.log, self.next, 1, &vec![self.next as u8; 5000]);
            self.content.push(self.next);
            self.next += 1;
        }
        assert!(settle(&mut *self.log, ticket), "{:?}", self.log.failed());
        if self.content.len() > 40 {
            let through = self.content[20];
            self.log.truncate_prefix(through);
            self.content.retain(|index| *index > through);
        }
    }

    /// Goes on until the copy is as wanted.
    fn until(&mut self, leg: usize, what: &str, wanted: impl Fn(&LegState) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !wanted(&self.log.status().legs[leg].state) {
            let state = &self.log.status().legs[leg].state;
            assert!(Instant::now() < deadline, "copy {leg} is not {what} within {DEADLINE:?}, but {state:?}");
            self.on();
            self.log.wait(Ticket(u64::MAX), Duration::from_millis(5));
        }
        // And until the disks know.
        self.on();
    }

    /// All is there, and in doubt, since a copy is missing and nobody wrote down that it was.
    fn check_in_doubt(&self, recovered: &storage_log::Recovered, what: &str) {
        let found: Vec<u64> = recovered.entries.iter().map(|entry| entry.index).collect();
        assert_eq!(found, self.content, "{what}");
        assert!(recovered.entries.iter().all(|entry| entry.bytes == vec![entry.index as u8; 5000]), "{what}");
        assert!(recovered.doubtful, "{what}: without doubt");
    }
}

/// Makes a directory unusable for the log that runs in it; returns where it is now.
fn spoil(dir: &Path) -> PathBuf {
    let away = dir.with_extension("spoilt");
    let _ = std::fs::remove_dir_all(&away);
    std::fs::rename(dir, &away).unwrap();
    std::fs::write(dir, b"spoilt").unwrap();
    away
}

#[test]
fn a_copy_is_left_out_rebuilt_and_good_for_a_log_alone() {
    let scratch = Scratch::new();
    let legs = [scratch.leg("a"), scratch.leg("b")];
    let (log, _) = open(&legs, sample_options()).unwrap();
    let mut going = Going { log, content: Vec::new(), next: 1 };
    going.on();
    let has_failed = |state: &LegState| matches!(state, LegState::Failed(_) | LegState::Rebuilding);
    let is_complete = |state: &LegState| matches!(state, LegState::Complete);
    spoil(legs[1].path());
    going.until(1, "left out", has_failed);
    // Nothing is lost, whether it is missing or back as it was; only the first leaves doubt, as nobody can know.
    drop(std::mem::replace(&mut going.log, Box::new(storage_log::MemoryLog::new())));
    let (log, recovered) = open(&legs, sample_options()).unwrap();
    going.check_in_doubt(&recovered, "one was left out");
    going.log = log;
    // An empty one comes in its place and is filled while the log runs.
    std::fs::remove_file(legs[1].path()).unwrap();
    std::fs::create_dir(legs[1].path()).unwrap();
    going.until(1, "complete", is_complete);
    // Now the other one fails, so that all hangs on the new one.
    spoil(legs[0].path());
    going.until(0, "left out", has_failed);
    drop(std::mem::replace(&mut going.log, Box::new(storage_log::MemoryLog::new())));
    let (_, recovered) = open(&legs, sample_options()).unwrap();
    going.check_in_doubt(&recovered, "only the rebuilt one is left");
}

#[test]
fn a_copy_that_was_left_out_is_never_taken_for_the_log() {
    let scratch = Scratch::new();
    let legs = [scratch.leg("a"), scratch.leg("b")];
    let (log, _) = open(&legs, sample_options()).unwrap();
    let mut going = Going { log, content: Vec::new(), next: 1 };
    (0..5).for_each(|_| going.on());
    let stale = spoil(legs[1].path());
    going.until(1, "left out", |state| matches!(state, LegState::Failed(_) | LegState::Rebuilding));
    drop(going.log);
    // The stale one alone does not know that it was left out; so it must not be sure.
    std::fs::remove_file(legs[1].path()).unwrap();
    std::fs::rename(stale, legs[1].path()).unwrap();
    let back = take_away(&legs[0]);
    let (log, recovered) = open(&legs, sample_options()).unwrap();
    assert!(recovered.doubtful);
    drop(log);
    // With both, the one that went on is right, and the other is made equal to it.
    back();
    let (_, recovered) = open(&legs, sample_options()).unwrap();
    assert!(!recovered.doubtful);
    assert_eq!(recovered.entries.iter().map(|entry| entry.index).collect::<Vec<_>>(), going.content);
}
