//! The daemon's end of the agent that is preloaded into QEMU (crate `plover-agent`, where the protocol is described).

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use plover_agent::clock_page::{CLOCK_PAGE_BYTES, ClockPage};
use plover_agent::protocol::{
    MAX_REASON_BYTES, PROTOCOL_VERSION, RESPONSE_BYTES, Request, Response, Status, VcpuChange, WrittenRange,
};
use rustix::event::PollFlags;
use rustix::fs::{SealFlags, fcntl_get_seals};
use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};

pub use plover_agent::clock_page::{ClockSample, DEFAULT_PERIOD_US, MAX_PERIOD_US};

/// Deadline of one request. The agent answers from a thread of its own, so QEMU's load hardly matters.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// What went wrong with the agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket could not be reached.
    #[error("cannot connect to the agent in QEMU at {}: {source}; start QEMU with LD_PRELOAD=libplover_agent.so and PLOVER_AGENT_SOCKET (`plover qemu-args` prints both)", path.display())]
    Connect {
        /// The agent's socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The connection broke; QEMU has ended, or another daemon connected.
    #[error("lost the connection to the agent at {}: {source}; QEMU has ended or another daemon serves it", path.display())]
    Lost {
        /// The agent's socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No answer in time.
    #[error("the agent at {} did not answer {request:?} within {timeout_ms} ms; QEMU is stuck or frozen", path.display())]
    Timeout {
        /// The agent's socket.
        path: PathBuf,
        /// What was asked.
        request: Request,
        /// How long it was waited for.
        timeout_ms: u128,
    },
    /// The agent's library belongs to another version of Plover.
    #[error("the agent at {} speaks version {agent}, this daemon {PROTOCOL_VERSION}; restart QEMU with the libplover_agent.so of this release", path.display())]
    Version {
        /// The agent's socket.
        path: PathBuf,
        /// The agent's version.
        agent: u32,
    },
    /// The answer cannot be read.
    #[error("the agent at {} sent what cannot be read; is this socket the agent's?", path.display())]
    Garbled {
        /// The agent's socket.
        path: PathBuf,
    },
    /// A system call inside QEMU failed.
    #[error("inside QEMU {request:?} failed: {source}{}", remedy(*request, source))]
    Failed {
        /// What was asked.
        request: Request,
        /// The error there.
        source: io::Error,
    },
    /// QEMU does not export its yank functions.
    #[error(
        "this QEMU does not export yank_register_instance (built without modules); use the distribution's build, or build with --enable-modules"
    )]
    NoYank,
    /// QEMU does not export what a request needs.
    #[error("this QEMU does not export what {request:?} needs, or is not as expected")]
    Unsupported {
        /// What was asked.
        request: Request,
    },
    /// QEMU refused.
    #[error("QEMU refused {request:?}: {reason}")]
    Refused {
        /// What was asked.
        request: Request,
        /// QEMU's text.
        reason: String,
    },
    /// The clock page could not be mapped.
    #[error("cannot map the agent's clock page: {source}")]
    ClockPage {
        /// Why not.
        source: io::Error,
    },
}

impl AgentError {
    /// The deadline passed; what was asked may still be done later.
    pub fn is_timeout(&self) -> bool {
        matches!(self, AgentError::Timeout { .. })
    }

    /// This QEMU cannot do that through the agent.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, AgentError::Unsupported { .. })
    }

    /// The connection is unusable; connect anew.
    pub fn is_disconnected(&self) -> bool {
        use AgentError::{Connect, Garbled, Lost};
        matches!(self, Connect { .. } | Lost { .. } | Garbled { .. })
    }
}

fn remedy(request: Request, source: &io::Error) -> &'static str {
    match (request, source.raw_os_error()) {
        (Request::Userfaultfd, Some(libc::EPERM)) => {
            "; run QEMU as root or with CAP_SYS_PTRACE, or allow its user to open /dev/userfaultfd"
        }
        (Request::Userfaultfd, Some(libc::ENOSYS)) => "; the kernel needs CONFIG_USERFAULTFD",
        _ => "",
    }
}

/// What the agent says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// QEMU's process id as QEMU sees it.
    pub pid: u32,
    /// Whether QEMU exports what [`AgentClient::register_yank`] needs.
    pub has_yank: bool,
}

/// A connection to the agent. The agent serves one: connecting takes the agent away from whoever had it before.
pub struct AgentClient {
    socket: OwnedFd,
    path: PathBuf,
    /// Of the last request.
    tag: u32,
}

impl AgentClient {
    /// Connects and checks the version. While the socket does not exist yet it is tried again until the deadline; a
    /// deadline in the past means one try.
    ///
    /// # Errors
    /// [`AgentError::Connect`], [`AgentError::Version`] and what a request can meet.
    pub fn connect(path: &Path, deadline: Instant) -> Result<AgentClient, AgentError> {
        let connect = || -> io::Result<OwnedFd> {
            let address = SocketAddrUnix::new(path)?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
            rustix::net::connect(&socket, &address)?;
            Ok(socket)
        };
        let socket = super::connect_until(deadline, connect)
            .map_err(|source| AgentError::Connect { path: path.to_owned(), source })?;
        let mut client = AgentClient { socket, path: path.to_owned(), tag: 0 };
        client.hello()?;
        Ok(client)
    }

    /// Who the agent is.
    ///
    /// # Errors
    /// [`AgentError::Version`] and what any request can meet.
    pub fn hello(&mut self) -> Result<Hello, AgentError> {
        let (response, _) = self.ask(Request::Hello)?;
        Ok(Hello { pid: response.pid, has_yank: response.has_yank })
    }

    /// Process id of QEMU as this process sees it (SO_PEERCRED).
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn peer_pid(&self) -> Result<i32, AgentError> {
        rustix::net::sockopt::socket_peercred(&self.socket)
            .map(|credentials| credentials.pid.as_raw_nonzero().get())
            .map_err(|errno| self.lost(errno.into()))
    }

    /// A fresh userfaultfd (close-on-exec, non-blocking, UFFDIO_API not yet done) that acts on QEMU's address space.
    ///
    /// # Errors
    /// [`AgentError::Failed`] if QEMU may not create one.
    pub fn take_userfaultfd(&mut self) -> Result<OwnedFd, AgentError> {
        self.ask_for_descriptor(Request::Userfaultfd)
    }

    /// Registers QEMU's migration yank instance; needed before **each** `xen-load-devices-state`, which unregisters it and
    /// would abort QEMU otherwise. Harmless when it is registered already.
    ///
    /// # Errors
    /// [`AgentError::NoYank`] if QEMU does not export the function.
    pub fn register_yank(&mut self) -> Result<(), AgentError> {
        self.ask(Request::Yank).map(drop)
    }

    /// Tells QEMU that these parts of the stopped guest's RAM were written, so that it forgets what it derived from their old
    /// content, as TCG's translations of code. Returns false if these are too many to be told.
    ///
    /// # Errors
    /// [`AgentError::Unsupported`] if QEMU does not export what that needs.
    pub fn tell_written(&mut self, ranges: &[WrittenRange]) -> Result<bool, AgentError> {
        let Some(message) = Request::encode_written(ranges) else { return Ok(false) };
        self.ask_with(Request::Written, &message).map(|_| true)
    }

    /// Gives vCPUs of the stopped guest another common state.
    ///
    /// # Errors
    /// [`AgentError::Unsupported`] if that cannot be done in this QEMU, or if one is not as expected; nothing is changed then.
    pub fn change_vcpus(&mut self, changes: &[VcpuChange]) -> Result<(), AgentError> {
        let request = Request::Vcpus;
        let message = Request::encode_vcpus(changes).ok_or(AgentError::Unsupported { request })?;
        self.ask_with(request, &message).map(drop)
    }

    /// Stops the guest's CPUs and flushes its devices, as the monitor's `stop`; back when done.
    ///
    /// # Errors
    /// [`AgentError::Unsupported`] if this QEMU does not export what that needs: use the monitor. [`AgentError::Refused`],
    /// [`AgentError::Timeout`], or a lost connection.
    pub fn stop(&mut self, timeout: Duration) -> Result<(), AgentError> {
        self.ask_within(Request::Stop, &Request::Stop.encode(), timeout).map(drop)
    }

    /// Lets the guest's CPUs run, as `cont`.
    ///
    /// # Errors
    /// As [`Self::stop`].
    pub fn cont(&mut self, timeout: Duration) -> Result<(), AgentError> {
        self.ask_within(Request::Cont, &Request::Cont.encode(), timeout).map(drop)
    }

    /// Writes the state of the stopped guest's devices and CPUs to a file, as
    /// [`save_devices_state`](crate::qemu::qmp::Qmp::save_devices_state).
    ///
    /// # Errors
    /// As [`Self::stop`].
    pub fn save_devices_state(&mut self, path: &Path, timeout: Duration) -> Result<(), AgentError> {
        self.with_file(Request::Save, path, timeout)
    }

    /// Loads it, as [`Self::register_yank`] and [`load_devices_state`](crate::qemu::qmp::Qmp::load_devices_state).
    ///
    /// # Errors
    /// As [`Self::stop`]. After [`AgentError::Refused`] the devices are in an undefined state.
    pub fn load_devices_state(&mut self, path: &Path, timeout: Duration) -> Result<(), AgentError> {
        self.with_file(Request::Load, path, timeout)
    }

    fn with_file(&mut self, request: Request, path: &Path, timeout: Duration) -> Result<(), AgentError> {
        let message = request.encode_path(path).ok_or(AgentError::Unsupported { request })?;
        self.ask_within(request, &message, timeout).map(drop)
    }

    /// The vCPU threads' CPU clocks. They sleep until [`VcpuClocks::set_period_us`]; the agent keeps one set, so a second
    /// call ends the first set's samples, and so does the end of this connection.
    ///
    /// # Errors
    /// [`AgentError::Failed`] or [`AgentError::ClockPage`].
    pub fn clocks(&mut self) -> Result<VcpuClocks, AgentError> {
        let fd = self.ask_for_descriptor(Request::Clocks)?;
        VcpuClocks::map(&fd).map_err(|source| AgentError::ClockPage { source })
    }

    fn lost(&self, source: io::Error) -> AgentError {
        AgentError::Lost { path: self.path.clone(), source }
    }

    fn ask_for_descriptor(&mut self, request: Request) -> Result<OwnedFd, AgentError> {
        match self.ask(request)? {
            (_, Some(fd)) => Ok(fd),
            (_, None) => Err(AgentError::Garbled { path: self.path.clone() }),
        }
    }

    fn ask(&mut self, request: Request) -> Result<(Response, Option<OwnedFd>), AgentError> {
        self.ask_with(request, &request.encode())
    }

    fn ask_with(&mut self, request: Request, message: &[u8]) -> Result<(Response, Option<OwnedFd>), AgentError> {
        self.ask_within(request, message, REQUEST_TIMEOUT)
    }

    fn ask_within(
        &mut self,
        request: Request,
        message: &[u8],
        timeout: Duration,
    ) -> Result<(Response, Option<OwnedFd>), AgentError> {
        self.tag = self.tag.wrapping_add(1);
        let mut message = message.to_vec();
        Request::set_tag(&mut message, self.tag);
        rustix::net::send(&self.socket, &message, SendFlags::NOSIGNAL).map_err(|errno| self.lost(errno.into()))?;
        let deadline = Instant::now() + timeout;
        let (response, descriptor, reason) = loop {
            match super::wait_for(self.socket.as_fd(), PollFlags::IN, deadline) {
                Ok(true) => {}
                Ok(false) => {
                    let timeout_ms = timeout.as_millis();
                    return Err(AgentError::Timeout { path: self.path.clone(), request, timeout_ms });
                }
                Err(error) => return Err(self.lost(error)),
            }
            let received = self.receive()?;
            // Other tags: late answers of requests that ran into their deadlines.
            if received.0.tag == self.tag || received.0.version != PROTOCOL_VERSION {
                break received;
            }
        };
        if response.version != PROTOCOL_VERSION {
            return Err(AgentError::Version { path: self.path.clone(), agent: response.version });
        }
        if response.request != request {
            return Err(AgentError::Garbled { path: self.path.clone() });
        }
        match response.status {
            Status::Done | Status::Already => Ok((response, descriptor)),
            Status::Unsupported if request == Request::Yank => Err(AgentError::NoYank),
            Status::Unsupported => Err(AgentError::Unsupported { request }),
            Status::Refused => Err(AgentError::Refused { request, reason }),
            Status::Failed => {
                let source = io::Error::from_raw_os_error(i32::try_from(response.errno).unwrap_or(libc::EIO));
                Err(AgentError::Failed { request, source })
            }
        }
    }

    fn receive(&self) -> Result<(Response, Option<OwnedFd>, String), AgentError> {
        let mut bytes = [0; RESPONSE_BYTES + MAX_REASON_BYTES + 1];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags)
            .map_err(|errno| self.lost(errno.into()))?;
        let descriptor = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .next();
        if received.bytes == 0 {
            return Err(self.lost(io::ErrorKind::UnexpectedEof.into()));
        }
        let message = &bytes[..received.bytes.min(bytes.len())];
        match Response::decode(message) {
            Some(response) => Ok((response, descriptor, Response::reason(message))),
            None => Err(AgentError::Garbled { path: self.path.clone() }),
        }
    }
}

/// The CPU time of the guest's vCPUs, published by the agent in a shared page: reading it needs no system call.
///
/// If QEMU or the connection ends, samples just stop coming ([`ClockSample::at_ns`] stays behind).
pub struct VcpuClocks {
    page: NonNull<ClockPage>,
}

// SAFETY: the mapping belongs to this value and ClockPage has atomic fields only.
unsafe impl Send for VcpuClocks {}
// SAFETY: as above.
unsafe impl Sync for VcpuClocks {}

impl VcpuClocks {
    fn map(fd: &OwnedFd) -> io::Result<VcpuClocks> {
        let invalid = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        // Sealed, so that nothing QEMU does later can turn a read here into SIGBUS.
        if !fcntl_get_seals(fd)?.contains(SealFlags::SHRINK) {
            return Err(invalid("its size is not sealed"));
        }
        if rustix::fs::fstat(fd)?.st_size != CLOCK_PAGE_BYTES as i64 {
            return Err(invalid("it has another size"));
        }
        // SAFETY: a new shared mapping of the whole object, whose size is fixed, at an address of the kernel's choice.
        let address = unsafe {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(std::ptr::null_mut(), CLOCK_PAGE_BYTES, protection, MapFlags::SHARED, fd, 0)?
        };
        let page = NonNull::new(address.cast::<ClockPage>()).ok_or_else(|| invalid("it was mapped at 0"))?;
        let clocks = VcpuClocks { page };
        if !clocks.page().is_valid() {
            return Err(invalid("it is not a clock page of this version"));
        }
        Ok(clocks)
    }

    fn page(&self) -> &ClockPage {
        // SAFETY: mapped as long as `self` lives, page aligned, large enough (asserted beside the type); all fields are
        // atomics, so that the agent's writes are no data race.
        unsafe { self.page.as_ref() }
    }

    /// The newest sample; `None` before the first, or if the sampler was interrupted while writing (ask again later). A
    /// sample with 0 vCPUs means that QEMU runs without `-name …,debug-threads=on`.
    pub fn read(&self) -> Option<ClockSample> {
        self.page().read()
    }

    /// Sets how often the agent samples; 0 puts it to sleep. [`DEFAULT_PERIOD_US`] costs QEMU's host some 5 % of a
    /// core. Costs a system call only if the period changes.
    pub fn set_period_us(&self, period_us: u32) {
        self.page().set_period_us(period_us);
    }
}

impl Drop for VcpuClocks {
    fn drop(&mut self) {
        self.set_period_us(0);
        // SAFETY: maps exactly this range, and no reference into it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), CLOCK_PAGE_BYTES) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests;
