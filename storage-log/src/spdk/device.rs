//! The device that the log writes to.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use spdk_sys::NamespaceInfo;

use super::controller::{Controller, Limit};
use super::environment::Environment;
use super::error::{Result, SpdkError};
use super::memory::{Allocation, DmaBuffer};
use super::queue::{Command, Ended, Kind, Queue, on_done};

/// The log's unit: offsets and lengths are multiples of it.
const BLOCK_BYTES: u64 = 4096;
const NO_NAMESPACE: NamespaceInfo = NamespaceInfo {
    ns: std::ptr::null_mut(),
    sector_bytes: 0,
    sector_count: 0,
    metadata_bytes: 0,
    max_transfer_bytes: 0,
    has_write_cache: 0,
};
/// Memory through which reads and writes outside of the staging buffer go, a piece at a time.
const BOUNCE_BYTES: usize = 256 << 10;
/// NVMe's largest queue has 65536 places, one of which stays empty; more than this never helps a log.
const MAX_DEPTH: u32 = 4096;

/// Which device, and how it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceOptions {
    /// The controller's PCI address, such as `0000:01:00.0`.
    pub address: String,
    /// Which of its namespaces; they count from 1.
    pub namespace: u32,
    /// Commands in flight at most.
    pub queue_depth: u32,
    /// A command that takes longer makes the device fail.
    pub command_timeout: Duration,
    /// For attaching, resetting and detaching.
    pub control_timeout: Duration,
}

impl DeviceOptions {
    /// The first namespace of a controller, 128 commands, 10 s for a command, 30 s for the rest.
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            namespace: 1,
            queue_depth: 128,
            command_timeout: Duration::from_secs(10),
            control_timeout: Duration::from_secs(30),
        }
    }

    fn check(&self) -> Result<()> {
        let refuse = |name, value: String, problem| Err(SpdkError::BadOption { name, value, problem });
        if !(2..=MAX_DEPTH).contains(&self.queue_depth) {
            return refuse("queue_depth", self.queue_depth.to_string(), "it must be 2 to 4096");
        }
        if self.command_timeout.is_zero() || self.control_timeout.is_zero() {
            return refuse("timeout", "0".to_owned(), "it must not be 0");
        }
        Ok(())
    }
}

/// What a namespace is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of a sector: what the device writes in one piece at least.
    pub sector_bytes: u64,
    /// Sectors.
    pub sector_count: u64,
    /// Longer transfers are split by the driver.
    pub max_transfer_bytes: u64,
    /// Whether a completed write is lost with the power until a flush completes.
    pub has_write_cache: bool,
}

/// Names a command from its submission to its end. Counts up; never used twice by a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// A namespace of an NVMe controller, driven by this process. Belongs to one thread at a time.
#[derive(Debug)]
pub struct Device {
    /// Taken only when the device is dropped.
    parts: Option<Parts>,
    namespace: u32,
    raw_namespace: NamespaceInfo,
    command_timeout: Duration,
    control_timeout: Duration,
    submitted: u64,
    /// Nothing is submitted while this is set.
    failure: Option<SpdkError>,
}

/// What must be freed in order, or not at all.
#[derive(Debug)]
struct Parts {
    controller: Controller,
    staging: Arc<Allocation>,
    bounce: DmaBuffer,
}

// SAFETY: the namespace handle belongs to the controller, which may move between threads.
unsafe impl Send for Device {}

impl Device {
    /// Attaches the controller and takes the namespace. The controller is reset by this, so what an earlier process had in
    /// flight when it was killed has ended: written or not. What [`submit_write`](Self::submit_write) writes lies in `staging`.
    ///
    /// # Errors
    /// When the controller cannot be had, the namespace has an unfit format, or there is too little memory.
    pub fn open(environment: Environment, options: &DeviceOptions, staging: &DmaBuffer) -> Result<Self> {
        options.check()?;
        let address: Arc<str> = options.address.as_str().into();
        let bounce = DmaBuffer::new(environment, BOUNCE_BYTES, "reading and formatting")?;
        let limit = Limit::of(options.control_timeout);
        let queue = Queue::new(options.queue_depth);
        let controller = Controller::attach(environment, &address, queue, limit)?;
        // From here on the drop gives back what was taken.
        let mut device = Self {
            parts: Some(Parts { controller, staging: staging.share(), bounce }),
            namespace: options.namespace,
            raw_namespace: NO_NAMESPACE,
            command_timeout: options.command_timeout,
            control_timeout: options.control_timeout,
            submitted: 0,
            failure: None,
        };
        device.raw_namespace = device.parts().controller.namespace(options.namespace)?;
        device.check_format()?;
        let Parts { controller, staging, .. } = device.parts.as_mut().expect("just set");
        controller.watch(options.command_timeout, options.control_timeout);
        // Each command is split at most into this many pieces, and all of them together write no more than the buffer
        // holds, unless ranges are written twice; then the driver says that it is busy.
        let pieces = staging.bytes() as u64 / device.raw_namespace.max_transfer_bytes.max(BLOCK_BYTES);
        let requests = u64::from(options.queue_depth) * 4 + pieces * 2;
        let requests = u32::try_from(requests).unwrap_or(u32::MAX);
        controller.create_queue_pair(options.queue_depth + 1, requests)?;
        tracing::info!(%address, namespace = options.namespace, geometry = ?device.geometry(), "opened the NVMe device");
        Ok(device)
    }

    fn check_format(&self) -> Result<()> {
        let Geometry { sector_bytes, .. } = self.geometry();
        let metadata_bytes = self.raw_namespace.metadata_bytes;
        if (512..=BLOCK_BYTES).contains(&sector_bytes)
            && BLOCK_BYTES.is_multiple_of(sector_bytes)
            && metadata_bytes == 0
        {
            return Ok(());
        }
        let address = Arc::clone(self.address());
        Err(SpdkError::Format { address, namespace: self.namespace, sector_bytes, metadata_bytes })
    }

    /// What the namespace is like.
    pub fn geometry(&self) -> Geometry {
        let info = &self.raw_namespace;
        Geometry {
            sector_bytes: info.sector_bytes,
            sector_count: info.sector_count,
            max_transfer_bytes: info.max_transfer_bytes,
            has_write_cache: info.has_write_cache != 0,
        }
    }

    /// Bytes that can be used: whole blocks of 4096.
    pub fn capacity_bytes(&self) -> u64 {
        let bytes = self.raw_namespace.sector_bytes * self.raw_namespace.sector_count;
        bytes - bytes % BLOCK_BYTES
    }

    /// Starts to write a range of the staging buffer to the device. Until it has ended the bytes must stay as they are, or the
    /// device stores a mixture. Durable only when a flush completes that was submitted after the completion of the write.
    ///
    /// # Errors
    /// [`SpdkError::Busy`]: poll and try again. Others: the device takes nothing any more.
    ///
    /// # Panics
    /// If the range is empty, leaves the buffer or the device, or is not of whole blocks.
    pub fn submit_write(&mut self, offset_bytes: u64, range: Range<usize>) -> Result<Tag> {
        self.submit_transfer(Kind::Write, offset_bytes, |parts| parts.staging.address(&range), range.len())
    }

    /// Starts a flush: when it completes, every write that had completed before its submission is durable.
    ///
    /// # Errors
    /// As [`submit_write`](Self::submit_write).
    pub fn submit_flush(&mut self) -> Result<Tag> {
        let ns = self.raw_namespace.ns;
        self.submit(Kind::Flush, 0, |controller, io| {
            // SAFETY: the namespace is valid since the last reset; `io` is the context that `on_done` expects.
            unsafe { spdk_sys::plover_spdk_flush(ns, controller.queue_pair(), on_done, io) }
        })
    }

    /// Lets the driver look at its queue. Returns whether [`poll`](Self::poll) has something to tell. Never waits.
    pub fn process(&mut self) -> bool {
        let Parts { controller, .. } = self.parts.as_ref().expect("set until the drop");
        let alive = controller.poll();
        let address = || Arc::clone(controller.address());
        if controller.queue().has_timed_out() {
            self.failure.get_or_insert_with(|| SpdkError::Timeout {
                action: "a command",
                address: address(),
                limit: self.command_timeout,
            });
        } else if !alive {
            self.failure.get_or_insert_with(|| SpdkError::Gone { address: address() });
        }
        self.failure.is_some() || controller.queue().has_ended()
    }

    /// Calls `done` for every submitted command that has ended, in that order, and returns how many. Never waits. When the
    /// device fails, `done` gets the error for everything in flight.
    pub fn poll(&mut self, done: &mut dyn FnMut(Tag, Result<()>)) -> usize {
        self.process();
        let Parts { controller, .. } = self.parts.as_ref().expect("set until the drop");
        let mut count = controller.queue().drain(|ended| done(Tag(ended.command.tag), outcome(controller, ended)));
        if let Some(failure) = &self.failure {
            let tell = |command: Command| done(Tag(command.tag), Err(failure.clone()));
            count += controller.queue().give_up(|_| true, tell);
        }
        count
    }

    /// Looks after the controller itself: call it a few times a second. A controller that was pulled out or has failed is noticed
    /// here even when nothing is in flight.
    ///
    /// # Errors
    /// The error that the device has failed with.
    pub fn maintain(&mut self) -> Result<()> {
        let Parts { controller, .. } = self.parts.as_ref().expect("set until the drop");
        if !controller.poll_admin() {
            self.failure.get_or_insert_with(|| SpdkError::Gone { address: Arc::clone(controller.address()) });
        }
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// Whether the device has nothing more to do, not even what was already told as failed.
    pub fn is_idle(&self) -> bool {
        self.parts().controller.queue().is_idle()
    }

    /// The error that ended the use of this device, if one did; only a reset ends it.
    pub fn failure(&self) -> Option<&SpdkError> {
        self.failure.as_ref()
    }

    /// Reads, waiting: for opening and checking. Any offset and length inside the device. Submitted commands may be in flight.
    ///
    /// # Errors
    /// The device's, or [`SpdkError::Timeout`].
    ///
    /// # Panics
    /// If it leaves the device.
    pub fn read_at(&mut self, offset_bytes: u64, into: &mut [u8]) -> Result<()> {
        let sector_bytes = self.raw_namespace.sector_bytes;
        let mut done = 0;
        while done < into.len() {
            let at = offset_bytes + done as u64;
            let skipped = (at % sector_bytes) as usize;
            let wanted = (into.len() - done).min(BOUNCE_BYTES - skipped);
            let length = (skipped + wanted).next_multiple_of(sector_bytes as usize);
            let tag = self.submit_transfer(
                Kind::Read,
                at - skipped as u64,
                |parts| parts.bounce.share().address(&(0..length)),
                length,
            )?;
            self.wait(tag, "a read")?;
            into[done..done + wanted].copy_from_slice(&self.parts().bounce[skipped..skipped + wanted]);
            done += wanted;
        }
        Ok(())
    }

    /// Writes, waiting: for formatting and repairing. Not durable before [`flush`](Self::flush).
    ///
    /// # Errors
    /// The device's, or [`SpdkError::Timeout`].
    ///
    /// # Panics
    /// If offset and length are not whole blocks inside the device.
    pub fn write_at(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        let mut at = offset_bytes;
        for piece in bytes.chunks(BOUNCE_BYTES) {
            self.parts_mut().bounce[..piece.len()].copy_from_slice(piece);
            let tag = self.submit_transfer(
                Kind::Write,
                at,
                |parts| parts.bounce.share().address(&(0..piece.len())),
                piece.len(),
            )?;
            self.wait(tag, "a write")?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Flushes, waiting.
    ///
    /// # Errors
    /// The device's, or [`SpdkError::Timeout`].
    pub fn flush(&mut self) -> Result<()> {
        let tag = self.submit_flush()?;
        self.wait(tag, "a flush")
    }

    /// Stops the controller, starts it again and clears the failure. What was in flight has ended afterwards, and nobody
    /// knows how; `done` is told so.
    ///
    /// # Errors
    /// When the controller does not come back; the device stays failed.
    pub fn reset(&mut self, done: &mut dyn FnMut(Tag, Result<()>)) -> Result<()> {
        let Parts { controller, .. } = self.parts.as_ref().expect("set until the drop");
        let lost = || SpdkError::Gone { address: Arc::clone(controller.address()) };
        controller.queue().drain(|ended| done(Tag(ended.command.tag), outcome(controller, ended)));
        controller.queue().give_up(|_| true, |command| done(Tag(command.tag), Err(lost())));
        let limit = Limit::of(self.control_timeout);
        let outcome = controller.reset(limit).and_then(|()| controller.namespace(self.namespace));
        // Of before.
        controller.queue().has_timed_out();
        match outcome {
            Ok(info) if info.sector_bytes == self.raw_namespace.sector_bytes => {
                tracing::warn!(address = %controller.address(), "reset the NVMe controller");
                self.raw_namespace = info;
                self.failure = None;
                self.check_format()
            }
            // Another format under a running log: not this device any more.
            Ok(_) => Err(self.failure.insert(lost()).clone()),
            Err(error) => Err(self.failure.insert(error).clone()),
        }
    }

    fn submit_transfer(
        &mut self,
        kind: Kind,
        offset_bytes: u64,
        memory: impl FnOnce(&Parts) -> *mut c_void,
        length: usize,
    ) -> Result<Tag> {
        let info = self.raw_namespace;
        let unit = if kind == Kind::Write { BLOCK_BYTES } else { info.sector_bytes };
        let length = length as u64;
        assert!(
            length > 0 && length.is_multiple_of(unit) && offset_bytes.is_multiple_of(unit),
            "{} of {length} bytes at {offset_bytes}, in units of {unit}",
            kind.action()
        );
        let end = offset_bytes.checked_add(length);
        let capacity = self.capacity_bytes();
        assert!(end.is_some_and(|end| end <= capacity), "{} up to {end:?} of {capacity}", kind.action());
        let memory = memory(self.parts());
        let sector = offset_bytes / info.sector_bytes;
        let sectors = u32::try_from(length / info.sector_bytes).expect("no buffer has that many sectors");
        self.submit(kind, offset_bytes, |controller, io| {
            let qpair = controller.queue_pair();
            // SAFETY: the namespace is valid since the last reset, the memory is ours and stays allocated until the
            // controller is known to have stopped; `io` is the context that `on_done` expects.
            unsafe {
                match kind {
                    Kind::Write => spdk_sys::plover_spdk_write(info.ns, qpair, memory, sector, sectors, on_done, io),
                    _ => spdk_sys::plover_spdk_read(info.ns, qpair, memory, sector, sectors, on_done, io),
                }
            }
        })
    }

    fn submit(
        &mut self,
        kind: Kind,
        offset_bytes: u64,
        call: impl FnOnce(&Controller, *mut c_void) -> i32,
    ) -> Result<Tag> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let Parts { controller, .. } = self.parts.as_ref().expect("set until the drop");
        let address = || Arc::clone(controller.address());
        let tag = self.submitted + 1;
        let slot = controller.queue().take(Command { tag, kind, offset_bytes });
        let slot = slot.ok_or_else(|| SpdkError::Busy { address: address() })?;
        let rc = call(controller, slot.context());
        if rc == 0 {
            self.submitted = tag;
            return Ok(Tag(tag));
        }
        controller.queue().take_back(slot);
        const ENOMEM: i32 = rustix::io::Errno::NOMEM.raw_os_error();
        if -rc == ENOMEM {
            return Err(SpdkError::Busy { address: address() });
        }
        let error = SpdkError::Submit { action: kind.action(), address: address(), errno: -rc };
        self.failure = Some(error.clone());
        Err(error)
    }

    /// Waits for one command. Others that end meanwhile are told by the next poll.
    fn wait(&mut self, tag: Tag, action: &'static str) -> Result<()> {
        // The driver's own limit comes first and says it by an error; this one holds if the driver fails to.
        let limit = Limit::of(self.command_timeout * 2);
        loop {
            let last = limit.passed();
            self.process();
            let Parts { controller, .. } = self.parts.as_ref().expect("set until the drop");
            if let Some(ended) = controller.queue().take_ended(tag.0) {
                return outcome(controller, ended);
            }
            if last {
                self.failure.get_or_insert_with(|| limit.missed(action, controller.address()));
            }
            if let Some(failure) = &self.failure {
                controller.queue().give_up(|command| command.tag == tag.0, |_| ());
                return Err(failure.clone());
            }
            std::hint::spin_loop();
        }
    }

    fn parts(&self) -> &Parts {
        self.parts.as_ref().expect("set until the drop")
    }

    fn parts_mut(&mut self) -> &mut Parts {
        self.parts.as_mut().expect("set until the drop")
    }

    fn address(&self) -> &Arc<str> {
        self.parts().controller.address()
    }
}

fn outcome(controller: &Controller, Ended { command, status }: Ended) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    let [status_type, status_code] = status.to_be_bytes();
    Err(SpdkError::Device {
        action: command.kind.action(),
        address: Arc::clone(controller.address()),
        offset_bytes: command.offset_bytes,
        status_type,
        status_code,
    })
}

impl Drop for Device {
    /// Waits for what is in flight, then gives the controller back. If that does not work, the memory stays with it.
    fn drop(&mut self) {
        let limit = Limit::of(self.command_timeout);
        while self.failure.is_none() && !self.parts().controller.queue().is_idle() && !limit.passed() {
            self.poll(&mut |_, _| ());
        }
        let Parts { controller, staging, bounce } = self.parts.take().expect("dropped once");
        let address = Arc::clone(controller.address());
        let limit = Limit::of(self.control_timeout);
        let stopped =
            if controller.queue().is_idle() && self.failure.is_none() { Ok(()) } else { controller.reset(limit) };
        let idle = controller.queue().is_idle();
        let outcome = match stopped {
            Ok(()) if idle => controller.detach(limit),
            Ok(()) => {
                controller.leak();
                Err(SpdkError::Gone { address: Arc::clone(&address) })
            }
            Err(error) => {
                controller.leak();
                Err(error)
            }
        };
        if let Err(error) = outcome {
            std::mem::forget((staging, bounce.share()));
            tracing::error!(%address, %error, "an NVMe controller was not given back; its memory stays taken until the process ends");
        }
    }
}
