//! A queue pair with its completions, and the work that is posted to it.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;

use rdma_sys::{self as sys, Rdma, Wc};

use super::{
    CmEvent, Id, MAX_PRIVATE_BYTES, Memory, VerbsError, check, check_number, failed, library, set_nonblocking, text,
};

/// Exponent of the time until a retransmission, 4.096 µs × 2¹⁶ = 268 ms: long enough for a peer that is a guest on a busy
/// host. It detects no failures, so it need not be short; the TCP connection does that.
const ACK_TIMEOUT_EXPONENT: u8 = 16;
/// Two seconds; then the connection has failed. Not 7, the most that there is: soft-RoCE takes that for «without end».
const RETRIES: u8 = 6;
/// Without end: that receives are there is the credits' business, and a stuck peer is noticed on the TCP connection.
const RETRIES_WITHOUT_RECEIVE: u8 = 7;
/// Asked for; devices give this much or less.
const INLINE_BYTES: u32 = 220;

/// Completions of sends and receives, in one queue.
#[derive(Debug)]
struct Completions {
    library: &'static Rdma,
    // In the order of destruction.
    queue: *mut sys::Cq,
    channel: *mut sys::CompChannel,
}

impl Completions {
    fn new(id: &Id, entries: usize) -> Result<Completions, VerbsError> {
        let library = id.library();
        // SAFETY: the context is that of a bound identifier.
        let channel = unsafe { (library.create_comp_channel)(id.context()) };
        if channel.is_null() {
            return Err(failed("ibv_create_comp_channel"));
        }
        let mut completions = Completions { library, queue: ptr::null_mut(), channel };
        set_nonblocking(completions.as_fd())?;
        // SAFETY: context and channel live.
        completions.queue = unsafe { (library.create_cq)(id.context(), entries as c_int, ptr::null_mut(), channel, 0) };
        match completions.queue.is_null() {
            true => Err(failed("ibv_create_cq")),
            false => Ok(completions),
        }
    }
}

impl AsFd for Completions {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel lives until drop.
        unsafe { BorrowedFd::borrow_raw((*self.channel).fd) }
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        if !self.queue.is_null() {
            // SAFETY: its queue pair is gone (Link::drop), and all events that were got are acknowledged.
            unsafe { (self.library.destroy_cq)(self.queue) };
        }
        // SAFETY: its queue is gone.
        unsafe { (self.library.destroy_comp_channel)(self.channel) };
    }
}

/// A write into the peer's ring.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    /// Comes back in the completion.
    pub id: u64,
    /// Whether there is a completion.
    pub signal: bool,
    /// Arrives with it.
    pub immediate: Option<u32>,
    /// From here in the mirror.
    pub from: usize,
    /// How much; may be 0.
    pub bytes: usize,
    /// To this address of the peer's.
    pub to: u64,
    /// Under its key.
    pub rkey: u32,
}

/// How many work requests there may be.
#[derive(Debug, Clone, Copy)]
pub struct Depths {
    /// Sends.
    pub sends: usize,
    /// Receives.
    pub receives: usize,
}

/// A queue pair with all it needs.
#[derive(Debug)]
pub struct Link {
    // In the order of destruction, behind the queue pair, which drop destroys first.
    completions: Completions,
    memory: Memory,
    id: Id,
    inline_bytes: usize,
}

// SAFETY: libibverbs locks what threads share; this is used by one thread at a time.
unsafe impl Send for Link {}

impl Link {
    /// Makes the queue pair of `id`, whose device must be that of the memory.
    ///
    /// # Errors
    /// [`VerbsError`].
    ///
    /// # Panics
    /// When the devices differ.
    pub fn new(id: Id, memory: Memory, depths: Depths) -> Result<Link, VerbsError> {
        // SAFETY: the mirror is registered.
        let of_memory = unsafe { (*memory.mirror.raw).context };
        assert!(id.context() == of_memory, "a connection comes in on the device that listens");
        let completions = Completions::new(&id, depths.sends + depths.receives)?;
        let mut attributes = sys::QpInitAttr {
            qp_context: ptr::null_mut(),
            send_cq: completions.queue,
            recv_cq: completions.queue,
            srq: ptr::null_mut(),
            cap: sys::QpCap {
                max_send_wr: depths.sends as u32,
                max_recv_wr: depths.receives as u32,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: INLINE_BYTES,
            },
            qp_type: sys::QPT_RC,
            sq_sig_all: 0,
        };
        // SAFETY: all parts live, on one device; the queue pair is destroyed before them.
        let mut create = || unsafe { (id.library().create_qp)(id.raw, memory.domain.raw, &mut attributes) };
        let mut created = create();
        if created != 0 {
            // Devices without inline data refuse rather than give less.
            attributes.cap.max_inline_data = 0;
            // SAFETY: as above.
            created = unsafe { (id.library().create_qp)(id.raw, memory.domain.raw, &mut attributes) };
        }
        check("rdma_create_qp", created)?;
        let inline_bytes = attributes.cap.max_inline_data as usize;
        let link = Link { completions, memory, id, inline_bytes };
        link.id.set_timeout(ACK_TIMEOUT_EXPONENT)?;
        Ok(link)
    }

    fn queue_pair(&self) -> *mut sys::Qp {
        // SAFETY: the identifier lives, and has had a queue pair since `new`.
        unsafe { (*self.id.raw).qp }
    }

    fn parameters(private: &[u8]) -> sys::ConnParam {
        assert!(private.len() <= MAX_PRIVATE_BYTES, "private data fits");
        sys::ConnParam {
            private_data: private.as_ptr().cast(),
            private_data_len: private.len() as u8,
            responder_resources: 0,
            initiator_depth: 0,
            flow_control: 0,
            retry_count: RETRIES,
            rnr_retry_count: RETRIES_WITHOUT_RECEIVE,
            srq: 0,
            qp_num: 0,
        }
    }

    /// Asks for the connection; `CM_ESTABLISHED` follows.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn connect(&self, private: &[u8]) -> Result<(), VerbsError> {
        let mut parameters = Self::parameters(private);
        // SAFETY: the identifier lives; the private data is copied.
        check("rdma_connect", unsafe { (self.id.library().connect)(self.id.raw, &mut parameters) })
    }

    /// Accepts the request that the identifier came from; `CM_ESTABLISHED` follows.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn accept(&self, private: &[u8]) -> Result<(), VerbsError> {
        let mut parameters = Self::parameters(private);
        // SAFETY: as above.
        check("rdma_accept", unsafe { (self.id.library().accept)(self.id.raw, &mut parameters) })
    }

    /// Ends the connection: the queue pair is in error from here on.
    pub fn disconnect(&self) {
        // SAFETY: the identifier lives. It fails when there was no connection, and then there is none to end.
        unsafe { (self.id.library().disconnect)(self.id.raw) };
    }

    /// The identifier, for its events.
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// Whether the event is about this connection.
    pub fn concerns(&self, event: &CmEvent) -> bool {
        event.id == self.id.raw
    }

    /// The memory that the device knows.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Bytes that a write carries in its work request. For people.
    #[cfg(feature = "conformance")]
    pub fn inline_bytes(&self) -> usize {
        self.inline_bytes
    }

    /// Takes the ring from the device: writes of the peer fail from here on. For tests.
    #[cfg(feature = "conformance")]
    pub fn deregister_ring(&mut self) {
        self.memory.ring = None;
    }

    /// Posts receives of nothing: a write with immediate data needs one.
    ///
    /// # Errors
    /// [`VerbsError`]; none was posted, or the connection has failed.
    pub fn post_receives(&self, count: usize) -> Result<(), VerbsError> {
        const CHAIN: usize = super::super::ring::REPOST;
        let mut left = count;
        while left > 0 {
            let mut chain =
                [sys::RecvWr { wr_id: 0, next: ptr::null_mut(), sg_list: ptr::null_mut(), num_sge: 0 }; CHAIN];
            let used = left.min(CHAIN);
            for at in (1..used).rev() {
                let (before, next) = chain.split_at_mut(at);
                before[at - 1].next = &mut next[0];
            }
            // SAFETY: the queue pair lives; the chain is copied by the call.
            check_number("ibv_post_recv", unsafe { sys::post_recv(self.queue_pair(), chain.as_mut_ptr()) })?;
            left -= used;
        }
        Ok(())
    }

    /// Posts a write.
    ///
    /// # Errors
    /// [`VerbsError`]; it was not posted.
    ///
    /// # Panics
    /// When the source is not in the mirror.
    pub fn post_write(&self, write: &Write) -> Result<(), VerbsError> {
        let memory = &self.memory;
        assert!(write.from + write.bytes <= memory.ring_bytes, "a write from the mirror");
        let mut piece = sys::Sge {
            addr: memory.arena.address() + (memory.ring_bytes + write.from) as u64,
            length: write.bytes as u32,
            lkey: memory.mirror.lkey(),
        };
        let mut request = sys::SendWr::new();
        request.wr_id = write.id;
        if write.bytes > 0 {
            request.sg_list = &mut piece;
            request.num_sge = 1;
        }
        if let Some(immediate) = write.immediate {
            request.opcode = sys::WR_RDMA_WRITE_WITH_IMM;
            request.imm_data = immediate.to_be();
        }
        if write.signal {
            request.send_flags |= sys::SEND_SIGNALED;
        }
        if (1..=self.inline_bytes).contains(&write.bytes) {
            request.send_flags |= sys::SEND_INLINE;
        }
        (request.remote_addr, request.rkey) = (write.to, write.rkey);
        // SAFETY: the queue pair lives; the request and its piece are copied by the call, and the memory that the piece
        // names is registered and mapped until after the queue pair is destroyed.
        check_number("ibv_post_send", unsafe { sys::post_send(self.queue_pair(), &mut request) })
    }

    /// Takes completions.
    ///
    /// # Errors
    /// [`VerbsError`]; the queue is broken.
    pub fn poll(&self, into: &mut [Wc]) -> Result<usize, VerbsError> {
        // SAFETY: the queue lives.
        let count = unsafe { sys::poll_cq(self.completions.queue, into) };
        usize::try_from(count).map_err(|_| VerbsError::Call {
            call: "ibv_poll_cq",
            source: Arc::new(io::Error::from_raw_os_error(-count)),
        })
    }

    /// The next completion makes [`completion_fd`](Self::completion_fd) readable. Poll once more before sleeping.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn request_event(&self) -> Result<(), VerbsError> {
        // SAFETY: the queue lives.
        check_number("ibv_req_notify_cq", unsafe { sys::req_notify_cq(self.completions.queue) })
    }

    /// Takes back what has made the descriptor readable.
    pub fn drain_events(&self) {
        let (mut queue, mut context) = (ptr::null_mut(), ptr::null_mut());
        let library = self.completions.library;
        // SAFETY: the channel lives and does not block; both places are written. Every event is acknowledged at once.
        while unsafe { (library.get_cq_event)(self.completions.channel, &mut queue, &mut context) } == 0 {
            // SAFETY: an event of this queue was got.
            unsafe { (library.ack_cq_events)(queue, 1) };
        }
    }

    /// See [`request_event`](Self::request_event).
    pub fn completion_fd(&self) -> BorrowedFd<'_> {
        self.completions.as_fd()
    }

    /// Readable when an event of the connection waits.
    pub fn connection_fd(&self) -> BorrowedFd<'_> {
        self.id.event_fd()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.disconnect();
        // SAFETY: the identifier has a queue pair. When this returns the device neither reads nor writes for it, so
        // that what follows, field by field, may go.
        unsafe { (self.id.library().destroy_qp)(self.id.raw) };
    }
}

/// What a failed completion says.
pub fn status_text(completion: &Wc) -> String {
    let name = library().map_or_else(
        |_| String::new(),
        // SAFETY: any number is allowed.
        |library| text(unsafe { (library.wc_status_str)(completion.status) }),
    );
    format!("{name} (status {}, vendor {:#x})", completion.status, completion.vendor_err)
}
