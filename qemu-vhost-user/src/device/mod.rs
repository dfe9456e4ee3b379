//! The vhost-user-net device: `session` speaks with QEMU, `net` moves frames, `memory` is the guest's RAM.
//!
//! [`open`] gives the two halves of a device. The [`NetDevice`] goes to the reactor that drives its rings, the [`Session`] is
//! kept as long as the device shall exist. There may be any number of devices per VM and per process.

mod burst;
mod features;
mod handler;
mod link;
mod memory;
mod moderation;
mod net;
mod ring;
mod session;
mod steer;
#[cfg(test)]
mod tests;
mod traffic;

pub use burst::FrameSink;
pub use features::{Features, Offloads, capabilities_json};
pub use link::LinkError;
pub use memory::{BackendDirty, MemoryError, PAGE_BYTES, RamFile, RamIdentity};
pub use net::{
    Counters, DeviceError, DeviceEvent, Inject, MAX_FRAME_BYTES, MAX_QUEUE_PAIRS, NetDevice, RingIndex,
    VNET_HEADER_BYTES,
};
pub use ring::{LayoutError, RingFault};
pub use session::{Endpoint, Session, SessionError, open};
