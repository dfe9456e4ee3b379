//! A group of replicas with their hosts: what each does with the effects of its replica, and how it dies.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::Mutant;
use super::checker::Checker;
use super::disk::Disk;
use super::guest::Guest;
use super::network::{Happening, Weather};
use super::product::{Exchange, Follow, Lead};
use crate::config::Config;
use crate::effects::{Effects, Event, Notice, Persist};
use crate::entry::Entry;
use crate::ids::{Index, PersistId, ReplicaId, View};
use crate::message::Message;
use crate::replica::{ProposeError, Replica};
use crate::rng::Rng;

pub(super) const REPLICAS: u8 = 3;
pub(super) const GENESIS_LEADER: ReplicaId = ReplicaId(0);

/// More events than any run needs: what takes as many goes round in circles.
const EVENT_BUDGET: u64 = 150_000;

/// What a replica says about its guest has reached the leader by then.
const REPORTED_US: u64 = 500_000;

/// One replica with its host.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: ReplicaId,
    pub(super) replica: Option<Replica>,
    pub(super) disk: Disk,
    /// What the disk held before it was lost, until its replica votes again.
    pub(super) lost: Option<Box<Disk>>,
    /// Its guest, if that is whole.
    pub(super) guest: Option<Guest>,
    /// Since when it has one.
    pub(super) guest_since_us: u64,
    /// A guest that runs on while its daemon is away.
    pub(super) orphan: Option<Guest>,
    /// How many times it was started.
    pub(super) life: u32,
    /// The operator allowed it to boot a fresh guest.
    pub(super) cold_start: bool,
    /// The last committed entry that this process handed out.
    handed_out: Index,
    /// Committed entries that its guest has not consumed, and the last one that it has.
    pub(super) inbox: VecDeque<(Index, View, Entry)>,
    pub(super) consumed: Index,
    /// Its guest consumes next to nothing until this time.
    pub(super) sluggish_until_us: u64,
    /// Its host gives it no CPU until this time: whatever comes for it waits.
    pub(super) absent_until_us: u64,
    pub(super) lead: Option<Lead>,
    pub(super) follow: Option<Follow>,
}

impl Node {
    fn new(id: ReplicaId) -> Node {
        Node {
            id,
            replica: None,
            disk: Disk::default(),
            lost: None,
            guest: None,
            guest_since_us: 0,
            orphan: None,
            life: 0,
            cold_start: false,
            handed_out: Index(0),
            inbox: VecDeque::new(),
            consumed: Index(0),
            sluggish_until_us: 0,
            absent_until_us: 0,
            lead: None,
            follow: None,
        }
    }

    pub(super) fn is_absent(&self, now_us: u64) -> bool {
        now_us < self.absent_until_us
    }

    /// When it takes its next tick.
    pub(super) fn tick_us(&self) -> Option<u64> {
        let due_us = self.replica.as_ref()?.next_deadline_us();
        Some(due_us.max(self.absent_until_us))
    }

    pub(super) fn leading(&self) -> Option<View> {
        self.replica.as_ref().and_then(Replica::leading)
    }
}

/// A death in the middle of a step, so many steps from now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ambush {
    pub(super) steps: u64,
    pub(super) restart_after_us: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) now_us: u64,
    pub(super) rng: Rng,
    pub(super) nodes: Vec<Node>,
    pub(super) weather: Weather,
    pub(super) checker: Checker,
    pub(super) violation: Option<String>,
    pub(super) trace: Option<Vec<String>>,
    pub(super) counts: super::Summary,
    pub(super) mutant: Mutant,
    /// Whether the products around the replicas act; transcripts do by hand what they would.
    pub(super) products: bool,
    /// Whether a leader without a secondary lets its guest's frames leave at once.
    pub(super) serves_alone: bool,
    pub(super) exchanges: Vec<Exchange>,
    pub(super) ambush: Option<Ambush>,
    limits: fn(&mut Config),
    pub(super) queue: BinaryHeap<Reverse<(u64, u64, Happening)>>,
    /// Messages on their way; their places are reused.
    pub(super) flying: Vec<Option<Message>>,
    pub(super) free: Vec<usize>,
    pub(super) order: u64,
    spare: Vec<Effects>,
}

impl Cluster {
    pub(super) fn new(seed: u64, mutant: Mutant, limits: fn(&mut Config)) -> Cluster {
        Cluster {
            now_us: 1000,
            rng: Rng::new(seed),
            nodes: (0..REPLICAS).map(|id| Node::new(ReplicaId(id))).collect(),
            weather: Weather::fair(),
            checker: Checker::new(GENESIS_LEADER),
            violation: None,
            trace: None,
            counts: super::Summary::default(),
            mutant,
            products: false,
            serves_alone: true,
            exchanges: Vec::new(),
            ambush: None,
            limits,
            queue: BinaryHeap::new(),
            flying: Vec::new(),
            free: Vec::new(),
            order: 0,
            spare: Vec::new(),
        }
    }

    pub(super) fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>10.3} ms  {}", self.now_us as f64 / 1000.0, text()));
        }
    }

    pub(super) fn check(&mut self, result: Result<(), String>) {
        if let Err(what) = result
            && self.violation.is_none()
        {
            self.note(|| format!("VIOLATION {what}"));
            self.violation = Some(what);
        }
    }

    pub(super) fn config(&mut self, id: ReplicaId) -> Config {
        let mut config = Config::new(id, GENESIS_LEADER, self.rng.next());
        (self.limits)(&mut config);
        config
    }

    pub(super) fn start(&mut self, id: ReplicaId) {
        let config = self.config(id);
        let node = &mut self.nodes[id.slot()];
        if node.disk.damaged {
            node.disk.wipe();
            self.note(|| {
                format!("{id} refuses its log, which is damaged in the middle; the operator empties the disk")
            });
        }
        let node = &mut self.nodes[id.slot()];
        node.life += 1;
        let recovered = node.disk.recovered();
        let doubt = if recovered.doubtful { ", its log is doubtful" } else { "" };
        let served_alone = super::product::served_alone(&recovered, id);
        self.counts.lives += 1;
        self.counts.doubtful_starts += u64::from(recovered.doubtful);
        (node.handed_out, node.consumed) = (recovered.base.index, recovered.base.index);
        let last = recovered.entries.last().map_or(recovered.base.index, |(index, ..)| *index);
        node.replica = Some(Replica::new(config, recovered, self.now_us));
        let (life, orphan) = (node.life, node.orphan.take());
        self.note(|| format!("{id} starts (life {life}{doubt})"));
        if self.products {
            self.schedule(self.now_us, Happening::Product { node: id.0, life });
        }
        if let Some(guest) = orphan.filter(|_| served_alone) {
            self.note(|| format!("the guest of {id} ran on"));
            let node = &mut self.nodes[id.slot()];
            // What the log holds already was for the process before.
            (node.guest, node.consumed) = (Some(guest), last);
            self.step(id, Event::GuestIntact(true));
        } else if self.mutant == Mutant::IntactAfterRestart && life > 1 {
            self.step(id, Event::GuestIntact(true));
        }
    }

    /// The process and its guest die; part of what was on its way to the disk arrives there.
    pub(super) fn crash(&mut self, id: ReplicaId) {
        let keep = self.rng.below(self.nodes[id.slot()].disk.pending() as u64 + 1) as usize;
        let node = &mut self.nodes[id.slot()];
        let result = node.disk.crash(keep);
        (node.replica, node.guest, node.cold_start) = (None, None, false);
        (node.lead, node.follow) = (None, None);
        node.absent_until_us = 0;
        node.inbox.clear();
        self.check(result);
        self.note(|| format!("{id} dies; {keep} unfinished records reach its disk"));
        let result = self.checker.on_crash(&self.nodes);
        self.check(result);
    }

    /// As [`Cluster::crash`], but the guest runs on.
    pub(super) fn crash_daemon(&mut self, id: ReplicaId) {
        let guest = self.nodes[id.slot()].guest.take();
        self.crash(id);
        self.nodes[id.slot()].orphan = guest;
    }

    /// Whether the group promises to survive the loss of this disk: one at a time.
    pub(super) fn may_lose(&self, id: ReplicaId) -> bool {
        self.nodes.iter().all(|node| node.id == id || node.lost.is_none())
    }

    fn keep_former(&mut self, id: ReplicaId) {
        let node = &mut self.nodes[id.slot()];
        if node.lost.is_none() {
            node.lost = Some(Box::new(node.disk.clone()));
        }
    }

    /// The disk of a dead replica is empty.
    pub(super) fn wipe(&mut self, id: ReplicaId) {
        self.keep_former(id);
        let forget = self.mutant == Mutant::VoteAfterWipe;
        let node = &mut self.nodes[id.slot()];
        node.disk.wipe();
        if forget {
            node.disk.forge_state();
        }
        self.note(|| format!("{id} loses its disk"));
    }

    /// The last records on the disk of a dead replica rot.
    pub(super) fn rot_end(&mut self, id: ReplicaId, records: usize) {
        self.keep_former(id);
        self.nodes[id.slot()].disk.rot_end(records);
        self.note(|| format!("the last {records} records on the disk of {id} rot"));
    }

    /// A record in the middle of the disk of a dead replica rots.
    pub(super) fn rot_middle(&mut self, id: ReplicaId) {
        self.keep_former(id);
        self.nodes[id.slot()].disk.damaged = true;
        self.note(|| format!("a record in the middle of the disk of {id} rots"));
    }

    pub(super) fn replica(&self, id: ReplicaId) -> Option<&Replica> {
        self.nodes[id.slot()].replica.as_ref()
    }

    pub(super) fn step(&mut self, id: ReplicaId, event: Event) {
        let mut out = self.spare.pop().unwrap_or_default();
        if let Some(replica) = &mut self.nodes[id.slot()].replica {
            self.counts.events += 1;
            replica.step(self.now_us, event, &mut out);
            self.absorb(id, &mut out);
        }
        out.clear();
        self.spare.push(out);
        if self.counts.events > EVENT_BUDGET {
            self.check(Err(format!("liveness: more than {EVENT_BUDGET} events; the group goes round in circles")));
        }
    }

    pub(super) fn propose(&mut self, id: ReplicaId, entry: Entry) -> Option<Result<Index, ProposeError>> {
        let mut out = self.spare.pop().unwrap_or_default();
        let input = matches!(entry, Entry::Input(_));
        let text = self.trace.is_some().then(|| entry.to_string());
        let result =
            self.nodes[id.slot()].replica.as_mut().map(|replica| replica.propose(self.now_us, entry, &mut out));
        self.note(|| match result {
            Some(Ok(index)) => format!("{id} proposes {} at {index}", text.unwrap_or_default()),
            Some(Err(error)) => format!("{id} refuses a proposal: {error}"),
            None => format!("{id} is dead and takes no proposal"),
        });
        match result {
            Some(Ok(index)) if input => self.check_lag(id, index),
            Some(Err(ProposeError::SecondaryLags)) => self.counts.refused_for_lag += 1,
            _ => {}
        }
        self.absorb(id, &mut out);
        out.clear();
        self.spare.push(out);
        result
    }

    /// The secondary's guest was near enough when an input was taken.
    fn check_lag(&mut self, id: ReplicaId, index: Index) {
        let limit = self.config(id).second_lag_entries;
        let Some(replica) = self.replica(id) else { return };
        let (second, base) = (replica.second().filter(|second| *second != id), replica.second_base());
        let Some(second) = second.map(|second| &self.nodes[second.slot()]) else { return };
        // Until the leader has heard of its new life, a secondary that came back passes for the old one.
        let known = second.guest_since_us + REPORTED_US < self.now_us;
        if known && second.guest.as_ref().is_some_and(|guest| guest.whole >= base) {
            let lag = index.0.saturating_sub(second.consumed.max(base).0);
            self.counts.longest_lag = self.counts.longest_lag.max(lag);
            if lag > limit {
                let text = format!("lag: {id} takes input {index} while the guest of {} is {lag} behind", second.id);
                self.check(Err(text));
            }
        }
    }

    /// Does what a replica asks for, unless it dies over that.
    fn absorb(&mut self, id: ReplicaId, out: &mut Effects) {
        if let Some(ambush) = &mut self.ambush {
            if ambush.steps == 0 {
                return self.die_midway(id, out);
            }
            ambush.steps -= 1;
        }
        let (through, refused) = self.store(id, &mut out.persist);
        for (to, message) in out.messages.drain(..) {
            self.send(id, to, message);
        }
        self.hand_out(id, &mut out.committed);
        for notice in out.notices.drain(..) {
            self.on_notice(id, notice);
        }
        if refused {
            self.storage_failed(id);
        }
        if let Some(through) = through
            && self.mutant == Mutant::AckBeforePersist
        {
            self.step(id, Event::Persisted { through });
        }
    }

    /// Hands records to the disk until it takes no more, and says whether that happened: what follows a refused
    /// record must not be stored without it.
    fn store(&mut self, id: ReplicaId, records: &mut Vec<Persist>) -> (Option<PersistId>, bool) {
        let disk = &mut self.nodes[id.slot()].disk;
        let refused = !records.is_empty() && disk.full;
        if refused {
            records.clear();
        }
        let through = records.drain(..).map(|record| disk.push(record)).last();
        if let Some(through) = through {
            self.schedule_sync(id, through);
        }
        (through, refused)
    }

    fn hand_out(&mut self, id: ReplicaId, committed: &mut Vec<(Index, View, Entry)>) {
        for (index, view, entry) in committed.drain(..) {
            let node = &mut self.nodes[id.slot()];
            let expected = node.handed_out.next();
            node.handed_out = index;
            if self.products {
                node.inbox.push_back((index, view, entry.clone()));
            }
            self.note(|| format!("{id} commits {index}: {entry}"));
            if index != expected {
                self.check(Err(format!("I1: {id} hands out {index} instead of {expected}")));
            }
            let result = self.checker.on_committed(id, (index, view, &entry), &self.nodes);
            self.check(result);
        }
    }

    /// The process dies while it does what the last step asks for: some records were handed to the disk, and if
    /// all were, some messages were sent.
    fn die_midway(&mut self, id: ReplicaId, out: &mut Effects) {
        let restart_after_us = self.ambush.take().and_then(|ambush| ambush.restart_after_us);
        let stored = self.rng.below(out.persist.len() as u64 + 1) as usize;
        if stored == out.persist.len() {
            out.messages.truncate(self.rng.below(out.messages.len() as u64 + 1) as usize);
        } else {
            out.messages.clear();
        }
        out.persist.truncate(stored);
        self.store(id, &mut out.persist);
        for (to, message) in out.messages.drain(..) {
            self.send(id, to, message);
        }
        self.counts.ambushes += 1;
        self.crash(id);
        if let Some(after_us) = restart_after_us {
            self.schedule(self.now_us + after_us, Happening::Start { node: id.0 });
        }
    }

    /// The store refused a record or broke: the group is torn down in the same turn or soon after.
    pub(super) fn storage_failed(&mut self, id: ReplicaId) {
        self.counts.storage_failures += 1;
        self.note(|| format!("the store of {id} fails"));
        self.step(id, Event::StorageFailed);
        let at_us = self.now_us + self.rng.below(3000);
        let life = self.nodes[id.slot()].life;
        self.schedule(at_us, Happening::TearDown { node: id.0, life });
    }

    pub(super) fn tear_down(&mut self, id: ReplicaId) {
        self.crash(id);
        let at_us = self.now_us + 1000 + self.rng.below(50_000);
        self.schedule(at_us, Happening::Start { node: id.0 });
    }

    fn on_notice(&mut self, id: ReplicaId, notice: Notice) {
        self.note(|| format!("{id} notice {notice:?}"));
        let node = &mut self.nodes[id.slot()];
        match notice {
            Notice::Jumped { base } => {
                node.inbox.clear();
                (node.handed_out, node.consumed, node.guest) = (base, base, None);
            }
            Notice::Leading { view } => self.begin_lead(id, view),
            Notice::Following { .. } => node.cold_start = false,
            Notice::LostLead { .. } => node.lead = None,
            Notice::Promoted | Notice::Absent { .. } | Notice::HandOverFailed { .. } | Notice::Ineligible { .. } => {}
        }
    }

    fn begin_lead(&mut self, id: ReplicaId, view: View) {
        self.counts.reigns += 1;
        let node = &mut self.nodes[id.slot()];
        let replica = node.replica.take().expect("it just took a step");
        let result = self.checker.on_leading(&self.nodes[id.slot()], &replica, view);
        self.nodes[id.slot()].replica = Some(replica);
        self.check(result);
        let node = &mut self.nodes[id.slot()];
        let boots = node.guest.is_none();
        let guest = node.guest.get_or_insert_with(|| Guest::booted(node.handed_out, id));
        guest.led(view, node.consumed);
        node.cold_start = false;
        node.lead = Some(Lead::new(view));
        if boots {
            node.consumed = node.handed_out;
            node.inbox.clear();
            self.step(id, Event::GuestIntact(true));
        }
    }
}
