//! The follower's side of a syncvm.
//!
//! Two halves with the acknowledgement between them. Before it, any failure leaves guest memory untouched.
//! From the attempt to send it on, the leader may have released frames that depend on this state, so the
//! follower finishes applying whatever happens to the leader or the channel.

mod delta;

use std::time::Instant;

use super::ahead::{self, Ahead};
use super::{
    BATCH_PAGES, Channel, Deadlines, ExchangeConfig, Guest, Link, Observer, Parts, Phase, Stopwatch, SyncError,
    SyncReport, verify,
};
use crate::dirty::DirtySet;
use crate::hash::{PageHashValue, SlotHasher};
use crate::page::{PAGE_BYTES, PageNumber};
use crate::pairing::{Basis, Pairing};
use crate::transfer::{
    BlockSize, End, Header, Kind, Scope, Staging, Terms, TransferError, TransferMode, Verdict, VerifiedTransfer,
};

/// Largest guest whose device state is saved while the leader does not wait for it. It takes one harvest more, which takes longer
/// than saving in a larger one.
const LATE_SAVE_PAGES: usize = (1 << 30) / PAGE_BYTES;

/// What a follower's guest is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A state that one whole syncvm, or its own execution since, produced (invariant I5). It may lead.
    Whole,
    /// In the middle of a rejoin: its memory is a mixture, it must not run.
    Joining,
    /// Of no use until a rejoin, or until a syncvm that covers every page.
    Empty,
}

/// What a follower keeps between exchanges with its leader.
pub struct FollowerContext<G, C, O> {
    /// The guest.
    pub guest: G,
    /// The owner's hooks.
    pub observer: O,
    /// How exchanges are done.
    pub config: ExchangeConfig,
    /// The present view.
    pub view: u64,
    /// The guest is idle as the next syncvm begins: then it does not matter how long it stands still, only how soon all is over.
    pub idle: bool,
    pub(crate) standing: Standing,
    pub(crate) pairing: Pairing,
    pub(crate) pool: SlotHasher,
    pub(crate) link: Link<C>,
    /// Of the last batch.
    hashes: Vec<PageHashValue>,
    /// How many pages of this syncvm needed no hashing.
    known_hashes: usize,
    /// Pages of the last union.
    usual_pages: usize,
    /// The leader can compare ahead, as far as is known.
    leader_ahead: bool,
    /// Saving the device state has been seen to write guest memory.
    saving_writes: bool,
    staging: Staging,
    /// The hash of the device state that was loaded last, which the staging area keeps.
    device_held: Option<u64>,
    /// The block size that would have been the cheapest for the last transfer of blocks.
    blocks: BlockSize,
}

impl<G: Guest, C: Channel, O: Observer> FollowerContext<G, C, O> {
    /// A follower whose guest is worth nothing yet: the usual start.
    #[must_use]
    pub fn new(parts: Parts<G, C, O>) -> Self {
        let pairing = Pairing::fresh(parts.guest.ram().pages());
        Self::with(parts, pairing, Standing::Empty)
    }

    /// A follower with a whole guest, for example the old leader after a planned failover, with the pairing it
    /// had then.
    #[must_use]
    pub fn with_whole_guest(parts: Parts<G, C, O>, pairing: Pairing) -> Self {
        Self::with(parts, pairing, Standing::Whole)
    }

    fn with(parts: Parts<G, C, O>, pairing: Pairing, standing: Standing) -> Self {
        let pages = parts.guest.ram().pages();
        assert_eq!(pairing.pages(), pages, "a pairing of another guest");
        Self {
            guest: parts.guest,
            observer: parts.observer,
            config: parts.config,
            view: parts.view,
            idle: false,
            pool: SlotHasher::new(parts.pool),
            link: Link::new(parts.channel),
            standing,
            pairing,
            hashes: Vec::new(),
            known_hashes: 0,
            usual_pages: 0,
            leader_ahead: true,
            saving_writes: false,
            staging: Staging::new(pages),
            device_held: None,
            blocks: BlockSize::default(),
        }
    }

    /// What the guest is worth now.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing
    }

    /// What is known about the leader.
    #[must_use]
    pub fn pairing(&self) -> &Pairing {
        &self.pairing
    }

    /// Puts a new channel in place of a broken one.
    pub fn replace_channel(&mut self, channel: C) {
        self.link.replace(channel);
    }

    /// Takes the context apart: guest, channel, observer, and the pairing for the next role.
    #[must_use]
    pub fn into_parts(self) -> (G, C, O, Pairing) {
        (self.guest, self.link.channel, self.observer, self.pairing)
    }

    pub(crate) fn terms(&self) -> Terms {
        Terms {
            ram_pages: self.pairing.pages() as u64,
            hash: self.config.hash,
            verify: self.config.verify,
            transfer: self.config.transfer,
            ahead: ahead::is_possible(&self.guest),
            basis: self.pairing.basis(),
            device: self.device_held,
        }
    }

    pub(crate) fn harvest(&mut self) -> Result<(), SyncError> {
        ahead::harvest(&mut self.guest, &mut self.pairing, &mut self.pool)
    }

    /// The check of I4: hashes `batch` and sends the hashes. It believes nothing that was known before.
    pub(crate) fn verify_batch(
        &mut self,
        header: &Header,
        deadlines: &Deadlines,
        batch: &[PageNumber],
    ) -> Result<(), SyncError> {
        self.pool.pool().hash_pages_into(self.config.hash, self.guest.ram(), batch, &mut self.hashes);
        self.link.send(header, Kind::VerifyHashes, &[self.hashes.as_flattened()], deadlines.next())
    }

    /// The guest's memory is no longer anything that I5 allows.
    pub(crate) fn lose_guest(&mut self) {
        self.standing = Standing::Empty;
        self.pool.forget();
        self.pairing.forget_peer();
    }
}

struct Run<'a, G, C, O> {
    ctx: &'a mut FollowerContext<G, C, O>,
    header: Header,
    deadlines: Deadlines,
    report: SyncReport,
    watch: Stopwatch,
    stopped_at: Option<Instant>,
    ahead: Option<Ahead>,
    /// The device state as it was before the transfer, where loads have leftovers.
    present: Option<Vec<u8>>,
}

/// Takes part in the leader's syncvm `number`. To be called once this guest has consumed every input before
/// the `SyncVm` entry and was idle, or waited long enough.
///
/// On success the guest is the leader's at the sync point, [`Observer::applied`] was called, and it runs if
/// the observer allows. On an error other than [`SyncError::GuestLost`], [`SyncError::Diverged`] or one of
/// resuming, guest memory is untouched and the guest runs as before.
///
/// # Errors
/// See [`SyncError`].
pub fn follow_syncvm<G: Guest, C: Channel, O: Observer>(
    ctx: &mut FollowerContext<G, C, O>,
    number: u64,
) -> Result<SyncReport, SyncError> {
    ctx.link.reset_counts();
    ctx.known_hashes = 0;
    let header = Header { group: ctx.config.group, view: ctx.view, number, scope: Scope::Sync, round: 0 };
    let mut run = Run {
        header,
        deadlines: ctx.config.deadlines(),
        report: SyncReport { number, ..SyncReport::default() },
        watch: Stopwatch::start(),
        stopped_at: None,
        ahead: None,
        present: None,
        ctx,
    };
    // The staging area leaves the context while a transfer borrowed from it is applied to the rest of it.
    let mut staging = std::mem::replace(&mut run.ctx.staging, Staging::new(0));
    let outcome = run.before_ack(&mut staging);
    let result = match outcome {
        Ok((transfer, terms)) => run.after_ack(&transfer, &terms),
        Err(error) => Err(run.fail(error)),
    };
    let report = result.map(|()| run.finish());
    if report.is_ok() {
        ctx.device_held = Some(staging.keep_device());
    }
    staging.trim();
    ctx.staging = staging;
    report
}

impl<G: Guest, C: Channel, O: Observer> Run<'_, G, C, O> {
    /// Everything that can be given up without a trace.
    fn before_ack<'s>(&mut self, staging: &'s mut Staging) -> Result<(VerifiedTransfer<'s>, Terms), SyncError> {
        self.compare_ahead()?;
        self.stop_and_harvest()?;
        let (leader, union) = self.exchange_sets()?;
        match leader.transfer {
            TransferMode::All => self.receive(staging, &union)?,
            TransferMode::Pages => {
                self.send_hashes(&union.iter().collect::<Vec<_>>())?;
                self.receive(staging, &union)?;
            }
            TransferMode::Delta => self.receive_blocks(staging, &union)?,
        }
        let transfer = self.staged(staging);
        self.check_leftovers(&transfer)?;
        Ok((transfer, leader))
    }

    fn point(&mut self, phase: Phase) {
        self.ctx.observer.crash_point(phase);
    }

    /// Saving writes guest memory, perhaps: where it has been seen to, or is not noticed, it comes before the harvest, as on the
    /// leader. What it writes is then compared.
    fn stop_and_harvest(&mut self) -> Result<(), SyncError> {
        self.stopped_at = Some(Instant::now());
        self.ctx.guest.stop()?;
        self.report.phases.stop_us = self.watch.lap();
        self.point(Phase::FollowerStopped);
        let FollowerContext { guest, pairing, saving_writes, .. } = &mut *self.ctx;
        let late = !*saving_writes && guest.harvest_tells_pages_apart() && pairing.pages() <= LATE_SAVE_PAGES;
        if guest.loads_have_leftovers() && !late {
            self.present = Some(guest.save_device_state()?);
        }
        self.report.phases.save_us = self.watch.lap();
        self.ctx.harvest()?;
        self.report.phases.harvest_us = self.watch.lap();
        self.point(Phase::FollowerHarvested);
        Ok(())
    }

    /// The leader has what it waits for with its guest stopped: where loads have leftovers, saves the device state now if that was
    /// not done, and makes sure by another harvest that memory is still what was compared.
    fn save_late(&mut self) -> Result<(), SyncError> {
        let FollowerContext { guest, pairing, saving_writes, .. } = &mut *self.ctx;
        if self.present.is_some() || !guest.loads_have_leftovers() {
            return Ok(());
        }
        self.present = Some(guest.save_device_state()?);
        self.report.phases.save_us += self.watch.lap();
        // Not through the hasher: all hashes are sent, and if there is anything, nothing of this exchange counts.
        let mut written = DirtySet::new(pairing.pages());
        let harvested = guest.harvest(&mut written);
        if harvested.is_err() {
            written.fill();
        }
        pairing.pending().union_with(&written);
        harvested?;
        self.report.phases.harvest_us += self.watch.lap();
        *saving_writes = !written.is_empty();
        if *saving_writes {
            return Err(SyncError::SavingWrites { pages: written.count() });
        }
        Ok(())
    }

    /// The leader's set first, then ours: the two sides never send at the same time.
    fn exchange_sets(&mut self) -> Result<(Terms, DirtySet), SyncError> {
        if self.ahead.is_none() && self.leader_compares_ahead()? {
            self.answer_ahead()?;
        }
        let terms = self.ctx.terms();
        let (leader, said) = self.ctx.link.recv_set(&self.header, Kind::DirtySet, &terms, &self.deadlines)?;
        let written = self.ctx.pool.written();
        let ours = written.unwrap_or(self.ctx.pairing.pending());
        // The leader knows what it said: only where ours differs from it is said.
        let mut difference = said.clone();
        difference.symmetric_difference_with(ours);
        let mut union = ahead::whole_set(&mut self.ahead, ours, said);
        self.check_basis(&leader, &union)?;
        self.ctx.config.hash = leader.hash;
        self.ctx.leader_ahead = leader.ahead;
        // `open` would take a basis for itself when everything is dirty here; the leader's is what counts.
        let basis = self.ctx.pairing.basis();
        self.report.dirty_local = self.ctx.pairing.open(self.header.basis()).count();
        self.ctx.pairing.adopt(basis);
        self.report.transfer = leader.transfer;
        self.report.dirty_peer = union.count();
        self.ctx.link.send_set(&self.header, Kind::DirtySet, &terms, &difference, &self.deadlines)?;
        union.union_with(self.ctx.pairing.in_flight());
        self.report.union_pages = union.count();
        self.ctx.usual_pages = self.report.union_pages;
        self.report.phases.exchange_us = self.watch.lap();
        self.point(Phase::FollowerExchanged);
        Ok((leader, union))
    }

    /// A set that is not everything only means something relative to the state that this guest stands on.
    fn check_basis(&self, leader: &Terms, set: &DirtySet) -> Result<(), SyncError> {
        let ours: Option<Basis> = match self.ctx.standing {
            Standing::Empty => None,
            Standing::Whole | Standing::Joining => self.ctx.pairing.basis(),
        };
        if set.is_all() || (ours.is_some() && ours == leader.basis) {
            return Ok(());
        }
        Err(SyncError::NotWhole { ours, theirs: leader.basis })
    }

    /// Hashes the union's pages and sends what the leader does not know of the hashes. Returns all of them.
    fn send_hashes(&mut self, pages: &[PageNumber]) -> Result<Vec<PageHashValue>, SyncError> {
        let mut all = Vec::with_capacity(pages.len());
        let hash_bytes = self.report.transfer.hash_bytes();
        let FollowerContext { pool, link, hashes, guest, config, known_hashes, .. } = &mut *self.ctx;
        let mut wire = Vec::new();
        for batch in pages.chunks(BATCH_PAGES) {
            *known_hashes += pool.hash_pages_into(config.hash, guest.ram(), batch, hashes);
            wire.clear();
            let due = batch.iter().zip(&*hashes).filter(|(page, _)| ahead::is_due(self.ahead.as_ref(), **page));
            due.for_each(|(_, hash)| wire.extend_from_slice(&hash[..hash_bytes]));
            if !wire.is_empty() {
                link.send(&self.header, Kind::Hashes, &[&wire], self.deadlines.next())?;
            }
            all.extend_from_slice(hashes);
        }
        self.report.compared_pages = pages.len();
        self.report.phases.compare_us = self.watch.lap();
        self.point(Phase::FollowerHashed);
        Ok(all)
    }

    /// Before the stop, if the leader will probably want that: as much of steps 2 to 4 as can be done while the guest runs.
    fn compare_ahead(&mut self) -> Result<(), SyncError> {
        let FollowerContext { guest, config, usual_pages, pairing, leader_ahead, .. } = &*self.ctx;
        // A guess: where this guest is idle the leader's probably is, too.
        let possible = *leader_ahead && !self.ctx.idle && ahead::is_possible(guest);
        if !possible || !ahead::is_wanted(config, config.transfer, *usual_pages, pairing.pages()) {
            return Ok(());
        }
        self.ctx.harvest()?;
        if self.leader_compares_ahead()? {
            self.answer_ahead()?;
        }
        self.report.phases.ahead_us = self.watch.lap();
        Ok(())
    }

    /// Waits for the leader's first message and says whether it begins ahead of the stop.
    fn leader_compares_ahead(&mut self) -> Result<bool, SyncError> {
        let kind = self.ctx.link.recv(&self.header, &self.deadlines)?;
        self.ctx.link.put_back(kind);
        Ok(kind == Kind::AheadSet)
    }

    /// The leader compares ahead. This guest was harvested, and may run or not.
    fn answer_ahead(&mut self) -> Result<(), SyncError> {
        let terms = self.ctx.terms();
        let (leader, theirs) = self.ctx.link.recv_set(&self.header, Kind::AheadSet, &terms, &self.deadlines)?;
        self.check_basis(&leader, &theirs)?;
        self.ctx.config.hash = leader.hash;
        let FollowerContext { pool, link, guest, config, pairing, .. } = &mut *self.ctx;
        let ahead = Ahead::answer(link, &self.header, &terms, pairing.pending(), theirs, &self.deadlines)?;
        let mut wire = Vec::new();
        pool.begin_ahead(config.hash, guest.ram());
        for batch in ahead.pages.chunks(BATCH_PAGES) {
            wire.clear();
            let hash_bytes = leader.transfer.hash_bytes();
            pool.hash_ahead(guest.ram(), batch).iter().for_each(|hash| wire.extend_from_slice(&hash[..hash_bytes]));
            link.send(&self.header, Kind::AheadHashes, &[&wire], self.deadlines.next())?;
        }
        self.ahead = Some(ahead);
        Ok(())
    }

    fn receive(&mut self, staging: &mut Staging, union: &DirtySet) -> Result<(), SyncError> {
        self.save_late()?;
        staging.begin();
        let mut first = true;
        let end = loop {
            let kind = self.ctx.link.recv(&self.header, &self.deadlines)?;
            if first {
                first = false;
                self.point(Phase::FollowerReceiving);
            }
            let body = self.ctx.link.body();
            match kind {
                Kind::Pages => staging.page_chunk(body, union)?,
                Kind::Device => staging.device_chunk(body, self.ctx.config.max_device_bytes)?,
                Kind::End => break End::decode(body)?,
                got => {
                    return Err(SyncError::Unexpected { got, wanted: "a part of the transfer" });
                }
            }
        };
        match staging.check(&end)? {
            Verdict::Sound => Ok(()),
            Verdict::Doubtful => Err(TransferError::Content.into()),
        }
    }

    /// The whole transfer is there and correct.
    fn staged<'s>(&mut self, staging: &'s Staging) -> VerifiedTransfer<'s> {
        let transfer = staging.verified();
        self.report.sent_pages = transfer.pages();
        if self.report.transfer.compares() {
            self.report.divergent_pages = transfer.pages();
        }
        self.report.zero_pages = transfer.zero_pages();
        self.report.device_bytes = transfer.device_state().len();
        self.report.full_transfer_bytes = (self.report.dirty_peer * PAGE_BYTES + self.report.device_bytes) as u64;
        self.report.phases.transfer_us = self.watch.lap();
        self.point(Phase::FollowerStaged);
        transfer
    }

    /// A load leaves alone what the leader's state does not mention. A guest that has such a thing must be reset first, which
    /// only a rejoin does; a joiner has just been.
    fn check_leftovers(&self, transfer: &VerifiedTransfer<'_>) -> Result<(), SyncError> {
        let Some(present) = &self.present else { return Ok(()) };
        let parts = self.ctx.guest.leftovers(present, transfer.device_state());
        if parts.is_empty() {
            return Ok(());
        }
        if self.ctx.standing == Standing::Whole {
            return Err(SyncError::Leftovers { parts });
        }
        tracing::warn!(?parts, "a reset guest has more device state than the leader's; it may differ there");
        Ok(())
    }

    /// From here on there is no way back.
    fn after_ack(&mut self, transfer: &VerifiedTransfer<'_>, leader: &Terms) -> Result<(), SyncError> {
        let sent = self.ctx.link.send(&self.header, Kind::Ack, &[], self.deadlines.next());
        if let Err(error) = &sent {
            // It may have arrived all the same, and then the leader has released this slot's frames.
            tracing::warn!(%error, number = self.header.number, "acknowledgement uncertain; applying anyway");
        }
        self.report.phases.ack_us = self.watch.lap();
        self.point(Phase::FollowerAcked);
        self.apply(transfer, leader)?;
        if leader.verify && sent.is_ok() {
            self.report.verified = verify::follow(self.ctx, &self.header, &self.deadlines)?;
            self.report.phases.verify_us = self.watch.lap();
        }
        self.ctx.observer.applied();
        if self.ctx.observer.may_run() {
            self.resume()?;
            self.point(Phase::FollowerResumed);
        }
        Ok(())
    }

    fn apply(&mut self, transfer: &VerifiedTransfer<'_>, leader: &Terms) -> Result<(), SyncError> {
        self.ctx.pool.forget();
        let FollowerContext { guest, observer, .. } = &mut *self.ctx;
        let differences = transfer.apply(guest.ram(), || {
            observer.crash_point(Phase::FollowerAppliedHalf);
        });
        // A joiner's earlier rounds wrote as well.
        if self.ctx.standing == Standing::Whole {
            self.ctx.guest.announce_written(&mut transfer.page_numbers());
        }
        self.report.differing_bytes = differences.bytes_in_blocks_of_256();
        self.ctx.blocks = differences.cheapest().unwrap_or(self.ctx.blocks);
        self.report.phases.apply_us = self.watch.lap();
        self.point(Phase::FollowerApplied);
        if let Err(error) = self.ctx.guest.load_device_state(transfer.device_state()) {
            self.ctx.lose_guest();
            return Err(SyncError::GuestLost(error));
        }
        self.ctx.pairing.commit();
        self.ctx.pairing.adopt(leader.basis);
        self.ctx.standing = Standing::Whole;
        self.report.phases.load_us = self.watch.lap();
        self.point(Phase::FollowerLoaded);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), SyncError> {
        self.ctx.guest.resume()?;
        if let Some(stopped_at) = self.stopped_at.take() {
            self.report.guest_stop_us = stopped_at.elapsed().as_micros() as u64;
        }
        self.report.resumed = true;
        self.report.phases.resume_us = self.watch.lap();
        Ok(())
    }

    fn finish(self) -> SyncReport {
        SyncReport {
            known_hashes: self.ctx.known_hashes,
            bytes_sent: self.ctx.link.bytes_sent,
            bytes_received: self.ctx.link.bytes_received,
            traffic: self.ctx.link.traffic,
            total_us: self.watch.total(),
            ..self.report
        }
    }

    /// Given up before the acknowledgement: the guest goes on as it was, if it was anything.
    fn fail(&mut self, error: SyncError) -> SyncError {
        self.ctx.pairing.abort();
        self.ctx.pool.forget();
        self.ctx.link.send_abort(&self.header, &error);
        let runs = self.ctx.standing == Standing::Whole && self.stopped_at.is_some() && self.ctx.observer.may_run();
        match if runs { self.resume() } else { Ok(()) } {
            Err(SyncError::Guest(resume)) => SyncError::NotResumed { cause: Box::new(error), resume },
            _ => error,
        }
    }
}
