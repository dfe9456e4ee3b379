//! The thread that reads the vCPU threads' CPU clocks and publishes their sum in the clock page.
//!
//! It sleeps on the page's period word: for ever-ish while the period is 0, for one period otherwise, so that the daemon's
//! change takes effect at once and an idle VM costs nothing. It belongs to one connection and ends with it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::clock_page::PERIOD_STOP;
use crate::sys::{self, PageMapping};

/// How often the list of vCPU threads is read again while sampling (CPU hotplug).
const RESCAN_NS: u64 = 1_000_000_000;
/// A sleeping sampler looks up this often in case the daemon overwrote the word that ends it.
const IDLE_WAIT_US: u32 = 10_000_000;

struct Shared {
    mapping: PageMapping,
    stop: AtomicBool,
}

/// A running sampler; ends its thread when dropped.
pub(crate) struct Sampler {
    shared: Arc<Shared>,
}

impl Sampler {
    /// Starts a sampler that sleeps, and returns the descriptor of its page.
    pub(crate) fn start() -> io::Result<(Sampler, OwnedFd)> {
        let (mapping, fd) = PageMapping::create()?;
        mapping.page().initialise();
        let shared = Arc::new(Shared { mapping, stop: AtomicBool::new(false) });
        let theirs = Arc::clone(&shared);
        sys::spawn_quiet("plover-clocks", move || run(&theirs))?;
        Ok((Sampler { shared }, fd))
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.mapping.page().replace_period(PERIOD_STOP);
    }
}

fn run(shared: &Shared) {
    sys::precise_timers();
    let page = shared.mapping.page();
    let mut clocks = Vec::new();
    let mut scanned_ns = None;
    while !shared.stop.load(Ordering::Acquire) {
        let period_us = page.period_us();
        if period_us == PERIOD_STOP {
            return;
        }
        if period_us == 0 {
            scanned_ns = None;
            page.wait_period(0, IDLE_WAIT_US);
            continue;
        }
        let now_ns = sys::clock_ns(libc::CLOCK_MONOTONIC).unwrap_or(0);
        if scanned_ns.is_none_or(|then| now_ns.saturating_sub(then) > RESCAN_NS) {
            vcpu_clocks(&mut clocks);
            scanned_ns = Some(now_ns);
        }
        let mut cpu_ns: u64 = 0;
        for clock in &clocks {
            match sys::clock_ns(*clock) {
                Some(reading) => cpu_ns = cpu_ns.saturating_add(reading),
                // A vCPU went away: look again next time.
                None => scanned_ns = None,
            }
        }
        let at_ns = sys::clock_ns(libc::CLOCK_MONOTONIC).unwrap_or(0);
        page.publish(at_ns, cpu_ns, clocks.len() as u64);
        page.wait_period(period_us, period_us);
    }
}

/// The CPU clocks of this process's vCPU threads, which QEMU names when run with `-name …,debug-threads=on`.
fn vcpu_clocks(clocks: &mut Vec<libc::clockid_t>) {
    clocks.clear();
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else {
        return;
    };
    for thread in threads.flatten() {
        let Some(tid) = thread.file_name().to_str().and_then(|name| name.parse::<libc::pid_t>().ok()) else {
            continue;
        };
        if std::fs::read(thread.path().join("comm")).is_ok_and(|name| is_vcpu(&name)) {
            clocks.push(sys::thread_clock(tid));
        }
    }
}

/// `CPU 0/KVM`, `CPU 3/TCG`, and `ALL CPUs/TCG` when one thread runs them all.
fn is_vcpu(comm: &[u8]) -> bool {
    let numbered = comm.strip_prefix(b"CPU ").and_then(|rest| rest.first()).is_some_and(u8::is_ascii_digit);
    (numbered && comm.contains(&b'/')) || comm.starts_with(b"ALL CPUs/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpu_threads_are_told_by_their_names() {
        assert!(is_vcpu(b"CPU 0/TCG\n") && is_vcpu(b"CPU 12/KVM\n") && is_vcpu(b"ALL CPUs/TCG\n"));
        for other in ["qemu-system-x86", "CPU /TCG", "CPU", "call_rcu", "IO mon_iothread", "", "CPU 0"] {
            assert!(!is_vcpu(other.as_bytes()), "{other}");
        }
    }

    #[test]
    fn a_thread_clock_counts_that_threads_work() {
        // SAFETY: gettid takes nothing.
        let clock = sys::thread_clock(unsafe { libc::gettid() });
        let before = sys::clock_ns(clock).unwrap_or(u64::MAX);
        let mut sum = 0u64;
        for number in 0..5_000_000u64 {
            sum = std::hint::black_box(sum ^ number);
        }
        let after = sys::clock_ns(clock).unwrap_or(0);
        assert!(after > before, "{before} .. {after}");
    }
}
