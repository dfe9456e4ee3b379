//! The engine and the recovery over simulated disks: one seed decides what is appended, when the device answers, when the
//! power fails, which of the unsynced blocks survive it, and which byte rots.
//!
//! After each death the log is opened again and must be what the appended records amount to up to some point behind
//! everything acknowledged; or it says that it is in doubt or damaged, and then there must be a reason.

mod disks;
mod full_disk;

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use super::{Engine, LogStore};
use crate::block::BLOCK_BYTES;
use crate::keeper::{Command, Keeper, Port};
use crate::legs::Legs;
use crate::open::{open_copies, start};
use crate::stage::Stage;
use crate::volume::Geometry;
use crate::{LogError, MemoryLog, Options, Record, Recovered, Ticket};
use disks::{Disks, SimDriver, SimVolume, Spec};

type Log = Engine<SimVolume, SimDriver>;

/// A small generator, so that a seed means the same everywhere (SplitMix64).
#[derive(Debug)]
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

/// What was appended, in order.
#[derive(Debug, Clone)]
enum Op {
    State(Vec<u8>),
    Entry(u64, Vec<u8>),
    Truncate(u64),
}

fn apply(op: &Op, model: &mut MemoryLog) {
    let record = match op {
        Op::State(state) => Record::State(state),
        Op::Entry(index, bytes) => Record::Entry { index: *index, view: *index, parts: [bytes, &[]] },
        Op::Truncate(through) => return model.truncate_prefix(*through),
    };
    model.append(record).expect("memory takes everything");
}

struct Run {
    rng: Rng,
    disks: Rc<RefCell<Disks>>,
    legs: usize,
    options: Options,
    /// What the log held when this life of it began, and what was appended since.
    before: Vec<Op>,
    ops: Vec<Op>,
    /// Ops up to here are acknowledged.
    acknowledged: usize,
    /// The op of each ticket that is not acknowledged yet.
    tickets: VecDeque<(Ticket, usize)>,
    next_index: u64,
    /// Every entry that was ever appended.
    history: HashSet<(u64, Vec<u8>)>,
    /// Where the entries began when this life of the log did.
    floor: u64,
    rotten: bool,
    /// The log was in doubt when it was opened, and no state was acknowledged since.
    in_doubt: bool,
    /// A copy failed once: when it is back, the log may not tell any more that it went on from there.
    failed_once: bool,
    /// A copy was missing when the log was opened once.
    pulled: bool,
    /// Only one copy was complete when the power failed.
    is_alone: bool,
    seen: Seen,
}

/// That a campaign visits what it should.
#[derive(Debug, Default, Clone, Copy)]
struct Seen {
    lives: u64,
    torn: u64,
    doubtful: u64,
    damaged: u64,
    healed: u64,
    failed_legs: u64,
    rebuilt: u64,
    no_room: u64,
    given_back: u64,
}

impl Run {
    fn new(seed: u64, legs: usize) -> Run {
        let options = Options {
            segment_bytes: 8 * BLOCK_BYTES as u64,
            max_bytes: 64 * 8 * BLOCK_BYTES as u64,
            stage_bytes: 24 * BLOCK_BYTES,
            direct: true,
        };
        Run {
            rng: Rng(seed.wrapping_mul(7919)),
            disks: Rc::new(RefCell::new(Disks::new(legs))),
            legs,
            options,
            before: Vec::new(),
            ops: Vec::new(),
            acknowledged: 0,
            tickets: VecDeque::new(),
            next_index: 1,
            history: HashSet::new(),
            floor: 1,
            rotten: false,
            in_doubt: false,
            failed_once: false,
            pulled: false,
            is_alone: legs == 1,
            seen: Seen::default(),
        }
    }

    fn geometry(&self) -> Geometry {
        self.options.geometry().expect("the options are right")
    }

    /// Also tells whether the log begins behind the segment that its last header names.
    fn open(&mut self) -> Result<(Log, Recovered, bool), LogError> {
        let geometry = self.geometry();
        let specs: Vec<Spec> = (0..self.legs).map(|leg| Spec { disks: Rc::clone(&self.disks), leg }).collect();
        let opened = open_copies::<SimVolume>(&specs, geometry)?;
        if opened.scan.gaps.iter().any(|gap| self.disks.borrow().is_whole(gap.leg)) {
            self.seen.healed += 1;
        }
        let given_back = opened.scan.last.is_some_and(|last| last.first < opened.scan.first);
        let stage = Stage::new(Box::new(vec![0; self.options.stage_bytes]), opened.scan.chain);
        let driver = SimDriver::new(stage.memory(), Rc::clone(&self.disks));
        let keeper = Port::inline(Keeper::new(specs, geometry, opened.volumes));
        let legs = Legs::new(opened.out.into_iter().map(|out| (std::path::PathBuf::from("sim"), out)));
        let (start, recovered) = start(driver, stage, keeper, legs, geometry, &self.options, opened.scan);
        Ok((Engine::new(start), recovered, given_back))
    }

    /// What the log may hold: the model after each number of ops that is possible.
    fn matches(&self, recovered: &Recovered, at_least: usize) -> bool {
        let mut model = MemoryLog::new();
        self.before.iter().for_each(|op| apply(op, &mut model));
        for done in 0..=self.ops.len() {
            if done >= at_least && is_same(&model, recovered) {
                return true;
            }
            if let Some(op) = self.ops.get(done) {
                apply(op, &mut model);
            }
        }
        false
    }

    /// Whether all that was found was appended once.
    fn is_from_history(&self, recovered: &Recovered) -> bool {
        recovered.entries.iter().all(|entry| self.history.contains(&(entry.index, entry.bytes.clone())))
    }

    /// Appends, flushes and polls until the power fails.
    fn live(&mut self, log: &mut Log) {
        let turns = self.rng.below(120);
        // One at a time: with both the log may fail.
        let mut errors = self.legs > 1 && self.rng.chance(200);
        for _ in 0..turns {
            for _ in 0..self.rng.below(4) {
                self.append_something(log);
            }
            if self.rng.chance(600) {
                log.flush();
            }
            if errors && self.rng.chance(20) && log.legs.are_all_members() && self.disks.borrow().are_all_up() {
                let leg = self.rng.below(self.legs as u64) as usize;
                self.disks.borrow_mut().fail(leg);
                self.seen.failed_legs += 1;
                self.failed_once = true;
                errors = false;
            }
            if self.rng.chance(20) {
                self.disks.borrow_mut().repair();
            }
            if self.rng.chance(60) {
                let full = self.rng.chance(500);
                self.disks.borrow_mut().set_full(full);
            }
            self.seen.no_room += u64::from(log.no_room.is_some());
            let was = log.legs.members();
            self.disks.borrow_mut().advance(|bound| self.rng.next() % bound);
            if self.rng.chance(700) {
                log.poll();
            }
            self.seen.rebuilt += u64::from(log.legs.members().0 > was.0);
            self.take_acknowledgements(log);
            assert!(log.failed().is_none(), "{:?}", log.failed());
        }
    }

    fn append_something(&mut self, log: &mut Log) {
        let record_bytes = match self.rng.below(10) {
            0 => self.rng.below(12_000),
            _ => self.rng.below(500),
        };
        let fill = self.rng.next() as u8;
        let op = match self.rng.below(20) {
            0..3 => Op::State(vec![fill; 40]),
            3 => Op::Truncate(self.next_index.saturating_sub(1 + self.rng.below(10))),
            4 => Op::Entry(self.next_index.saturating_sub(self.rng.below(6)).max(1), vec![fill; record_bytes as usize]),
            _ => Op::Entry(self.next_index, vec![fill; record_bytes as usize]),
        };
        let op = match op {
            Op::Entry(index, bytes) => Op::Entry(index.max(self.lowest()), bytes),
            other => other,
        };
        if let Err(error) = self.put(log, op) {
            assert!(error.is_full(), "{error}");
        }
    }

    /// Appends something, and notes it if it goes in.
    fn put(&mut self, log: &mut Log, op: Op) -> Result<(), LogError> {
        let ticket = match &op {
            Op::State(state) => Some(log.append(Record::State(state))?),
            Op::Entry(index, bytes) => {
                let ticket = log.append(Record::Entry { index: *index, view: *index, parts: [bytes, &[]] })?;
                self.next_index = index + 1;
                self.history.insert((*index, bytes.clone()));
                Some(ticket)
            }
            Op::Truncate(through) => {
                log.truncate_prefix(*through);
                None
            }
        };
        self.ops.push(op);
        self.tickets.extend(ticket.map(|ticket| (ticket, self.ops.len() - 1)));
        Ok(())
    }

    /// Notes what is acknowledged.
    fn take_acknowledgements(&mut self, log: &Log) {
        while let Some((ticket, op)) = self.tickets.front().copied()
            && ticket <= log.durable()
        {
            self.acknowledged = op + 1;
            self.in_doubt &= !matches!(self.ops[op], Op::State(_));
            self.tickets.pop_front();
        }
    }

    /// Entries are not appended again below what was forgotten, as consensus does not.
    fn lowest(&self) -> u64 {
        let through = |op: &Op| match op {
            Op::Truncate(through) => Some(*through),
            _ => None,
        };
        self.ops.iter().filter_map(through).map(|through| through + 1).fold(self.floor, u64::max)
    }

    /// The power fails, and perhaps a byte rots before it is back.
    fn die(&mut self, log: Log) {
        self.is_alone = self.legs == 1 || !log.legs.are_all_members() || !log.legs.is_recorded();
        self.disks.borrow_mut().power_off(|bound| self.rng.next() % bound);
        drop(log);
        // What rots may be a block that is not needed now, and show up later.
        self.rotten |= self.rng.chance(250) && {
            let leg = self.rng.below(self.legs as u64) as usize;
            let rng = &mut self.rng;
            self.disks.borrow_mut().rot(leg, |bound| rng.next() % bound)
        };
        self.disks.borrow_mut().power_on();
        if self.legs > 1 && self.rng.chance(150) {
            // Somebody pulls a cable, and another one next time.
            self.disks.borrow_mut().repair();
            if self.rng.chance(600) {
                let leg = self.rng.below(self.legs as u64) as usize;
                self.disks.borrow_mut().fail(leg);
                self.pulled = true;
            }
        }
        self.seen.lives += 1;
    }

    /// Opens the log after a death and compares it with what it may be.
    fn check(&mut self, seed: u64) -> Option<Log> {
        // Nothing else has what rotted.
        let may_lose = self.is_alone || self.pulled || !self.disks.borrow().are_all_up();
        let mut opened = self.open();
        if opened.as_ref().is_err_and(LogError::is_full) {
            // Each copy lacks a segment that only the other one has, and has no room for it.
            self.disks.borrow_mut().set_full(false);
            opened = self.open();
        }
        let (log, recovered, given_back) = match opened {
            Ok(opened) => opened,
            Err(LogError::Damaged { problem, .. }) => {
                assert!(may_lose && (self.rotten || self.legs > 1), "seed {seed}: damaged without a reason: {problem}");
                self.seen.damaged += 1;
                return None;
            }
            // A blank copy made a log of its own while the other was away: pulled or failed.
            Err(LogError::Foreign { .. }) if self.pulled || self.failed_once => return None,
            Err(error) => panic!("seed {seed}: {error}"),
        };
        self.seen.torn += u64::from(recovered.torn_bytes > 0);
        self.seen.doubtful += u64::from(recovered.doubtful);
        self.seen.given_back += u64::from(given_back);
        // A copy that did not even get the first header is taken for one that was exchanged.
        let newborn = self.legs > 1 && self.before.is_empty() && self.acknowledged == 0;
        let may_doubt = (self.rotten && may_lose)
            || newborn
            || self.in_doubt
            || self.pulled
            || self.failed_once
            || !self.disks.borrow().are_all_up();
        self.in_doubt = recovered.doubtful;
        assert!(!recovered.doubtful || may_doubt, "seed {seed}: in doubt without a reason");
        // What a copy that was away has more of was never acknowledged; it counts as long as nobody wrote behind it.
        let reappears = self.pulled && self.acknowledged == 0;
        assert!(
            if recovered.doubtful || reappears {
                self.is_from_history(&recovered)
            } else {
                self.matches(&recovered, self.acknowledged)
            },
            "seed {seed}: {} ops, {} acknowledged, doubtful {}: found {:?}, entries {:?}",
            self.ops.len(),
            self.acknowledged,
            recovered.doubtful,
            recovered.state,
            recovered.entries.iter().map(|entry| (entry.index, entry.bytes.len())).collect::<Vec<_>>()
        );
        self.restart_model(&recovered);
        Some(log)
    }

    /// The model begins with what was found.
    fn restart_model(&mut self, recovered: &Recovered) {
        self.floor = recovered.entries.first().map_or(self.next_index, |first| first.index);
        self.before.clear();
        self.before.extend(recovered.state.clone().map(Op::State));
        self.before.extend(recovered.entries.iter().map(|entry| Op::Entry(entry.index, entry.bytes.clone())));
        self.next_index = recovered.entries.last().map_or(self.floor, |last| last.index + 1);
        (self.ops, self.acknowledged) = (Vec::new(), 0);
        self.tickets.clear();
    }

    fn play(mut self, seed: u64, lives: u64) -> Seen {
        let (mut log, ..) = self.open().expect("blank disks");
        for _ in 0..lives {
            self.live(&mut log);
            self.die(log);
            let Some(next) = self.check(seed) else { return self.seen };
            log = next;
        }
        self.seen
    }
}

fn is_same(model: &MemoryLog, recovered: &Recovered) -> bool {
    let snapshot = model.snapshot();
    snapshot.state == recovered.state && snapshot.entries == recovered.entries
}

fn campaign(legs: usize, seeds: std::ops::Range<u64>) -> Seen {
    let mut total = Seen::default();
    for seed in seeds {
        let seen = Run::new(seed, legs).play(seed, 8);
        total.lives += seen.lives;
        total.torn += seen.torn;
        total.doubtful += seen.doubtful;
        total.damaged += seen.damaged;
        total.healed += seen.healed;
        total.failed_legs += seen.failed_legs;
        total.rebuilt += seen.rebuilt;
        total.no_room += seen.no_room;
        total.given_back += seen.given_back;
    }
    println!("{total:?}");
    total
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let first = number("PLOVER_LOG_FIRST_SEED", 1);
    first..first + number("PLOVER_LOG_SEEDS", default)
}

#[test]
fn nothing_acknowledged_is_lost_without_saying_so() {
    let seen = campaign(1, seeds(1500));
    assert!(seen.torn > 100 && seen.doubtful > 20 && seen.damaged > 100, "the seeds are too tame: {seen:?}");
    assert!(seen.no_room > 100 && seen.given_back > 100, "the seeds are too tame: {seen:?}");
}

#[test]
fn a_mirror_hides_what_one_copy_loses() {
    let seen = campaign(2, seeds(700));
    assert!(seen.healed > 50 && seen.failed_legs > 20 && seen.rebuilt > 20, "the seeds are too tame: {seen:?}");
}

#[test]
fn a_place_that_is_made_twice_blocks_nothing() {
    let mut run = Run::new(1, 1);
    let (mut log, ..) = run.open().unwrap();
    // As when room is asked for again before the answer is there.
    (1..=4).for_each(|number| log.keeper.send(Command::Prepare(number)));
    for index in 1..=60 {
        let ticket = log.append(Record::Entry { index, view: 1, parts: [&[7; 3000], &[]] }).unwrap();
        log.flush();
        assert!(log.wait(ticket, Duration::from_secs(5)), "entry {index} is stuck in segment {}", log.last.number);
    }
}

#[test]
fn the_state_survives_torn_starts_in_a_row() {
    let mut run = Run::new(1, 1);
    let (mut log, ..) = run.open().unwrap();
    let ticket = log.append(Record::State(b"promise")).unwrap();
    log.flush();
    assert!(log.wait(ticket, Duration::from_secs(5)));
    for _ in 0..4 {
        run.disks.borrow_mut().power_off(|_| 0);
        drop(log);
        run.disks.borrow_mut().power_on();
        let (next, recovered, _) = run.open().unwrap();
        assert_eq!((recovered.state.as_deref(), recovered.doubtful), (Some(&b"promise"[..]), false));
        log = next;
        log.poll();
        log.append(Record::Entry { index: 1, view: 1, parts: [b"never durable", &[]] }).unwrap();
        log.flush();
        // The header reaches the disk, and the power fails before the block behind it does.
        run.disks.borrow_mut().advance(|_| 1);
        run.disks.borrow_mut().power_off(|bound| u64::from(bound == 3));
    }
}
