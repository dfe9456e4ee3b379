//! The lane over RDMA: one reliable queue pair per lane, one-sided writes into the receiver's ring.
//!
//! [`setup`] makes the connection, [`lane`] moves messages over it. What can be decided without a device is in
//! [`ring`] (places, credits, records) and [`offer`]; [`verbs`] has all calls of rdma-core. The payload is **not encrypted**: the
//! device reads and writes it as it lies in memory, so whoever can read the RDMA network can read guest memory.
//!
//! Rejected: SEND/RECV (a copy less to think about, but the receiver must size its buffers for the longest message), polling
//! the ring's memory instead of completions (the specification promises no order of bytes within a write, and a
//! sleeping reactor needs events anyway), UD datagrams (own retransmission), and a queue pair shared by peers (one that
//! fails would take the others along).

mod arena;
pub mod fuzz;
mod lane;
mod offer;
mod ring;
#[cfg(feature = "conformance")]
pub mod rtt;
#[cfg(feature = "conformance")]
pub mod selftest;
mod setup;
mod verbs;

use super::lane::{LaneSetup, SetupContext, SetupError};

/// Starts a set-up: registered memory, a port on the side that did not dial, and the offer.
///
/// # Errors
/// [`SetupError`].
pub(super) fn begin(context: &SetupContext) -> Result<(Box<dyn LaneSetup>, Vec<u8>), SetupError> {
    let (setup, offer) = setup::RdmaSetup::begin(context)?;
    Ok((Box::new(setup), offer))
}
