//! Where and how the packet path's threads run.

use crate::config::Scheduling;

/// SCHED_RR priority of the packet path: above every normal thread, below the kernel's own.
const REALTIME_PRIORITY: i32 = 5;

/// Nice value of the guest worker.
const WORKER_NICE: i32 = -10;

/// Pins the calling thread and puts it into its scheduling class; failing is said and survived, because a slower daemon
/// protects better than none.
pub fn apply(scheduling: Scheduling, core: Option<usize>, what: &str) {
    if let Some(core) = core
        && !core_affinity::set_for_current(core_affinity::CoreId { id: core })
    {
        tracing::warn!(core, what, "cannot be pinned; does this core exist?");
    }
    if scheduling == Scheduling::Realtime {
        let parameters = libc::sched_param { sched_priority: REALTIME_PRIORITY };
        // SAFETY: 0 is the calling thread; the structure lives across the call and is only read.
        let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &parameters) };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, what, "no real-time scheduling; a busy host may delay heartbeats");
        }
    }
}

/// Lets the calling thread go before QEMU's threads where cores are few, without keeping anybody out: for the guest
/// worker, which computes for milliseconds at a time and would delay heartbeats as a real-time thread.
pub fn favour(scheduling: Scheduling) {
    if scheduling == Scheduling::Realtime {
        // SAFETY: setpriority has no memory effects; 0 is the calling thread.
        if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, WORKER_NICE) } != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, "the guest worker keeps the default priority");
        }
    }
}
