//! Test bed: hosts in network namespaces, guests, faults, checking clients.
//!
//! A [`Testbed`] is a switch with three hosts and a client on it, each a network namespace of this machine. Hosts
//! run processes ([`Host::spawn`]), suffer [faults](fault) and are cleaned up whatever happens to the owner:
//! when it returns, panics, gets Ctrl-C or SIGKILL. Rejected: containers (a daemon and images for what four
//! namespaces do) and virtual machines as hosts (no nested KVM where this must run).

pub mod chaos;
pub mod client;
pub mod cluster;
pub mod cpio;
pub mod device_guest;
pub mod error;
pub mod fault;
pub mod guest;
pub mod host;
mod janitor;
pub mod netns;
pub mod nvme_guest;
pub mod process;
pub mod programs;
pub mod rdma_guest;
pub mod report;
pub mod scenario;
pub mod testbed;
mod tool;
pub mod wait;

pub use cluster::{Cluster, ClusterOptions};
pub use error::{Result, RigError};
pub use fault::Fault;
pub use guest::{Artifacts, Guest, PlainMemory, Service};
pub use host::Host;
pub use process::{Process, Spawn};
pub use programs::{program, release_program};
pub use scenario::Scenario;
pub use testbed::Testbed;
pub use wait::{Deadline, wait_until, wait_until_every};

/// Whether this process may make namespaces, mounts and TAP devices.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
