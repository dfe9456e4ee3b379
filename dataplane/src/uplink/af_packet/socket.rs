//! Setting a packet socket up, and the system calls that a [`super::AfPacket`] makes on it.

use super::AfPacketError;
use super::ring::{KERNEL_VNET_BYTES, Layout};
use crate::uplink::interface::{self, check};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Room for packets that do not fit a slot, and for packets that the link has not sent yet.
const SOCKET_BUFFER_BYTES: libc::c_int = 8 << 20;
/// Packets that one `sendmmsg` takes.
const SEND_BURST: usize = 64;
const ETH_P_ALL: u16 = 3;

/// What is to be received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Frames for this address, and all that are for several.
    Mac([u8; 6]),
    /// All.
    Everything,
}

/// A bound socket with its ring requested, to be mapped.
pub(super) fn open(name: &str, wanted: Wanted) -> Result<(OwnedFd, Layout), AfPacketError> {
    let fail = |action| move |source| AfPacketError::Io { name: name.to_owned(), action, source };
    let request = interface::request(name).ok_or_else(|| AfPacketError::BadName { name: name.to_owned() })?;
    let control = interface::control_socket().map_err(fail("opening a control socket"))?;
    let index = interface::index(&control, request).map_err(|source| match source.raw_os_error() {
        Some(libc::ENODEV) => AfPacketError::NoInterface { name: name.to_owned() },
        _ => fail("looking it up")(source),
    })?;
    let hardware = interface::hardware_type(&control, request).map_err(fail("reading its type"))?;
    if hardware != libc::ARPHRD_ETHER {
        return Err(AfPacketError::NotEthernet { name: name.to_owned(), hardware });
    }
    let socket = packet_socket().map_err(|source| match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => AfPacketError::NotPermitted { name: name.to_owned() },
        _ => fail("opening a packet socket")(source),
    })?;
    interface::bring_up(&control, request).map_err(fail("bringing the link up"))?;
    let layout = Layout::for_mtu(interface::mtu(&control, request).map_err(fail("reading its MTU"))?);
    // All of this before it is bound: it must never hold a packet that is not wanted or has no vnet header.
    for (option, action) in [
        ((libc::PACKET_VERSION, libc::tpacket_versions::TPACKET_V2 as libc::c_int), "PACKET_VERSION"),
        ((libc::PACKET_VNET_HDR, 1), "PACKET_VNET_HDR"),
        ((libc::PACKET_IGNORE_OUTGOING, 1), "PACKET_IGNORE_OUTGOING"),
        ((libc::PACKET_COPY_THRESH, 1), "PACKET_COPY_THRESH"),
    ] {
        set_option(&socket, libc::SOL_PACKET, option.0, &option.1).map_err(fail(action))?;
    }
    for option in [libc::SO_RCVBUFFORCE, libc::SO_SNDBUFFORCE] {
        set_option(&socket, libc::SOL_SOCKET, option, &SOCKET_BUFFER_BYTES).map_err(fail("sizing its buffers"))?;
    }
    if let Wanted::Mac(mac) = wanted {
        attach_filter(&socket, mac).map_err(fail("SO_ATTACH_FILTER"))?;
    }
    set_option(&socket, libc::SOL_PACKET, libc::PACKET_RX_RING, &layout.request()).map_err(fail("PACKET_RX_RING"))?;
    bind(&socket, index).map_err(fail("binding to it"))?;
    for member in memberships(index, wanted).into_iter().flatten() {
        set_option(&socket, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &member)
            .map_err(fail("PACKET_ADD_MEMBERSHIP"))?;
    }
    Ok((socket, layout))
}

fn packet_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socket(2) takes no pointers. Protocol 0: nothing is received before it is bound.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    check(fd)?;
    // SAFETY: the fd was opened just now and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A classic BPF program: the first byte's group bit, or all six bytes.
fn attach_filter(socket: &OwnedFd, mac: [u8; 6]) -> io::Result<()> {
    let [a, b, c, d, e, f] = mac;
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |size: u32, at| step(libc::BPF_LD | size | libc::BPF_ABS, 0, 0, at);
    let mut program = [
        load(libc::BPF_B, 0),
        step(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, 4, 0, 1),
        load(libc::BPF_W, 2),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 3, u32::from_be_bytes([c, d, e, f])),
        load(libc::BPF_H, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, u32::from_be_bytes([0, 0, a, b])),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    set_option(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &filter)
}

fn bind(socket: &OwnedFd, index: libc::c_int) -> io::Result<()> {
    // SAFETY: sockaddr_ll is a plain C struct of integers; all zeroes is a valid value of it.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETH_P_ALL.to_be();
    address.sll_ifindex = index;
    let bytes = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the pointer and the length describe `address`, which the kernel only reads.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), bytes) })
}

/// What the link must let through. The kernel undoes them when the socket is closed.
fn memberships(index: libc::c_int, wanted: Wanted) -> [Option<libc::packet_mreq>; 2] {
    let member = |kind: libc::c_int, mac: [u8; 6]| {
        let [a, b, c, d, e, f] = mac;
        Some(libc::packet_mreq {
            mr_ifindex: index,
            mr_type: kind as libc::c_ushort,
            mr_alen: 6,
            mr_address: [a, b, c, d, e, f, 0, 0],
        })
    };
    match wanted {
        Wanted::Everything => [member(libc::PACKET_MR_PROMISC, [0; 6]), None],
        // A NIC with a filter gets one more address; the kernel makes one without promiscuous.
        Wanted::Mac(mac) => [member(libc::PACKET_MR_UNICAST, mac), member(libc::PACKET_MR_ALLMULTI, [0; 6])],
    }
}

fn set_option<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let bytes = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `value`, which the kernel only reads. A pointer in it (of a socket
    // filter) is the caller's and lives across the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), bytes) })
}

fn get_option<T: Copy>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &mut T) -> io::Result<()> {
    let mut bytes = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointers describe `value` and its length; the kernel writes integers into it, no more than that length.
    check(unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, option, std::ptr::from_mut(value).cast(), &raw mut bytes)
    })
}

/// Packets that found no free slot since this was asked last.
pub(super) fn take_missed(socket: &OwnedFd) -> u64 {
    let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
    match get_option(socket, libc::SOL_PACKET, libc::PACKET_STATISTICS, &mut stats) {
        Ok(()) => stats.tp_drops.into(),
        Err(_) => 0,
    }
}

/// The error that the kernel noted on the socket since this was asked last.
pub(super) fn take_error(socket: &OwnedFd) -> Option<io::Error> {
    let mut error: libc::c_int = 0;
    match get_option(socket, libc::SOL_SOCKET, libc::SO_ERROR, &mut error) {
        Ok(()) => (error != 0).then(|| io::Error::from_raw_os_error(error)),
        Err(error) => Some(error),
    }
}

/// Whether the interface to which the socket was bound is still there.
pub(super) fn is_bound(socket: &OwnedFd) -> bool {
    // SAFETY: sockaddr_ll is a plain C struct of integers; all zeroes is a valid value of it.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut bytes = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the pointers describe `address` and its length; the kernel writes no more than that.
    let result = unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut bytes) };
    result == 0 && address.sll_ifindex > 0
}

/// Takes the next packet of the socket's queue: the MAC addresses to `macs`, the rest to `rest`; its vnet header is in the
/// ring. Returns the length of the whole packet, which may be more than there was room for.
pub(super) fn receive(socket: &OwnedFd, macs: &mut [u8; 12], rest: &mut [u8]) -> io::Result<usize> {
    let mut vnet = [0; KERNEL_VNET_BYTES];
    let part = |bytes: &mut [u8]| libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut parts = [part(&mut vnet), part(macs), part(rest)];
    // SAFETY: msghdr is a plain C struct of integers and pointers; all zeroes is a valid value of it.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len();
    // SAFETY: the message describes three buffers that are borrowed mutably for the call.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT | libc::MSG_TRUNC) };
    match usize::try_from(result) {
        Ok(bytes) => Ok(bytes.saturating_sub(KERNEL_VNET_BYTES)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Sends the packets from number `first` on until one fails; each has its vnet header, and `ends` says where in `packets` it
/// ends. Returns how many were sent, and why the next was not.
pub(super) fn send(socket: &OwnedFd, packets: &[u8], ends: &[usize], first: usize) -> (usize, Option<io::Error>) {
    let mut sent = first;
    while sent < ends.len() {
        // SAFETY: an array of plain C structs of integers and pointers; all zeroes is a valid value of each.
        let mut messages: [libc::mmsghdr; SEND_BURST] = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let mut parts: [libc::iovec; SEND_BURST] = unsafe { std::mem::zeroed() };
        let count = (ends.len() - sent).min(SEND_BURST);
        for i in 0..count {
            let start = if sent + i == 0 { 0 } else { ends[sent + i - 1] };
            let packet = &packets[start..ends[sent + i]];
            parts[i] = libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() };
            messages[i].msg_hdr.msg_iov = &raw mut parts[i];
            messages[i].msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: each message describes one range of `packets`, which the kernel only reads.
        let result = unsafe {
            libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), count as libc::c_uint, libc::MSG_DONTWAIT)
        };
        match usize::try_from(result) {
            // The kernel stops at the first that fails and tells why when that one is tried first.
            Ok(done) => sent += done,
            Err(_) => return (sent - first, Some(io::Error::last_os_error())),
        }
    }
    (sent - first, None)
}
