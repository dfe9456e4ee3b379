//! The atomics of everything that threads share here without a lock: the standard library's, or loom's while a model of it
//! is checked (`RUSTFLAGS="--cfg loom" cargo test -p dataplane --release --lib loom_`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicBool, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicBool, Ordering, fence};
// The ring's, always these: it may lie in memory that processes share. Its models (tests/loom.rs) compile it with loom's.
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64};
