//! The programs that measurements compare Plover with: fio, etcd and DPDK's testpmd, unpacked from Debian's packages.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::apt::Resolve;
use super::{Part, Setup};

const PACKAGES: [&str; 2] = ["fio", "etcd-server"];

/// Where `perf` finds testpmd if it is installed.
const INSTALLED_TESTPMD: &str = "/usr/bin/dpdk-testpmd";

const INSTALLED_WRK: &str = "/usr/bin/wrk";

/// Downloads and unpacks fio and etcd into `target/rig/peers`, where `perf` looks for them.
pub fn unpack(setup: &Setup) -> Result<()> {
    let what = "fio and etcd from Debian, unpacked, not installed (30 MB download, 10 s)";
    unpack_into(setup, "peers", what, &PACKAGES)
}

/// The same with DPDK's testpmd and `target/rig/dpdk`, unless it is installed.
pub fn unpack_dpdk(setup: &Setup) -> Result<()> {
    if Path::new(INSTALLED_TESTPMD).exists() {
        return Ok(());
    }
    let what = "DPDK's testpmd from Debian, unpacked, not installed (30 MB download, 10 s)";
    unpack_into(setup, "dpdk", what, &["dpdk-dev"])
}

/// The same with the load generator wrk and `target/rig/load`, unless it is installed.
pub fn unpack_load(setup: &Setup) -> Result<()> {
    if Path::new(INSTALLED_WRK).exists() {
        return Ok(());
    }
    unpack_into(setup, "load", "wrk from Debian, unpacked, not installed (1 MB download)", &["wrk"])
}

fn unpack_into(setup: &Setup, path: &str, what: &str, wanted: &[&str]) -> Result<()> {
    let recipe = format!("{} 1", wanted.join(" "));
    setup.make(&Part { path, what, recipe }, |work| {
        fs::create_dir_all(work)?;
        let apt = setup.apt();
        apt.update()?;
        let mut packages = apt.closure(wanted, Resolve::AgainstThisSystem)?;
        // One that is installed already is not in the closure, and is unpacked all the same: all machines run the same.
        for package in wanted {
            if !packages.iter().any(|name| name == package) {
                packages.push((*package).to_owned());
            }
        }
        apt.unpack(&packages, Resolve::AgainstThisSystem, work)
    })
}
