//! A guest with soft-RoCE, in which the fabric's RDMA lane is tested: Debian's kernel has the device, few machines do.
//!
//! Guests of several hosts of a test bed reach each other through TAP devices on its bridges, as protected guests do.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use crate::device_guest::{DeviceGuest, Image, LIBRARIES, read};
use crate::error::Context;
use crate::guest::artifacts_dir;
use crate::host::Host;
use crate::{Result, RigError};

/// Runs in the guest; a crate of its own, because this one is part of xtask and has no use for what it links.
pub const PROGRAM: &str = "rig-rdma-guest";
const INIT: &str = include_str!("../guest/rdma-init.sh");
const MEMORY_MIB: u32 = 256;
const APPLETS: [&str; 13] =
    ["sh", "mount", "cat", "echo", "insmod", "printf", "dd", "poweroff", "dmesg", "ip", "usleep", "mkdir", "tail"];
/// In the order of loading. crc32_generic is in no list of dependencies, and rdma_rxe does not load without it.
const MODULES: [&str; 20] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "net/core/failover.ko",
    "drivers/net/net_failover.ko",
    "drivers/net/virtio_net.ko",
    "net/sched/sch_netem.ko",
    "net/ipv4/udp_tunnel.ko",
    "net/ipv6/ip6_udp_tunnel.ko",
    "crypto/crc32_generic.ko",
    "fs/configfs/configfs.ko",
    "drivers/infiniband/core/ib_core.ko",
    "drivers/infiniband/core/ib_uverbs.ko",
    "drivers/infiniband/core/ib_cm.ko",
    "drivers/infiniband/core/iw_cm.ko",
    "drivers/infiniband/core/rdma_cm.ko",
    "drivers/infiniband/core/rdma_ucm.ko",
    "drivers/infiniband/sw/rxe/rdma_rxe.ko",
];
/// Of rdma-core, loaded by name.
const LOADED_LIBRARIES: [&str; 4] = ["librdmacm.so.1", "libibverbs.so.1", "libnl-3.so.200", "libnl-route-3.so.200"];
/// How the names of soft-RoCE's provider begin; the rest is the version of its interface.
const PROVIDER: &str = "librxe-rdmav";

/// Boots a guest on `host` at `ip` and runs the program in it with `words` as arguments; they contain no space or comma.
/// `loss` is what netem does to the frames that leave it, such as «loss,1%», or empty. `name` is unique on its host.
///
/// # Errors
/// When something that `cargo xtask setup` or `test` makes is missing, or QEMU cannot be started.
pub fn boot(host: &Host, name: &str, ip: Ipv4Addr, loss: &str, words: &[&str]) -> Result<DeviceGuest> {
    let image = host.directory().join("rdma.cpio");
    let [program, tools] = [PROGRAM, "rdma"];
    let files = rdma_core()?;
    Image { program, init: INIT, applets: &APPLETS, modules: &MODULES, tools: &[tools, "tc"], files }.write(&image)?;
    let tap = host.add_tap()?;
    let [.., low] = ip.octets();
    let arguments = [
        "-machine",
        "pc",
        "-m",
        &format!("{MEMORY_MIB}M"),
        "-netdev",
        &format!("tap,id=n0,ifname={tap},script=no,downscript=no,vhost=off"),
        "-device",
        &format!("virtio-net-pci,netdev=n0,mac=52:54:00:77:01:{low:02x},romfile="),
    ]
    .map(str::to_owned);
    let append = format!("plover.ip={ip}/24 plover.netem={loss} plover.run={}", words.join(","));
    DeviceGuest::boot(host, name, &image, &arguments, &append)
}

/// The user's part of RDMA from the guests' packages, at its places in the guest.
fn rdma_core() -> Result<Vec<(String, Vec<u8>)>> {
    let root = artifacts_dir().join("guest-root");
    let library = |name: &str| {
        let places = [root.join("usr").join(&LIBRARIES[1..]), root.join(&LIBRARIES[1..])];
        let path = places.iter().map(|place| place.join(name)).find(|path| path.exists());
        path.ok_or_else(|| RigError::NotSetUp { path: places[0].join(name) })
    };
    let mut files = Vec::new();
    for name in LOADED_LIBRARIES {
        files.push((format!("{LIBRARIES}/{name}"), read(&library(name)?)?));
    }
    let provider = provider(&library("libibverbs")?)?;
    // Where Debian's libibverbs looks.
    files.push((format!("/usr{LIBRARIES}/libibverbs/{provider}"), read(&library("libibverbs")?.join(&provider))?));
    files.push(("/etc/libibverbs.d/rxe.driver".to_owned(), read(&root.join("etc/libibverbs.d/rxe.driver"))?));
    Ok(files)
}

fn provider(directory: &Path) -> Result<String> {
    let listed = fs::read_dir(directory).context(|| format!("cannot read {}", directory.display()))?;
    let names = listed.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut found = names.filter(|name| name.starts_with(PROVIDER) && name.ends_with(".so"));
    found.next().ok_or_else(|| RigError::NotSetUp { path: directory.join(PROVIDER) })
}
