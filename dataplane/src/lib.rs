//! Frames, guard, uplinks and the fabric between replicas.
//!
//! Everything here runs on the reactor thread of one group, except what says otherwise
//! ([`fabric::Listener`] has a thread per node, [`fabric::bulk`] blocks on a sync thread). Nothing
//! here knows the consensus protocol or the rule by which held output is released: this crate moves
//! bytes and keeps them, policy lives above it.

pub mod arena;
pub mod batch;
mod cache_line;
pub mod coalesce;
pub mod counters;
pub mod cycles;
pub mod doorbell;
pub mod fabric;
pub mod frame;
pub mod guard;
pub mod idle;
pub mod mailbox;
pub mod region;
pub mod ring;
pub mod stages;
mod sync;
pub mod turn;
pub mod uplink;
pub mod wait;

pub use cache_line::full_fence;
pub use frame::{MAX_FRAME_BYTES, PushError, VNET_HEADER_BYTES, VnetHeader};
