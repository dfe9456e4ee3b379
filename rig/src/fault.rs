//! Faults of hosts, links and disks, each with its way back.
//!
//! What is switched on returns a [`Fault`]; undoing or dropping it switches it off again. Faults of different kinds
//! combine, and cuts of one link count: the link is whole again when the last one is undone. Links are cut at
//! the switch's port, so that the host itself notices nothing, as with a dead switch; rejected: netem (many
//! kernels lack it) and taking the host's own interface down (its sockets would get errors at once).

mod quota;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::error::{Context, with_sources};
use crate::host::{Host, SWITCH_BRIDGE, UPLINK};
use crate::process::{Process, start_time};
use crate::wait::{Deadline, wait_until};
use crate::{Result, RigError, tool};

type Undo = Box<dyn FnOnce() -> Result<()> + Send>;

/// A fault that is on. It goes off with [`Fault::undo`] or when dropped.
#[must_use = "a dropped fault is undone at once"]
pub struct Fault {
    what: String,
    undo: Option<Undo>,
}

impl Fault {
    fn new(what: String, undo: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        Self { what, undo: Some(Box::new(undo)) }
    }

    /// One line for a timeline: «h1: link cut».
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Switches it off.
    ///
    /// # Errors
    /// What the tool or system call says; the fault is then possibly still on.
    pub fn undo(mut self) -> Result<()> {
        self.undo.take().map_or(Ok(()), |undo| undo())
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take()
            && let Err(error) = undo()
        {
            eprintln!("rig: cannot undo «{}»: {}", self.what, with_sources(&error));
        }
    }
}

/// Whether a host notices that its link is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Frames vanish, the carrier stays: a dead switch.
    Silent,
    /// The host sees its carrier go: a pulled cable.
    CarrierLoss,
}

/// How often a host's link is cut in which way.
#[derive(Default)]
pub(crate) struct LinkCuts {
    silent: u32,
    carrier: u32,
    slow: bool,
}

impl LinkCuts {
    fn count(&mut self, cut: Cut) -> &mut u32 {
        match cut {
            Cut::Silent => &mut self.silent,
            Cut::CarrierLoss => &mut self.carrier,
        }
    }
}

impl Host {
    /// Cuts the host off from the switch, and so from everybody; its guest too.
    pub fn cut_link(&self, cut: Cut) -> Result<Fault> {
        self.change_link(|cuts| *cuts.count(cut) += 1)?;
        let host = self.clone();
        let what = format!("{}: link cut ({cut:?})", self.name());
        Ok(Fault::new(what, move || host.change_link(|cuts| *cuts.count(cut) -= 1)))
    }

    /// Drops what `other` sends to this host (not to its guest); the other direction works.
    pub fn drop_from(&self, other: &Host) -> Result<Fault> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let table = format!("plover_fault_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let rules = format!(
            "add table inet {table}\n\
             add chain inet {table} input {{ type filter hook input priority -300 ; }}\n\
             add rule inet {table} input ip saddr {} drop\n",
            other.ip()
        );
        self.nft(&rules)?;
        let host = self.clone();
        let what = format!("{}: hears nothing from {}", self.name(), other.name());
        Ok(Fault::new(what, move || host.unless_gone(|| host.nft(&format!("delete table inet {table}\n")))))
    }

    /// Cuts the pair in both directions; each still reaches everybody else.
    pub fn partition_from(&self, other: &Host) -> Result<Fault> {
        let (one, two) = (self.drop_from(other)?, other.drop_from(self)?);
        let what = format!("{} and {} cut off from each other", self.name(), other.name());
        Ok(Fault::new(what, move || one.undo().and(two.undo())))
    }

    /// Limits the host's link in both directions; what waits longer than `latency_ms` is dropped.
    ///
    /// # Errors
    /// Also when the link is slow already.
    pub fn slow_link(&self, rate_mbit: u32, latency_ms: u32) -> Result<Fault> {
        if std::mem::replace(&mut self.link_cuts().slow, true) {
            let said = "it is slow already; undo that fault first".to_owned();
            return Err(RigError::Tool { line: format!("slow link of {}", self.name()), said });
        }
        let host = self.clone();
        let fault = Fault::new(format!("{}: link at {rate_mbit} Mbit/s", self.name()), move || {
            host.link_cuts().slow = false;
            host.unless_gone(|| {
                let ends = host.link_ends().map(|(namespace, device)| {
                    tool::run("tc", &["-n", namespace, "qdisc", "del", "dev", device, "root"], "")
                });
                ends.into_iter().collect::<Result<Vec<_>>>().map(drop)
            })
        });
        let (rate, latency) = (format!("{rate_mbit}mbit"), format!("{latency_ms}ms"));
        for (namespace, device) in self.link_ends() {
            let place = ["-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf"];
            let limits = ["rate", &rate, "burst", "64kb", "latency", &latency];
            tool::run("tc", &[&place[..], &limits].concat(), "")?;
        }
        Ok(fault)
    }

    /// The host dies: its link goes silent first (a dead host sends no farewell), then every process in it is
    /// killed, and nothing restarts. Undone, the host has booted: the link works and supervised processes
    /// start again.
    pub fn crash(&self) -> Result<Fault> {
        let link = self.cut_link(Cut::Silent)?;
        let suspended = self.processes();
        suspended.iter().for_each(Process::suspend_restarts);
        let fault = Fault::new(format!("{}: host dead", self.name()), move || {
            let link = link.undo();
            suspended.iter().for_each(Process::resume_restarts);
            link
        });
        self.kill_everything()?;
        Ok(fault)
    }

    /// SIGKILL to every process on the host, in whatever way it was started; supervised ones start again
    /// unless that is suspended.
    pub fn kill_everything(&self) -> Result<()> {
        let victims = self.namespace().live()?;
        self.kill_and_wait(&victims)
    }

    /// SIGKILL to the processes whose name (`comm`, 15 bytes at most) begins with `name`: for QEMU when it was
    /// not started by [`Host::start`]. Returns how many there were.
    pub fn kill_program(&self, name: &str) -> Result<usize> {
        let mut victims = self.namespace().live()?;
        victims.retain(|(pid, _)| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.starts_with(name))
        });
        self.kill_and_wait(&victims)?;
        Ok(victims.len())
    }

    fn kill_and_wait(&self, victims: &[(u32, u64)]) -> Result<()> {
        self.signal_inside(victims, Signal::KILL)?;
        wait_until(Deadline::after_secs(10), "killed processes to end", || {
            let live = self.namespace().live().ok()?;
            victims.iter().all(|victim| !live.contains(victim)).then_some(())
        })
    }

    /// Freezes every process on the host, as a hung hypervisor or a long pause would.
    pub fn freeze(&self) -> Result<Fault> {
        let frozen = self.namespace().live()?;
        let (host, thawed) = (self.clone(), frozen.clone());
        let fault = Fault::new(format!("{}: frozen", self.name()), move || host.signal_inside(&thawed, Signal::CONT));
        self.signal_inside(&frozen, Signal::STOP)?;
        Ok(fault)
    }

    /// Gives the host a disk of its own, so that it can be filled: a tmpfs at `directory()/data`.
    pub fn mount_data_disk(&self, size_mib: u32) -> Result<DataDisk> {
        let path = self.directory().join("data");
        fs::create_dir_all(&path).context(|| format!("cannot create {}", path.display()))?;
        let (size, target) = (format!("size={size_mib}m"), path.display().to_string());
        tool::run("mount", &["-t", "tmpfs", "-o", &size, "plover-rig", &target], "")?;
        Ok(DataDisk { host: self.name().to_owned(), path })
    }

    fn link_cuts(&self) -> std::sync::MutexGuard<'_, LinkCuts> {
        self.inner.link_cuts.lock().expect("no holder of this lock panics")
    }

    /// Both ends of the cable to the switch, as (namespace, device).
    fn link_ends(&self) -> [(&str, &str); 2] {
        [(self.namespace().name(), UPLINK), (&self.inner.switch, self.name())]
    }

    fn change_link(&self, change: impl FnOnce(&mut LinkCuts)) -> Result<()> {
        let mut cuts = self.link_cuts();
        change(&mut cuts);
        let port = self.name();
        // Off the bridge rather than a disabled port: the kernel enables ports by itself when a carrier comes.
        let membership = if cuts.silent > 0 { "nomaster".to_owned() } else { format!("master {SWITCH_BRIDGE}") };
        let power = if cuts.carrier > 0 { "down" } else { "up" };
        let commands = format!("link set dev {port} {membership}\nlink set dev {port} {power}\n");
        self.unless_gone(|| tool::ip_batch(&self.inner.switch, &commands))
    }

    fn nft(&self, rules: &str) -> Result<()> {
        let namespace = self.namespace().name();
        tool::run("ip", &["netns", "exec", namespace, "nft", "-f", "-"], rules).map(drop)
    }

    /// A fault may outlive its test bed; there is nothing to undo then.
    fn unless_gone(&self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        let path = format!("/run/netns/{}", self.namespace().name());
        if Path::new(&path).exists() { act() } else { Ok(()) }
    }

    /// Signals those of the processes (id, start time) that still live on this host.
    fn signal_inside(&self, processes: &[(u32, u64)], signal: Signal) -> Result<()> {
        for &(pid, started) in processes {
            let Some(raw) = Pid::from_raw(pid.cast_signed()) else {
                continue;
            };
            let Ok(handle) = rustix::process::pidfd_open(raw, PidfdFlags::empty()) else {
                continue;
            };
            // The handle pins the process; the second look makes sure that it is the one we mean.
            let is_meant = self.namespace().contains(pid) && start_time(pid) == Some(started);
            if pid == std::process::id() || !is_meant {
                continue;
            }
            match rustix::process::pidfd_send_signal(&handle, signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => {
                    return Err(error).context(|| format!("cannot signal {pid} on {}", self.name()));
                }
            }
        }
        Ok(())
    }
}

impl Process {
    /// SIGSTOP now, SIGCONT when undone.
    pub fn frozen(&self) -> Result<Fault> {
        self.freeze()?;
        let process = self.clone();
        Ok(Fault::new(format!("{} frozen", self.name()), move || process.thaw()))
    }

    /// Lets it run for a share of the time only, as if others had the rest: stopped and continued in turn, with this
    /// period.
    pub fn starved(&self, share_percent: u32, period: Duration) -> Result<Fault> {
        let run = period * share_percent.min(100) / 100;
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let process = self.clone();
        self.freeze()?;
        let thread = std::thread::spawn(move || {
            loop {
                // A process that is being restarted just now cannot be signalled, and the next one can.
                let _ = process.thaw();
                if ended.recv_timeout(run) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                let _ = process.freeze();
                if ended.recv_timeout(period - run) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        });
        let process = self.clone();
        Ok(Fault::new(format!("{} at {share_percent} % of its time", self.name()), move || {
            drop(end);
            let _ = thread.join();
            process.thaw()
        }))
    }

    /// SIGKILL now, and no restart until undone.
    pub fn killed(&self) -> Result<Fault> {
        self.suspend_restarts();
        let process = self.clone();
        let fault = Fault::new(format!("{} killed", self.name()), move || {
            process.resume_restarts();
            Ok(())
        });
        self.kill()?;
        Ok(fault)
    }
}

/// A small disk of one host. It goes with the test bed.
pub struct DataDisk {
    host: String,
    path: PathBuf,
}

impl DataDisk {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Fills it to the last byte. Undone, the space is free again.
    pub fn fill(&self) -> Result<Fault> {
        let filler = self.path.join("filler");
        let undo_path = filler.clone();
        let fault = Fault::new(format!("{}: disk full", self.host), move || {
            match fs::remove_file(&undo_path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
            .context(|| format!("cannot remove {}", undo_path.display()))
        });
        take_all_space(&filler).context(|| format!("cannot fill {}", filler.display()))?;
        Ok(fault)
    }
}

fn take_all_space(filler: &Path) -> io::Result<()> {
    let file = File::create(filler)?;
    let mut length_bytes = 0;
    // Large steps first, then ever smaller ones, until not even a page fits.
    let mut step_bytes: u64 = 64 << 20;
    while step_bytes >= 4096 {
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), length_bytes, step_bytes) {
            Ok(()) => length_bytes += step_bytes,
            Err(rustix::io::Errno::NOSPC) => step_bytes /= 2,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
