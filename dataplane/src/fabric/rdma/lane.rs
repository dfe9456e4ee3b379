//! A lane over an established connection: messages cut into records, records written, credits kept.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_sys::{self as sys, Wc};
use rustix::event::epoll;

use super::super::lane::{BULK_RING_BYTES, Lane, LaneError, LaneFull, Transport};
use super::arena::Arena;
use super::ring::{self, HEADER_BYTES, Header, Immediate, REPOST, Receiver, Sender, Violation};
use super::verbs::{self, Link, VerbsError, Write};

/// Completions taken by one look.
const BATCH: usize = 32;
/// Looks of one pump that brought a message: its budget.
const BATCHES: usize = 4;
/// Looks of one pump that brought none, so that no peer can keep us in one.
const MOST_BATCHES: usize = 256;
/// Pumps in which nothing came until one asks for the connection's own events, which is a system call. A reactor that
/// sleeps is woken by them.
const IDLE_PUMPS: u32 = 4096;

/// For the device to send what it was given before the lane goes: many times what a network with RDMA needs, and no
/// matter for a reactor that has just lost a peer.
const LAST_WORDS: Duration = Duration::from_millis(2);
/// The same for the megabytes of a bulk ring, whose owner is a thread of its own.
const BULK_LAST_WORDS: Duration = Duration::from_millis(50);

/// Where the peer's ring is.
#[derive(Debug, Clone, Copy)]
pub struct PeerRing {
    /// In the peer's address space.
    pub address: u64,
    /// Its key.
    pub rkey: u32,
}

/// What waits for room at the peer, in the order of sending.
#[derive(Debug, Default)]
struct Backlog {
    bytes: Vec<u8>,
    /// Bytes at the front that are sent.
    sent: usize,
    /// Where messages end in `bytes`.
    ends: VecDeque<usize>,
}

impl Backlog {
    fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    fn push(&mut self, parts: &[&[u8]], skip: usize) {
        let mut skip = skip;
        for part in parts {
            let skipped = skip.min(part.len());
            self.bytes.extend_from_slice(&part[skipped..]);
            skip -= skipped;
        }
        self.ends.push_back(self.bytes.len());
    }

    /// Counts bytes as sent. The copying down of the rest costs no more than the sending did.
    fn advance(&mut self, bytes: usize) {
        self.sent += bytes;
        if self.ends.front() == Some(&self.sent) {
            self.ends.pop_front();
        }
        if self.sent * 2 >= self.bytes.len() {
            self.bytes.drain(..self.sent);
            self.ends.iter_mut().for_each(|end| *end -= self.sent);
            self.sent = 0;
        }
    }
}

/// What a successful completion says.
#[derive(Debug, PartialEq, Eq)]
enum Completed {
    /// A write of ours is out.
    Sent { id: u64 },
    /// The peer has written.
    Received { immediate: Immediate, bytes: usize },
}

impl Completed {
    /// Any other is the peer's doing: its plain send uses up a receive too, whose number is not that of a write of ours.
    fn of(completion: &Wc) -> Result<Completed, String> {
        match completion.opcode {
            sys::WC_RDMA_WRITE => Ok(Completed::Sent { id: completion.wr_id }),
            sys::WC_RECV_RDMA_WITH_IMM => Ok(Completed::Received {
                immediate: Immediate::decode(u32::from_be(completion.imm_data)),
                bytes: completion.byte_len as usize,
            }),
            other => Err(format!("it used a verb that no peer of ours uses (completion opcode {other})")),
        }
    }
}

/// See the module.
pub struct RdmaLane {
    // First of the fields: the device is done with the memory when this is gone.
    link: Link,
    arena: Arc<Arena>,
    ring_bytes: usize,
    peer: PeerRing,
    sender: Sender,
    receiver: Receiver,
    backlog: Backlog,
    /// The message that is arriving.
    message: Vec<u8>,
    max_message_bytes: usize,
    max_queued_bytes: usize,
    /// Taken from the queue and not looked at: a pump has a budget, and [`Lane::arm`] must look.
    completions: VecDeque<Wc>,
    /// Receives that are used up and not posted again.
    used_receives: usize,
    idle_pumps: u32,
    armed: bool,
    failed: Option<LaneError>,
    /// Completions and the connection's events in one descriptor.
    events: OwnedFd,
}

impl RdmaLane {
    /// Over a connection whose receives are posted.
    ///
    /// # Errors
    /// Those of epoll.
    pub fn new(link: Link, peer: PeerRing, ring_bytes: usize, max: Limits) -> Result<RdmaLane, VerbsError> {
        let events =
            watch(&link).map_err(|source| VerbsError::Call { call: "epoll", source: Arc::new(source.into()) })?;
        Ok(RdmaLane {
            arena: Arc::clone(link.memory().arena()),
            link,
            ring_bytes,
            peer,
            sender: Sender::new(ring_bytes),
            receiver: Receiver::new(ring_bytes),
            backlog: Backlog::default(),
            message: Vec::with_capacity(ring::max_payload_bytes(ring_bytes)),
            max_message_bytes: max.message_bytes,
            max_queued_bytes: max.queued_bytes,
            completions: VecDeque::with_capacity(BATCH),
            used_receives: 0,
            idle_pumps: 0,
            armed: false,
            failed: None,
            events,
        })
    }

    /// Ends the lane. Dead to the peer too: the queue pair is in error.
    fn fail(&mut self, error: LaneError) -> LaneError {
        if self.failed.is_none() {
            self.link.disconnect();
        }
        self.failed.get_or_insert(error).clone()
    }

    fn device(&mut self, error: &VerbsError) -> LaneError {
        self.fail(LaneError::Device { transport: Transport::Rdma, what: error.to_string() })
    }

    fn violation(&mut self, what: String) -> LaneError {
        self.fail(LaneError::Violation { transport: Transport::Rdma, what })
    }

    /// Writes one record, whose payload begins `skip` bytes into the parts. `false`: there is no room.
    fn write_record(&mut self, parts: &[&[u8]], skip: usize, bytes: usize, goes_on: bool) -> Result<bool, LaneError> {
        let Some(slot) = self.sender.reserve(bytes, goes_on, self.receiver.credit()) else {
            return Ok(false);
        };
        self.receiver.told();
        let mirror = self.ring_bytes + slot.offset;
        self.arena.write(mirror, &slot.header.encode());
        let (mut at, mut skip, mut left) = (mirror + HEADER_BYTES, skip, bytes);
        for part in parts {
            let from = skip.min(part.len());
            skip -= from;
            let piece = &part[from..(from + left).min(part.len())];
            self.arena.write(at, piece);
            at += piece.len();
            left -= piece.len();
        }
        let write = Write {
            id: slot.work.id,
            signal: slot.work.signal,
            immediate: Some(Immediate::Record { offset: slot.offset }.encode()),
            from: slot.offset,
            bytes: HEADER_BYTES + bytes,
            to: self.peer.address + slot.offset as u64,
            rkey: self.peer.rkey,
        };
        self.link.post_write(&write).map_err(|error| self.device(&error))?;
        Ok(true)
    }

    /// Writes as many records of a message as there is room for; returns the bytes that they carry.
    fn write_records(&mut self, parts: &[&[u8]], total: usize) -> Result<usize, LaneError> {
        let longest = ring::max_payload_bytes(self.ring_bytes);
        let mut sent = 0;
        while sent < total {
            let bytes = longest.min(total - sent);
            if !self.write_record(parts, sent, bytes, sent + bytes < total)? {
                break;
            }
            sent += bytes;
        }
        Ok(sent)
    }

    fn send_backlog(&mut self) -> Result<(), LaneError> {
        while let Some(&end) = self.backlog.ends.front() {
            let backlog = std::mem::take(&mut self.backlog);
            let rest = &backlog.bytes[backlog.sent..end];
            let outcome = self.write_records(&[rest], rest.len());
            let wanted = rest.len();
            self.backlog = backlog;
            let sent = outcome?;
            if sent > 0 {
                self.backlog.advance(sent);
            }
            if sent < wanted {
                break;
            }
        }
        Ok(())
    }

    fn complete(&mut self, completion: &Wc, deliver: &mut dyn FnMut(&[u8])) -> Result<bool, LaneError> {
        if completion.status != sys::WC_SUCCESS {
            // What came before is still to be handed out.
            let what = verbs::status_text(completion);
            self.fail(LaneError::Device { transport: Transport::Rdma, what });
            return Ok(false);
        }
        let received = match Completed::of(completion).map_err(|what| self.violation(what))? {
            Completed::Sent { id } => self.sender.complete(id).map(|()| None),
            Completed::Received { immediate, bytes } => {
                self.used_receives += 1;
                match immediate {
                    Immediate::Credit { count } => self.sender.credit_by_immediate(count).map(|()| None),
                    Immediate::Record { offset } => self.take_record(offset, bytes).map(Some),
                }
            }
        };
        let Some(header) = received.map_err(|violation| self.violation(violation.to_string()))? else {
            return Ok(false);
        };
        if self.message.len() > self.max_message_bytes {
            let what = format!("a message of more than {} bytes", self.max_message_bytes);
            return Err(self.violation(what));
        }
        if header.goes_on() {
            return Ok(false);
        }
        deliver(&self.message);
        self.message.clear();
        Ok(true)
    }

    /// Reads a record once, out of the peer's reach, and behind what the message has so far.
    fn take_record(&mut self, offset: usize, bytes: usize) -> Result<Header, Violation> {
        self.receiver.locate(offset, bytes)?;
        let header = Header::decode(self.arena.read(offset));
        self.receiver.take(offset, bytes, header)?;
        self.arena.read_onto(offset + HEADER_BYTES, bytes - HEADER_BYTES, &mut self.message);
        self.sender.credit_by_header(header)?;
        Ok(header)
    }

    /// Posts receives again, and sends a credit if one is due.
    fn give_back(&mut self) -> Result<(), LaneError> {
        if self.used_receives >= REPOST {
            let batch = self.used_receives / REPOST * REPOST;
            self.link.post_receives(batch).map_err(|error| self.device(&error))?;
            self.used_receives -= batch;
        }
        if !self.receiver.credit_is_due() {
            return Ok(());
        }
        let Some(work) = self.sender.reserve_credit() else { return Ok(()) };
        let immediate = Some(Immediate::Credit { count: self.receiver.credit() }.encode());
        let PeerRing { address: to, rkey } = self.peer;
        let write = Write { id: work.id, signal: work.signal, immediate, from: 0, bytes: 0, to, rkey };
        self.link.post_write(&write).map_err(|error| self.device(&error))?;
        self.receiver.told();
        Ok(())
    }

    /// Takes completions from the device. `false`: there are none.
    fn look(&mut self) -> Result<bool, LaneError> {
        let mut batch = [Wc::default(); BATCH];
        let count = self.link.poll(&mut batch).map_err(|error| self.device(&error))?;
        self.completions.extend(&batch[..count]);
        Ok(count > 0)
    }

    /// Whether the connection itself has something to say; all of it is the end.
    fn ask_connection(&mut self) -> Result<(), LaneError> {
        while let Some(event) = self.link.id().next_event().map_err(|error| self.device(&error))? {
            // A stray request came to the identifier that listened; dropping it declines it.
            if event.request.is_none() && self.link.concerns(&event) && event.kind != sys::CM_ESTABLISHED {
                let what = event.text();
                return Err(self.fail(LaneError::Device { transport: Transport::Rdma, what }));
            }
        }
        Ok(())
    }

    /// The link and where it writes, to break the rules with. For tests.
    #[cfg(feature = "conformance")]
    pub fn take_apart(&mut self) -> (&mut Link, PeerRing) {
        (&mut self.link, self.peer)
    }
}

/// What was sent is to arrive although the lane goes: destroying the queue pair would take back what the device has not sent.
impl Drop for RdmaLane {
    fn drop(&mut self) {
        let start = Instant::now();
        if self.failed.is_some() || !self.sender.has_work() {
            return;
        }
        let Some(work) = self.sender.reserve_credit() else { return };
        let PeerRing { address: to, rkey } = self.peer;
        // Empty and without immediate data: nothing arrives, and it completes behind all others.
        let write = Write { id: work.id, signal: true, immediate: None, from: 0, bytes: 0, to, rkey };
        let last_words = if self.ring_bytes >= BULK_RING_BYTES { BULK_LAST_WORDS } else { LAST_WORDS };
        let mut waits = self.link.post_write(&write).is_ok();
        let mut batch = [Wc::default(); BATCH];
        while waits && start.elapsed() < last_words {
            let count = self.link.poll(&mut batch).unwrap_or(0);
            let is_end = |done: &Wc| {
                done.status != sys::WC_SUCCESS || (done.opcode, done.wr_id) == (sys::WC_RDMA_WRITE, work.id)
            };
            waits = !batch[..count].iter().any(is_end);
        }
    }
}

fn watch(link: &Link) -> rustix::io::Result<OwnedFd> {
    let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for fd in [link.completion_fd(), link.connection_fd()] {
        epoll::add(&events, fd, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
    }
    Ok(events)
}

/// What the owner of a lane allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The longest message.
    pub message_bytes: usize,
    /// What may wait for room, beyond one message.
    pub queued_bytes: usize,
}

impl Lane for RdmaLane {
    fn send(&mut self, parts: &[&[u8]]) -> Result<(), LaneFull> {
        if self.failed.is_some() {
            return Err(LaneFull);
        }
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if self.backlog.len() > 0 && self.backlog.len() + total > self.max_queued_bytes {
            return Err(LaneFull);
        }
        let sent = match self.backlog.len() {
            // An error is kept, and told by the next pump.
            0 => self.write_records(parts, total).unwrap_or(total),
            _ => 0,
        };
        if sent < total {
            self.backlog.push(parts, sent);
        }
        Ok(())
    }

    fn pump(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<usize, LaneError> {
        if let Some(error @ LaneError::Violation { .. }) = &self.failed {
            return Err(error.clone());
        }
        let mut delivered = 0;
        for batch in 0.. {
            if batch >= if delivered > 0 { BATCHES } else { MOST_BATCHES }
                || self.completions.is_empty() && !self.look()?
            {
                break;
            }
            self.idle_pumps = 0;
            while let Some(completion) = self.completions.pop_front() {
                delivered += usize::from(self.complete(&completion, deliver)?);
            }
            if self.failed.is_none() {
                self.give_back()?;
            }
        }
        if let Some(error) = &self.failed {
            return if delivered > 0 { Ok(delivered) } else { Err(error.clone()) };
        }
        self.send_backlog()?;
        self.idle_pumps += 1;
        if self.idle_pumps >= IDLE_PUMPS {
            self.idle_pumps = 0;
            self.ask_connection()?;
        }
        Ok(delivered)
    }

    fn queued_bytes(&self) -> usize {
        self.backlog.len()
    }

    fn arm(&mut self) -> bool {
        if self.failed.is_some() {
            return true;
        }
        self.armed = true;
        if let Err(error) = self.link.request_event() {
            self.device(&error);
            return true;
        }
        // What came before the request raises no event; what comes after it does. A failure is told by the next pump.
        self.look().is_err() || !self.completions.is_empty() || self.ask_connection().is_err()
    }

    fn disarm(&mut self) {
        if std::mem::take(&mut self.armed) {
            self.link.drain_events();
        }
    }

    fn take_doorbell(&mut self) -> bool {
        false
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.events.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::{Completed, Immediate, Wc, sys};

    /// What the verbs call `IBV_WC_RECV`.
    const WC_RECV: u32 = 128;

    fn completion(opcode: u32) -> Wc {
        let mut completion = Wc::default();
        (completion.opcode, completion.wr_id, completion.byte_len) = (opcode, 7, 20);
        completion.imm_data = Immediate::Record { offset: 64 }.encode().to_be();
        completion
    }

    #[test]
    fn only_a_write_completes_a_write() {
        assert_eq!(Completed::of(&completion(sys::WC_RDMA_WRITE)), Ok(Completed::Sent { id: 7 }));
        let received = Completed::Received { immediate: Immediate::Record { offset: 64 }, bytes: 20 };
        assert_eq!(Completed::of(&completion(sys::WC_RECV_RDMA_WITH_IMM)), Ok(received));
        for opcode in [WC_RECV, 0, 2, 3, u32::MAX] {
            let refused = Completed::of(&completion(opcode)).expect_err("none of the two");
            assert!(refused.contains(&opcode.to_string()), "{refused}");
        }
    }
}
