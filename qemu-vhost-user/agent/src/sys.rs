//! The few system calls that the agent needs, each wrapped so that the rest of the crate is safe code.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use crate::clock_page::{CLOCK_PAGE_BYTES, ClockPage};

/// `USERFAULTFD_IOC_NEW` of linux/userfaultfd.h: _IO(0xAA, 0x00).
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = libc::c_int::try_from(result).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the caller passes what a system call that makes a descriptor returned; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A userfaultfd that sees kernel accesses as well (not UFFD_USER_MODE_ONLY): QEMU writes guest memory from the
/// kernel too (recv into guest buffers). Without CAP_SYS_PTRACE the device node may still allow it.
pub(crate) fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: userfaultfd takes one integer and touches no memory of ours.
    let direct = owned(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) });
    let Err(error) = direct else { return direct };
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(error);
    }
    // SAFETY: the path is a C string literal.
    let node = unsafe { libc::open(c"/dev/userfaultfd".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    let Ok(node) = owned(libc::c_long::from(node)) else {
        return Err(error);
    };
    // SAFETY: `node` is open; this request takes its flags by value.
    owned(libc::c_long::from(unsafe { libc::ioctl(node.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) }))
}

/// A listening unix socket at `path` with mode 0600. A socket that a dead process left there is replaced; anything
/// that is not a socket is left alone and makes this fail.
pub(crate) fn listen(path: &Path) -> io::Result<OwnedFd> {
    use std::os::unix::fs::FileTypeExt;
    // SAFETY: socket takes integers only.
    let socket =
        unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    let socket = owned(libc::c_long::from(socket))?;
    let (address, length) = unix_address(path)?;
    if std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    // bind gives the new node the mode of the socket's own inode, so there is no moment with a wider mode.
    // SAFETY: `socket` is open.
    check(unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) })?;
    // SAFETY: `address` is a sockaddr_un of which `length` bytes are filled in.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
    // SAFETY: `socket` is open and bound.
    check(unsafe { libc::listen(socket.as_raw_fd(), 4) })?;
    Ok(socket)
}

fn unix_address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: sockaddr_un is plain data, all-zero bytes are a value of it.
    let mut address: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    // The last byte stays 0.
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() >= address.sun_path.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes a waiting connection; a descriptor that is closed on exec.
pub(crate) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: null address and length are allowed: the peer's address is not wanted.
    let fd = unsafe {
        libc::accept4(
            listener.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
        )
    };
    owned(libc::c_long::from(fd))
}

/// Waits until one of the descriptors is readable or hung up; says for each whether it is.
pub(crate) fn wait_readable(first: BorrowedFd<'_>, second: Option<BorrowedFd<'_>>) -> io::Result<(bool, bool)> {
    let entry = |fd: libc::c_int| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // poll ignores negative descriptors.
    let mut set = [entry(first.as_raw_fd()), entry(second.map_or(-1, |fd| fd.as_raw_fd()))];
    // SAFETY: `set` holds two pollfd for the duration of the call.
    check(unsafe { libc::poll(set.as_mut_ptr(), 2, -1) })?;
    let [first, second] = set;
    Ok((first.revents != 0, second.revents != 0))
}

/// Receives one message; 0 bytes means that the peer is gone.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes into `buffer`.
    let count = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Room for one SCM_RIGHTS message with one descriptor, aligned as the kernel wants it.
#[repr(C, align(8))]
struct ControlBuffer([u8; 32]);

/// Sends one message, with a descriptor if given. Never blocks and never raises SIGPIPE.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8], attached: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = ControlBuffer([0; 32]);
    // SAFETY: msghdr is plain data, all-zero bytes are a value of it.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    if let Some(fd) = attached {
        let payload = size_of::<libc::c_int>() as libc::c_uint;
        message.msg_control = (&raw mut control).cast();
        // SAFETY: CMSG_SPACE is arithmetic on its argument: 24 here, which `control` has room for.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(payload) } as _;
        // SAFETY: msg_control points to at least msg_controllen zeroed, aligned bytes, so the first header exists and
        // its data has room for one descriptor.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(payload) as _;
            libc::CMSG_DATA(header).cast::<libc::c_int>().write_unaligned(fd.as_raw_fd());
        }
    }
    // SAFETY: `message` and all that it points to live until the call returns; the kernel only reads them.
    let sent =
        unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Mapping of a clock page; unmapped when dropped.
pub(crate) struct PageMapping(NonNull<ClockPage>);

// SAFETY: the mapping belongs to this value, and ClockPage has atomic fields only.
unsafe impl Send for PageMapping {}
// SAFETY: as above.
unsafe impl Sync for PageMapping {}

impl PageMapping {
    /// Makes a fresh page: the mapping and the descriptor that the daemon maps. The size is sealed, because a daemon that
    /// shrinks the file would otherwise kill QEMU with SIGBUS.
    pub(crate) fn create() -> io::Result<(PageMapping, OwnedFd)> {
        // SAFETY: the name is a C string literal.
        let fd = unsafe { libc::memfd_create(c"plover-clocks".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
        let fd = owned(libc::c_long::from(fd))?;
        // SAFETY: `fd` is open.
        check(unsafe { libc::ftruncate(fd.as_raw_fd(), CLOCK_PAGE_BYTES as libc::off_t) })?;
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: `fd` is open; F_ADD_SEALS takes an integer.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping of a file of exactly this size at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), CLOCK_PAGE_BYTES, protection, libc::MAP_SHARED, fd.as_raw_fd(), 0)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(address.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok((PageMapping(page), fd))
    }

    pub(crate) fn page(&self) -> &ClockPage {
        // SAFETY: the mapping lives as long as `self`, is page aligned, holds at least a ClockPage (asserted beside the
        // type), and all its fields are atomics, so that the other process's writes are no data race.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for PageMapping {
    fn drop(&mut self) {
        // SAFETY: maps exactly this range and nobody can hold a reference into it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), CLOCK_PAGE_BYTES) };
    }
}

/// Sleeps while `*word == expected`, at most `timeout_us`. Not FUTEX_PRIVATE: the waker is another process.
pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, timeout_us: u32) {
    let nanoseconds = u64::from(timeout_us).saturating_mul(1000);
    let timeout = libc::timespec {
        tv_sec: (nanoseconds / 1_000_000_000) as libc::time_t,
        tv_nsec: (nanoseconds % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: `word` and `timeout` are valid for the call. Every outcome (woken, changed, timed out, interrupted) is
    // the same to the caller, who looks at the word again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, expected, &raw const timeout) };
}

/// Wakes everybody who waits on `word`.
pub(crate) fn futex_wake_all(word: &AtomicU32) {
    // SAFETY: `word` is valid for the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// A clock's reading; `None` if there is no such clock (a thread that ended).
pub(crate) fn clock_ns(clock: libc::clockid_t) -> Option<u64> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is valid for writing.
    if unsafe { libc::clock_gettime(clock, &raw mut now) } != 0 {
        return None;
    }
    let seconds = u64::try_from(now.tv_sec).ok()?;
    seconds.checked_mul(1_000_000_000)?.checked_add(u64::try_from(now.tv_nsec).ok()?)
}

/// The clock of one thread of this process: CPUCLOCK_SCHED | CPUCLOCK_PERTHREAD_MASK of the kernel's posix-timers.h.
pub(crate) fn thread_clock(tid: libc::pid_t) -> libc::clockid_t {
    (!tid).wrapping_shl(3) | 6
}

/// Starts a detached thread in which all signals are blocked (QEMU's handlers must run in QEMU's own threads).
/// The name is seen in `top -H`; at most 15 bytes.
pub(crate) fn spawn_quiet(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    // SAFETY: sigset_t is plain data; both sets are written before they are read.
    let mut all: libc::sigset_t = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: as above.
    let mut before: libc::sigset_t = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: both sets are valid; a new thread inherits the mask, so it never runs with a signal open.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
    }
    let started = std::thread::Builder::new().name(name.to_owned()).stack_size(128 * 1024).spawn(body);
    // SAFETY: restores the mask that was read above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    started.map(drop)
}

/// Timers of the calling thread fire on time instead of up to 50 µs late.
pub(crate) fn precise_timers() {
    // SAFETY: takes integers only and concerns the calling thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong, 0, 0, 0) };
}
