//! The few calls of rdma-core (libibverbs.so.1, librdmacm.so.1) that the fabric needs, loaded with dlopen.
//!
//! The program runs on machines without rdma-core, and building it needs neither its headers nor libclang: the
//! declarations are by hand, of ABI versions that rdma-core has kept since 2008, with their layouts asserted below
//! (numbers from offsetof on the headers of rdma-core 44). Rejected: `rdma-mummy-sys` and `sideway`, which is built on it (they
//! load rdma-core late too, but need cmake and libclang on every build machine), `ibverbs-sys` (the same, and links).
//!
//! Posting and polling are inline functions in C that call through the context's table: [`post_send`], [`post_recv`],
//! [`poll_cq`] and [`req_notify_cq`] do the same here.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::offset_of;

use libc::sockaddr;
use libloading::Library;

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug)]
        pub struct $name {
            _private: [u8; 0],
        }
    )*};
}

opaque!(
    /// `struct ibv_device`.
    Device,
    /// `struct ibv_pd`: a protection domain.
    Pd,
    /// `struct ibv_srq`.
    Srq,
    /// What is behind a pointer that nothing here follows.
    Unused,
);

/// `struct ibv_context`: an open device. The table's entries that are not used here are untyped.
#[repr(C)]
#[derive(Debug)]
pub struct Context {
    /// The device.
    pub device: *mut Device,
    unused_before_poll: [*mut Unused; 11],
    poll_cq: Option<unsafe extern "C" fn(*mut Cq, c_int, *mut Wc) -> c_int>,
    req_notify_cq: Option<unsafe extern "C" fn(*mut Cq, c_int) -> c_int>,
    unused_before_post: [*mut Unused; 12],
    post_send: Option<unsafe extern "C" fn(*mut Qp, *mut SendWr, *mut *mut SendWr) -> c_int>,
    post_recv: Option<unsafe extern "C" fn(*mut Qp, *mut RecvWr, *mut *mut RecvWr) -> c_int>,
}

/// `struct ibv_comp_channel`.
#[repr(C)]
#[derive(Debug)]
pub struct CompChannel {
    context: *mut Context,
    /// Readable when an event waits.
    pub fd: c_int,
    refcnt: c_int,
}

/// The beginning of `struct ibv_cq`.
#[repr(C)]
#[derive(Debug)]
pub struct Cq {
    context: *mut Context,
}

/// The beginning of `struct ibv_qp`.
#[repr(C)]
#[derive(Debug)]
pub struct Qp {
    context: *mut Context,
}

/// `struct ibv_mr`: registered memory.
#[repr(C)]
#[derive(Debug)]
pub struct Mr {
    /// The device.
    pub context: *mut Context,
    pd: *mut Pd,
    addr: *mut c_void,
    length: usize,
    handle: u32,
    /// Names the memory in work requests of this side.
    pub lkey: u32,
    /// Names the memory in work requests of the peer.
    pub rkey: u32,
}

/// `struct ibv_sge`: a piece of memory.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Sge {
    /// Its address.
    pub addr: u64,
    /// Bytes.
    pub length: u32,
    /// Of its registration; of no meaning for inline data.
    pub lkey: u32,
}

/// `struct ibv_send_wr` for one-sided writes.
#[repr(C)]
#[derive(Debug)]
pub struct SendWr {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// The next one of a chain or null.
    pub next: *mut SendWr,
    /// What to write from.
    pub sg_list: *mut Sge,
    /// How many pieces.
    pub num_sge: c_int,
    /// [`WR_RDMA_WRITE`] or [`WR_RDMA_WRITE_WITH_IMM`].
    pub opcode: c_uint,
    /// [`SEND_SIGNALED`] and [`SEND_INLINE`].
    pub send_flags: c_uint,
    /// In network byte order.
    pub imm_data: u32,
    /// Where in the peer's address space.
    pub remote_addr: u64,
    /// Of the peer's registration.
    pub rkey: u32,
    reserved: [u8; 76],
}

impl SendWr {
    /// A write of nothing to nowhere, to be filled in.
    pub fn new() -> Self {
        Self {
            wr_id: 0,
            next: std::ptr::null_mut(),
            sg_list: std::ptr::null_mut(),
            num_sge: 0,
            opcode: WR_RDMA_WRITE,
            send_flags: 0,
            imm_data: 0,
            remote_addr: 0,
            rkey: 0,
            reserved: [0; 76],
        }
    }
}

impl Default for SendWr {
    fn default() -> Self {
        Self::new()
    }
}

/// `struct ibv_recv_wr`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RecvWr {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// The next one of a chain or null.
    pub next: *mut RecvWr,
    /// Where to.
    pub sg_list: *mut Sge,
    /// How many pieces.
    pub num_sge: c_int,
}

/// `struct ibv_wc`: a completion.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Wc {
    /// The work request's.
    pub wr_id: u64,
    /// [`WC_SUCCESS`] or why it failed.
    pub status: c_uint,
    /// Of no meaning after a failure.
    pub opcode: c_uint,
    /// The device's own number for a failure.
    pub vendor_err: u32,
    /// Bytes that arrived.
    pub byte_len: u32,
    /// In network byte order.
    pub imm_data: u32,
    qp_num: u32,
    src_qp: u32,
    /// [`WC_WITH_IMM`] among others.
    pub wc_flags: c_uint,
    pkey_index: u16,
    slid: u16,
    sl: u8,
    dlid_path_bits: u8,
}

/// `struct ibv_qp_cap`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct QpCap {
    /// Work requests in the send queue.
    pub max_send_wr: u32,
    /// Work requests in the receive queue.
    pub max_recv_wr: u32,
    /// Pieces of memory in a send.
    pub max_send_sge: u32,
    /// Pieces of memory in a receive.
    pub max_recv_sge: u32,
    /// Bytes that a send carries in its work request.
    pub max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
#[derive(Debug)]
pub struct QpInitAttr {
    /// Anything.
    pub qp_context: *mut c_void,
    /// Completions of sends.
    pub send_cq: *mut Cq,
    /// Completions of receives.
    pub recv_cq: *mut Cq,
    /// None here.
    pub srq: *mut Srq,
    /// Asked for; then what there is.
    pub cap: QpCap,
    /// [`QPT_RC`].
    pub qp_type: c_uint,
    /// 0: only those that ask for it complete.
    pub sq_sig_all: c_int,
}

/// `struct rdma_event_channel`.
#[repr(C)]
#[derive(Debug)]
pub struct EventChannel {
    /// Readable when an event waits.
    pub fd: c_int,
}

/// The beginning of `struct rdma_cm_id`.
#[repr(C)]
#[derive(Debug)]
pub struct CmId {
    /// The device; null until an address has told which.
    pub verbs: *mut Context,
    channel: *mut EventChannel,
    /// Anything.
    pub context: *mut c_void,
    /// After [`Library`](Rdma)'s `create_qp`.
    pub qp: *mut Qp,
}

/// `struct rdma_conn_param`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct ConnParam {
    /// Bytes for the other side, or from it.
    pub private_data: *const c_void,
    /// How many; received ones may be padded with zeros.
    pub private_data_len: u8,
    /// Reads by the peer at a time.
    pub responder_resources: u8,
    /// Reads by this side at a time.
    pub initiator_depth: u8,
    /// Of no meaning.
    pub flow_control: u8,
    /// Retransmissions before an error, at most 7.
    pub retry_count: u8,
    /// The same when the peer has no receive posted; 7: without end.
    pub rnr_retry_count: u8,
    /// Of no meaning with a queue pair of rdma_cm's.
    pub srq: u8,
    /// Of no meaning with a queue pair of rdma_cm's.
    pub qp_num: u32,
}

/// `struct rdma_cm_event`; of the union only what connections have.
#[repr(C)]
#[derive(Debug)]
pub struct CmEvent {
    /// Whose event.
    pub id: *mut CmId,
    /// Of a request: who listened.
    pub listen_id: *mut CmId,
    /// `CM_*`.
    pub event: c_uint,
    /// 0, or why.
    pub status: c_int,
    /// Private data of a request or an answer.
    pub conn: ConnParam,
    rest_of_union: [u8; 32],
}

// Numbers printed by a C program with offsetof and sizeof, on x86-64.
const _: () = {
    assert!(size_of::<SendWr>() == 128 && offset_of!(SendWr, imm_data) == 36);
    assert!(offset_of!(SendWr, remote_addr) == 40 && offset_of!(SendWr, rkey) == 48);
    assert!(size_of::<RecvWr>() == 32 && size_of::<Sge>() == 16);
    assert!(size_of::<Wc>() == 48 && offset_of!(Wc, byte_len) == 20 && offset_of!(Wc, imm_data) == 24);
    assert!(offset_of!(Wc, wc_flags) == 36);
    assert!(
        size_of::<QpInitAttr>() == 64 && offset_of!(QpInitAttr, cap) == 32 && offset_of!(QpInitAttr, qp_type) == 52
    );
    assert!(size_of::<Mr>() == 48 && offset_of!(Mr, lkey) == 36 && offset_of!(Mr, rkey) == 40);
    assert!(offset_of!(Context, poll_cq) == 96 && offset_of!(Context, req_notify_cq) == 104);
    assert!(offset_of!(Context, post_send) == 208 && offset_of!(Context, post_recv) == 216);
    assert!(offset_of!(CompChannel, fd) == 8 && offset_of!(CmId, qp) == 24);
    assert!(size_of::<ConnParam>() == 24 && offset_of!(ConnParam, qp_num) == 16);
    assert!(size_of::<CmEvent>() == 80 && offset_of!(CmEvent, conn) == 24 && offset_of!(CmEvent, status) == 20);
};

/// `IBV_WR_RDMA_WRITE`.
pub const WR_RDMA_WRITE: c_uint = 0;
/// `IBV_WR_RDMA_WRITE_WITH_IMM`.
pub const WR_RDMA_WRITE_WITH_IMM: c_uint = 1;
/// `IBV_SEND_SIGNALED`.
pub const SEND_SIGNALED: c_uint = 1 << 1;
/// `IBV_SEND_INLINE`.
pub const SEND_INLINE: c_uint = 1 << 3;
/// `IBV_WC_SUCCESS`.
pub const WC_SUCCESS: c_uint = 0;
/// `IBV_WC_WR_FLUSH_ERR`: the queue pair was in error before.
pub const WC_WR_FLUSH_ERR: c_uint = 5;
/// `IBV_WC_REM_ACCESS_ERR`.
pub const WC_REM_ACCESS_ERR: c_uint = 10;
/// `IBV_WC_RECV_RDMA_WITH_IMM`.
pub const WC_RECV_RDMA_WITH_IMM: c_uint = 129;
/// `IBV_WC_RDMA_WRITE`.
pub const WC_RDMA_WRITE: c_uint = 1;
/// `IBV_WC_WITH_IMM`.
pub const WC_WITH_IMM: c_uint = 1 << 1;
/// `IBV_ACCESS_LOCAL_WRITE`.
pub const ACCESS_LOCAL_WRITE: c_int = 1;
/// `IBV_ACCESS_REMOTE_WRITE`.
pub const ACCESS_REMOTE_WRITE: c_int = 1 << 1;
/// `IBV_QPT_RC`.
pub const QPT_RC: c_uint = 2;
/// `RDMA_PS_TCP`.
pub const PS_TCP: c_uint = 0x0106;
/// `RDMA_CM_EVENT_ADDR_RESOLVED`.
pub const CM_ADDR_RESOLVED: c_uint = 0;
/// `RDMA_CM_EVENT_ROUTE_RESOLVED`.
pub const CM_ROUTE_RESOLVED: c_uint = 2;
/// `RDMA_CM_EVENT_CONNECT_REQUEST`.
pub const CM_CONNECT_REQUEST: c_uint = 4;
/// `RDMA_CM_EVENT_ESTABLISHED`.
pub const CM_ESTABLISHED: c_uint = 9;
/// `RDMA_OPTION_ID`.
pub const OPTION_ID: c_int = 0;
/// `RDMA_OPTION_ID_ACK_TIMEOUT`.
pub const OPTION_ID_ACK_TIMEOUT: c_int = 3;

macro_rules! calls {
    ($($symbol:literal $name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// rdma-core, loaded. Each field is the C function that its documentation names; see its manual page.
        #[derive(Debug)]
        pub struct Rdma {
            $(
                #[doc = concat!("`", $symbol, "`.")]
                pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,
            )*
            // Held for as long as the functions may be called.
            _libraries: [Library; 2],
        }

        impl Rdma {
            /// Loads both libraries.
            ///
            /// # Errors
            /// The loader's text: a library or one of its functions is not there.
            pub fn load() -> Result<Rdma, libloading::Error> {
                // SAFETY: the initialisers of these two libraries set up their own state only.
                let libraries = unsafe { [Library::new("librdmacm.so.1")?, Library::new("libibverbs.so.1")?] };
                let find = |symbol: &str| {
                    // SAFETY: only looked for here; the type is given, and justified, at the conversion below.
                    let found = unsafe { libraries[0].get::<*mut c_void>(symbol.as_bytes()) };
                    // SAFETY: as above.
                    found.or_else(|_| unsafe { libraries[1].get::<*mut c_void>(symbol.as_bytes()) }).map(|found| *found)
                };
                Ok(Rdma {
                    $(
                        // SAFETY: the symbol is a function of this signature in every rdma-core of this soname.
                        $name: unsafe {
                            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($argument),*) $(-> $result)?>(find($symbol)?)
                        },
                    )*
                    _libraries: libraries,
                })
            }
        }
    };
}

calls! {
    "rdma_create_event_channel" create_event_channel() -> *mut EventChannel;
    "rdma_destroy_event_channel" destroy_event_channel(*mut EventChannel);
    "rdma_create_id" create_id(*mut EventChannel, *mut *mut CmId, *mut c_void, c_uint) -> c_int;
    "rdma_destroy_id" destroy_id(*mut CmId) -> c_int;
    "rdma_set_option" set_option(*mut CmId, c_int, c_int, *mut c_void, usize) -> c_int;
    "rdma_bind_addr" bind_addr(*mut CmId, *mut sockaddr) -> c_int;
    "rdma_get_src_port" get_src_port(*mut CmId) -> u16;
    "rdma_listen" listen(*mut CmId, c_int) -> c_int;
    "rdma_resolve_addr" resolve_addr(*mut CmId, *mut sockaddr, *mut sockaddr, c_int) -> c_int;
    "rdma_resolve_route" resolve_route(*mut CmId, c_int) -> c_int;
    "rdma_create_qp" create_qp(*mut CmId, *mut Pd, *mut QpInitAttr) -> c_int;
    "rdma_destroy_qp" destroy_qp(*mut CmId);
    "rdma_connect" connect(*mut CmId, *mut ConnParam) -> c_int;
    "rdma_accept" accept(*mut CmId, *mut ConnParam) -> c_int;
    "rdma_reject" reject(*mut CmId, *const c_void, u8) -> c_int;
    "rdma_disconnect" disconnect(*mut CmId) -> c_int;
    "rdma_get_cm_event" get_cm_event(*mut EventChannel, *mut *mut CmEvent) -> c_int;
    "rdma_ack_cm_event" ack_cm_event(*mut CmEvent) -> c_int;
    "rdma_event_str" event_str(c_uint) -> *const c_char;
    "ibv_wc_status_str" wc_status_str(c_uint) -> *const c_char;
    "ibv_alloc_pd" alloc_pd(*mut Context) -> *mut Pd;
    "ibv_dealloc_pd" dealloc_pd(*mut Pd) -> c_int;
    "ibv_reg_mr" reg_mr(*mut Pd, *mut c_void, usize, c_int) -> *mut Mr;
    "ibv_dereg_mr" dereg_mr(*mut Mr) -> c_int;
    "ibv_create_comp_channel" create_comp_channel(*mut Context) -> *mut CompChannel;
    "ibv_destroy_comp_channel" destroy_comp_channel(*mut CompChannel) -> c_int;
    "ibv_create_cq" create_cq(*mut Context, c_int, *mut c_void, *mut CompChannel, c_int) -> *mut Cq;
    "ibv_destroy_cq" destroy_cq(*mut Cq) -> c_int;
    "ibv_get_cq_event" get_cq_event(*mut CompChannel, *mut *mut Cq, *mut *mut c_void) -> c_int;
    "ibv_ack_cq_events" ack_cq_events(*mut Cq, c_uint);
}

/// `ibv_post_send`: 0 or an error number.
///
/// # Safety
/// As in C: a queue pair that lives, requests whose memory lives and is registered, or inline.
pub unsafe fn post_send(qp: *mut Qp, requests: *mut SendWr) -> c_int {
    let mut bad = std::ptr::null_mut();
    // SAFETY: by the caller's promise; every provider fills this entry.
    unsafe { (*(*qp).context).post_send.map_or(libc::ENOSYS, |call| call(qp, requests, &mut bad)) }
}

/// `ibv_post_recv`: 0 or an error number.
///
/// # Safety
/// As in C.
pub unsafe fn post_recv(qp: *mut Qp, requests: *mut RecvWr) -> c_int {
    let mut bad = std::ptr::null_mut();
    // SAFETY: by the caller's promise; every provider fills this entry.
    unsafe { (*(*qp).context).post_recv.map_or(libc::ENOSYS, |call| call(qp, requests, &mut bad)) }
}

/// `ibv_poll_cq`: how many completions were taken, or negative.
///
/// # Safety
/// As in C.
pub unsafe fn poll_cq(cq: *mut Cq, completions: &mut [Wc]) -> c_int {
    let count = c_int::try_from(completions.len()).unwrap_or(c_int::MAX);
    // SAFETY: by the caller's promise; there is room for `count`.
    unsafe { (*(*cq).context).poll_cq.map_or(-libc::ENOSYS, |call| call(cq, count, completions.as_mut_ptr())) }
}

/// `ibv_req_notify_cq` for any completion: 0 or an error number.
///
/// # Safety
/// As in C.
pub unsafe fn req_notify_cq(cq: *mut Cq) -> c_int {
    // SAFETY: by the caller's promise.
    unsafe { (*(*cq).context).req_notify_cq.map_or(libc::ENOSYS, |call| call(cq, 0)) }
}
