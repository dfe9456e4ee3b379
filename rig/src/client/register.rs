//! Few shared keys, several connections, one request in flight each: a history for the linearizability check.
//!
//! The load client checks its own keys exactly but never lets two connections meet; here they do. Blocking sockets on a
//! thread per connection: a few hundred requests per second in total cost nothing, and the code reads like the client it plays.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::control::Control;
use super::linear::{self, Action, Operation, Verdict};
use super::protocol::{Command, KeyVerdict, Output, RegisterParameters, RegisterReport};
use super::resp::{self, Reply};
use super::rng::Rng;

/// A thread looks at the stop signal at least that often.
const TICK: Duration = Duration::from_millis(20);
/// Pause before the next attempt when a connection cannot be made.
const RETRY: Duration = Duration::from_millis(100);

/// Why the registers could not run.
#[derive(Debug, Error)]
pub enum RegisterError {
    /// The server could not be reached.
    #[error("cannot connect to {address}: {source}; is the server up and reachable from here?")]
    Connect {
        /// Server.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// No connections, or no keys.
    #[error("registers need at least one connection and one key")]
    Nothing,
    /// The history could not be written.
    #[error("cannot write the history to {path}: {source}")]
    History {
        /// Where.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// What one connection did.
#[derive(Default)]
struct Outcome {
    /// Key and operation.
    history: Vec<(u32, Operation)>,
    answered: u64,
    connections_lost: u64,
    errors: u64,
}

/// Runs until its duration is over or the control says stop, then checks the history of each key.
///
/// # Errors
/// [`RegisterError`] when it could not run. A history that is not linearizable is a result.
pub fn run(
    p: &RegisterParameters,
    control: &mut Control,
    emit: &mut dyn FnMut(Output),
) -> Result<RegisterReport, RegisterError> {
    if p.connections == 0 || p.keys == 0 {
        return Err(RegisterError::Nothing);
    }
    let run = super::redis::fresh_run(p.run);
    let start = Instant::now();
    let streams = connect_all(p)?;
    emit(Output::Started { run });
    let stop = AtomicBool::new(false);
    let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let stop = &stop;
        let threads: Vec<_> = (0..)
            .zip(streams)
            .map(|(number, stream)| scope.spawn(move || Client::new(p, number, run, start, stop).work(stream)))
            .collect();
        wait_for_stop(p, control, emit, start);
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|thread| thread.join().expect("a register client does not panic")).collect()
    });
    report(p, run, outcomes)
}

fn connect_all(p: &RegisterParameters) -> Result<Vec<TcpStream>, RegisterError> {
    let deadline = Instant::now() + Duration::from_millis(p.connect_timeout_ms);
    let mut streams = Vec::new();
    while streams.len() < usize::from(p.connections) {
        match connect(p.address) {
            Ok(stream) => streams.push(stream),
            Err(_) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(source) => {
                return Err(RegisterError::Connect { address: p.address, source });
            }
        }
    }
    Ok(streams)
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TICK))?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    Ok(stream)
}

fn wait_for_stop(p: &RegisterParameters, control: &mut Control, emit: &mut dyn FnMut(Output), start: Instant) {
    let limit = Duration::from_millis(p.duration_ms);
    while p.duration_ms == 0 || start.elapsed() < limit {
        match control.poll() {
            Some((_, Command::Stop(true))) => return,
            // A history has no windows: the mark is confirmed so that a parent can treat all clients alike.
            Some((at, Command::Mark(label))) => {
                let t_ms = at.saturating_duration_since(start).as_micros() as f64 / 1000.0;
                emit(Output::Marked { label, t_ms });
            }
            Some(_) => {}
            None => std::thread::sleep(TICK),
        }
    }
}

struct Client<'a> {
    p: &'a RegisterParameters,
    number: u32,
    run: u32,
    start: Instant,
    stop: &'a AtomicBool,
    rng: Rng,
    sequence: u64,
    stop_deadline: Option<Instant>,
    outcome: Outcome,
}

/// How a request ended.
enum Answer {
    Value(Option<u64>),
    Stored,
    Refused,
}

impl<'a> Client<'a> {
    fn new(p: &'a RegisterParameters, number: u32, run: u32, start: Instant, stop: &'a AtomicBool) -> Client<'a> {
        let rng = Rng::new(p.seed ^ u64::from(number) << 32);
        let outcome = Outcome::default();
        Client { p, number, run, start, stop, rng, sequence: 0, stop_deadline: None, outcome }
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    fn work(mut self, stream: TcpStream) -> Outcome {
        let mut stream = Some(stream);
        while !self.stopping() {
            let Some(connected) = &mut stream else {
                stream = connect(self.p.address).ok();
                if stream.is_none() {
                    std::thread::sleep(RETRY);
                }
                continue;
            };
            if self.operate(connected).is_err() {
                // At the end of the drain it is this client that gives up.
                self.outcome.connections_lost += u64::from(!self.stopping());
                stream = None;
            }
            std::thread::sleep(Duration::from_millis(self.p.think_ms));
        }
        self.outcome
    }

    /// One request and its answer, recorded.
    fn operate(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        let key = self.rng.below(self.p.keys);
        let name = key_name(self.run, key);
        let mut request = Vec::new();
        let action = if self.rng.percent(self.p.get_percent) {
            resp::command(&mut request, &[b"GET", name.as_bytes()]);
            Action::Read(None)
        } else {
            self.sequence += 1;
            let value = u64::from(self.number + 1) << 40 | self.sequence;
            resp::command(&mut request, &[b"SET", name.as_bytes(), value.to_string().as_bytes()]);
            Action::Write(value)
        };
        let invoked_ns = self.now_ns();
        let answer = stream.write_all(&request).and_then(|()| self.answer(stream));
        let returned_ns = self.now_ns();
        let operation = |action, returned_ns| Operation { client: self.number, action, invoked_ns, returned_ns };
        match (action, &answer) {
            (Action::Read(_), Ok(Answer::Value(value))) => {
                self.outcome.history.push((key, operation(Action::Read(*value), Some(returned_ns))));
                self.outcome.answered += 1;
            }
            (Action::Write(_), Ok(Answer::Stored)) => {
                self.outcome.history.push((key, operation(action, Some(returned_ns))));
                self.outcome.answered += 1;
            }
            (_, Ok(Answer::Refused)) => self.outcome.errors += 1,
            (_, Ok(_)) => {
                return Err(io::Error::other("the answer belongs to another kind of request"));
            }
            // A read that was not answered says nothing; a write may have happened.
            (Action::Read(_), Err(_)) => {}
            (Action::Write(_), Err(_)) => self.outcome.history.push((key, operation(action, None))),
        }
        answer.map(|_| ())
    }

    fn answer(&mut self, stream: &mut TcpStream) -> io::Result<Answer> {
        let since = Instant::now();
        let idle_limit = Duration::from_millis(self.p.idle_limit_ms);
        let mut input = [0; 512];
        let mut filled = 0;
        loop {
            match resp::parse(&input[..filled], 64).map_err(io::Error::other)? {
                Some((reply, used)) if used == filled => return understand(reply),
                Some(_) => return Err(io::Error::other("more than one answer to one request")),
                None => {}
            }
            match stream.read(&mut input[filled..]) {
                Ok(0) => return Err(io::Error::other("the server closed the connection")),
                Ok(count) => filled += count,
                Err(error) if is_timeout(&error) => self.keep_waiting(since, idle_limit)?,
                Err(error) => return Err(error),
            }
        }
    }

    fn keep_waiting(&mut self, since: Instant, idle_limit: Duration) -> io::Result<()> {
        let now = Instant::now();
        if self.stopping() {
            let drain = Duration::from_millis(self.p.drain_ms);
            let deadline = *self.stop_deadline.get_or_insert(now + drain);
            if now >= deadline {
                return Err(io::Error::other("no answer until the end of the drain"));
            }
        }
        if now - since > idle_limit {
            return Err(io::Error::other("no answer within the idle limit"));
        }
        Ok(())
    }
}

fn is_timeout(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), WouldBlock | TimedOut | Interrupted)
}

fn understand(reply: Reply) -> io::Result<Answer> {
    match reply {
        Reply::Nil => Ok(Answer::Value(None)),
        Reply::Simple(b"OK") => Ok(Answer::Stored),
        Reply::Error(_) => Ok(Answer::Refused),
        Reply::Bulk(digits) => {
            let value = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
            // A value that is no number was written by nobody: 0 is never written either, so the checker finds it.
            Ok(Answer::Value(Some(value.unwrap_or(0))))
        }
        other => Err(io::Error::other(format!("unexpected answer {other:?}"))),
    }
}

fn key_name(run: u32, key: u32) -> String {
    format!("{run:08x}:shared:{key}")
}

fn report(p: &RegisterParameters, run: u32, outcomes: Vec<Outcome>) -> Result<RegisterReport, RegisterError> {
    let mut histories: HashMap<u32, Vec<Operation>> = HashMap::new();
    let mut report = RegisterReport {
        operations: 0,
        unanswered_writes: 0,
        connections_lost: 0,
        errors: 0,
        keys: Vec::new(),
        linearizable: true,
    };
    for outcome in outcomes {
        report.operations += outcome.answered;
        report.connections_lost += outcome.connections_lost;
        report.errors += outcome.errors;
        for (key, operation) in outcome.history {
            report.unanswered_writes += u64::from(operation.returned_ns.is_none());
            histories.entry(key).or_default().push(operation);
        }
    }
    if let Some(path) = &p.history_file {
        let json = serde_json::to_vec(&histories).expect("a history is plain data");
        std::fs::write(path, json)
            .map_err(|source| RegisterError::History { path: path.display().to_string(), source })?;
    }
    for key in 0..p.keys {
        let history = histories.remove(&key).unwrap_or_default();
        let verdict = linear::check(&history);
        report.linearizable &= verdict == Verdict::Linearizable;
        report.keys.push(KeyVerdict { key: key_name(run, key), operations: history.len() as u64, verdict });
    }
    Ok(report)
}
