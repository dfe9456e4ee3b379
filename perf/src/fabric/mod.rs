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
    if sink.wants_some("fabric.tcp") {
        rtt::run(effort, sink)?;
    }
    if sink.wants(rdma::ID) {
        rdma::run(effort, sink)?;
    }
    if sink.wants_some(shm::AREA) {
        shm::run(effort, sink)?;
    }
    if sink.wants_some("fabric.bulk") {
        bulk::run(effort, sink)?;
    }
    Ok(())
}
