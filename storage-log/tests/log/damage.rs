//! Damage to a log of one copy: nothing that was acknowledged is lost without a word, and nothing panics.

use std::path::PathBuf;

use proptest::prelude::*;

use crate::common::{Rng, append, entry, settle};
use crate::content::Content;
use crate::sample::{At, BLOCK, Kind, Sample, Verdict, reseal, sample_options};
use storage_log::{LegSpec, Record, inspect, open};

/// Ends of a log: in the middle of a segment, in a segment of one group, in its last block.
pub const ENDS: [&[usize]; 3] = [&[100, 9000, 6000], &[6000], &[100, 9000, 10_000]];

/// Ways to harm a block, each with the part that it changes.
#[derive(Debug, Clone, Copy)]
pub enum Harm {
    Flip(usize),
    Zeros,
    Garbage,
    /// Half of it is blank: a torn sector.
    Half,
    /// What stands in the same place of an older segment.
    Older,
}

/// One bit of: a record or header, the data, each part of the trailer, the checksum.
pub const HARMS: [Harm; 12] = [
    Harm::Flip(3 * 8),
    Harm::Flip(26 * 8 + 1),
    Harm::Flip(2000 * 8),
    Harm::Flip(4064 * 8),
    Harm::Flip(4072 * 8 + 63),
    Harm::Flip(4080 * 8),
    Harm::Flip(4084 * 8),
    Harm::Flip(4095 * 8 + 7),
    Harm::Zeros,
    Harm::Garbage,
    Harm::Half,
    Harm::Older,
];

pub fn apply(sample: &Sample, leg: usize, at: At, harm: Harm) {
    let bytes = sample.pristine(leg, at).expect("there is such a block");
    match harm {
        Harm::Flip(bit) => sample.harm(leg, at, bit / 8, &[bytes[bit / 8] ^ 1 << (bit % 8)]),
        Harm::Zeros => sample.harm(leg, at, 0, &[0; BLOCK as usize]),
        Harm::Garbage => sample.harm(leg, at, 0, &Rng(at.segment * 99 + at.block).bytes(BLOCK as usize)),
        Harm::Half => sample.harm(leg, at, 2048, &[0; 2048]),
        Harm::Older => {
            let older = At { segment: sample.first_segment(), ..at };
            let older = sample.pristine(leg, older).expect("it is complete").to_vec();
            sample.harm(leg, at, 0, &older);
        }
    }
}

fn every_block_in_every_way(kind: Kind) {
    let mut seen = [0; 4];
    for ends in ENDS {
        let sample = Sample::new(&[kind], ends);
        let behind = [sample.end(), At { segment: sample.last_segment() + 1, block: 0 }];
        let behind = behind.into_iter().filter(|at| at.block < 8 && sample.place(0, *at).is_some());
        for at in sample.written.iter().map(|(at, _)| *at).chain(behind) {
            for harm in HARMS {
                sample.restore();
                apply(&sample, 0, at, harm);
                let verdict = sample.check(&format!("{harm:?} in {at:?} of {ends:?}"), true);
                seen[match verdict {
                    Verdict::Whole => 0,
                    Verdict::Torn => 1,
                    Verdict::Doubtful => 2,
                    _ => 3,
                }] += 1;
            }
        }
    }
    assert!(seen.iter().all(|count| *count > 0), "every verdict is seen: {seen:?}");
}

#[test]
fn every_block_of_a_directory_in_every_way() {
    every_block_in_every_way(Kind::Dir);
}

#[test]
fn every_block_of_a_device_in_every_way() {
    every_block_in_every_way(Kind::Device);
}

/// One bit of each byte, all bits of those that mean something by themselves. (That a block notices every bit is shown
/// where blocks are defined; here it is about what follows.)
#[test]
fn every_byte_of_a_block_counts() {
    let sample = Sample::new(&[Kind::Dir], ENDS[0]);
    let (at, _) = sample.written[sample.written.len() / 2];
    let bytes = sample.pristine(0, at).unwrap();
    for (byte, &right) in bytes.iter().enumerate() {
        let all = !(32..4064).contains(&byte);
        for bit in (0..8).filter(|bit| all || *bit == byte % 8) {
            sample.harm(0, at, byte, &[right ^ 1 << bit]);
            let error = inspect(&sample.legs, &mut |_| {}).expect_err("it is damaged").to_string();
            let named = format!("{:020}.log is damaged at byte {}", at.segment, at.block * BLOCK);
            assert!(error.contains(&named), "bit {bit} of byte {byte}: {error}");
        }
        sample.harm(0, at, byte, &[right]);
    }
    sample.check("mended", true);
}

/// The files of segments, from the first needed one to the one that was made in advance.
fn segment_files(sample: &Sample) -> Vec<PathBuf> {
    let first = |segment| sample.place(0, At { segment, block: 0 }).map(|(path, _)| path.to_owned());
    (sample.first_segment()..).map_while(first).collect()
}

#[test]
fn every_cut_of_a_file() {
    for ends in ENDS {
        let sample = Sample::new(&[Kind::Dir], ends);
        for path in segment_files(&sample) {
            for blocks in 0..8 {
                for odd in [0, 1, 2048, 4095] {
                    sample.restore();
                    let len = blocks * BLOCK + odd;
                    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
                    sample.check(&format!("{} cut to {len}", path.display()), true);
                }
            }
        }
    }
}

#[test]
fn files_that_are_missing_or_elsewhere() {
    for ends in ENDS {
        let sample = Sample::new(&[Kind::Dir], ends);
        let files = segment_files(&sample);
        assert!(files.len() >= 5, "with one that was made in advance");
        for (nth, path) in files.iter().enumerate() {
            sample.restore();
            std::fs::remove_file(path).unwrap();
            let is_advance = nth + 1 == files.len();
            let verdict = sample.check(&format!("{} is missing", path.display()), true);
            assert_eq!(verdict == Verdict::Whole, is_advance);
            for other in &files[nth + 1..] {
                let both = format!("{} and {}", path.display(), other.display());
                sample.restore();
                let away = path.with_extension("away");
                std::fs::rename(path, &away).unwrap();
                std::fs::rename(other, path).unwrap();
                std::fs::rename(&away, other).unwrap();
                assert_ne!(sample.check(&format!("{both} are swapped"), true), Verdict::Torn);
                sample.restore();
                std::fs::rename(path, other).unwrap();
                assert_ne!(sample.check(&format!("{both}: moved over"), true), Verdict::Torn);
                sample.restore();
                std::fs::copy(path, other).unwrap();
                sample.check(&format!("{both}: copied over"), true);
            }
        }
    }
}

#[test]
fn a_segment_of_another_log_is_refused() {
    let sample = Sample::new(&[Kind::Dir], ENDS[0]);
    let other = Sample::new(&[Kind::Dir], ENDS[0]);
    for path in segment_files(&other) {
        let LegSpec::Dir(here) = &sample.legs[0] else { unreachable!("a directory") };
        sample.restore();
        std::fs::copy(&path, here.join(path.file_name().unwrap())).unwrap();
        let verdict = sample.check(&format!("{} from another log", path.display()), true);
        let is_begun = path != *segment_files(&other).last().unwrap();
        assert_eq!(matches!(verdict, Verdict::Foreign(_)), is_begun, "{}", path.display());
    }
}

#[test]
fn doubt_lasts_until_a_state_is_durable() {
    for kind in [Kind::Dir, Kind::Device] {
        let sample = Sample::new(&[kind], ENDS[0]);
        let (last, _) = *sample.written.last().unwrap();
        apply(&sample, 0, last, Harm::Garbage);
        assert_eq!(sample.check("the last block is bad", true), Verdict::Doubtful);
        let reopen = || open(&sample.legs, sample_options()).unwrap();
        let mut index = reopen().1.entries.last().unwrap().index;
        for _ in 0..5 {
            let (mut log, recovered) = reopen();
            assert!(recovered.doubtful, "entries settle no doubt, nor does another segment");
            index += 1;
            let ticket = entry(&mut *log, index, 9, &vec![1; 9000]);
            assert!(settle(&mut *log, ticket));
        }
        crate::crash::kill_without_states(&sample.legs);
        let (mut log, recovered) = reopen();
        assert!(recovered.doubtful && recovered.entries.last().unwrap().index > index, "nor does a death");
        let ticket = append(&mut *log, Record::State(b"I asked the others"));
        assert!(settle(&mut *log, ticket));
        drop(log);
        let (_, recovered) = reopen();
        assert!(!recovered.doubtful, "the state says it");
        assert_eq!(recovered.state.as_deref(), Some(&b"I asked the others"[..]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn arbitrary_bytes_lose_nothing_silently(seed in any::<u64>(), ends in 0usize..3, device in any::<bool>()) {
        let sample = Sample::new(&[if device { Kind::Device } else { Kind::Dir }], ENDS[ends]);
        let mut rng = Rng(seed);
        for round in 0..20 {
            sample.restore();
            for _ in 0..=rng.below(3) {
                let (at, _) = sample.written[rng.below(sample.written.len() as u64) as usize];
                let from = rng.below(BLOCK) as usize;
                let len = 1 + rng.below(BLOCK - from as u64) as usize;
                sample.harm(0, at, from, &rng.bytes(len));
            }
            sample.check(&format!("seed {seed}, round {round}"), false);
        }
    }

    /// Valid checksums around absurd numbers.
    #[test]
    fn absurd_numbers_never_panic(seed in any::<u64>(), device in any::<bool>()) {
        let sample = Sample::new(&[if device { Kind::Device } else { Kind::Dir }], ENDS[0]);
        let mut rng = Rng(seed);
        for _ in 0..40 {
            sample.restore();
            let header = rng.one_in(2);
            let few = &sample.written[sample.written.len() - 8..];
            let (mut at, _) = few[rng.below(8) as usize];
            at.block = if header { 0 } else { at.block };
            let mut bytes = sample.pristine(0, at).unwrap().to_vec();
            for _ in 0..=rng.below(2) {
                let fields: &[usize] =
                    if header { &[16, 24, 28, 32, 40, 44, 48, 56, 4064, 4080, 4084, 4088] } else { &[4, 8, 12, 4064, 4080, 4084, 4088] };
                let field = fields[rng.below(fields.len() as u64) as usize];
                let number = [0, 1, 2, u64::MAX, u64::MAX >> 1, u64::MAX - 1, 1 << 31, rng.next()][rng.below(8) as usize];
                let width = if field < 4088 { [4, 8][rng.below(2) as usize] } else { 2 };
                bytes[field..field + width].copy_from_slice(&number.to_le_bytes()[..width]);
            }
            reseal(&mut bytes, at.block);
            sample.harm(0, at, 0, &bytes);
            if device && rng.one_in(3) {
                let LegSpec::Device(path) = &sample.legs[0] else { unreachable!("a device") };
                let mut image = std::fs::read(path).unwrap();
                let number = [0, 1, 3, u32::MAX, 1 << 31, rng.next() as u32][rng.below(6) as usize];
                let field = 8 + 4 * rng.below(2) as usize;
                image[field..field + 4].copy_from_slice(&number.to_le_bytes());
                reseal(&mut image[..BLOCK as usize], 0);
                std::fs::write(path, image).unwrap();
            }
            if let Ok((mut log, recovered)) = open(&sample.legs, sample_options()) {
                // It goes on, too.
                let ticket = append(&mut *log, Record::State(b"on"));
                assert!(settle(&mut *log, ticket));
                drop(log);
                let again = match open(&sample.legs, sample_options()) {
                    Ok((_, again)) => again,
                    // A slot that claims to be of the far future; it is refused, not believed.
                    Err(storage_log::LogError::Damaged { .. }) => continue,
                    Err(error) => panic!("{error}"),
                };
                let (mut before, after) = (Content::of(&recovered), Content::of(&again));
                before.state = Some(b"on".to_vec());
                assert!(before == after, "{} became {}", before.brief(), after.brief());
                assert!(recovered.doubtful || !again.doubtful, "where does the doubt come from?");
            }
        }
    }
}
