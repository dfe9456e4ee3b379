//! One attached controller with one I/O queue pair: SPDK's handles and the order in which they may be used and freed.
//!
//! Nothing here knows what the commands mean; [`Device`](super::Device) does. Memory that the controller may still write to or read
//! from is freed only when the controller is known to be stopped; otherwise it is leaked, and so are the handles.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use spdk_sys::{Controller as RawController, NamespaceInfo, QueuePair};

use super::environment::Environment;
use super::error::{Result, SpdkError};
use super::queue::{Queue, on_timeout};

const EAGAIN: i32 = -(rustix::io::Errno::AGAIN.raw_os_error());
const ENXIO: i32 = -(rustix::io::Errno::NXIO.raw_os_error());

/// Attaching and detaching work on SPDK's and DPDK's global lists, and logs of several VMs open on their own threads.
static PCI: Mutex<()> = Mutex::new(());

/// The handles.
#[derive(Debug)]
pub struct Controller {
    address: Arc<str>,
    ctrlr: NonNull<RawController>,
    qpair: Option<NonNull<QueuePair>>,
    /// Callbacks point into it.
    queue: Box<Queue>,
}

// SAFETY: SPDK asks that one thread at a time uses a controller and its queue pairs, not which one; it keeps nothing of them in
// thread-local memory. The table's callbacks run inside calls of the owner.
unsafe impl Send for Controller {}

/// A time by which something must have happened.
#[derive(Debug, Clone, Copy)]
pub struct Limit {
    start: Instant,
    pub total: Duration,
}

impl Limit {
    pub fn of(total: Duration) -> Self {
        Self { start: Instant::now(), total }
    }

    pub fn passed(&self) -> bool {
        self.start.elapsed() >= self.total
    }

    pub fn missed(&self, action: &'static str, address: &Arc<str>) -> SpdkError {
        SpdkError::Timeout { action, address: Arc::clone(address), limit: self.total }
    }

    /// Calls `step` until it gives a value.
    fn until<T>(&self, mut step: impl FnMut() -> Option<T>) -> Option<T> {
        loop {
            let last = self.passed();
            let done = step();
            if done.is_some() || last {
                return done;
            }
            // The controller needs milliseconds for these steps.
            std::thread::yield_now();
        }
    }
}

impl Controller {
    /// Attaches the controller, which resets it: whatever an earlier owner left in flight ends.
    pub fn attach(_environment: Environment, address: &Arc<str>, queue: Box<Queue>, limit: Limit) -> Result<Self> {
        let gone = || SpdkError::Attach { address: Arc::clone(address) };
        let text = CString::new(address.as_bytes()).map_err(|_| gone())?;
        let _one_at_a_time = PCI.lock().expect("no holder of this lock panics");
        let admin_timeout_ms = u32::try_from(limit.total.as_millis()).unwrap_or(u32::MAX);
        // SAFETY: the environment runs; the text is copied.
        let attach = unsafe { spdk_sys::plover_spdk_attach_begin(text.as_ptr(), admin_timeout_ms) };
        if attach.is_null() {
            return Err(gone());
        }
        let mut ctrlr = ptr::null_mut();
        let ended = limit.until(|| {
            // SAFETY: `attach` is valid until this answers something else than EAGAIN, and then it is not asked again.
            let rc = unsafe { spdk_sys::plover_spdk_attach_poll(attach, &raw mut ctrlr) };
            (rc != EAGAIN).then_some(rc)
        });
        match ended {
            // SPDK has no way to stop it: it stays half attached until the process ends.
            None => Err(limit.missed("attaching", address)),
            Some(_) => {
                let ctrlr = NonNull::new(ctrlr).ok_or_else(gone)?;
                Ok(Self { address: Arc::clone(address), ctrlr, qpair: None, queue })
            }
        }
    }

    pub fn address(&self) -> &Arc<str> {
        &self.address
    }

    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Describes a namespace, or says that there is none.
    pub fn namespace(&self, id: u32) -> Result<NamespaceInfo> {
        let mut info = MaybeUninit::uninit();
        // SAFETY: the controller is attached.
        let rc = unsafe { spdk_sys::plover_spdk_namespace(self.ctrlr.as_ptr(), id, info.as_mut_ptr()) };
        if rc != 0 {
            return Err(SpdkError::NoNamespace { address: Arc::clone(&self.address), namespace: id });
        }
        // SAFETY: the call has succeeded, so it has filled the structure.
        Ok(unsafe { info.assume_init() })
    }

    /// From now on a command that exceeds `io` makes the table say so.
    pub fn watch(&mut self, io: Duration, admin: Duration) {
        let microseconds = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let context = (&raw const *self.queue).cast_mut().cast();
        // SAFETY: the table lives until the controller is detached, or for ever.
        unsafe {
            spdk_sys::plover_spdk_set_timeouts(
                self.ctrlr.as_ptr(),
                microseconds(io),
                microseconds(admin),
                on_timeout,
                context,
            );
        };
    }

    /// Makes the queue pair with room for `depth` commands of the caller, which SPDK may split into `requests`.
    pub fn create_queue_pair(&mut self, depth: u32, requests: u32) -> Result<()> {
        assert!(self.qpair.is_none(), "one queue pair only");
        // SAFETY: the controller is attached.
        let qpair = unsafe { spdk_sys::plover_spdk_qpair_create(self.ctrlr.as_ptr(), depth, requests) };
        let refused = || SpdkError::QueuePair { address: Arc::clone(&self.address), depth };
        self.qpair = Some(NonNull::new(qpair).ok_or_else(refused)?);
        Ok(())
    }

    /// The queue pair, for submissions.
    pub fn queue_pair(&self) -> *mut QueuePair {
        self.qpair.map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    /// Lets SPDK call back for what has ended. False when the queue is dead.
    pub fn poll(&self) -> bool {
        // SAFETY: the queue pair exists from the opening to the closing of the device.
        let rc = unsafe { spdk_sys::plover_spdk_poll(self.queue_pair()) };
        rc >= 0
    }

    /// The same for the admin queue. False when the controller is gone or failed.
    pub fn poll_admin(&self) -> bool {
        // SAFETY: the controller is attached.
        let rc = unsafe { spdk_sys::plover_spdk_poll_admin(self.ctrlr.as_ptr()) };
        // SAFETY: as above.
        rc >= 0 && !unsafe { spdk_sys::plover_spdk_is_failed(self.ctrlr.as_ptr()) }
    }

    /// Stops the controller and starts it again. Afterwards nothing is in flight, on the device or here.
    pub fn reset(&self, limit: Limit) -> Result<()> {
        let ctrlr = self.ctrlr.as_ptr();
        let gone = || SpdkError::Gone { address: Arc::clone(&self.address) };
        // SAFETY: the controller is attached; the steps come in SPDK's order.
        if unsafe { spdk_sys::plover_spdk_disconnect(ctrlr) } != 0 {
            return Err(gone());
        }
        let stopped = limit.until(|| {
            // SAFETY: as above.
            let rc = unsafe { spdk_sys::plover_spdk_poll_admin(ctrlr) };
            (rc == ENXIO).then_some(())
        });
        stopped.ok_or_else(|| limit.missed("stopping the controller", &self.address))?;
        // SAFETY: as above.
        unsafe { spdk_sys::plover_spdk_reconnect_begin(ctrlr) };
        let started = limit.until(|| {
            // SAFETY: as above; after an answer other than EAGAIN it is not asked again.
            let rc = unsafe { spdk_sys::plover_spdk_reconnect_poll(ctrlr) };
            (rc != EAGAIN).then_some(rc)
        });
        match started {
            None => return Err(limit.missed("starting the controller", &self.address)),
            Some(0) => {}
            Some(_) => return Err(gone()),
        }
        // The first poll aborts what was in flight before.
        let idle = limit.until(|| (!self.poll() || self.queue.is_idle()).then(|| self.queue.is_idle()));
        match idle {
            Some(true) => Ok(()),
            Some(false) => Err(gone()),
            None => Err(limit.missed("emptying the queue", &self.address)),
        }
    }

    /// Frees everything, in order. The caller has made sure that nothing is in flight.
    pub fn detach(mut self, limit: Limit) -> Result<()> {
        assert!(self.queue.is_idle(), "commands are in flight");
        let _one_at_a_time = PCI.lock().expect("no holder of this lock panics");
        if let Some(qpair) = self.qpair.take() {
            // SAFETY: freed once; an admin command that hangs ends it through `on_timeout`.
            unsafe { spdk_sys::plover_spdk_qpair_free(qpair.as_ptr()) };
        }
        let mut context = ptr::null_mut();
        // SAFETY: the controller is attached and is not used after this.
        let rc = unsafe { spdk_sys::plover_spdk_detach_begin(self.ctrlr.as_ptr(), &raw mut context) };
        if rc != 0 {
            let address = Arc::clone(&self.address);
            self.leak();
            return Err(SpdkError::Gone { address });
        }
        let detached = limit.until(|| {
            // SAFETY: the context is valid until this answers something else than EAGAIN, and then it is not asked again.
            let more = !context.is_null() && unsafe { spdk_sys::plover_spdk_detach_poll(context) } == EAGAIN;
            (!more).then_some(())
        });
        detached.ok_or_else(|| {
            let missed = limit.missed("detaching", &self.address);
            // Its timeout callback still knows the table.
            self.leak();
            missed
        })
    }

    /// Leaves everything as it is: the controller may still use it.
    pub fn leak(self) {
        std::mem::forget(self);
    }
}
