//! The few programs that must be installed on the host itself.

use std::process::Command;

use anyhow::{Result, bail};

use crate::progress::{loud_step, on_path, run};

/// (program, Debian package, what for)
const NEEDED: [(&str, &str, &str); 12] = [
    ("ip", "iproute2", "network namespaces and bridges"),
    ("tc", "iproute2", "slow links"),
    ("nft", "nftables", "partitions between hosts"),
    ("xz", "xz-utils", "unpacking the guest's kernel"),
    ("c++", "g++", "libFuzzer"),
    ("cc", "gcc", "linking the guest's test program"),
    ("setsid", "util-linux", "clean-up that outlives a killed test"),
    ("mkfs.ext4", "e2fsprogs", "a small file system that gets full"),
    ("losetup", "mount", "block devices that fail"),
    ("mount", "mount", "the small file system"),
    ("pkg-config", "pkg-config", "finding libraries"),
    ("dpdk-testpmd", "dpdk-dev", "a switch for uplinks that DPDK drives"),
];

/// (pkg-config's name, Debian package, what for). 22 MB to fetch and 140 MB on disk, because Debian's drivers come all together.
const NEEDED_LIBRARIES: [(&str, &str, &str); 1] = [("libdpdk", "libdpdk-dev", "uplinks that DPDK drives")];

/// Installs the packages whose programs are missing.
///
/// # Errors
/// When this process may not install packages, with the command that an administrator can run.
pub fn install_missing() -> Result<()> {
    let mut packages: Vec<&str> = Vec::new();
    for (program, package, purpose) in NEEDED {
        if !on_path(program) {
            println!("  {program} is missing ({purpose}): package {package}");
            if !packages.contains(&package) {
                packages.push(package);
            }
        }
    }
    for (library, package, purpose) in NEEDED_LIBRARIES {
        if !has_library(library) {
            println!("  {library} is missing ({purpose}): package {package}");
            packages.push(package);
        }
    }
    if packages.is_empty() {
        return Ok(());
    }
    let line = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if !rig::is_root() {
        bail!("these packages are missing and only root may install them; run: sudo {line}");
    }
    loud_step(format!("installing {} (seconds, a few MB; DPDK 22 MB)", packages.join(" ")), || {
        let install = || {
            run(Command::new("apt-get")
                .args(["install", "-y", "-q", "--no-install-recommends"])
                .args(&packages)
                .env("DEBIAN_FRONTEND", "noninteractive"))
        };
        // A fresh machine has no package lists yet, an old one stale ones.
        install().or_else(|_| {
            run(Command::new("apt-get").args(["update", "-q"]))?;
            install()
        })
    })
}

/// Whether the system's own pkg-config files name it; SPDK brings a DPDK of its own, which does not count.
pub fn has_library(name: &str) -> bool {
    let status = Command::new("pkg-config").args(["--exists", name]).env_remove("PKG_CONFIG_PATH").status();
    status.is_ok_and(|status| status.success())
}
