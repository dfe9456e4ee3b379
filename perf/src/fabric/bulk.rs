//! `fabric.bulk_secure`: guest pages over the encrypted bulk lane, against the cipher alone.
//!
//! Ours is a transfer as syncvm makes it, pages of 4 KiB gathered into large messages, over the loopback interface:
//! one core sends, another receives, and each also pays for the kernel's TCP. The peer encrypts records of the same
//! size in place, over and over, on one core: nothing is copied, sent or decrypted. So a ratio of 1 is out of reach.

use std::io::IoSlice;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use dataplane::fabric::bulk::BulkLink;
use dataplane::fabric::{FabricKey, Listener, PeerId, Security};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::rtt::two_nodes;
use crate::group::Sink;
use crate::row::Row;
use crate::sample::{Better, Figure, compare, measure, thread_cpu_time};
use crate::{Effort, pin};

const PAGE_BYTES: usize = 4096;
const PAGES: usize = 1024;
const MESSAGE_BYTES: usize = PAGES * PAGE_BYTES;
/// Bytes of the stream in one record of the fabric; with the tag it is the largest Noise message.
const RECORD_BYTES: usize = 65_519;
const DEADLINE: Duration = Duration::from_secs(60);
const KIND_PAGES: u16 = 1;
const KIND_DONE: u16 = 2;

/// Measures.
///
/// # Errors
/// A connection that cannot be made or breaks, or a page that is not what was sent.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    // In a thread of its own, because it is pinned.
    let measuring = std::thread::spawn(move || measure_all(effort));
    let rows = measuring.join().map_err(|_| anyhow!("the measuring thread panicked"))??;
    rows.into_iter().try_for_each(&mut **sink)
}

fn measure_all(effort: Effort) -> Result<[Row; 2]> {
    let messages = effort.pick(256, 8);
    let [here, there] = pin::two_cpus()?;
    let mut transfer = Transfer::connect(there)?;
    pin::pin(here)?;
    let mut cipher = Cipher::new()?;
    let figure = Figure { id: "fabric.bulk_secure", unit: "GB/s", better: Better::Higher };
    let peer_name = "AES-256-GCM in place, one core";
    let wall = compare(
        figure,
        effort,
        peer_name,
        || Ok(transfer.run(messages)?.gb_per_s()),
        || cipher.gb_per_s(messages * MESSAGE_BYTES as u64),
    )?;
    // What a busy machine leaves alone: the time that the busier of the two cores really worked.
    let figure = Figure { id: "fabric.bulk_secure.per_core", ..figure };
    let per_core = measure(figure, effort, || Ok(transfer.run(messages)?.gb_per_cpu_s()))?;
    transfer.close()?;
    Ok([wall, per_core])
}

/// What one run moved, and what it took.
struct Moved {
    bytes: u64,
    wall: Duration,
    /// CPU time of the busier side.
    cpu: Duration,
}

impl Moved {
    fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / 1e9 / self.wall.as_secs_f64()
    }

    fn gb_per_cpu_s(&self) -> f64 {
        self.bytes as f64 / 1e9 / self.cpu.as_secs_f64()
    }
}

/// The sending end, and a thread that receives.
struct Transfer {
    link: BulkLink,
    receiver: JoinHandle<Result<()>>,
    pages: Vec<u8>,
    number: u64,
    /// Held for their threads.
    _listeners: [Listener; 2],
}

impl Transfer {
    fn connect(receiver_cpu: usize) -> Result<Transfer> {
        let (listeners, replicas) = two_nodes(&Security::Encrypted(FabricKey::generate()?))?;
        let left = listeners[0].register("perf", replicas.clone(), PeerId(0))?;
        let right = listeners[1].register("perf", replicas, PeerId(1))?;
        let deadline = Instant::now() + DEADLINE;
        let link = left.bulk.dial(PeerId(1), 1, 1, deadline)?;
        let incoming = right.bulk.wait(deadline).ok_or_else(|| anyhow!("the connection did not come"))?;
        let receiver = std::thread::Builder::new().name("bulk-receiver".to_owned()).spawn(move || {
            pin::pin(receiver_cpu)?;
            receive(incoming.link)
        })?;
        Ok(Transfer { link, receiver, pages: vec![0xA5; MESSAGE_BYTES], number: 0, _listeners: listeners })
    }

    fn run(&mut self, messages: u64) -> Result<Moved> {
        let deadline = Instant::now() + DEADLINE;
        let (start, start_cpu) = (Instant::now(), thread_cpu_time());
        for _ in 0..messages {
            self.number += 1;
            for page in self.pages.chunks_exact_mut(PAGE_BYTES) {
                page[..8].copy_from_slice(&self.number.to_le_bytes());
            }
            let slices: Vec<IoSlice<'_>> = self.pages.chunks_exact(PAGE_BYTES).map(IoSlice::new).collect();
            self.link.send(KIND_PAGES, &slices, deadline)?;
        }
        self.link.send(KIND_DONE, &[], deadline)?;
        let mut answer = Vec::new();
        ensure!(self.link.recv(&mut answer, deadline)? == KIND_DONE, "the receiver answered something else");
        let wall = start.elapsed();
        let receiver_ns = u64::from_le_bytes(answer[..].try_into()?);
        let cpu = (thread_cpu_time() - start_cpu).max(Duration::from_nanos(receiver_ns));
        Ok(Moved { bytes: messages * MESSAGE_BYTES as u64, wall, cpu })
    }

    /// Ends the receiving thread and returns its error if it had one.
    fn close(self) -> Result<()> {
        drop(self.link);
        self.receiver.join().map_err(|_| anyhow!("the receiving thread panicked"))?
    }
}

/// Receives and checks pages until the other side closes; answers each run with the CPU time that it took here.
fn receive(mut link: BulkLink) -> Result<()> {
    let (mut buf, mut number) = (Vec::new(), 0u64);
    let mut start_cpu = thread_cpu_time();
    loop {
        let deadline = Instant::now() + Duration::from_secs(600);
        let kind = match link.recv(&mut buf, deadline) {
            Ok(kind) => kind,
            Err(error) if error.is_peer_lost() => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if kind == KIND_DONE {
            let cpu_ns = (thread_cpu_time() - start_cpu).as_nanos() as u64;
            link.send(KIND_DONE, &[IoSlice::new(&cpu_ns.to_le_bytes())], deadline)?;
            start_cpu = thread_cpu_time();
            continue;
        }
        number += 1;
        ensure!(buf.len() == MESSAGE_BYTES, "a message of {} bytes came", buf.len());
        let right = |page: &[u8]| page[..8] == number.to_le_bytes() && page[PAGE_BYTES - 1] == 0xA5;
        ensure!(buf.chunks_exact(PAGE_BYTES).all(right), "a page of message {number} is not what was sent");
    }
}

/// The cipher alone.
struct Cipher {
    key: LessSafeKey,
    record: Vec<u8>,
    nonce: u64,
}

impl Cipher {
    fn new() -> Result<Cipher> {
        let key = UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| anyhow!("the key is not taken"))?;
        Ok(Cipher { key: LessSafeKey::new(key), record: vec![0xA5; RECORD_BYTES], nonce: 0 })
    }

    fn gb_per_s(&mut self, bytes: u64) -> Result<f64> {
        let records = bytes.div_ceil(RECORD_BYTES as u64);
        let start = Instant::now();
        for _ in 0..records {
            self.nonce += 1;
            let mut nonce = [0; 12];
            nonce[4..].copy_from_slice(&self.nonce.to_be_bytes());
            let nonce = Nonce::assume_unique_for_key(nonce);
            let tag = self.key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut self.record);
            let tag = tag.map_err(|_| anyhow!("the cipher refuses the record"))?;
            std::hint::black_box(tag.as_ref());
        }
        Ok((records * RECORD_BYTES as u64) as f64 / 1e9 / start.elapsed().as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_checked_and_threads_end() {
        let mut transfer = Transfer::connect(pin::two_cpus().unwrap()[1]).unwrap();
        for _ in 0..2 {
            let moved = transfer.run(2).unwrap();
            assert_eq!(moved.bytes, 2 * MESSAGE_BYTES as u64);
            assert!(moved.gb_per_s() > 0.0 && moved.gb_per_cpu_s() > 0.0);
        }
        transfer.close().unwrap();
    }

    #[test]
    fn a_page_that_is_not_what_was_sent_fails_the_run() {
        let mut transfer = Transfer::connect(pin::two_cpus().unwrap()[1]).unwrap();
        transfer.pages[5 * PAGE_BYTES - 1] = 0;
        assert!(transfer.run(1).is_err());
        assert!(transfer.close().unwrap_err().to_string().contains("is not what was sent"));
    }
}
