//! Tests of the device against a driver and a QEMU of our own.

mod bed;
mod corruption;
mod equivalence;
mod mapped;
mod moderation;
mod pairs;
mod polling;
mod system_calls;
mod traffic;
mod vhost_user;
