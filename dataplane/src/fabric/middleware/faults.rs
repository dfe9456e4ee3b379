//! Connections that end, and peers that fall silent for a while, as a seed decides.

use super::super::{Fabric, FabricEvent, PeerId, SendError};
use super::held::Held;
use super::random::Random;
use super::{Poll, leave_to};

/// How often what goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultConfig {
    /// Decides.
    pub seed: u64,
    /// Per message sent or received: the connection ends before or after it.
    pub losses_per_million: u32,
    /// Per message received: nothing of that peer arrives for a while, this message included.
    pub stalls_per_million: u32,
    /// The longest stall, µs.
    pub longest_stall_us: u64,
}

/// Injects faults; see the module.
#[derive(Debug)]
pub struct Faulty<F> {
    inner: F,
    config: FaultConfig,
    random: Random,
    held: Held,
    /// Connections that we ended and whose end was not reported yet: nothing of them arrives any more.
    ended: Vec<PeerId>,
    losses: u64,
    stalls: u64,
}

impl<F: Fabric> Faulty<F> {
    /// Injects faults around `inner`.
    pub fn new(inner: F, config: FaultConfig) -> Faulty<F> {
        let random = Random::new(config.seed);
        Faulty { inner, config, random, held: Held::default(), ended: Vec::new(), losses: 0, stalls: 0 }
    }

    /// Connections ended so far.
    pub fn losses(&self) -> u64 {
        self.losses
    }

    /// Stalls so far.
    pub fn stalls(&self) -> u64 {
        self.stalls
    }

    fn end(&mut self, peer: PeerId) {
        self.losses += 1;
        self.held.forget(peer);
        self.ended.push(peer);
        self.inner.disconnect(peer);
    }

    fn poll_with(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>), poll: Poll<F>) {
        let Faulty { inner, config, random, held, ended, stalls, .. } = self;
        let mut to_end = Vec::new();
        poll(inner, now_us, &mut |event| match event {
            FabricEvent::Message { peer, .. } if ended.contains(&peer) || to_end.contains(&peer) => {}
            FabricEvent::Message { peer, bytes } => {
                // Also what is due already goes first.
                let until_us = held.last_due_us(peer);
                if until_us.is_none() && random.happens(config.stalls_per_million) {
                    *stalls += 1;
                    held.keep(now_us + 1 + random.below(config.longest_stall_us.max(1)), peer, bytes);
                } else if let Some(until_us) = until_us {
                    held.keep(until_us, peer, bytes);
                } else if random.happens(config.losses_per_million) {
                    if random.happens(500_000) {
                        sink(event);
                    }
                    to_end.push(peer);
                } else {
                    sink(event);
                }
            }
            FabricEvent::Lost { peer, .. } => {
                held.forget(peer);
                ended.retain(|of| *of != peer);
                to_end.retain(|of| *of != peer);
                sink(event);
            }
            other => sink(other),
        });
        for peer in to_end {
            self.end(peer);
        }
        self.held.release(now_us, sink);
    }
}

impl<F: Fabric> Fabric for Faulty<F> {
    fn send(&mut self, peer: PeerId, parts: &[&[u8]]) -> Result<(), SendError> {
        if !self.inner.is_connected(peer) || !self.random.happens(self.config.losses_per_million) {
            return self.inner.send(peer, parts);
        }
        // Accepted, and perhaps on its way when the connection ends.
        if self.random.happens(500_000) {
            self.inner.send(peer, parts)?;
        }
        self.end(peer);
        Ok(())
    }

    fn poll(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        self.poll_with(now_us, sink, F::poll);
    }

    fn poll_lanes(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        self.poll_with(now_us, sink, F::poll_lanes);
    }

    fn next_deadline_us(&self) -> u64 {
        self.inner.next_deadline_us().min(self.held.next_due_us())
    }

    leave_to!(inner: has_memory_lanes, arm, is_connected, last_heard_us, queued_bytes, disconnect, trouble);
}
