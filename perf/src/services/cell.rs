//! One load under one policy, once: what the client found and what it cost.

use anyhow::Result;
use rig::Cluster;

use super::client::{Client, Speed};
use super::counters::{Between, Look};
use super::policy::Policy;
use super::workload::Workload;

/// What was found.
#[derive(Clone, Debug)]
pub struct Cell {
    /// By the client.
    pub speed: Speed,
    /// By the hosts.
    pub cost: Between,
}

impl Cell {
    /// Measures for about `seconds` after a warm-up.
    ///
    /// # Errors
    /// The load generator fails, an answer was wrong, or the group changed meanwhile.
    pub fn measure(
        cluster: &Cluster<'_>,
        client: &Client<'_>,
        policy: Policy,
        workload: &Workload,
        seconds: f64,
    ) -> Result<Cell> {
        workload.prepare(client)?;
        let amount = workload.warm_up(client, seconds)?;
        let before = Look::now(cluster, policy.unreplicated)?;
        let speed = workload.run(client, amount)?;
        let after = Look::now(cluster, policy.unreplicated)?;
        Ok(Cell { speed, cost: after.since(&before)? })
    }

    /// Bytes of syncvms per operation.
    #[must_use]
    pub fn sync_bytes_per_operation(&self) -> f64 {
        self.cost.syncs.bytes_sent as f64 / self.speed.operations as f64
    }

    /// Bytes of everything between the replicas per operation.
    #[must_use]
    pub fn wire_bytes_per_operation(&self) -> f64 {
        self.cost.wire_bytes as f64 / self.speed.operations as f64
    }

    /// How long the run took.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.speed.operations as f64 / self.speed.per_s
    }
}
