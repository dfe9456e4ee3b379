//! A CPU quota for one process, by a control group of its own: what a busy or badly configured host does to a guest.
//!
//! Both versions of the kernel's interface are in use where tests run. A group that a killed test left behind is empty and
//! goes with the next one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::Fault;
use crate::Result;
use crate::error::Context;
use crate::process::Process;
use crate::wait::{Deadline, wait_until};

const PREFIX: &str = "plover-rig-";
const PERIOD_US: u32 = 100_000;
const VERSION_1: &str = "/sys/fs/cgroup/cpu";
const VERSION_2: &str = "/sys/fs/cgroup";

impl Process {
    /// Lets all of its threads together have so much of one core, in periods of 100 ms, until undone.
    ///
    /// # Errors
    /// Also where this machine's control groups are not ours to use.
    pub fn with_cpu_quota(&self, percent: u32) -> Result<Fault> {
        let (root, files) = interface(percent)?;
        sweep(&root);
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let group = root.join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir(&group).context(|| format!("cannot make {}", group.display()))?;
        let (pid, back) = (self.pid(), home(&root, self.pid()));
        let quota = Fault::new(format!("{} at {percent} % of a core", self.name()), {
            let group = group.clone();
            move || {
                // A process that has ended since is nowhere to be moved from.
                let _ = fs::write(back.join("cgroup.procs"), pid.to_string());
                wait_until(Deadline::after_secs(10), "a control group to be empty", || fs::remove_dir(&group).ok())
            }
        });
        let mut values = files.into_iter().chain([("cgroup.procs", pid.to_string())]);
        values.try_for_each(|(file, value)| {
            let path = group.join(file);
            fs::write(&path, value).context(|| format!("cannot write {}", path.display()))
        })?;
        Ok(quota)
    }
}

/// Where groups are made, and what is written into one: file and value.
fn interface(percent: u32) -> Result<(PathBuf, Vec<(&'static str, String)>)> {
    let quota_us = PERIOD_US / 100 * percent;
    let (one, two) = (Path::new(VERSION_1), Path::new(VERSION_2));
    if one.join("cpu.cfs_quota_us").exists() || one.join("cgroup.procs").exists() {
        let files = vec![("cpu.cfs_period_us", PERIOD_US.to_string()), ("cpu.cfs_quota_us", quota_us.to_string())];
        return Ok((one.to_owned(), files));
    }
    // Children have the controller only if their parent says so.
    let enabled = fs::write(two.join("cgroup.subtree_control"), "+cpu");
    enabled.context(|| format!("no CPU quota below {VERSION_2}"))?;
    Ok((two.to_owned(), vec![("cpu.max", format!("{quota_us} {PERIOD_US}"))]))
}

/// The group that a process is in now.
fn home(root: &Path, pid: u32) -> PathBuf {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let path = groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers) = (fields.next()?, fields.next()?);
        let ours = match root.ends_with("cpu") {
            true => controllers.split(',').any(|name| name == "cpu"),
            false => number == "0",
        };
        fields.next().filter(|_| ours)
    });
    root.join(path.unwrap_or_default().trim_start_matches('/'))
}

/// Removes what tests that were killed left behind: the kernel refuses while anything is in it.
fn sweep(root: &Path) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}
