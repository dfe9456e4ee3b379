//! CPU time of the calling thread, so that the load client can report what it costs.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// User and system time that the calling thread has used.
pub fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    // The clock counts from the thread's start and is never negative.
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}
