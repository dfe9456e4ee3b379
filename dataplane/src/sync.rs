//! The atomics of what threads share here. In a module of their own, so that the loom tests can compile the same source with
//! loom's, for which copies and hints of the processor are nothing.

pub(crate) use std::sync::atomic::{AtomicBool, Ordering, fence};
// The ring's, always these: it may lie in memory that processes share. Its models (tests/loom.rs) compile it with loom's.
pub(crate) use crate::cache_line;
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64};
