//! A guest with emulated NVMe controllers and an IOMMU, in which the SPDK engine of the storage log is tested.
//!
//! SPDK needs hugepages, vfio and a device of its own, which no test may take from the machine it runs on. A machine without SPDK
//! cannot build the program; [`spdk_version`] says so beforehand.

use std::process::Command;

use crate::Result;
use crate::device_guest::{DeviceGuest, Image};
use crate::host::Host;

/// Runs in the guest; built by `cargo xtask test` when SPDK is installed.
pub const PROGRAM: &str = "rig-nvme-guest";
/// What tests say that cannot run for want of it.
pub const SKIPPED: &str = "********** skipped: no SPDK **********
pkg-config finds no spdk_nvme and spdk_env_dpdk, so the storage log's SPDK engine was not tested: install SPDK with its
static libraries, set PKG_CONFIG_PATH to its lib/pkgconfig, and start «cargo xtask test» again (docs/spdk.md)";
const INIT: &str = include_str!("../guest/nvme-init.sh");
const MEMORY_MIB: u32 = 768;
const APPLETS: [&str; 9] = ["sh", "mount", "cat", "echo", "insmod", "printf", "dd", "poweroff", "dmesg"];
/// In the order of loading.
const MODULES: [&str; 6] = [
    "virt/lib/irqbypass.ko",
    "drivers/vfio/vfio.ko",
    "drivers/vfio/vfio_virqfd.ko",
    "drivers/vfio/vfio_iommu_type1.ko",
    "drivers/vfio/pci/vfio-pci-core.ko",
    "drivers/vfio/pci/vfio-pci.ko",
];
/// Where PCI addresses of the controllers begin: 0000:00:05.0, 0000:00:06.0, …
const FIRST_SLOT: usize = 5;

/// The version of SPDK's NVMe library that a build would use; None when there is none.
pub fn spdk_version() -> Option<String> {
    let ask = |package: &str| {
        let output = Command::new("pkg-config").args(["--modversion", package]).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    ask("spdk_env_dpdk").and_then(|_| ask("spdk_nvme"))
}

/// The PCI address, in the guest, of a controller counted from 0.
pub fn controller_address(index: usize) -> String {
    format!("0000:00:{:02x}.0", FIRST_SLOT + index)
}

/// Boots a guest on `host` whose controllers have the given backends (values of QEMU's `-drive`, without `if` and `id`),
/// and runs the program in it with `words` as arguments. `name` is unique on its host.
///
/// # Errors
/// When something that `cargo xtask setup` or `test` makes is missing, or QEMU cannot be started.
pub fn boot(host: &Host, name: &str, backends: &[String], words: &[&str]) -> Result<DeviceGuest> {
    let path = host.directory().join("nvme.cpio");
    let image = Image {
        program: PROGRAM,
        init: INIT,
        applets: &APPLETS,
        modules: &MODULES,
        tools: &[],
        // OpenSSL, which SPDK starts, refuses to do without its configuration.
        files: vec![("/usr/lib/ssl/openssl.cnf".to_owned(), Vec::new())],
    };
    image.write(&path)?;
    let mut arguments = ["-machine", "q35", "-m", &format!("{MEMORY_MIB}M")].map(str::to_owned).to_vec();
    // Before the devices whose memory it translates. SPDK's addresses need 48 bits.
    arguments.extend(["-device", "intel-iommu,intremap=on,aw-bits=48"].map(str::to_owned));
    for (index, backend) in backends.iter().enumerate() {
        let slot = FIRST_SLOT + index;
        arguments.extend(["-drive".to_owned(), format!("if=none,id=d{index},{backend}")]);
        arguments.push("-device".to_owned());
        arguments.push(format!("nvme,drive=d{index},serial=plover{index},addr={slot:02x}.0"));
    }
    DeviceGuest::boot(host, name, &path, &arguments, &format!("intel_iommu=on plover.run={}", words.join(",")))
}
