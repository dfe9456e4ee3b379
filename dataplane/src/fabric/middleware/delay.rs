//! A longer way for every message.

use super::super::{Fabric, FabricEvent, PeerId, SendError};
use super::held::Held;
use super::random::Random;
use super::{Poll, leave_to};

/// How long messages are on their way, in addition to what the fabric below takes. The excess over the least has an
/// exponential distribution: most messages are quick, some are not.
#[derive(Debug, Clone, PartialEq)]
pub struct DelayConfig {
    /// Decides.
    pub seed: u64,
    /// Every message takes at least this, µs.
    pub least_us: u64,
    /// And this more on average, µs.
    pub mean_more_us: u64,
}

/// Delays what comes. Messages of one peer stay in order, so a slow one holds up those behind it, as on a stream.
#[derive(Debug)]
pub struct Delayed<F> {
    inner: F,
    config: DelayConfig,
    random: Random,
    held: Held,
}

impl<F: Fabric> Delayed<F> {
    /// Delays what `inner` receives.
    pub fn new(inner: F, config: DelayConfig) -> Delayed<F> {
        Delayed { inner, random: Random::new(config.seed), config, held: Held::default() }
    }

    fn delay_us(&mut self) -> u64 {
        let more = -(1.0 - self.random.fraction()).ln() * self.config.mean_more_us as f64;
        self.config.least_us + more as u64
    }

    fn poll_with(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>), poll: Poll<F>) {
        // Out and back: the closure needs all but the fabric below.
        let mut came = Vec::new();
        poll(&mut self.inner, now_us, &mut |event| match event {
            FabricEvent::Message { peer, bytes } => came.push((peer, bytes.to_vec())),
            FabricEvent::Lost { peer, .. } => {
                came.retain(|(of, _)| *of != peer);
                self.held.forget(peer);
                sink(event);
            }
            other => sink(other),
        });
        for (peer, bytes) in came {
            let due_us = (now_us + self.delay_us()).max(self.held.last_due_us(peer).unwrap_or(0));
            self.held.keep(due_us, peer, &bytes);
        }
        self.held.release(now_us, sink);
    }
}

impl<F: Fabric> Fabric for Delayed<F> {
    fn poll(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        self.poll_with(now_us, sink, F::poll);
    }

    fn poll_lanes(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        self.poll_with(now_us, sink, F::poll_lanes);
    }

    fn next_deadline_us(&self) -> u64 {
        self.inner.next_deadline_us().min(self.held.next_due_us())
    }

    leave_to!(inner: send, has_memory_lanes, arm, is_connected, last_heard_us, queued_bytes, disconnect, trouble);
}
