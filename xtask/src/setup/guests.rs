//! Guest images: one initramfs per service, made of Debian's own binaries and busybox.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rig::cpio::Archive;

use super::apt::Resolve;
use super::{Part, Setup, kernel, postgres};
use crate::progress::output;

/// Packages whose own files the guests need; the libraries follow from their dependencies.
const PACKAGES: [&str; 13] = [
    "linux-image-amd64",
    "busybox-static",
    "redis-server",
    "redis-tools",
    "iperf3",
    "memcached",
    "nginx",
    "lighttpd",
    "php-cgi",
    "postgresql",
    "librdmacm1",
    "libibverbs1",
    "ibverbs-providers",
];
/// Changed when the unpacked packages must be fetched again; everything made from them then follows.
pub const RECIPE: &str = "guest packages 2";
const LIBRARIES: &str = "lib/x86_64-linux-gnu";
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
/// pthread_cancel loads it by name, so no executable mentions it.
const LOADED_BY_NAME: &str = "libgcc_s.so.1";
/// What init.sh calls, and a few for a person on the console.
const APPLETS: [&str; 25] = [
    "sh", "mount", "cat", "echo", "insmod", "ip", "usleep", "sleep", "grep", "mkdir", "chown", "chmod", "su",
    "poweroff", "reboot", "ls", "ps", "dmesg", "nc", "wget", "kill", "free", "top", "date", "hexdump",
];
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\npostgres:x:70:70:postgres:/data:/bin/sh\n";
const GROUP: &str = "root:x:0:\npostgres:x:70:\n";

struct Image {
    service: &'static str,
    /// Paths in the unpacked packages, with one star at most, for a version; and their names in the guest's /bin.
    programs: &'static [(&'static str, &'static str)],
    /// Paths in the guest and below `rig/guest`.
    files: &'static [(&'static str, &'static str)],
}

const IMAGES: [Image; 6] = [
    // iperf3 runs only where it is asked for.
    Image {
        service: "redis",
        programs: &[("usr/bin/redis-server", "redis-server"), ("usr/bin/iperf3", "iperf3")],
        files: &[],
    },
    Image { service: "memcached", programs: &[("usr/bin/memcached", "memcached")], files: &[] },
    Image {
        service: "nginx",
        programs: &[("usr/sbin/nginx", "nginx")],
        files: &[("/etc/plover-nginx.conf", "nginx.conf"), ("/srv/index.html", "index.html")],
    },
    Image {
        service: "lighttpd",
        programs: &[("usr/sbin/lighttpd", "lighttpd"), ("usr/bin/php-cgi*", "php-cgi")],
        files: &[("/etc/plover-lighttpd.conf", "lighttpd.conf"), ("/srv/index.php", "index.php")],
    },
    Image {
        service: "postgres",
        programs: &[(postgres::SERVER, "postgres")],
        files: &[("/data/postgresql.conf", "postgresql.conf")],
    },
    Image { service: "racey", programs: &[], files: &[] },
];

/// Downloads and unpacks the guests' packages into `target/rig/guest-root`.
pub fn unpack(setup: &Setup) -> Result<()> {
    let what = "the guests' kernel, Redis and other services, iperf3 and rdma-core from Debian (170 MB download, 20 s)";
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
    // LLVM would compile queries of PostgreSQL, and is larger than everything else.
    let library = package.starts_with("lib") && !["perl", "llvm"].iter().any(|word| package.contains(word));
    let versioned = ["linux-image-", "postgresql-"].iter().find_map(|prefix| package.strip_prefix(prefix));
    let version = versioned.is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_digit()));
    let php = package.starts_with("php") && package.ends_with("-cgi");
    library || version || php || PACKAGES.contains(&package)
}

/// Builds `target/rig/initrd/SERVICE.cpio` for every service.
pub fn build_images(setup: &Setup) -> Result<()> {
    setup.compile_static("guest/racey.rs", "bin/racey", "compiling the racing guest program")?;
    postgres::make_data(setup)?;
    let init = fs::read_to_string(setup.source("guest/init.sh"))?;
    let racey = fs::read_to_string(setup.source("guest/racey.rs"))?;
    for image in &IMAGES {
        let path = format!("initrd/{}.cpio", image.service);
        let mut recipe = format!("4 {RECIPE} {} {init}{racey}{}", kernel::release(setup)?, APPLETS.join(" "));
        for (_, source) in image.files {
            recipe += &fs::read_to_string(setup.source("guest").join(source))?;
        }
        let what = format!("guest image {}", image.service);
        setup.make(&Part { path: &path, what: &what, recipe }, |work| {
            let out = BufWriter::new(File::create(work)?);
            write_image(setup, image, out).with_context(|| format!("cannot build the image {}", image.service))
        })?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn write_image(setup: &Setup, image: &Image, out: BufWriter<File>) -> Result<()> {
    let root = setup.path("guest-root");
    let mut archive = Archive::new(out)?;
    for directory in ["/proc", "/sys", "/tmp", "/run", "/etc", "/var/log/nginx", "/var/lib/nginx", "/root"] {
        archive.directory(directory)?;
    }
    archive.file("/init", &read(&setup.source("guest/init.sh"))?)?;
    archive.file("/bin/busybox", &read(&root.join("bin/busybox"))?)?;
    for applet in APPLETS {
        archive.link(&format!("/bin/{applet}"), "busybox")?;
    }
    archive.file("/etc/passwd", PASSWD.as_bytes())?;
    archive.file("/etc/group", GROUP.as_bytes())?;
    write_modules(setup, &mut archive)?;
    if image.service == "postgres" {
        postgres::write_data(setup, &mut archive)?;
    }
    for (path, source) in image.files {
        archive.file(path, &read(&setup.source("guest").join(source))?)?;
    }
    write_programs(setup, image, &mut archive)?;
    Ok(archive.finish()?)
}

fn write_modules(setup: &Setup, archive: &mut Archive<BufWriter<File>>) -> Result<()> {
    let mut order = String::new();
    for module in kernel::network_modules(setup)? {
        let name = file_name(&module);
        archive.file(&format!("/modules/{name}"), &read(&module)?)?;
        order += &format!("{name}\n");
    }
    Ok(archive.file("/modules/order", order.as_bytes())?)
}

fn write_programs(setup: &Setup, image: &Image, archive: &mut Archive<BufWriter<File>>) -> Result<()> {
    let root = setup.path("guest-root");
    let mut needed = BTreeSet::new();
    for (path, name) in image.programs {
        let program = only_match(&root, path)?;
        archive.file(&format!("/bin/{name}"), &read(&program)?)?;
        needed.extend(libraries(&root, &program)?);
    }
    for library in &needed {
        archive.file(&format!("/{LIBRARIES}/{}", file_name(library)), &read(library)?)?;
    }
    if image.programs.is_empty() {
        archive.file("/bin/racey", &read(&setup.path("bin/racey"))?)?;
    } else {
        archive.file(&format!("/{LOADER}"), &read(&root.join(LOADER))?)?;
    }
    Ok(())
}

fn file_name(path: &Path) -> String {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned()
}

/// The path below `root` that matches a pattern of which one component may have a star, for digits and dots.
///
/// # Errors
/// There is none, or there are several.
pub(super) fn only_match(root: &Path, pattern: &str) -> Result<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else { return Ok(root.join(pattern)) };
    let (directory, prefix) = before.rsplit_once('/').unwrap_or(("", before));
    let (suffix, rest) = after.split_once('/').unwrap_or((after, ""));
    let directory = root.join(directory);
    let mut found = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let path = entry?.path();
        let starred = path.file_name().and_then(|name| name.to_str()?.strip_prefix(prefix)?.strip_suffix(suffix));
        if starred.is_some_and(|version| version.chars().all(|letter| letter.is_ascii_digit() || letter == '.')) {
            found.push(if rest.is_empty() { path } else { path.join(rest) });
        }
    }
    found.retain(|path| path.exists());
    ensure!(found.len() == 1, "«{pattern}» should be one file below {}; found {found:?}", root.display());
    Ok(found.remove(0))
}

/// The shared libraries that the guest's own loader finds for a program, plus those loaded by name.
fn libraries(root: &Path, program: &Path) -> Result<BTreeSet<PathBuf>> {
    let search = [root.join("usr").join(LIBRARIES), root.join(LIBRARIES)];
    let path = search.each_ref().map(|directory| directory.display().to_string()).join(":");
    let mut command = Command::new(root.join(LOADER));
    let listed = output(command.arg("--library-path").arg(path).arg("--list").arg(program))?;
    let found = listed.lines().filter_map(|line| line.split(" => ").nth(1)?.split(" (").next());
    let mut libraries: BTreeSet<PathBuf> = found.filter(|path| !path.ends_with(LOADER)).map(PathBuf::from).collect();
    libraries.extend(search.iter().map(|directory| directory.join(LOADED_BY_NAME)).filter(|path| path.exists()));
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_a_version_and_for_one_only() {
        let root = std::env::temp_dir().join(format!("plover-xtask-star-{}", std::process::id()));
        for directory in ["lib/db/15/bin", "lib/db/other"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        for file in ["lib/db/15/bin/server", "lib/db/other.default"] {
            fs::write(root.join(file), "").unwrap();
        }
        assert_eq!(only_match(&root, "lib/db/*/bin/server").unwrap(), root.join("lib/db/15/bin/server"));
        assert_eq!(only_match(&root, "lib/db/1*").unwrap(), root.join("lib/db/15"));
        assert_eq!(only_match(&root, "lib/db/*").unwrap(), root.join("lib/db/15"));
        fs::create_dir(root.join("lib/db/17.2")).unwrap();
        for wrong in ["lib/db/*", "lib/db/9*", "lib/db/*/bin/client"] {
            assert!(only_match(&root, wrong).is_err(), "{wrong}");
        }
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn of_the_dependencies_libraries_and_services_are_wanted() {
        for wanted in ["libc6", "postgresql-15", "php8.2-cgi", "lighttpd", "linux-image-6.1.0-9-amd64", "postgresql"] {
            assert!(is_wanted(wanted), "{wanted}");
        }
        for other in ["perl", "libperl5.36", "libllvm14", "postgresql-common", "postgresql-client-15", "php8.2-cli"] {
            assert!(!is_wanted(other), "{other}");
        }
    }
}
