//! QEMU's monitor (QMP) over a unix socket: small, synchronous, no thread of its own; every command has a deadline.
//!
//! Rejected: the `qapi` crate (generates every type of every command of one QEMU version, and its client has no
//! deadlines), a reader thread (the owner has a poll loop already: see [`Qmp::poll_fd`]).
//!
//! Commands carry ids, so that the late answer of a command that ran into its deadline is not taken for the next one's.

mod commands;
pub mod wire;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use serde_json::Value;

pub use commands::{BlockCache, BlockDevice, BlockImage, BlockNode, CpuThread, MemoryBackend, RunState};
pub use wire::{Event, EventKind, Version};

use wire::{LineBuffer, Message, WireError};

/// Deadline of a command when nothing else is said. `stop` and `cont` take milliseconds; a main loop that is busy for
/// seconds (a slow disk flush) is not yet an error.
pub const DEFAULT_COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// QEMU's longest answers (the QAPI schema) have about 300 KB; more than this is not QEMU.
const MAX_LINE_BYTES: usize = 16 << 20;

/// What went wrong with the monitor.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket could not be reached.
    #[error("cannot connect to QEMU's monitor {}: {source}; is QEMU running with -qmp unix:PATH,server=on,wait=off?", path.display())]
    Connect {
        /// The monitor's socket.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Reading or writing failed.
    #[error("lost the connection to QEMU's monitor {}: {source}", path.display())]
    Io {
        /// The monitor's socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// QEMU closed the connection; most often it ended.
    #[error("QEMU closed its monitor {}: it has ended or another client took its place", path.display())]
    Closed {
        /// The monitor's socket.
        path: PathBuf,
    },
    /// No answer within the deadline. The command may still be carried out.
    #[error("QEMU's monitor {} did not answer «{command}» within {timeout_ms} ms; QEMU is stuck or another client holds the monitor", path.display())]
    Timeout {
        /// The monitor's socket.
        path: PathBuf,
        /// What was asked.
        command: String,
        /// How long it was waited for.
        timeout_ms: u128,
    },
    /// QEMU refused a command.
    #[error("QEMU refused «{command}»: {description} ({class})")]
    Command {
        /// What was asked.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's text.
        description: String,
    },
    /// QEMU sent something that is not QMP.
    #[error("QEMU's monitor {} sent what cannot be read: {source}", path.display())]
    Wire {
        /// The monitor's socket.
        path: PathBuf,
        /// What is wrong with it.
        source: WireError,
    },
    /// QEMU answered a command in another form than it documents.
    #[error("QEMU's answer to «{command}» has an unexpected form: {answer}")]
    Answer {
        /// What was asked.
        command: String,
        /// The start of the answer.
        answer: String,
    },
}

impl QmpError {
    /// The deadline passed; the command may still be carried out later.
    pub fn is_timeout(&self) -> bool {
        matches!(self, QmpError::Timeout { .. })
    }

    /// The connection is unusable: connect anew, or QEMU has ended.
    pub fn is_disconnected(&self) -> bool {
        matches!(self, QmpError::Connect { .. } | QmpError::Io { .. } | QmpError::Closed { .. } | QmpError::Wire { .. })
    }

    /// QEMU understood and said no; the connection is fine.
    pub fn is_command_error(&self) -> bool {
        matches!(self, QmpError::Command { .. })
    }

    /// QEMU does not know the command.
    pub fn is_unknown_command(&self) -> bool {
        matches!(self, QmpError::Command { class, .. } if class == "CommandNotFound")
    }
}

/// A connection to QEMU's monitor.
pub struct Qmp {
    stream: UnixStream,
    path: PathBuf,
    lines: LineBuffer,
    events: Vec<Event>,
    greeting: Version,
    next_id: u64,
    timeout: Duration,
}

impl Qmp {
    /// Connects, reads the greeting and leaves negotiation mode. While the socket does not exist yet it is tried again until the
    /// deadline; a deadline in the past means one try (the handshake then still gets [`DEFAULT_COMMAND_TIMEOUT`]).
    ///
    /// QEMU serves one client per monitor; while another one is connected, this waits and runs into its deadline.
    ///
    /// # Errors
    /// [`QmpError::Connect`] and what the handshake can meet.
    pub fn connect(path: &Path, deadline: Instant) -> Result<Qmp, QmpError> {
        let stream = super::connect_until(deadline, || UnixStream::connect(path))
            .and_then(|stream| stream.set_nonblocking(true).map(|()| stream))
            .map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        let mut qmp = Qmp {
            stream,
            path: path.to_owned(),
            lines: LineBuffer::default(),
            events: Vec::new(),
            greeting: Version { major: 0, minor: 0, micro: 0, package: String::new() },
            next_id: 1,
            timeout: DEFAULT_COMMAND_TIMEOUT,
        };
        let started = Instant::now();
        let deadline = if deadline > started { deadline } else { started + DEFAULT_COMMAND_TIMEOUT };
        qmp.greeting = loop {
            match qmp.next_message("the greeting", started, deadline)? {
                Message::Greeting(version) => break version,
                Message::Event(event) => qmp.events.push(event),
                Message::Return { .. } | Message::Failure { .. } => {}
            }
        };
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Sets the deadline of commands that follow.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// QEMU's version as its greeting gave it.
    pub fn version(&self) -> &Version {
        &self.greeting
    }

    /// Process id of QEMU as this process sees it (SO_PEERCRED). If a management program opened the listening socket and
    /// passed it to QEMU, it is that program's.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn peer_pid(&self) -> Result<i32, QmpError> {
        rustix::net::sockopt::socket_peercred(&self.stream)
            .map(|credentials| credentials.pid.as_raw_nonzero().get())
            .map_err(|errno| self.io_error(errno.into()))
    }

    /// Executes a command with the present timeout; `arguments` is an object or `Value::Null`.
    ///
    /// # Errors
    /// [`QmpError::Command`] if QEMU refuses, [`QmpError::Timeout`], or a lost connection.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, self.timeout)
    }

    /// As [`Qmp::execute`], with a timeout of its own.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn execute_within(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value, QmpError> {
        let started = Instant::now();
        let deadline = started + timeout;
        let id = self.next_id;
        self.next_id += 1;
        let mut request = serde_json::json!({"execute": command, "id": id});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut line = request.to_string().into_bytes();
        line.push(b'\n');
        self.write_all(&line, command, started, deadline)?;
        let answer = self.answer(id, command, started, deadline);
        // Events that arrived in one piece with the answer: the socket will not become readable for them again.
        self.keep_buffered_events()?;
        answer
    }

    /// Waits for the answer to the command with this id.
    fn answer(&mut self, id: u64, command: &str, started: Instant, deadline: Instant) -> Result<Value, QmpError> {
        loop {
            match self.next_message(command, started, deadline)? {
                Message::Event(event) => self.events.push(event),
                Message::Return { id: Some(answered), value } if answered == id => return Ok(value),
                // An answer without id means that QEMU could not read what we sent.
                Message::Failure { id: answered, class, description }
                    if answered.is_none_or(|answered| answered == id) =>
                {
                    return Err(QmpError::Command { command: command.to_owned(), class, description });
                }
                // The late answer of a command that ran into its deadline.
                Message::Return { .. } | Message::Failure { .. } | Message::Greeting(_) => {}
            }
        }
    }

    /// The descriptor to watch for readability while idle; then call [`Qmp::poll_events`].
    pub fn poll_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Reads what has arrived, without waiting. Events are there for [`Qmp::take_events`] afterwards.
    ///
    /// # Errors
    /// A lost connection; events that arrived before it are kept.
    pub fn poll_events(&mut self) -> Result<(), QmpError> {
        let received = self.receive();
        self.keep_buffered_events()?;
        received.map(drop)
    }

    fn keep_buffered_events(&mut self) -> Result<(), QmpError> {
        while let Some(message) = self.buffered_message()? {
            if let Message::Event(event) = message {
                self.events.push(event);
            }
        }
        Ok(())
    }

    /// The events seen since the last call, oldest first; also those that came while commands were executed, for
    /// which [`Qmp::poll_fd`] does not become readable again.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Waits for the event that says that a reset is done, with the present timeout. Events seen meanwhile are kept.
    fn await_reset(&mut self) -> Result<(), QmpError> {
        let started = Instant::now();
        let deadline = started + self.timeout;
        loop {
            let seen = self.events.iter().position(|event| matches!(event.kind, EventKind::Reset { guest: false, .. }));
            if let Some(at) = seen {
                self.events.remove(at);
                return Ok(());
            }
            if let Message::Event(event) = self.next_message("system_reset", started, deadline)? {
                self.events.push(event);
            }
        }
    }

    fn io_error(&self, source: io::Error) -> QmpError {
        QmpError::Io { path: self.path.clone(), source }
    }

    fn timed_out(&self, command: &str, started: Instant) -> QmpError {
        QmpError::Timeout {
            path: self.path.clone(),
            command: command.to_owned(),
            timeout_ms: started.elapsed().as_millis(),
        }
    }

    fn write_all(
        &mut self,
        mut bytes: &[u8],
        command: &str,
        started: Instant,
        deadline: Instant,
    ) -> Result<(), QmpError> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, command, started, deadline)?;
                }
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(QmpError::Closed { path: self.path.clone() });
                }
                Err(error) => return Err(self.io_error(error)),
            }
        }
        Ok(())
    }

    fn wait(&self, events: PollFlags, command: &str, started: Instant, deadline: Instant) -> Result<(), QmpError> {
        match super::wait_for(self.stream.as_fd(), events, deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.timed_out(command, started)),
            Err(error) => Err(self.io_error(error)),
        }
    }

    fn next_message(&mut self, command: &str, started: Instant, deadline: Instant) -> Result<Message, QmpError> {
        loop {
            if let Some(message) = self.buffered_message()? {
                return Ok(message);
            }
            if !self.receive()? {
                self.wait(PollFlags::IN, command, started, deadline)?;
            }
        }
    }

    fn buffered_message(&mut self) -> Result<Option<Message>, QmpError> {
        let Some(line) = self.lines.next_line() else {
            return Ok(None);
        };
        match wire::parse_line(&line) {
            Ok(message) => Ok(Some(message)),
            Err(source) => Err(QmpError::Wire { path: self.path.clone(), source }),
        }
    }

    /// Reads what is there; false if there was nothing.
    fn receive(&mut self) -> Result<bool, QmpError> {
        let mut chunk = [0; 16 << 10];
        let mut any = false;
        loop {
            match self.stream.read(&mut chunk) {
                // What came before the end is still worth reading; the next call meets the end again.
                Ok(0) if any => return Ok(true),
                Ok(0) => {
                    return Err(QmpError::Closed { path: self.path.clone() });
                }
                Ok(count) => {
                    any = true;
                    self.lines.extend(&chunk[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(QmpError::Closed { path: self.path.clone() });
                }
                Err(error) => return Err(self.io_error(error)),
            }
            if self.lines.len() > MAX_LINE_BYTES {
                let source = io::Error::new(io::ErrorKind::InvalidData, "a line of more than 16 MiB");
                return Err(self.io_error(source));
            }
        }
    }
}

#[cfg(test)]
mod tests;
