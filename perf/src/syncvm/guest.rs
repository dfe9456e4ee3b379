//! The synthetic guest: a process that stands for QEMU, maps the RAM file and writes pages when told, and the
//! [`Guest`] that syncvm works on.
//!
//! The process is this program again, with a variable in its environment. It makes the userfaultfd, because that acts on the
//! address space of its maker; the measuring process takes it over as the daemon does from the agent.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rig::client::rng::Rng;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};
use syncvm::exchange::{Guest, GuestError};
use syncvm::tracker::{DirtyTracker, UffdTracker, find_mappings};
use syncvm::{DirtySet, GuestRam, PAGE_BYTES};

use super::workload::{Side, Slot, fill};
use crate::peers::Running;
use crate::pin;

/// In the environment of the process that is the guest: descriptors of RAM file and socket, and its CPU.
const GUEST: &str = "PLOVER_PERF_GUEST";
/// Filling a GiB takes a second; anything longer means that the process hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// What QEMU's device state of a small machine amounts to.
pub const DEVICE_BYTES: usize = 60_000;
/// How much of it changes in a slot: timers, queue indices, registers.
const DEVICE_BYTES_CHANGED: usize = 2_000;

/// What the guest process is told; it answers each with a line.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    Fill { seed: u64 },
    Run { slot: Slot, side: Side },
    Stop,
    Continue,
}

/// An empty RAM file.
///
/// # Errors
/// No memory.
pub fn new_ram(pages: usize) -> Result<GuestRam> {
    let fd = memfd_create("plover-perf-guest", MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, (pages * PAGE_BYTES) as u64)?;
    Ok(GuestRam::new(fd, None)?)
}

/// Whether this process was started to be a guest; then it was one, and its end has come.
///
/// # Errors
/// The other side breaks off in the middle of a line, or says what nobody says.
pub fn was_guest() -> Result<bool> {
    let Ok(words) = std::env::var(GUEST) else { return Ok(false) };
    let numbers = words.split(',').map(|word| word.parse().context(GUEST)).collect::<Result<Vec<RawFd>>>()?;
    let [ram, socket, cpu] = numbers[..] else { bail!("{GUEST}={words}: three numbers are due") };
    // SAFETY: whoever set the variable left these two descriptors open for this process alone.
    let (ram, socket) = unsafe { (OwnedFd::from_raw_fd(ram), UnixStream::from(OwnedFd::from_raw_fd(socket))) };
    pin::pin(cpu as usize)?;
    be_guest(&GuestRam::new(ram, None)?, socket)?;
    Ok(true)
}

fn be_guest(ram: &GuestRam, socket: UnixStream) -> Result<()> {
    // SAFETY: the system call takes flags only and returns a new descriptor or -1.
    let uffd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let mut out = socket.try_clone()?;
    writeln!(out, "{uffd}")?;
    let mut stopped = false;
    for line in BufReader::new(socket).lines() {
        match serde_json::from_str(&line?)? {
            Order::Fill { seed } => fill(ram, seed),
            Order::Run { slot, side } => {
                ensure!(!stopped, "a guest that stands still was told to run");
                slot.write(ram, side);
            }
            Order::Stop => stopped = true,
            Order::Continue => stopped = false,
        }
        writeln!(out, "ok")?;
    }
    Ok(())
}

/// The process.
struct GuestProcess {
    socket: UnixStream,
    replies: BufReader<UnixStream>,
    /// Killed with this. It also ends by itself when the socket closes.
    _running: Running,
}

impl GuestProcess {
    /// Starts it on `cpu`. Returns its number and its userfaultfd too.
    fn start(ram: &GuestRam, cpu: usize, arguments: &[OsString]) -> Result<(GuestProcess, u32, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        // Copies without close-on-exec, for the child; closed here as soon as it has been started.
        let (file, theirs) = (ram.fd().try_clone_to_owned()?, OwnedFd::from(theirs));
        for fd in [&file, &theirs] {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments).env(GUEST, format!("{},{},{cpu}", file.as_raw_fd(), theirs.as_raw_fd()));
        let running = Running::start(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
        drop((file, theirs));
        let id = running.id();
        let replies = BufReader::new(ours.try_clone()?);
        let mut process = GuestProcess { socket: ours, replies, _running: running };
        let uffd: RawFd = process.reply()?.parse()?;
        ensure!(
            uffd >= 0,
            "the kernel gives no userfaultfd, without which pages are not tracked; see docs/operations.md"
        );
        let pid = Pid::from_raw(id as i32).context("the process has no number")?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let uffd = pidfd_getfd(&pidfd, uffd, PidfdGetfdFlags::empty())?;
        Ok((process, id, uffd))
    }

    fn reply(&mut self) -> Result<String> {
        let mut line = String::new();
        self.replies.read_line(&mut line).context("the guest process does not answer")?;
        ensure!(line.ends_with('\n'), "the guest process has ended");
        Ok(line.trim().to_owned())
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        let line = serde_json::to_string(order)? + "\n";
        self.socket.write_all(line.as_bytes())?;
        let reply = self.reply()?;
        ensure!(reply == "ok", "the guest process answers {reply:?} to {order:?}");
        Ok(())
    }
}

/// A guest as syncvm sees it.
pub struct SyntheticGuest {
    process: GuestProcess,
    ram: GuestRam,
    tracker: UffdTracker,
    device: Vec<u8>,
    side: Side,
}

impl SyntheticGuest {
    /// A guest whose RAM is full, the same for every guest of this size, on `cpu`.
    ///
    /// # Errors
    /// Not root, or the kernel cannot track pages, or there is no memory.
    pub fn start(side: Side, pages: usize, cpu: usize, arguments: &[OsString]) -> Result<SyntheticGuest> {
        let ram = new_ram(pages)?;
        let (mut process, id, uffd) = GuestProcess::start(&ram, cpu, arguments)?;
        // Before it is tracked: so that every page is in the process's page tables, as those of a guest in service are.
        process.order(&Order::Fill { seed: 1 })?;
        let tracker = UffdTracker::new(uffd, id, &find_mappings(id, ram.fd())?, pages)?;
        Ok(SyntheticGuest { process, ram, tracker, device: vec![0; DEVICE_BYTES], side })
    }

    /// Runs it for a slot.
    ///
    /// # Errors
    /// The process has ended.
    pub fn run(&mut self, slot: Slot) -> Result<()> {
        let mut random = Rng::new(slot.seed ^ slot.turn << 32 ^ self.side as u64);
        for byte in &mut self.device[..DEVICE_BYTES_CHANGED] {
            *byte = random.next_u64() as u8;
        }
        self.process.order(&Order::Run { slot, side: self.side })
    }

    /// The device state, for comparing.
    #[must_use]
    pub fn device(&self) -> &[u8] {
        &self.device
    }
}

impl Guest for SyntheticGuest {
    fn stop(&mut self) -> Result<(), GuestError> {
        self.process.order(&Order::Stop).map_err(|error| GuestError::new("stop", error))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.process.order(&Order::Continue).map_err(|error| GuestError::new("run", error))
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        let harvested = self.tracker.harvest(into);
        harvested.map(drop).map_err(|error| GuestError::new("tell its dirty pages", error))
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        Ok(self.device.clone())
    }

    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        self.device.clear();
        self.device.extend_from_slice(state);
        Ok(())
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::syncvm::workload::Shape;
    use syncvm::PageNumber;

    /// What to start this test program with, so that it becomes a guest.
    pub fn arguments() -> Vec<OsString> {
        ["--exact", "syncvm::guest::tests::guest_process", "--nocapture", "--test-threads=1"].map(OsString::from).into()
    }

    /// Not a test: the body of the guest process. Without its variable it does nothing.
    #[test]
    fn guest_process() {
        was_guest().unwrap();
    }

    #[test]
    fn the_tracker_reports_the_pages_of_the_slot_and_no_others() {
        if !rig::is_root() {
            eprintln!("skipped: needs root for the userfaultfd of another process");
            return;
        }
        let mut guest = SyntheticGuest::start(Side::Leader, 2048, pin::two_cpus().unwrap()[0], &arguments()).unwrap();
        for seed in 0..3 {
            let slot = Slot { seed, turn: 0, dirty: 300, different: 0, shape: Shape::REDIS };
            guest.run(slot).unwrap();
            guest.stop().unwrap();
            let mut found = DirtySet::new(2048);
            guest.harvest(&mut found).unwrap();
            let mut expected = slot.pages(2048);
            expected.sort_unstable();
            assert_eq!(found.iter().collect::<Vec<PageNumber>>(), expected);
            guest.resume().unwrap();
        }
        guest.stop().unwrap();
        let slot = Slot { seed: 3, turn: 0, dirty: 1, different: 0, shape: Shape::REDIS };
        assert!(guest.run(slot).is_err(), "a guest that stands still does not run");
    }
}
