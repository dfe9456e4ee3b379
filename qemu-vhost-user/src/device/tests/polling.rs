//! A device that is polled wants no kicks, allocates nothing, takes no lock and makes no system call; and it can go to sleep
//! without losing a wake-up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::bed::frame;
use super::mapped::{MappedBed, MappedRing};
use crate::device::burst::FrameSink;
use crate::device::features::Features;
use crate::device::net::{Inject, NetDevice};
use counting_allocator::{Counting, allocations};

const EVENT_IDX: u64 = 1 << 29;
const DEADLINE: Duration = Duration::from_secs(60);

#[global_allocator]
static COUNTING: Counting = Counting;

/// Room for one frame; counts.
struct Slot {
    frame: [u8; 512],
    len: usize,
    frames: u64,
}

impl Slot {
    fn new() -> Self {
        Self { frame: [0; 512], len: 0, frames: 0 }
    }
}

impl FrameSink for Slot {
    fn room(&mut self, len_bytes: usize) -> Option<&mut [u8]> {
        self.len = len_bytes;
        self.frame.get_mut(..len_bytes)
    }

    fn commit(&mut self) -> bool {
        self.frames += 1;
        true
    }
}

/// The guest sends and receives without a pause until `frames` have gone each way. Returns by itself.
fn guest(mut rx: MappedRing, mut tx: MappedRing, frames: u64) {
    let deadline = Instant::now() + DEADLINE;
    let (mut sent, mut received, mut bytes) = (0, 0, [0; 512]);
    let down = frame(7, 100);
    let up = frame(8, 100);
    while sent < frames || received < frames {
        while rx.free() > 0 {
            rx.offer(true);
        }
        while let Some(len) = rx.reap(&mut bytes) {
            assert_eq!(bytes[12..len], down[12..]);
            received += 1;
        }
        while tx.reap(&mut bytes).is_some() {}
        while sent < frames && tx.free() > 0 {
            tx.send(&up, true);
            sent += 1;
        }
        assert!(Instant::now() < deadline, "sent {sent} and received {received} of {frames}");
    }
}

/// What a poll-mode reactor does, until `frames` have gone each way.
fn serve(device: &mut NetDevice, frames: u64, down: &[u8]) -> u64 {
    let mut sink = Slot::new();
    let mut injected = 0;
    while injected < frames || sink.frames < frames {
        let batch = std::iter::repeat_n(down, (frames - injected).min(64) as usize);
        injected += device.inject_batch(batch).0 as u64;
        device.collect(64, &mut sink);
        device.flush_signals();
        assert!(!device.has_commands());
    }
    injected + sink.frames
}

/// Kills the calling thread at its next system call that is not `exit`.
fn allow_nothing_but_exit() {
    let load = |offset: u32| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: offset };
    let give = |verdict: u32| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: verdict };
    let exit = libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_exit as u32 };
    let mut program = [load(0), exit, give(libc::SECCOMP_RET_ALLOW), give(libc::SECCOMP_RET_KILL_THREAD)];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls concern this thread only; the program lives during the call, which copies it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

/// Runs `work` in a thread that may not enter the kernel, and returns its result; None if it tried to.
fn without_system_calls(work: impl FnOnce() -> u64 + Send + 'static, deadline: Duration) -> Option<u64> {
    let result = Arc::new(AtomicU64::new(u64::MAX));
    let theirs = Arc::clone(&result);
    // Never joined: it ends by a bare exit, or is killed.
    std::thread::spawn(move || {
        let theirs = std::mem::ManuallyDrop::new(theirs);
        allow_nothing_but_exit();
        theirs.store(work(), Ordering::Release);
        // SAFETY: ends this thread alone; its stack and what lies on it stay as they are, which leaks a little of a test.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    });
    let deadline = Instant::now() + deadline;
    while result.load(Ordering::Acquire) == u64::MAX && Instant::now() < deadline {
        std::thread::yield_now();
    }
    Some(result.load(Ordering::Acquire)).filter(|result| *result != u64::MAX)
}

#[test]
fn frames_pass_without_a_lock_or_a_system_call() {
    const FRAMES: u64 = 100_000;
    // As DPDK in the guest: interrupts are refused by the flag.
    let features = Features(Features::offered().0 & !EVENT_IDX);
    let MappedBed { mut device, dirty, mut rx, mut tx, .. } = MappedBed::started(features, 1);
    let (rx, tx) = (rx.remove(0), tx.remove(0));
    // The interrupt that a started ring owes, and then no more.
    device.flush_signals();
    [&rx, &tx].into_iter().for_each(MappedRing::refuse_interrupts);
    device.set_polling(true);
    // Whoever takes a lock that the device shares waits for us.
    let held = dirty.hold_lock();
    let driver = std::thread::spawn(move || guest(rx, tx, FRAMES));
    // Not dropped in there: giving memory back needs the kernel.
    let (mut device, down) = (std::mem::ManuallyDrop::new(device), std::mem::ManuallyDrop::new(frame(7, 100)));
    let done = without_system_calls(move || serve(&mut device, FRAMES, &down), DEADLINE);
    drop(held);
    assert_eq!(done, Some(2 * FRAMES), "the device entered the kernel or waited");
    driver.join().unwrap();
}

#[test]
fn the_filter_kills_a_thread_that_enters_the_kernel() {
    let short = Duration::from_millis(500);
    assert_eq!(without_system_calls(|| 5, DEADLINE), Some(5));
    let enters = || {
        std::thread::yield_now();
        5
    };
    assert_eq!(without_system_calls(enters, short), None);
}

#[test]
fn frames_pass_without_an_allocation() {
    let MappedBed { mut device, mut rx, mut tx, .. } = MappedBed::started(Features::offered(), 1);
    let (rx, tx) = (rx.remove(0), tx.remove(0));
    let driver = std::thread::spawn(move || guest(rx, tx, 20_000));
    let down = frame(7, 100);
    let before = allocations();
    serve(&mut device, 20_000, &down);
    assert_eq!(allocations() - before, 0);
    drop(vec![1]);
    assert_eq!(allocations() - before, 1, "the counter counts");
    driver.join().unwrap();
}

/// Sends a frame and lets the device take it; returns whether a kick was wanted.
fn pass_one(bed: &mut MappedBed, event_idx: bool) -> bool {
    let kick = bed.tx[0].send(&frame(1, 60), event_idx);
    assert_eq!(bed.device.collect_tx(8, &mut |_| true), 1);
    bed.device.flush_signals();
    bed.tx[0].reap(&mut [0; 512]).unwrap();
    kick
}

#[test]
fn no_kick_is_wanted_while_polling_and_every_one_afterwards() {
    for event_idx in [true, false] {
        let features = Features(Features::offered().0 & !if event_idx { 0 } else { EVENT_IDX });
        let mut bed = MappedBed::started(features, 1);
        bed.device.set_polling(true);
        // More than the index has values.
        for _ in 0..70_000 {
            assert!(!pass_one(&mut bed, event_idx));
        }
        bed.device.set_polling(false);
        assert!(!bed.device.arm(), "nothing has come");
        assert!(pass_one(&mut bed, event_idx), "and what comes now kicks");
        // What comes between the last look and the request is found by the request.
        bed.device.set_polling(true);
        bed.device.collect_tx(8, &mut |_| true);
        bed.device.set_polling(false);
        bed.tx[0].send(&frame(2, 60), event_idx);
        assert!(bed.device.arm());
        assert_eq!(bed.device.collect_tx(8, &mut |_| true), 1);
    }
}

#[test]
fn a_frame_that_waits_for_buffers_is_woken_for() {
    let mut bed = MappedBed::started(Features::offered(), 1);
    bed.device.set_polling(true);
    assert_eq!(bed.device.inject(&frame(1, 60)), Inject::NoBuffers);
    bed.device.set_polling(false);
    assert!(!bed.device.arm());
    assert!(bed.rx[0].offer(true), "a kick is wanted");
    assert_eq!(bed.device.inject(&frame(1, 60)), Inject::Done);
    // Without a frame that waits, receive buffers are no news.
    bed.device.set_polling(true);
    bed.device.set_polling(false);
    bed.device.arm();
    assert!(!bed.rx[0].offer(true));
}

#[test]
fn a_hushed_guest_kicks_for_buffers_alone_and_for_frames_when_it_is_asked_again() {
    for event_idx in [true, false] {
        let features = Features(Features::offered().0 & !if event_idx { 0 } else { EVENT_IDX });
        let mut bed = MappedBed::started(features, 1);
        assert!(bed.device.set_hushed(true));
        assert!(!bed.device.set_hushed(true), "no change");
        for _ in 0..70_000 {
            assert!(!pass_one(&mut bed, event_idx));
        }
        assert_eq!(bed.device.inject(&frame(1, 60)), Inject::NoBuffers);
        assert!(bed.rx[0].offer(event_idx), "a frame waits for buffers");
        assert_eq!(bed.device.inject(&frame(1, 60)), Inject::Done);
        // Whether it is polled meanwhile makes no difference afterwards.
        bed.device.set_polling(true);
        bed.device.set_polling(false);
        assert!(!bed.device.arm());
        assert!(!pass_one(&mut bed, event_idx));
        bed.tx[0].send(&frame(2, 60), event_idx);
        assert!(bed.device.set_hushed(false));
        assert!(bed.device.arm(), "what came before the request is found by it");
        assert_eq!(bed.device.collect_tx(8, &mut |_| true), 1);
        assert!(!bed.device.arm());
        assert!(pass_one(&mut bed, event_idx));
    }
}
