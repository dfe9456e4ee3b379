//! A bulk link whose bytes take a lane; the connection is the bell, and its end is the link's end.
//!
//! The lane carries pieces, and the messages are cut as they are on the stream: header and bytes, one behind the other.
//! The bell is a bare byte even when the stream was encrypted: it says nothing, and who can forge one wakes us for nothing.
//! However many ring, and whatever else comes, a call ends by its deadline.

use super::stream::Stream;
use super::{BulkError, HEADER_BYTES};
use crate::fabric::lane::{BULK_RING_BYTES, Lane, LaneError, SetupContext, Transport};
use crate::fabric::negotiation::{Failure, Negotiation};
use crate::wait::now_us;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// What is handed to the lane at once.
const MAX_PIECE_BYTES: usize = 256 << 10;
/// A peer that sends so much while we are sending, and nobody receives, breaks the protocol.
const MAX_AHEAD_BYTES: usize = 256 << 20;
/// Between two looks at a set-up that waits for a device.
const SETUP_RETRY: Duration = Duration::from_micros(500);

/// What a link's owner can do with bytes before there is a lane.
pub(super) trait Greeter {
    /// The connection.
    fn stream(&self) -> &Stream;
    /// Sends a message of the set-up.
    fn tell(&mut self, message: &[u8], deadline: Instant) -> Result<(), BulkError>;
    /// Waits for one. A timeout is no failure.
    fn hear(&mut self, buf: &mut Vec<u8>, deadline: Instant) -> Result<(), BulkError>;
}

/// The way to a lane, over as many calls as it takes.
pub(super) enum Setup {
    Planned { transport: Transport, we_dial: bool },
    Begun(Negotiation),
}

impl Setup {
    /// Goes on until there is a lane.
    pub fn complete(&mut self, link: &mut dyn Greeter, deadline: Instant) -> Result<Laned, BulkError> {
        let result = self.try_complete(link, deadline);
        if let Err(SetupEnd::Lane(failure)) = &result
            && let Some(message) = failure.message()
        {
            // The peer would find out by itself, but not why.
            let _ = link.tell(&message, deadline);
        }
        result.map_err(|end| match end {
            SetupEnd::Lane(failure) => BulkError::Lane(failure.to_string()),
            SetupEnd::Link(error) => error,
        })
    }

    fn try_complete(&mut self, link: &mut dyn Greeter, deadline: Instant) -> Result<Laned, SetupEnd> {
        let mut heard = Vec::new();
        loop {
            let negotiation = match self {
                Setup::Begun(negotiation) => negotiation,
                Setup::Planned { transport, we_dial } => {
                    let (negotiation, offer) =
                        Negotiation::begin(*transport, &context(link.stream(), *we_dial, deadline))?;
                    *self = Setup::Begun(negotiation);
                    link.tell(&offer, deadline)?;
                    continue;
                }
            };
            let mut to_tell = Vec::new();
            let lane = negotiation.advance(now_us(), &mut |message| to_tell.push(message.to_vec()))?;
            for message in to_tell {
                link.tell(&message, deadline)?;
            }
            if let Some(lane) = lane {
                return Ok(Laned { lane, ahead: Vec::new(), taken: 0, ended: None });
            }
            let retry = if negotiation.is_under_way() { deadline.min(Instant::now() + SETUP_RETRY) } else { deadline };
            match link.hear(&mut heard, retry) {
                Ok(()) => negotiation.receive(&heard)?,
                Err(BulkError::Timeout) if Instant::now() < deadline => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Why a set-up did not come to its end.
enum SetupEnd {
    Lane(Failure),
    Link(BulkError),
}

impl From<Failure> for SetupEnd {
    fn from(failure: Failure) -> SetupEnd {
        SetupEnd::Lane(failure)
    }
}

impl From<BulkError> for SetupEnd {
    fn from(error: BulkError) -> SetupEnd {
        SetupEnd::Link(error)
    }
}

fn context(stream: &Stream, we_dial: bool, deadline: Instant) -> SetupContext {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    let left_us = deadline.saturating_duration_since(Instant::now()).as_micros() as u64;
    SetupContext {
        we_dial,
        local: stream.local_addr().unwrap_or(unknown),
        peer: stream.peer_addr().unwrap_or(unknown),
        ring_bytes: BULK_RING_BYTES,
        max_message_bytes: MAX_PIECE_BYTES,
        // What does not fit the ring waits in the caller's memory.
        max_queued_bytes: 0,
        deadline_us: now_us() + left_us,
    }
}

/// What a call waits for.
#[derive(Debug, Clone, Copy)]
enum Want {
    /// Some from the peer.
    Bytes,
    /// For what is to be sent.
    Room,
}

/// See the module.
pub(super) struct Laned {
    lane: Box<dyn Lane>,
    /// Received and not asked for yet: `ahead[taken..]`.
    ahead: Vec<u8>,
    taken: usize,
    /// Why the connection ended; what is in the ring can still be taken.
    ended: Option<BulkError>,
}

impl Laned {
    /// Sends `header` and `parts`. `started`: a part of it is out.
    pub fn send(
        &mut self,
        stream: &Stream,
        header: &[u8; HEADER_BYTES],
        parts: &[IoSlice<'_>],
        started: &mut bool,
        deadline: Instant,
    ) -> Result<(), BulkError> {
        let mut piece: Vec<&[u8]> = vec![header];
        let mut piece_bytes = HEADER_BYTES;
        for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                if piece_bytes == MAX_PIECE_BYTES {
                    self.send_piece(stream, &piece, started, deadline)?;
                    piece.clear();
                    piece_bytes = 0;
                }
                let (now, later) = rest.split_at(rest.len().min(MAX_PIECE_BYTES - piece_bytes));
                piece.push(now);
                piece_bytes += now.len();
                rest = later;
            }
        }
        self.send_piece(stream, &piece, started, deadline)?;
        // Nobody would send the rest of it after this call.
        while self.lane.queued_bytes() > 0 {
            self.pump_or_wait(stream, deadline, Want::Room)?;
        }
        Ok(())
    }

    fn send_piece(
        &mut self,
        stream: &Stream,
        piece: &[&[u8]],
        started: &mut bool,
        deadline: Instant,
    ) -> Result<(), BulkError> {
        while self.lane.send(piece).is_err() {
            self.pump_or_wait(stream, deadline, Want::Room)?;
        }
        *started = true;
        let bytes: usize = piece.iter().map(|part| part.len()).sum();
        stream.progress.fetch_add(bytes as u64, Ordering::Relaxed);
        self.ring(stream);
        Ok(())
    }

    /// Appends bytes to `buf` until it is `len` long.
    pub fn recv_exact(
        &mut self,
        stream: &Stream,
        buf: &mut Vec<u8>,
        len: usize,
        deadline: Instant,
    ) -> Result<(), BulkError> {
        buf.reserve_exact(len.saturating_sub(buf.len()));
        while buf.len() < len {
            let ahead = &self.ahead[self.taken..];
            if ahead.is_empty() {
                self.pump_or_wait(stream, deadline, Want::Bytes)?;
                continue;
            }
            let take = ahead.len().min(len - buf.len());
            buf.extend_from_slice(&ahead[..take]);
            self.taken += take;
        }
        Ok(())
    }

    /// Takes what has come, and waits until there is what `want` says. Past the deadline it looks once more: neither
    /// bells nor what the peer sends of its own accord hold it off.
    fn pump_or_wait(&mut self, stream: &Stream, deadline: Instant, want: Want) -> Result<(), BulkError> {
        let mut is_last_look = false;
        loop {
            stream.check()?;
            let came = self.pump(stream)?;
            let has_it = match want {
                Want::Bytes => came > 0,
                Want::Room => self.lane.queued_bytes() == 0,
            };
            if has_it {
                return Ok(());
            }
            // What came before the end is taken first.
            if came == 0
                && let Some(error) = &self.ended
            {
                return Err(error.clone());
            }
            if is_last_look {
                return Err(BulkError::Timeout);
            }
            is_last_look = Instant::now() >= deadline;
            if came > 0 || self.lane.arm() {
                continue;
            }
            let result = stream.wait_bell(self.lane.event_fd(), deadline);
            self.lane.disarm();
            self.ended = stream.drain_bell().err();
            result?;
        }
    }

    fn pump(&mut self, stream: &Stream) -> Result<usize, BulkError> {
        if self.taken == self.ahead.len() {
            self.ahead.clear();
            self.taken = 0;
        }
        let before = self.ahead.len();
        let ahead = &mut self.ahead;
        let came = self.lane.pump(&mut |piece| ahead.extend_from_slice(piece));
        let came = came.map_err(|error| match error {
            LaneError::Violation { .. } => BulkError::Protocol(error.to_string()),
            LaneError::Device { .. } => BulkError::PeerLost(error.to_string()),
        })?;
        stream.progress.fetch_add((self.ahead.len() - before) as u64, Ordering::Relaxed);
        if self.ahead.len() - self.taken > MAX_AHEAD_BYTES {
            return Err(BulkError::Protocol("it sends without an end while it is sent to".to_owned()));
        }
        self.ring(stream);
        Ok(came)
    }

    fn ring(&mut self, stream: &Stream) {
        if self.lane.take_doorbell() {
            stream.ring_bell();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::lane::{LaneSetup, SetupProgress};
    use crate::fabric::shm;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::AtomicBool;
    use std::thread;

    /// Both ends of a lane.
    fn lanes() -> [Box<dyn Lane>; 2] {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        let context = |we_dial| SetupContext {
            we_dial,
            local: addr,
            peer: addr,
            ring_bytes: 64 << 10,
            max_message_bytes: MAX_PIECE_BYTES,
            max_queued_bytes: 1 << 20,
            deadline_us: u64::MAX,
        };
        let up = |setup: &mut dyn LaneSetup, offer: &[u8]| match setup.complete(offer, 0) {
            Ok(SetupProgress::Up(lane)) => lane,
            _ => panic!("it comes up at once"),
        };
        let [(mut dialer, offer), (mut acceptor, answer)] =
            [true, false].map(|we_dial| shm::begin(&context(we_dial)).expect("there is shared memory"));
        [up(&mut *dialer, &answer), up(&mut *acceptor, &offer)]
    }

    /// What a call returns whose peer rings without a pause, and `trickles` bytes too, until the call has ended. It must end
    /// long before the peer gives up.
    fn end_under_fire(trickles: bool, call: impl FnOnce(&mut Laned, &Stream, Instant) -> Result<(), BulkError>) {
        const PATIENCE: Duration = Duration::from_secs(10);
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let mut bell = TcpStream::connect(listener.local_addr().expect("it is bound")).expect("it listens");
        bell.set_write_timeout(Some(PATIENCE)).expect("not zero");
        let stream = Stream::new(listener.accept().expect("it was dialed").0.into());
        let [lane, mut peer] = lanes();
        let mut laned = Laned { lane, ahead: Vec::new(), taken: 0, ended: None };
        let start = Instant::now();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                // Writing fails when the other side has ended the connection.
                while !over.load(Ordering::Relaxed) && start.elapsed() < PATIENCE && bell.write_all(&[0; 4096]).is_ok()
                {
                    if trickles {
                        // A full queue is no matter.
                        let _ = peer.send(&[b"1"]);
                    }
                }
            });
            let result = call(&mut laned, &stream, start + Duration::from_millis(30));
            let took = start.elapsed();
            over.store(true, Ordering::Relaxed);
            stream.shared.cancel();
            assert_eq!(result, Err(BulkError::Timeout));
            assert!(took < PATIENCE / 2, "the deadline was held off for {took:?}");
        });
    }

    #[test]
    fn bells_do_not_hold_off_a_deadline() {
        end_under_fire(false, |laned, stream, deadline| laned.recv_exact(stream, &mut Vec::new(), 1, deadline));
    }

    #[test]
    fn a_peer_that_sends_and_takes_nothing_does_not_hold_off_a_deadline() {
        let bytes = vec![0; 1 << 20];
        end_under_fire(true, |laned, stream, deadline| {
            laned.send(stream, &[0; HEADER_BYTES], &[IoSlice::new(&bytes)], &mut false, deadline)
        });
    }
}
