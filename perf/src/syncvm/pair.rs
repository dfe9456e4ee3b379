//! A leader and a follower, each with its guest on a core of its own, and the encrypted bulk lane between them.

use std::ffi::OsString;
use std::io::IoSlice;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dataplane::fabric::bulk::{BulkError, BulkLink};
use dataplane::fabric::{FabricKey, Listener, PeerId, Security};
use syncvm::Pairing;
use syncvm::exchange::{
    Channel, ChannelError, ExchangeConfig, FollowerContext, Guest, LeaderContext, Observer, Parts, SyncReport,
    follow_syncvm, lead_syncvm,
};
use syncvm::hash::HashPool;

use super::compare::{Difference, compare};
use super::guest::SyntheticGuest;
use super::workload::{Side, Slot};
use crate::fabric::rtt::two_nodes;
use crate::pin;

const DEADLINE: Duration = Duration::from_secs(60);
const GROUP: u64 = 5;

/// How the two guests are kept equal.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// For tables.
    pub name: &'static str,
    /// Whether the follower's guest runs too, and is given what it did differently. Otherwise it stands still and is given all
    /// that the leader's wrote, as with checkpointing.
    pub both_run: bool,
    /// What differs from the defaults of the product.
    pub set: fn(&mut ExchangeConfig),
}

impl Mode {
    /// As the product does it.
    pub const DEFAULT: Mode = Mode { name: "default", both_run: true, set: |_| () };

    fn config(&self) -> ExchangeConfig {
        // A machine that is busy with something else is no reason to fail.
        let defaults =
            ExchangeConfig { silence_timeout: DEADLINE, total_timeout: DEADLINE, ..ExchangeConfig::new(GROUP) };
        let mut config = defaults;
        (self.set)(&mut config);
        config
    }
}

/// What one slot and its syncvm came to.
#[derive(Clone, Debug)]
pub struct Synced {
    /// Where the guests differed before.
    pub difference: Difference,
    /// The leader's report.
    pub led: SyncReport,
    /// The follower's.
    pub followed: SyncReport,
}

impl Synced {
    /// How long the leader's guest stood still.
    #[must_use]
    pub fn stop_ms(&self) -> f64 {
        self.led.guest_stop_us as f64 / 1_000.0
    }

    /// Bytes in both directions: bitmaps, hashes, pages, device state and headers, without the cipher's and TCP's share.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.led.bytes_sent + self.led.bytes_received
    }
}

/// The bulk lane as syncvm's channel, as the product has it.
struct Lane(BulkLink);

impl Channel for Lane {
    fn send(&mut self, kind: u16, parts: &[IoSlice<'_>], deadline: Instant) -> Result<(), ChannelError> {
        self.0.send(kind, parts, deadline).map_err(|error| channel_error(&error))
    }

    fn recv(&mut self, buf: &mut Vec<u8>, deadline: Instant) -> Result<u16, ChannelError> {
        self.0.recv(buf, deadline).map_err(|error| channel_error(&error))
    }
}

fn channel_error(error: &BulkError) -> ChannelError {
    if error.is_timeout() { ChannelError::Timeout } else { ChannelError::Io(std::io::Error::other(error.to_string())) }
}

/// Its guest may always run.
struct Willing;

impl Observer for Willing {
    fn may_run(&mut self) -> bool {
        true
    }
}

/// Leader and follower.
pub struct Pair {
    leader: LeaderContext<SyntheticGuest, Lane, Willing>,
    follower: FollowerContext<SyntheticGuest, Lane, Willing>,
    cpus: [usize; 2],
    number: u64,
    /// Held for their threads.
    _listeners: [Listener; 2],
}

impl Pair {
    /// Two guests of `pages` pages, which one syncvm over all of them has made equal. `arguments` make this program a guest.
    ///
    /// # Errors
    /// Not root, or anything that the guests need is missing.
    pub fn start(pages: usize, arguments: &[OsString]) -> Result<Pair> {
        let cpus = pin::two_cpus()?;
        let (listeners, replicas) = two_nodes(&Security::Encrypted(FabricKey::generate()?))?;
        let left = listeners[0].register("perf", replicas.clone(), PeerId(0))?;
        let right = listeners[1].register("perf", replicas, PeerId(1))?;
        let deadline = Instant::now() + DEADLINE;
        let dialed = left.bulk.dial(PeerId(1), 1, 1, deadline)?;
        let taken = right.bulk.wait(deadline).ok_or_else(|| anyhow!("the connection did not come"))?.link;
        let parts = |side, cpu, link| -> Result<Parts<SyntheticGuest, Lane, Willing>> {
            let guest = SyntheticGuest::start(side, pages, cpu, arguments)?;
            let config = Mode::DEFAULT.config();
            // No workers: each side has one core, which the calling thread is on.
            let pool = Arc::new(HashPool::new(0));
            Ok(Parts { guest, channel: Lane(link), observer: Willing, config, view: 1, pool })
        };
        let leader = LeaderContext::new(parts(Side::Leader, cpus[0], dialed)?, Pairing::fresh(pages));
        let follower = FollowerContext::new(parts(Side::Follower, cpus[1], taken)?);
        let mut pair = Pair { leader, follower, cpus, number: 0, _listeners: listeners };
        pair.sync(Mode::DEFAULT).context("the first syncvm")?;
        Ok(pair)
    }

    /// Both guests run for a slot, then a syncvm as `mode` has it. Afterwards they are equal, byte by byte.
    ///
    /// # Errors
    /// A guest or the exchange fails, or the guests differ afterwards.
    pub fn slot(&mut self, slot: Slot, mode: Mode) -> Result<Synced> {
        self.leader.guest.run(slot)?;
        if mode.both_run {
            self.follower.guest.run(slot)?;
        }
        let difference = self.difference();
        let (led, followed) = self.sync(mode)?;
        Ok(Synced { difference, led, followed })
    }

    fn difference(&self) -> Difference {
        compare(self.leader.guest.ram(), self.follower.guest.ram())
    }

    fn sync(&mut self, mode: Mode) -> Result<(SyncReport, SyncReport)> {
        self.number += 1;
        let [leader_cpu, follower_cpu] = self.cpus;
        let (number, Pair { leader, follower, .. }) = (self.number, &mut *self);
        (leader.config, follower.config) = (mode.config(), mode.config());
        let start = Barrier::new(2);
        let (led, followed) = std::thread::scope(|scope| {
            // Threads of their own, because they are pinned. Neither begins before the other has a CPU.
            let pinned = |cpu: usize| {
                let pinned = pin::pin(cpu);
                start.wait();
                pinned
            };
            let leading = scope.spawn(move || pinned(leader_cpu).and_then(|()| Ok(lead_syncvm(leader, number)?)));
            let following =
                scope.spawn(move || pinned(follower_cpu).and_then(|()| Ok(follow_syncvm(follower, number)?)));
            (leading.join(), following.join())
        });
        let led = led.map_err(|_| anyhow!("the leader panicked"))?.context("the leader")?;
        let followed = followed.map_err(|_| anyhow!("the follower panicked"))?.context("the follower")?;
        let left = self.difference();
        ensure!(left.pages.is_empty(), "after a syncvm ({}) {} pages differ", mode.name, left.pages.len());
        let devices = self.leader.guest.device() == self.follower.guest.device();
        ensure!(devices, "after a syncvm ({}) the device states differ", mode.name);
        Ok((led, followed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::syncvm::guest::tests::arguments;
    use crate::syncvm::workload::Shape;
    use syncvm::transfer::TransferMode;

    #[test]
    fn a_slot_is_reported_as_it_was_and_leaves_equal_guests() {
        if !rig::is_root() {
            eprintln!("skipped: needs root for the userfaultfd of another process");
            return;
        }
        let mut pair = Pair::start(2048, &arguments()).unwrap();
        let slot = Slot { seed: 9, turn: 0, dirty: 500, different: 100, shape: Shape::REDIS };
        let synced = pair.slot(slot, Mode::DEFAULT).unwrap();
        assert_eq!((synced.led.dirty_local, synced.led.union_pages), (500, 500));
        assert_eq!((synced.led.divergent_pages, synced.difference.pages.len()), (100, 100));
        // Zero words are not sent, and digests of blocks are.
        let blocks = synced.difference.block_bytes();
        assert!((blocks / 4..2 * blocks).contains(&synced.bytes()), "{} bytes for {blocks}", synced.bytes());
        assert!(synced.stop_ms() > 0.0);
        let synced = pair.slot(
            Slot { turn: 1, ..slot },
            Mode { both_run: false, set: |config| config.transfer = TransferMode::All, ..Mode::DEFAULT },
        );
        let Synced { difference, led, .. } = synced.unwrap();
        assert_eq!(difference.pages.len(), 500);
        assert_eq!((led.dirty_local, led.dirty_peer, led.sent_pages, led.compared_pages), (500, 0, 500, 0));
        let written = slot.pages(2048);
        let page = (0..).map(syncvm::PageNumber).find(|page| !written.contains(page)).unwrap();
        pair.follower.guest.ram().zero_page(page);
        let error = format!("{:#}", pair.slot(slot, Mode::DEFAULT).unwrap_err());
        assert!(error.contains("1 pages differ"), "{error}");
    }
}
