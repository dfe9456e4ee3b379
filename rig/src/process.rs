//! Processes on a host of the test bed: logs, signals, waiting, restarts.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use rustix::thread::{CpuSet, LinkNameSpaceType};

use crate::error::Context;
use crate::wait::{Deadline, wait_until};
use crate::{Result, RigError};

const SHOWN_LOG_LINES: usize = 15;

/// What to start, and how to keep it.
pub struct Spawn {
    name: String,
    command: Command,
    restart_after: Option<Duration>,
    cores: Vec<usize>,
}

impl Spawn {
    /// `name` is used for the log file and in messages; unique on its host.
    pub fn new(name: impl Into<String>, command: Command) -> Self {
        Self { name: name.into(), command, restart_after: None, cores: Vec::new() }
    }

    /// Starts the process again this long after it ended, as a service manager would.
    pub fn restart_after(mut self, delay: Duration) -> Self {
        self.restart_after = Some(delay);
        self
    }

    /// Runs the process on these cores only.
    pub fn on_cores(mut self, cores: &[usize]) -> Self {
        self.cores = cores.to_vec();
        self
    }
}

/// A process on a host; clones mean the same one. It ends with the test bed, not with this handle.
#[derive(Clone)]
pub struct Process {
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    log: PathBuf,
    restart_after: Option<Duration>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    command: Command,
    pid: u32,
    /// How the last run ended; None while it runs.
    ended: Option<ExitStatus>,
    starts: u32,
    /// No restart while a fault says so.
    suspended: u32,
    /// No restart ever again.
    finished: bool,
    monitor: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts `spawn` in the network namespace `namespace`; its output goes to `directory/NAME.log`.
    pub(crate) fn start(spawn: Spawn, namespace: RawFd, directory: &Path) -> Result<Self> {
        let Spawn { name, mut command, restart_after, cores } = spawn;
        let log = directory.join(format!("{name}.log"));
        let output = File::options().create(true).append(true).open(&log);
        let output = output.context(|| format!("cannot open {}", log.display()))?;
        let errors = output.try_clone().context(|| "cannot duplicate a file handle".to_owned())?;
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        confine(&mut command, namespace, &cores);
        let (command, child) = start_now(command);
        let child = child.context(|| format!("cannot start {name} ({:?})", command.get_program()))?;
        let state =
            State { command, pid: child.id(), ended: None, starts: 1, suspended: 0, finished: false, monitor: None };
        let shared = Arc::new(Shared { name, log, restart_after, state: Mutex::new(state), changed: Condvar::new() });
        let watched = shared.clone();
        let monitor = std::thread::spawn(move || watched.monitor(child));
        shared.lock().monitor = Some(monitor);
        Ok(Self { shared })
    }

    /// The name that it was given.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The process id of the present or last run.
    pub fn pid(&self) -> u32 {
        self.shared.lock().pid
    }

    /// How often it was started.
    pub fn starts(&self) -> u32 {
        self.shared.lock().starts
    }

    /// Whether it runs now.
    pub fn is_running(&self) -> bool {
        self.shared.lock().ended.is_none()
    }

    /// Sends a signal. A process that has ended is left alone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let state = self.shared.lock();
        if state.ended.is_some() {
            return Ok(());
        }
        // The monitor reaps under this lock, so the id cannot belong to somebody else.
        let pid = Pid::from_raw(state.pid.cast_signed()).expect("a child's id is positive");
        let sent = rustix::process::kill_process(pid, signal);
        sent.context(|| format!("cannot send {signal:?} to {} ({pid:?})", self.shared.name))
    }

    /// SIGKILL, and waits until it has ended. A restart follows if one was asked for.
    pub fn kill(&self) -> Result<()> {
        let starts = self.starts();
        self.signal(Signal::KILL)?;
        let deadline = Deadline::after_secs(10);
        self.shared.wait(deadline, "its end", |state| state.ended.is_some() || state.starts > starts)
    }

    /// SIGTERM.
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// SIGSTOP.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Ends it for good: no restart follows.
    pub fn finish(&self) -> Result<()> {
        self.shared.lock().finished = true;
        self.shared.changed.notify_all();
        self.kill()
    }

    /// Waits until it has ended by itself.
    pub fn wait_exit(&self, deadline: Deadline) -> Result<ExitStatus> {
        self.shared.wait(deadline, "its end", |state| state.ended.is_some())?;
        Ok(self.shared.lock().ended.unwrap_or_default())
    }

    /// Waits until it runs for at least the `starts`th time.
    pub fn wait_started(&self, starts: u32, deadline: Deadline) -> Result<()> {
        self.shared.wait(deadline, "its restart", |state| state.starts >= starts && state.ended.is_none())
    }

    /// No restarts until [`Process::resume_restarts`] was called as often.
    pub fn suspend_restarts(&self) {
        self.shared.lock().suspended += 1;
    }

    /// Takes one [`Process::suspend_restarts`] back; a process that ended meanwhile starts now.
    pub fn resume_restarts(&self) {
        let mut state = self.shared.lock();
        state.suspended = state.suspended.saturating_sub(1);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Everything that it wrote to standard output and error, over all its runs.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.shared.log).unwrap_or_default()).into_owned()
    }

    /// The file behind [`Process::log`].
    pub fn log_path(&self) -> &Path {
        &self.shared.log
    }

    /// Waits until its log has a line that contains `text`, and returns the first such line.
    ///
    /// # Errors
    /// When the deadline passes, or at once when the process has ended for good without it.
    pub fn wait_for_line(&self, text: &str, deadline: Deadline) -> Result<String> {
        self.wait_for(&format!("«{text}» in its log"), deadline, || find_line(&self.log(), text))
    }

    /// Waits until `file`, which the process writes, has a line that contains `text`.
    pub fn wait_for_line_in(&self, file: &Path, text: &str, deadline: Deadline) -> Result<String> {
        let read = || String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned();
        self.wait_for(&format!("«{text}» in {}", file.display()), deadline, || find_line(&read(), text))
    }

    /// Waits for anything that the process brings about; its end ends the wait.
    pub fn wait_for<T>(&self, what: &str, deadline: Deadline, mut ready: impl FnMut() -> Option<T>) -> Result<T> {
        wait_until(deadline, what, || {
            let ended = self.shared.lock().ended_for_good();
            // Asked after the look at the state: what it did last still counts.
            ready().map(Ok).or_else(|| ended.map(|status| Err(self.shared.ended(status, what))))
        })
        .map_err(|error| self.shared.explain(error))?
    }

    /// Stops the supervision; the janitor kills. Returns the thread to wait for.
    pub(crate) fn release(&self) -> Option<JoinHandle<()>> {
        let mut state = self.shared.lock();
        state.finished = true;
        let monitor = state.monitor.take();
        drop(state);
        self.shared.changed.notify_all();
        monitor
    }
}

impl State {
    fn ended_for_good(&self) -> Option<ExitStatus> {
        self.ended.filter(|_| self.finished)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    fn wait(&self, deadline: Deadline, what: &str, ready: impl Fn(&State) -> bool) -> Result<()> {
        let state = self.lock();
        let (_state, timeout) = self
            .changed
            .wait_timeout_while(state, deadline.remaining(), |state| !ready(state))
            .expect("no holder of this lock panics");
        if timeout.timed_out() { Err(self.explain(deadline.missed(what))) } else { Ok(()) }
    }

    /// Follows the process through its runs.
    fn monitor(&self, mut child: Child) {
        loop {
            self.reap(&mut child);
            let Some(next) = self.restart() else { return };
            child = next;
        }
    }

    fn reap(&self, child: &mut Child) {
        let pid = Pid::from_child(child);
        // Waits without reaping, so that nobody signals a reused id: the reaping below holds the lock.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        while matches!(rustix::process::waitid(WaitId::Pid(pid), options), Err(rustix::io::Errno::INTR)) {}
        let mut state = self.lock();
        state.ended = Some(child.wait().unwrap_or_default());
        state.finished |= self.restart_after.is_none();
        drop(state);
        self.changed.notify_all();
    }

    /// Waits for the delay and for the end of any suspension. None: no restart.
    fn restart(&self) -> Option<Child> {
        let delay = self.restart_after?;
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), delay, |state| !state.finished)
            .expect("no holder of this lock panics");
        let mut state = self
            .changed
            .wait_while(state, |state| state.suspended > 0 && !state.finished)
            .expect("no holder of this lock panics");
        if state.finished {
            return None;
        }
        let command = std::mem::replace(&mut state.command, Command::new("true"));
        let (command, child) = start_now(command);
        state.command = command;
        match child {
            Ok(child) => {
                state.pid = child.id();
                state.ended = None;
                state.starts += 1;
                drop(state);
                self.changed.notify_all();
                Some(child)
            }
            Err(error) => {
                eprintln!("rig: cannot start {} again: {error}", self.name);
                state.finished = true;
                None
            }
        }
    }

    fn tail(&self) -> String {
        let text = String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned();
        let mut tail = VecDeque::with_capacity(SHOWN_LOG_LINES);
        for line in text.lines() {
            if tail.len() == SHOWN_LOG_LINES {
                tail.pop_front();
            }
            tail.push_back(format!("    {line}"));
        }
        tail.make_contiguous().join("\n")
    }

    fn ended(&self, status: ExitStatus, what: &str) -> RigError {
        let (name, log) = (self.name.clone(), self.log.clone());
        RigError::Ended { name, status: status.to_string(), what: what.to_owned(), log, tail: self.tail() }
    }

    fn explain(&self, error: RigError) -> RigError {
        match error {
            RigError::Deadline { what, waited, .. } => {
                let hint = format!("; log {} ends with:\n{}", self.log.display(), self.tail());
                RigError::Deadline { what: format!("{} ({what})", self.name), waited, hint }
            }
            other => other,
        }
    }
}

fn find_line(log: &str, text: &str) -> Option<String> {
    log.lines().find(|line| line.contains(text)).map(str::to_owned)
}

/// Makes the child enter the namespace and die with this process.
fn confine(command: &mut Command, namespace: RawFd, cores: &[usize]) {
    let cpus = cores.iter().fold(CpuSet::new(), |mut set, &core| {
        set.set(core);
        set
    });
    let pinned = !cores.is_empty();
    let prepare = move || -> io::Result<()> {
        // SAFETY: the descriptor belongs to the host's namespace handle, which the test bed keeps open until its
        // processes are gone and no restart can follow.
        let namespace = unsafe { BorrowedFd::borrow_raw(namespace) };
        rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        if pinned {
            rustix::thread::sched_setaffinity(None, &cpus)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure only makes system calls on values that it owns: no allocation, no lock.
    unsafe { command.pre_exec(prepare) };
}

type Job = (Command, Sender<(Command, io::Result<Child>)>);

/// Starts a command on a thread that lives as long as this process: the parent-death signal comes when the
/// *thread* that forked ends, and tests start processes from threads that end early.
fn start_now(command: Command) -> (Command, io::Result<Child>) {
    static SPAWNER: OnceLock<Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, jobs): (Sender<Job>, Receiver<Job>) = channel();
        std::thread::Builder::new()
            .name("rig-spawner".to_owned())
            .spawn(move || {
                for (mut command, answer) in jobs {
                    let child = command.spawn();
                    // The asker waits below.
                    drop(answer.send((command, child)));
                }
            })
            .expect("a thread can be started");
        sender
    });
    let (answer, child) = channel();
    spawner.send((command, answer)).expect("the spawner never ends");
    child.recv().expect("the spawner answers")
}

/// Field 22 of /proc/PID/stat: clock ticks from boot to the start of the process. None if there is none, or if it is a zombie.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may contain anything, so count from the last bracket.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    if matches!(fields.first(), Some(&"Z" | &"X")) {
        return None;
    }
    fields.get(19)?.parse().ok()
}
