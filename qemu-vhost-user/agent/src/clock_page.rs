//! The page that daemon and agent share: the agent's sampler publishes the vCPU threads' CPU time in it, the daemon
//! sets the sampling period. Both sides use this file, so there is one description of the layout.
//!
//! The sample is a seqlock: `sequence` is odd while the sampler writes, so a reader copies the fields and takes them
//! only if `sequence` was even and did not move. Reading costs a few loads and no system call, which is why the
//! reactor can do it on every turn. The period is a futex word: 0 puts the sampler to sleep, and whoever
//! changes it must wake the word ([`ClockPage::set_period_us`] does).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::protocol::{MAGIC, PROTOCOL_VERSION};

/// Size of the shared object; one page.
pub const CLOCK_PAGE_BYTES: usize = 4096;
/// Sampling period that the daemon starts with.
pub const DEFAULT_PERIOD_US: u32 = 100;
/// Period word that ends the sampler; only the agent writes it.
pub(crate) const PERIOD_STOP: u32 = u32::MAX;
/// Longest period that is taken as it is.
pub const MAX_PERIOD_US: u32 = 1_000_000;
/// A writer needs well under a microsecond, so a reader that fails this often saw a writer that was preempted.
const READ_ATTEMPTS: u32 = 64;

/// Layout of the shared page. Two cache lines with one writer each.
#[repr(C)]
pub struct ClockPage {
    magic: AtomicU32,
    version: AtomicU32,
    sequence: AtomicU64,
    at_ns: AtomicU64,
    cpu_ns: AtomicU64,
    vcpus: AtomicU64,
    _pad: [u64; 3],
    period_us: AtomicU32,
}

const _: () = assert!(size_of::<ClockPage>() <= CLOCK_PAGE_BYTES);
const _: () = assert!(std::mem::offset_of!(ClockPage, period_us) == 64);

/// One reading of the vCPU clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockSample {
    /// CLOCK_MONOTONIC when the clocks were read.
    pub at_ns: u64,
    /// Sum of the CPU time of all vCPU threads since they started. Falls only if a vCPU was unplugged.
    pub cpu_ns: u64,
    /// Number of vCPU threads found; 0 says that QEMU runs without `-name …,debug-threads=on`.
    pub vcpus: u64,
    /// Counts samples from 1; an unchanged value means that there is no newer sample.
    pub sequence: u64,
}

impl ClockPage {
    /// Marks a zeroed page as a clock page.
    pub(crate) fn initialise(&self) {
        self.version.store(PROTOCOL_VERSION, Ordering::Relaxed);
        self.magic.store(MAGIC, Ordering::Release);
    }

    /// Whether an agent of this version made the page.
    pub fn is_valid(&self) -> bool {
        self.magic.load(Ordering::Acquire) == MAGIC && self.version.load(Ordering::Relaxed) == PROTOCOL_VERSION
    }

    /// The newest sample; `None` before the first one, or if a writer stayed in the way (try again later).
    pub fn read(&self) -> Option<ClockSample> {
        for _ in 0..READ_ATTEMPTS {
            let before = self.sequence.load(Ordering::Acquire);
            if before == 0 {
                return None;
            }
            if before & 1 == 1 {
                std::hint::spin_loop();
                continue;
            }
            let at_ns = self.at_ns.load(Ordering::Relaxed);
            let cpu_ns = self.cpu_ns.load(Ordering::Relaxed);
            let vcpus = self.vcpus.load(Ordering::Relaxed);
            // The loads above must be done before the sequence is looked at again.
            fence(Ordering::Acquire);
            if self.sequence.load(Ordering::Relaxed) == before {
                return Some(ClockSample { at_ns, cpu_ns, vcpus, sequence: before >> 1 });
            }
        }
        None
    }

    /// Publishes a sample. There must be one writer only: the sampler.
    pub(crate) fn publish(&self, at_ns: u64, cpu_ns: u64, vcpus: u64) {
        let before = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(before.wrapping_add(1), Ordering::Relaxed);
        // The odd sequence must be visible before any of the fields.
        fence(Ordering::Release);
        self.at_ns.store(at_ns, Ordering::Relaxed);
        self.cpu_ns.store(cpu_ns, Ordering::Relaxed);
        self.vcpus.store(vcpus, Ordering::Relaxed);
        self.sequence.store(before.wrapping_add(2), Ordering::Release);
    }

    /// The sampling period; 0 means that the sampler sleeps.
    pub fn period_us(&self) -> u32 {
        self.period_us.load(Ordering::Acquire)
    }

    /// Sets the sampling period (0 puts the sampler to sleep) and wakes the sampler if that changes anything.
    /// Longer than [`MAX_PERIOD_US`] is taken as that.
    pub fn set_period_us(&self, period_us: u32) {
        self.replace_period(period_us.min(MAX_PERIOD_US));
    }

    pub(crate) fn replace_period(&self, word: u32) {
        if self.period_us.swap(word, Ordering::AcqRel) != word {
            crate::sys::futex_wake_all(&self.period_us);
        }
    }

    /// Sleeps while the period word is `word`, at most `timeout_us`.
    pub(crate) fn wait_period(&self, word: u32, timeout_us: u32) {
        crate::sys::futex_wait(&self.period_us, word, timeout_us);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    fn blank() -> ClockPage {
        // SAFETY: every field is an integer or an atomic integer, for which all-zero bytes are a value.
        unsafe { std::mem::zeroed() }
    }

    #[test]
    fn nothing_is_read_before_the_first_sample() {
        let page = blank();
        assert!(!page.is_valid());
        page.initialise();
        assert!(page.is_valid());
        assert_eq!(page.read(), None);
        page.publish(7, 8, 2);
        assert_eq!(page.read(), Some(ClockSample { at_ns: 7, cpu_ns: 8, vcpus: 2, sequence: 1 }));
    }

    #[test]
    fn a_reader_never_sees_a_mixture_of_two_samples() {
        let page = blank();
        let stop = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut number = 1;
                while !stop.load(Ordering::Relaxed) {
                    page.publish(number, number.wrapping_mul(3), number.wrapping_mul(5));
                    number = number.wrapping_add(1);
                }
            });
            let mut seen = 0;
            let mut last = 0;
            while seen < 20_000 {
                let Some(sample) = page.read() else { continue };
                assert_eq!(sample.cpu_ns, sample.at_ns * 3);
                assert_eq!(sample.vcpus, sample.at_ns * 5);
                assert!(sample.sequence >= last);
                last = sample.sequence;
                seen += 1;
            }
            stop.store(true, Ordering::Relaxed);
            seen
        });
        assert_eq!(seen, 20_000);
    }

    #[test]
    fn a_sample_that_is_being_written_is_not_read() {
        let page = blank();
        page.publish(1, 2, 3);
        page.sequence.fetch_add(1, Ordering::Relaxed);
        assert_eq!(page.read(), None);
    }
}
