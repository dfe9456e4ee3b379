//! `fabric.shm.rtt`: a message there and back through shared memory, against a cache line that two threads pass to and fro.
//!
//! Both sides spin, as reactors do that have a core each. One thread answers for both, so that never two spin on one CPU,
//! and it sleeps between the runs. The line carries a number and is all that a round trip needs: two transfers of one
//! line. A message of 64 bytes with its header lies on two lines, which leave the sender one behind the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dataplane::fabric::{Fabric, FabricEvent, FabricKey, Listener, Security, Transport};
use dataplane::wait::now_us;

use super::rtt::{End, MESSAGE_BYTES, two_nodes};
use crate::group::Sink;
use crate::row::Row;
use crate::sample::{Better, Figure, compare};
use crate::{Effort, pin};

/// Its row.
pub(super) const ID: &str = "fabric.shm.rtt";
/// Round trips between two looks at the clock, which costs as much as a transfer.
const BATCH: u64 = 200;
const DEADLINE: Duration = Duration::from_secs(20);

const REST: u8 = 0;
const FABRIC: u8 = 1;
const LINE: u8 = 2;
const STOP: u8 = 3;

/// Measures.
///
/// # Errors
/// Fewer than two CPUs, no connection within 20 s, or an answer that is not what was sent.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    // In a thread of its own, because it is pinned.
    let measuring = std::thread::spawn(move || measure(effort));
    let row = measuring.join();
    sink(row.map_err(|_| anyhow!("the measuring thread panicked"))??)
}

fn measure(effort: Effort) -> Result<Row> {
    let batches = effort.pick(1_000, 20);
    let [here, there] = pin::two_cpus()?;
    ensure!(here != there, "two threads that spin need two CPUs");
    let mut pair = Pair::connect(there)?;
    // Now, so that the thread made above did not inherit it.
    pin::pin(here)?;
    let figure = Figure { id: ID, unit: "ns", better: Better::Lower };
    let pair_cell = std::cell::RefCell::new(&mut pair);
    let row = compare(
        figure,
        effort,
        "bare cache-line ping-pong",
        || pair_cell.borrow_mut().run(FABRIC, batches, Pair::fabric_trip),
        || pair_cell.borrow_mut().run(LINE, batches, Pair::line_trip),
    )?;
    pair.close()?;
    Ok(row)
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Line(AtomicU64);

/// What the two threads share.
#[derive(Debug, Default)]
struct Shared {
    mode: AtomicU8,
    line: Line,
}

/// This end, and the thread that answers on the other.
struct Pair {
    end: End,
    message: [u8; MESSAGE_BYTES],
    trips: u64,
    shared: Arc<Shared>,
    echo: Option<JoinHandle<Result<()>>>,
    /// Held for their threads, which took the connections.
    _listeners: [Listener; 2],
}

impl Pair {
    fn connect(echo_cpu: usize) -> Result<Pair> {
        let (listeners, mut replicas) = two_nodes(&Security::Encrypted(FabricKey::generate()?))?;
        for replica in &mut replicas {
            replica.transports = vec![Transport::Shm];
        }
        let mut end = End::new(&listeners[0], replicas.clone(), 0)?;
        let mut other = End::new(&listeners[1], replicas, 1)?;
        let shared = Arc::<Shared>::default();
        let seen = Arc::clone(&shared);
        let echo = std::thread::Builder::new().name("shm-echo".to_owned()).spawn(move || {
            other.until_connected()?;
            pin::pin(echo_cpu)?;
            answer(&mut other, &seen)
        })?;
        end.until_connected()?;
        ensure!(end.fabric.has_memory_lanes(), "the pair does not use shared memory");
        Ok(Pair { end, message: [0xA5; MESSAGE_BYTES], trips: 0, shared, echo: Some(echo), _listeners: listeners })
    }

    fn echo_thread(&self) -> &std::thread::Thread {
        self.echo.as_ref().expect("only close takes it").thread()
    }

    /// The median over `batches` of the time for a round trip, ns.
    fn run(&mut self, mode: u8, batches: u64, mut trip: impl FnMut(&mut Pair) -> Result<()>) -> Result<f64> {
        self.shared.mode.store(mode, Ordering::Release);
        self.echo_thread().unpark();
        let mut times_ns = Vec::with_capacity(batches as usize);
        let outcome = (0..batches).try_for_each(|_| {
            let start = Instant::now();
            (0..BATCH).try_for_each(|_| trip(self))?;
            times_ns.push(start.elapsed().as_nanos() as f64 / BATCH as f64);
            Ok(())
        });
        self.shared.mode.store(REST, Ordering::Release);
        times_ns.sort_by(f64::total_cmp);
        outcome.map(|()| times_ns[times_ns.len() / 2])
    }

    fn fabric_trip(&mut self) -> Result<()> {
        self.trips += 1;
        self.message[..8].copy_from_slice(&self.trips.to_le_bytes());
        self.end.fabric.send(self.end.peer, &[&self.message])?;
        let start_us = now_us();
        let (message, mut came) = (&self.message, None);
        for turn in 1u64.. {
            self.end.fabric.poll_lanes(start_us, &mut |event| {
                came = Some(matches!(event, FabricEvent::Message { bytes, .. } if bytes == message));
            });
            if came.is_some() {
                break;
            }
            check_time(turn, start_us)?;
        }
        ensure!(came == Some(true), "the fabric brought something else back");
        Ok(())
    }

    fn line_trip(&mut self) -> Result<()> {
        self.trips += 1;
        let line = &self.shared.line.0;
        // Odd on the way there, even on the way back.
        line.store(2 * self.trips + 1, Ordering::Release);
        let start_us = now_us();
        for turn in 1u64.. {
            if line.load(Ordering::Acquire) == 2 * self.trips + 2 {
                break;
            }
            check_time(turn, start_us)?;
        }
        Ok(())
    }

    /// Ends the answering thread and returns its error if it had one.
    fn close(mut self) -> Result<()> {
        self.shared.mode.store(STOP, Ordering::Release);
        self.echo_thread().unpark();
        let echo = self.echo.take().expect("only close takes it");
        echo.join().map_err(|_| anyhow!("the answering thread panicked"))?.context("the answering thread")
    }
}

impl Drop for Pair {
    /// After an error: the thread ends soon, nobody waits for it.
    fn drop(&mut self) {
        self.shared.mode.store(STOP, Ordering::Release);
        if let Some(echo) = &self.echo {
            echo.thread().unpark();
        }
    }
}

/// Looks at the clock now and then only.
fn check_time(turn: u64, start_us: u64) -> Result<()> {
    ensure!(
        !turn.is_multiple_of(1 << 16) || now_us() - start_us < DEADLINE.as_micros() as u64,
        "no answer for {} s",
        DEADLINE.as_secs()
    );
    Ok(())
}

/// Sends everything back until told to stop.
fn answer(end: &mut End, shared: &Shared) -> Result<()> {
    let mut answered = 0;
    loop {
        match shared.mode.load(Ordering::Acquire) {
            REST => std::thread::park_timeout(Duration::from_millis(10)),
            FABRIC => {
                // The first one may have come with the connection.
                let received = &mut end.received;
                end.fabric.poll_lanes(now_us(), &mut |event| {
                    if let FabricEvent::Message { bytes, .. } = event {
                        received.extend_from_slice(bytes);
                    }
                });
                for message in end.received.chunks_exact(MESSAGE_BYTES) {
                    end.fabric.send(end.peer, &[message])?;
                }
                end.received.clear();
            }
            LINE => {
                let number = shared.line.0.load(Ordering::Acquire);
                if number % 2 == 1 && number != answered {
                    answered = number;
                    shared.line.0.store(number + 1, Ordering::Release);
                }
            }
            _ => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_trips_come_back_and_the_thread_ends() {
        let mut pair = Pair::connect(pin::two_cpus().unwrap()[1]).unwrap();
        assert!(pair.run(FABRIC, 2, Pair::fabric_trip).unwrap() > 0.0);
        assert!(pair.run(LINE, 2, Pair::line_trip).unwrap() > 0.0);
        assert!(pair.run(FABRIC, 2, Pair::fabric_trip).unwrap() > 0.0);
        pair.close().unwrap();
    }
}
