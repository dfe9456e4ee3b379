//! Rejoin: a syncvm over all pages, in rounds while the leader's guest keeps running.
//!
//! Round 0 covers every page, each later round what was written since; both sides hash, and only what
//! differs crosses the wire, so a replica that is mostly right costs little. The joiner's guest does not
//! run and is worth nothing meanwhile, so it takes pages directly. When little is left, the caller proposes
//! an ordinary `SyncVm`, whose dirty set is that rest: [`lead_syncvm`](crate::exchange::lead_syncvm) stops
//! the guest and makes the joiner whole.
//!
//! A round over every page compares in two steps: digests of granules of 2 MiB first, and page hashes only of granules that
//! differ (the tree of hashes of PLOVER's authors has more levels; two make the rest small enough).
//!
//! The order within a round is what makes it correct: **harvest, then read**. A page written after it was
//! read is in the next harvest; a page read while it is written is too.

mod granules;
mod pace;

use std::time::{Duration, Instant};

use pace::{Pace, RoundClock};

pub use pace::RejoinProgress;

use crate::exchange::{
    BATCH_PAGES, Channel, Deadlines, FollowerContext, Guest, LeaderContext, Link, Observer, Phase, Standing, SyncError,
    compare,
};
use crate::hash::PageHashValue;
use crate::page::{PAGE_BYTES, PageNumber};
use crate::ram::GuestRam;
use crate::transfer::{Checksum, Header, Kind, PagesChunk, Scope, Terms, TransferError, WireError};

/// When to stop doing rounds.
#[derive(Clone, Copy, Debug)]
pub struct RejoinPolicy {
    /// At most this many rounds (round 0 included).
    pub max_rounds: u32,
    /// Few enough pages for the stop that follows.
    pub target_pages: usize,
    /// No new round begins when this time has passed since the end of round 0, which takes as long as all of RAM takes.
    pub max_time: Duration,
    /// Pages sent per second at most, in MiB; 0: no limit.
    pub mib_per_s: u64,
    /// The whole rejoin fails after this time.
    pub give_up_after: Duration,
    /// What happens when rounds or time are used up.
    pub at_limit: AtLimit,
}

impl Default for RejoinPolicy {
    fn default() -> Self {
        Self {
            max_rounds: 12,
            target_pages: 2_000,
            max_time: Duration::from_secs(30),
            mib_per_s: 0,
            give_up_after: Duration::from_secs(300),
            at_limit: AtLimit::StopAnyway,
        }
    }
}

/// What happens when the guest writes faster than rounds can carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtLimit {
    /// Go on to the stop; it will be longer.
    StopAnyway,
    /// Fail the rejoin.
    GiveUp,
}

/// Why the rounds ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoundsEnd {
    /// Few enough pages are left.
    SmallEnough,
    /// A round left no fewer pages than the one before: more of them are pointless.
    NotConverging,
    /// `max_rounds` or `max_time` is used up.
    Limit,
}

impl RejoinPolicy {
    /// Time that the pages of `ram_bytes` need with this limit on top of what they need without it.
    #[must_use]
    pub fn time_for(&self, ram_bytes: u64) -> Duration {
        ram_bytes.checked_div(self.mib_per_s << 20).map_or(Duration::ZERO, Duration::from_secs)
    }

    /// Whether to end after `rounds` rounds, with `left` pages to do and `before` pages done in the last one.
    #[must_use]
    pub fn decide(&self, rounds: u32, elapsed: Duration, left: usize, before: usize) -> Option<RoundsEnd> {
        if rounds == 0 {
            // A joiner is only worth a stop after it has been given every page once.
            None
        } else if left <= self.target_pages {
            Some(RoundsEnd::SmallEnough)
        } else if rounds >= self.max_rounds || elapsed >= self.max_time {
            Some(RoundsEnd::Limit)
        } else if rounds >= 3 && left >= before {
            Some(RoundsEnd::NotConverging)
        } else {
            None
        }
    }
}

/// What the rounds did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RejoinReport {
    /// Rounds done.
    pub rounds: u32,
    /// Pages compared in all rounds together.
    pub compared_pages: u64,
    /// Pages that differed and were sent.
    pub sent_pages: u64,
    /// Pages left for the syncvm that follows (leader only).
    pub left_pages: usize,
    /// Why the rounds ended (leader only).
    pub end: Option<RoundsEnd>,
    /// Bytes sent to the peer.
    pub bytes_sent: u64,
    /// Bytes received from it.
    pub bytes_received: u64,
    /// The duration in µs.
    pub total_us: u64,
}

/// Leader: brings the follower close to this guest while it runs. `number` is the last commit index: not
/// below any earlier `SyncVm` of this view, and below the one that follows.
///
/// # Errors
/// See [`SyncError`]. The guest runs as before, and the follower needs another rejoin.
pub fn lead_rejoin<G: Guest, C: Channel, O: Observer>(
    ctx: &mut LeaderContext<G, C, O>,
    number: u64,
    policy: &RejoinPolicy,
) -> Result<RejoinReport, SyncError> {
    ctx.link.reset_counts();
    ctx.rejoins = ctx.rejoins.wrapping_add(1);
    ctx.pairing.forget_peer();
    ctx.pool.forget();
    let mut header = Header {
        group: ctx.config.group,
        view: ctx.view,
        // Later than every syncvm so far, whose leftovers may still arrive; rounds come before a syncvm of the
        // same number.
        number: number.max(ctx.last_number + 1),
        scope: Scope::Rejoin,
        round: u32::from(ctx.rejoins) << 16,
    };
    let result = rounds(ctx, &mut header, policy);
    if let Err(error) = &result {
        ctx.pairing.abort();
        ctx.link.send_abort(&header, error);
    }
    result
}

fn rounds<G: Guest, C: Channel, O: Observer>(
    ctx: &mut LeaderContext<G, C, O>,
    header: &mut Header,
    policy: &RejoinPolicy,
) -> Result<RejoinReport, SyncError> {
    let start = Instant::now();
    let deadlines = Deadlines { end: start + policy.give_up_after, silence: ctx.config.silence_timeout };
    let mut report = RejoinReport::default();
    let mut before = usize::MAX;
    let mut pace = Pace::new(policy.mib_per_s);
    let mut later_rounds = start;
    loop {
        live_harvest(ctx)?;
        let left = ctx.pairing.pending_count();
        if let Some(end) = policy.decide(report.rounds, later_rounds.elapsed(), left, before) {
            if end != RoundsEnd::SmallEnough && policy.at_limit == AtLimit::GiveUp {
                let target = policy.target_pages;
                return Err(SyncError::NotConverging { left, target });
            }
            ctx.link.send(header, Kind::RoundsDone, &[], deadlines.next())?;
            report.left_pages = left;
            report.end = Some(end);
            break;
        }
        before = left;
        lead_round(ctx, header, &deadlines, &mut pace, &mut report)?;
        if report.rounds == 0 {
            later_rounds = Instant::now();
        }
        report.rounds += 1;
        header.round += 1;
        ctx.observer.crash_point(Phase::LeaderRound);
    }
    report.bytes_sent = ctx.link.bytes_sent;
    report.bytes_received = ctx.link.bytes_received;
    report.total_us = start.elapsed().as_micros() as u64;
    Ok(report)
}

/// Harvests a running guest; with a tracker that cannot, the guest is stopped for the moment it takes.
fn live_harvest<G: Guest, C: Channel, O: Observer>(ctx: &mut LeaderContext<G, C, O>) -> Result<(), SyncError> {
    if !ctx.guest.harvest_needs_stop() {
        return ctx.harvest();
    }
    ctx.guest.stop()?;
    let harvested = ctx.harvest();
    if ctx.observer.may_run() {
        ctx.guest.resume()?;
    }
    harvested
}

/// One round over what was harvested: set, then per batch hashes and divergent pages, then the acknowledgement.
fn lead_round<G: Guest, C: Channel, O: Observer>(
    ctx: &mut LeaderContext<G, C, O>,
    header: &Header,
    deadlines: &Deadlines,
    pace: &mut Pace,
    report: &mut RejoinReport,
) -> Result<(), SyncError> {
    let set = ctx.pairing.open(header.basis());
    let (pages, all): (Vec<PageNumber>, bool) = (set.iter().collect(), set.is_all());
    let terms = ctx.terms();
    let set = ctx.pairing.in_flight();
    ctx.link.send_set(header, Kind::RoundSet, &terms, set, deadlines)?;
    let mut clock = RoundClock::start(header, pages.len());
    let mut hashes = Vec::new();
    for section in pages.chunks(BATCH_PAGES) {
        ctx.pool.pool().hash_pages_into(ctx.config.hash, ctx.guest.ram(), section, &mut hashes);
        let (section_pages, hashes) = if all {
            granules::lead(ctx, header, deadlines, section, &hashes)?
        } else {
            (section.to_vec(), std::mem::take(&mut hashes))
        };
        report.compared_pages += section.len() as u64;
        clock.done(section.len() - section_pages.len());
        for (batch, ours) in section_pages.chunks(BATCH_PAGES).zip(hashes.chunks(BATCH_PAGES)) {
            report.sent_pages += lead_batch(ctx, header, deadlines, pace, batch, ours)?;
            clock.done(batch.len());
            ctx.observer.progress(clock.progress());
        }
        ctx.observer.progress(clock.progress());
    }
    ctx.link.expect(header, Kind::RoundAck, "the end of the round", deadlines)?;
    ctx.pairing.commit();
    // Those pages are done: nothing to be hashed in the background.
    ctx.pool.forget();
    Ok(())
}

/// Receives the joiner's hashes of a batch and sends the pages that differ. How many.
fn lead_batch<G: Guest, C: Channel, O: Observer>(
    ctx: &mut LeaderContext<G, C, O>,
    header: &Header,
    deadlines: &Deadlines,
    pace: &mut Pace,
    batch: &[PageNumber],
    ours: &[PageHashValue],
) -> Result<u64, SyncError> {
    let mut divergent = Vec::new();
    let theirs = ctx.link.expect(header, Kind::Hashes, "a batch of hashes", deadlines)?;
    compare(batch, ours, theirs, &mut divergent)?;
    ctx.outgoing.copy_pages(ctx.guest.ram(), &divergent);
    let mut checksum = Checksum::default();
    let link = &mut ctx.link;
    let most_bytes = pace.message_bytes(deadlines.silence);
    ctx.outgoing.send_pages_within(most_bytes, &mut checksum, |_, kind, parts| {
        pace.wait_for(parts.iter().map(|part| part.len()).sum(), deadlines.end)?;
        link.send(header, kind, parts, deadlines.next())
    })?;
    let value = checksum.value().to_le_bytes();
    ctx.link.send(header, Kind::BatchEnd, &[&value], deadlines.next())?;
    Ok(divergent.len() as u64)
}

/// Follower: takes part in the leader's next rejoin, until the leader says that a syncvm follows. From the
/// first round on this guest is [`Standing::Joining`] and must neither run nor lead.
///
/// # Errors
/// See [`SyncError`]. The guest then needs another rejoin, unless no round had begun.
pub fn follow_rejoin<G: Guest, C: Channel, O: Observer>(
    ctx: &mut FollowerContext<G, C, O>,
    give_up_after: Duration,
) -> Result<RejoinReport, SyncError> {
    ctx.link.reset_counts();
    let start = Instant::now();
    let deadlines = Deadlines { end: start + give_up_after, silence: ctx.config.silence_timeout };
    let mut report = loop {
        let mut header = first_round(ctx, &deadlines)?;
        match follow_rounds(ctx, &mut header, &deadlines) {
            Ok(report) => break report,
            // That was an attempt which the leader has given up already.
            Err(SyncError::Superseded { view, .. }) if view == ctx.view && ctx.link.kept(is_first_round) => {}
            Err(error) => {
                ctx.link.send_abort(&header, &error);
                return Err(error);
            }
        }
    };
    report.bytes_sent = ctx.link.bytes_sent;
    report.bytes_received = ctx.link.bytes_received;
    report.total_us = start.elapsed().as_micros() as u64;
    Ok(report)
}

fn follow_rounds<G: Guest, C: Channel, O: Observer>(
    ctx: &mut FollowerContext<G, C, O>,
    header: &mut Header,
    deadlines: &Deadlines,
) -> Result<RejoinReport, SyncError> {
    let mut report = RejoinReport::default();
    while follow_round(ctx, header, deadlines, &mut report)? {
        report.rounds += 1;
        header.round += 1;
        ctx.observer.crash_point(Phase::FollowerRound);
    }
    Ok(report)
}

fn is_first_round(kind: Kind, header: &Header) -> bool {
    kind == Kind::RoundSet && header.scope == Scope::Rejoin && header.round & 0xffff == 0
}

/// Waits for the first message of a round 0 in this view, and keeps it.
fn first_round<G: Guest, C: Channel, O: Observer>(
    ctx: &mut FollowerContext<G, C, O>,
    deadlines: &Deadlines,
) -> Result<Header, SyncError> {
    let deadline = deadlines.next();
    loop {
        let (kind, header) = ctx.link.recv_any(ctx.config.group, deadline)?;
        if header.view > ctx.view {
            ctx.link.put_back(kind);
            return Err(SyncError::Superseded { view: header.view, number: header.number });
        }
        if header.view == ctx.view && is_first_round(kind, &header) {
            ctx.link.put_back(kind);
            return Ok(header);
        }
        if Instant::now() >= deadline {
            return Err(crate::exchange::ChannelError::Timeout.into());
        }
    }
}

/// One round; `false` when the leader says that the rounds are done.
fn follow_round<G: Guest, C: Channel, O: Observer>(
    ctx: &mut FollowerContext<G, C, O>,
    header: &Header,
    deadlines: &Deadlines,
    report: &mut RejoinReport,
) -> Result<bool, SyncError> {
    let kind = ctx.link.recv(header, deadlines)?;
    if kind == Kind::RoundsDone {
        return Ok(false);
    }
    ctx.link.put_back(kind);
    let terms = ctx.terms();
    let (leader, set) = ctx.link.recv_set(header, Kind::RoundSet, &terms, deadlines)?;
    ctx.config.hash = leader.hash;
    if header.round & 0xffff == 0 {
        begin_joining(ctx, &leader, set.is_all())?;
    } else if set.is_all() {
        // The guest rewrote everything; what the leader knows is relative to this round from now on.
        ctx.pairing.adopt(leader.basis);
    }
    let pages: Vec<PageNumber> = set.iter().collect();
    let mut clock = RoundClock::start(header, pages.len());
    let ram = ctx.guest.ram().clone();
    let mut hashes = Vec::new();
    for section in pages.chunks(BATCH_PAGES) {
        ctx.pool.pool().hash_pages_into(ctx.config.hash, &ram, section, &mut hashes);
        let (section_pages, hashes) = if set.is_all() {
            granules::follow(ctx, header, deadlines, section, &hashes)?
        } else {
            (section.to_vec(), std::mem::take(&mut hashes))
        };
        report.compared_pages += section.len() as u64;
        clock.done(section.len() - section_pages.len());
        for (batch, ours) in section_pages.chunks(BATCH_PAGES).zip(hashes.chunks(BATCH_PAGES)) {
            ctx.link.send(header, Kind::Hashes, &[ours.as_flattened()], deadlines.next())?;
            report.sent_pages += take_batch(&mut ctx.link, header, deadlines, &ram, batch)?;
            clock.done(batch.len());
            ctx.observer.progress(clock.progress());
        }
        ctx.observer.progress(clock.progress());
    }
    ctx.link.send(header, Kind::RoundAck, &[], deadlines.next())?;
    Ok(true)
}

/// The guest stops being anything; what it wrote so far is covered by round 0.
fn begin_joining<G: Guest, C: Channel, O: Observer>(
    ctx: &mut FollowerContext<G, C, O>,
    leader: &Terms,
    covers_all: bool,
) -> Result<(), SyncError> {
    if !covers_all {
        return Err(WireError::Value { field: "first round (it does not cover every page)", value: 0 }.into());
    }
    ctx.guest.stop()?;
    ctx.lose_guest();
    // Before the harvest: what it writes is covered by round 0 as well.
    ctx.guest.reset_devices()?;
    ctx.harvest()?;
    ctx.pairing.restart(leader.basis);
    ctx.standing = Standing::Joining;
    Ok(())
}

/// Writes the divergent pages of one batch into the joiner's guest as they come.
fn take_batch<C: Channel>(
    link: &mut Link<C>,
    header: &Header,
    deadlines: &Deadlines,
    ram: &GuestRam,
    batch: &[PageNumber],
) -> Result<u64, SyncError> {
    let mut checksum = Checksum::default();
    let mut written = 0;
    loop {
        let kind = link.recv(header, deadlines)?;
        let body = link.body();
        match kind {
            Kind::Pages => {
                checksum.add(Kind::Pages, &[body]);
                written += write_chunk(body, ram, batch)?;
            }
            Kind::BatchEnd => {
                let received = checksum.value();
                if body == received.to_le_bytes() {
                    return Ok(written);
                }
                let announced = crate::wire::Reader(body).u64("checksum")?;
                return Err(TransferError::Checksum { announced, received }.into());
            }
            got => {
                return Err(SyncError::Unexpected { got, wanted: "pages of the round" });
            }
        }
    }
}

fn write_chunk(body: &[u8], ram: &GuestRam, batch: &[PageNumber]) -> Result<u64, SyncError> {
    let chunk = PagesChunk::decode(body)?;
    let mut written = 0;
    for (page, bytes) in chunk.pages() {
        if batch.binary_search(&page).is_err() {
            return Err(TransferError::NotInUnion { page }.into());
        }
        match bytes {
            Some(bytes) => {
                debug_assert_eq!(bytes.len(), PAGE_BYTES);
                ram.write_page(page, bytes);
            }
            None => ram.zero_page(page),
        }
        written += 1;
    }
    Ok(written)
}
