//! Round trips over a lane, and over nothing but RDMA WRITE: for perf, in a guest with soft-RoCE.
//!
//! Both ends on one thread, which polls them in turn: the guest has one CPU, and the scheduler's part would be most of
//! what is measured otherwise. The bare side is what `ib_write_lat` of perftest does: an inline write without completion, and
//! the receiver polls the last byte.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use rdma_sys::Wc;

use super::super::lane::Lane;
use super::arena::Arena;
use super::lane::{PeerRing, RdmaLane};
use super::selftest::pair;
use super::verbs::{Link, Write};

const RING_BYTES: usize = 1 << 20;
/// A vote or an acknowledgement of consensus, and thus the most frequent size.
pub const MESSAGE_BYTES: usize = 64;
/// Writes until one asks for a completion, which frees the places of all.
const SIGNAL_EACH: u64 = 64;

/// Two lanes over the device at `address`, for round trips.
pub struct Lanes([RdmaLane; 2]);

impl Lanes {
    /// Connects them.
    ///
    /// # Panics
    /// When that is not possible.
    pub fn new(address: IpAddr) -> Lanes {
        Lanes(pair(address, RING_BYTES))
    }

    /// Nanoseconds of each of `count` round trips.
    ///
    /// # Panics
    /// When the lane ends.
    pub fn round_trips(&mut self, count: usize) -> Vec<u64> {
        let message = [0x11; MESSAGE_BYTES];
        let mut taken = Vec::with_capacity(count);
        for _ in 0..count {
            let start = Instant::now();
            for (from, to) in [(0, 1), (1, 0)] {
                self.0[from].send(&[&message]).expect("there is room");
                while self.0[to].pump(&mut |bytes| assert_eq!(bytes.len(), MESSAGE_BYTES)).expect("the lane is up") == 0
                {
                }
            }
            taken.push(start.elapsed().as_nanos() as u64);
        }
        taken
    }
}

/// Two queue pairs over the device at `address`, without anything around them.
pub struct Bare {
    // Lanes that were taken apart: their set-up is of use, and nothing else of them is called.
    lanes: [RdmaLane; 2],
    arenas: [Arc<Arena>; 2],
    posted: [u64; 2],
}

impl Bare {
    /// Connects them.
    ///
    /// # Panics
    /// When that is not possible.
    pub fn new(address: IpAddr) -> Bare {
        let mut lanes = pair(address, RING_BYTES);
        let arenas = lanes.each_mut().map(|lane| Arc::clone(lane.take_apart().0.memory().arena()));
        Bare { lanes, arenas, posted: [0; 2] }
    }

    /// Nanoseconds of each of `count` round trips.
    ///
    /// # Panics
    /// When a write fails.
    pub fn round_trips(&mut self, count: usize) -> Vec<u64> {
        let mut taken = Vec::with_capacity(count);
        for _ in 0..count {
            let start = Instant::now();
            for (from, to) in [(0, 1), (1, 0)] {
                let stamp = (self.posted[from] + 1) as u8 | 1 << 7;
                self.write(from, stamp);
                while self.arenas[to].read::<1>(MESSAGE_BYTES - 1) != [stamp] {}
            }
            taken.push(start.elapsed().as_nanos() as u64);
        }
        taken
    }

    fn write(&mut self, from: usize, stamp: u8) {
        self.arenas[from].write(RING_BYTES, &[stamp; MESSAGE_BYTES]);
        let id = self.posted[from];
        let (link, PeerRing { address: to, rkey }) = self.lanes[from].take_apart();
        let signal = id % SIGNAL_EACH == SIGNAL_EACH - 1;
        let write = Write { id, signal, immediate: None, from: 0, bytes: MESSAGE_BYTES, to, rkey };
        link.post_write(&write).expect("there is room");
        self.posted[from] += 1;
        if signal {
            drain(link);
        }
    }
}

/// Takes the completions that are there; they lag by less than the queue is deep.
fn drain(link: &Link) {
    let mut batch = [Wc::default(); 4];
    let count = link.poll(&mut batch).expect("the queue works");
    assert!(batch[..count].iter().all(|done| done.status == 0), "a bare write failed");
}
