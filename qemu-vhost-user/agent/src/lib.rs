//! Library that is preloaded into QEMU (`LD_PRELOAD`) for what must happen inside its process: creating a userfaultfd,
//! registering the migration yank instance before a load, reading the vCPU threads' CPU clocks, telling TCG what was
//! written; and for what is much quicker there: stopping, saving, loading and resuming the guest. It holds no policy
//! and no state beyond the present connection; what it knows is in `protocol`.
//!
//! Rejected: a QEMU module (must match QEMU's build exactly), ptrace injection (stops the guest, fights with
//! debuggers), reading the CPU clocks from outside (they lag by up to 16 ms there).
//!
//! A panic here would kill somebody's VM, so the lints below forbid what can panic. QEMU's `-daemonize` forks
//! after the agent's thread was started and so loses it; `plover launch` does not use it.
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

pub mod clock_page;
mod control;
pub mod protocol;
mod qemu;
mod sampler;
pub mod server;
mod start;
mod sys;
