//! Socket options and the few socket calls that both lanes share.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, sockopt};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

/// Unacknowledged data older than this ends a control connection, ms. The fabric's own silence
/// timeout is shorter; this one is for a reactor that does not come to poll.
const CONTROL_USER_TIMEOUT_MS: u32 = 5_000;
const KEEPALIVE: Duration = Duration::from_secs(1);
const KEEPALIVE_PROBES: u32 = 3;
/// Socket buffers of the bulk lane: a few MiB keep a 10 Gbit/s link busy over 2 ms.
const BULK_BUFFER_BYTES: usize = 4 << 20;

/// A nonblocking TCP socket that is connecting to `addr`; `prepare` runs before.
pub(super) fn dial(addr: SocketAddr, prepare: fn(BorrowedFd<'_>) -> io::Result<()>) -> io::Result<OwnedFd> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = net::socket_with(family, SocketType::STREAM, flags, None)?;
    prepare(fd.as_fd())?;
    match net::connect(&fd, &addr) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(fd),
        Err(error) => Err(error.into()),
    }
}

/// Options of a control connection.
pub(super) fn tune_control(fd: BorrowedFd<'_>) -> io::Result<()> {
    tune_common(fd)?;
    Ok(sockopt::set_tcp_user_timeout(fd, CONTROL_USER_TIMEOUT_MS)?)
}

/// Options of a bulk connection.
pub(super) fn tune_bulk(fd: BorrowedFd<'_>) -> io::Result<()> {
    tune_common(fd)?;
    // Only root may exceed the system's limit. Asking for a size within the limit would switch off the
    // kernel's own growth, which reaches further, so there is no second try.
    let _ = sockopt::set_socket_send_buffer_size_force(fd, BULK_BUFFER_BYTES);
    let _ = sockopt::set_socket_recv_buffer_size_force(fd, BULK_BUFFER_BYTES);
    Ok(())
}

fn tune_common(fd: BorrowedFd<'_>) -> io::Result<()> {
    sockopt::set_tcp_nodelay(fd, true)?;
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(fd, KEEPALIVE)?;
    Ok(sockopt::set_tcp_keepcnt(fd, KEEPALIVE_PROBES)?)
}

/// Writes what fits now. `Ok(None)`: nothing fits (or the connection is not made yet).
pub(super) fn send(fd: impl AsFd, parts: &[io::IoSlice<'_>]) -> Result<Option<usize>, Errno> {
    let mut control = net::SendAncillaryBuffer::default();
    let flags = net::SendFlags::NOSIGNAL | net::SendFlags::DONTWAIT;
    match net::sendmsg(fd, parts, &mut control, flags) {
        Ok(sent) => Ok(Some(sent)),
        Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads what is there. `Ok(None)`: nothing now; `Ok(Some(0))`: end of stream.
pub(super) fn recv(fd: impl AsFd, into: &mut [u8]) -> Result<Option<usize>, Errno> {
    match net::recv(fd, into, net::RecvFlags::DONTWAIT) {
        Ok((received, _)) => Ok(Some(received)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the other side has closed already. Nothing is consumed.
pub(super) fn is_closed(fd: impl AsFd) -> bool {
    match net::recv(fd, &mut [0u8; 1], net::RecvFlags::DONTWAIT | net::RecvFlags::PEEK) {
        Ok((received, _)) => received == 0,
        Err(error) => error != Errno::AGAIN,
    }
}
