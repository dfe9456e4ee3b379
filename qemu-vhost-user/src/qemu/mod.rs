//! Everything about the QEMU process that runs the guest: starting it with the right arguments, its monitor, the
//! agent inside it, where the guest's memory is, and whether this QEMU can be protected at all.
//!
//! What stock QEMU does and does not do here was measured first; each peculiarity is named where it is dealt with.

pub mod agent;
pub mod args;
pub mod device_set;
pub mod device_state;
pub mod fingerprint;
pub mod launch;
pub mod preflight;
pub mod qmp;
pub mod ram;
pub mod state_file;

use std::time::{Duration, Instant};

/// Time left until `deadline`, rounded up to the next millisecond so that a wait never spins; zero when it has passed.
fn time_left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Waits until `fd` has one of `events` or the deadline passes; false means that it passed.
fn wait_for(
    fd: rustix::fd::BorrowedFd<'_>,
    events: rustix::event::PollFlags,
    deadline: Instant,
) -> std::io::Result<bool> {
    loop {
        let left = time_left(deadline);
        let timeout =
            rustix::event::Timespec::try_from(left).unwrap_or(rustix::event::Timespec { tv_sec: 3600, tv_nsec: 0 });
        let mut set = [rustix::event::PollFd::from_borrowed_fd(fd, events)];
        match rustix::event::poll(&mut set, Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
    }
}

/// How often a socket that is not there yet is tried again.
const CONNECT_RETRY: Duration = Duration::from_millis(10);

/// Runs `attempt` until it succeeds, fails for a reason that waiting does not cure, or the deadline passes. QEMU
/// announces its sockets in no way that one could wait for, so this tries again every 10 ms. A deadline in the past
/// means one attempt.
fn connect_until<T>(deadline: Instant, mut attempt: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound, WouldBlock};
    loop {
        match attempt() {
            Err(error)
                if matches!(error.kind(), ConnectionRefused | NotFound | WouldBlock)
                    && !time_left(deadline).is_zero() =>
            {
                std::thread::sleep(CONNECT_RETRY.min(time_left(deadline)));
            }
            outcome => return outcome,
        }
    }
}
