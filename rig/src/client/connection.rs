//! One nonblocking connection of the Redis load: its pipeline, its buffers and the keys that it owns.
//!
//! Requests are encoded straight into one output buffer and sent with one system call per refill; answers are parsed in place
//! in the input buffer. Nothing is allocated per operation. Redis answers a connection's requests in order, so when the
//! answer to a GET is parsed, the ledger holds exactly the write that it must show.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, sockopt};
use thiserror::Error;

use super::ledger::Generation;
use super::protocol::LoadParameters;
use super::resp::{self, Reply, RespError};
use super::rng::Rng;
use super::tally::Tally;
use super::value::{self, KEY_BYTES};

/// Why a connection that stood had to be given up.
#[derive(Debug, Error)]
pub enum Loss {
    /// The server closed it.
    #[error("the server closed the connection")]
    Closed,
    /// The kernel reports an error, for instance a reset.
    #[error("the connection failed: {0}")]
    Failed(#[from] Errno),
    /// No answer for too long.
    #[error("no answer for {0} ms although one was due")]
    Idle(u64),
    /// What came is no reply.
    #[error("the server broke the protocol: {0}")]
    Protocol(#[from] RespError),
    /// A reply that nobody asked for.
    #[error("the server answered without having been asked")]
    Unsolicited,
}

/// A request in flight.
#[derive(Debug, Clone, Copy)]
struct Request {
    sent_us: u64,
    key: u32,
    /// Sequence number of a SET; 0 is a GET.
    sequence: u64,
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// To be connected at this time.
    Down {
        /// In microseconds since the start.
        retry_us: u64,
    },
    /// The handshake is under way.
    Connecting,
    /// In use.
    Up,
}

/// One connection; see the module's description.
pub struct Connection {
    /// Present unless [`State::Down`].
    pub socket: Option<OwnedFd>,
    /// See [`State`].
    pub state: State,
    /// The keys in use.
    pub owned: Generation,
    /// For gaps: when it last heard anything, across reconnects.
    pub last_answer_us: u64,
    /// For the idle limit: when it was connected, or last heard anything, or began to wait again.
    pub waiting_since_us: u64,
    run: u32,
    value_bytes: usize,
    keys: u32,
    get_percent: u8,
    batch: u32,
    sequence: u64,
    /// Requests that may still be sent.
    budget: u64,
    requests: VecDeque<Request>,
    output: Vec<u8>,
    sent: usize,
    input: Vec<u8>,
    filled: usize,
    get_template: Vec<u8>,
    set_template: Vec<u8>,
    rng: Rng,
}

impl Connection {
    /// A connection that is still down.
    pub fn new(number: u16, run: u32, p: &LoadParameters) -> Connection {
        let request_bytes = p.value_bytes + KEY_BYTES + 64;
        let mut connection = Connection {
            socket: None,
            state: State::Down { retry_us: 0 },
            owned: Generation::new(number, 0, p.keys_per_connection),
            last_answer_us: 0,
            waiting_since_us: 0,
            run,
            value_bytes: p.value_bytes,
            keys: p.keys_per_connection,
            get_percent: p.get_percent,
            batch: p.batch,
            sequence: 0,
            budget: if p.requests_per_connection == 0 { u64::MAX } else { p.requests_per_connection },
            requests: VecDeque::with_capacity(p.in_flight as usize),
            output: Vec::with_capacity(p.in_flight as usize * request_bytes),
            sent: 0,
            // Room for a whole pipeline of answers, and for the longest error line in any case.
            input: vec![0; p.in_flight as usize * (p.value_bytes + 16) + 2 * resp::MAX_LINE_BYTES],
            filled: 0,
            get_template: Vec::new(),
            set_template: Vec::new(),
            rng: Rng::new(p.seed.wrapping_mul(0x1_0000_01b3) ^ u64::from(number)),
        };
        connection.make_templates();
        connection
    }

    fn make_templates(&mut self) {
        let key = value::key_name(self.run, self.owned.connection, self.owned.generation, 0);
        self.get_template.clear();
        resp::command(&mut self.get_template, &[b"GET", &key]);
        self.set_template.clear();
        resp::command(&mut self.set_template, &[b"SET", &key, b""]);
        // The value's own header and bytes follow per request; cut off the empty one.
        self.set_template.truncate(self.set_template.len() - b"$0\r\n\r\n".len());
        self.set_template.extend_from_slice(format!("${}\r\n", self.value_bytes).as_bytes());
    }

    /// Begins a handshake.
    ///
    /// # Errors
    /// The kernel refuses at once.
    pub fn connect(&mut self, address: SocketAddr) -> Result<(), Errno> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let tcp = Some(ipproto::TCP);
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, tcp)?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error),
        }
        self.socket = Some(socket);
        self.state = State::Connecting;
        Ok(())
    }

    /// The handshake is over: with success, or with the error returned.
    ///
    /// # Errors
    /// What the kernel says about the handshake.
    pub fn connected(&mut self, now_us: u64) -> Result<(), Errno> {
        let socket = self.socket.as_ref().ok_or(Errno::NOTCONN)?;
        sockopt::socket_error(socket)??;
        self.state = State::Up;
        self.waiting_since_us = now_us;
        Ok(())
    }

    /// Requests that wait for an answer.
    pub fn in_flight(&self) -> usize {
        self.requests.len()
    }

    /// Whether every request that it may send was sent and answered (or lost).
    pub fn finished(&self) -> bool {
        self.budget == 0 && self.requests.is_empty()
    }

    /// Whether a part of the output still waits for room in the socket.
    pub fn unsent(&self) -> bool {
        self.sent < self.output.len()
    }

    /// Fills the pipeline up to `in_flight` requests and sends as much as the socket takes.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn refill(&mut self, in_flight: u32, now_us: u64) -> Result<(), Loss> {
        if !self.unsent() {
            self.output.clear();
            self.sent = 0;
            let free = in_flight.saturating_sub(self.requests.len() as u32);
            if free < self.batch.min(in_flight) || free == 0 || self.budget == 0 {
                return Ok(());
            }
            let count = self.budget.min(free.into());
            self.budget -= count;
            if self.requests.is_empty() {
                self.waiting_since_us = now_us;
            }
            for _ in 0..count {
                self.push_request(now_us);
            }
        }
        self.flush()
    }

    fn push_request(&mut self, now_us: u64) {
        let key = self.rng.below(self.keys);
        let sequence = if self.rng.percent(self.get_percent) {
            0
        } else {
            self.sequence += 1;
            self.sequence
        };
        let start = self.output.len();
        let template = if sequence == 0 { &self.get_template } else { &self.set_template };
        self.output.extend_from_slice(template);
        // Both templates begin «*n CRLF $3 CRLF XXX CRLF $kk CRLF key»; the key's number is the end of its name.
        let key_end = start + b"*2\r\n$3\r\nGET\r\n$22\r\n".len() + KEY_BYTES;
        value::hex(&mut self.output[key_end - 5..key_end], u64::from(key));
        if sequence != 0 {
            self.owned.token(sequence).write_value(self.value_bytes, &mut self.output);
            self.output.extend_from_slice(b"\r\n");
        }
        self.requests.push_back(Request { sent_us: now_us, key, sequence });
    }

    /// Sends what is left of the output.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn flush(&mut self) -> Result<(), Loss> {
        let socket = self.socket.as_ref().ok_or(Loss::Closed)?;
        while self.sent < self.output.len() {
            match rustix::net::send(socket, &self.output[self.sent..], SendFlags::NOSIGNAL) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Receives once and checks every complete answer. More may be waiting; a level-triggered poll says so.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn receive(&mut self, now_us: u64, tally: &mut Tally) -> Result<(), Loss> {
        let socket = self.socket.as_ref().ok_or(Loss::Closed)?;
        let room = &mut self.input[self.filled..];
        let count = match rustix::net::recv(socket, room, RecvFlags::empty()) {
            Ok((0, _)) => return Err(Loss::Closed),
            Ok((count, _)) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        self.filled += count;
        self.check_answers(now_us, tally)
    }

    fn check_answers(&mut self, now_us: u64, tally: &mut Tally) -> Result<(), Loss> {
        let mut at = 0;
        let mut answers = 0;
        // Requests of one refill left together: their latencies are recorded together.
        let (mut group_sent_us, mut group) = (0, 0);
        let broken = loop {
            let parsed = resp::parse(&self.input[at..self.filled], self.value_bytes.max(4096));
            let (reply, used) = match parsed {
                Ok(Some(found)) => found,
                Ok(None) => break None,
                Err(error) => break Some(Loss::Protocol(error)),
            };
            let Some(request) = self.requests.pop_front() else {
                break Some(Loss::Unsolicited);
            };
            if request.sent_us != group_sent_us {
                tally.meter.latency(now_us, now_us.saturating_sub(group_sent_us), group);
                (group_sent_us, group) = (request.sent_us, 0);
            }
            group += 1;
            answers += 1;
            check(request, reply, &mut self.owned, self.value_bytes, now_us, tally);
            at += used;
        };
        if answers > 0 {
            tally.meter.latency(now_us, now_us.saturating_sub(group_sent_us), group);
            tally.meter.answers(now_us, answers, self.last_answer_us);
            self.last_answer_us = now_us;
            self.waiting_since_us = now_us;
        }
        self.input.copy_within(at..self.filled, 0);
        self.filled -= at;
        broken.map_or(Ok(()), Err)
    }

    /// Closes the connection. Returns the keys it owned with its unanswered writes marked as uncertain, or `None` if
    /// it had sent nothing.
    pub fn give_up(&mut self, retry_us: u64) -> Option<Generation> {
        self.socket = None;
        // A connection that used up its generations stays down: fresh keys are what makes the check exact.
        let worn_out = self.owned.generation == value::MAX_CONNECTIONS;
        self.state = State::Down { retry_us: if worn_out { u64::MAX } else { retry_us } };
        self.output.clear();
        self.sent = 0;
        self.filled = 0;
        if self.sequence == 0 && self.requests.is_empty() {
            return None;
        }
        let used = self.settle();
        if !worn_out {
            self.owned = Generation::new(used.connection, used.generation + 1, self.keys);
            self.sequence = 0;
            self.make_templates();
        }
        Some(used)
    }

    /// The owned keys, with unanswered writes marked as uncertain.
    pub fn settle(&mut self) -> Generation {
        for request in self.requests.drain(..).filter(|request| request.sequence != 0) {
            self.owned.maybe.push((request.key, request.sequence));
        }
        self.owned.clone()
    }
}

/// Compares one answer with what had been acknowledged before it.
fn check(request: Request, reply: Reply, owned: &mut Generation, value_bytes: usize, now_us: u64, tally: &mut Tally) {
    let acknowledged = owned.acknowledged[request.key as usize];
    let right = match (request.sequence, reply) {
        (_, Reply::Error(text)) => {
            tally.error(text);
            return;
        }
        (0, Reply::Bulk(got)) if acknowledged != 0 => owned.token(acknowledged).is_value(got, value_bytes),
        (0, Reply::Nil) => acknowledged == 0,
        (0, _) => false,
        (sequence, Reply::Simple(b"OK")) => {
            owned.acknowledged[request.key as usize] = sequence;
            tally.acknowledged_writes += 1;
            true
        }
        (_, other) => {
            tally.error(format!("SET was answered with {other:?}").as_bytes());
            return;
        }
    };
    if !right {
        tally.wrong_read(owned, request.key, reply, now_us);
    }
}
