//! A leader whose disk is full: it takes no input while the log says that it fills up, and cuts the log after each syncvm, as
//! the product does. Then nothing ever stops it, and what was given back and is used again is never taken for what it was.

use super::*;

/// Turns within which a disk that works has done everything.
const PATIENCE: u32 = 2_000;

#[derive(Debug, Default)]
struct Sights {
    /// Times that input waited for a syncvm, and starts without a place for the segment that a start begins.
    pauses: u64,
    stuck: u64,
    given_back: u64,
    syncs: u64,
}

struct Leader {
    run: Run,
    seed: u64,
    /// Turns until the power fails.
    turns: u64,
    sights: Sights,
}

/// The power has failed.
type Alive = Option<()>;

impl Leader {
    fn new(seed: u64) -> Leader {
        let mut run = Run::new(seed, 1);
        run.options.segment_bytes = 32 * BLOCK_BYTES as u64;
        run.options.max_bytes = 64 * run.options.segment_bytes;
        Leader { run, seed, turns: 0, sights: Sights::default() }
    }

    fn turn(&mut self, log: &mut Log) -> Alive {
        self.turns = self.turns.checked_sub(1)?;
        let run = &mut self.run;
        run.disks.borrow_mut().advance(|bound| run.rng.next() % bound);
        if run.rng.chance(800) {
            log.poll();
        }
        run.take_acknowledgements(log);
        assert!(log.failed().is_none(), "seed {}: {:?}", self.seed, log.failed());
        Some(())
    }

    fn turn_until(&mut self, log: &mut Log, what: &str, mut done: impl FnMut(&mut Run, &mut Log) -> bool) -> Alive {
        for _ in 0..PATIENCE {
            if done(&mut self.run, log) {
                return Some(());
            }
            self.turn(log)?;
        }
        panic!("seed {}: {what} never comes; no room: {:?}", self.seed, log.no_room);
    }

    /// Appends it as soon as it goes in.
    fn put(&mut self, log: &mut Log, op: &Op) -> Alive {
        self.turn_until(log, "room for a record", |run, log| run.put(log, op.clone()).is_ok())
    }

    fn settle(&mut self, log: &mut Log) -> Alive {
        log.flush();
        self.turn_until(log, "durability", |run, _| run.tickets.is_empty())
    }

    /// A syncvm: its entry, and what it lets the log forget.
    fn sync(&mut self, log: &mut Log) -> Alive {
        let fill = self.run.rng.next() as u8;
        self.put(log, &Op::Entry(self.run.next_index, vec![fill; 20]))?;
        self.settle(log)?;
        self.put(log, &Op::State(vec![fill; 40]))?;
        let kept = self.run.rng.below(2);
        self.put(log, &Op::Truncate(self.run.next_index - 1 - kept))?;
        self.sights.syncs += 1;
        self.settle(log)
    }

    fn live(&mut self, log: &mut Log) -> Alive {
        loop {
            if log.is_filling_up() {
                self.sights.pauses += 1;
                self.sync(log)?;
                self.turn_until(log, "the end of the pause", |_, log| !log.is_filling_up())?;
            }
            for _ in 0..self.run.rng.below(3) {
                let bytes = vec![self.run.rng.next() as u8; self.run.rng.below(4000) as usize];
                let put = self.run.put(log, Op::Entry(self.run.next_index, bytes));
                assert!(put.as_ref().err().is_none_or(LogError::is_full), "seed {}: {put:?}", self.seed);
            }
            log.flush();
            self.turn(log)?;
            if self.run.rng.chance(20) {
                self.sync(log)?;
            }
        }
    }

    /// Leaves room for the segment behind the first one of this life, and for no other.
    fn fill_disk(&mut self, log: &mut Log) {
        self.run.disks.borrow_mut().set_full(false);
        self.turns = u64::MAX;
        let fill = self.run.rng.next() as u8;
        let filled = self.put(log, &Op::State(vec![fill; 40])).and_then(|()| self.settle(log));
        let filled = filled.and_then(|()| self.turn_until(log, "a place", |_, log| log.is_next_prepared()));
        assert_eq!(filled, Some(()));
        self.run.disks.borrow_mut().set_full(true);
    }

    fn play(mut self, lives: u64) -> Sights {
        let (mut log, ..) = self.run.open().expect("a blank disk");
        self.fill_disk(&mut log);
        for _ in 0..lives {
            self.turns = self.run.rng.below(600);
            assert_eq!(self.live(&mut log), None);
            let has_place = log.is_next_prepared();
            self.run.die(log);
            let Some(next) = self.run.check(self.seed) else { break };
            log = next;
            log.poll();
            if log.no_room.is_some() {
                assert!(!has_place, "seed {}: the place is gone", self.seed);
                self.sights.stuck += 1;
                drop(log);
                self.run.disks.borrow_mut().set_full(false);
                (log, ..) = self.run.open().expect("as it was opened before");
                self.fill_disk(&mut log);
            }
        }
        Sights { given_back: self.run.seen.given_back, ..self.sights }
    }
}

#[test]
fn a_full_disk_stops_nobody_who_cuts_the_log() {
    let mut total = Sights::default();
    for seed in seeds(600) {
        let sights = Leader::new(seed).play(8);
        total.pauses += sights.pauses;
        total.stuck += sights.stuck;
        total.given_back += sights.given_back;
        total.syncs += sights.syncs;
    }
    println!("{total:?}");
    assert!(total.pauses > 100 && total.given_back > 100 && total.stuck > 10, "the seeds are too tame: {total:?}");
}

/// What says that segments were given back is not the last thing that was written.
#[test]
fn rot_in_a_block_is_found_although_older_segments_are_gone() {
    let mut leader = Leader::new(1);
    let (mut log, ..) = leader.run.open().unwrap();
    leader.fill_disk(&mut log);
    leader.turns = u64::MAX;
    while log.oldest == 1 {
        for _ in 0..4 {
            leader.put(&mut log, &Op::Entry(leader.run.next_index, vec![7; 3000])).unwrap();
        }
        leader.sync(&mut log).unwrap();
    }
    leader.turn_until(&mut log, "rest", |_, log| !log.is_busy() && log.stage.staged_bytes() == 0).unwrap();
    let (segment, last_block) = (log.last.number, log.stage.segment_blocks_used() - 1);
    assert!(log.oldest == segment && last_block > 3, "only one segment is left: {} to {segment}", log.oldest);
    drop(log);
    let mut judge = |block| {
        let disks = Rc::clone(&leader.run.disks);
        disks.borrow_mut().flip(0, segment, block);
        let judged = leader.run.open().map(|(_, recovered, _)| recovered);
        disks.borrow_mut().flip(0, segment, block);
        judged
    };
    let recovered = judge(last_block).expect("the end is in doubt, the rest is there");
    assert!(recovered.doubtful && recovered.state.is_some() && !recovered.entries.is_empty(), "{recovered:?}");
    for block in 0..last_block {
        let judged = judge(block);
        assert!(matches!(judged, Err(LogError::Damaged { .. })), "block {block}: {judged:?}");
    }
}
