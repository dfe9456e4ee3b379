//! The way in: frames from the uplink become batches, batches become proposals.
//!
//! A batch is proposed as soon as the uplink is empty or the batch is full, and while few proposals are on their way;
//! under load the next batch therefore grows while the last ones commit, and in a long slot for a moment more. Only a
//! serving leader orders; everybody else throws away what the bridge floods to its TAP. Pieces of a TCP stream that come one
//! behind the other have become one frame by then ([`dataplane::coalesce`]).

use consensus::Entry;
use dataplane::batch::{BatchBuilder, MIN_BATCH_BYTES};
use dataplane::stages::Sizes;
use dataplane::uplink::filter::{Filter, Rule};
use dataplane::uplink::{Burst, Intake};

use super::admission;
use super::memory::shared;
use super::reactor::Reactor;
use super::setup::heartbeat_interval_us;
use crate::config::Uplink;

/// Largest batch.
const BATCH_BYTES: usize = 256 << 10;
/// Proposals of inputs that may be on their way at once.
const PROPOSALS_IN_FLIGHT: u64 = 4;
/// Committed input that may wait for the guest; then the uplink's own queue fills and drops, as a NIC's does.
const BACKLOG_BYTES: usize = 8 << 20;
/// Frames that are taken or thrown away in one turn. Measured with 64 bytes each: what three replicas do once per batch makes 512 of
/// them pass 14 % faster than 256. With a few more a batch is no longer one record of a lane through memory.
pub(super) const RX_BUDGET_FRAMES: usize = 512;

/// The filter, and counters.
pub struct Ingress {
    filter: Filter,
    watched: bool,
    last_proposed: u64,
    /// No input is taken before this time: the secondary is behind, or more may come together.
    pub not_before_us: u64,
    /// How often the secondary was behind.
    pub pauses: u64,
    /// The last burst did not empty the uplink, which may say so no more.
    pub more: bool,
    /// The uplink is gone: the group must be started anew.
    pub failure: Option<std::io::Error>,
    /// Frames that were ordered.
    pub frames_in: u64,
    /// Sizes of the batches that were proposed, bytes.
    pub proposal_bytes: Sizes,
}

impl Ingress {
    /// Nothing taken yet; the filter is that of `uplink`.
    pub fn new(uplink: &Uplink) -> Self {
        let rules: Vec<Rule> = uplink.filter.iter().map(|rule| rule.rule.clone()).collect();
        let filter = Filter::new(&rules, uplink.filter_default.into());
        Self {
            filter,
            watched: true,
            last_proposed: 0,
            not_before_us: 0,
            pauses: 0,
            more: false,
            failure: None,
            frames_in: 0,
            proposal_bytes: Sizes::default(),
        }
    }

    /// Notes whether the uplink should be watched; says whether that is a change.
    pub fn set_watched(&mut self, watched: bool) -> bool {
        std::mem::replace(&mut self.watched, watched) != watched
    }

    /// A new lead: what an earlier one proposed may never be committed.
    pub fn forget_proposals(&mut self) {
        self.last_proposed = 0;
    }

    /// The filter's rules as written in `uplink`, and how many frames each decided on; the last is the default.
    pub fn filter_counts(&self, uplink: &Uplink) -> Vec<(String, u64)> {
        let rules = uplink.filter.iter().map(|rule| rule.text.clone());
        let default = format!("{:?} (default)", uplink.filter_default).to_lowercase();
        rules.chain([default]).zip(self.filter.hits().map(|(_, hits)| hits)).collect()
    }

    /// When inputs that are held back may be taken.
    pub fn next_deadline_us(&self, now_us: u64) -> u64 {
        if self.not_before_us > now_us { self.not_before_us } else { u64::MAX }
    }

    /// Whether inputs were proposed that are not committed yet.
    pub fn in_flight(&self, commit_index: u64) -> bool {
        self.last_proposed > commit_index
    }
}

/// The filter that an uplink's file asks for.
pub fn filter_of(uplink: &Uplink) -> Filter {
    let rules: Vec<Rule> = uplink.filter.iter().map(|rule| rule.rule.clone()).collect();
    Filter::new(&rules, uplink.filter_default.into())
}

impl Reactor<'_> {
    /// Whether there is room for more input on its way to the guest.
    pub(super) fn may_take_inputs(&mut self, now: u64) -> bool {
        let replica = self.ordering.replica();
        replica.last_index().0.saturating_sub(replica.commit_index().0) < PROPOSALS_IN_FLIGHT
            && self.delivery.backlog_bytes() < BACKLOG_BYTES
            && !self.ordering.log().is_filling_up()
            && !replica.second_lags(now)
            && now >= self.ingress.not_before_us
            && self.arena.has_room(MIN_BATCH_BYTES)
    }

    /// Takes frames from the uplink: proposes them as a serving leader, throws them away otherwise.
    pub(super) fn take_inputs(&mut self, now: u64) -> Burst {
        if !self.is_serving() {
            let burst = self.egress.uplink().discard_burst(RX_BUDGET_FRAMES);
            return self.note_burst(burst);
        }
        if !self.may_take_inputs(now) {
            return Burst::default();
        }
        let Some(room) = self.arena.room(MIN_BATCH_BYTES, BATCH_BYTES) else { return Burst::default() };
        let mut batch = BatchBuilder::within(room);
        let mut intake = Intake::new(&mut batch, &mut self.ingress.filter);
        let burst = self.egress.uplink().recv_burst(&mut intake, RX_BUDGET_FRAMES);
        let (frames, bytes) = (batch.len(), batch.seal());
        let burst = self.note_burst(burst);
        if frames > 0 {
            self.ingress.proposal_bytes.add(bytes);
            let payload = shared(self.arena.freeze(bytes));
            if let Some(index) = self.ordering.propose(now, Entry::Input(payload)) {
                self.ingress.last_proposed = index.0;
                self.ingress.frames_in += frames as u64;
                let heartbeat_us = heartbeat_interval_us(&self.vm.policy);
                let pause_us = admission::pause_us(self.ordering.replica().second_lag(now), heartbeat_us);
                let gather_us = self.lead.as_ref().map_or(0, |lead| lead.slots.gather_us(now));
                self.ingress.not_before_us = now + pause_us.max(gather_us);
                self.ingress.pauses += u64::from(pause_us > 0);
            }
            // Not proposed (the lead was just lost): the frames are dropped, and the clients' TCP sends them again.
        }
        burst
    }

    /// What was taken. A port that is gone is noted: the group cannot go on without it.
    fn note_burst(&mut self, burst: std::io::Result<Burst>) -> Burst {
        let burst = burst.unwrap_or_else(|error| {
            self.ingress.failure = Some(error);
            Burst::default()
        });
        self.ingress.more = burst.more;
        burst
    }
}
