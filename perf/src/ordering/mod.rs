//! Consensus as a whole: three replicas against what others take or give.
//!
//! * `consensus.tcp_commit_p50`: from a proposal of 64 bytes to its commit at the leader, over loopback TCP with
//!   in-memory logs, against a bare TCP ping-pong of the same size.
//! * `consensus.vs_etcd`: inputs of 64 bytes per second through the same replicas, many in flight, against puts
//!   of 64 bytes to three etcd nodes.
//! * `consensus.vs_raft_crate`: entries per second of CPU time, three replicas in one thread, against `raft`.

#[cfg(feature = "peers")]
mod etcd;
#[cfg(feature = "peers")]
mod grpc;
#[cfg(feature = "peers")]
mod in_memory;
mod memory;
mod node;
#[cfg(feature = "peers")]
mod raft_crate;
pub(crate) mod store;
mod trio;

use anyhow::{Result, anyhow};

use crate::fabric::rtt::{BarePair, MESSAGE_BYTES, p50_us};
use crate::group::Sink;
use crate::row::Row;
use crate::sample::{Better, Figure, compare};
use crate::{Effort, pin};
use trio::Trio;

const COMMIT_P50: &str = "consensus.tcp_commit_p50";

/// Measures.
///
/// # Errors
/// A replica or a peer fails, or does not commit what it should.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    if sink.wants(COMMIT_P50) {
        // In a thread of its own, because it is pinned.
        let row = std::thread::spawn(move || commit_latency(effort)).join();
        sink(row.map_err(|_| anyhow!("the measuring thread panicked"))??)?;
    }
    with_peers(effort, sink)
}

#[cfg(feature = "peers")]
fn with_peers(effort: Effort, sink: Sink<'_>) -> Result<()> {
    if sink.wants("consensus.vs_raft_crate") {
        sink(raft_crate::measure(effort)?)?;
    }
    if sink.wants("consensus.vs_etcd") {
        sink(etcd::measure(effort)?)?;
    }
    Ok(())
}

#[cfg(not(feature = "peers"))]
fn with_peers(_: Effort, sink: Sink<'_>) -> Result<()> {
    anyhow::ensure!(
        !sink.wants_some("consensus.vs_"),
        "built without etcd and raft: start the measurement with «cargo xtask perf consensus»"
    );
    Ok(())
}

/// The leader has one CPU, both followers another, as far as there are two; the same for both ends of the
/// ping-pong. Each thread sleeps until something arrives.
fn commit_latency(effort: Effort) -> Result<Row> {
    let trips = effort.pick(2_000, 100);
    let [here, there] = pin::two_cpus()?;
    let mut trio = Trio::start(Some(there))?;
    let mut bare = BarePair::connect(there)?;
    // Now, so that the threads made above did not inherit it.
    pin::pin(here)?;
    let figure = Figure { id: COMMIT_P50, unit: "us", better: Better::Lower };
    let peer = format!("bare TCP ping-pong, {MESSAGE_BYTES} B");
    let row = compare(
        figure,
        effort,
        &peer,
        || p50_us(trips, |message| trio.commit_one(message)),
        || p50_us(trips, |message| bare.round_trip(message)),
    )?;
    trio.close()?;
    bare.close()?;
    Ok(row)
}
