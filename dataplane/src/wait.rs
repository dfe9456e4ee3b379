//! Sleeping and waking: eventfds and an epoll with microsecond timeouts.
//!
//! `epoll_pwait2` takes nanoseconds; the millisecond resolution of `epoll_wait` would turn each 100 µs
//! idle threshold into a whole millisecond. On kernels before 5.11 the timeout is rounded up to ms.

use crate::doorbell::{Doorbell, Signal};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Monotonic time in microseconds; the clock that every `now_us` of this crate expects.
pub fn now_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1_000
}

/// A nonblocking eventfd: any thread signals, one thread waits for it and drains it.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new eventfd that is not signalled.
    ///
    /// # Errors
    /// Those of eventfd(2); in practice only too many open files.
    pub fn new() -> io::Result<EventFd> {
        Ok(EventFd(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
    }

    /// Makes the fd readable. Signals add up to one wake-up.
    pub fn signal(&self) {
        // EAGAIN means that the counter is at its maximum, so the fd is readable already.
        match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => panic!("eventfd write failed: {error}"),
        }
    }

    /// Takes back all signals; returns whether there was one.
    pub fn drain(&self) -> bool {
        let mut count = [0u8; 8];
        rustix::io::read(&self.0, &mut count).is_ok()
    }
}

/// Wakes a reactor that sleeps in a [`Poller`], and costs nothing while it does not.
pub type Bell = Doorbell<EventFd>;

impl Signal for EventFd {
    fn signal(&self) {
        EventFd::signal(self);
    }
}

impl Doorbell<EventFd> {
    /// A bell with an eventfd of its own.
    ///
    /// # Errors
    /// Those of [`EventFd::new`].
    pub fn new() -> io::Result<Bell> {
        Ok(Doorbell::over(EventFd::new()?))
    }

    /// Consumer: takes back all signals, after the descriptor was found readable.
    pub fn drain(&self) {
        self.signal.drain();
    }
}

impl AsFd for Doorbell<EventFd> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What to be woken for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Readable, for as long as it is (level triggered).
    Read,
    /// Writable, for as long as it is.
    Write,
    /// Both.
    ReadWrite,
    /// Once per arrival (edge triggered). For eventfds that nobody has to drain.
    ReadEdge,
}

impl Interest {
    fn flags(self) -> epoll::EventFlags {
        match self {
            Interest::Read => epoll::EventFlags::IN,
            Interest::Write => epoll::EventFlags::OUT,
            Interest::ReadWrite => epoll::EventFlags::IN | epoll::EventFlags::OUT,
            Interest::ReadEdge => epoll::EventFlags::IN | epoll::EventFlags::ET,
        }
    }
}

/// One ready file descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The token it was added with.
    pub token: u64,
    /// Reading makes progress (data, end of stream or an error).
    pub readable: bool,
    /// Writing makes progress (room or an error).
    pub writable: bool,
}

const MAX_EVENTS: usize = 64;

/// An epoll instance. Methods take `&self`, so that parts which own changing sets of sockets can
/// share it with the loop that waits.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
    has_pwait2: AtomicBool,
}

impl Poller {
    /// A new, empty poller.
    ///
    /// # Errors
    /// Those of epoll_create1(2).
    pub fn new() -> io::Result<Poller> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Poller { epoll, has_pwait2: AtomicBool::new(true) })
    }

    /// Watches `fd` under `token`. Closing the fd ends the watch.
    ///
    /// # Errors
    /// Those of epoll_ctl(2); `AlreadyExists` if it is watched.
    pub fn add(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), interest.flags())?)
    }

    /// Changes the interest or token of a watched fd.
    ///
    /// # Errors
    /// Those of epoll_ctl(2); `NotFound` if it is not watched.
    pub fn modify(&self, fd: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token), interest.flags())?)
    }

    /// Stops watching `fd`.
    ///
    /// # Errors
    /// Those of epoll_ctl(2); `NotFound` if it is not watched.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, fd)?)
    }

    /// Waits until something is ready or `timeout_us` has passed (`None`: no limit) and replaces the
    /// contents of `ready`, which is empty after a timeout or a signal. At most 64 fds come out at
    /// a time; the others follow in the next call.
    ///
    /// # Errors
    /// Those of epoll_wait(2) except EINTR.
    pub fn wait(&self, timeout_us: Option<u64>, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; MAX_EVENTS];
        let interrupted = |error: &io::Error| error.kind() == io::ErrorKind::Interrupted;
        let waited = match self.wait_raw(timeout_us, &mut events) {
            // io_uring interrupts a sleeper to let it finish its own requests, and that has made the ring's eventfd ready.
            Err(error) if interrupted(&error) => self.wait_raw(Some(0), &mut events),
            waited => waited,
        };
        let count = match waited {
            Ok(count) => count,
            Err(error) if interrupted(&error) => 0,
            Err(error) => return Err(error),
        };
        let broken = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
        ready.extend(events[..count].iter().map(|event| Ready {
            token: event.u64,
            readable: event.events & (libc::EPOLLIN as u32 | broken) != 0,
            writable: event.events & (libc::EPOLLOUT as u32 | broken) != 0,
        }));
        Ok(())
    }

    fn wait_raw(&self, timeout_us: Option<u64>, events: &mut [libc::epoll_event; MAX_EVENTS]) -> io::Result<usize> {
        if self.has_pwait2.load(Ordering::Relaxed) {
            let timeout = timeout_us.map(|us| libc::timespec {
                tv_sec: (us / 1_000_000) as libc::time_t,
                tv_nsec: (us % 1_000_000) as libc::c_long * 1_000,
            });
            let timeout_ptr = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            // SAFETY: the kernel writes at most MAX_EVENTS events into `events`, which has that
            // many; `timeout` outlives the call; the null signal mask leaves the mask alone.
            let result = unsafe {
                libc::syscall(
                    libc::SYS_epoll_pwait2,
                    self.epoll.as_raw_fd(),
                    events.as_mut_ptr(),
                    MAX_EVENTS as libc::c_int,
                    timeout_ptr,
                    std::ptr::null::<libc::sigset_t>(),
                    0usize,
                )
            };
            if result >= 0 {
                return Ok(result as usize);
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::ENOSYS) {
                return Err(error);
            }
            self.has_pwait2.store(false, Ordering::Relaxed);
        }
        let timeout_ms = timeout_us.map_or(-1, |us| us.div_ceil(1_000).min(i32::MAX as u64) as i32);
        // SAFETY: as above.
        let result = unsafe {
            libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), MAX_EVENTS as libc::c_int, timeout_ms)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as usize) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_wakes_and_drains() {
        let poller = Poller::new().unwrap();
        let event = EventFd::new().unwrap();
        poller.add(&event, 7, Interest::Read).unwrap();
        let mut ready = Vec::new();
        poller.wait(Some(0), &mut ready).unwrap();
        assert!(ready.is_empty() && !event.drain());
        event.signal();
        event.signal();
        poller.wait(Some(1_000_000), &mut ready).unwrap();
        assert_eq!(ready, [Ready { token: 7, readable: true, writable: false }]);
        assert!(event.drain() && !event.drain());
        poller.wait(Some(0), &mut ready).unwrap();
        assert!(ready.is_empty());
    }

    #[test]
    fn an_edge_wakes_once_per_signal_without_a_drain() {
        let poller = Poller::new().unwrap();
        let event = EventFd::new().unwrap();
        poller.add(&event, 1, Interest::ReadEdge).unwrap();
        let mut ready = Vec::new();
        for _ in 0..3 {
            event.signal();
            poller.wait(Some(1_000_000), &mut ready).unwrap();
            assert_eq!(ready.len(), 1);
            poller.wait(Some(0), &mut ready).unwrap();
            assert!(ready.is_empty());
        }
    }

    #[test]
    fn both_timeouts_hold_and_the_fine_one_is_fine() {
        let poller = Poller::new().unwrap();
        let mut ready = Vec::new();
        let start = now_us();
        poller.wait(Some(200), &mut ready).unwrap();
        assert!(now_us() - start >= 200);
        poller.has_pwait2.store(false, Ordering::Relaxed);
        let start = now_us();
        poller.wait(Some(1_500), &mut ready).unwrap();
        assert!(now_us() - start >= 1_500, "the fallback must round up, never down");
    }

    #[test]
    fn a_closed_fd_is_watched_no_more() {
        let poller = Poller::new().unwrap();
        let event = EventFd::new().unwrap();
        poller.add(&event, 1, Interest::Read).unwrap();
        assert_eq!(poller.add(&event, 1, Interest::Read).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        poller.modify(&event, 2, Interest::ReadWrite).unwrap();
        let mut ready = Vec::new();
        poller.wait(Some(0), &mut ready).unwrap();
        assert_eq!(ready, [Ready { token: 2, readable: false, writable: true }]);
        poller.remove(&event).unwrap();
        poller.wait(Some(0), &mut ready).unwrap();
        assert!(ready.is_empty());
    }

    #[test]
    fn only_an_armed_bell_costs_a_signal() {
        let bell = Bell::new().unwrap();
        let poller = Poller::new().unwrap();
        poller.add(&bell, 1, Interest::Read).unwrap();
        let mut ready = Vec::new();
        bell.disarm();
        bell.ring();
        poller.wait(Some(0), &mut ready).unwrap();
        assert!(ready.is_empty());
        bell.arm();
        bell.ring();
        poller.wait(Some(1_000_000), &mut ready).unwrap();
        assert_eq!(ready.len(), 1);
        bell.drain();
        poller.wait(Some(0), &mut ready).unwrap();
        assert!(ready.is_empty());
    }

    #[test]
    fn a_sleeper_misses_nothing_that_threads_publish() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicU64, Ordering};
        const ITEMS: u64 = 20_000;
        let (bell, published) = (Arc::new(Bell::new().unwrap()), Arc::new(AtomicU64::new(0)));
        let poller = Poller::new().unwrap();
        poller.add(&*bell, 1, Interest::Read).unwrap();
        let producer = std::thread::spawn({
            let (bell, published) = (bell.clone(), published.clone());
            move || {
                for _ in 0..ITEMS {
                    published.fetch_add(1, Ordering::Relaxed);
                    bell.ring();
                }
            }
        });
        let (mut seen, mut ready) = (0, Vec::new());
        while seen < ITEMS {
            bell.arm();
            let now = published.load(Ordering::Relaxed);
            if now == seen {
                poller.wait(Some(5_000_000), &mut ready).unwrap();
                assert!(!ready.is_empty(), "slept for 5 s although something may have been published");
                bell.drain();
            }
            bell.disarm();
            seen = published.load(Ordering::Relaxed);
        }
        producer.join().unwrap();
    }
}
