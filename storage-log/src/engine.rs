//! The log while it runs: takes records, writes groups one after the other, says what is durable.
//!
//! One thread owns it. Appending costs a copy and two checksums; a flush costs one call into the device if none is under
//! way, and nothing otherwise, since what gathers meanwhile goes out together when that one is done (group commit).
//! There is never more than one group on its way: what lies before a group is durable when it is written, which is what
//! recovery relies on, and a deeper queue gained nothing on the devices that were measured.

#[cfg(test)]
mod simulation;

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fd::BorrowedFd;

use crate::block::{BLOCK_BYTES, DATA_BYTES, SegmentId};
use crate::keeper::{Command, Port, Reply};
use crate::legs::Legs;
use crate::record::{Kind, MAX_RECORD_BYTES};
use crate::segment::{Header, Members, SegmentInfo, SegmentNumber, note_entry};
use crate::stage::{Group, Stage, record_bytes};
use crate::volume::{Geometry, Volume};
use crate::{IndexRange, LogError, LogStatus, LogStore, Record, Ticket};

/// Segments that stay free for states when entries are refused, at least: one to write into and one in preparation.
const RESERVED_SEGMENTS: u64 = 2;
/// Of a large log more is kept: each start and each change of the mirror's members begins a segment.
const RESERVED_PART: u64 = 8;
/// Of a segment so much is kept for states and truncations as long as there is no place for the next one.
const RESERVED_OF_SEGMENT: u32 = 4;
/// Room is asked for again after this time when there was none.
const ROOM_RETRY: Duration = Duration::from_millis(200);

/// Writes groups to the copies and makes them durable.
pub(crate) trait Driver {
    /// Where a segment of a copy lies.
    type Place: Clone;

    /// From now on the groups of a copy go to this segment.
    fn bind(&mut self, leg: usize, place: &Self::Place) -> io::Result<()>;

    /// Begins to write the memory's `bytes` at `offset_bytes` of the copy's segment and then to flush. One at a time per
    /// copy; the bytes stay as they are until it is done.
    fn write(&mut self, leg: usize, bytes: std::ops::Range<usize>, offset_bytes: u64) -> io::Result<()>;

    /// Lets go of a copy's place, which may hold a lock. Returns false if the device has not answered yet: then it may still
    /// write, and the copy cannot be used for anything else.
    fn release(&mut self, leg: usize) -> bool;

    /// Reports the copies that are done.
    fn poll(&mut self, done: &mut dyn FnMut(usize, io::Result<()>));

    /// Waits until something is done, `timeout` at most.
    fn wait(&mut self, timeout: Duration) -> io::Result<()>;

    /// Readable when something is done, if this driver can say so; otherwise it must be polled.
    fn event_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// What a log is put together from, once its past has been read.
pub(crate) struct Start<V: Volume, D> {
    pub driver: D,
    pub stage: Stage,
    pub keeper: Port<V>,
    pub legs: Legs,
    pub geometry: Geometry,
    pub max_bytes: u64,
    pub range: IndexRange,
    pub segments: VecDeque<SegmentInfo>,
    pub state: Option<Vec<u8>>,
    /// The segment in which it was found.
    pub state_in: SegmentNumber,
    pub last: Option<Header>,
    pub log_id: u64,
    pub doubtful: bool,
}

/// Places that were made for one segment, by copy.
type Prepared<P> = (SegmentNumber, Vec<Option<P>>);

/// See the module.
pub(crate) struct Engine<V: Volume, D: Driver<Place = V::Place>> {
    /// Before the stage: it reads from its memory.
    driver: D,
    stage: Stage,
    keeper: Port<V>,
    legs: Legs,
    geometry: Geometry,
    max_bytes: u64,
    range: IndexRange,
    /// Those that are needed, the last one being written.
    segments: VecDeque<SegmentInfo>,
    /// The last segment of the log, ours or that of an earlier life.
    last: SegmentId,
    last_blocks: u32,
    /// The oldest segment that is still on the disks.
    oldest: SegmentNumber,
    state: Vec<u8>,
    has_state: bool,
    /// A segment that surely holds the state, once what is staged is written.
    state_in: SegmentNumber,
    /// A truncation whose record found no room yet; nothing goes in before it.
    truncate_due: Option<u64>,
    /// Since a truncation older segments may be needless, and nothing has told the disks.
    begin_due: bool,
    /// The segment that the log begins with, as a record says that was written, perhaps as the last thing.
    told: SegmentNumber,
    /// The last segment whose header was written.
    headed: SegmentNumber,
    log_id: u64,
    epoch: u64,
    doubt: bool,
    appended: u64,
    durable: u64,
    /// Durable on all members, once the disks know who they are.
    written: u64,
    /// The segment that the driver writes, the ones prepared, and the last one asked for.
    bound: SegmentNumber,
    prepared: VecDeque<Prepared<V::Place>>,
    requested: SegmentNumber,
    /// The last one that places were made for.
    answered: SegmentNumber,
    in_flight: bool,
    flush_wanted: bool,
    roll_wanted: bool,
    /// Which segment there is no room for, why, and when to ask again.
    no_room: Option<(SegmentNumber, LogError, Instant)>,
    failed: Option<LogError>,
}

impl<V: Volume, D: Driver<Place = V::Place>> Engine<V, D> {
    /// Goes on behind `start.last`. Nothing is written before the first append.
    pub fn new(start: Start<V, D>) -> Engine<V, D> {
        let last = start.last.map_or(SegmentId { number: 0, generation: 0 }, |header| header.id);
        let last_blocks = start.segments.back().map_or(0, |segment| segment.blocks);
        let mut engine = Engine {
            driver: start.driver,
            stage: start.stage,
            keeper: start.keeper,
            legs: start.legs,
            geometry: start.geometry,
            max_bytes: start.max_bytes,
            range: start.range,
            oldest: start.segments.front().map_or(1, |segment| segment.id.number),
            segments: start.segments,
            last,
            last_blocks,
            has_state: start.state.is_some(),
            state_in: if start.state.is_some() { start.state_in } else { last.number },
            state: start.state.unwrap_or_default(),
            truncate_due: None,
            begin_due: false,
            told: 0,
            headed: 0,
            log_id: start.log_id,
            // In doubt there may be a header somewhere that is the next one after the last of these, and never counted.
            epoch: start.last.map_or(0, |header| header.epoch) + if start.doubtful { 2 } else { 1 },
            doubt: start.doubtful,
            appended: 0,
            durable: 0,
            written: 0,
            bound: 0,
            prepared: VecDeque::with_capacity(4),
            requested: last.number,
            answered: last.number,
            in_flight: false,
            flush_wanted: false,
            roll_wanted: false,
            no_room: None,
            failed: None,
        };
        engine.request_places();
        engine
    }

    /// Asks for places for the segment behind the last one.
    fn request_places(&mut self) {
        // One after the other: recovery takes a place that is missing before another one for a segment that is lost.
        if self.requested <= self.last.number && self.requested <= self.answered {
            self.requested += 1;
            self.keeper.send(Command::Prepare(self.requested));
        }
    }

    /// The oldest segment that is needed: the first with an entry that is not forgotten, or the one that holds the state.
    /// Until the group that begins the next segment is whole, no other does.
    fn drop_unneeded(&mut self) -> SegmentNumber {
        let state_in = self.state_in;
        let unneeded = |segment: &SegmentInfo| segment.last_index.is_none() && segment.id.number < state_in;
        while self.segments.len() > 1 && unneeded(&self.segments[0]) {
            self.segments.pop_front();
        }
        self.segments.front().map_or(self.last.number + 1, |segment| segment.id.number)
    }

    /// Begins the next segment.
    fn roll(&mut self) {
        self.stage.close();
        if self.stage.segment_blocks_used() > 0 {
            self.last_blocks = self.stage.segment_blocks_used();
            // Begun in this life, with the state as its first record; what an earlier one began may lack it.
            self.state_in = self.last.number;
        }
        if let Some(segment) = self.segments.back_mut()
            && segment.id == self.last
        {
            segment.blocks = self.last_blocks;
        }
        let first = self.drop_unneeded();
        let id = SegmentId { number: self.last.number + 1, generation: random() };
        self.stage.begin_segment(Header {
            id,
            log_id: self.log_id,
            epoch: self.epoch,
            members: Members::default(),
            blocks: self.geometry.segment_blocks,
            previous_generation: self.last.generation,
            previous_blocks: self.last_blocks,
            chain: self.stage.chain(),
            first,
            doubt: self.doubt,
        });
        self.last = id;
        self.segments.push_back(SegmentInfo::new(id));
        if self.has_state {
            self.stage.append(Kind::StateCopy, (0, 0), &[&self.state], 0);
        }
        self.request_places();
    }

    /// Makes sure that a record fits where the stream stands.
    fn make_room(&mut self, payload_bytes: usize, is_entry: bool) -> Result<(), LogError> {
        let need = record_bytes(payload_bytes);
        if !self.stage.fits_memory(need + record_bytes(self.state.len())) {
            return Err(LogError::QueueFull);
        }
        // An entry begins no segment that has no place yet: should there be no room for it, the truncation that gives old
        // segments back could not be written either.
        let awaits_place = is_entry && !self.is_next_prepared();
        let reserve = if awaits_place { self.reserved_bytes() } else { 0 };
        if self.stage.fits_segment(need + reserve) {
            return Ok(());
        }
        if awaits_place {
            match &self.no_room {
                Some((_, error, _)) => return Err(error.clone()),
                None if self.stage.segment_blocks_used() > 0 => return Err(LogError::QueueFull),
                None => {}
            }
        }
        let first = self.drop_unneeded();
        let segments = self.last.number + 2 - first;
        let limit = self.max_segments() - if is_entry { self.reserved_segments() } else { 0 };
        if segments > limit {
            return Err(LogError::LogFull { max_bytes: self.max_bytes });
        }
        self.roll();
        Ok(())
    }

    fn max_segments(&self) -> u64 {
        self.max_bytes / self.geometry.segment_bytes()
    }

    fn reserved_segments(&self) -> u64 {
        RESERVED_SEGMENTS.max(self.max_segments() / RESERVED_PART)
    }

    fn reserved_bytes(&self) -> usize {
        (self.geometry.segment_blocks / RESERVED_OF_SEGMENT) as usize * DATA_BYTES
    }

    /// Whether there is a place for the segment behind the last one.
    fn is_next_prepared(&self) -> bool {
        self.is_prepared(self.last.number + 1)
    }

    fn append_truncation(&mut self) -> Result<(), LogError> {
        if let Some(through) = self.truncate_due {
            self.make_room(0, false)?;
            self.stage.append(Kind::Truncate, (through, 0), &[], 0);
            // Only now: a header that leaves segments out must not be durable before the reason for it is.
            for segment in &mut self.segments {
                segment.last_index = segment.last_index.filter(|last| *last > through);
            }
            self.begin_due = true;
            self.truncate_due = None;
        }
        Ok(())
    }

    /// The longest payload that a record can have here.
    fn max_payload_bytes(&self) -> usize {
        let segment = (self.geometry.segment_blocks as usize - 2) * DATA_BYTES - 2 * record_bytes(self.state.len());
        let memory = self.stage.memory().len() / 2;
        MAX_RECORD_BYTES.min(segment).min(memory)
    }

    /// Starts the next group, if none is under way.
    fn submit(&mut self) {
        if self.in_flight || self.failed.is_some() {
            return;
        }
        if self.stage.first_group().is_none() {
            if self.flush_wanted {
                self.stage.close();
            }
            self.flush_wanted = false;
        }
        let Some(number) = self.stage.first_group().map(|group| group.segment.number) else { return };
        if number != self.bound && !self.bind(number) {
            return;
        }
        let (epoch, members) = (self.epoch, self.legs.members());
        self.stage.complete_header(|header| (header.epoch, header.members) = (epoch, members));
        let group = *self.stage.first_group().expect("it was there");
        let (bytes, offset) = (self.stage.bytes_of(&group), u64::from(group.start) * BLOCK_BYTES as u64);
        self.in_flight = true;
        for leg in 0..self.legs.len() {
            if self.legs.takes(leg, number) {
                self.legs.set_busy(leg, true);
                if let Err(error) = self.driver.write(leg, bytes.clone(), offset) {
                    self.legs.set_busy(leg, false);
                    self.leg_failed(leg, error);
                }
            }
        }
    }

    /// Lets the driver write the next segment; false if its places are not there yet.
    fn bind(&mut self, number: SegmentNumber) -> bool {
        let Some((_, places)) = self.prepared.pop_front_if(|(prepared, _)| *prepared == number) else {
            return false;
        };
        self.bound = number;
        for (leg, place) in places.iter().enumerate() {
            if !self.legs.takes(leg, number) {
                continue;
            }
            let bound = match place {
                Some(place) => self.driver.bind(leg, place),
                None => Err(io::ErrorKind::NotFound.into()),
            };
            if let Err(error) = bound {
                self.leg_failed(leg, error);
            }
        }
        while let Some(leg) = self.legs.next_to_fill(number) {
            let sources = self.legs.members();
            let before = self.segments.iter().filter(|segment| segment.id.number < number);
            let segments = before.map(|segment| (segment.id.number, segment.blocks)).collect();
            self.keeper.send(Command::Copy { leg, sources, segments });
        }
        self.request_places();
        true
    }

    fn leg_failed(&mut self, leg: usize, error: io::Error) {
        self.drop_leg(leg, LogError::io("writing the log to", self.legs.path(leg), error));
    }

    fn drop_leg(&mut self, leg: usize, error: LogError) {
        if self.legs.fail(leg, error, Instant::now()) {
            self.prepared.iter_mut().for_each(|(_, places)| places[leg] = None);
            self.keeper.send(Command::GiveUp(leg));
            self.epoch += 1;
            self.roll_wanted = true;
        }
    }

    /// The group in flight is done on all copies that are left.
    fn complete_group(&mut self) {
        self.in_flight = false;
        if self.legs.members() == Members::default() {
            let nobody = LogError::io("writing", Path::new("the log"), io::ErrorKind::NotFound);
            let error = self.legs.error().unwrap_or(nobody);
            tracing::error!(error = &error as &dyn std::error::Error, "the log has failed");
            self.failed = Some(error);
            return;
        }
        let Group { header, segment, ticket, first, .. } = self.stage.release();
        self.written = self.written.max(ticket);
        if let Some(header) = header {
            self.legs.record(header.members);
            self.headed = segment.number;
        }
        let behind = std::mem::replace(&mut self.told, first);
        let first = header.map_or(behind, |header| header.first.max(behind));
        if header.is_some() || first > self.oldest {
            self.give_back(first);
        }
        self.tell_begin();
        if self.legs.is_recorded() {
            self.durable = self.written;
        } else {
            self.roll_wanted = true;
        }
    }

    /// Segments below `first` are needed no more, and the disks know it.
    fn give_back(&mut self, first: SegmentNumber) {
        self.oldest = self.oldest.max(first);
        self.keeper.send(Command::Release(first));
        if let Some((number, _, again_at)) = &mut self.no_room {
            *again_at = Instant::now() + ROOM_RETRY;
            self.keeper.send(Command::Prepare(*number));
        }
    }

    /// Tells the disks which segment the log begins with since the last truncation, without waiting for the next header: there
    /// may be no room for another segment before those in front are given back.
    fn tell_begin(&mut self) {
        if !self.stage.fits_segment(record_bytes(0)) || !self.stage.fits_memory(record_bytes(0)) {
            return;
        }
        if self.told > self.oldest {
            // It must not be the last thing that was written, where damage leaves the log usable.
            if self.stage.staged_bytes() == 0 {
                self.stage.append_begin(self.told);
            }
            self.flush_wanted = true;
        } else if self.begin_due && self.headed == self.last.number {
            // Not in the group of the header, which not all copies may have: who has a part in the log shows in what is read.
            self.begin_due = false;
            // The segment began with the state.
            self.state_in = self.last.number;
            let first = self.drop_unneeded();
            if first > self.oldest {
                self.stage.append_begin(first);
                self.flush_wanted = true;
            }
        }
    }

    /// Writes a header although nothing calls for a new segment: who the members are must become durable.
    fn roll_if_wanted(&mut self) {
        let begun = self.stage.has_header_waiting(self.in_flight);
        if self.bound == 0 || !self.roll_wanted {
            return;
        }
        if !begun {
            if !self.stage.fits_memory(2 * record_bytes(self.state.len())) {
                return;
            }
            self.roll();
        }
        self.roll_wanted = false;
        self.flush_wanted = true;
    }

    fn take_replies(&mut self) {
        self.keeper.work();
        while let Some(reply) = self.keeper.receive() {
            match reply {
                // Asked for again while it was being made.
                Reply::Prepared { number, .. } if number <= self.bound || self.is_prepared(number) => {}
                Reply::Prepared { number, mut places } => {
                    // One that has failed in the meantime is opened anew, and those places are no longer good.
                    (0..places.len()).filter(|leg| self.legs.is_out(*leg)).for_each(|leg| places[leg] = None);
                    self.no_room = self.no_room.take().filter(|(refused, ..)| *refused != number);
                    let at = self.prepared.partition_point(|(prepared, _)| *prepared < number);
                    self.prepared.insert(at, (number, places));
                    self.answered = self.answered.max(number);
                    self.request_places();
                }
                Reply::NoRoom { number, error } => {
                    if self.no_room.is_none() {
                        tracing::warn!(
                            error = &error as &dyn std::error::Error,
                            "there is no room for the log to grow"
                        );
                    }
                    self.no_room = Some((number, error, Instant::now() + ROOM_RETRY));
                }
                Reply::Failed { leg, error } => self.drop_leg(leg, error),
                Reply::Reopened { leg, places } => self.leg_reopened(leg, places),
                Reply::Copied { leg } => {
                    if self.legs.complete(leg) {
                        self.epoch += 1;
                        self.roll_wanted = true;
                    }
                }
            }
        }
        if let Some((number, _, again_at)) = &mut self.no_room
            && Instant::now() >= *again_at
        {
            *again_at = Instant::now() + ROOM_RETRY;
            self.keeper.send(Command::Prepare(*number));
        }
    }

    /// Whether what is to be written next belongs into a segment that there is no room for.
    fn lacks_room(&self) -> bool {
        let next = self.stage.first_group().map(|group| group.segment.number);
        self.no_room.is_some()
            && !self.in_flight
            && next.is_some_and(|next| next != self.bound && !self.is_prepared(next))
    }

    fn is_prepared(&self, number: SegmentNumber) -> bool {
        self.prepared.iter().any(|(prepared, _)| *prepared == number)
    }

    /// A copy is open again: it takes part from the first segment on that is not begun and has a place there.
    fn leg_reopened(&mut self, leg: usize, places: Vec<(SegmentNumber, V::Place)>) {
        for (number, place) in places {
            if let Some((_, prepared)) = self.prepared.iter_mut().find(|(prepared, _)| *prepared == number) {
                prepared[leg] = Some(place);
            }
        }
        let with_place = self.prepared.iter().rev().take_while(|(_, places)| places[leg].is_some());
        let from = with_place.last().map_or(self.requested + 1, |(number, _)| *number);
        self.legs.join(leg, from);
    }

    /// Tries copies again that failed a while ago.
    fn look_after_legs(&mut self) {
        if self.bound == 0 || self.legs.are_all_members() {
            return;
        }
        self.roll_wanted |= self.legs.awaits_segment_behind(self.last.number);
        // Not before the disks know that it is out: opening it anew forgets what it held.
        let driver = &mut self.driver;
        if self.legs.is_recorded()
            && let Some(leg) = self.legs.next_retry(Instant::now(), |leg| driver.release(leg))
        {
            let segments = self.prepared.iter().map(|(number, _)| *number).collect();
            self.keeper.send(Command::Reopen { leg, segments });
        }
    }
}

impl<V: Volume, D: Driver<Place = V::Place>> Engine<V, D> {
    /// Waits for the device, or a moment for the keeper, whose replies wake nobody who waits in the driver.
    fn wait_once(&mut self, longest: Duration) {
        let nap = if self.in_flight { longest } else { longest.min(Duration::from_millis(1)) };
        if let Err(error) = self.driver.wait(nap) {
            tracing::debug!(%error, "waiting for the log was interrupted");
        }
    }
}

/// Numbers that name generations and logs.
pub(crate) fn random() -> u64 {
    let mut bytes = [0; 8];
    let read = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    assert_eq!(read.expect("the kernel has random numbers once it is up"), bytes.len());
    u64::from_le_bytes(bytes)
}

impl<V: Volume, D: Driver<Place = V::Place>> LogStore for Engine<V, D> {
    fn append(&mut self, record: Record<'_>) -> Result<Ticket, LogError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.append_truncation()?;
        let ticket = self.appended + 1;
        match record {
            Record::State(state) => {
                assert!(state.len() <= DATA_BYTES / 4, "a state of {} bytes", state.len());
                self.make_room(state.len(), false)?;
                self.stage.append(Kind::State, (0, 0), &[state], ticket);
                self.doubt = false;
                self.has_state = true;
                self.state.clear();
                self.state.extend_from_slice(state);
            }
            Record::Entry { index, view, parts } => {
                assert!(self.range.accepts(index), "entry {index} would leave a gap, next is {:?}", self.range.next());
                let payload_bytes = parts[0].len() + parts[1].len();
                let most = self.max_payload_bytes();
                assert!(payload_bytes <= most, "entry {index} of {payload_bytes} bytes: at most {most} fit");
                self.make_room(payload_bytes, true)?;
                self.stage.append(Kind::Entry, (index, view), &parts, ticket);
                self.range.set(index);
                note_entry(self.segments.iter_mut(), index);
            }
        }
        self.appended = ticket;
        Ok(Ticket(ticket))
    }

    fn flush(&mut self) {
        self.flush_wanted = true;
        self.submit();
    }

    fn poll(&mut self) {
        let (driver, legs) = (&mut self.driver, &mut self.legs);
        let mut errors: [Option<io::Error>; crate::legs::MAX_LEGS] = Default::default();
        driver.poll(&mut |leg, result| {
            legs.set_busy(leg, false);
            errors[leg] = result.err();
        });
        for (leg, error) in errors.into_iter().enumerate() {
            if let Some(error) = error {
                self.leg_failed(leg, error);
            }
        }
        if self.in_flight && !self.legs.any_busy() {
            self.complete_group();
        }
        self.take_replies();
        self.look_after_legs();
        self.roll_if_wanted();
        self.submit();
    }

    fn wait(&mut self, ticket: Ticket, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            self.poll();
            let left = deadline.saturating_duration_since(Instant::now());
            if self.durable >= ticket.0 || self.failed.is_some() || left.is_zero() {
                return self.durable >= ticket.0;
            }
            self.wait_once(left.min(Duration::from_millis(50)));
        }
    }

    fn durable(&self) -> Ticket {
        Ticket(self.durable)
    }

    fn failed(&self) -> Option<LogError> {
        self.failed.clone()
    }

    fn truncate_prefix(&mut self, through: u64) {
        if self.failed.is_some() || !self.range.truncate(through) {
            return;
        }
        self.truncate_due = Some(through);
        // If there is no room now, the next append comes back to it.
        let _ = self.append_truncation();
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.driver.event_fd()
    }

    fn is_filling_up(&self) -> bool {
        let first = self.segments.front().map_or(self.last.number, |segment| segment.id.number);
        // With half of a segment left there is room for the syncvm that gives older ones back.
        let half_used = 2 * self.stage.segment_blocks_used() > self.geometry.segment_blocks;
        let is_stuck = self.no_room.is_some() && self.stage.segment_blocks_used() == 0;
        (!self.is_next_prepared() && (half_used || is_stuck))
            || 2 * (self.last.number + 1 - first) > self.max_segments()
    }

    fn is_busy(&self) -> bool {
        self.in_flight || self.keeper.has_work()
    }

    fn status(&self) -> LogStatus {
        LogStatus {
            disk_bytes: (self.last.number + 1 - self.oldest.min(self.last.number + 1)) * self.geometry.segment_bytes(),
            queued_bytes: self.stage.staged_bytes(),
            legs: self.legs.status(),
            no_room: self.no_room.as_ref().map(|(_, error, _)| error.clone()),
        }
    }
}

impl<V: Volume, D: Driver<Place = V::Place>> Drop for Engine<V, D> {
    /// Writes what was appended and waits for it, for a while.
    fn drop(&mut self) {
        const PATIENCE: Duration = Duration::from_secs(20);
        let deadline = Instant::now() + PATIENCE;
        self.flush();
        while self.failed.is_none() && (self.in_flight || self.flush_wanted || self.stage.first_group().is_some()) {
            if self.lacks_room() || Instant::now() >= deadline {
                let why = if self.lacks_room() { "there is no room for them" } else { "the disk did not answer" };
                tracing::error!(why, "the log is closed with records that are not durable");
                break;
            }
            self.wait_once(Duration::from_millis(50));
            self.poll();
        }
    }
}
