#![forbid(unsafe_code)]
//! Multi-Paxos with viewstamps as a sans-IO state machine, and its simulator.
//!
//! A [`Replica`] takes an [`Event`] together with the present time and fills [`Effects`]: messages to send,
//! records to make durable, entries that are committed, and notices. It reads no clock, opens no socket and
//! draws no randomness except from [`Config::seed`], so that one thread can run a whole group through years
//! of faults from one number ([`sim`]), and the same code runs in the reactor.
//!
//! `docs/consensus.md` states the protocol as numbered rules; comments cite them as `R4`.

mod config;
mod effects;
mod entry;
mod ids;
mod log;
mod message;
mod parts;
mod replica;
mod rng;
pub mod sim;
mod spare;
mod wire;

pub use config::{Config, MAX_REPLICAS, Recovered};
pub use effects::{Effects, Event, Notice, Persist};
pub use entry::{Base, Entry, HardState, Payload};
pub use ids::{Index, PersistId, ReplicaId, View, Viewstamp};
pub use message::Message;
pub use parts::Encoder;
pub use replica::{Lag, ProposeError, Release, Replica, Role};
pub use wire::WireError;
