//! The plover daemon: vhost-user-net device, QMP, agent, groups, command line.

pub mod device;
pub mod qemu;
