//! The client's ear and mouth: commands come in with the time of their arrival, output goes out without ever blocking.
//!
//! The control thread stamps a command when it arrives, so that a mark is exact even while the load waits for a dead
//! server. PR_SET_PDEATHSIG was rejected for noticing a dead parent: it fires when the parent's *thread* ends, and whoever enters
//! a network namespace does that on a thread of its own. The end of stdin and a pidfd say the same about the process.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, getppid, pidfd_open};

use super::protocol::{Command, Output};

/// Exit status of a client whose parent is gone.
pub const EXIT_ORPHAN: i32 = 3;
/// Exit status of a client that had to be ended by its deadline.
pub const EXIT_DEADLINE: i32 = 4;
/// How long a client may still drain, verify and report after its deadline has stopped it.
const DEADLINE_GRACE: Duration = Duration::from_secs(45);
/// Lines that wait for a parent that does not read; further progress is dropped.
const OUTPUT_QUEUE_LINES: usize = 64;

/// Commands that arrived, each with the time of its arrival.
pub struct Control {
    commands: Receiver<(Instant, Command)>,
}

/// The other end of a [`Control`].
#[derive(Clone)]
pub struct ControlSender(Sender<(Instant, Command)>);

impl ControlSender {
    /// Tells the client; a client that has ended does not hear it.
    pub fn send(&self, command: Command) {
        // The client may be gone already: then there is nobody to tell, and its report says why.
        let _ = self.0.send((Instant::now(), command));
    }
}

impl Control {
    /// A control for a client that runs in this process.
    pub fn channel() -> (ControlSender, Control) {
        let (sender, commands) = channel();
        (ControlSender(sender), Control { commands })
    }

    /// The next command, if one has arrived.
    pub fn poll(&mut self) -> Option<(Instant, Command)> {
        self.commands.try_recv().ok()
    }

    /// Reads commands from stdin. At the deadline it stops the client, and ends the process if that does not help; it ends
    /// the process at once when the parent goes away, because then nobody reads the report.
    pub fn from_stdin(deadline: Duration) -> Control {
        let (sender, control) = Control::channel();
        std::thread::spawn(move || listen(&sender, Instant::now() + deadline));
        control
    }
}

fn listen(sender: &ControlSender, deadline: Instant) {
    // Without a pidfd (parent in another PID namespace) the end of stdin alone tells.
    let parent = getppid().and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let mut line = Vec::new();
    let mut limit = deadline;
    let mut stopping = false;
    loop {
        let now = Instant::now();
        if now >= limit {
            if stopping {
                eprintln!("rig-client: still busy {DEADLINE_GRACE:?} after its deadline, giving up");
                std::process::exit(EXIT_DEADLINE);
            }
            stopping = true;
            limit = now + DEADLINE_GRACE;
            sender.send(Command::Stop(true));
        }
        if !wait(parent.as_ref(), limit - now.min(limit)) {
            continue;
        }
        if !read_commands(&mut line, sender) {
            eprintln!("rig-client: the parent closed stdin, ending");
            std::process::exit(EXIT_ORPHAN);
        }
    }
}

/// Waits for stdin (true) or the end of the time; ends the process when the parent is dead.
fn wait(parent: Option<&OwnedFd>, timeout: Duration) -> bool {
    let stdin = std::io::stdin();
    let mut fds = vec![PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN)];
    if let Some(parent) = parent {
        fds.push(PollFd::from_borrowed_fd(parent.as_fd(), PollFlags::IN));
    }
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
    // A signal or an error ends the wait early, and the caller's loop comes back.
    if poll(&mut fds, Some(&timeout)).is_err() {
        return false;
    }
    if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
        std::process::exit(EXIT_ORPHAN);
    }
    !fds[0].revents().is_empty()
}

/// Reads what is there; false at the end of stdin.
fn read_commands(line: &mut Vec<u8>, sender: &ControlSender) -> bool {
    let mut buffer = [0; 4096];
    // Read::read on the locked handle would buffer beyond what poll sees, so the descriptor is read directly.
    let count = match rustix::io::read(std::io::stdin(), &mut buffer) {
        Ok(0) => return false,
        Ok(count) => count,
        Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return true,
        Err(_) => return false,
    };
    for &byte in &buffer[..count] {
        if byte != b'\n' {
            line.push(byte);
            continue;
        }
        match serde_json::from_slice(line) {
            Ok(command) => sender.send(command),
            Err(error) => eprintln!("rig-client: ignored a command that is none: {error}"),
        }
        line.clear();
    }
    true
}

/// Writes output lines from a thread of its own, so that a parent that is stopped does not stop the client.
pub struct Mouth {
    lines: SyncSender<Output>,
    writer: JoinHandle<()>,
}

impl Mouth {
    /// Writes to stdout.
    pub fn stdout() -> Mouth {
        Mouth::new(std::io::stdout())
    }

    /// Writes to `sink`.
    pub fn new(mut sink: impl Write + Send + 'static) -> Mouth {
        let (lines, queue) = sync_channel::<Output>(OUTPUT_QUEUE_LINES);
        let writer = std::thread::spawn(move || {
            for output in queue {
                let mut line = serde_json::to_vec(&output).expect("output is plain data");
                line.push(b'\n');
                if sink.write_all(&line).and_then(|()| sink.flush()).is_err() {
                    return;
                }
            }
        });
        Mouth { lines, writer }
    }

    /// Says it. Progress is dropped when the parent does not read; everything else waits for it.
    pub fn say(&self, output: Output) {
        match self.lines.try_send(output) {
            Ok(()) | Err(TrySendError::Full(Output::Progress(_)) | TrySendError::Disconnected(_)) => {}
            // A dead writer means a closed stdout: nobody listens any more.
            Err(TrySendError::Full(important)) => drop(self.lines.send(important)),
        }
    }

    /// Waits until everything is written.
    pub fn close(self) {
        drop(self.lines);
        // The writer cannot panic on plain data; if it did, its message is on stderr already.
        let _ = self.writer.join();
    }
}
