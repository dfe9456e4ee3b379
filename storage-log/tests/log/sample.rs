//! A log whose every block is known, and the contract of recovery as a function of what became of the blocks.
//!
//! Reads the disk format by its description, not with the crate's own code: `block`, `segment` and `raw` say what lies where.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::common::{SEGMENT, Scratch, options, settle};
use crate::content::{Content, Op, Script};
use storage_log::{LegSpec, LogError, Options, Recovered, StoredEntry, inspect, open};

pub const BLOCK: u64 = 4096;
const SLOTS_AT: u64 = 1 << 20;
const SLOTS: u64 = 24;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Dir,
    Device,
}

/// A block's place in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct At {
    pub segment: u64,
    pub block: u64,
}

/// Files by path.
pub type Image = BTreeMap<PathBuf, Vec<u8>>;

/// See the module.
pub struct Sample {
    _scratch: Scratch,
    pub legs: Vec<LegSpec>,
    images: Vec<Image>,
    /// Where each segment begins, by copy.
    places: Vec<BTreeMap<u64, (PathBuf, u64)>>,
    /// Every block that counts, in the order of the log, with the number of its group.
    pub written: Vec<(At, usize)>,
    /// What the log held after each step, and how many steps were durable before the last group.
    history: Vec<Content>,
    before_last: usize,
}

pub fn sample_options() -> Options {
    Options { stage_bytes: 128 << 10, ..options(SEGMENT) }
}

impl Sample {
    /// Several segments of random history; and a last one with a group for each of `ends`, with an entry of that size.
    pub fn new(kinds: &[Kind], ends: &[usize]) -> Sample {
        let scratch = Scratch::new();
        let leg = |(nth, kind): (usize, &Kind)| match kind {
            Kind::Dir => scratch.leg(&format!("leg{nth}")),
            Kind::Device => scratch.device(&format!("leg{nth}"), SLOTS_AT + SLOTS * SEGMENT),
        };
        let legs: Vec<LegSpec> = kinds.iter().enumerate().map(leg).collect();
        let mut script = Script::new(5, Content::default());
        let mut history = vec![Content::default()];
        let (mut log, _) = open(&legs, sample_options()).unwrap();
        for step in 0..90 {
            let ticket = script.step().play(&mut *log);
            history.push(script.content.clone());
            if let Some(ticket) = ticket
                && step % 4 == 3
            {
                assert!(settle(&mut *log, ticket));
            }
        }
        // Enough that is not forgotten for some segments.
        for _ in 0..16 {
            let index = script.content.entries.last().map_or(1, |last| last.index + 1);
            let op = Op::Entry(StoredEntry { index, view: 6, bytes: vec![index as u8; 5000] });
            let ticket = op.play(&mut *log).expect("an entry has a ticket");
            script.content.apply(&op);
            history.push(script.content.clone());
            assert!(settle(&mut *log, ticket));
        }
        drop(log);
        // Each opening begins a segment.
        let (mut log, _) = open(&legs, sample_options()).unwrap();
        let mut before_last = 0;
        for &size in ends {
            before_last = history.len() - 1;
            let index = script.content.entries.last().map_or(1, |last| last.index + 1);
            let small = StoredEntry { index, view: 7, bytes: b"small".to_vec() };
            let large = StoredEntry { index: index + 1, view: 8, bytes: vec![size as u8; size] };
            let mut ticket = None;
            for op in [Op::State(vec![3; 40]), Op::Entry(small), Op::Entry(large)] {
                ticket = op.play(&mut *log);
                script.content.apply(&op);
                history.push(script.content.clone());
            }
            assert!(settle(&mut *log, ticket.unwrap()));
        }
        drop(log);
        let images: Vec<Image> = legs.iter().map(files).collect();
        let places = legs.iter().zip(&images).map(|(leg, image)| places(leg, image)).collect();
        let mut sample = Sample { _scratch: scratch, legs, images, places, written: Vec::new(), history, before_last };
        sample.written = sample.find_written();
        sample
    }

    /// All blocks from the first needed segment to the last group.
    fn find_written(&self) -> Vec<(At, usize)> {
        let block = |segment, block| self.pristine(0, At { segment, block }).expect("it was read");
        let is_header =
            |number: &&u64| block(**number, 0)[..8] == *b"PLVRLOG2" && u64_at(block(**number, 0), 4064) == **number;
        let last = *self.places[0].keys().rfind(is_header).expect("a log");
        let first = u64_at(block(last, 0), 48);
        assert!(last >= first + 3, "{first} to {last} is too short a log");
        let mut written = Vec::new();
        let (mut group, mut present) = (0, (0, 0));
        for segment in first..=last {
            let generation = u64_at(block(segment, 0), 4072);
            let ours = |at: &u64| {
                let bytes = block(segment, *at);
                is_sealed(bytes, *at) && (u64_at(bytes, 4064), u64_at(bytes, 4072)) == (segment, generation)
            };
            let count = match segment == last {
                true => (0..SEGMENT / BLOCK).take_while(ours).count() as u64,
                false => u64::from(u32_at(block(segment + 1, 0), 40)),
            };
            for at in 0..count {
                let start = (segment, u32_at(block(segment, at), 4080));
                group += usize::from(start != std::mem::replace(&mut present, start));
                written.push((At { segment, block: at }, group));
            }
        }
        written
    }

    pub fn last_segment(&self) -> u64 {
        self.written.last().unwrap().0.segment
    }

    pub fn first_segment(&self) -> u64 {
        self.written[0].0.segment
    }

    /// The block behind the last one.
    pub fn end(&self) -> At {
        let (last, _) = *self.written.last().unwrap();
        At { block: last.block + 1, ..last }
    }

    pub fn place(&self, leg: usize, at: At) -> Option<(&Path, u64)> {
        let (path, start) = self.places[leg].get(&at.segment)?;
        Some((path, start + at.block * BLOCK))
    }

    fn block_of<'a>(&self, image: &'a Image, leg: usize, at: At) -> Option<&'a [u8]> {
        let (path, offset) = self.place(leg, at)?;
        image.get(path)?.get(offset as usize..(offset + BLOCK) as usize)
    }

    pub fn pristine(&self, leg: usize, at: At) -> Option<&[u8]> {
        self.block_of(&self.images[leg], leg, at)
    }

    /// Everything as it was before any harm.
    pub fn restore(&self) {
        for (leg, image) in self.legs.iter().zip(&self.images) {
            for path in files(leg).into_keys().filter(|path| !image.contains_key(path)) {
                std::fs::remove_file(path).unwrap();
            }
            if let LegSpec::Dir(path) = leg {
                std::fs::create_dir_all(path).unwrap();
            }
            for (path, bytes) in image {
                rewrite(path, bytes);
            }
        }
    }

    /// Writes over a part of a block.
    pub fn harm(&self, leg: usize, at: At, from: usize, bytes: &[u8]) {
        let (path, offset) = self.place(leg, at).expect("there is such a block");
        let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(bytes, offset + from as u64).unwrap();
    }

    /// What recovery must say, by what is on the disks now.
    pub fn verdict(&self) -> Verdict {
        let now: Vec<Image> = self.legs.iter().map(files).collect();
        if let Some(path) = self.stranger(&now) {
            return Verdict::Foreign(path);
        }
        let looks = |at: At| (0..self.legs.len()).map(|leg| self.look(&now[leg], leg, at)).collect::<Vec<_>>();
        let lost: Vec<&(At, usize)> =
            self.written.iter().filter(|(at, _)| !looks(*at).contains(&Look::Whole)).collect();
        let Some(&&(first, group)) = lost.first() else {
            // Where the next group would begin, something bad may be a group that is lost.
            let next = [self.end(), At { segment: self.last_segment() + 1, block: 0 }];
            let has_place =
                |leg: usize, at: At| self.place(leg, at).is_some_and(|(path, _)| now[leg].contains_key(path));
            let places = |at: At| (0..self.legs.len()).all(|leg| has_place(leg, at));
            let bad = |at: At| at.block < SEGMENT / BLOCK && places(at) && looks(at).iter().all(|l| *l == Look::Bad);
            return if next.into_iter().any(bad) { Verdict::Doubtful } else { Verdict::Whole };
        };
        let later = |(at, other): &&(At, usize)| *other > group && looks(*at).contains(&Look::Whole);
        if self.written.iter().any(|block| later(&block)) {
            return Verdict::Damaged(first);
        }
        let elsewhere = |at: At| {
            let bytes = self.pristine(0, at).unwrap();
            now.iter().flat_map(|image| image.values()).any(|file| file.chunks(BLOCK as usize).any(|b| b == bytes))
        };
        let proof = |(at, other): &(At, usize)| *other == group && looks(*at).contains(&Look::Never);
        // A proof that it was never written is none if it lies somewhere else.
        let moved = lost.iter().any(|(at, _)| elsewhere(*at));
        let is_torn = self.written.iter().any(proof) && !moved;
        if first.block == 0 {
            // The header before may need what was given back when this one was durable.
            let before = self.pristine(0, At { segment: first.segment - 1, ..first }).expect("three at least");
            let needs = u64_at(before, 48);
            if needs < self.first_segment() {
                let named = At { segment: if is_torn { needs } else { first.segment }, block: 0 };
                return Verdict::Damaged(named);
            }
        }
        if is_torn { Verdict::Torn } else { Verdict::Doubtful }
    }

    fn look(&self, now: &Image, leg: usize, at: At) -> Look {
        match self.block_of(now, leg, at) {
            None => Look::Bad,
            Some(bytes) if self.written.iter().any(|(w, _)| *w == at) && Some(bytes) == self.pristine(leg, at) => {
                Look::Whole
            }
            Some(bytes) if bytes.iter().all(|byte| *byte == 0) || is_sealed(bytes, at.block) => Look::Never,
            Some(_) => Look::Bad,
        }
    }

    /// A segment of another log.
    fn stranger(&self, now: &[Image]) -> Option<PathBuf> {
        let mut ids = Vec::new();
        for (leg, image) in now.iter().enumerate() {
            for (number, (path, _)) in &self.places[leg] {
                let Some(block) = self.block_of(image, leg, At { segment: *number, block: 0 }) else { continue };
                if block[..8] == *b"PLVRLOG2" && is_sealed(block, 0) && u64_at(block, 4064) == *number {
                    ids.push((u64_at(block, 8), path.clone()));
                }
            }
        }
        let first = ids.first()?.0;
        ids.into_iter().find(|(id, _)| *id != first).map(|(_, path)| path)
    }

    /// Opens the log and holds what it says against the verdict. Without `exact`, several blocks may be lost.
    pub fn check(&self, what: &str, exact: bool) -> Verdict {
        let verdict = self.verdict();
        let before: Vec<Image> = self.legs.iter().map(files).collect();
        let inspected = inspect(&self.legs, &mut |_| {});
        let opened = open(&self.legs, sample_options());
        match (&inspected, &opened) {
            (Ok(inspected), Ok((_, recovered))) => assert_eq!(inspected.recovered, *recovered, "{what}"),
            (Err(a), Err(b)) => assert_eq!(a.to_string(), b.to_string(), "{what}"),
            (a, b) => panic!("{what}: inspected {:?}, opened {:?}", a.as_ref().err(), b.as_ref().err()),
        }
        if opened.is_err() {
            let after: Vec<Image> = self.legs.iter().map(files).collect();
            assert!(before == after, "{what}: a refused log is not touched");
        }
        match (&verdict, opened.map(|(_, recovered)| recovered)) {
            (Verdict::Damaged(first), Err(LogError::Damaged { file, offset, .. })) => {
                let is_named = self.describe(*first) == (file.clone(), offset);
                assert!(is_named || !exact, "{what}: {first:?} is damaged, named is {offset} of {}", file.display());
            }
            // With more than one block lost it may be seen either way, but it is seen.
            (Verdict::Doubtful, Err(LogError::Damaged { .. })) if !exact => {}
            (Verdict::Damaged(_), Ok(recovered)) if !exact => self.compare(what, &Verdict::Doubtful, &recovered),
            (Verdict::Foreign(path), Err(LogError::Foreign { path: named })) => assert_eq!(*path, named, "{what}"),
            (Verdict::Whole | Verdict::Torn | Verdict::Doubtful, Ok(recovered)) => {
                self.compare(what, &verdict, &recovered);
            }
            (verdict, Ok(recovered)) => panic!(
                "{what}: {verdict:?}; opened with {} (all: {}), doubtful {}",
                Content::of(&recovered).brief(),
                self.history.last().unwrap().brief(),
                recovered.doubtful
            ),
            (verdict, Err(error)) => panic!("{what}: {verdict:?}; refused: {error}"),
        }
        verdict
    }

    fn compare(&self, what: &str, verdict: &Verdict, recovered: &Recovered) {
        assert_eq!(recovered.doubtful, *verdict == Verdict::Doubtful, "{what}: {verdict:?}");
        let found = Content::of(recovered);
        let is_all = found == *self.history.last().unwrap();
        let is_near = self.history[self.before_last..].contains(&found);
        let is_right = match verdict {
            Verdict::Whole => is_all,
            // If nothing is left of the last segment, it looks as if it had not been begun.
            Verdict::Torn => is_near && !is_all || self.history.contains(&found) && self.is_last_segment_lost(),
            // What a file lost at its end, or that was moved away, may be more than a group.
            _ => self.history.contains(&found),
        };
        assert!(is_right, "{what}: {verdict:?}; found {}", found.brief());
        assert!(*verdict != Verdict::Whole || recovered.torn_bytes == 0, "{what}: torn");
    }

    fn is_last_segment_lost(&self) -> bool {
        let last = self.written.iter().filter(|(at, _)| at.segment == self.last_segment());
        let now: Vec<Image> = self.legs.iter().map(files).collect();
        let mut copies = last.flat_map(|(at, _)| (0..now.len()).map(|leg| self.look(&now[leg], leg, *at)));
        copies.all(|look| look != Look::Whole)
    }

    /// How a message names a block.
    fn describe(&self, at: At) -> (PathBuf, u64) {
        let path = match &self.legs[0] {
            LegSpec::Dir(dir) => dir.join(format!("{:020}.log", at.segment)),
            LegSpec::Device(device) => {
                let start = self.places[0].get(&at.segment).filter(|_| at.segment >= self.first_segment());
                let slot = start.map(|(_, start)| format!("slot {}, ", (start - SLOTS_AT) / SEGMENT));
                PathBuf::from(format!("{} ({}segment {})", device.display(), slot.unwrap_or_default(), at.segment))
            }
            LegSpec::Nvme(name) => panic!("{} is for SPDK", name.display()),
        };
        (path, at.block * BLOCK)
    }

    pub fn all(&self) -> &Content {
        self.history.last().unwrap()
    }

    /// Whether the blocks that count are on a copy as they were written; on a device perhaps in another slot.
    pub fn is_healed(&self, leg: usize) -> bool {
        let now = files(&self.legs[leg]);
        let somewhere = |at: At| {
            let device = now.get(self.legs[leg].path());
            device.is_some_and(|device| device.chunks(BLOCK as usize).any(|b| Some(b) == self.pristine(leg, at)))
        };
        self.written.iter().all(|(at, _)| self.look(&now, leg, *at) == Look::Whole || somewhere(*at))
    }
}

/// What a copy holds in a block's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Whole,
    /// Blank, or whole and something else: it was not written here.
    Never,
    Bad,
}

/// What recovery must say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Whole,
    Torn,
    Doubtful,
    /// The block that must be named.
    Damaged(At),
    Foreign(PathBuf),
}

/// The files of a copy, with what they hold.
pub fn files(leg: &LegSpec) -> Image {
    let read = |path: PathBuf| std::fs::read(&path).ok().map(|bytes| (path, bytes));
    match leg {
        LegSpec::Device(path) => read(path.clone()).into_iter().collect(),
        LegSpec::Dir(dir) => {
            let entries = std::fs::read_dir(dir).into_iter().flatten();
            entries.filter_map(|entry| read(entry.unwrap().path())).collect()
        }
        LegSpec::Nvme(name) => panic!("{} is for SPDK", name.display()),
    }
}

/// Makes a file hold these bytes again; little of it has changed.
fn rewrite(path: &Path, bytes: &[u8]) {
    let now = std::fs::read(path).unwrap_or_default();
    if now.len() != bytes.len() {
        return std::fs::write(path, bytes).unwrap();
    }
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    for (at, (old, new)) in (0..).zip(now.chunks(BLOCK as usize).zip(bytes.chunks(BLOCK as usize))) {
        if old != new {
            file.write_all_at(new, at * BLOCK).unwrap();
        }
    }
}

fn places(leg: &LegSpec, image: &Image) -> BTreeMap<u64, (PathBuf, u64)> {
    match leg {
        LegSpec::Dir(_) => image
            .keys()
            .filter_map(|path| {
                let number = path.file_name()?.to_str()?.strip_suffix(".log")?.parse().ok()?;
                Some((number, (path.clone(), 0)))
            })
            .collect(),
        LegSpec::Device(path) => {
            let start = |slot: u64| SLOTS_AT + slot * SEGMENT;
            let number = |slot: u64| u64_at(&image[path][start(slot) as usize..], 4064);
            let taken = (0..SLOTS).map(|slot| (number(slot), start(slot))).filter(|(number, _)| *number > 0);
            taken.map(|(number, start)| (number, (path.clone(), start))).collect()
        }
        LegSpec::Nvme(name) => panic!("{} is for SPDK", name.display()),
    }
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn checksum(block: &[u8], at: u64) -> u32 {
    let seed = crc32c::crc32c(&(at + 0x504c_5652).to_le_bytes());
    crc32c::crc32c_append(seed, &block[..BLOCK as usize - 4])
}

fn is_sealed(block: &[u8], at: u64) -> bool {
    u32_at(block, BLOCK as usize - 4) == checksum(block, at)
}

/// Gives a block the checksum that it needs in its place.
pub fn reseal(block: &mut [u8], at: u64) {
    let crc = checksum(block, at);
    block[BLOCK as usize - 4..].copy_from_slice(&crc.to_le_bytes());
}
