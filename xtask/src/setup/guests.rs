//! Guest images: one initramfs per service, made of Debian's own binaries and busybox.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rig::cpio::Archive;

use super::apt::Resolve;
use super::{Part, Setup, kernel};
use crate::progress::output;

/// Packages whose own files the guests need; the libraries follow from their dependencies.
const PACKAGES: [&str; 10] = [
    "linux-image-amd64",
    "busybox-static",
    "redis-server",
    "redis-tools",
    "iperf3",
    "memcached",
    "nginx",
    "librdmacm1",
    "libibverbs1",
    "ibverbs-providers",
];
/// Changed when the unpacked packages must be fetched again; everything made from them then follows.
pub const RECIPE: &str = "guest packages 1";
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
/// pthread_cancel loads it by name, so no executable mentions it.
const LOADED_BY_NAME: &str = "libgcc_s.so.1";
/// What init.sh calls, and a few for a person on the console.
const APPLETS: [&str; 22] = [
    "sh", "mount", "cat", "echo", "insmod", "ip", "usleep", "sleep", "grep", "mkdir", "poweroff", "reboot", "ls", "ps",
    "dmesg", "nc", "wget", "kill", "free", "top", "date", "hexdump",
];

struct Image {
    service: &'static str,
    /// Paths in the unpacked packages.
    programs: &'static [&'static str],
}

const IMAGES: [Image; 4] = [
    // iperf3 runs only where it is asked for.
    Image { service: "redis", programs: &["usr/bin/redis-server", "usr/bin/iperf3"] },
    Image { service: "memcached", programs: &["usr/bin/memcached"] },
    Image { service: "nginx", programs: &["usr/sbin/nginx"] },
    Image { service: "racey", programs: &[] },
];

/// Downloads and unpacks the guests' packages into `target/rig/guest-root`.
pub fn unpack(setup: &Setup) -> Result<()> {
    let what = "the guests' kernel, Redis, iperf3, memcached, nginx and rdma-core from Debian (100 MB download, 15 s)";
    let recipe = format!("{} {RECIPE}", PACKAGES.join(" "));
    setup.make(&Part { path: "guest-root", what, recipe }, |work| {
        fs::create_dir_all(work)?;
        let apt = setup.apt();
        apt.update()?;
        let mut packages = apt.closure(&PACKAGES, Resolve::FromNothing)?;
        packages.retain(|name| is_wanted(name));
        apt.unpack(&packages, Resolve::FromNothing, work)
    })
}

/// The dependencies also name package managers and set-up scripts, which a guest without a disk has no use for.
fn is_wanted(package: &str) -> bool {
    let library = package.starts_with("lib") && !package.contains("perl");
    library || PACKAGES.contains(&package) || package.starts_with("linux-image-")
}

/// Builds `target/rig/initrd/SERVICE.cpio` for every service.
pub fn build_images(setup: &Setup) -> Result<()> {
    setup.compile_static("guest/racey.rs", "bin/racey", "compiling the racing guest program")?;
    let init = fs::read_to_string(setup.source("guest/init.sh"))?;
    let nginx_conf = fs::read_to_string(setup.source("guest/nginx.conf"))?;
    let racey = fs::read_to_string(setup.source("guest/racey.rs"))?;
    for image in &IMAGES {
        let path = format!("initrd/{}.cpio", image.service);
        let recipe = format!("3 {RECIPE} {} {init}{nginx_conf}{racey}{}", kernel::release(setup)?, APPLETS.join(" "));
        let what = format!("guest image {}", image.service);
        setup.make(&Part { path: &path, what: &what, recipe }, |work| {
            let out = BufWriter::new(File::create(work)?);
            write_image(setup, image, out).with_context(|| format!("cannot build the image {}", image.service))
        })?;
    }
    Ok(())
}

fn write_image(setup: &Setup, image: &Image, out: BufWriter<File>) -> Result<()> {
    let root = setup.path("guest-root");
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut archive = Archive::new(out)?;
    for directory in ["/proc", "/sys", "/tmp", "/run", "/etc", "/var/log/nginx", "/var/lib/nginx", "/root"] {
        archive.directory(directory)?;
    }
    archive.file("/init", &read(&setup.source("guest/init.sh"))?)?;
    archive.file("/bin/busybox", &read(&root.join("bin/busybox"))?)?;
    for applet in APPLETS {
        archive.link(&format!("/bin/{applet}"), "busybox")?;
    }
    archive.file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")?;
    archive.file("/etc/group", b"root:x:0:\n")?;
    let mut order = String::new();
    for module in kernel::network_modules(setup)? {
        let name = module.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        archive.file(&format!("/modules/{name}"), &read(&module)?)?;
        order += &format!("{name}\n");
    }
    archive.file("/modules/order", order.as_bytes())?;
    let file_name = |path: &Path| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
    let mut needed = BTreeSet::new();
    for program in image.programs {
        archive.file(&format!("/bin/{}", file_name(program.as_ref())), &read(&root.join(program))?)?;
        needed.extend(libraries(&root, program)?);
    }
    for library in &needed {
        archive.file(&format!("/{LIBRARIES}/{}", file_name(library)), &read(library)?)?;
    }
    if image.programs.is_empty() {
        archive.file("/bin/racey", &read(&setup.path("bin/racey"))?)?;
    } else {
        archive.file(&format!("/{LOADER}"), &read(&root.join(LOADER))?)?;
    }
    if image.service == "nginx" {
        archive.file("/etc/plover-nginx.conf", &read(&setup.source("guest/nginx.conf"))?)?;
        archive.file("/srv/index.html", b"<!DOCTYPE html><title>plover</title><p>A protected guest.\n")?;
    }
    Ok(archive.finish()?)
}

/// The shared libraries that the guest's own loader finds for a program, plus those loaded by name.
fn libraries(root: &Path, program: &str) -> Result<BTreeSet<PathBuf>> {
    let search = [root.join("usr").join(LIBRARIES), root.join(LIBRARIES)];
    let path = search.each_ref().map(|directory| directory.display().to_string()).join(":");
    let mut command = Command::new(root.join(LOADER));
    let listed = output(command.arg("--library-path").arg(path).arg("--list").arg(root.join(program)))?;
    let found = listed.lines().filter_map(|line| line.split(" => ").nth(1)?.split(" (").next());
    let mut libraries: BTreeSet<PathBuf> = found.filter(|path| !path.ends_with(LOADER)).map(PathBuf::from).collect();
    libraries.extend(search.iter().map(|directory| directory.join(LOADED_BY_NAME)).filter(|path| path.exists()));
    Ok(libraries)
}
