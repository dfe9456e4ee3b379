//! The vhost-user session: a thread per device that owns the connection to QEMU.
//!
//! Either side may be the socket's server. As its client the session tries for ever, every 100 ms; as its server it serves one
//! QEMU after the other; an inherited descriptor may be either kind of socket. A connection that QEMU closes, or on which it
//! sends something wrong, stops the rings and is followed by the next one: nothing that QEMU does ends the thread.

use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;
use tracing::{info, warn};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use super::handler::Handler;
use super::link::{ANSWER_DEADLINE, Command, LinkError, SessionEnd, pair, signal};
use super::memory::BackendDirty;
use super::net::NetDevice;

/// How often to try to reach QEMU's socket.
const RETRY: Duration = Duration::from_millis(100);
/// How long to leave a QEMU alone that has sent something wrong: it would most likely send the same again.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);

/// Where QEMU is to be met.
#[derive(Debug)]
pub enum Endpoint {
    /// Connect to a socket on which QEMU listens (`-chardev socket,path=…,server=on`), now and again whenever it is lost.
    Connect(PathBuf),
    /// Listen on this path (`-chardev socket,path=…,reconnect=1`).
    Listen(PathBuf),
    /// Use this descriptor (`--fd`): a connected or a listening Unix stream socket.
    Inherited(OwnedFd),
}

/// Why a device could not be made.
#[derive(Debug, Error)]
pub enum SessionError {
    /// Somebody listens on the path.
    #[error("socket path {} is in use by process {pid}; stop it or give this VM another path", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
        /// Who listens on it.
        pid: i32,
    },
    /// There is something at the path that we did not make and will not remove.
    #[error("{} exists and is not a socket; remove it or give this VM another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The path cannot be used.
    #[error("cannot listen on socket path {}: {source}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The inherited descriptor is not usable.
    #[error("the inherited descriptor is not a Unix stream socket: {0}")]
    Inherited(std::io::Error),
    /// No descriptors or threads left.
    #[error("cannot start the session of a device: {0}")]
    System(#[from] std::io::Error),
}

/// Makes a device named `name` (for logs) and starts its session, whose thread calls `at_start` first. The path of a
/// listening endpoint is claimed before this returns.
pub fn open(
    name: &str,
    endpoint: Endpoint,
    at_start: impl FnOnce() + Send + 'static,
) -> Result<(NetDevice, Session), SessionError> {
    let source = Source::prepare(endpoint)?;
    let stop = Arc::new(AtomicBool::new(false));
    let (session_end, reactor_end) = pair(Arc::clone(&stop), ANSWER_DEADLINE)?;
    let dirty = BackendDirty::default();
    let shared = Arc::new(Shared {
        stop,
        wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| SessionError::System(error.into()))?,
        connection: Mutex::new(None),
    });
    let runner = Runner { name: name.to_owned(), source, shared: Arc::clone(&shared), dirty: dirty.clone() };
    let thread = std::thread::Builder::new().name(format!("vhost {name}")).spawn(move || {
        at_start();
        runner.run(session_end);
    })?;
    Ok((NetDevice::new(reactor_end, dirty), Session { shared, thread: Some(thread) }))
}

/// What the session's thread and its handle share.
struct Shared {
    stop: Arc<AtomicBool>,
    wake: OwnedFd,
    /// A second descriptor of the present connection, to cut it from outside.
    connection: Mutex<Option<UnixStream>>,
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn connection(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `fd` is readable (if there is one), the time is over, or the session shall end.
    fn wait(&self, fd: Option<&dyn AsFdDyn>, timeout: Option<Duration>) {
        let timeout = timeout.map(|timeout| Timespec::try_from(timeout).expect("our waits are short"));
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        if let Some(fd) = fd {
            fds.push(PollFd::from_borrowed_fd(fd.borrow(), PollFlags::IN));
        }
        // An interrupted or failed poll only makes the caller look again.
        let _ = poll(&mut fds, timeout.as_ref());
    }
}

/// `AsFd` behind a reference of any kind.
trait AsFdDyn {
    fn borrow(&self) -> rustix::fd::BorrowedFd<'_>;
}

impl<T: AsFd> AsFdDyn for T {
    fn borrow(&self) -> rustix::fd::BorrowedFd<'_> {
        self.as_fd()
    }
}

/// The handle of a session. Dropping it ends the session and closes its socket.
pub struct Session {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        signal(&self.shared.wake);
        if let Some(connection) = self.shared.connection().as_ref() {
            // Unblocks a read of half a message. An error means that it is closed already.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the session thread of a device had panicked");
        }
    }
}

/// A path on which we listen, removed again at the end.
struct Listening {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Only if it is still ours: another daemon may have replaced it.
        if std::fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Where connections come from.
enum Source {
    Connect(PathBuf),
    Listen(Listening),
    InheritedListener(UnixListener),
    Once(Option<UnixStream>),
}

impl Source {
    fn prepare(endpoint: Endpoint) -> Result<Self, SessionError> {
        match endpoint {
            Endpoint::Connect(path) => Ok(Self::Connect(path)),
            Endpoint::Listen(path) => listen(path).map(Self::Listen),
            Endpoint::Inherited(fd) => inherit(fd),
        }
    }

    /// The next connection; None when there will be no more.
    fn next(&mut self, shared: &Shared) -> Option<UnixStream> {
        let mut said = None;
        while !shared.stopping() {
            let (attempt, fd): (_, Option<&dyn AsFdDyn>) = match self {
                Self::Connect(path) => (connect(path).map_err(|error| (error, path.as_path())), None),
                Self::Listen(listening) => {
                    let accepted = listening.listener.accept().map(|(stream, _)| stream);
                    (accepted.map_err(|error| (error, listening.path.as_path())), Some(&listening.listener))
                }
                Self::InheritedListener(listener) => {
                    let accepted = listener.accept().map(|(stream, _)| stream);
                    (accepted.map_err(|error| (error, Path::new("--fd"))), Some(listener))
                }
                Self::Once(stream) => return stream.take(),
            };
            match attempt {
                Ok(stream) => return Some(stream),
                Err((error, path)) => {
                    if said != Some(error.kind()) && error.kind() != std::io::ErrorKind::WouldBlock {
                        info!(path = %path.display(), %error, "waiting for QEMU");
                        said = Some(error.kind());
                    }
                    shared.wait(fd, (fd.is_none() || said.is_some()).then_some(RETRY));
                }
            }
        }
        None
    }
}

/// Connects without ever blocking: a QEMU whose backlog is full counts as not there yet.
fn connect(path: &Path) -> std::io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// Claims a path, after removing what a dead process left there.
fn listen(path: PathBuf) -> Result<Listening, SessionError> {
    let fail = |source| SessionError::Path { path: path.clone(), source };
    match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SessionError::NotASocket { path });
        }
        Ok(_) => match connect(&path) {
            Ok(stream) => {
                let owner = rustix::net::sockopt::socket_peercred(&stream);
                let pid = owner.map_or(0, |owner| owner.pid.as_raw_nonzero().get());
                return Err(SessionError::InUse { path, pid });
            }
            // A full backlog belongs to somebody who lives.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                return Err(SessionError::InUse { path, pid: 0 });
            }
            Err(_) => std::fs::remove_file(&path).map_err(fail)?,
        },
    }
    let listener = UnixListener::bind(&path).map_err(fail)?;
    listener.set_nonblocking(true).map_err(fail)?;
    let inode = std::fs::symlink_metadata(&path).map_err(fail)?.ino();
    Ok(Listening { listener, path, inode })
}

fn inherit(fd: OwnedFd) -> Result<Source, SessionError> {
    let fail = |error: rustix::io::Errno| SessionError::Inherited(error.into());
    let domain = rustix::net::sockopt::socket_domain(&fd).map_err(fail)?;
    let kind = rustix::net::sockopt::socket_type(&fd).map_err(fail)?;
    if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
        return Err(fail(rustix::io::Errno::AFNOSUPPORT));
    }
    if rustix::net::sockopt::socket_acceptconn(&fd).map_err(fail)? {
        let listener = UnixListener::from(fd);
        listener.set_nonblocking(true)?;
        return Ok(Source::InheritedListener(listener));
    }
    Ok(Source::Once(Some(UnixStream::from(fd))))
}

/// The session's thread.
struct Runner {
    name: String,
    source: Source,
    shared: Arc<Shared>,
    dirty: BackendDirty,
}

/// How a connection ended.
enum Ending {
    Closed,
    Refused(String),
    DeviceGone,
}

impl Runner {
    fn run(mut self, mut link: SessionEnd) {
        while let Some(stream) = self.source.next(&self.shared) {
            let ending = match self.publish(&stream) {
                Ok(()) => {
                    info!(vm = self.name, "QEMU connected");
                    let (ending, returned) = self.serve(stream, link);
                    link = returned;
                    ending
                }
                Err(error) => Ending::Refused(error.to_string()),
            };
            *self.shared.connection() = None;
            if !self.finish(&link, ending) {
                return;
            }
        }
    }

    /// Lets the handle cut this connection, and makes its reads blocking: they happen after poll said that there is something.
    fn publish(&self, stream: &UnixStream) -> std::io::Result<()> {
        stream.set_nonblocking(false)?;
        *self.shared.connection() = Some(stream.try_clone()?);
        Ok(())
    }

    /// Serves one connection to its end.
    fn serve(&self, stream: UnixStream, link: SessionEnd) -> (Ending, SessionEnd) {
        let handler = Arc::new(Mutex::new(Handler::new(link, self.dirty.clone())));
        let socket = stream.try_clone();
        let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&handler));
        let ending = match socket {
            Ok(socket) => self.serve_requests(&socket, &mut requests, &handler),
            Err(error) => Ending::Refused(error.to_string()),
        };
        drop(requests);
        let handler = Arc::into_inner(handler).expect("the request handler, the only other owner, is gone");
        (ending, handler.into_inner().unwrap_or_else(PoisonError::into_inner).into_link())
    }

    fn serve_requests(
        &self,
        socket: &UnixStream,
        requests: &mut BackendReqHandler<Mutex<Handler>>,
        handler: &Mutex<Handler>,
    ) -> Ending {
        let lock = || handler.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = lock().link().call(Command::Connected) {
            return ending_of(error);
        }
        loop {
            self.shared.wait(Some(socket), None);
            if self.shared.stopping() {
                return Ending::DeviceGone;
            }
            let early = EarlyEnable::take(socket, &lock());
            let result = match early {
                Some(enable) => enable.handle(socket, &mut lock()),
                None => match requests.handle_request() {
                    Ok(()) => Ok(()),
                    Err(ProtocolError::Disconnected | ProtocolError::SocketBroken(_)) => {
                        return Ending::Closed;
                    }
                    Err(error) => Err(error.to_string()),
                },
            };
            if let Err(text) = result {
                return match lock().take_failure() {
                    Some(super::handler::RequestError::Link(error)) => ending_of(error),
                    Some(failure) => Ending::Refused(failure.to_string()),
                    None => Ending::Refused(text),
                };
            }
        }
    }

    /// Has the reactor stop what the connection left running. Returns whether the session goes on.
    fn finish(&self, link: &SessionEnd, ending: Ending) -> bool {
        let pause = match ending {
            Ending::DeviceGone => return false,
            Ending::Closed => {
                info!(vm = self.name, "QEMU disconnected");
                RETRY
            }
            Ending::Refused(why) => {
                warn!(vm = self.name, why, "QEMU's connection was closed");
                if let Err(LinkError::Gone) = link.call(Command::Refused(why)) {
                    return false;
                }
                REFUSED_PAUSE
            }
        };
        // No new connection before the old one's rings are known to be at rest.
        loop {
            match link.call(Command::Disconnected) {
                Ok(_) => break,
                Err(LinkError::Gone) => return false,
                Err(error @ LinkError::Stuck { .. }) => {
                    warn!(vm = self.name, %error, "rings may still be in use")
                }
            }
        }
        self.shared.wait(None, Some(pause));
        !self.shared.stopping()
    }
}

fn ending_of(error: LinkError) -> Ending {
    match error {
        LinkError::Gone => Ending::DeviceGone,
        LinkError::Stuck { .. } => Ending::Refused(error.to_string()),
    }
}

/// A SET_VRING_ENABLE that comes before SET_FEATURES. QEMU's virtio-net sends it then, for it has seen in GET_FEATURES that
/// the device has protocol features, but the vhost crate refuses it (`inactive feature: 1073741824`).
struct EarlyEnable {
    ring: u32,
    enabled: bool,
    needs_reply: bool,
}

impl EarlyEnable {
    /// Request, flags and size of the header, then ring index and value; or a u64 in the reply.
    const MESSAGE_BYTES: usize = 20;
    const VERSION: u32 = 1;
    const REPLY: u32 = 1 << 2;
    const NEED_REPLY: u32 = 1 << 3;

    /// Takes the message off the socket if it is the next one.
    fn take(socket: &UnixStream, handler: &Handler) -> Option<Self> {
        if handler.protocol_features_accepted() {
            return None;
        }
        let mut message = [0; Self::MESSAGE_BYTES];
        let (_, len) = rustix::net::recv(socket, &mut message, RecvFlags::PEEK | RecvFlags::DONTWAIT).ok()?;
        let field = |number: usize| {
            let at = 4 * number;
            u32::from_ne_bytes([message[at], message[at + 1], message[at + 2], message[at + 3]])
        };
        let expected = [u32::from(FrontendReq::SET_VRING_ENABLE), Self::VERSION, 8];
        let flags = field(1);
        if len < Self::MESSAGE_BYTES || [field(0), flags & !Self::NEED_REPLY, field(2)] != expected || field(4) > 1 {
            return None;
        }
        rustix::net::recv(socket, &mut [0; Self::MESSAGE_BYTES], RecvFlags::DONTWAIT).ok()?;
        Some(Self { ring: field(3), enabled: field(4) == 1, needs_reply: flags & Self::NEED_REPLY != 0 })
    }

    /// Carries it out and acknowledges it.
    fn handle(self, mut socket: &UnixStream, handler: &mut Handler) -> Result<(), String> {
        handler.enable(self.ring, self.enabled).map_err(|error| error.to_string())?;
        if self.needs_reply {
            let words = [u32::from(FrontendReq::SET_VRING_ENABLE), Self::VERSION | Self::REPLY, 8, 0, 0];
            let reply: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
            socket.write_all(&reply).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}
