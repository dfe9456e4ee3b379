//! The checking Redis load: many pipelined connections in one thread, every answer compared with what was acknowledged.
//!
//! One thread with epoll, because the client shares the machine's few cores with the guests that it loads: per wake-up and
//! connection one receive, one send and one look at the clock, for up to a whole pipeline of operations. redis-benchmark and
//! memtier were rejected: neither checks a single answer, and both reconnect silently.
//!
//! A connection is kept through any silence up to the idle limit, as a real client would; it is given up only after a
//! reset, an end of stream, a broken protocol or that limit, and each such case is counted.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use thiserror::Error;

use super::connection::{Connection, Loss, State};
use super::control::Control;
use super::ledger::Ledger;
use super::protocol::{Command, LoadParameters, LoadReport, Output, Progress};
use super::tally::Tally;
use super::usage::thread_cpu;
use super::value::{MAX_CONNECTIONS, MAX_KEYS, TOKEN_BYTES};
use super::verify;

/// Pause before the next attempt when a connection cannot be made.
const RETRY_US: u64 = 100_000;
/// The loop looks after its commands and timers at least that often.
const TICK_US: u64 = 10_000;

/// Why a load could not run. A server that answers wrongly is no such reason: that is a result.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Parameters that make no sense.
    #[error("parameter {name} is {value}; it must be {range}")]
    Parameter {
        /// Which.
        name: &'static str,
        /// As given.
        value: u64,
        /// What would be accepted.
        range: &'static str,
    },
    /// The server could not be reached in time.
    #[error(
        "{connected} of {wanted} connections to {address} within {timeout_ms} ms: is the server up and reachable from here?"
    )]
    Connect {
        /// Server.
        address: SocketAddr,
        /// Handshakes that succeeded.
        connected: usize,
        /// Connections asked for.
        wanted: usize,
        /// The limit.
        timeout_ms: u64,
    },
    /// The kernel refused something that always works.
    #[error("the load client cannot wait for its sockets: {0}")]
    Poll(#[from] Errno),
    /// The ledger could not be written.
    #[error("cannot write the ledger to {path}: {source}")]
    Ledger {
        /// Where.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// Runs the load until its duration is over or the control says stop, then drains, verifies and reports.
///
/// # Errors
/// [`LoadError`] when the load could not run at all.
pub fn run(
    parameters: &LoadParameters,
    control: &mut Control,
    emit: &mut dyn FnMut(Output),
) -> Result<LoadReport, LoadError> {
    check_parameters(parameters)?;
    let mut load = Load::new(parameters)?;
    load.connect_all()?;
    emit(Output::Started { run: load.run });
    let cpu_before = thread_cpu();
    load.serve(control, emit)?;
    let cpu = thread_cpu().saturating_sub(cpu_before);
    let address = load.p.address;
    let (mut report, mut ledger) = load.finish(cpu);
    if parameters.verify {
        let timeout = Duration::from_millis(parameters.verify_timeout_ms);
        report.verification = Some(verify::verify(address, &mut ledger, timeout));
    }
    report.acknowledged_writes_lost = ledger.missing.len() as u64;
    if let Some(path) = &parameters.ledger_file {
        let json = serde_json::to_vec(&ledger).expect("a ledger is plain data");
        std::fs::write(path, json).map_err(|source| LoadError::Ledger { path: path.display().to_string(), source })?;
    }
    Ok(report)
}

fn check_parameters(p: &LoadParameters) -> Result<(), LoadError> {
    let check = |ok: bool, name, value: u64, range| {
        if ok { Ok(()) } else { Err(LoadError::Parameter { name, value, range }) }
    };
    let connections = p.connections;
    check((1..=MAX_CONNECTIONS).contains(&connections), "connections", connections.into(), "1 to 4095")?;
    check((1..=65_536).contains(&p.in_flight), "in_flight", p.in_flight.into(), "1 to 65536")?;
    check((1..=p.in_flight).contains(&p.batch), "batch", p.batch.into(), "1 to in_flight")?;
    let keys = p.keys_per_connection;
    check((1..=MAX_KEYS).contains(&keys), "keys_per_connection", keys.into(), "1 to 1048575")?;
    let size = p.value_bytes;
    check((TOKEN_BYTES..=1 << 20).contains(&size), "value_bytes", size as u64, "16 to 1048576")?;
    check(p.get_percent <= 100, "get_percent", p.get_percent.into(), "0 to 100")?;
    let timeline = p.timeline_ms;
    check(timeline == 0 || timeline >= 5, "timeline_ms", timeline, "0 or at least 5")?;
    check(p.progress_ms >= 10, "progress_ms", p.progress_ms, "at least 10")
}

/// A number that other runs against the same server do not have.
pub(super) fn fresh_run(wanted: u32) -> u32 {
    let since_boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let drawn = (since_boot.tv_nsec as u32) ^ std::process::id().rotate_left(16);
    if wanted == 0 { drawn | 1 } else { wanted }
}

struct Load<'a> {
    p: &'a LoadParameters,
    run: u32,
    start: Instant,
    in_flight: u32,
    poll: rustix::fd::OwnedFd,
    connections: Vec<Connection>,
    tally: Tally,
    ledger: Ledger,
    serving: bool,
    stop_us: Option<u64>,
    next_progress_us: u64,
    next_tick_us: u64,
    longest_stall_us: u64,
}

impl<'a> Load<'a> {
    fn new(p: &'a LoadParameters) -> Result<Load<'a>, LoadError> {
        let run = fresh_run(p.run);
        Ok(Load {
            p,
            run,
            start: Instant::now(),
            in_flight: p.in_flight,
            poll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            connections: (0..p.connections).map(|number| Connection::new(number, run, p)).collect(),
            tally: Tally::new(run, 0, p.timeline_ms),
            ledger: Ledger { run, value_bytes: p.value_bytes, generations: Vec::new(), missing: Default::default() },
            serving: false,
            stop_us: None,
            next_progress_us: 0,
            next_tick_us: 0,
            longest_stall_us: 0,
        })
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    fn connect_all(&mut self) -> Result<(), LoadError> {
        let mut events = Vec::with_capacity(64);
        loop {
            let now_us = self.now_us();
            self.retry_connections(now_us);
            let connected = self.connections.iter().filter(|c| c.state == State::Up).count();
            if connected == self.connections.len() {
                break;
            }
            if now_us > self.p.connect_timeout_ms * 1000 {
                return Err(LoadError::Connect {
                    address: self.p.address,
                    connected,
                    wanted: self.connections.len(),
                    timeout_ms: self.p.connect_timeout_ms,
                });
            }
            self.wait(&mut events, TICK_US)?;
            for event in &events {
                let number = event.data.u64() as usize;
                if self.connections[number].state == State::Connecting {
                    self.handshake_over(number, now_us);
                } else {
                    // Nothing was sent yet: an event here is an early end, to be tried again.
                    self.close(number, now_us + RETRY_US);
                }
            }
        }
        self.start = Instant::now();
        self.serving = true;
        self.tally = Tally::new(self.run, 0, self.p.timeline_ms);
        for connection in &mut self.connections {
            connection.waiting_since_us = 0;
        }
        Ok(())
    }

    fn wait(&self, events: &mut Vec<epoll::Event>, timeout_us: u64) -> Result<(), Errno> {
        events.clear();
        let timeout =
            Timespec { tv_sec: (timeout_us / 1_000_000) as i64, tv_nsec: ((timeout_us % 1_000_000) * 1000) as i64 };
        match epoll::wait(&self.poll, rustix::buffer::spare_capacity(events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn serve(&mut self, control: &mut Control, emit: &mut dyn FnMut(Output)) -> Result<(), LoadError> {
        let mut events = Vec::with_capacity(64);
        for number in 0..self.connections.len() {
            self.attend(number, 0, |connection, in_flight, _| connection.refill(in_flight, 0));
        }
        let mut now_us = self.now_us();
        loop {
            let before_us = now_us;
            self.wait(&mut events, self.next_tick_us.saturating_sub(before_us).clamp(1, TICK_US))?;
            now_us = self.now_us();
            let late_us = (now_us - before_us).saturating_sub(TICK_US);
            self.longest_stall_us = self.longest_stall_us.max(late_us);
            while let Some((at, command)) = control.poll() {
                self.obey(at, command, emit);
            }
            for event in &events {
                self.ready(event.data.u64() as usize, event.flags, now_us);
            }
            if now_us >= self.next_tick_us {
                self.next_tick_us = now_us + TICK_US;
                if self.tick(now_us, emit) {
                    return Ok(());
                }
            }
        }
    }

    fn obey(&mut self, at: Instant, command: Command, emit: &mut dyn FnMut(Output)) {
        let at_us = at.saturating_duration_since(self.start).as_micros() as u64;
        match command {
            Command::Mark(label) => {
                self.tally.meter.mark(&label, at_us);
                emit(Output::Marked { label, t_ms: at_us as f64 / 1000.0 });
            }
            Command::InFlight(in_flight) => self.in_flight = in_flight.clamp(1, self.p.in_flight),
            Command::Stop(stop) => {
                if stop {
                    self.stop_us.get_or_insert(at_us);
                }
            }
        }
    }

    fn ready(&mut self, number: usize, flags: epoll::EventFlags, now_us: u64) {
        if self.connections[number].state == State::Connecting {
            self.handshake_over(number, now_us);
            return;
        }
        let stopping = self.stop_us.is_some();
        self.attend(number, now_us, |connection, in_flight, tally| {
            if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::ERR | epoll::EventFlags::HUP) {
                connection.receive(now_us, tally)?;
            }
            if stopping { connection.flush() } else { connection.refill(in_flight, now_us) }
        });
    }

    /// Does something with a connection, gives it up if that fails, and watches for room in its socket if need be.
    fn attend(
        &mut self,
        number: usize,
        now_us: u64,
        act: impl FnOnce(&mut Connection, u32, &mut Tally) -> Result<(), Loss>,
    ) {
        let connection = &mut self.connections[number];
        if connection.state != State::Up {
            return;
        }
        let was_blocked = connection.unsent();
        match act(connection, self.in_flight, &mut self.tally) {
            Ok(()) if connection.unsent() != was_blocked => self.watch(number),
            Ok(()) => {}
            Err(loss) => {
                self.tally.connection_lost(number as u16, now_us, &loss.to_string());
                self.close(number, now_us + RETRY_US);
            }
        }
    }

    /// Tells epoll what this connection waits for.
    fn watch(&mut self, number: usize) {
        let connection = &self.connections[number];
        let Some(socket) = &connection.socket else {
            return;
        };
        let mut flags = epoll::EventFlags::IN;
        if connection.unsent() || connection.state == State::Connecting {
            flags |= epoll::EventFlags::OUT;
        }
        let data = epoll::EventData::new_u64(number as u64);
        let result = match epoll::modify(&self.poll, socket, data, flags) {
            Err(Errno::NOENT) => epoll::add(&self.poll, socket, data, flags),
            other => other,
        };
        result.expect("epoll accepts any socket that this process just made");
    }

    fn handshake_over(&mut self, number: usize, now_us: u64) {
        match self.connections[number].connected(now_us) {
            Ok(()) => {
                self.watch(number);
                if self.serving && self.stop_us.is_none() {
                    self.attend(number, now_us, |c, in_flight, _| c.refill(in_flight, now_us));
                }
            }
            Err(_) => self.close(number, now_us + RETRY_US),
        }
    }

    fn close(&mut self, number: usize, retry_us: u64) {
        if let Some(used) = self.connections[number].give_up(retry_us) {
            self.ledger.generations.push(used);
        }
    }

    fn retry_connections(&mut self, now_us: u64) {
        for number in 0..self.connections.len() {
            let State::Down { retry_us } = self.connections[number].state else {
                continue;
            };
            if now_us < retry_us {
                continue;
            }
            match self.connections[number].connect(self.p.address) {
                Ok(()) => self.watch(number),
                Err(_) => self.close(number, now_us + RETRY_US),
            }
        }
    }

    /// Timers; true when the load is over.
    fn tick(&mut self, now_us: u64, emit: &mut dyn FnMut(Output)) -> bool {
        if self.p.duration_ms != 0 && now_us >= self.p.duration_ms * 1000 {
            self.stop_us.get_or_insert(now_us);
        }
        if self.connections.iter().all(Connection::finished) {
            self.stop_us.get_or_insert(now_us);
        }
        if now_us >= self.next_progress_us {
            self.next_progress_us = now_us + self.p.progress_ms * 1000;
            emit(Output::Progress(self.progress(now_us)));
        }
        let limit_us = self.p.idle_limit_ms * 1000;
        for number in 0..self.connections.len() {
            let connection = &self.connections[number];
            let silent_us = now_us.saturating_sub(connection.waiting_since_us);
            if connection.in_flight() > 0 && silent_us > limit_us {
                self.attend(number, now_us, |_, _, _| Err(Loss::Idle(silent_us / 1000)));
            }
        }
        if let Some(stop_us) = self.stop_us {
            let drained = self.connections.iter().all(|connection| connection.in_flight() == 0);
            return drained || now_us >= stop_us + self.p.drain_ms * 1000;
        }
        self.retry_connections(now_us);
        false
    }

    fn progress(&self, now_us: u64) -> Progress {
        Progress {
            t_ms: now_us as f64 / 1000.0,
            ops: self.tally.meter.operations(),
            acknowledged_writes: self.tally.acknowledged_writes,
            last_answer_ms: now_us.saturating_sub(self.tally.meter.last_answer_us()) as f64 / 1000.0,
            connections_lost: self.tally.connections_lost,
            wrong_reads: self.tally.wrong_reads,
            errors: self.tally.errors,
        }
    }

    fn finish(mut self, cpu: Duration) -> (LoadReport, Ledger) {
        let now_us = self.now_us();
        let waiting = self.connections.iter().any(|connection| connection.in_flight() > 0);
        for connection in &mut self.connections {
            self.ledger.generations.push(connection.settle());
        }
        let tally = self.tally;
        let operations = tally.meter.operations();
        let end_us = if waiting { now_us } else { tally.meter.last_answer_us() };
        let measured = tally.meter.finish(now_us, waiting);
        let longest =
            |value: fn(&super::protocol::WindowReport) -> f64| measured.windows.iter().map(value).fold(0.0, f64::max);
        self.ledger.missing = tally.missing;
        let report = LoadReport {
            run: self.run,
            duration_ms: end_us as f64 / 1000.0,
            operations,
            ops_per_s: operations as f64 * 1e6 / end_us.max(1) as f64,
            acknowledged_writes: tally.acknowledged_writes,
            acknowledged_writes_lost: 0,
            wrong_reads: tally.wrong_reads,
            wrong_read_samples: tally.wrong_read_samples,
            errors: tally.errors,
            error_samples: tally.error_samples,
            connections_lost: tally.connections_lost,
            loss_samples: tally.loss_samples,
            unanswered_writes: self.ledger.generations.iter().map(|g| g.maybe.len() as u64).sum(),
            gap_ms: longest(|window| window.gap_ms),
            connection_gap_ms: longest(|window| window.connection_gap_ms),
            windows: measured.windows,
            latency: measured.latency,
            series_100ms: measured.series,
            timeline: measured.timeline,
            cpu_ns_per_operation: cpu.as_nanos() as f64 / operations.max(1) as f64,
            longest_stall_ms: self.longest_stall_us as f64 / 1000.0,
            verification: None,
        };
        (report, self.ledger)
    }
}

/// Asks once whether a Redis server answers PING.
///
/// # Errors
/// It cannot be reached, does not answer in time, or answers something else (for instance that it is still loading).
pub fn probe(address: SocketAddr, timeout: Duration) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, timeout)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(b"PING\r\n")?;
    let mut answer = [0; 7];
    stream.read_exact(&mut answer)?;
    if &answer == b"+PONG\r\n" {
        return Ok(());
    }
    Err(io::Error::other(format!("PING was answered with {:?}", String::from_utf8_lossy(&answer))))
}
