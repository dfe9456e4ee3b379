//! `fabric.tcp.rtt` and `fabric.tcp_secure.rtt`: a message there and back over the loopback interface, in the clear and
//! encrypted, against bare TCP.
//!
//! Each side has a thread that answers; the measuring thread waits as it would in service, the fabric in its
//! poller, bare TCP in a blocking read. The difference is the price of one thread for all sockets. The
//! measuring thread has one CPU and both answering threads another, as far as there are two.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use dataplane::fabric::{
    Fabric, FabricConfig, FabricEvent, FabricKey, Listener, NodeIdentity, PeerFabric, PeerId, Replica, Security,
};
use dataplane::wait::{EventFd, Interest, Poller, Ready, now_us};

use crate::group::Sink;
use crate::row::Row;
use crate::sample::{Better, Figure, Latencies, compare};
use crate::{Effort, pin};

pub(crate) const MESSAGE_BYTES: usize = 64;
const DEADLINE: Duration = Duration::from_secs(20);
const FABRIC_TOKEN: u64 = 1000;
const STOP_TOKEN: u64 = 1;

/// Measures.
///
/// # Errors
/// No connection within 20 s, one that broke, or an answer that is not what was sent.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    // In a thread of its own, because it is pinned.
    let measuring = std::thread::spawn(move || measure(effort));
    let rows = measuring.join();
    rows.map_err(|_| anyhow!("the measuring thread panicked"))??.into_iter().try_for_each(&mut **sink)
}

fn measure(effort: Effort) -> Result<[Row; 2]> {
    let trips = effort.pick(2_000, 100);
    let [here, there] = pin::two_cpus()?;
    let mut clear = FabricPair::connect(Security::Insecure, there)?;
    let mut secure = FabricPair::connect(Security::Encrypted(FabricKey::generate()?), there)?;
    let mut bare = BarePair::connect(there)?;
    // Now, so that the threads made above did not inherit it.
    pin::pin(here)?;
    let mut compared = |id, fabric: &mut FabricPair| {
        let figure = Figure { id, unit: "us", better: Better::Lower };
        compare(
            figure,
            effort,
            "bare TCP ping-pong",
            || p50_us(trips, |message| fabric.round_trip(message)),
            || p50_us(trips, |message| bare.round_trip(message)),
        )
    };
    let rows = [compared("fabric.tcp.rtt", &mut clear)?, compared("fabric.tcp_secure.rtt", &mut secure)?];
    clear.close()?;
    secure.close()?;
    bare.close()?;
    Ok(rows)
}

/// The median of `trips` round trips of distinct messages.
pub(crate) fn p50_us(trips: u64, mut round_trip: impl FnMut(&[u8; MESSAGE_BYTES]) -> Result<()>) -> Result<f64> {
    let mut latencies = Latencies::default();
    let mut message = [0xA5; MESSAGE_BYTES];
    for trip in 0..trips {
        message[..8].copy_from_slice(&trip.to_le_bytes());
        let start = Instant::now();
        round_trip(&message)?;
        latencies.add(start.elapsed());
    }
    Ok(latencies.p50_us())
}

/// One end of the fabric and what its last poll brought.
pub(super) struct End {
    pub fabric: PeerFabric,
    poller: Arc<Poller>,
    ready: Vec<Ready>,
    pub peer: PeerId,
    /// Messages of the last poll, one behind the other.
    pub received: Vec<u8>,
    lost: Option<String>,
}

impl End {
    pub fn new(listener: &Listener, replicas: Vec<Replica>, me: u8) -> Result<End> {
        // While the other side is measured this one is not polled: no silence may end the connection,
        // and no ping may disturb.
        let config = FabricConfig {
            silence_timeout_us: 600_000_000,
            replace_after_us: 600_000_000,
            ping_us: 60_000_000,
            ..FabricConfig::default()
        };
        let port = listener.register("perf", replicas, PeerId(me))?;
        let poller = Arc::new(Poller::new()?);
        let shared = Arc::clone(&poller);
        let fabric = PeerFabric::new(config, port.control, shared, FABRIC_TOKEN, now_us())?;
        Ok(End { fabric, poller, ready: Vec::new(), peer: PeerId(1 - me), received: Vec::new(), lost: None })
    }

    /// Waits for the sockets, `deadline` at most, and polls.
    fn step(&mut self, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(
            !left.is_zero(),
            "nothing came for {} s ({})",
            DEADLINE.as_secs(),
            self.fabric.trouble(self.peer).unwrap_or("no trouble known")
        );
        let due_us = self.fabric.next_deadline_us().saturating_sub(now_us());
        let wait_us = due_us.min(left.as_micros() as u64);
        self.poller.wait(Some(wait_us), &mut self.ready)?;
        self.received.clear();
        let (received, lost) = (&mut self.received, &mut self.lost);
        self.fabric.poll(now_us(), &mut |event| match event {
            FabricEvent::Message { bytes, .. } => received.extend_from_slice(bytes),
            FabricEvent::Lost { reason, .. } => *lost = Some(reason.to_string()),
            FabricEvent::Refused { reason, .. } => *lost = Some(format!("{reason:?}")),
            FabricEvent::Connected { .. } => {}
        });
        match &self.lost {
            Some(reason) => bail!("the fabric's connection is gone: {reason}"),
            None => Ok(()),
        }
    }

    pub fn until_connected(&mut self) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while !self.fabric.is_connected(self.peer) {
            self.step(deadline)?;
        }
        Ok(())
    }
}

/// Tells the answering thread to end.
struct Stop {
    flag: AtomicBool,
    wake: EventFd,
}

/// Two nodes on the loopback interface, and what each needs to know of both.
pub(crate) fn two_nodes(security: &Security) -> Result<([Listener; 2], Vec<Replica>)> {
    let bind = |name: &str| -> Result<Listener> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        Ok(Listener::bind(addr, NodeIdentity::new(name)?, security.clone())?)
    };
    let listeners = [bind("node0")?, bind("node1")?];
    let replica = |(id, listener): (u8, &Listener)| Replica {
        id: PeerId(id),
        node: listener.identity().name.clone(),
        addr: listener.local_addr(),
        transports: Vec::new(),
    };
    let replicas = (0..).zip(&listeners).map(replica).collect();
    Ok((listeners, replicas))
}

/// This end, and a thread that answers on the other.
struct FabricPair {
    end: End,
    stop: Arc<Stop>,
    echo: Option<JoinHandle<Result<()>>>,
    /// Held for their threads, which take the connections.
    _listeners: [Listener; 2],
}

impl FabricPair {
    fn connect(security: Security, echo_cpu: usize) -> Result<FabricPair> {
        let (listeners, replicas) = two_nodes(&security)?;
        let end = End::new(&listeners[0], replicas.clone(), 0)?;
        let other = End::new(&listeners[1], replicas, 1)?;
        let stop = Arc::new(Stop { flag: AtomicBool::new(false), wake: EventFd::new()? });
        other.poller.add(&stop.wake, STOP_TOKEN, Interest::ReadEdge)?;
        let until = Arc::clone(&stop);
        let echo = std::thread::Builder::new().name("fabric-echo".to_owned()).spawn(move || {
            pin::pin(echo_cpu)?;
            answer(other, &until)
        })?;
        let mut pair = FabricPair { end, stop, echo: Some(echo), _listeners: listeners };
        pair.end.until_connected()?;
        Ok(pair)
    }

    fn round_trip(&mut self, message: &[u8; MESSAGE_BYTES]) -> Result<()> {
        self.end.fabric.send(self.end.peer, &[message])?;
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.end.step(deadline)?;
            if !self.end.received.is_empty() {
                ensure!(self.end.received == message, "the fabric brought something else back");
                return Ok(());
            }
        }
    }

    /// Ends the answering thread and returns its error if it had one.
    fn close(mut self) -> Result<()> {
        self.stop.flag.store(true, Ordering::Release);
        self.stop.wake.signal();
        let echo = self.echo.take().expect("only close takes it");
        echo.join().map_err(|_| anyhow!("the answering thread panicked"))?.context("the answering thread")
    }
}

impl Drop for FabricPair {
    /// After an error: the thread ends soon, nobody waits for it.
    fn drop(&mut self) {
        self.stop.flag.store(true, Ordering::Release);
        self.stop.wake.signal();
    }
}

/// Sends every message back until told to stop.
fn answer(mut end: End, stop: &Stop) -> Result<()> {
    while !stop.flag.load(Ordering::Acquire) {
        end.step(Instant::now() + Duration::from_secs(600))?;
        for message in end.received.chunks_exact(MESSAGE_BYTES) {
            end.fabric.send(end.peer, &[message])?;
        }
    }
    Ok(())
}

/// The least that two threads can do over TCP without spinning.
pub(crate) struct BarePair {
    stream: TcpStream,
    echo: JoinHandle<Result<()>>,
}

impl BarePair {
    pub(crate) fn connect(echo_cpu: usize) -> Result<BarePair> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        let (other, _) = listener.accept()?;
        for side in [&stream, &other] {
            side.set_nodelay(true)?;
        }
        // The other side ends with the connection, so one deadline is enough.
        stream.set_read_timeout(Some(DEADLINE))?;
        let echo = std::thread::Builder::new().name("bare-echo".to_owned()).spawn(move || {
            pin::pin(echo_cpu)?;
            answer_bare(other)
        })?;
        Ok(BarePair { stream, echo })
    }

    pub(crate) fn round_trip(&mut self, message: &[u8; MESSAGE_BYTES]) -> Result<()> {
        self.stream.write_all(message)?;
        let mut back = [0; MESSAGE_BYTES];
        self.stream.read_exact(&mut back)?;
        ensure!(back == *message, "bare TCP brought something else back");
        Ok(())
    }

    pub(crate) fn close(self) -> Result<()> {
        drop(self.stream);
        let echo = self.echo.join();
        echo.map_err(|_| anyhow!("the answering thread panicked"))?.context("the answering thread of bare TCP")
    }
}

/// Sends every message back until the other side closes.
fn answer_bare(mut stream: TcpStream) -> Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    loop {
        match stream.read_exact(&mut message) {
            Ok(()) => stream.write_all(&message)?,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_on_both_sides_and_threads_end() {
        let cpu = pin::two_cpus().unwrap()[1];
        let mut fabric = FabricPair::connect(Security::Encrypted(FabricKey::generate().unwrap()), cpu).unwrap();
        let mut bare = BarePair::connect(cpu).unwrap();
        for value in 0..20 {
            let message = [value; MESSAGE_BYTES];
            fabric.round_trip(&message).unwrap();
            bare.round_trip(&message).unwrap();
        }
        fabric.close().unwrap();
        bare.close().unwrap();
    }

    #[test]
    fn a_connection_that_breaks_is_an_error_and_not_a_figure() {
        let mut fabric = FabricPair::connect(Security::Insecure, pin::two_cpus().unwrap()[1]).unwrap();
        fabric.end.fabric.disconnect(PeerId(1));
        let error = p50_us(1, |message| fabric.round_trip(message)).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("not connected") || text.contains("is gone"), "{text}");
    }
}
