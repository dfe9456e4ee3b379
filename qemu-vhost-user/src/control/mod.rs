//! The control socket: how `plover status`, `failover` and `sync` reach the daemon.
//!
//! One JSON object per line in, one JSON object per line out, one request per connection; simple enough to be driven by
//! `socat` from a Pacemaker agent. Rejected: signals and files, which cannot answer.

mod client;
mod server;

use serde::{Deserialize, Serialize};

use crate::status::GroupStatus;

pub use client::{ControlError, request};
pub use server::{ControlServer, GroupHandle, GroupHandles, GroupRequest};

/// Longest request line.
pub const MAX_REQUEST_BYTES: usize = 4096;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// The state of one group, or of all.
    Status {
        /// Which VM; absent: all.
        vm: Option<String>,
    },
    /// Planned: the secondary takes over after one last syncvm.
    Failover {
        /// Which VM.
        vm: String,
    },
    /// One syncvm now.
    Sync {
        /// Which VM.
        vm: String,
    },
    /// All guests are lost: boot this node's guest afresh.
    ColdStart {
        /// Which VM.
        vm: String,
    },
    /// Tests only (`debug_hooks = true`): do `action` when syncvm next reaches `phase` on this node.
    CrashPoint {
        /// Which VM.
        vm: String,
        /// A phase's name.
        phase: String,
        /// kill-daemon, kill-qemu, kill-both or freeze-daemon.
        action: String,
    },
}

impl Request {
    /// The VM that the request is about; `None` for all.
    pub fn vm(&self) -> Option<&str> {
        match self {
            Request::Status { vm } => vm.as_deref(),
            Request::Failover { vm }
            | Request::Sync { vm }
            | Request::ColdStart { vm }
            | Request::CrashPoint { vm, .. } => Some(vm),
        }
    }
}

/// What is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// The groups asked for.
    Status(Vec<GroupStatus>),
    /// Done, in words.
    Done(String),
    /// Not done, and why.
    Refused(String),
}

#[cfg(test)]
mod tests;
