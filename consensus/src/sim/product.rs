//! What the product does around consensus, as far as roles and releases depend on it, in short: `lead.rs`,
//! `follow.rs`, `delivery.rs` and `guest.rs` of qemu-vhost-user/src/group.
//!
//! A guest consumes committed inputs in order, stops at a syncvm that concerns it, and answers every input with a
//! frame. A leader holds the frames until the syncvm behind them is acknowledged, or lets them leave at once
//! while it is alone; it brings a replica in by a syncvm, names it secondary, truncates behind later syncvms, and
//! drops a secondary that fell silent. It asks [`Replica::may_release`] before every release.

use super::Mutant;
use super::cluster::{Cluster, REPLICAS};
use super::guest::Guest;
use super::network::Happening;
use crate::config::Recovered;
use crate::effects::Event;
use crate::entry::Entry;
use crate::ids::{Index, ReplicaId, View};
use crate::replica::Release;

/// How far a syncvm of this leader is.
#[derive(Clone, Copy, Debug)]
struct Sync {
    index: Index,
    with: ReplicaId,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Not committed, or the guest has not come that far.
    Proposed,
    /// The guest stands still until the other side is there too.
    Stopped { give_up_us: u64 },
    /// The state is on its way and the guest runs again. What it had said by `through` is in it.
    Sent { give_up_us: u64, through: Index },
}

/// A leader's plans.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lead {
    view: View,
    /// The `Second(none)` that it proposed first.
    none: Option<Index>,
    sync: Option<Sync>,
    /// The `Second` that it proposed last.
    named: Option<Index>,
    failures: u32,
}

impl Lead {
    pub(super) fn new(view: View) -> Lead {
        Lead { view, none: None, sync: None, named: None, failures: 0 }
    }
}

/// The guest of this replica, or the place for one, waits for the syncvm at the head of its inbox.
#[derive(Clone, Copy, Debug)]
pub(super) struct Follow {
    index: Index,
    give_up_us: u64,
}

/// A guest's state on its way.
#[derive(Debug)]
pub(super) struct Exchange {
    view: View,
    index: Index,
    pub(super) from: (ReplicaId, u32),
    pub(super) to: (ReplicaId, u32),
    guest: Guest,
}

const SILENCE_US: u64 = 200_000;
const EXCHANGE_TIMEOUT_US: u64 = 150_000;
const SYNC_FAILURES_LIMIT: u32 = 3;
/// Per mille of the syncvms that are done with somebody although another is secondary: they release nothing.
const SYNC_WITH_ANOTHER: u64 = 50;

/// Whether a stored log says that `me` led last and nobody was secondary.
pub(super) fn served_alone(recovered: &Recovered, me: ReplicaId) -> bool {
    let mut roles = recovered.base;
    for (index, view, entry) in &recovered.entries {
        roles.advance(*index, *view, entry);
    }
    !recovered.doubtful && roles.leader == Some(me) && roles.second.is_none()
}

impl Cluster {
    /// One turn of the reactor, and the time of the next.
    pub(super) fn product_round(&mut self, id: ReplicaId) {
        if self.nodes[id.slot()].tick_us().is_some_and(|due_us| due_us <= self.now_us) {
            self.step(id, Event::Tick);
        }
        self.consume(id);
        self.plan_lead(id);
        let node = &self.nodes[id.slot()];
        if node.replica.is_some() {
            let (life, at_us) = (node.life, self.now_us + 300 + self.rng.below(2500));
            self.schedule(at_us, Happening::Product { node: id.0, life });
        }
    }

    fn lead(&mut self, id: ReplicaId) -> Option<&mut Lead> {
        let node = &mut self.nodes[id.slot()];
        let view = node.leading();
        node.lead.as_mut().filter(|lead| Some(lead.view) == view)
    }

    /// The guest consumes what is committed, in order.
    fn consume(&mut self, id: ReplicaId) {
        let sluggish = self.nodes[id.slot()].sluggish_until_us > self.now_us;
        let mut budget = if sluggish { self.rng.below(2) } else { 4 + self.rng.below(60) };
        while let Some((index, view, entry)) = self.nodes[id.slot()].inbox.front().cloned() {
            let node = &self.nodes[id.slot()];
            let (guest, news) = (node.guest.is_some(), index > node.consumed);
            match entry {
                // Older than a guest that ran on while its daemon was away.
                Entry::Noop { .. } | Entry::Second { .. } if !news => {}
                Entry::Noop { leader } => self.leader_changed(id, leader),
                Entry::Second { replica, .. } => self.second_named(id, replica),
                Entry::SyncVm { with } if with == id && self.waits_as_follower(id, index, view) => break,
                Entry::SyncVm { with } if with != id && self.waits_as_leader(id, index) => break,
                Entry::SyncVm { .. } => {}
                Entry::Input(_) if guest && news => {
                    if budget == 0 {
                        break;
                    }
                    budget -= 1;
                }
                Entry::Input(_) => {}
            }
            self.pass(id, index);
        }
        let consumed = self.nodes[id.slot()].consumed;
        self.step(id, Event::Consumed(consumed));
    }

    /// The head of the inbox is done.
    fn pass(&mut self, id: ReplicaId, index: Index) {
        let node = &mut self.nodes[id.slot()];
        if node.inbox.front().is_some_and(|(head, ..)| *head == index) {
            node.inbox.pop_front();
            node.consumed = node.consumed.max(index);
        }
        if let (Some(view), Some(guest)) = (node.leading(), &mut node.guest) {
            guest.led(view, node.consumed);
        }
    }

    pub(super) fn lose_guest(&mut self, id: ReplicaId, why: &str) {
        if self.nodes[id.slot()].guest.take().is_some() {
            self.note(|| format!("the guest of {id} is no longer whole: {why}"));
            self.step(id, Event::GuestIntact(false));
        }
    }

    fn leader_changed(&mut self, id: ReplicaId, leader: ReplicaId) {
        match &mut self.nodes[id.slot()].guest {
            Some(guest) if leader == id => guest.follows = id,
            Some(guest) if guest.follows != leader => self.lose_guest(id, "another replica leads from an older state"),
            _ => {}
        }
    }

    fn second_named(&mut self, id: ReplicaId, second: Option<ReplicaId>) {
        if let Some(lead) = self.lead(id) {
            lead.failures = 0;
            return;
        }
        let guest = &self.nodes[id.slot()].guest;
        if second != Some(id) && guest.as_ref().is_some_and(|guest| guest.follows != id) {
            self.lose_guest(id, "the leader has given it up");
        }
    }

    fn waits_as_follower(&mut self, id: ReplicaId, index: Index, view: View) -> bool {
        let now_us = self.now_us;
        let node = &mut self.nodes[id.slot()];
        let newer = |(other, _, entry): &(Index, View, Entry)| *other > index && *entry == Entry::SyncVm { with: id };
        let current = node.replica.as_ref().is_some_and(|replica| replica.view() == view) && node.leading().is_none();
        if !current || node.inbox.iter().any(newer) {
            node.follow = None;
            return false;
        }
        let follow = match node.follow {
            Some(follow) if follow.index == index => follow,
            _ => Follow { index, give_up_us: now_us + 2 * EXCHANGE_TIMEOUT_US },
        };
        node.follow = Some(follow).filter(|follow| now_us < follow.give_up_us);
        node.follow.is_some()
    }

    fn waits_as_leader(&mut self, id: ReplicaId, index: Index) -> bool {
        let now_us = self.now_us;
        let Some(sync) = self.lead(id).and_then(|lead| lead.sync.as_mut()).filter(|sync| sync.index == index) else {
            return false;
        };
        if sync.stage == Stage::Proposed {
            sync.stage = Stage::Stopped { give_up_us: now_us + EXCHANGE_TIMEOUT_US };
        }
        matches!(sync.stage, Stage::Stopped { .. })
    }

    /// Everything that a leader decides.
    fn plan_lead(&mut self, id: ReplicaId) {
        let Some(lead) = self.lead(id).copied() else { return };
        if self.nodes[id.slot()].guest.is_none() {
            return self.step(id, Event::StepDown);
        }
        self.drive_sync(id);
        let Some(replica) = self.replica(id) else { return };
        let (commit, second) = (replica.commit_index(), replica.second());
        // Asked too early and too often, to see that consensus does not agree.
        if second.is_none() {
            self.release_alone(id);
        }
        let Some(none) = lead.none else {
            let none = self.propose(id, Entry::Second { replica: None, base: Index(0) }).and_then(Result::ok);
            if let Some(lead) = self.lead(id) {
                (lead.none, lead.named) = (none, none);
            }
            return;
        };
        if commit < none {
            return;
        }
        if let Some(second) = second.filter(|_| lead.named.is_none_or(|named| named <= commit)) {
            self.drop_failed(id, second);
        }
        let Some(lead) = self.lead(id).copied() else { return };
        if lead.sync.is_some() || lead.named.is_some_and(|named| named > commit) {
            return;
        }
        let anybody = ReplicaId((id.0 + 1 + self.rng.below(2) as u8) % REPLICAS);
        let with = second.filter(|_| !self.rng.chance(SYNC_WITH_ANOTHER)).unwrap_or(anybody);
        let silent = self.replica(id).is_none_or(|replica| replica.peer_silent_us(with, self.now_us) > SILENCE_US / 2);
        if !silent && self.rng.chance(500) {
            self.start_sync(id, with);
        }
    }

    fn start_sync(&mut self, id: ReplicaId, with: ReplicaId) {
        if let Some(Ok(index)) = self.propose(id, Entry::SyncVm { with })
            && let Some(lead) = self.lead(id)
        {
            lead.sync = Some(Sync { index, with, stage: Stage::Proposed });
        }
    }

    /// A secondary that is silent, has no guest or fails at every syncvm is given up.
    fn drop_failed(&mut self, id: ReplicaId, second: ReplicaId) {
        let silent = self.replica(id).is_some_and(|replica| replica.peer_silent_us(second, self.now_us) > SILENCE_US);
        let guestless = self.nodes[second.slot()].guest.is_none() && self.rng.chance(100);
        let failing = self.lead(id).is_some_and(|lead| lead.failures >= SYNC_FAILURES_LIMIT);
        if (silent || guestless || failing || second == id)
            && let Some(Ok(index)) = self.propose(id, Entry::Second { replica: None, base: Index(0) })
            && let Some(lead) = self.lead(id)
        {
            lead.named = Some(index);
        }
    }

    /// Without a secondary nothing is held, and the log behind the guest is of no use.
    fn release_alone(&mut self, id: ReplicaId) {
        let Some(view) = self.lead(id).map(|lead| lead.view) else { return };
        let consumed = self.nodes[id.slot()].consumed;
        if self.serves_alone {
            self.release(id, view, Release::Alone, consumed);
        }
        if self.rng.chance(200) && self.lead(id).is_some_and(|lead| lead.sync.is_none()) {
            self.step(id, Event::Truncate(consumed));
        }
    }

    /// Lets the frames that the guest had said by `through` leave, if consensus agrees.
    fn release(&mut self, id: ReplicaId, view: View, release: Release, through: Index) -> bool {
        let Some(replica) = self.replica(id) else { return false };
        if !replica.may_release(view, release) && self.mutant != Mutant::ReleaseUnasked {
            self.counts.releases_refused += 1;
            return false;
        }
        self.counts.releases += 1;
        let result = self.checker.on_release(&self.nodes, id, view, release, through);
        self.check(result);
        true
    }

    /// The syncvm under way gets as far as it can.
    fn drive_sync(&mut self, id: ReplicaId) {
        let now_us = self.now_us;
        let Some((view, sync)) = self.lead(id).and_then(|lead| Some((lead.view, lead.sync?))) else { return };
        let give_up_us = match sync.stage {
            Stage::Proposed => return,
            Stage::Stopped { give_up_us } | Stage::Sent { give_up_us, .. } => give_up_us,
        };
        let other = &self.nodes[sync.with.slot()];
        let there = other.follow.is_some_and(|follow| follow.index == sync.index);
        if now_us >= give_up_us || other.replica.is_none() {
            self.sync_failed(id, sync.index);
        } else if there && matches!(sync.stage, Stage::Stopped { .. }) && self.weather.connects(id, sync.with) {
            let to = (sync.with, other.life);
            let node = &self.nodes[id.slot()];
            let (from, through) = ((id, node.life), node.consumed);
            let Some(guest) = node.guest.as_ref().map(|guest| guest.copied(sync.index, id)) else { return };
            self.exchanges.push(Exchange { view, index: sync.index, from, to, guest });
            let (exchange, at_us) = (self.exchanges.len() - 1, now_us + self.delay_us(id, sync.with));
            self.schedule(at_us, Happening::Transfer { exchange });
            if let Some(sync) = self.lead(id).and_then(|lead| lead.sync.as_mut()) {
                sync.stage = Stage::Sent { give_up_us, through };
            }
            self.pass(id, sync.index);
        }
    }

    fn sync_failed(&mut self, id: ReplicaId, index: Index) {
        if let Some(lead) = self.lead(id) {
            lead.sync = None;
            lead.failures += 1;
        }
        self.step(id, Event::SyncVmFailed(index));
        self.pass(id, index);
    }

    /// The leader's state is here, whole: apply it and say so, unless another view began.
    pub(super) fn transfer(&mut self, exchange: usize) {
        let Exchange { view, index, from, to: (id, life), ref guest } = self.exchanges[exchange];
        let node = &mut self.nodes[id.slot()];
        let agrees = node.replica.as_ref().is_some_and(|replica| replica.view() == view);
        let waits = node.follow.is_some_and(|follow| follow.index == index);
        if node.life != life || !agrees || !waits {
            return;
        }
        if node.guest.is_none() {
            node.guest_since_us = self.now_us;
        }
        (node.guest, node.follow) = (Some(guest.clone()), None);
        self.checker.on_made_whole(view, index);
        self.note(|| format!("the guest of {id} is made whole by syncvm {index}"));
        self.pass(id, index);
        self.step(id, Event::GuestIntact(true));
        let at_us = self.now_us + self.delay_us(id, from.0);
        if !self.rng.chance(self.weather.loss) && self.weather.connects(id, from.0) {
            self.schedule(at_us, Happening::Acknowledged { exchange });
        }
    }

    /// The other side has it all: the slot's frames may leave, and a joiner may be named.
    pub(super) fn acknowledged(&mut self, exchange: usize) {
        let Exchange { view, index, from: (id, life), to: (with, _), .. } = self.exchanges[exchange];
        if self.nodes[id.slot()].life != life {
            return;
        }
        let Some(lead) = self.lead(id).filter(|lead| lead.view == view) else { return };
        let Some(Sync { index: present, stage: Stage::Sent { through, .. }, .. }) = lead.sync else { return };
        if present != index {
            return;
        }
        (lead.sync, lead.failures) = (None, 0);
        self.counts.syncvms += 1;
        if self.release(id, view, Release::SyncVm(index), through) {
            self.step(id, Event::Truncate(index));
        }
        if self.replica(id).is_some_and(|replica| replica.second().is_none())
            && let Some(Ok(named)) = self.propose(id, Entry::Second { replica: Some(with), base: index })
            && let Some(lead) = self.lead(id)
        {
            lead.named = Some(named);
        }
    }
}
