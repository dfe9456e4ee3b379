//! The parent's handle on a client process that somebody else has started (in a namespace, say).
//!
//! A reader thread keeps the latest progress and the final report; the parent asks whenever it likes. Every wait has a deadline.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::protocol::{Command, Output, Progress, Report};

/// Why a client process did not deliver.
#[derive(Debug, Error)]
pub enum ClientError {
    /// It ended, or closed its stdout, without a report.
    #[error("the client ended without a report; its stderr says why")]
    Gone,
    /// It says that it could not do its job.
    #[error("the client failed: {0}")]
    Failed(String),
    /// It did not get there in time.
    #[error("the client did not reach «{what}» within {waited:?}; last progress: {progress:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        waited: Duration,
        /// What it last said.
        progress: Option<Progress>,
    },
}

#[derive(Default)]
struct State {
    started: bool,
    progress: Option<Progress>,
    marks: Vec<(String, f64)>,
    report: Option<Report>,
    failed: Option<String>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is a set of independent facts: a panic elsewhere cannot leave it half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running client. Dropping it closes the client's stdin, upon which the client ends by itself; reaping stays with the
/// owner of the process.
pub struct ClientProcess {
    stdin: Box<dyn Write + Send>,
    shared: Arc<Shared>,
}

impl ClientProcess {
    /// Takes the pipes of a client that was started with [`Job::arguments`](super::protocol::Job::arguments).
    pub fn new(stdin: impl Write + Send + 'static, stdout: impl Read + Send + 'static) -> ClientProcess {
        let shared = Arc::new(Shared::default());
        let reader = shared.clone();
        std::thread::spawn(move || listen(stdout, &reader));
        ClientProcess { stdin: Box::new(stdin), shared }
    }

    /// Takes the pipes out of `child`, which must have been spawned with piped stdin and stdout.
    ///
    /// # Panics
    /// If a pipe is missing.
    pub fn from_child(child: &mut std::process::Child) -> ClientProcess {
        let stdin = child.stdin.take().expect("the client is spawned with a piped stdin");
        let stdout = child.stdout.take().expect("the client is spawned with a piped stdout");
        ClientProcess::new(stdin, stdout)
    }

    /// Sends a command.
    ///
    /// # Errors
    /// [`ClientError::Gone`] if the client does not read any more.
    pub fn command(&mut self, command: &Command) -> Result<(), ClientError> {
        let mut line = serde_json::to_vec(command).expect("a command is plain data");
        line.push(b'\n');
        self.stdin.write_all(&line).and_then(|()| self.stdin.flush()).map_err(|_| ClientError::Gone)
    }

    /// Opens a window of this name.
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn mark(&mut self, label: &str) -> Result<(), ClientError> {
        self.command(&Command::Mark(label.to_owned()))
    }

    /// Changes the pipelining of a load.
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn set_in_flight(&mut self, in_flight: u32) -> Result<(), ClientError> {
        self.command(&Command::InFlight(in_flight))
    }

    /// Asks the client to drain, verify, report and exit. Collect the report with [`Self::report`].
    ///
    /// # Errors
    /// As [`Self::command`].
    pub fn stop(&mut self) -> Result<(), ClientError> {
        self.command(&Command::Stop(true))
    }

    /// What the client last said about itself.
    pub fn progress(&self) -> Option<Progress> {
        self.shared.lock().progress
    }

    /// Waits until the client sends its first requests.
    ///
    /// # Errors
    /// It ended, failed, or took longer than `timeout`.
    pub fn wait_started(&self, timeout: Duration) -> Result<(), ClientError> {
        self.wait("started", timeout, |state| state.started.then_some(()))
    }

    /// Waits until a progress line satisfies `wanted` and returns it.
    ///
    /// # Errors
    /// It ended, failed, or took longer than `timeout`.
    pub fn wait_progress(
        &self,
        timeout: Duration,
        wanted: impl Fn(&Progress) -> bool,
    ) -> Result<Progress, ClientError> {
        self.wait("the wanted progress", timeout, |state| state.progress.filter(&wanted))
    }

    /// Waits until the client has confirmed the mark; returns its time since the client's start, in milliseconds.
    ///
    /// # Errors
    /// It ended, failed, or took longer than `timeout`.
    pub fn wait_marked(&self, label: &str, timeout: Duration) -> Result<f64, ClientError> {
        self.wait("marked", timeout, |state| {
            state.marks.iter().rev().find(|(marked, _)| marked == label).map(|&(_, t_ms)| t_ms)
        })
    }

    /// Waits for the final report.
    ///
    /// # Errors
    /// It ended without one, failed, or took longer than `timeout`.
    pub fn report(&self, timeout: Duration) -> Result<Report, ClientError> {
        self.wait("its report", timeout, |state| state.report.clone())
    }

    fn wait<T>(
        &self,
        what: &'static str,
        timeout: Duration,
        mut found: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, ClientError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.lock();
        loop {
            if let Some(value) = found(&mut state) {
                return Ok(value);
            }
            if let Some(error) = &state.failed {
                return Err(ClientError::Failed(error.clone()));
            }
            if state.ended {
                return Err(ClientError::Gone);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ClientError::Timeout { what, waited: timeout, progress: state.progress });
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn listen(stdout: impl Read, shared: &Shared) {
    for line in BufReader::new(stdout).lines() {
        let Ok(line) = line else {
            break;
        };
        let parsed = serde_json::from_str(&line);
        let mut state = shared.lock();
        match parsed {
            Ok(Output::Started { .. }) => state.started = true,
            Ok(Output::Progress(progress)) => state.progress = Some(progress),
            Ok(Output::Marked { label, t_ms }) => state.marks.push((label, t_ms)),
            Ok(Output::Report(report)) => state.report = Some(*report),
            Ok(Output::Failed { error }) => state.failed = Some(error),
            Err(error) => state.failed = Some(format!("said {line:?}, which is no output: {error}")),
        }
        drop(state);
        shared.changed.notify_all();
    }
    shared.lock().ended = true;
    shared.changed.notify_all();
}
