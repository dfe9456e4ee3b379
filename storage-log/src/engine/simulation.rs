//! The engine and the recovery over simulated disks: one seed decides what is appended, when the device answers, when the
//! power fails, which of the unsynced blocks survive it, and which byte rots.
//!
//! After each death the log is opened again and must be what the appended records amount to up to some point behind
//! everything acknowledged; or it says that it is in doubt or damaged, and then there must be a reason.

mod disks;
mod full_disk;

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use super::{Engine, LogStore};
use crate::block::BLOCK_BYTES;
use crate::keeper::{Command, Keeper, Port};
use crate::legs::Legs;
use crate::open::{open_copies, start};
use crate::segment::Members;
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

/// A life of the log: what it held when it was opened, what was appended since, and how much of that was acknowledged.
#[derive(Debug, Default)]
struct Life {
    before: Vec<Op>,
    ops: Vec<Op>,
    /// Ops up to here are acknowledged.
    acknowledged: usize,
}

impl Life {
    /// Whether a log that was found is all that was acknowledged, and any part of what was appended behind that.
    fn may_end_as(&self, recovered: &Recovered) -> bool {
        let mut model = MemoryLog::new();
        self.before.iter().for_each(|op| apply(op, &mut model));
        for done in 0..=self.ops.len() {
            if done >= self.acknowledged && is_same(&model, recovered) {
                return true;
            }
            if let Some(op) = self.ops.get(done) {
                apply(op, &mut model);
            }
        }
        false
    }
}

struct Run {
    rng: Rng,
    disks: Rc<RefCell<Disks>>,
    legs: usize,
    options: Options,
    life: Life,
    /// Earlier lives that may show again: since they ended a copy was away at every start, pulled or failed, and no state was
    /// acknowledged. The log was in doubt then, and nobody is told of what is there before a state is durable (R15). So the
    /// copy may have more of such a life when it is back, or prove that the other one had too much.
    unsettled: Vec<Life>,
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
    /// A copy was missing once while nothing was on the other one, where a log of its own began.
    began_anew: bool,
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
            life: Life::default(),
            unsettled: Vec::new(),
            tickets: VecDeque::new(),
            next_index: 1,
            history: HashSet::new(),
            floor: 1,
            rotten: false,
            in_doubt: false,
            failed_once: false,
            pulled: false,
            began_anew: false,
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
        self.began_anew |= opened.scan.last.is_none() && !self.disks.borrow().are_all_up();
        let given_back = opened.scan.last.is_some_and(|last| last.first < opened.scan.first);
        let stage = Stage::new(Box::new(vec![0; self.options.stage_bytes]), opened.scan.chain);
        let driver = SimDriver::new(stage.memory(), Rc::clone(&self.disks));
        let keeper = Port::inline(Keeper::new(specs, geometry, opened.volumes));
        let legs = Legs::new(opened.out.into_iter().map(|out| (PathBuf::from("sim"), out)));
        let (start, recovered) = start(driver, stage, keeper, legs, geometry, &self.options, opened.scan);
        Ok((Engine::new(start), recovered, given_back))
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
        self.life.ops.push(op);
        self.tickets.extend(ticket.map(|ticket| (ticket, self.life.ops.len() - 1)));
        Ok(())
    }

    /// Notes what is acknowledged.
    fn take_acknowledgements(&mut self, log: &Log) {
        while let Some((ticket, op)) = self.tickets.front().copied()
            && ticket <= log.durable()
        {
            self.life.acknowledged = op + 1;
            self.in_doubt &= !matches!(self.life.ops[op], Op::State(_));
            self.tickets.pop_front();
        }
    }

    /// Entries are not appended again below what was forgotten, as consensus does not.
    fn lowest(&self) -> u64 {
        let through = |op: &Op| match op {
            Op::Truncate(through) => Some(*through),
            _ => None,
        };
        self.life.ops.iter().filter_map(through).map(|through| through + 1).fold(self.floor, u64::max)
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

    /// Whether all that was acknowledged is there.
    fn may_be(&self, recovered: &Recovered) -> bool {
        self.life.may_end_as(recovered)
            || (self.in_doubt && self.unsettled.iter().any(|life| life.may_end_as(recovered)))
    }

    /// Opens the log after a death and compares it with what it may be.
    fn check(&mut self, seed: u64) -> Option<Log> {
        // Nothing else has what rotted.
        let may_lose = self.is_alone || self.pulled || !self.disks.borrow().are_all_up();
        let (log, recovered, given_back) = match self.open() {
            Ok(opened) => opened,
            Err(LogError::Damaged { problem, .. }) => {
                assert!(may_lose && (self.rotten || self.legs > 1), "seed {seed}: damaged without a reason: {problem}");
                self.seen.damaged += 1;
                return None;
            }
            // A copy that was blank, or emptied to be filled, was alone and in doubt; now the other one is back.
            Err(LogError::Foreign { .. }) if self.began_anew => return None,
            Err(error) => panic!("seed {seed}: {error}"),
        };
        self.seen.torn += u64::from(recovered.torn_bytes > 0);
        self.seen.doubtful += u64::from(recovered.doubtful);
        self.seen.given_back += u64::from(given_back);
        // A copy that did not even get the first header is taken for one that was exchanged.
        let newborn = self.legs > 1 && self.life.before.is_empty() && self.life.acknowledged == 0;
        let may_doubt = (self.rotten && may_lose)
            || newborn
            || self.in_doubt
            || self.pulled
            || self.failed_once
            || !self.disks.borrow().are_all_up();
        assert!(!recovered.doubtful || may_doubt, "seed {seed}: in doubt without a reason");
        let is_one_away = !self.disks.borrow().are_all_up();
        assert!(recovered.doubtful || !is_one_away, "seed {seed}: no doubt although a copy is away");
        assert!(
            if recovered.doubtful { self.is_from_history(&recovered) } else { self.may_be(&recovered) },
            "seed {seed}: {} ops, {} acknowledged, doubtful {}: found {:?}, entries {:?}",
            self.life.ops.len(),
            self.life.acknowledged,
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
        let mut life = Life::default();
        life.before.extend(recovered.state.clone().map(Op::State));
        life.before.extend(recovered.entries.iter().map(|entry| Op::Entry(entry.index, entry.bytes.clone())));
        self.next_index = recovered.entries.last().map_or(self.floor, |last| last.index + 1);
        let ended = std::mem::replace(&mut self.life, life);
        let is_one_away = !self.disks.borrow().are_all_up();
        if !is_one_away || !self.in_doubt {
            self.unsettled.clear();
        }
        if is_one_away {
            self.unsettled.push(ended);
        }
        self.in_doubt = recovered.doubtful;
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
fn what_one_copy_had_alone_counts_once_it_is_acknowledged() {
    for is_acknowledged in [false, true] {
        let mut run = Run::new(1, 2);
        let (mut log, ..) = run.open().unwrap();
        // No segment can be begun that says so when a copy fails.
        run.disks.borrow_mut().set_full(true);
        let ticket = log.append(Record::State(b"promise")).unwrap();
        log.flush();
        assert!(log.wait(ticket, Duration::from_secs(5)));
        // So what the other one writes is not acknowledged.
        run.disks.borrow_mut().fail(0);
        let entry = log.append(Record::Entry { index: 1, view: 1, parts: [b"on one copy", &[]] }).unwrap();
        log.flush();
        (0..20).for_each(|_| {
            run.disks.borrow_mut().advance(|_| 5);
            log.poll();
        });
        assert_eq!(log.durable(), ticket);
        assert!(log.written >= entry.0, "it is written where it can be");
        let restart = |run: &mut Run, log: Log| {
            run.disks.borrow_mut().power_off(|_| 0);
            drop(log);
            run.disks.borrow_mut().power_on();
        };
        restart(&mut run, log);
        let (mut log, alone, _) = run.open().unwrap();
        assert!(alone.doubtful && alone.entries.len() == 1, "{alone:?}");
        if is_acknowledged {
            run.disks.borrow_mut().set_full(false);
            let ticket = log.append(Record::State(b"learner")).unwrap();
            log.flush();
            assert!(log.wait(ticket, Duration::from_secs(5)));
        }
        restart(&mut run, log);
        // Now it is gone from the only copy that had it, and the other one is back.
        run.disks.borrow_mut().flip(1, 1, 2);
        run.disks.borrow_mut().repair();
        match run.open() {
            Ok((_, recovered, _)) => {
                assert!(!is_acknowledged, "an entry that counted is forgotten: {recovered:?}");
                assert_eq!((recovered.state.as_deref(), recovered.doubtful), (Some(&b"promise"[..]), false));
                assert!(recovered.entries.is_empty() && recovered.torn_bytes > 0, "{recovered:?}");
            }
            Err(error) => assert!(is_acknowledged && matches!(error, LogError::Damaged { .. }), "{error}"),
        }
    }
}

#[test]
fn a_copy_without_room_still_gives_what_the_other_one_lacks() {
    let mut run = Run::new(1, 2);
    let (mut log, ..) = run.open().unwrap();
    for index in 1..=20 {
        let ticket = log.append(Record::Entry { index, view: 1, parts: [&[7; 3000], &[]] }).unwrap();
        log.flush();
        assert!(log.wait(ticket, Duration::from_secs(5)), "entry {index}");
    }
    let last = log.last.number;
    let block = log.stage.segment_blocks_used() - 1;
    run.disks.borrow_mut().power_off(|_| 0);
    drop(log);
    run.disks.borrow_mut().power_on();
    // As when the power fails while the first copy is being filled: it has the last group, which the second one has not.
    run.disks.borrow_mut().set_full(true);
    run.disks.borrow_mut().lose(0, 1);
    run.disks.borrow_mut().flip(1, last, block);
    let (log, recovered, _) = run.open().unwrap();
    assert!(!recovered.doubtful && recovered.entries.len() == 20, "{recovered:?}");
    assert_eq!(log.legs.members(), Members(2));
}

#[test]
fn a_header_that_never_counted_is_no_rival_of_what_was_settled_without_it() {
    for lucky in 0..2 {
        let mut run = Run::new(1, 2);
        let restart = |run: &mut Run, log: Log| {
            run.disks.borrow_mut().power_off(|_| 1);
            drop(log);
            run.disks.borrow_mut().power_on();
        };
        let promise = |log: &mut Log, state: &[u8]| {
            let ticket = log.append(Record::State(state)).unwrap();
            log.flush();
            assert!(log.wait(ticket, Duration::from_secs(5)));
        };
        let (mut log, ..) = run.open().unwrap();
        promise(&mut log, b"old");
        restart(&mut run, log);
        // The next start begins a segment on one of the copies, and the power fails.
        let (mut log, ..) = run.open().unwrap();
        log.poll();
        log.append(Record::Entry { index: 1, view: 1, parts: [b"on one copy", &[]] }).unwrap();
        log.flush();
        let mut leg = 0..2;
        run.disks.borrow_mut().advance(|_| if leg.next() == Some(lucky) { 5 } else { 0 });
        restart(&mut run, log);
        // The other one alone asks its peers, and goes on.
        run.disks.borrow_mut().fail(lucky);
        let (mut log, alone, _) = run.open().unwrap();
        assert!(alone.doubtful && alone.entries.is_empty(), "{alone:?}");
        promise(&mut log, b"settled");
        restart(&mut run, log);
        run.disks.borrow_mut().repair();
        let (_, recovered, _) = run.open().unwrap();
        assert_eq!(recovered.state.as_deref(), Some(&b"settled"[..]), "copy {lucky} had the segment");
        assert!(!recovered.doubtful && recovered.entries.is_empty(), "{recovered:?}");
    }
}

#[test]
fn what_a_failed_copy_still_reads_is_not_used_again() {
    let mut run = Run::new(1, 2);
    let (mut log, ..) = run.open().unwrap();
    log.poll();
    let ticket = log.append(Record::State(b"promise")).unwrap();
    log.flush();
    // The keeper found out, as when there is no room to fill it; its device goes on.
    log.drop_leg(0, LogError::io("filling", PathBuf::from("sim"), std::io::ErrorKind::NotFound));
    let mut leg = 0..2;
    run.disks.borrow_mut().advance(|_| if leg.next() == Some(1) { 5 } else { 0 });
    log.poll();
    assert!(log.in_flight, "the group is given up while a device reads it");
    assert!(log.wait(ticket, Duration::from_secs(5)));
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
