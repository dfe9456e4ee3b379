//! Ports that DPDK drives, all in one process because DPDK starts once in it. Those that need root say so and pass without.

#[path = "../uplinks/common.rs"]
#[allow(dead_code, reason = "the tests of other uplinks use more of it")]
mod common;
mod kernel;
mod loopback;
mod packet;
mod switch;

use dataplane::uplink::dpdk::{Dpdk, EalOptions, start};

/// DPDK on memory that every machine has.
fn open(port: &str, mac: Option<[u8; 6]>) -> Dpdk {
    let options = EalOptions { memory_mib: 256, pci: Vec::new(), arguments: vec!["--no-huge".into()] };
    start(&options).expect("DPDK starts");
    Dpdk::open(port, mac).unwrap_or_else(|error| {
        let why = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        panic!("{error}: {why}")
    })
}
