//! A reactor that spins makes no system call between the uplink's memory and the guest's rings: it is run in a process that
//! the kernel kills at the first one.

use dataplane::arena::{Arena, CHUNK_BYTES};
use dataplane::batch::{self, BatchBuilder, MIN_BATCH_BYTES};
use dataplane::guard::Guard;
use dataplane::idle::{Found, IdleStrategy, Idler, Rest};
use dataplane::region::{PageSize, Region};
use dataplane::stages::{Stage, StageClock};
use dataplane::uplink::Intake;
use dataplane::uplink::filter::{Action, Filter};
use dataplane::wait::{Bell, now_us};

use super::bed::{Bed, frame};
use crate::device::features::Features;
use crate::device::net::Inject;

/// Longest life of the process without system calls.
const LIMIT_SECS: libc::c_uint = 30;

/// How the process ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// `work` came to its end.
    Done,
    /// The kernel killed it for a system call.
    SystemCall,
    /// Something else, as waitpid(2) says it.
    Other(libc::c_int),
}

/// Runs `work` in a copy of this process whose first system call is its last.
fn without_system_calls(work: impl FnOnce()) -> End {
    let filter = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        // Load the number; exit_group may pass; anything else kills.
        filter(0x20, 0, 0, 0),
        filter(0x15, 0, 1, libc::SYS_exit_group as u32),
        filter(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
        filter(0x06, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the child only runs `work`, which allocates nothing and takes no lock (else the filter ends it: both end in a
    // system call, or the alarm does), and leaves without running anything that belongs to the parent.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: plain system calls; `program` and what it points to outlive the call that reads it.
            unsafe {
                libc::alarm(LIMIT_SECS);
                let ready = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                    && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0;
                if !ready {
                    libc::_exit(2);
                }
            }
            work();
            // SAFETY: ends the process at once; `exit_group` is what the filter lets pass.
            unsafe { libc::_exit(0) }
        }
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        child => {
            let mut status = 0;
            // SAFETY: waits for our own child, which the alarm ends at the latest; `status` outlives the call.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            match status {
                0 => End::Done,
                _ if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS => End::SystemCall,
                other => End::Other(other),
            }
        }
    }
}

#[test]
fn the_filter_bites() {
    let bell = Bell::new().unwrap();
    assert_eq!(without_system_calls(|| bell.ring()), End::SystemCall, "an armed bell signals");
    assert_eq!(without_system_calls(|| ()), End::Done);
}

#[test]
fn a_spinning_reactor_makes_no_system_call_on_rings() {
    const FRAMES: usize = 64;
    let mut bed = Bed::started(Features::offered(), 128);
    let frames: Vec<Vec<u8>> = (0..FRAMES as u32).map(|number| frame(number, 100)).collect();
    for sent in &frames {
        bed.offer_rx(&[1526], false).unwrap();
        bed.send(sent, &[112], false).unwrap();
    }
    // A driver that polls, as DPDK's does; others are interrupted once per turn.
    bed.rx.refuse_interrupts(&bed.memory);
    bed.tx.refuse_interrupts(&bed.memory);
    bed.device.set_polling(true);
    // The first one after a start is sent whatever the driver wants.
    bed.device.flush_signals();
    let map = |bytes| Region::map(bytes, PageSize::Normal, None).unwrap();
    let (mut arena, mut guard) = (Arena::new(map(2 * CHUNK_BYTES)), Guard::new(map(1 << 20)));
    let (mut filter, bell) = (Filter::new(&[], Action::Order), Bell::new().unwrap());
    let mut idler = Idler::new(IdleStrategy::Spin { yields: false }, now_us());
    idler.set_by_descriptor(false);
    // Descriptors are looked at now and then; this turn is none of those.
    assert_eq!(idler.after_turn(now_us(), Found::default()), Rest::Look);
    let mut stages = StageClock::new();
    bell.disarm();
    let end = without_system_calls(|| {
        let now = now_us();
        let mut batch = BatchBuilder::within(arena.room(MIN_BATCH_BYTES, 1 << 17).unwrap());
        let mut intake = Intake::new(&mut batch, &mut filter);
        for frame in &frames {
            intake.spare(frame.len()).unwrap().copy_from_slice(frame);
            intake.commit(frame.len());
        }
        let bytes = batch.seal();
        let payload = arena.freeze(bytes);
        stages.lap(Stage::Uplink, FRAMES);
        assert!(bed.device.inject_batch(batch::frames(&payload).unwrap()) == (FRAMES, Inject::Done));
        stages.lap(Stage::Deliver, FRAMES);
        let collected = bed.device.collect_tx(2 * FRAMES, &mut |frame| guard.push(now, frame).is_ok());
        assert!(collected == FRAMES);
        stages.lap(Stage::Collect, FRAMES);
        let mark = guard.seal();
        assert!(guard.release(mark, |frame, _| assert!(frame.len() == 112)) == FRAMES);
        bed.device.flush_signals();
        bell.ring();
        stages.lap(Stage::Release, FRAMES);
        let rest = idler.after_turn(now_us(), Found { work: true, more: false });
        assert!(matches!(rest, Rest::Again | Rest::Look));
    });
    assert_eq!(end, End::Done);
    // It was another process that did all this, but in the same guest memory.
    let received = (0..FRAMES).filter_map(|_| bed.rx.reap(&bed.memory)).count();
    assert_eq!(received, FRAMES);
}
