//! A guest with emulated NVMe controllers and an IOMMU, in which the SPDK engine of the storage log is tested.
//!
//! SPDK needs hugepages, vfio and a device of its own, which no test may take from the machine it runs on. The image is made for
//! each run: the program under test with this machine's libraries, busybox and Debian's vfio modules. A machine without SPDK cannot
//! build the program; [`spdk_version`] says so beforehand.

use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::Archive;
use crate::error::Context;
use crate::guest::{Artifacts, CPU, KERNEL_QUIRKS, artifacts_dir, tsc_khz};
use crate::host::Host;
use crate::process::{Process, Spawn};
use crate::{Deadline, Result, RigError, program, tool};

/// Runs in the guest; built by `cargo xtask test` when SPDK is installed.
pub const PROGRAM: &str = "rig-nvme-guest";
/// What tests say that cannot run for want of it.
pub const SKIPPED: &str = "********** skipped: no SPDK **********
pkg-config finds no spdk_nvme and spdk_env_dpdk, so the storage log's SPDK engine was not tested: install SPDK with its
static libraries, set PKG_CONFIG_PATH to its lib/pkgconfig, and start «cargo xtask test» again (docs/spdk.md)";
const INIT: &str = include_str!("../guest/nvme-init.sh");
const MEMORY_MIB: u32 = 768;
const LIBRARIES: &str = "/lib/x86_64-linux-gnu";
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
const SHOWN_LINES: usize = 20;

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

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status of the program; None when the guest did not get that far.
    pub status: Option<i32>,
    /// All that the guest has printed.
    pub console: String,
}

/// A guest that runs.
pub struct NvmeGuest {
    process: Process,
    console: PathBuf,
}

impl NvmeGuest {
    /// Boots a guest on `host` whose controllers have the given backends (values of QEMU's `-drive`, without `if` and `id`),
    /// and runs the program in it with `words` as arguments. `name` is unique on its host.
    ///
    /// # Errors
    /// When something that `cargo xtask setup` or `test` makes is missing, or QEMU cannot be started.
    pub fn boot(host: &Host, name: &str, backends: &[String], words: &[&str]) -> Result<Self> {
        let image = host.directory().join("nvme.cpio");
        if !image.exists() {
            write_image(&image)?;
        }
        let console = host.directory().join(format!("{name}.console"));
        let artifacts = Artifacts::locate()?;
        let append = format!(
            "console=ttyS0 quiet panic=-1 {KERNEL_QUIRKS} tsc_early_khz={} intel_iommu=on plover.run={}",
            tsc_khz(),
            words.join(",")
        );
        let mut command = Command::new(artifacts.qemu);
        command.args(["-machine", "q35", "-accel", "tcg", "-cpu", CPU, "-smp", "1", "-m", &format!("{MEMORY_MIB}M")]);
        command.args(["-nodefaults", "-no-user-config", "-vga", "none", "-display", "none", "-no-reboot"]);
        command.args(["-bios", "qboot.rom", "-append", &append]);
        command.arg("-kernel").arg(artifacts.kernel).arg("-initrd").arg(image);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        // Before the devices whose memory it translates. SPDK's addresses need 48 bits.
        command.args(["-device", "intel-iommu,intremap=on,aw-bits=48"]);
        for (index, backend) in backends.iter().enumerate() {
            let slot = FIRST_SLOT + index;
            command.arg("-drive").arg(format!("if=none,id=d{index},{backend}"));
            command.arg("-device").arg(format!("nvme,drive=d{index},serial=plover{index},addr={slot:02x}.0"));
        }
        Ok(Self { process: host.start(Spawn::new(name, command))?, console })
    }

    /// Waits until the program has ended.
    ///
    /// # Errors
    /// When the deadline passes; with the last lines of the console.
    pub fn wait(&self, deadline: Deadline) -> Result<Outcome> {
        let status = self.process.wait_exit(deadline).map_err(|error| self.explain(&error))?;
        // isa-debug-exit: twice the value that was written, plus one. 0 is a guest that switched itself off.
        let status = status.code().filter(|code| code % 2 == 1).map(|code| code / 2);
        Ok(Outcome { status, console: self.console() })
    }

    /// Waits for anything that the guest brings about.
    ///
    /// # Errors
    /// When the deadline passes or the guest ends.
    pub fn wait_for<T>(&self, what: &str, deadline: Deadline, ready: impl FnMut() -> Option<T>) -> Result<T> {
        self.process.wait_for(what, deadline, ready).map_err(|error| self.explain(&error))
    }

    /// Takes the power away.
    ///
    /// # Errors
    /// When it does not end.
    pub fn cut_power(&self) -> Result<()> {
        self.process.kill()
    }

    fn explain(&self, error: &RigError) -> RigError {
        let console = self.console();
        let lines: Vec<&str> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n    ");
        RigError::Explained(format!("{error}; the console ends with:\n    {tail}"))
    }

    /// All that the guest has printed so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).replace('\r', "")
    }
}

fn write_image(image: &Path) -> Result<()> {
    let root = artifacts_dir().join("guest-root");
    let read = |path: &Path| fs::read(path).context(|| format!("cannot read {}", path.display()));
    let out = fs::File::create(image).context(|| format!("cannot create {}", image.display()))?;
    let unwritten = || format!("cannot write {}", image.display());
    let mut archive = Archive::new(BufWriter::new(out)).context(unwritten)?;
    for directory in ["/proc", "/sys", "/tmp", "/run", "/var/tmp"] {
        archive.directory(directory).context(unwritten)?;
    }
    // OpenSSL, which SPDK starts, refuses to do without its configuration.
    let mut files: Vec<(String, Vec<u8>)> = vec![
        ("/init".to_owned(), INIT.into()),
        ("/bin/busybox".to_owned(), read(&root.join("bin/busybox"))?),
        ("/usr/lib/ssl/openssl.cnf".to_owned(), Vec::new()),
    ];
    let modules = modules_directory(&root)?;
    let mut order = String::new();
    for module in MODULES {
        let name = module.rsplit('/').next().unwrap_or(module);
        files.push((format!("/modules/{name}"), read(&modules.join(module))?));
        order += &format!("{name}\n");
    }
    files.push(("/modules/order".to_owned(), order.into()));
    let program = program(PROGRAM)?;
    files.push((format!("/bin/{PROGRAM}"), read(&program)?));
    for (name, library) in libraries(&program)? {
        files.push((name, read(&library)?));
    }
    for (path, content) in files {
        archive.file(&path, &content).context(unwritten)?;
    }
    archive.link("/var/run", "/run").context(unwritten)?;
    for applet in APPLETS {
        archive.link(&format!("/bin/{applet}"), "busybox").context(unwritten)?;
    }
    archive.finish().context(unwritten)
}

fn modules_directory(root: &Path) -> Result<PathBuf> {
    let releases = root.join("lib/modules");
    let found = fs::read_dir(&releases).context(|| format!("cannot read {}", releases.display()))?;
    let first = found.flatten().map(|entry| entry.path().join("kernel")).find(|path| path.exists());
    first.ok_or(RigError::NotSetUp { path: releases })
}

/// This machine's libraries and loader that the program was linked with: path in the guest, path here.
fn libraries(program: &Path) -> Result<Vec<(String, PathBuf)>> {
    let listed = tool::run("ldd", &[&program.display().to_string()], "")?;
    let mut found = Vec::new();
    for line in listed.lines() {
        let path = line.split(" => ").last().and_then(|rest| rest.trim().split(" (").next()).unwrap_or_default();
        let path = Path::new(path);
        let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|_| path.is_absolute()) else {
            continue;
        };
        // The loader's path is part of the program; the others are searched.
        let is_loader = !line.contains(" => ");
        let place = if is_loader { path.display().to_string() } else { format!("{LIBRARIES}/{name}") };
        found.push((place, path.to_owned()));
    }
    Ok(found)
}
