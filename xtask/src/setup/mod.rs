//! Fetches and builds what the test bed needs, once, into `target/rig`.
//!
//! Everything comes from Debian packages, because those are the programs that users run: QEMU from backports, the
//! kernel and the services of the guests. Rejected: container images (need a daemon and a registry) and building QEMU or a
//! kernel (half an hour). Each part is built in a temporary directory and renamed into place, then stamped with
//! its recipe, so an interrupted set-up simply goes on the next time and a finished one costs nothing.

mod apt;
mod guests;
mod host_packages;
mod kernel;
mod peers;
mod postgres;
mod qemu;

pub use host_packages::{has_library, install_missing};

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::progress::{output, step};

/// Where the parts live and what every recipe can use.
pub struct Setup {
    root: PathBuf,
    sources: PathBuf,
}

/// One thing that set-up makes.
struct Part<'a> {
    /// Path below `target/rig`; a file or a directory.
    path: &'a str,
    /// Shown while it is made: what, and how big or how long.
    what: &'a str,
    /// Changes when the recipe changes; the part is then made again.
    recipe: String,
}

/// The repository's top directory.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_path_buf()
}

/// Makes everything that is missing. With `refresh`, makes everything again from the mirror's present packages.
pub fn run(refresh: bool) -> Result<()> {
    let start = Instant::now();
    let (setup, _lock) = open()?;
    if refresh {
        fs::remove_dir_all(setup.root.join("stamps"))?;
        fs::create_dir_all(setup.root.join("stamps"))?;
    }
    host_packages::install_missing()?;
    qemu::provide(&setup)?;
    guests::unpack(&setup)?;
    kernel::extract(&setup)?;
    guests::build_images(&setup)?;
    println!("test bed ready in {} ({:.1} s)", setup.root.display(), start.elapsed().as_secs_f32());
    Ok(())
}

/// Makes what the measurements compare with, if it is missing. Needs no root, unlike the test bed.
pub fn peers() -> Result<()> {
    let (setup, _lock) = open()?;
    peers::unpack(&setup)
}

/// Makes DPDK's test program, if it is neither installed nor there. Needs no root.
pub fn dpdk() -> Result<()> {
    let (setup, _lock) = open()?;
    peers::unpack_dpdk(&setup)
}

/// Makes the load generators that the guests' packages have not. Needs no root.
pub fn load_generators() -> Result<()> {
    let (setup, _lock) = open()?;
    peers::unpack_load(&setup)
}

/// The place of all parts, for this process alone while the lock lives.
fn open() -> Result<(Setup, File)> {
    let root = rig::guest::artifacts_dir();
    fs::create_dir_all(root.join("stamps")).with_context(|| format!("cannot create {}", root.display()))?;
    let lock = File::create(root.join("lock")).with_context(|| format!("cannot lock {}", root.display()))?;
    if lock.try_lock().is_err() {
        step("waiting for another set-up of this checkout to finish", || Ok(lock.lock()?))?;
    }
    let setup = Setup { root, sources: workspace().join("rig") };
    setup.remove_leftovers()?;
    Ok((setup, lock))
}

impl Setup {
    fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    fn source(&self, relative: &str) -> PathBuf {
        self.sources.join(relative)
    }

    fn apt(&self) -> apt::PrivateApt {
        apt::PrivateApt::new(self.path("apt"))
    }

    /// Makes the part unless it is there with the same recipe. `build` gets a path that does not exist yet and
    /// must create it; it then takes its final place in one step.
    fn make(&self, part: &Part, build: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let target = self.path(part.path);
        let stamp = self.path("stamps").join(part.path.replace('/', "-"));
        let made_with = fs::read_to_string(&stamp).unwrap_or_default();
        if made_with == part.recipe && target.exists() {
            return Ok(());
        }
        step(part.what, || {
            let work = self.path("tmp").join(part.path.replace('/', "-"));
            fs::create_dir_all(self.path("tmp"))?;
            build(&work)?;
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            remove(&target)?;
            fs::rename(&work, &target).with_context(|| format!("cannot move {} into place", target.display()))?;
            fs::write(&stamp, &part.recipe).with_context(|| format!("cannot write {}", stamp.display()))
        })
    }

    /// Compiles one of the rig's single-file programs so that it runs anywhere, the guest included.
    fn compile_static(&self, source: &str, target: &str, what: &str) -> Result<()> {
        let source = self.source(source);
        let text = fs::read_to_string(&source).with_context(|| format!("cannot read {}", source.display()))?;
        self.make(&Part { path: target, what, recipe: text }, |work| {
            let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
            let flags = ["--edition", "2024", "-O", "-C", "strip=symbols", "-C", "panic=abort"];
            let mut command = Command::new(rustc);
            command.args(flags).args(["-C", "target-feature=+crt-static"]).arg(&source).arg("-o").arg(work);
            output(&mut command).map(drop)
        })
    }

    /// An interrupted set-up left these; the lock says that nobody else works here.
    fn remove_leftovers(&self) -> Result<()> {
        remove(&self.path("tmp"))
    }
}

/// Removes a file, a link or a whole directory; nothing there is fine.
fn remove(path: &Path) -> Result<()> {
    let Ok(metadata) = path.symlink_metadata() else {
        return Ok(());
    };
    let removed = if metadata.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.with_context(|| format!("cannot remove {}", path.display()))
}
