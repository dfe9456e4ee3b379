//! The leader's side of a syncvm.
//!
//! The device state is saved directly after the stop and **before** the harvest: whatever saving writes into
//! guest memory is then in the dirty set, and RAM and device state are of one moment.

mod delta;

use std::time::Instant;

use delta::Delta;

use super::ahead::{self, Ahead};
use super::{
    BATCH_PAGES, Channel, Deadlines, ExchangeConfig, Guest, Link, Observer, Parts, Phase, Stopwatch, SyncError,
    SyncReport, verify,
};
use crate::dirty::DirtySet;
use crate::hash::{HASH_BYTES, PageHashValue, SlotHasher};
use crate::page::{PAGE_BYTES, PageNumber};
use crate::pairing::Pairing;
use crate::transfer::{Header, Kind, Outgoing, Scope, Terms, TransferMode, WireError};

/// A transfer of so many pages, or blocks of them, is sent before an idle guest runs again: some milliseconds, if all of each differs.
const SEND_FIRST_PAGES: usize = 2048;

/// What a leader keeps between exchanges with one follower.
pub struct LeaderContext<G, C, O> {
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
    pub(crate) pairing: Pairing,
    pub(crate) pool: SlotHasher,
    pub(crate) link: Link<C>,
    pub(crate) outgoing: Outgoing,
    /// Of the last batch.
    hashes: Vec<PageHashValue>,
    /// How many pages of this syncvm needed no hashing.
    known_hashes: usize,
    /// Pages of the last union.
    usual_pages: usize,
    pub(crate) rejoins: u16,
    /// The number of the last syncvm tried.
    pub(crate) last_number: u64,
    /// In the last syncvm a short hash or a digest agreed falsely, which they would do again: the next one, and only that,
    /// compares whole hashes and sends whole pages. A link that is too slow for those is not asked twice.
    cautious: bool,
}

impl<G: Guest, C: Channel, O: Observer> LeaderContext<G, C, O> {
    /// A leader towards a follower that `pairing` knows about; [`Pairing::fresh`] for any other.
    ///
    /// # Panics
    /// When the pairing is for another RAM size.
    #[must_use]
    pub fn new(parts: Parts<G, C, O>, pairing: Pairing) -> Self {
        assert_eq!(pairing.pages(), parts.guest.ram().pages(), "a pairing of another guest");
        Self {
            guest: parts.guest,
            observer: parts.observer,
            config: parts.config,
            view: parts.view,
            idle: false,
            pool: SlotHasher::new(parts.pool),
            link: Link::new(parts.channel),
            pairing,
            outgoing: Outgoing::default(),
            hashes: Vec::new(),
            known_hashes: 0,
            usual_pages: 0,
            rejoins: 0,
            last_number: 0,
            cautious: false,
        }
    }

    /// What is known about the follower.
    #[must_use]
    pub fn pairing(&self) -> &Pairing {
        &self.pairing
    }

    /// To start over with [`Pairing::forget_peer`].
    pub fn pairing_mut(&mut self) -> &mut Pairing {
        &mut self.pairing
    }

    /// Puts a new channel to the same follower in place of a broken one.
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
            transfer: self.transfer(),
            ahead: ahead::is_possible(&self.guest),
            basis: self.pairing.basis(),
            device: None,
        }
    }

    /// What the next syncvm sends.
    fn transfer(&self) -> TransferMode {
        match self.config.transfer {
            TransferMode::Delta if self.cautious => TransferMode::Pages,
            transfer => transfer,
        }
    }

    /// Harvests into the pairing. A harvest that fails may have lost pages, so every page counts as dirty.
    pub(crate) fn harvest(&mut self) -> Result<(), SyncError> {
        ahead::harvest(&mut self.guest, &mut self.pairing, &mut self.pool)
    }

    /// The check of I4: hashes `batch` here while the follower does the same, receives its hashes, and adds what differs. It
    /// believes nothing that was known before.
    pub(crate) fn verify_batch(
        &mut self,
        header: &Header,
        deadlines: &Deadlines,
        batch: &[PageNumber],
        divergent: &mut Vec<PageNumber>,
    ) -> Result<(), SyncError> {
        self.pool.pool().hash_pages_into(self.config.hash, self.guest.ram(), batch, &mut self.hashes);
        let theirs = self.link.expect(header, Kind::VerifyHashes, "a batch of hashes", deadlines)?;
        compare(batch, &self.hashes, theirs, divergent)
    }
}

/// The follower's hashes in a message that must hold `count` of them.
fn theirs(body: &[u8], count: usize, hash_bytes: usize) -> Result<std::slice::ChunksExact<'_, u8>, WireError> {
    if body.len() != count * hash_bytes {
        return Err(WireError::Value { field: "number of hash bytes", value: body.len() as u64 });
    }
    Ok(body.chunks_exact(hash_bytes))
}

pub(crate) fn compare(
    batch: &[PageNumber],
    ours: &[PageHashValue],
    theirs: &[u8],
    divergent: &mut Vec<PageNumber>,
) -> Result<(), SyncError> {
    for ((&page, ours), theirs) in batch.iter().zip(ours).zip(self::theirs(theirs, ours.len(), HASH_BYTES)?) {
        if ours != theirs {
            divergent.push(page);
        }
    }
    Ok(())
}

/// What has to be sent.
enum Found {
    /// These pages, whole.
    Whole(Vec<PageNumber>),
    /// Blocks of divergent pages.
    Blocks(Box<Delta>),
}

struct Run<'a, G, C, O> {
    ctx: &'a mut LeaderContext<G, C, O>,
    header: Header,
    deadlines: Deadlines,
    report: SyncReport,
    watch: Stopwatch,
    stopped_at: Option<Instant>,
    ahead: Option<Ahead>,
    /// The hash of the device state that the follower has from before.
    device_held: Option<u64>,
}

/// Makes the follower's guest equal to this one: steps 1–7 of the design. Blocks until the follower
/// acknowledged, or something failed.
///
/// `number` is the index of the committed `SyncVm` entry. On an error this guest runs again (unless the
/// observer forbids it) and nothing is forgotten: the next call, with a new number, covers the same pages.
///
/// # Errors
/// See [`SyncError`]; [`Observer::acknowledged`] was then not called, except for an error of resuming.
pub fn lead_syncvm<G: Guest, C: Channel, O: Observer>(
    ctx: &mut LeaderContext<G, C, O>,
    number: u64,
) -> Result<SyncReport, SyncError> {
    ctx.link.reset_counts();
    ctx.known_hashes = 0;
    ctx.last_number = ctx.last_number.max(number);
    ctx.outgoing.forget();
    let header = Header { group: ctx.config.group, view: ctx.view, number, scope: Scope::Sync, round: 0 };
    let mut run = Run {
        header,
        deadlines: ctx.config.deadlines(),
        report: SyncReport { number, transfer: ctx.transfer(), ..SyncReport::default() },
        watch: Stopwatch::start(),
        stopped_at: None,
        ahead: None,
        device_held: None,
        ctx,
    };
    match run.steps() {
        Ok(()) => Ok(run.finish()),
        Err(error) => Err(run.fail(error)),
    }
}

impl<G: Guest, C: Channel, O: Observer> Run<'_, G, C, O> {
    fn steps(&mut self) -> Result<(), SyncError> {
        self.compare_ahead()?;
        let device = self.stop_and_harvest()?;
        let union = self.exchange_sets(device.len())?;
        let mut found = self.find(&union)?;
        self.copy(&found, device);
        let early = self.ctx.config.early_resume && !self.ctx.config.verify;
        let send_first = self.ctx.idle && self.report.sent_pages <= SEND_FIRST_PAGES;
        if early && send_first {
            self.check_may_run()?;
        } else if early {
            self.resume_early()?;
        }
        self.send_transfer(&mut found)?;
        if early && send_first {
            // While the follower takes it in: the acknowledgement comes no later for it.
            self.resume_early()?;
        }
        self.await_ack(&mut found)?;
        if self.ctx.config.verify {
            verify::lead(self.ctx, &self.header, &self.deadlines)?;
            self.report.verified = true;
            self.report.phases.verify_us = self.watch.lap();
        }
        self.ctx.observer.acknowledged();
        self.point(Phase::LeaderReleased);
        if !early && self.ctx.observer.may_run() {
            self.resume()?;
        }
        Ok(())
    }

    fn check_may_run(&mut self) -> Result<(), SyncError> {
        if self.ctx.observer.may_run() { Ok(()) } else { Err(SyncError::Deposed) }
    }

    fn resume_early(&mut self) -> Result<(), SyncError> {
        self.check_may_run()?;
        self.resume()?;
        self.point(Phase::LeaderResumed);
        Ok(())
    }

    fn point(&mut self, phase: Phase) {
        self.ctx.observer.crash_point(phase);
    }

    /// Step 1 and the first half of step 2. Returns the device state.
    fn stop_and_harvest(&mut self) -> Result<Vec<u8>, SyncError> {
        self.stopped_at = Some(Instant::now());
        self.ctx.guest.stop()?;
        self.report.phases.stop_us = self.watch.lap();
        self.point(Phase::LeaderStopped);
        let device = self.ctx.guest.save_device_state()?;
        self.report.phases.save_us = self.watch.lap();
        self.point(Phase::LeaderSaved);
        self.ctx.harvest()?;
        self.report.dirty_local = self.ctx.pairing.open(self.header.basis()).count();
        self.report.phases.harvest_us = self.watch.lap();
        self.point(Phase::LeaderHarvested);
        Ok(device)
    }

    /// The second half of step 2: the union.
    fn exchange_sets(&mut self, device_bytes: usize) -> Result<DirtySet, SyncError> {
        let terms = self.ctx.terms();
        let LeaderContext { link, pairing, pool, .. } = &mut *self.ctx;
        let ours = pairing.in_flight();
        // The follower knows the rest already.
        let said = pool.written().unwrap_or(ours);
        link.send_set(&self.header, Kind::DirtySet, &terms, said, &self.deadlines)?;
        let (follower, mut union) = link.recv_set(&self.header, Kind::DirtySet, &terms, &self.deadlines)?;
        self.device_held = follower.device;
        // The follower says where its set differs from this one: the two guests wrote mostly the same pages.
        union.symmetric_difference_with(said);
        let mut union = ahead::whole_set(&mut self.ahead, said, union);
        self.report.dirty_peer = union.count();
        union.union_with(ours);
        self.report.union_pages = union.count();
        self.ctx.usual_pages = self.report.union_pages;
        self.report.device_bytes = device_bytes;
        self.report.full_transfer_bytes = (self.report.dirty_local * PAGE_BYTES + device_bytes) as u64;
        self.report.phases.exchange_us = self.watch.lap();
        self.point(Phase::LeaderExchanged);
        Ok(union)
    }

    /// Steps 3 and 4, as far as the transfer mode wants them.
    fn find(&mut self, union: &DirtySet) -> Result<Found, SyncError> {
        match self.report.transfer {
            TransferMode::All => {
                self.point(Phase::LeaderCompared);
                Ok(Found::Whole(union.iter().collect()))
            }
            TransferMode::Pages => Ok(Found::Whole(self.compare(union)?)),
            TransferMode::Delta => Ok(Found::Blocks(Box::new(self.compare_short(union)?))),
        }
    }

    /// Steps 3 and 4: the divergent pages.
    fn compare(&mut self, union: &DirtySet) -> Result<Vec<PageNumber>, SyncError> {
        let pages: Vec<PageNumber> = union.iter().collect();
        let mut divergent = Vec::new();
        for (index, batch) in pages.chunks(BATCH_PAGES).enumerate() {
            self.compare_batch(batch, |at, _, equal| {
                if !equal {
                    divergent.push(batch[at]);
                }
            })?;
            if index == 0 {
                self.point(Phase::LeaderHashed);
            }
        }
        self.compared(pages.len(), divergent.len());
        Ok(divergent)
    }

    /// Hashes `batch` here while the follower does the same, receives its hashes, and calls `each` with the place of each page in
    /// the batch, its hash here, and whether the follower's is the same.
    fn compare_batch(
        &mut self,
        batch: &[PageNumber],
        mut each: impl FnMut(usize, &PageHashValue, bool),
    ) -> Result<(), SyncError> {
        let LeaderContext { pool, link, hashes, guest, config, known_hashes, .. } = &mut *self.ctx;
        *known_hashes += pool.hash_pages_into(config.hash, guest.ram(), batch, hashes);
        let (ahead, hash_bytes) = (self.ahead.as_ref(), self.report.transfer.hash_bytes());
        let due = batch.iter().filter(|page| ahead::is_due(ahead, **page)).count();
        let body = match due {
            0 => &[],
            _ => link.expect(&self.header, Kind::Hashes, "a batch of hashes", &self.deadlines)?,
        };
        let mut news = theirs(body, due, hash_bytes)?;
        let mut known = ahead::their_hashes(ahead, hash_bytes);
        for (at, (page, ours)) in batch.iter().zip(hashes).enumerate() {
            let theirs = known(*page).or_else(|| news.next()).expect("as many are due as came");
            each(at, ours, ours[..hash_bytes] == *theirs);
        }
        Ok(())
    }

    /// Before the stop: as much of steps 2 to 5 as can be done while the guest runs.
    fn compare_ahead(&mut self) -> Result<(), SyncError> {
        let LeaderContext { config, usual_pages, pairing, .. } = &*self.ctx;
        let wanted = !self.ctx.idle && ahead::is_wanted(config, self.report.transfer, *usual_pages, pairing.pages());
        let terms = self.ctx.terms();
        if !wanted || !terms.ahead {
            return Ok(());
        }
        self.ctx.harvest()?;
        let LeaderContext { pool, link, guest, config, pairing, outgoing, .. } = &mut *self.ctx;
        let mut ahead = Ahead::ask(link, &self.header, &terms, pairing.pending(), &self.deadlines)?;
        let (zero_hash, hash_bytes) = (config.hash.zero_page(), self.report.transfer.hash_bytes());
        let mut divergent = Vec::new();
        pool.begin_ahead(config.hash, guest.ram());
        for batch in ahead.pages.chunks(BATCH_PAGES) {
            let ours = pool.hash_ahead(guest.ram(), batch);
            let body = link.expect(&self.header, Kind::AheadHashes, "a batch of hashes", &self.deadlines)?;
            let pairs = ours.iter().zip(theirs(body, batch.len(), hash_bytes)?);
            let differ = batch.iter().zip(pairs).filter(|(_, (ours, theirs))| ours[..hash_bytes] != **theirs);
            divergent.extend(differ.map(|(page, (ours, _))| (*page, *ours == zero_hash)));
            ahead.hashes.extend_from_slice(body);
        }
        divergent.truncate(ahead::MOST_COPIES);
        outgoing.copy_ahead(guest.ram(), divergent.into_iter());
        self.ahead = Some(ahead);
        self.report.phases.ahead_us = self.watch.lap();
        Ok(())
    }

    fn compared(&mut self, pages: usize, divergent: usize) {
        self.report.compared_pages = pages;
        self.report.divergent_pages = divergent;
        self.report.phases.compare_us = self.watch.lap();
        self.point(Phase::LeaderCompared);
    }

    /// Step 5, first half: from here on the guest is not needed any more.
    fn copy(&mut self, found: &Found, device: Vec<u8>) {
        let LeaderContext { outgoing, guest, pool, .. } = &mut *self.ctx;
        match found {
            Found::Whole(pages) => {
                outgoing.copy_from(guest.ram(), pages.iter().map(|page| (*page, None)), pool.written());
            }
            Found::Blocks(delta) => outgoing.copy_from(guest.ram(), delta.pages(), pool.written()),
        }
        self.report.copied_ahead = outgoing.used_ahead();
        outgoing.set_device(device);
        self.report.sent_pages = outgoing.pages();
        self.report.zero_pages = outgoing.zero_pages();
        self.report.phases.copy_us = self.watch.lap();
        self.point(Phase::LeaderCopied);
    }

    fn resume(&mut self) -> Result<(), SyncError> {
        self.ctx.guest.resume()?;
        if let Some(stopped_at) = self.stopped_at.take() {
            self.report.guest_stop_us = stopped_at.elapsed().as_micros() as u64;
        }
        self.report.resumed = true;
        self.report.phases.resume_us = self.watch.lap();
        self.ctx.observer.resumed();
        Ok(())
    }

    /// Step 5, second half.
    fn send_transfer(&mut self, found: &mut Found) -> Result<(), SyncError> {
        match found {
            Found::Whole(_) => self.send_whole()?,
            Found::Blocks(delta) => self.send_blocks(delta)?,
        }
        self.report.phases.transfer_us = self.watch.lap();
        self.point(Phase::LeaderSent);
        Ok(())
    }

    fn send_whole(&mut self) -> Result<(), SyncError> {
        let LeaderContext { outgoing, link, observer, .. } = &mut *self.ctx;
        let half = self.report.sent_pages / 2;
        let mut half_sent = false;
        outgoing.send_all(|pages, kind, parts| {
            link.send(&self.header, kind, parts, self.deadlines.next())?;
            if pages >= half && !half_sent {
                half_sent = true;
                observer.crash_point(Phase::LeaderSentHalf);
            }
            Ok::<(), SyncError>(())
        })
    }

    /// Step 7. Only here is the dirty set forgotten.
    fn await_ack(&mut self, found: &mut Found) -> Result<(), SyncError> {
        let mut kind = self.ctx.link.recv(&self.header, &self.deadlines)?;
        if let (Kind::Recheck, Found::Blocks(delta)) = (kind, found) {
            self.ctx.link.put_back(kind);
            self.resend(delta)?;
            kind = self.ctx.link.recv(&self.header, &self.deadlines)?;
        }
        if kind != Kind::Ack {
            return Err(SyncError::Unexpected { got: kind, wanted: "the acknowledgement" });
        }
        self.ctx.pairing.commit();
        self.ctx.pool.forget();
        self.ctx.cautious = false;
        self.report.phases.ack_us = self.watch.lap();
        self.point(Phase::LeaderAcked);
        Ok(())
    }

    fn finish(self) -> SyncReport {
        self.ctx.outgoing.trim();
        SyncReport {
            known_hashes: self.ctx.known_hashes,
            bytes_sent: self.ctx.link.bytes_sent,
            bytes_received: self.ctx.link.bytes_received,
            traffic: self.ctx.link.traffic,
            total_us: self.watch.total(),
            ..self.report
        }
    }

    fn fail(mut self, error: SyncError) -> SyncError {
        self.ctx.pairing.abort();
        self.ctx.pool.forget();
        self.ctx.cautious = error.hash_agreed_falsely();
        if matches!(error, SyncError::Diverged { .. }) {
            self.ctx.pairing.forget_peer();
        }
        // The guest first: its clients wait. The peer can wait for the courtesy.
        let resumed = if self.stopped_at.is_some() && self.ctx.observer.may_run() { self.resume() } else { Ok(()) };
        self.ctx.link.send_abort(&self.header, &error);
        match resumed {
            Err(SyncError::Guest(resume)) => SyncError::NotResumed { cause: Box::new(error), resume },
            _ => error,
        }
    }
}
