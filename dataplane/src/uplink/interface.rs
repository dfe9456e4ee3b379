//! The few ioctls on a network interface that more than one kind of uplink needs.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// An `ifreq` with only the name set, or `None` if no interface can have that name.
pub(super) fn request(name: &str) -> Option<libc::ifreq> {
    let good = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':' && byte != b'%';
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || name == "." || name == ".." || !name.bytes().all(good) {
        return None;
    }
    // SAFETY: ifreq is a plain C struct (a byte array and a union of integers, addresses and a raw
    // pointer); all zeroes is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Some(request)
}

/// A socket for ioctls; it belongs to the network namespace of the calling thread.
pub(super) fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: socket(2) takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the fd was opened just now and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Its number. Not from /sys, which may show another network namespace than the one we are in.
pub(super) fn index(control: &OwnedFd, mut request: libc::ifreq) -> io::Result<libc::c_int> {
    ioctl(control, libc::SIOCGIFINDEX as _, &mut request)?;
    // SAFETY: SIOCGIFINDEX succeeded, so the kernel stored the index in this field.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}

/// The largest packet without Ethernet header that it sends, bytes.
pub(super) fn mtu(control: &OwnedFd, mut request: libc::ifreq) -> io::Result<usize> {
    ioctl(control, libc::SIOCGIFMTU as _, &mut request)?;
    // SAFETY: SIOCGIFMTU succeeded, so the kernel stored the MTU in this field.
    Ok(unsafe { request.ifr_ifru.ifru_mtu }.max(0) as usize)
}

/// `ARPHRD_*`.
pub(super) fn hardware_type(control: &OwnedFd, mut request: libc::ifreq) -> io::Result<u16> {
    ioctl(control, libc::SIOCGIFHWADDR as _, &mut request)?;
    // SAFETY: SIOCGIFHWADDR succeeded, so the kernel stored an address with this family.
    Ok(unsafe { request.ifr_ifru.ifru_hwaddr.sa_family })
}

/// Sets it administratively up.
pub(super) fn bring_up(control: &OwnedFd, mut request: libc::ifreq) -> io::Result<()> {
    ioctl(control, libc::SIOCGIFFLAGS as _, &mut request)?;
    // SAFETY: SIOCGIFFLAGS succeeded, so the kernel stored the flags in this field.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(control, libc::SIOCSIFFLAGS as _, &mut request)
}

/// An ioctl that takes an `ifreq`.
pub(super) fn ioctl(fd: &OwnedFd, number: libc::c_ulong, argument: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: each request of the callers takes a pointer to an ifreq, reads or writes no more than
    // that, and keeps no pointer; `argument` is one and is borrowed for the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), number as _, std::ptr::from_mut(argument)) })
}

/// A system call's result.
pub(super) fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
