//! What runs inside the guest of `rig/tests/nvme.rs`: the storage log on SPDK, on emulated NVMe controllers.

use std::alloc::{GlobalAlloc, Layout, System};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tracing_subscriber::filter::LevelFilter;

#[path = "nvme_guest/device.rs"]
mod device;
#[path = "nvme_guest/log.rs"]
mod log;

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;
/// Nothing in here takes longer.
const LIMIT: Duration = Duration::from_secs(60);

/// Counts allocations, to see that a commit makes none.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is passed to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as for this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as for this function.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> ExitCode {
    let log = tracing_subscriber::fmt().with_max_level(LevelFilter::WARN).with_writer(std::io::stderr);
    log.with_ansi(false).without_time().init();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["selftest", good, bad, slow] => device::selftest(good, bad, slow),
        ["append", devices, run, ref runs @ ..] => numbers([run]).and_then(|[run]| log::append(devices, run, runs)),
        ["check", devices, ref runs @ ..] => log::check(devices, false, runs),
        ["check-alone", devices, ref runs @ ..] => log::check(devices, true, runs),
        ["kill-rounds", devices, rounds] => numbers([rounds]).and_then(|[rounds]| log::kill_rounds(devices, rounds)),
        ["mirror", devices] => log::mirror(devices),
        _ => Err(anyhow::anyhow!("unknown arguments {words:?}")),
    };
    match outcome {
        Ok(()) => {
            println!("PLOVER-NVME-OK {}", words[0]);
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("PLOVER-NVME-FAILED {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn numbers<const N: usize>(words: [&str; N]) -> Result<[u64; N]> {
    let mut parsed = [0; N];
    for (number, word) in parsed.iter_mut().zip(words) {
        *number = word.parse().with_context(|| format!("«{word}» is no number"))?;
    }
    Ok(parsed)
}

/// A small generator: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
