//! Group `fabric`: what a message and a page cost between two replicas, on each transport.

mod bulk;
mod rdma;
pub(crate) mod rtt;
mod shm;

use anyhow::Result;

use crate::Effort;
use crate::group::Sink;

/// Measures.
///
/// # Errors
/// The first measurement that fails, or the sink's error.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    rtt::run(effort, sink)?;
    rdma::run(effort, sink)?;
    shm::run(effort, sink)?;
    bulk::run(effort, sink)
}
