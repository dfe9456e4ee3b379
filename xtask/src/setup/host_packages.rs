//! The few programs that must be installed on the host itself.

use std::process::Command;

use anyhow::{Result, bail};

use crate::progress::{loud_step, on_path, run};

/// (program, Debian package, what for)
const NEEDED: [(&str, &str, &str); 10] = [
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
];

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
    if packages.is_empty() {
        return Ok(());
    }
    let line = format!("apt-get install --no-install-recommends {}", packages.join(" "));
    if !rig::is_root() {
        bail!("these packages are missing and only root may install them; run: sudo {line}");
    }
    loud_step(format!("installing {} (seconds, a few MB)", packages.join(" ")), || {
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
