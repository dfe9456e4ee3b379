//! A port that DPDK drives as uplink: a NIC bound to vfio-pci, or one of DPDK's own devices (virtio-user towards a switch).
//!
//! Frames go in bursts of 32 from the port's buffers into the batch, and from the turn's output to the port, without a system
//! call. A port has no descriptor to sleep on, so its reactor polls. It can compute a checksum if it says so; packets that are
//! still to be cut are cut here ([`super::offload`]). Rejected: TSO of the port (drivers differ in how many pieces they take and
//! in what they want prepared, and none of that runs on a machine without the NIC), and large receive (off).

mod eal;

pub use eal::{EalOptions, start};

use super::offload::{self, PortChecksum, Segments};
use super::{Burst, Intake, OffloadFlags, Uplink, UplinkDrops};
use crate::frame::{MAX_FRAME_BYTES, VNET_HEADER_BYTES, VnetHeader};
use dpdk_sys as sys;
use std::ffi::CString;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{JoinHandle, ThreadId};
use std::time::Duration;

/// Frames that go to or come from the port at once.
const BURST: usize = 32;
/// Buffers of a port: two queues of 1024, what is held here, and the caches of two threads.
const POOL_FRAMES: u32 = 4095;
/// Ethernet header and two tags.
const LINK_HEADER_BYTES: usize = 22;
/// Whether the device is still there is looked at once in so many polls that found nothing.
const POLLS_PER_CHECK: u32 = 1 << 14;
/// How long a port that listens for its switch waits for it.
const SWITCH_PATIENCE: Duration = Duration::from_secs(5);
/// `VIRTIO_NET_HDR_F_DATA_VALID`.
const DATA_VALID: u8 = 2;

/// Why a port cannot be used. Each text names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DpdkError {
    /// The environment would not start.
    #[error("DPDK does not start (its own words are above): look at dpdk_memory_mib and dpdk_arguments in node.toml")]
    NotStarted {
        /// DPDK's answer.
        #[source]
        source: io::Error,
    },
    /// Not a name.
    #[error("{port:?} cannot name a DPDK port: write a PCI address or a device such as net_virtio_user0,path=…")]
    BadName {
        /// The text.
        port: String,
    },
    /// There is no such device, or DPDK has no driver for it.
    #[error(
        "DPDK finds no port {port}: is the device bound to vfio-pci (or its switch running), are its options right, and is its \
         driver installed?"
    )]
    NoPort {
        /// The text.
        port: String,
        /// DPDK's answer.
        #[source]
        source: io::Error,
    },
    /// Anything else.
    #[error("DPDK port {port}: {action} failed")]
    Port {
        /// The text.
        port: String,
        /// What was tried.
        action: &'static str,
        /// DPDK's answer.
        #[source]
        source: io::Error,
    },
}

/// A started port with one queue each way.
#[derive(Debug)]
pub struct Dpdk {
    name: String,
    port: sys::Port,
    /// In this order: the port has buffers of the pool.
    _attached: Attached,
    pool: Pool,
    offloads: OffloadFlags,
    drops: UplinkDrops,
    /// What came with the last burst: `next` is the first that was not taken, `count` their number.
    received: [sys::Received; BURST],
    next: usize,
    count: usize,
    out: Vec<*mut sys::Mbuf>,
    thread: ThreadId,
    empty_polls: u32,
}

// SAFETY: the buffers and the pool may be used from any thread, by one at a time; `&mut self` sees to that.
unsafe impl Send for Dpdk {}

/// Memory for the frames of one port.
#[derive(Debug)]
struct Pool(*mut sys::Pool);

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the pool is ours, and whoever owns it gives all frames back before.
        unsafe { sys::plover_dpdk_free_pool(self.0) };
    }
}

/// A port from when it is attached; detached when dropped.
#[derive(Debug)]
struct Attached(u16);

impl Attached {
    fn new(port: &str) -> Result<Attached, DpdkError> {
        let bad_name = || DpdkError::BadName { port: port.to_owned() };
        let text = |text: &str| CString::new(text).ok().filter(|text| !text.is_empty()).ok_or_else(bad_name);
        let (device, arguments) = (text(device_name(port))?, text(port)?);
        let mut id = 0;
        let _alone = alone();
        let _bounded = BoundedAccept::of(port);
        // SAFETY: two NUL-terminated strings that live across the call, and a number to write to.
        let result = unsafe { sys::plover_dpdk_attach(arguments.as_ptr(), device.as_ptr(), &raw mut id) };
        match result {
            0 => Ok(Attached(id)),
            _ => Err(DpdkError::NoPort { port: port.to_owned(), source: error(result) }),
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _alone = alone();
        // SAFETY: the port was attached and is not used any more.
        unsafe { sys::plover_dpdk_detach(self.0) };
    }
}

/// A virtio-user device that listens (`server=1`) waits for its switch without a bound while it is attached. Unless this is
/// dropped in time, a connection of our own, closed at once, ends that wait with an error.
#[derive(Debug)]
struct BoundedAccept(Option<(Sender<()>, JoinHandle<()>)>);

impl BoundedAccept {
    fn of(port: &str) -> BoundedAccept {
        let option = |name: &str| port.split(',').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        let Some(path) = option("path").filter(|_| option("server") == Some("1")).map(PathBuf::from) else {
            return BoundedAccept(None);
        };
        let (done, attached) = std::sync::mpsc::channel();
        let wait = move || {
            if attached.recv_timeout(SWITCH_PATIENCE) == Err(RecvTimeoutError::Timeout) {
                tracing::warn!(path = %path.display(), "no switch has connected to the port's socket");
                // The error that matters is that of the device.
                let _ = UnixStream::connect(&path);
            }
        };
        let thread = std::thread::Builder::new().name("dpdk-accept".into()).spawn(wait);
        BoundedAccept(thread.ok().map(|thread| (done, thread)))
    }
}

impl Drop for BoundedAccept {
    fn drop(&mut self) {
        if let Some((done, thread)) = self.0.take() {
            drop(done);
            let _ = thread.join();
        }
    }
}

/// DPDK's lists of devices are not for several threads at once.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn device_name(port: &str) -> &str {
    port.split(',').next().unwrap_or_default()
}

/// A negative errno of DPDK.
fn error(result: i32) -> io::Error {
    io::Error::from_raw_os_error(-result)
}

impl Dpdk {
    /// Attaches and starts `port`: a PCI address or the name of a device, and options after commas. DPDK must be
    /// [started](start). `mac` is the guest's address; without one the port takes all frames. To be called by the thread that
    /// polls, which gets its own cache of buffers.
    ///
    /// # Errors
    /// [`DpdkError`]; nothing is left behind.
    pub fn open(port: &str, mac: Option<[u8; 6]>) -> Result<Dpdk, DpdkError> {
        let fail = |action| move |source| DpdkError::Port { port: port.to_owned(), action, source };
        let name = device_name(port);
        // The pool must outlive the port, which has buffers of it: the last that is declared is dropped first.
        let pool;
        let attached = Attached::new(port)?;
        let id = attached.0;
        pool = make_pool(id).map_err(fail("getting memory for its frames (dpdk_memory_mib in node.toml)"))?;
        let mut started = sys::Port { id, ..sys::Port::default() };
        let mac = mac.as_ref().map_or(std::ptr::null(), |mac| mac.as_ptr());
        // SAFETY: the port is attached, the pool is alive, `mac` is null or six bytes.
        let result = unsafe { sys::plover_dpdk_start(&raw mut started, pool.0, mac) };
        if result != 0 {
            return Err(fail("starting it")(error(result)));
        }
        // SAFETY: no arguments. It fails when DPDK has no number left for a thread, which costs speed only.
        let _ = unsafe { sys::plover_dpdk_register_thread() };
        if started.hears_guest == 0 {
            tracing::warn!(
                port = name,
                "the port takes neither the guest's address nor all frames; it may hear little"
            );
        }
        tracing::info!(
            port = name,
            mtu = started.mtu,
            checksums = started.sends_checksums,
            up = started.link_up,
            "port"
        );
        Ok(Dpdk {
            name: name.to_owned(),
            port: started,
            _attached: attached,
            pool,
            offloads: OffloadFlags::default(),
            drops: UplinkDrops::default(),
            received: [sys::Received::default(); BURST],
            next: 0,
            count: 0,
            out: Vec::with_capacity(BURST),
            thread: std::thread::current().id(),
            empty_polls: 0,
        })
    }

    /// Whether the link is up, as far as the driver knows.
    pub fn is_link_up(&self) -> bool {
        // SAFETY: the port is started.
        unsafe { sys::plover_dpdk_link_up(self.port.id) == 1 }
    }

    /// Whether the port computes checksums of frames that leave.
    pub fn sends_checksums(&self) -> bool {
        self.port.sends_checksums == 1
    }

    /// How many frames can wait to be received.
    pub fn slots(&self) -> usize {
        self.port.receive_slots.into()
    }

    /// Takes the next burst from the port, after the last one was used up. Returns its size.
    fn refill(&mut self) -> io::Result<usize> {
        self.give_back();
        // SAFETY: the port is started, and the array has room for that many.
        let count = unsafe { sys::plover_dpdk_receive(self.port.id, self.received.as_mut_ptr(), BURST as u16) };
        (self.next, self.count) = (0, count.into());
        if count == 0 {
            self.empty_polls = self.empty_polls.wrapping_add(1);
            let is_due = self.empty_polls.is_multiple_of(POLLS_PER_CHECK);
            // SAFETY: only the number of a port.
            if is_due && unsafe { sys::plover_dpdk_is_removed(self.port.id) } != 0 {
                return Err(io::Error::other("the device was removed: put it back"));
            }
        }
        Ok(count.into())
    }

    /// Frees what is left of the last burst.
    fn give_back(&mut self) {
        let count = std::mem::take(&mut self.count);
        self.next = 0;
        // SAFETY: the first `count` came from the port, and none of them was freed.
        unsafe { sys::plover_dpdk_free_received(self.received.as_mut_ptr(), count as u16) };
    }

    /// Copies one received frame into the batch. `false`: there is no room.
    fn take(&mut self, received: sys::Received, into: &mut Intake<'_>) -> bool {
        let bytes = VNET_HEADER_BYTES + received.bytes as usize;
        if bytes > MAX_FRAME_BYTES {
            self.drops.missed += 1;
            return true;
        }
        let Some(room) = into.spare(bytes) else { return false };
        let (header, packet) = room.split_at_mut(VNET_HEADER_BYTES);
        header.fill(0);
        if received.pieces == 1 {
            // SAFETY: the buffer is ours until `give_back`, and its only piece has this many bytes at `data`.
            packet.copy_from_slice(unsafe { std::slice::from_raw_parts(received.data, packet.len()) });
        } else {
            // SAFETY: the buffer is ours until `give_back`, and `packet` has room for the bytes of all pieces.
            unsafe { sys::plover_dpdk_copy(received.mbuf, packet.as_mut_ptr()) };
        }
        match received.checksum {
            1 if self.offloads.csum => header[0] = DATA_VALID,
            // From another guest on this host, say: the checksum was never computed.
            2 => offload::repair_checksum(packet),
            _ => {}
        }
        into.commit(bytes);
        true
    }

    /// A buffer for a frame of `bytes` with its vnet header, filled in by `write`, or `None` if there is none. The header is not
    /// sent.
    fn prepare(&mut self, bytes: usize, write: impl FnOnce(&mut [u8])) -> Option<*mut sys::Mbuf> {
        let length = u16::try_from(bytes).ok()?;
        let mut data = std::ptr::null_mut();
        // SAFETY: the pool is alive, and `data` is a pointer to write to.
        let mbuf = unsafe { sys::plover_dpdk_prepare(self.pool.0, length, VNET_HEADER_BYTES as u16, &raw mut data) };
        if mbuf.is_null() {
            return None;
        }
        // SAFETY: `data` points to that many bytes of a buffer that nobody else has. They are initialised as far as that
        // matters for bytes: memory that DPDK got from the kernel.
        write(unsafe { std::slice::from_raw_parts_mut(data, bytes) });
        Some(mbuf)
    }

    /// Sends a frame that the port takes as it is, or with a checksum that it computes.
    fn send_whole(&mut self, frame: &[u8], checksum: Option<PortChecksum>) -> bool {
        let Some(mbuf) = self.prepare(frame.len(), |room| room.copy_from_slice(frame)) else {
            self.drops.full += 1;
            return false;
        };
        if let Some(PortChecksum { l2_bytes, l3_bytes, is_v6, is_tcp }) = checksum {
            // SAFETY: the buffer is ours.
            unsafe { sys::plover_dpdk_request_checksum(mbuf, l2_bytes, l3_bytes, is_v6.into(), is_tcp.into()) };
        }
        self.push(mbuf);
        true
    }

    /// Sends a frame that must be worked on first.
    fn send_in_pieces(&mut self, frame: &[u8]) -> bool {
        let Ok(segments) = Segments::of(frame) else {
            self.drops.refused += 1;
            return false;
        };
        if segments.bytes(0) > self.longest_frame() {
            self.drops.refused += 1;
            return false;
        }
        for at in 0..segments.len() {
            let write = |room: &mut [u8]| {
                segments.write(frame, at, room);
            };
            let Some(mbuf) = self.prepare(segments.bytes(at), write) else {
                self.drops.full += (segments.len() - at) as u64;
                return false;
            };
            self.push(mbuf);
        }
        true
    }

    fn push(&mut self, mbuf: *mut sys::Mbuf) {
        self.out.push(mbuf);
        if self.out.len() == BURST {
            self.send_burst();
        }
    }

    fn send_burst(&mut self) {
        let (count, mut refused) = (self.out.len() as u16, 0);
        // SAFETY: the port is started; the buffers are ours, and none is used afterwards.
        let sent = unsafe { sys::plover_dpdk_send(self.port.id, self.out.as_mut_ptr(), count, &raw mut refused) };
        self.out.clear();
        self.drops.refused += u64::from(refused);
        self.drops.full += u64::from(count - sent - refused);
    }

    /// With vnet header.
    fn longest_frame(&self) -> usize {
        VNET_HEADER_BYTES + LINK_HEADER_BYTES + usize::from(self.port.mtu)
    }
}

fn make_pool(id: u16) -> io::Result<Pool> {
    // Not the port's number: that is free again, and another thread may have got it, while the pool still exists.
    static NAMES: AtomicU64 = AtomicU64::new(0);
    let name = CString::new(format!("plover_{}", NAMES.fetch_add(1, Ordering::Relaxed))).expect("no NUL");
    // SAFETY: only the number of a port that is attached.
    let mtu = unsafe { sys::plover_dpdk_mtu(id) };
    let frame_bytes = (VNET_HEADER_BYTES + LINK_HEADER_BYTES + usize::from(mtu)).max(2048);
    let frame_bytes = u16::try_from(frame_bytes).map_err(|_| io::Error::other("its MTU is too large"))?;
    // SAFETY: a NUL-terminated string that lives across the call, and numbers.
    let pool = unsafe { sys::plover_dpdk_pool(name.as_ptr(), id, POOL_FRAMES, frame_bytes) };
    if pool.is_null() {
        // SAFETY: no arguments.
        return Err(error(unsafe { sys::plover_dpdk_last_error() }));
    }
    Ok(Pool(pool))
}

impl Uplink for Dpdk {
    fn name(&self) -> &str {
        &self.name
    }

    fn recv_burst(&mut self, into: &mut Intake<'_>, budget_frames: usize) -> io::Result<Burst> {
        let mut frames = 0;
        loop {
            while self.next < self.count {
                if frames == budget_frames || !self.take(self.received[self.next], into) {
                    return Ok(Burst { frames, more: true });
                }
                self.next += 1;
                frames += 1;
            }
            // A short burst was the last one.
            let last = self.count > 0 && self.count < BURST;
            if last {
                self.give_back();
            }
            if last || self.refill()? == 0 {
                return Ok(Burst { frames, more: false });
            }
        }
    }

    fn discard_burst(&mut self, budget_frames: usize) -> io::Result<Burst> {
        let mut frames = 0;
        while frames < budget_frames {
            let count = self.refill()?;
            frames += count;
            if count < BURST {
                self.give_back();
                return Ok(Burst { frames, more: false });
            }
        }
        Ok(Burst { frames, more: true })
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<bool> {
        let header = VnetHeader::of(frame).filter(|_| frame.len() >= VNET_HEADER_BYTES + 14);
        let Some(header) = header else {
            self.drops.refused += 1;
            return Ok(false);
        };
        if !offload::is_needed(header, OffloadFlags::default()) {
            if frame.len() > self.longest_frame() {
                self.drops.refused += 1;
                return Ok(false);
            }
            return Ok(self.send_whole(frame, None));
        }
        let by_port = header.gso_type == 0 && self.sends_checksums() && frame.len() <= self.longest_frame();
        match offload::port_checksum(frame).filter(|_| by_port) {
            Some(checksum) => Ok(self.send_whole(frame, Some(checksum))),
            None => Ok(self.send_in_pieces(frame)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.out.is_empty() {
            self.send_burst();
        }
        Ok(())
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn set_offload(&mut self, features: OffloadFlags) -> io::Result<()> {
        self.offloads = features;
        Ok(())
    }

    fn drops(&mut self) -> UplinkDrops {
        // SAFETY: only the number of a port.
        let missed = unsafe { sys::plover_dpdk_missed(self.port.id) };
        UplinkDrops { missed: self.drops.missed + missed, ..self.drops }
    }
}

impl Drop for Dpdk {
    fn drop(&mut self) {
        self.give_back();
        // SAFETY: the buffers are ours and not used any more; the thread is the one that was registered.
        unsafe {
            sys::plover_dpdk_free(self.out.as_mut_ptr(), self.out.len() as u16);
            if std::thread::current().id() == self.thread {
                sys::plover_dpdk_unregister_thread();
            }
        }
    }
}
