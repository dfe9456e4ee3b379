//! One VM group on this node: the reactor thread, the guest worker, and what they share.
//!
//! Read [`reactor`] first (the loop), then `delivery` (committed entries to the guest), `lead` (what a leader decides),
//! `slots` (when it does), `follow` (what a secondary does at a syncvm), `guest` (whether the local guest counts).

mod admission;
mod delivery;
mod egress;
mod follow;
mod guest;
mod hush;
mod ingress;
mod lead;
mod memory;
mod messages;
mod ordering;
mod passthrough;
mod peers;
mod reactor;
mod requests;
mod scheduling;
mod setup;
mod slots;
mod stalls;
mod totals;
mod turns;
mod worker;

use std::path::PathBuf;

pub use scheduling::Place;
pub use setup::{GroupSetup, run};

/// Why a group must be torn down and started again.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The log cannot be opened, or failed while running.
    #[error("log: {0}")]
    Log(#[from] storage_log::LogError),
    /// The log holds something that this version did not write.
    #[error(
        "{dir}: the log holds an entry that is not understood ({reason}); was it written by another version? Move it away to start empty: this replica then rejoins"
    )]
    ForeignLog {
        /// Where.
        dir: PathBuf,
        /// What.
        reason: String,
    },
    /// The uplink cannot be had.
    #[error("uplink {name}: {reason}")]
    Uplink {
        /// Its name.
        name: String,
        /// Why.
        reason: String,
    },
    /// The vhost-user socket cannot be had.
    #[error("vhost-user socket: {0}")]
    Device(String),
    /// There is no memory for the frames.
    #[error("memory for frames: {0}; lower guard_mib or arena_mib, or give the host more")]
    Memory(String),
    /// The peers' port cannot be used for this group.
    #[error("fabric: {0}")]
    Fabric(String),
    /// The operating system refused something basic.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}
