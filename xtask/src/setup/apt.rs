//! Debian packages without installing them: an apt of our own below `target/rig/apt`.
//!
//! It has its own sources (the user's mirror plus backports), lists and cache, so the user's apt neither
//! changes nor has to know backports. The mirror comes from the user's configuration at run time; signatures
//! are checked with Debian's own keyring as always.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::progress::output;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An apt that reads and writes only below its own directory.
pub struct PrivateApt {
    root: PathBuf,
}

/// Which packages count as already there when dependencies are resolved.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Resolve {
    /// What the user's system has installed (for programs that run here).
    AgainstThisSystem,
    /// Nothing (for programs that run in a guest).
    FromNothing,
}

impl PrivateApt {
    /// No files are touched before the first use.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Downloads the package lists, once per set-up run that needs them.
    pub fn update(&self) -> Result<()> {
        for directory in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(self.root.join(directory))?;
        }
        fs::write(self.root.join("nothing-installed"), "")?;
        fs::write(self.root.join("sources.list"), sources()?)?;
        output(self.apt("apt-get").arg("update")).context(
            "cannot download the package lists; if the mirror has no «-backports» suite, install QEMU 10.0 or newer \
             yourself and start again",
        )?;
        Ok(())
    }

    /// The names of `wanted` and everything they need that is not there, without recommendations.
    pub fn closure(&self, wanted: &[&str], resolve: Resolve) -> Result<Vec<String>> {
        let mut command = self.apt("apt-get");
        if resolve == Resolve::FromNothing {
            command.arg("-o").arg(format!("Dir::State::status={}", self.root.join("nothing-installed").display()));
        } else {
            command.args(["-t", &format!("{}-backports", codename()?)]);
        }
        let plan = output(command.args(["-s", "--no-install-recommends", "install"]).args(wanted))?;
        let names = plan.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
        Ok(names.map(str::to_owned).collect())
    }

    /// Downloads the packages and unpacks all of them into the directory `into`.
    pub fn unpack(&self, packages: &[String], resolve: Resolve, into: &Path) -> Result<()> {
        ensure!(!packages.is_empty(), "no packages to unpack into {}", into.display());
        let downloads = self.root.join("debs");
        super::remove(&downloads)?;
        fs::create_dir_all(&downloads)?;
        let mut command = self.apt("apt-get");
        if resolve == Resolve::AgainstThisSystem {
            command.args(["-t", &format!("{}-backports", codename()?)]);
        }
        output(command.current_dir(&downloads).arg("download").args(packages))?;
        for file in fs::read_dir(&downloads)? {
            output(Command::new("dpkg").arg("-x").arg(file?.path()).arg(into))?;
        }
        super::remove(&downloads)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let ours = |name: &str| self.root.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::sourcelist={}", ours("sources.list")),
            "Dir::Etc::sourceparts=/nonexistent".to_owned(),
            format!("Dir::State::lists={}", ours("lists")),
            format!("Dir::Cache={}", ours("cache")),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command.arg("-q").env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

/// The release's name, `bookworm` on Debian 12.
fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    let is_debian = text.lines().any(|line| line.trim_matches('"') == "ID=debian");
    let name = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    match name {
        Some(name) if is_debian => Ok(name.to_owned()),
        _ => bail!("the test bed is made of Debian packages and this is not Debian; run it on Debian 12 or newer"),
    }
}

/// Our sources.list: the suites of this release at the mirrors that the user has configured.
fn sources() -> Result<String> {
    let codename = codename()?;
    let listed = output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE) $(COMPONENT)",
        "Created-By: Packages",
    ]))?;
    let mirror_of = |suite: &str| {
        listed.lines().find_map(|line| {
            let mut words = line.split(' ');
            let uri = words.next()?;
            (words.next() == Some(suite) && words.next() == Some("main")).then(|| uri.to_owned())
        })
    };
    let main = mirror_of(&codename).with_context(|| {
        format!("apt has no source for Debian {codename} main; add one to /etc/apt/sources.list (man sources.list)")
    })?;
    let signed = if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    let mut list = String::new();
    for suite in [codename.clone(), format!("{codename}-updates"), format!("{codename}-backports")] {
        let mirror = mirror_of(&suite).unwrap_or_else(|| main.clone());
        list += &format!("deb {signed}{mirror} {suite} main\n");
    }
    let security = format!("{codename}-security");
    if let Some(mirror) = mirror_of(&security) {
        list += &format!("deb {signed}{mirror} {security} main\n");
    }
    Ok(list)
}
