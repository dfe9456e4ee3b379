//! `fabric.shm.rtt`: a message there and back through shared memory, against a cache line that two threads pass to and fro.
//!
//! The message is as long as an acknowledgement of consensus, the message on which every commit waits; `fabric.shm.rtt.64`
//! has 64 bytes, which with their mark take two cache lines. Both sides spin, as reactors do that have a core each, with the
//! processor's hint between two looks. One thread answers for everything, so that never two spin on one CPU, and it sleeps
//! between the runs. The bare line carries a number, and whoever read it writes the same line: a processor passes it with two
//! transfers. `fabric.shm.lines` is what two directions with memory of their own cost when both sides look without a pause: the
//! reader's looks take the line from its writer, who must fetch it back before he can write.
//!
//! How near the two CPUs are to each other changes by itself, within a second sometimes. So the sides alternate in windows of
//! some ms, and each window of ours is compared with the peer's right next to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use consensus::{Index, Message, View};
use dataplane::fabric::{Fabric, FabricEvent, FabricKey, Listener, Security, Transport};
use dataplane::wait::now_us;

use super::rtt::{End, MESSAGE_BYTES, two_nodes};
use crate::group::Sink;
use crate::row::Row;
use crate::sample::{Better, Figure, paired};
use crate::{Effort, pin};

/// Begins the ids of all rows.
pub(super) const AREA: &str = "fabric.shm.";
const RTT: &str = "fabric.shm.rtt";
const RTT_64: &str = "fabric.shm.rtt.64";
const LINES: &str = "fabric.shm.lines";

/// Round trips between two looks at the clock, which costs as much as a transfer.
const BATCH: u64 = 200;
/// Polls between two looks at the clock.
const POLLS: u64 = 1 << 12;
const DEADLINE: Duration = Duration::from_secs(20);

const REST: u8 = 0;
const FABRIC: u8 = 1;
const ONE_LINE: u8 = 2;
const TWO_LINES: u8 = 3;
const STOP: u8 = 4;

/// Measures.
///
/// # Errors
/// Fewer than two CPUs, no connection within 20 s, or an answer that is not what was sent.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    let wanted: Vec<&'static str> = [RTT, RTT_64, LINES].into_iter().filter(|id| sink.wants(id)).collect();
    // In a thread of its own, because it is pinned.
    let measuring = std::thread::spawn(move || measure(&wanted, effort));
    let rows = measuring.join().map_err(|_| anyhow!("the measuring thread panicked"))??;
    rows.into_iter().try_for_each(&mut **sink)
}

fn measure(wanted: &[&'static str], effort: Effort) -> Result<Vec<Row>> {
    let (pairs, batches) = (effort.pick(61, 3), effort.pick(200, 20));
    let [here, there] = pin::two_cpus()?;
    ensure!(here != there, "two threads that spin need two CPUs");
    let mut pair = Pair::connect(there)?;
    // Now, so that the thread made above did not inherit it.
    pin::pin(here)?;
    let mut rows = Vec::new();
    for &id in wanted {
        let figure = Figure { id, unit: "ns", better: Better::Lower };
        pair.message = vec![0xA5; if id == RTT { acknowledgement_bytes() } else { MESSAGE_BYTES }];
        let (mut values, mut peer_values) = (Vec::new(), Vec::new());
        for number in 0..=pairs {
            let ours = |pair: &mut Pair| match id {
                LINES => pair.run(TWO_LINES, batches, Pair::lines_trip),
                _ => pair.run(FABRIC, batches, Pair::fabric_trip),
            };
            let bare = |pair: &mut Pair| pair.run(ONE_LINE, batches, Pair::line_trip);
            // Each goes first as often as second.
            let (value, peer_value) = if number % 2 == 0 {
                let value = ours(&mut pair)?;
                (value, bare(&mut pair)?)
            } else {
                let peer_value = bare(&mut pair)?;
                (ours(&mut pair)?, peer_value)
            };
            // The first is a warm-up.
            if number > 0 {
                values.push(value);
                peer_values.push(peer_value);
            }
        }
        rows.push(paired(figure, effort, "bare cache-line ping-pong", values, peer_values));
    }
    pair.close()?;
    Ok(rows)
}

/// A follower's answer to the leader, encoded.
fn acknowledgement_bytes() -> usize {
    let mut bytes = Vec::new();
    let (view, through) = (View(1), Index(1));
    Message::AcceptOk { view, through, voting: true, consumed: through }.encode(&mut bytes);
    bytes.len()
}

#[derive(Debug, Default)]
#[repr(align(128))]
struct Line(AtomicU64);

/// What the two threads share.
#[derive(Debug, Default)]
struct Shared {
    mode: AtomicU8,
    line: Line,
    /// There and back.
    lines: [Line; 2],
}

/// This end, and the thread that answers on the other.
struct Pair {
    end: End,
    message: Vec<u8>,
    trips: u64,
    /// When the present batch began; a reactor too looks at the clock once for all that it polls.
    now_us: u64,
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
        Ok(Pair { end, message: Vec::new(), trips: 0, now_us: 0, shared, echo: Some(echo), _listeners: listeners })
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
            self.now_us = now_us();
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
        let (fabric, message, now_us) = (&mut self.end.fabric, &self.message, self.now_us);
        let mut came = None;
        let outcome = spin(|| {
            fabric.poll_lanes(now_us, &mut |event| {
                came = Some(matches!(event, FabricEvent::Message { bytes, .. } if bytes == message));
            });
            came.is_some()
        });
        outcome.and_then(|()| came.filter(|good| *good).context("the fabric brought something else back"))?;
        Ok(())
    }

    fn line_trip(&mut self) -> Result<()> {
        self.trips += 1;
        let (line, number) = (&self.shared.line.0, 2 * self.trips + 1);
        // Odd on the way there, even on the way back.
        line.store(number, Ordering::Release);
        spin(|| line.load(Ordering::Acquire) == number + 1)
    }

    fn lines_trip(&mut self) -> Result<()> {
        self.trips += 1;
        let [there, back] = &self.shared.lines;
        there.0.store(self.trips, Ordering::Release);
        spin(|| back.0.load(Ordering::Acquire) == self.trips)
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

/// Polls until `done`, and looks at the clock now and then only.
fn spin(mut done: impl FnMut() -> bool) -> Result<()> {
    let mut end = None;
    loop {
        for _ in 0..POLLS {
            if done() {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        let end = *end.get_or_insert_with(|| Instant::now() + DEADLINE);
        ensure!(Instant::now() < end, "no answer for {} s", DEADLINE.as_secs());
    }
}

/// Sends everything back until told to stop.
fn answer(end: &mut End, shared: &Shared) -> Result<()> {
    let (mut answered, mut answered_there, mut polls, mut now) = (0, 0, 0, now_us());
    loop {
        match shared.mode.load(Ordering::Acquire) {
            REST => std::thread::park_timeout(Duration::from_millis(10)),
            FABRIC => {
                polls += 1;
                if polls % POLLS == 0 {
                    now = now_us();
                }
                // There is never more than one on its way. The first one may have come with the connection.
                let received = &mut end.received;
                end.fabric.poll_lanes(now, &mut |event| {
                    if let FabricEvent::Message { bytes, .. } = event {
                        received.extend_from_slice(bytes);
                    }
                });
                if !end.received.is_empty() {
                    end.fabric.send(end.peer, &[&end.received])?;
                    end.received.clear();
                }
            }
            ONE_LINE => {
                let number = shared.line.0.load(Ordering::Acquire);
                if number % 2 == 1 && number != answered {
                    answered = number;
                    shared.line.0.store(number + 1, Ordering::Release);
                }
            }
            TWO_LINES => {
                let [there, back] = &shared.lines;
                let number = there.0.load(Ordering::Acquire);
                if number != answered_there {
                    answered_there = number;
                    back.0.store(number, Ordering::Release);
                }
            }
            _ => return Ok(()),
        }
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kinds_of_trips_come_back_and_the_thread_ends() {
        let mut pair = Pair::connect(pin::two_cpus().unwrap()[1]).unwrap();
        for bytes in [acknowledgement_bytes(), MESSAGE_BYTES] {
            pair.message = vec![0xA5; bytes];
            assert!(pair.run(FABRIC, 2, Pair::fabric_trip).unwrap() > 0.0);
            assert!(pair.run(ONE_LINE, 2, Pair::line_trip).unwrap() > 0.0);
            assert!(pair.run(TWO_LINES, 2, Pair::lines_trip).unwrap() > 0.0);
        }
        pair.close().unwrap();
    }
}
