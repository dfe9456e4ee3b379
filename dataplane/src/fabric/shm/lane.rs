//! The lane over two shared rings and their slot. Messages longer than a record are cut; what finds no room waits in a queue.

use super::file::NamedFile;
use super::mapping::{Direction, Mapping, SharedRing};
use super::pause::Pause;
use crate::cycles::CycleClock;
use crate::fabric::lane::{Lane, LaneError, LaneFull, Polled, SetupContext, Transport};
use crate::ring::{Assembly, Kind, Violation};
use crate::turn::{Ends, Found};
use rustix::fd::BorrowedFd;
use std::sync::Arc;

/// What one pump takes once it has handed out a message, so that one flooding peer cannot keep the reactor.
const MAX_RECORDS: usize = 256;
const MAX_PUMP_BYTES: usize = 1 << 20;
/// Records of a pump that has handed out none: more than our peer's longest message has, because a pump that hands out
/// nothing means that nothing is there.
const MOST_RECORDS: usize = 8192;
const LENGTH_BYTES: usize = 4;
/// In a queued record's length: more of the message follows.
const MORE: u32 = 1 << 31;

/// Records that wait for room: `u32` length with [`MORE`], and the bytes.
#[derive(Debug, Default)]
struct Queue {
    bytes: Vec<u8>,
    sent: usize,
}

impl Queue {
    fn queued_bytes(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// Appends a message of `left` bytes in records of up to `max_record` bytes.
    fn add(&mut self, parts: &[&[u8]], mut left: usize, max_record: usize) {
        let mut room = 0;
        for &part in parts {
            let mut rest = part;
            while !rest.is_empty() {
                if room == 0 {
                    room = left.min(max_record);
                    left -= room;
                    let more = if left > 0 { MORE } else { 0 };
                    self.bytes.extend((room as u32 | more).to_le_bytes());
                }
                let (now, later) = rest.split_at(rest.len().min(room));
                self.bytes.extend(now);
                room -= now.len();
                rest = later;
            }
        }
    }

    /// The first record.
    fn first(&self) -> Option<(Kind, &[u8])> {
        let (length, rest) = self.bytes[self.sent..].split_first_chunk::<LENGTH_BYTES>()?;
        let length = u32::from_le_bytes(*length);
        let kind = if length & MORE == 0 { Kind::Last } else { Kind::More };
        Some((kind, &rest[..(length & !MORE) as usize]))
    }

    fn remove_first(&mut self) {
        let (_, record) = self.first().expect("it was just written");
        self.sent += LENGTH_BYTES + record.len();
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
        } else if self.sent > self.bytes.len() / 2 {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}

/// See the module.
pub(super) struct ShmLane {
    ends: Ends<SharedRing>,
    queue: Queue,
    assembly: Assembly,
    max_message_bytes: usize,
    max_queued_bytes: usize,
    clock: CycleClock,
    pause: Pause,
    /// Found while sending; the next pump reports it.
    broken: Option<LaneError>,
    /// Until the peer has opened it.
    file: Option<NamedFile>,
}

impl ShmLane {
    /// `ways`: out and in.
    pub fn new(
        mapping: &Arc<Mapping>,
        ways: [Direction; 2],
        context: &SetupContext,
        file: Option<NamedFile>,
    ) -> ShmLane {
        let clock = CycleClock::new();
        let [out, input] = ways.map(|way| SharedRing::new(mapping, way));
        ShmLane {
            ends: Ends::new(out, input, context.we_dial),
            queue: Queue::default(),
            assembly: Assembly::default(),
            max_message_bytes: context.max_message_bytes,
            max_queued_bytes: context.max_queued_bytes,
            pause: Pause::new(clock.now()),
            clock,
            broken: None,
            file,
        }
    }

    fn flush(&mut self) {
        while let Some((kind, record)) = self.queue.first() {
            match self.ends.push(kind, &[record]) {
                Ok(true) => self.queue.remove_first(),
                Ok(false) => break,
                Err(violation) => return self.break_off(violation),
            }
        }
    }

    /// The message in the slot. If there is more, the next pump finds it: an answer to this one is not to wait.
    #[inline]
    fn take_answer(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<usize, LaneError> {
        self.ends.take(&mut self.assembly).map_err(violated)?;
        let bytes = self.assembly.bytes();
        if bytes.is_empty() {
            return Err(violated("it sent an empty record"));
        }
        deliver(bytes);
        self.assembly.clear();
        self.broken.clone().map_or(Ok(1), Err)
    }

    fn take_records(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<usize, LaneError> {
        let (mut messages, mut records, mut taken_bytes) = (0, 0, 0);
        while (messages == 0 || records < MAX_RECORDS && taken_bytes < MAX_PUMP_BYTES)
            && records < MOST_RECORDS
            && let before = self.assembly.bytes().len()
            && let Some(kind) = self.ends.take(&mut self.assembly).map_err(violated)?
        {
            let bytes = self.assembly.bytes();
            if bytes.len() == before {
                return Err(violated("it sent an empty record"));
            }
            if bytes.len() > self.max_message_bytes {
                return Err(violated(format!("it sent a message of {} bytes", bytes.len())));
            }
            records += 1;
            taken_bytes += bytes.len() - before;
            if kind == Kind::Last {
                deliver(bytes);
                self.assembly.clear();
                messages += 1;
            }
        }
        self.broken.clone().map_or(Ok(messages), Err)
    }

    fn break_off(&mut self, violation: Violation) {
        self.broken.get_or_insert(violated(violation));
        self.queue = Queue::default();
    }
}

fn violated(what: impl ToString) -> LaneError {
    LaneError::Violation { transport: Transport::Shm, what: what.to_string() }
}

impl Lane for ShmLane {
    fn send(&mut self, parts: &[&[u8]]) -> Result<(), LaneFull> {
        if self.broken.is_some() {
            return Ok(());
        }
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        let queued = self.queue.queued_bytes();
        let max_record = self.ends.max_record_bytes();
        if queued == 0 && bytes <= max_record {
            match self.ends.push(Kind::Last, parts) {
                Ok(true) => {
                    if self.clock.is_cheap() {
                        self.pause.sent(|| self.clock.now());
                    }
                    return Ok(());
                }
                Ok(false) => {}
                Err(violation) => {
                    self.break_off(violation);
                    return Ok(());
                }
            }
        }
        if queued > 0 && queued + bytes > self.max_queued_bytes {
            return Err(LaneFull);
        }
        self.queue.add(parts, bytes, max_record);
        self.flush();
        Ok(())
    }

    fn pump(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<usize, LaneError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        if self.queue.queued_bytes() > 0 {
            self.flush();
        }
        match self.ends.find().map_err(violated)? {
            Found::Nothing => self.broken.clone().map_or(Ok(0), Err),
            Found::Slot => self.take_answer(deliver),
            Found::Records => self.take_records(deliver),
        }
    }

    fn poll(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<Polled, LaneError> {
        if self.pause.is_early(|| self.clock.now()) {
            return Ok(Polled { messages: 0, rings: self.take_doorbell() });
        }
        self.disarm();
        let messages = self.pump(deliver)?;
        self.pause.looked(messages > 0, || self.clock.now());
        Ok(Polled { messages, rings: self.take_doorbell() })
    }

    fn queued_bytes(&self) -> usize {
        self.queue.queued_bytes()
    }

    fn arm(&mut self) -> bool {
        let length = self.queue.first().map(|(_, record)| record.len());
        let armed = self.ends.arm(length);
        armed.unwrap_or_else(|violation| {
            self.break_off(violation);
            true
        }) || self.broken.is_some()
    }

    fn disarm(&mut self) {
        self.ends.disarm();
    }

    fn take_doorbell(&mut self) -> bool {
        self.ends.take_wake()
    }

    fn take_early_doorbell(&mut self) -> bool {
        self.ends.take_early_wake()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn peer_is_up(&mut self) {
        self.file = None;
    }
}
