//! The trackers against a real process: a child maps the RAM file, makes a userfaultfd and writes on command.
//!
//! The child is this test binary again, started at `child_process`. Needs root (pagemap of another process).

use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::{Rng, snapshot};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use syncvm::tracker::{Candidates, DirtyTracker, TrackerKind, choose};
use syncvm::{DirtySet, GuestRam, PAGE_BYTES, PageNumber};

const CHILD: &str = "PLOVER_TRACKER_TEST_CHILD";
const PAGES: usize = 3000;

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
                let writer = std::thread::spawn(move || storm_until(&ram, &stopping));
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

fn storm_until(ram: &GuestRam, stop: &AtomicBool) -> u64 {
    let mut rng = Rng(5);
    let mut writes = 0;
    while !stop.load(Ordering::Relaxed) {
        let page = PageNumber(rng.below(PAGES) as u32);
        let fill = rng.next() as u8;
        ram.write_page(page, &[fill; PAGE_BYTES]);
        writes += 1;
    }
    writes
}

struct Process {
    child: Child,
    socket: UnixStream,
    replies: BufReader<UnixStream>,
    ram: GuestRam,
    uffd: Option<OwnedFd>,
}

impl Process {
    fn start() -> Self {
        let fd = memfd_create("plover-tracker-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, (PAGES * PAGE_BYTES) as u64).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Copies without close-on-exec, for the child only; closed here as soon as it has been started.
        let (for_child, theirs) = (fd.try_clone().unwrap(), OwnedFd::from(theirs));
        for fd in [&for_child, &theirs] {
            fcntl_setfd(fd, FdFlags::empty()).unwrap();
        }
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tracker::child_process", "--nocapture", "--test-threads=1"])
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

    fn command(&mut self, line: &str) {
        writeln!(self.socket, "{line}").unwrap();
        assert_eq!(self.reply(), "ok");
    }

    fn write(&mut self, pages: &[u32]) {
        let words: Vec<String> = pages.iter().map(u32::to_string).collect();
        self.command(&format!("write {}", words.join(" ")));
    }

    fn tracker(&mut self, force: Option<TrackerKind>) -> (Box<dyn DirtyTracker>, syncvm::tracker::Choice) {
        self.try_tracker(force).unwrap()
    }

    fn try_tracker(
        &mut self,
        force: Option<TrackerKind>,
    ) -> Result<(Box<dyn DirtyTracker>, syncvm::tracker::Choice), syncvm::tracker::TrackerError> {
        choose(Candidates { pid: self.child.id(), ram: self.ram.fd(), pages: PAGES, uffd: self.uffd.take(), force })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The child ends when its socket closes; killing it makes that certain.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn harvest(tracker: &mut dyn DirtyTracker) -> Vec<u32> {
    let mut set = DirtySet::new(PAGES);
    let stats = tracker.harvest(&mut set).unwrap();
    assert!(stats.pages >= set.count());
    set.iter().map(|page| page.0).collect()
}

#[test]
fn the_uffd_tracker_finds_exactly_what_was_written() {
    let mut process = Process::start();
    process.write(&[1, 2]);
    let (mut tracker, choice) = process.tracker(None);
    if choice.kind != TrackerKind::Uffd {
        panic!("this kernel lacks the best tracker: {}", choice.reason);
    }
    assert_eq!(harvest(&mut *tracker), [0u32; 0], "clean at the start");
    process.write(&[0, 5, 6, 7, 2999]);
    assert_eq!(harvest(&mut *tracker), [0, 5, 6, 7, 2999]);
    assert_eq!(harvest(&mut *tracker), [0u32; 0], "reported once");
    process.write(&[5]);
    assert_eq!(harvest(&mut *tracker), [5], "protected again");
    // The backend's own writes are invisible: it records them itself.
    process.ram.write_page(PageNumber(77), &[1; PAGE_BYTES]);
    assert_eq!(harvest(&mut *tracker), [0u32; 0]);
    let mut rng = Rng(1);
    for _ in 0..20 {
        let mut pages: Vec<u32> = (0..200).map(|_| rng.below(PAGES) as u32).collect();
        process.write(&pages);
        pages.sort_unstable();
        pages.dedup();
        assert_eq!(harvest(&mut *tracker), pages);
    }
}

#[test]
fn more_ranges_than_one_call_returns_are_all_found() {
    let mut process = Process::start();
    let (mut tracker, _) = process.tracker(Some(TrackerKind::Uffd));
    let every_other: Vec<u32> = (0..PAGES as u32).step_by(2).collect();
    process.write(&every_other);
    assert_eq!(harvest(&mut *tracker), every_other);
}

/// Pre-copy with nothing but harvests: copying what each harvest names must end with an equal memory.
fn no_write_is_missed(process: &mut Process, tracker: &mut dyn DirtyTracker, rounds: usize) {
    let mut shadow = snapshot(&process.ram);
    let mut page = [0; PAGE_BYTES];
    let mut seen = 0;
    let mut copy = |tracker: &mut dyn DirtyTracker, ram: &GuestRam| {
        let mut set = DirtySet::new(PAGES);
        tracker.harvest(&mut set).unwrap();
        for number in set.iter() {
            ram.read_page(number, &mut page);
            shadow[number.file_offset()..][..PAGE_BYTES].copy_from_slice(&page);
        }
        seen += set.count();
    };
    process.command("storm");
    let start = Instant::now();
    for _ in 0..rounds {
        copy(tracker, &process.ram);
    }
    while start.elapsed() < Duration::from_millis(300) {
        copy(tracker, &process.ram);
    }
    process.command("calm");
    copy(tracker, &process.ram);
    assert!(seen > 100, "the storm was seen: {seen}");
    assert!(shadow == snapshot(&process.ram), "a written page was missed");
}

#[test]
fn no_written_page_is_missed_while_the_process_writes() {
    let mut process = Process::start();
    let (mut tracker, _) = process.tracker(Some(TrackerKind::Uffd));
    assert!(tracker.exact_while_running());
    no_write_is_missed(&mut process, &mut *tracker, 50);
}

#[test]
fn the_full_tracker_and_soft_dirty_where_it_exists_miss_nothing() {
    let mut process = Process::start();
    let (mut tracker, choice) = process.tracker(Some(TrackerKind::Full));
    assert_eq!(choice.reason, "asked for by the configuration");
    no_write_is_missed(&mut process, &mut *tracker, 2);
    match process.try_tracker(Some(TrackerKind::SoftDirty)) {
        Err(error) => assert!(error.to_string().contains("CONFIG_MEM_SOFT_DIRTY"), "{error}"),
        Ok((mut tracker, _)) => {
            assert!(!tracker.exact_while_running());
            process.write(&(0..PAGES as u32).collect::<Vec<_>>());
            harvest(&mut *tracker);
            process.write(&[3, 1000]);
            let found = harvest(&mut *tracker);
            assert!(found.contains(&3) && found.contains(&1000));
        }
    }
}

#[test]
fn without_a_userfaultfd_the_choice_falls_back_and_says_why() {
    let mut process = Process::start();
    process.uffd = None;
    let (tracker, choice) = process.tracker(None);
    assert_ne!(tracker.kind(), TrackerKind::Uffd);
    assert!(choice.reason.contains("not uffd: the agent handed over no userfaultfd"), "{}", choice.reason);
    let Err(error) = process.try_tracker(Some(TrackerKind::Uffd)) else {
        panic!("forcing what is missing must fail");
    };
    assert!(error.to_string().contains("no userfaultfd"), "{error}");
}

#[test]
fn tracking_that_ended_is_an_error_and_not_an_empty_harvest() {
    let mut process = Process::start();
    let (mut tracker, _) = process.tracker(Some(TrackerKind::Uffd));
    process.child.kill().unwrap();
    process.child.wait().unwrap();
    let mut set = DirtySet::new(PAGES);
    assert!(tracker.harvest(&mut set).is_err(), "the process is gone");
    process = Process::start();
    let elsewhere = Process::start();
    let wrong = choose(Candidates {
        pid: process.child.id(),
        ram: elsewhere.ram.fd(),
        pages: PAGES,
        uffd: process.uffd.take(),
        force: Some(TrackerKind::Uffd),
    });
    assert!(wrong.err().unwrap().to_string().contains("share=on"));
}
