//! Clients that check what they are told: load with exact expectations, shared registers, ping, probes.
//!
//! They run as processes of their own (`rig-client`) inside a client's network namespace and talk with the test through
//! [`protocol`] lines; [`process::ClientProcess`] is the test's end of that. Off-the-shelf load generators measure
//! but do not check, so they could not tell that an acknowledged write is gone.

pub mod connection;
pub mod control;
#[cfg(test)]
mod fake_redis;
pub mod http;
pub mod job;
pub mod ledger;
pub mod linear;
#[cfg(test)]
mod linear_tests;
pub mod memcached;
pub mod meter;
pub mod ping;
pub mod process;
pub mod protocol;
pub mod redis;
pub mod register;
pub mod resp;
pub mod rng;
pub mod tally;
#[cfg(test)]
mod tests;
pub mod usage;
pub mod value;
pub mod verify;

pub use process::{ClientError, ClientProcess};
