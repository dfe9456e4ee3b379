//! Fabrics around another fabric, for tests and for looking: [`Faulty`] loses connections and stalls, [`Delayed`] makes the
//! way long, [`Recorder`] writes down what passes. They can be put around each other in any order.
//!
//! What they do is within the contract of [`Fabric`](super::Fabric): order and completeness hold until a `Lost`. A seed
//! repeats the decisions, and the run as far as the fabric below repeats.

mod delay;
mod faults;
mod held;
mod random;
mod record;

pub use delay::{DelayConfig, Delayed};
pub use faults::{FaultConfig, Faulty};
#[cfg(feature = "conformance")]
pub(super) use random::Random;
pub use record::Recorder;

/// `Fabric::poll` or `Fabric::poll_lanes`.
type Poll<F> = fn(&mut F, u64, &mut dyn FnMut(super::FabricEvent<'_>));

/// The methods of [`Fabric`](super::Fabric) that a middleware leaves as they are.
macro_rules! leave_to {
    ($inner:ident: $($method:ident),+) => {
        $(leave_to!(@ $inner $method);)+
    };
    (@ $inner:ident has_memory_lanes) => {
        fn has_memory_lanes(&self) -> bool {
            self.$inner.has_memory_lanes()
        }
    };
    (@ $inner:ident arm) => {
        fn arm(&mut self) -> bool {
            self.$inner.arm()
        }
    };
    (@ $inner:ident next_deadline_us) => {
        fn next_deadline_us(&self) -> u64 {
            self.$inner.next_deadline_us()
        }
    };
    (@ $inner:ident send) => {
        fn send(&mut self, peer: PeerId, parts: &[&[u8]]) -> Result<(), SendError> {
            self.$inner.send(peer, parts)
        }
    };
    (@ $inner:ident is_connected) => {
        fn is_connected(&self, peer: PeerId) -> bool {
            self.$inner.is_connected(peer)
        }
    };
    (@ $inner:ident last_heard_us) => {
        fn last_heard_us(&self, peer: PeerId) -> Option<u64> {
            self.$inner.last_heard_us(peer)
        }
    };
    (@ $inner:ident queued_bytes) => {
        fn queued_bytes(&self, peer: PeerId) -> usize {
            self.$inner.queued_bytes(peer)
        }
    };
    (@ $inner:ident disconnect) => {
        fn disconnect(&mut self, peer: PeerId) {
            self.$inner.disconnect(peer);
        }
    };
    (@ $inner:ident trouble) => {
        fn trouble(&self, peer: PeerId) -> Option<&str> {
            self.$inner.trouble(peer)
        }
    };
}
use leave_to;
