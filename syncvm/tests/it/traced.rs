//! A traced process: a child maps the RAM file, makes a userfaultfd and writes on command.
//!
//! The child is this test binary again, started at `child_process`. Needs root (pagemap of another process).

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::Rng;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use syncvm::tracker::{Candidates, Choice, DirtyTracker, TrackerError, TrackerKind, choose};
use syncvm::{GuestRam, PAGE_BYTES, PageNumber};

const CHILD: &str = "PLOVER_TRACKER_TEST_CHILD";
pub const PAGES: usize = 3000;

/// Not a test: the body of the child process. Without its variable it does nothing.
#[test]
fn child_process() {
    let Ok(fds) = std::env::var(CHILD) else {
        return;
    };
    let fds: Vec<RawFd> = fds.split(',').map(|fd| fd.parse().unwrap()).collect();
    // SAFETY: the parent left these two descriptors open for this process alone.
    let (ram, socket) = unsafe { (OwnedFd::from_raw_fd(fds[0]), UnixStream::from(OwnedFd::from_raw_fd(fds[1]))) };
    let ram = GuestRam::new(ram, None).unwrap();
    // SAFETY: the system call takes flags only and returns a new descriptor or -1.
    let uffd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let mut out = socket.try_clone().unwrap();
    writeln!(out, "{uffd}").unwrap();
    let mut storm: Option<(Arc<AtomicBool>, std::thread::JoinHandle<u64>)> = None;
    for line in BufReader::new(socket).lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        match words.next().unwrap() {
            "write" => {
                for word in words {
                    ram.write_page(PageNumber(word.parse().unwrap()), &[7; PAGE_BYTES]);
                }
            }
            "storm" => {
                let (ram, stop) = (ram.clone(), Arc::new(AtomicBool::new(false)));
                let stopping = Arc::clone(&stop);
                let seed: u64 = words.next().unwrap().parse().unwrap();
                let writer = std::thread::spawn(move || storm_until(&ram, seed, &stopping));
                storm = Some((stop, writer));
            }
            "calm" => {
                let (stop, writer) = storm.take().unwrap();
                stop.store(true, Ordering::Relaxed);
                assert!(writer.join().unwrap() > 0);
            }
            other => panic!("unknown command {other}"),
        }
        writeln!(out, "ok").unwrap();
    }
}

/// Writes whole pages at random, half of them among the first few, until told to stop.
fn storm_until(ram: &GuestRam, seed: u64, stop: &AtomicBool) -> u64 {
    let mut rng = Rng(seed);
    let mut writes = 0;
    loop {
        let among = if rng.below(2) == 0 { ram.pages() } else { 20 };
        let page = PageNumber(rng.below(among) as u32);
        let fill = rng.next() as u8;
        ram.write_page(page, &[fill; PAGE_BYTES]);
        writes += 1;
        if stop.load(Ordering::Relaxed) {
            return writes;
        }
    }
}

/// What the RAM file is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Pages of 4 KiB.
    Normal,
    /// Pages of 2 MiB, of which the caller has reserved enough.
    Huge,
}

pub struct Process {
    pub child: Child,
    socket: UnixStream,
    replies: BufReader<UnixStream>,
    pub ram: GuestRam,
    pub uffd: Option<OwnedFd>,
}

impl Process {
    pub fn start() -> Self {
        Self::with(Backing::Normal, PAGES)
    }

    pub fn with(backing: Backing, pages: usize) -> Self {
        let huge = if backing == Backing::Huge { MemfdFlags::HUGETLB } else { MemfdFlags::empty() };
        let fd = memfd_create("plover-tracker-test", MemfdFlags::CLOEXEC | huge).unwrap();
        ftruncate(&fd, (pages * PAGE_BYTES) as u64).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Copies without close-on-exec, for the child only; closed here as soon as it has been started.
        let (for_child, theirs) = (fd.try_clone().unwrap(), OwnedFd::from(theirs));
        for fd in [&for_child, &theirs] {
            fcntl_setfd(fd, FdFlags::empty()).unwrap();
        }
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "traced::child_process", "--nocapture", "--test-threads=1"])
            .env(CHILD, format!("{},{}", for_child.as_raw_fd(), theirs.as_raw_fd()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        drop((for_child, theirs));
        let mut process = Self {
            child,
            replies: BufReader::new(ours.try_clone().unwrap()),
            socket: ours,
            ram: GuestRam::new(fd, None).unwrap(),
            uffd: None,
        };
        let uffd: i32 = process.reply().parse().unwrap();
        assert!(uffd >= 0, "the child could not make a userfaultfd");
        let pid = Pid::from_child(&process.child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        process.uffd = Some(pidfd_getfd(&pidfd, uffd, PidfdGetfdFlags::empty()).unwrap());
        process
    }

    fn reply(&mut self) -> String {
        let mut line = String::new();
        self.replies.read_line(&mut line).expect("the child answers in time");
        line.trim().to_string()
    }

    pub fn command(&mut self, line: &str) {
        writeln!(self.socket, "{line}").unwrap();
        assert_eq!(self.reply(), "ok");
    }

    pub fn write(&mut self, pages: &[u32]) {
        let words: Vec<String> = pages.iter().map(u32::to_string).collect();
        self.command(&format!("write {}", words.join(" ")));
    }

    pub fn tracker(&mut self, force: Option<TrackerKind>) -> (Box<dyn DirtyTracker>, Choice) {
        self.try_tracker(force).unwrap()
    }

    pub fn try_tracker(&mut self, force: Option<TrackerKind>) -> Result<(Box<dyn DirtyTracker>, Choice), TrackerError> {
        // A copy, so that one process can have several trackers, one after the other.
        let uffd = self.uffd.as_ref().map(|uffd| uffd.as_fd().try_clone_to_owned().unwrap());
        choose(Candidates { pid: self.child.id(), ram: self.ram.fd(), pages: self.ram.pages(), uffd, force })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The child ends when its socket closes; killing it makes that certain.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}
