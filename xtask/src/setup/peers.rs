//! The programs that measurements compare Plover with: fio and etcd, unpacked from Debian's packages.

use std::fs;

use anyhow::Result;

use super::apt::Resolve;
use super::{Part, Setup};

const PACKAGES: [&str; 2] = ["fio", "etcd-server"];

/// Downloads and unpacks them into `target/rig/peers`, where `perf` looks for them.
pub fn unpack(setup: &Setup) -> Result<()> {
    let what = "fio and etcd from Debian, unpacked, not installed (30 MB download, 10 s)";
    let recipe = format!("{} 1", PACKAGES.join(" "));
    setup.make(&Part { path: "peers", what, recipe }, |work| {
        fs::create_dir_all(work)?;
        let apt = setup.apt();
        apt.update()?;
        let mut packages = apt.closure(&PACKAGES, Resolve::AgainstThisSystem)?;
        // One that is installed already is not in the closure, and is unpacked all the same: all machines run the same.
        for package in PACKAGES {
            if !packages.iter().any(|name| name == package) {
                packages.push(package.to_owned());
            }
        }
        apt.unpack(&packages, Resolve::AgainstThisSystem, work)
    })
}
