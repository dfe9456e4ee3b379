//! A load for memcached that checks each answer, in one thread.
//!
//! Rejected: memcaslap, which Debian has, tells no quantiles, and memtier_benchmark, which Debian has not.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::client::{Client, Speed};
use crate::sample::Latencies;

/// Longest silence of the guest.
const SILENCE: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };
const VALUE_BYTES: usize = 64;
/// Of ten requests one sets, as in a cache.
const SETS_ONE_IN: u64 = 10;

/// While the keys are made.
const SETS_AT_ONCE: usize = 100;

/// What the load does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Connections.
    pub connections: usize,
    /// Requests that each sends at once; the next when all are answered, as redis-benchmark does it. (One for each answer
    /// would make the load depend on the policy: answers that were held come together, and so would requests, in
    /// packets that cost the guest less than one for each.)
    pub in_flight: usize,
    /// Keys that all connections choose from.
    pub keys: u64,
}

impl Load {
    /// Sets every key once.
    ///
    /// # Errors
    /// memcached refuses.
    pub fn prepare(&self, client: &Client<'_>) -> Result<()> {
        client.here(|| self.prepare_here(client.address))?
    }

    fn prepare_here(&self, address: SocketAddr) -> Result<()> {
        let mut one = Connection::new(address)?;
        for first in (0..self.keys).step_by(SETS_AT_ONCE) {
            (first..self.keys.min(first + SETS_AT_ONCE as u64)).for_each(|key| one.push(key, true));
            one.exchange()?;
            while !one.under_way.is_empty() {
                wait(std::slice::from_ref(&one))?;
                one.exchange()?;
            }
        }
        Ok(())
    }

    /// Loads for so many milliseconds.
    ///
    /// # Errors
    /// An answer is wrong or late.
    pub fn run(&self, client: &Client<'_>, milliseconds: u64) -> Result<Speed> {
        client.here(|| self.run_here(client.address, Duration::from_millis(milliseconds)))?
    }

    fn run_here(&self, address: SocketAddr, length: Duration) -> Result<Speed> {
        let connections = (0..self.connections).map(|_| Connection::new(address));
        let mut connections = connections.collect::<Result<Vec<_>>>()?;
        // Any sequence will do that is the same in each run and jumps about.
        let mut state = 1u64;
        let mut push = |connection: &mut Connection| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            connection.push((state >> 33) % self.keys, (state >> 20).is_multiple_of(SETS_ONE_IN));
        };
        let start = Instant::now();
        for connection in &mut connections {
            (0..self.in_flight).for_each(|_| push(connection));
            connection.send()?;
        }
        let mut operations = 0;
        let mut latencies = Latencies::default();
        while start.elapsed() < length {
            for at in wait(&connections)? {
                let connection = &mut connections[at];
                for sent in connection.exchange()? {
                    latencies.add(sent.elapsed());
                    operations += 1;
                }
                if connection.under_way.is_empty() {
                    (0..self.in_flight).for_each(|_| push(connection));
                    connection.send()?;
                }
            }
        }
        let per_s = operations as f64 / start.elapsed().as_secs_f64();
        ensure!(operations > 0, "no answer within {length:?}");
        Ok(Speed { per_s, p50_us: latencies.p50_us(), p99_us: latencies.p99_us(), operations })
    }
}

/// Waits until some connection has something to read, or room for what it has to write.
fn wait(connections: &[Connection]) -> Result<Vec<usize>> {
    let mut ready: Vec<PollFd<'_>> = connections
        .iter()
        .map(|one| {
            let writes = if one.output.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            PollFd::new(&one.stream, PollFlags::IN | writes)
        })
        .collect();
    let count = poll(&mut ready, Some(&SILENCE)).context("cannot wait for answers")?;
    ensure!(count > 0, "memcached is silent");
    let woken = ready.iter().enumerate().filter(|(_, one)| !one.revents().is_empty());
    Ok(woken.map(|(at, _)| at).collect())
}

struct Request {
    sent: Instant,
    key: u64,
    sets: bool,
}

struct Connection {
    stream: TcpStream,
    output: Vec<u8>,
    input: Vec<u8>,
    under_way: VecDeque<Request>,
}

impl Connection {
    fn new(address: SocketAddr) -> Result<Connection> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Connection { stream, output: Vec::new(), input: Vec::new(), under_way: VecDeque::new() })
    }

    fn push(&mut self, key: u64, sets: bool) {
        if sets {
            let head = format!("set key:{key} 0 0 {VALUE_BYTES}\r\n");
            self.output.extend_from_slice(head.as_bytes());
            self.output.extend_from_slice(&value(key));
            self.output.extend_from_slice(b"\r\n");
        } else {
            self.output.extend_from_slice(format!("get key:{key}\r\n").as_bytes());
        }
        self.under_way.push_back(Request { sent: Instant::now(), key, sets });
    }

    /// Writes what can be.
    fn send(&mut self) -> Result<()> {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Writes and reads what can be; returns when the requests were sent that are answered now.
    fn exchange(&mut self) -> Result<Vec<Instant>> {
        self.send()?;
        let mut room = [0; 16 << 10];
        loop {
            match self.stream.read(&mut room) {
                Ok(0) => bail!("memcached closed a connection"),
                Ok(count) => self.input.extend_from_slice(&room[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.take_answers()
    }

    fn take_answers(&mut self) -> Result<Vec<Instant>> {
        let (mut at, mut answered) = (0, Vec::new());
        while let Some(request) = self.under_way.front() {
            let expected = expected(request);
            let rest = &self.input[at..];
            if rest.len() < expected.len() {
                ensure!(expected.starts_with(rest), "memcached answers «{}»", String::from_utf8_lossy(rest));
                break;
            }
            let (answer, _) = rest.split_at(expected.len());
            ensure!(answer == expected, "memcached answers «{}»", String::from_utf8_lossy(answer));
            at += expected.len();
            answered.extend(self.under_way.pop_front().map(|request| request.sent));
        }
        self.input.drain(..at);
        Ok(answered)
    }
}

/// Each key has one value for ever, so that every answer is known.
fn value(key: u64) -> [u8; VALUE_BYTES] {
    let mut value = [b'.'; VALUE_BYTES];
    let text = key.to_string();
    value[..text.len()].copy_from_slice(text.as_bytes());
    value
}

fn expected(request: &Request) -> Vec<u8> {
    if request.sets {
        return b"STORED\r\n".to_vec();
    }
    let mut text = format!("VALUE key:{} 0 {VALUE_BYTES}\r\n", request.key).into_bytes();
    text.extend_from_slice(&value(request.key));
    text.extend_from_slice(b"\r\nEND\r\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    const LOAD: Load = Load { connections: 3, in_flight: 4, keys: 50 };

    /// Answers one connection in memcached's way, `lie` in place of a value.
    fn serve(stream: TcpStream, lie: Option<u8>) {
        let mut lines = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        while lines.read_line(&mut line).is_ok_and(|count| count > 0) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let key = words[1].strip_prefix("key:").unwrap().parse().unwrap();
            let mut answer = expected(&Request { sent: Instant::now(), key, sets: words[0] == "set" });
            if words[0] == "set" {
                let mut value = [0; VALUE_BYTES + 2];
                lines.read_exact(&mut value).unwrap();
            } else if let Some(lie) = lie {
                answer[25] = lie;
            }
            if (&stream).write_all(&answer).is_err() {
                return;
            }
            line.clear();
        }
    }

    fn server(lie: Option<u8>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || serve(stream, lie));
            }
        });
        address
    }

    #[test]
    fn answers_are_counted_and_timed() {
        let start = Instant::now();
        let speed = LOAD.run_here(server(None), Duration::from_millis(50)).unwrap();
        assert!(start.elapsed() < Duration::from_secs(10), "an answer was taken and no request followed");
        assert!(speed.operations > 10 && speed.p50_us > 0.0 && speed.p99_us >= speed.p50_us, "{speed:?}");
    }

    #[test]
    fn all_keys_are_set_without_a_pause() {
        let start = Instant::now();
        Load { keys: 250, ..LOAD }.prepare_here(server(None)).unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "it waited for an answer that it had: {:?}",
            start.elapsed()
        );
    }

    #[test]
    fn a_wrong_value_is_noticed() {
        let error = LOAD.run_here(server(Some(b'X')), Duration::from_secs(5)).unwrap_err().to_string();
        assert!(error.contains("memcached answers «VALUE key:"), "{error}");
    }
}
