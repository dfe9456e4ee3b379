//! The line between a device's session thread and the reactor that owns its rings.
//!
//! The session waits for the answer where the protocol wants it so: a ring must not be touched any more when
//! GET_VRING_BASE is answered. What lets a ring run is only told: QEMU sets up all rings with its guest standing still,
//! and a wait would be two changes of thread each. Commands are carried out in the order in which they were given. The
//! reactor only ever looks (`try_recv`) and answers into a slot that is always free, so it cannot be blocked by a
//! session; a session that waits in vain gives up after [`ANSWER_DEADLINE`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use dataplane::mailbox::{Receiver, Sender, mailbox};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use thiserror::Error;

use super::features::Features;
use super::memory::RamIdentity;
use super::net::RingIndex;
use super::ring::Ring;

/// How long a session waits for the reactor. A reactor that takes longer is stuck, and QEMU must not be stuck with it.
pub(crate) const ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// Room for what is told while all rings are set up, and for the commands of a session that gave up before.
const QUEUE_COMMANDS: usize = 128;
/// How often a waiting session looks whether it has been told to end.
const STOP_CHECK: Duration = Duration::from_millis(20);

/// Why a command did not get through.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The reactor did not answer in time.
    #[error("the packet loop did not answer within {waited_ms} ms: it is stuck or not running")]
    Stuck {
        /// How long the session waited.
        waited_ms: u128,
    },
    /// The device was dropped, or the session was told to end.
    #[error("the device is being shut down")]
    Gone,
}

/// What a session wants the reactor to do.
pub(crate) enum Command {
    /// QEMU is there. Whatever ran before is over.
    Connected,
    /// QEMU is gone: stop everything.
    Disconnected,
    /// There is a (new) memory table.
    MemoryReady(Option<RamIdentity>),
    /// QEMU did something that the session refused; it ends the connection after this.
    Refused(String),
    /// Begin to work on a ring.
    StartRing { index: RingIndex, start: RingStart },
    /// Stop working on a ring and say how far it got. Answer: [`Answer::Stopped`].
    StopRing { index: RingIndex },
    /// The other end of interrupts has changed.
    SetCall { index: RingIndex, call: Option<OwnedFd> },
    /// The other end of kicks has changed.
    SetKick { index: RingIndex, kick: Option<OwnedFd> },
    /// VHOST_USER_SET_VRING_ENABLE.
    SetEnabled { index: RingIndex, enabled: bool },
}

/// Everything that a ring needs to run.
pub(crate) struct RingStart {
    pub ring: Box<Ring>,
    pub features: Features,
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
    pub error: Option<OwnedFd>,
    pub enabled: bool,
}

/// What the reactor answers.
pub(crate) enum Answer {
    Done,
    /// The ring is at rest. `position` is None when it was not running. The ring itself comes back so that it is dropped here:
    /// unmapping memory has no place in the reactor.
    Stopped {
        position: Option<u16>,
        remains: Option<Box<Ring>>,
    },
}

struct Request {
    command: Command,
    /// Absent if nobody waits.
    answer: Option<SyncSender<Answer>>,
}

/// The bell at the reactor's door: an eventfd for one that sleeps, a flag for one that looks all the time.
struct Bell {
    fd: OwnedFd,
    rung: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        // What it rings for is in its place already: whoever sees the flag finds it.
        self.rung.store(true, Ordering::Release);
        signal(&self.fd);
    }
}

/// The session's end.
pub(crate) struct SessionEnd {
    requests: Sender<Request>,
    bell: Arc<Bell>,
    stop: Arc<AtomicBool>,
    deadline: Duration,
}

/// The reactor's end.
pub(crate) struct ReactorEnd {
    requests: Receiver<Request>,
    bell: Arc<Bell>,
}

/// Makes both ends. `stop` ends every wait of the session when it becomes true; no wait is longer than `deadline`.
pub(crate) fn pair(stop: Arc<AtomicBool>, deadline: Duration) -> std::io::Result<(SessionEnd, ReactorEnd)> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let bell = Arc::new(Bell { fd, rung: AtomicBool::new(false) });
    let (sender, receiver) = mailbox(QUEUE_COMMANDS);
    let session = SessionEnd { requests: sender, bell: Arc::clone(&bell), stop, deadline };
    Ok((session, ReactorEnd { requests: receiver, bell }))
}

/// Adds one to an eventfd. A full or closed one changes nothing for us: the other side has been told, or is gone.
pub(crate) fn signal(fd: &OwnedFd) {
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Takes what an eventfd holds, so that a level-triggered poll stops reporting it.
pub(crate) fn drain(fd: &OwnedFd) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}

impl SessionEnd {
    fn stuck(&self) -> LinkError {
        LinkError::Stuck { waited_ms: self.deadline.as_millis() }
    }

    /// Has the reactor carry out a command some time soon.
    pub fn tell(&self, command: Command) -> Result<(), LinkError> {
        self.send(Request { command, answer: None })
    }

    fn send(&self, request: Request) -> Result<(), LinkError> {
        match self.requests.send(request) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(self.stuck()),
            Err(TrySendError::Disconnected(_)) => return Err(LinkError::Gone),
        }
        self.bell.ring();
        Ok(())
    }

    /// Has the reactor carry out a command, and waits until it has.
    pub fn call(&self, command: Command) -> Result<Answer, LinkError> {
        let (sender, receiver) = sync_channel(1);
        self.send(Request { command, answer: Some(sender) })?;
        let deadline = Instant::now() + self.deadline;
        loop {
            match receiver.recv_timeout(STOP_CHECK) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => return Err(LinkError::Gone),
                Err(RecvTimeoutError::Timeout) if self.stop.load(Ordering::Acquire) => {
                    return Err(LinkError::Gone);
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    return Err(self.stuck());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl ReactorEnd {
    /// Readable when there may be commands.
    pub fn wake(&self) -> &OwnedFd {
        &self.bell.fd
    }

    /// Whether `wake` is readable, without a system call.
    #[inline]
    pub fn has_news(&self) -> bool {
        self.bell.rung.load(Ordering::Relaxed)
    }

    /// Falls silent. To be called before `next`: what comes afterwards rings again.
    pub fn acknowledge(&self) {
        drain(&self.bell.fd);
        self.bell.rung.swap(false, Ordering::AcqRel);
    }

    /// Has the reactor look at the device again.
    pub fn call_back(&self) {
        self.bell.ring();
    }

    /// The next command, and where its answer goes. None when there is none; never blocks.
    pub fn next(&mut self) -> Option<(Command, Responder)> {
        match self.requests.try_recv() {
            Ok(Request { command, answer }) => Some((command, Responder(answer))),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => None,
        }
    }
}

/// The place for the answer to one command.
pub(crate) struct Responder(Option<SyncSender<Answer>>);

impl Responder {
    /// Answers. Never blocks: the slot holds one answer and takes one. A session that gave up gets nothing.
    pub fn answer(self, answer: Answer) {
        if let Some(waiting) = self.0 {
            let _ = waiting.try_send(answer);
        }
    }
}
