//! Identifiers of rdma_cm, and what happens to them.

use std::ffi::c_int;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;

use libc::{sockaddr, sockaddr_in, sockaddr_in6};
use rdma_sys::{self as sys, Rdma};

use super::{VerbsError, check, failed, library, set_nonblocking, text};

/// What a connection request and its answer may carry, at least; librdmacm's limit for requests.
pub const MAX_PRIVATE_BYTES: usize = 56;
/// A socket address as C has it.
#[repr(C)]
union Address {
    v4: sockaddr_in,
    v6: sockaddr_in6,
}

impl Address {
    fn new(address: SocketAddr) -> Address {
        match address {
            SocketAddr::V4(address) => Address {
                v4: sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
                    sin_zero: [0; 8],
                },
            },
            SocketAddr::V6(address) => Address {
                v6: sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as u16,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                },
            },
        }
    }

    fn as_ptr(&mut self) -> *mut sockaddr {
        ptr::from_mut(self).cast()
    }
}

/// Where the events of some identifiers come.
#[derive(Debug)]
struct Channel {
    library: &'static Rdma,
    raw: *mut sys::EventChannel,
}

// SAFETY: librdmacm locks what threads share.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    fn new(library: &'static Rdma) -> Result<Channel, VerbsError> {
        // SAFETY: takes nothing.
        let raw = unsafe { (library.create_event_channel)() };
        if raw.is_null() {
            return Err(failed("rdma_create_event_channel"));
        }
        let channel = Channel { library, raw };
        set_nonblocking(channel.as_fd())?;
        Ok(channel)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: not null; the descriptor is open until drop.
        unsafe { BorrowedFd::borrow_raw((*self.raw).fd) }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: the last identifier has held an Arc of this and is gone; each event is acknowledged when it is got.
        unsafe { (self.library.destroy_event_channel)(self.raw) }
    }
}

/// What happened to an identifier.
#[derive(Debug)]
pub struct CmEvent {
    /// `sys::CM_*`.
    pub kind: u32,
    /// 0, or an error or reason.
    pub status: i32,
    /// What the other side sent along, maybe with zeros behind.
    pub private: [u8; MAX_PRIVATE_BYTES],
    /// Of a connection request: the new connection.
    pub request: Option<Id>,
    pub(super) id: *mut sys::CmId,
}

impl CmEvent {
    /// For people.
    pub fn text(&self) -> String {
        let name = library().map_or_else(
            |_| self.kind.to_string(),
            // SAFETY: any number is allowed.
            |library| text(unsafe { (library.event_str)(self.kind) }),
        );
        match self.status {
            0 => name,
            status => format!("{name}, status {status}"),
        }
    }
}

/// A connection, or what waits for some, as rdma_cm knows it.
#[derive(Debug)]
pub struct Id {
    pub(super) raw: *mut sys::CmId,
    channel: Arc<Channel>,
}

// SAFETY: librdmacm locks what threads share; this is used by one thread at a time.
unsafe impl Send for Id {}

impl Id {
    /// A new one on the device that has this address.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn bind(address: IpAddr) -> Result<Id, VerbsError> {
        let library = library()?;
        let no_device = || VerbsError::NoDevice { address, source: Arc::new(io::Error::last_os_error()) };
        let channel = Arc::new(Channel::new(library).map_err(|_| no_device())?);
        let mut raw = ptr::null_mut();
        // SAFETY: the channel lives, `raw` is written.
        check("rdma_create_id", unsafe { (library.create_id)(channel.raw, &mut raw, ptr::null_mut(), sys::PS_TCP) })?;
        let id = Id { raw, channel };
        let mut place = Address::new(SocketAddr::new(address, 0));
        // SAFETY: the identifier lives, the address is a valid one.
        check("rdma_bind_addr", unsafe { (library.bind_addr)(id.raw, place.as_ptr()) }).map_err(|_| no_device())?;
        // SAFETY: the identifier lives.
        if unsafe { (*id.raw).verbs }.is_null() {
            return Err(VerbsError::NoDevice { address, source: Arc::new(io::Error::from_raw_os_error(libc::ENODEV)) });
        }
        Ok(id)
    }

    pub(super) fn library(&self) -> &'static Rdma {
        self.channel.library
    }

    pub(super) fn context(&self) -> *mut sys::Context {
        // SAFETY: the identifier lives.
        unsafe { (*self.raw).verbs }
    }

    /// Takes connections; returns the port.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn listen(&self) -> Result<u16, VerbsError> {
        const BACKLOG: c_int = 16;
        // SAFETY: the identifier lives.
        check("rdma_listen", unsafe { (self.library().listen)(self.raw, BACKLOG) })?;
        // SAFETY: the identifier lives.
        Ok(u16::from_be(unsafe { (self.library().get_src_port)(self.raw) }))
    }

    /// Asks for the way to an address; `CM_ADDR_RESOLVED` follows.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn resolve_addr(&self, to: SocketAddr, limit_ms: u32) -> Result<(), VerbsError> {
        let mut to = Address::new(to);
        // SAFETY: the identifier lives and is bound, so that it needs no source; the address is a valid one.
        let result =
            unsafe { (self.library().resolve_addr)(self.raw, ptr::null_mut(), to.as_ptr(), limit_ms as c_int) };
        check("rdma_resolve_addr", result)
    }

    /// Asks for the route; `CM_ROUTE_RESOLVED` follows.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn resolve_route(&self, limit_ms: u32) -> Result<(), VerbsError> {
        // SAFETY: the identifier lives.
        check("rdma_resolve_route", unsafe { (self.library().resolve_route)(self.raw, limit_ms as c_int) })
    }

    /// Declines a request.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn reject(self) -> Result<(), VerbsError> {
        // SAFETY: the identifier lives.
        check("rdma_reject", unsafe { (self.library().reject)(self.raw, ptr::null(), 0) })
    }

    /// The next event of this identifier, or of others on its channel: those whose request came here.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn next_event(&self) -> Result<Option<CmEvent>, VerbsError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel lives, `raw` is written.
        if unsafe { (self.library().get_cm_event)(self.channel.raw, &mut raw) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock => Ok(None),
                _ => Err(VerbsError::Call { call: "rdma_get_cm_event", source: Arc::new(error) }),
            };
        }
        // SAFETY: an event was returned; it is ours until it is acknowledged below.
        let event = unsafe { &*raw };
        let mut private = [0; MAX_PRIVATE_BYTES];
        let carries = matches!(event.event, sys::CM_CONNECT_REQUEST | sys::CM_ESTABLISHED);
        if carries && !event.conn.private_data.is_null() {
            let bytes = usize::from(event.conn.private_data_len).min(MAX_PRIVATE_BYTES);
            // SAFETY: the event says that so many bytes are there.
            unsafe { ptr::copy_nonoverlapping(event.conn.private_data.cast::<u8>(), private.as_mut_ptr(), bytes) };
        }
        // A request's identifier is the receiver's to destroy.
        let request =
            (event.event == sys::CM_CONNECT_REQUEST).then(|| Id { raw: event.id, channel: Arc::clone(&self.channel) });
        let event = CmEvent { kind: event.event, status: event.status, private, request, id: event.id };
        // SAFETY: got above and not used any more.
        check("rdma_ack_cm_event", unsafe { (self.library().ack_cm_event)(raw) })?;
        Ok(Some(event))
    }

    /// Readable when an event waits.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// The time until a retransmission, 4.096 µs × 2^`exponent`.
    pub(super) fn set_timeout(&self, exponent: u8) -> Result<(), VerbsError> {
        let mut exponent = exponent;
        let (level, name) = (sys::OPTION_ID, sys::OPTION_ID_ACK_TIMEOUT);
        // SAFETY: the identifier lives; the option is one byte.
        check("rdma_set_option", unsafe {
            (self.library().set_option)(self.raw, level, name, ptr::from_mut(&mut exponent).cast(), 1)
        })
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: created by rdma_create_id or by a request, and destroyed here only; its queue pair, if there was one, went
        // with the Link. All its events are acknowledged, so this does not wait.
        unsafe { (self.library().destroy_id)(self.raw) };
    }
}
