//! The log on NVMe devices that SPDK's driver drives (feature `spdk`), and below it the device alone.
//!
//! The driver runs in this process and is polled by the thread that owns the [`Device`]: no system call, no interrupt, no
//! copy and no allocation between the log and the device. Order as the log needs it: a write, its completion, a flush, its
//! completion. Rejected: SPDK's block-device layer (its uring module has no flush, its aio module flushes by blocking
//! the thread, and all of it wants SPDK's own reactor), and force-unit-access writes (many drives write those through one
//! by one, where a flush covers a group).
//!
//! Everything that waits has a limit. After a limit has passed, or when the controller fails, nobody knows what the device
//! has stored: every command in flight is answered with the error, and the device takes no more until
//! [`reset`](Device::reset).

mod controller;
mod device;
mod driver;
mod environment;
mod error;
mod memory;
mod open;
mod queue;
mod volume;

pub use device::{Device, DeviceOptions, Geometry, Tag};
pub use environment::{Environment, EnvironmentOptions, IovaMode};
pub use error::{Result, SpdkError};
pub use memory::DmaBuffer;
pub(crate) use open::{inspect_legs, open_legs};
