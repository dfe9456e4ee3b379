//! A stock QEMU of version 10.0 or newer: the system's own, or Debian's backport unpacked beside it.
//!
//! Older ones crash under TCG with vhost-user-net and MSI-X when the guest sets DRIVER_OK.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::apt::Resolve;
use super::{Part, Setup};
use crate::progress::output;

const MINIMUM_MAJOR: u32 = 10;
const PROGRAM: &str = "qemu-system-x86_64";
const LINK: &str = "bin/qemu-system-x86_64";

/// Makes `target/rig/bin/qemu-system-x86_64` start such a QEMU.
pub fn provide(setup: &Setup) -> Result<()> {
    let system = Path::new("/usr/bin").join(PROGRAM);
    if major_version(&system).is_some_and(|major| major >= MINIMUM_MAJOR) {
        let recipe = system.display().to_string();
        let what = "using the QEMU that is installed";
        setup.make(&Part { path: LINK, what, recipe }, |work| Ok(symlink(&system, work)?))?;
    } else {
        unpack(setup)?;
        setup.compile_static("host/launcher.rs", LINK, "compiling the launcher of the unpacked QEMU")?;
    }
    let qemu = setup.path(LINK);
    let major = major_version(&qemu)
        .with_context(|| format!("{} does not start; try «cargo xtask setup --refresh»", qemu.display()))?;
    ensure!(
        major >= MINIMUM_MAJOR,
        "{} is QEMU {major}, but {MINIMUM_MAJOR} or newer is needed; install it from backports",
        qemu.display()
    );
    Ok(())
}

fn unpack(setup: &Setup) -> Result<()> {
    let what = "QEMU from Debian backports, unpacked, not installed (16 MB download, 10 s)";
    setup.make(&Part { path: "qemu", what, recipe: "qemu-system-x86 1".to_owned() }, |work| {
        fs::create_dir_all(work)?;
        let apt = setup.apt();
        apt.update()?;
        let wanted = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];
        let packages = apt.closure(&wanted, Resolve::AgainstThisSystem)?;
        apt.unpack(&packages, Resolve::AgainstThisSystem, work)
    })
}

/// «QEMU emulator version 10.0.2 (Debian …)»: 10. None if it does not run.
fn major_version(qemu: &Path) -> Option<u32> {
    let text = output(Command::new(qemu).arg("--version")).ok()?;
    let version = text.lines().next()?.split("version ").nth(1)?;
    version.split('.').next()?.parse().ok()
}
