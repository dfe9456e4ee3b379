//! The storage log's SPDK device, in a guest with emulated NVMe controllers (rig/src/nvme_guest.rs).
//!
//! On a machine without SPDK each test says loudly that it was skipped, and passes.

use std::fs::File;

use rig::nvme_guest::{NvmeGuest, controller_address, spdk_version};
use rig::{Deadline, Host, Testbed};

/// Under TCG on a busy machine.
const LIMIT_SECS: u64 = 300;
const MIB: u64 = 1 << 20;

/// Whether the tests can run here.
fn has_spdk() -> bool {
    match spdk_version() {
        Some(version) => {
            println!("SPDK's NVMe library {version}");
            true
        }
        None => {
            // Not through the test's own output, which a passing test does not show.
            let text = "\n********** skipped: no SPDK **********\n\
                pkg-config finds no spdk_nvme and spdk_env_dpdk: install SPDK with its static libraries, set PKG_CONFIG_PATH \
                to its lib/pkgconfig, and start «cargo xtask test» again (docs/spdk.md)\n\n";
            use std::io::Write;
            // Nobody reads it if there is no terminal.
            drop(std::io::stderr().write_all(text.as_bytes()));
            false
        }
    }
}

fn raw_disk(host: &Host, name: &str, bytes: u64) -> String {
    let path = host.directory().join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    format!("file={},format=raw,cache=unsafe", path.display())
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn the_device_does_what_it_says_and_survives_faults() {
    if !has_spdk() {
        return;
    }
    let bed = Testbed::new().unwrap();
    let host = bed.host(0);
    let disks = [raw_disk(host, "good.img", 64 * MIB)];
    let guest = NvmeGuest::boot(host, "selftest", &disks, &["selftest", &controller_address(0), "x", "y"]).unwrap();
    let outcome = guest.wait(Deadline::after_secs(LIMIT_SECS)).unwrap();
    println!("{}", outcome.console);
    assert_eq!(outcome.status, Some(0), "{}", outcome.console);
}
