//! The product: the `plover` daemon and command line.
//!
//! A node ([`node`]) runs one [`group`] per protected VM. A group joins the vhost-user-net [`device`] that the guest sees,
//! the QEMU beside it ([`qemu`]), consensus, the durable log, the fabric and syncvm. [`config`] is what a user writes,
//! [`control`] how the command line asks, [`status`] what it gets, [`launch`] how QEMU is started.

#[cfg(all(feature = "dpdk", feature = "spdk"))]
compile_error!("the features dpdk and spdk exclude each other: an SPDK brings a DPDK of its own into the program");

pub mod config;
pub mod control;
pub mod device;
pub mod group;
pub mod launch;
pub mod node;
pub mod qemu;
pub mod status;
