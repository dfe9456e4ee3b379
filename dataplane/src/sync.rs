//! The atomics of what threads share here. In a module of their own, so that the loom tests can compile the same source with
//! loom's.

pub(crate) use std::sync::atomic::{AtomicBool, Ordering, fence};
