//! Reads every key of a ledger back on a fresh connection and compares.
//!
//! A blocking connection with pipelined batches is enough here: nothing is measured, only the values count. A verification that
//! could not finish says so and never counts as a success.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::ledger::{Generation, Ledger};
use super::protocol::{Verification, WrongRead};
use super::resp::{self, Reply};
use super::tally::{SAMPLES, describe, expectation};
use super::value::{Token, key_name};

/// Keys asked for at once.
const BATCH_KEYS: u32 = 256;
/// Pause between attempts to connect.
const RETRY: Duration = Duration::from_millis(100);

/// Reads every key back within `timeout`. Lost writes are also added to the ledger's `missing`, once each.
pub fn verify(address: SocketAddr, ledger: &mut Ledger, timeout: Duration) -> Verification {
    let mut result = Verification::default();
    if let Err(error) = read_all(address, ledger, Instant::now() + timeout, &mut result) {
        result.incomplete =
            Some(format!("reading the keys back from {address} stopped after {} keys: {error}", result.keys_checked));
    }
    result
}

fn read_all(address: SocketAddr, ledger: &mut Ledger, deadline: Instant, result: &mut Verification) -> io::Result<()> {
    let mut reader = Reader::connect(address, deadline, ledger.value_bytes)?;
    for owned in &ledger.generations {
        let keys = owned.acknowledged.len() as u32;
        for first in (0..keys).step_by(BATCH_KEYS as usize) {
            let batch = first..keys.min(first + BATCH_KEYS);
            let mut request = Vec::new();
            for key in batch.clone() {
                let name = key_name(ledger.run, owned.connection, owned.generation, key);
                resp::command(&mut request, &[b"GET", &name]);
            }
            reader.stream.write_all(&request)?;
            for key in batch {
                let reply = reader.reply(deadline)?;
                if let Reply::Error(text) = reply {
                    return Err(io::Error::other(String::from_utf8_lossy(text).into_owned()));
                }
                result.keys_checked += 1;
                if !compare(owned, key, reply, ledger.value_bytes, result) {
                    let acknowledged = owned.acknowledged[key as usize];
                    ledger.missing.insert((owned.connection, owned.generation, key, acknowledged));
                    record_loss(owned, ledger.run, key, reply, result);
                }
            }
        }
    }
    Ok(())
}

/// Whether a key holds its last acknowledged write, or one of the unanswered writes after it.
fn compare(owned: &Generation, key: u32, reply: Reply, value_bytes: usize, result: &mut Verification) -> bool {
    let acknowledged = owned.acknowledged[key as usize];
    let got = match reply {
        Reply::Nil => return acknowledged == 0,
        Reply::Bulk(bytes) => bytes,
        _ => return false,
    };
    let Some(token) = Token::of_value(got).filter(|token| token.is_value(got, value_bytes)) else {
        return false;
    };
    if acknowledged != 0 && token == owned.token(acknowledged) {
        return true;
    }
    let applied = owned.maybe.iter().any(|&(k, sequence)| k == key && token == owned.token(sequence));
    result.maybe_writes_applied += u64::from(applied);
    applied
}

fn record_loss(owned: &Generation, run: u32, key: u32, reply: Reply, result: &mut Verification) {
    result.acknowledged_writes_lost += 1;
    if result.lost.len() < SAMPLES {
        result.lost.push(WrongRead {
            t_ms: 0,
            key: owned.key_name(run, key),
            expected: expectation(owned, owned.acknowledged[key as usize]),
            got: describe(reply),
        });
    }
}

/// A blocking connection that ends with its deadline.
struct Reader {
    stream: TcpStream,
    input: Vec<u8>,
    at: usize,
    limit_bytes: usize,
}

impl Reader {
    fn connect(address: SocketAddr, deadline: Instant, value_bytes: usize) -> io::Result<Reader> {
        loop {
            let left = left(deadline)?;
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_write_timeout(Some(left))?;
                    let limit_bytes = value_bytes.max(4096);
                    return Ok(Reader { stream, input: Vec::new(), at: 0, limit_bytes });
                }
                Err(error) if left < RETRY => return Err(error),
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }

    fn reply(&mut self, deadline: Instant) -> io::Result<Reply<'_>> {
        loop {
            // Parsed twice when complete: the borrow checker cannot see that the first result ends with the loop.
            match resp::parse(&self.input[self.at..], self.limit_bytes) {
                Ok(Some(_)) => break,
                Ok(None) => self.receive(deadline)?,
                Err(error) => return Err(io::Error::other(error)),
            }
        }
        let (reply, used) = resp::parse(&self.input[self.at..], self.limit_bytes)
            .ok()
            .flatten()
            .expect("the same bytes were a reply a moment ago");
        self.at += used;
        Ok(reply)
    }

    fn receive(&mut self, deadline: Instant) -> io::Result<()> {
        self.input.drain(..self.at);
        self.at = 0;
        self.stream.set_read_timeout(Some(left(deadline)?))?;
        let mut buffer = [0; 65_536];
        match self.stream.read(&mut buffer) {
            Ok(0) => Err(io::Error::other("the server closed the connection")),
            Ok(count) => {
                self.input.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the time is over"));
    }
    Ok(left)
}
