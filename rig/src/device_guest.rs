//! Small guests in which a program under test has a device that no test may take from the machine it runs on.
//!
//! The image is made for each run: the program with this machine's libraries, busybox, and modules of Debian's kernel. The
//! guest's init ends QEMU with the program's exit status. What is special to a device is in [`nvme_guest`](crate::nvme_guest) and
//! [`rdma_guest`](crate::rdma_guest).

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

/// Where Debian's libraries are, here, in the guest and in its packages.
pub(crate) const LIBRARIES: &str = "/lib/x86_64-linux-gnu";
const SHOWN_LINES: usize = 20;

/// What an image is made of, besides busybox.
pub(crate) struct Image<'a> {
    /// Name of the program of this workspace that it is for.
    pub program: &'a str,
    /// The first process.
    pub init: &'a str,
    /// What it calls.
    pub applets: &'a [&'a str],
    /// Kernel modules, in the order of loading; paths below the kernel's directory.
    pub modules: &'a [&'a str],
    /// Programs of this machine that the init starts, found on the path.
    pub tools: &'a [&'a str],
    /// More files: path in the guest, content.
    pub files: Vec<(String, Vec<u8>)>,
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
pub struct DeviceGuest {
    process: Process,
    console: PathBuf,
}

impl DeviceGuest {
    /// Boots a guest from `image` on `host`; `arguments` are its machine and devices for QEMU, and `append` is for the kernel.
    pub(crate) fn boot(host: &Host, name: &str, image: &Path, arguments: &[String], append: &str) -> Result<Self> {
        let console = host.directory().join(format!("{name}.console"));
        let artifacts = Artifacts::locate()?;
        let append = format!("console=ttyS0 quiet panic=-1 {KERNEL_QUIRKS} tsc_early_khz={} {append}", tsc_khz());
        let mut command = Command::new(artifacts.qemu);
        command.args(["-accel", "tcg", "-cpu", CPU, "-smp", "1"]);
        command.args(["-nodefaults", "-no-user-config", "-vga", "none", "-display", "none", "-no-reboot"]);
        command.args(["-bios", "qboot.rom", "-append", &append]);
        command.arg("-kernel").arg(artifacts.kernel).arg("-initrd").arg(image);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        command.args(arguments);
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

impl Image<'_> {
    /// Makes it at `path`, unless it is there.
    pub fn write(self, path: &Path) -> Result<()> {
        if path.exists() {
            return Ok(());
        }
        let root = artifacts_dir().join("guest-root");
        let out = fs::File::create(path).context(|| format!("cannot create {}", path.display()))?;
        let unwritten = || format!("cannot write {}", path.display());
        let mut archive = Archive::new(BufWriter::new(out)).context(unwritten)?;
        for directory in ["/proc", "/sys", "/tmp", "/run", "/var/tmp"] {
            archive.directory(directory).context(unwritten)?;
        }
        let mut files = self.files;
        files.push(("/init".to_owned(), self.init.into()));
        files.push(("/bin/busybox".to_owned(), read(&root.join("bin/busybox"))?));
        let modules = modules_directory(&root)?;
        let mut order = String::new();
        for module in self.modules {
            let name = module.rsplit('/').next().unwrap_or(module);
            files.push((format!("/modules/{name}"), read(&modules.join(module))?));
            order += &format!("{name}\n");
        }
        files.push(("/modules/order".to_owned(), order.into()));
        let mut programs = vec![(self.program, program(self.program)?)];
        for tool in self.tools {
            programs.push((tool, on_path(tool)?));
        }
        for (name, path) in programs {
            for (name, library) in libraries(&path)? {
                if files.iter().all(|(other, _)| *other != name) {
                    files.push((name, read(&library)?));
                }
            }
            files.push((format!("/bin/{name}"), read(&path)?));
        }
        for (path, content) in files {
            archive.file(&path, &content).context(unwritten)?;
        }
        archive.link("/var/run", "/run").context(unwritten)?;
        for applet in self.applets {
            archive.link(&format!("/bin/{applet}"), "busybox").context(unwritten)?;
        }
        archive.finish().context(unwritten)
    }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).context(|| format!("cannot read {}", path.display()))
}

fn on_path(tool: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // A service's path may lack the administrators' directories.
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    let found = places.map(|place| place.join(tool)).find(|path| path.is_file());
    found.ok_or_else(|| RigError::Explained(format!("{tool} is not installed; run «cargo xtask setup»")))
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
