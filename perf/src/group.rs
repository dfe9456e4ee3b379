//! Groups of measurements, by the name that a person types.

use anyhow::{Context, Result};

use crate::rows::Rows;
use crate::{Effort, dataplane, fabric, failover, log, ordering, page_hash, replica_steps, results, services, syncvm};

/// Takes each row as soon as it is measured, so that a later failure loses nothing, and knows which are wanted.
pub type Sink<'a> = &'a mut Rows;

/// A group.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// What a person types.
    pub name: &'static str,
    /// One line for `list`.
    pub about: &'static str,
    run: fn(Effort, Sink<'_>) -> Result<()>,
}

/// All groups.
pub const GROUPS: [Group; 8] = [
    Group { name: "core", about: "parts that need no peer: page hashes", run: core },
    Group { name: "fabric", about: "round trips and bulk transfers between replicas, per transport", run: fabric::run },
    Group { name: "log", about: "the durable log, against fio and a bare io_uring loop", run: durable_log },
    Group {
        name: "consensus",
        about: "steps per second; three replicas against a TCP ping-pong, etcd and the raft crate",
        run: consensus,
    },
    Group {
        name: "dataplane",
        about: "our vhost-user-net device against DPDK's, DPDK being the guest; a Linux guest against QEMU's own backend",
        run: dataplane::run,
    },
    Group {
        name: "syncvm",
        about: "making two guests equal again: stop time, bytes, scan and hashes, with synthetic guests",
        run: syncvm::run,
    },
    Group {
        name: "services",
        about: "Redis and other services in protected guests: throughput, latency and cost under each policy",
        run: services::run,
    },
    Group {
        name: "failover",
        about: "what 64 Redis clients see while the leader's host dies, 20 ms by 20 ms",
        run: failover::run,
    },
];

impl Group {
    /// The group with that name.
    ///
    /// # Errors
    /// There is none; the text names those that there are.
    pub fn find(name: &str) -> Result<&'static Group> {
        let names = || GROUPS.map(|group| group.name).join(", ");
        GROUPS
            .iter()
            .find(|group| group.name == name)
            .with_context(|| format!("no group of measurements is named «{name}»; there are: {}", names()))
    }

    /// Measures everything in the group.
    ///
    /// # Errors
    /// The first measurement that fails, or the sink's error.
    pub fn run(&self, effort: Effort, sink: Sink<'_>) -> Result<()> {
        (self.run)(effort, sink)
    }
}

fn core(effort: Effort, sink: Sink<'_>) -> Result<()> {
    page_hash::run(effort, sink)
}

fn durable_log(effort: Effort, sink: Sink<'_>) -> Result<()> {
    log::run(effort, &results::directory(), sink)
}

fn consensus(effort: Effort, sink: Sink<'_>) -> Result<()> {
    replica_steps::run(effort, sink)?;
    ordering::run(effort, sink)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_group_is_refused_with_the_names() {
        assert_eq!(Group::find("core").unwrap().name, "core");
        let error = Group::find("cor").unwrap_err().to_string();
        assert!(
            error.contains("«cor»")
                && error.ends_with("there are: core, fabric, log, consensus, dataplane, syncvm, services, failover"),
            "{error}"
        );
    }
}
