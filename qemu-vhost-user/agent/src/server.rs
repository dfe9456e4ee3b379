//! Serves one daemon connection at a time; a new connection supersedes the old one, because a daemon that was
//! restarted must not wait until the kernel notices that its predecessor is gone.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use crate::control::Command;
use crate::protocol::{MAX_REQUEST_BYTES, PROTOCOL_VERSION, Request, Response, Status};
use crate::qemu::QemuSymbols;
use crate::sampler::Sampler;
use crate::sys;

/// The listening agent.
pub struct Server {
    listener: OwnedFd,
    symbols: QemuSymbols,
    /// QEMU knows the thread that serves.
    is_registered: Cell<bool>,
}

/// A daemon's connection and what lives as long as it.
struct Session {
    socket: Arc<OwnedFd>,
    sampler: Option<Sampler>,
}

impl Server {
    /// Listens on a unix socket at `path` (mode 0600), replacing a socket that is there.
    ///
    /// # Errors
    /// What socket, bind or listen says; `ENAMETOOLONG` for a path of more than 107 bytes.
    pub fn bind(path: &Path) -> io::Result<Server> {
        Ok(Server { listener: sys::listen(path)?, symbols: QemuSymbols::find(), is_registered: Cell::new(false) })
    }

    /// Starts the thread that serves until the process ends.
    ///
    /// # Errors
    /// If the thread cannot be created.
    pub fn start(self) -> io::Result<()> {
        sys::spawn_quiet("plover-agent", move || self.serve())
    }

    fn serve(&self) {
        let mut session: Option<Session> = None;
        let mut buffer = vec![0; MAX_REQUEST_BYTES.saturating_add(1)];
        loop {
            let socket = session.as_ref().map(|session| session.socket.as_fd());
            let (caller, request) = match sys::wait_readable(self.listener.as_fd(), socket) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // poll fails only when the kernel has no memory for it: nothing can be served then.
                Err(_) => return,
            };
            if caller && let Ok(socket) = sys::accept(self.listener.as_fd()) {
                session = Some(Session { socket: Arc::new(socket), sampler: None });
                continue;
            }
            if request && !session.as_mut().is_some_and(|session| self.answer(session, &mut buffer)) {
                session = None;
            }
        }
    }

    /// Answers one request; false when the connection is over. The buffer has one byte more than the longest request, so that
    /// a longer one is noticed.
    fn answer(&self, session: &mut Session, buffer: &mut [u8]) -> bool {
        let message = match sys::receive(session.socket.as_fd(), buffer) {
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        };
        let Some(request) = Request::decode(message) else { return false };
        if self.control(request, message, session) {
            return true;
        }
        let (outcome, attached) = self.perform(request, message, session);
        let (status, errno) = match outcome {
            Ok(status) => (status, 0),
            Err(error) => (Status::Failed, error.raw_os_error().unwrap_or(libc::EIO)),
        };
        let response = Response { errno: errno.unsigned_abs(), ..self.response(request, message, status) };
        sys::send(session.socket.as_fd(), &response.encode(), attached.as_ref().map(AsFd::as_fd)).is_ok()
    }

    fn response(&self, request: Request, message: &[u8], status: Status) -> Response {
        Response {
            request,
            status,
            errno: 0,
            version: PROTOCOL_VERSION,
            pid: std::process::id(),
            has_yank: self.symbols.has_yank(),
            tag: Request::tag(message),
        }
    }

    /// Has QEMU's main thread carry out a request that is about the whole guest, and answer it as soon as that is done.
    /// False if it is no such request, or this QEMU cannot.
    fn control(&self, request: Request, message: &[u8], session: &Session) -> bool {
        let path = || Request::path(message).map(|path| path.to_owned());
        let command = match request {
            Request::Stop => Some(Command::Stop),
            Request::Cont => Some(Command::Cont),
            Request::Save => path().map(Command::Save),
            Request::Load => path().map(Command::Load),
            _ => None,
        };
        let (Some(command), Some(control)) = (command, self.symbols.control) else { return false };
        let (socket, response) = (Arc::clone(&session.socket), self.response(request, message, Status::Done));
        control.run(command, move |outcome| {
            let answer = match outcome {
                Ok(()) => response.encode().to_vec(),
                Err(reason) => Response { status: Status::Refused, ..response }.encode_with(&reason),
            };
            // A daemon that is gone needs no answer; that its connection is over is seen by the agent's thread.
            let _ = sys::send(socket.as_fd(), &answer, None);
        });
        true
    }

    fn perform(
        &self,
        request: Request,
        message: &[u8],
        session: &mut Session,
    ) -> (io::Result<Status>, Option<OwnedFd>) {
        match request {
            Request::Hello => (Ok(Status::Done), None),
            Request::Stop | Request::Cont | Request::Save | Request::Load => (Ok(Status::Unsupported), None),
            Request::Yank => (Ok(self.symbols.register_migration_yank()), None),
            Request::Written => {
                if !self.is_registered.replace(true) {
                    self.symbols.register_thread();
                }
                (Ok(self.symbols.tell_written(Request::ranges(message))), None)
            }
            Request::Vcpus => (Ok(self.symbols.change_vcpus(Request::vcpus(message))), None),
            // The agent's own copy is closed when the answer is out.
            Request::Userfaultfd => match sys::userfaultfd() {
                Ok(fd) => (Ok(Status::Done), Some(fd)),
                Err(error) => (Err(error), None),
            },
            Request::Clocks => match Sampler::start() {
                Ok((sampler, fd)) => {
                    session.sampler = Some(sampler);
                    (Ok(Status::Done), Some(fd))
                }
                Err(error) => (Err(error), None),
            },
        }
    }
}
