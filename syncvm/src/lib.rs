//! Makes two guests identical again: dirty sets, page hashing, comparison, staged transfer, rejoin,
//! and the rules that decide when to do it (PLOVER §4.3, §4.4, §5.1, §5.2).
//!
//! A **syncvm** runs between a leader and a follower (the secondary, or a replica that rejoins) over any
//! [`exchange::Channel`] and any [`exchange::Guest`], as straight-line blocking code in which every wait has
//! a deadline. Two rules carry the whole design:
//!
//! * a dirty set is only forgotten when a syncvm that covered it was acknowledged ([`pairing::Pairing`]);
//! * a transfer only touches guest memory after it has been received completely and verified
//!   ([`transfer::VerifiedTransfer`]), and from the acknowledgement on it is always finished.
//!
//! Rejected: a state machine without I/O as in the `consensus` crate. The exchange is a fixed sequence
//! between two parties whose guests are stopped; straight-line code with crash points between the steps
//! is easier to read and is tested at every point of failure through the two traits.

pub mod dirty;
pub mod exchange;
pub mod hash;
pub mod idle;
pub mod page;
pub mod pairing;
pub mod ram;
pub mod rejoin;
pub mod slot;
pub mod tracker;
pub mod transfer;
mod wire;
mod workers;

pub use dirty::DirtySet;
pub use page::{PAGE_BYTES, PageNumber};
pub use pairing::Pairing;
pub use ram::GuestRam;
