//! Frames in and out of the rings: the usual ones in bursts (`burst`), the unusual ones one by one. No lock, no allocation and
//! no system call.

use super::burst::{BURST_FRAMES, End, FrameSink};
use super::features::Features;
use super::link::signal;
use super::memory::Piece;
use super::net::{
    Inject, MAX_FRAME_BYTES, MIN_FRAME_BYTES, NUM_BUFFERS_OFFSET, NetDevice, RingIndex, VNET_HEADER_BYTES,
};
use super::ring::{Ring, RingFault};
use super::steer::pair_of;

/// Memory for the frame in hand.
pub(super) struct Scratch {
    /// One transmitted frame, for sinks that want to look before they take.
    frame: Box<[u8]>,
    /// Pieces of guest memory of an unusual frame.
    pieces: Vec<Piece>,
    /// Receive chains of an unusual frame: head and room in bytes.
    chains: Vec<(u16, u64)>,
}

impl Scratch {
    pub fn new() -> Self {
        Self {
            frame: vec![0; MAX_FRAME_BYTES].into_boxed_slice(),
            pieces: Vec::with_capacity(1024),
            chains: Vec::with_capacity(1024),
        }
    }
}

/// A closure that looks at each frame, as a sink.
struct Look<'a, F> {
    frame: &'a mut [u8],
    len: usize,
    longest: usize,
    look: &'a mut F,
}

impl<F: FnMut(&[u8]) -> bool> FrameSink for Look<'_, F> {
    #[inline]
    fn room(&mut self, len_bytes: usize) -> Option<&mut [u8]> {
        self.len = len_bytes;
        self.longest = self.longest.max(len_bytes);
        Some(&mut self.frame[..len_bytes])
    }

    #[inline]
    fn commit(&mut self) -> bool {
        (self.look)(&self.frame[..self.len])
    }
}

/// Why the work on a transmit ring ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TxEnd {
    /// It is empty, and a kick has been asked for.
    Empty,
    /// The turn is over; there may be more.
    Turn,
    Refused,
}

impl NetDevice {
    /// Whether the usual frames may take the short way: drivers of before virtio 1.0 have another header.
    #[inline]
    fn bursts(&self) -> bool {
        #[cfg(test)]
        if self.no_bursts {
            return false;
        }
        self.features.header_bytes() == VNET_HEADER_BYTES
    }

    /// Gives a frame to the guest: 12 bytes of virtio_net_hdr_v1, then Ethernet. `num_buffers` is filled in here.
    ///
    /// A frame shorter than the header, or one that the guest's buffers can never hold, is dropped and counted.
    pub fn inject(&mut self, frame: &[u8]) -> Inject {
        self.inject_batch([frame]).1
    }

    /// Gives frames to the guest, in order, as [`Self::inject`] does. Returns how many were dealt with ([`Inject::Done`]) and,
    /// if that is not all of them, what became of the one after: it comes first in the next call.
    ///
    /// Far cheaper than frame by frame. The iterator may be read further than frames are dealt with.
    pub fn inject_batch<'f>(&mut self, frames: impl IntoIterator<Item = &'f [u8]>) -> (usize, Inject) {
        let mut frames = frames.into_iter();
        let mut done = 0;
        loop {
            let mut burst: [&[u8]; BURST_FRAMES] = [&[]; BURST_FRAMES];
            let mut count = 0;
            for (place, frame) in burst.iter_mut().zip(&mut frames) {
                *place = frame;
                count += 1;
            }
            let (now, outcome) = self.inject_burst(&burst[..count]);
            done += now;
            if outcome != Inject::Done || count < BURST_FRAMES {
                return (done, outcome);
            }
        }
    }

    /// The pair whose receiving queue `frame` is for, as long as the guest uses as many as now.
    pub fn receive_pair(&self, frame: &[u8]) -> usize {
        if self.active_pairs <= 1 { 0 } else { pair_of(frame, self.active_pairs) }
    }

    fn inject_burst(&mut self, frames: &[&[u8]]) -> (usize, Inject) {
        let mut done = 0;
        while done < frames.len() {
            if !self.is_running() {
                return (done, Inject::NotRunning);
            }
            // A run of frames for one pair; with one pair that is all of them.
            let pairs = self.active_pairs;
            let pair = pair_of(frames[done], pairs);
            let run = match pairs {
                1 => frames.len() - done,
                _ => frames[done..].iter().take_while(|frame| pair_of(frame, pairs) == pair).count(),
            };
            let index = RingIndex::receive(pair);
            match self.inject_run(index, &frames[done..done + run]) {
                Ok((now, Inject::Done)) => done += now,
                Ok((now, other)) => return (done + now, other),
                Err(fault) => self.break_ring(index, fault),
            }
        }
        (done, if self.is_running() || done > 0 { Inject::Done } else { Inject::NotRunning })
    }

    /// Frames for one ring. Done: at least one was dealt with.
    fn inject_run(&mut self, index: RingIndex, frames: &[&[u8]]) -> Result<(usize, Inject), RingFault> {
        let (features, bursts) = (self.features, self.bursts());
        let Self { slots, counters, scratch, .. } = self;
        let Some(ring) = slots[usize::from(index.0)].ring.as_deref_mut() else {
            return Ok((0, Inject::NotRunning));
        };
        ring.disarm();
        let proper = |frame: &&[u8]| (VNET_HEADER_BYTES..=MAX_FRAME_BYTES).contains(&frame.len());
        let usable = frames.iter().take_while(|frame| proper(frame)).count();
        if usable == 0 {
            counters.rx_too_large += 1;
            return Ok((1, Inject::Done));
        }
        if bursts {
            let (placed, end) = ring.fill_burst(&frames[..usable])?;
            counters.rx_frames += placed as u64;
            if end == End::Exhausted && self.polling {
                ring.starving = true;
                return Ok((placed, Inject::NoBuffers));
            }
            if placed > 0 {
                return Ok((placed, Inject::Done));
            }
        }
        let outcome = inject_unusual(ring, features, scratch, frames[0])?;
        match outcome {
            Unusual::Placed => counters.rx_frames += 1,
            Unusual::TooLarge => counters.rx_too_large += 1,
            Unusual::NoBuffers => return Ok((0, Inject::NoBuffers)),
        }
        Ok((1, Inject::Done))
    }

    /// Passes up to `budget_frames` frames from the guest to `sink`, oldest first: 12 bytes of virtio_net_hdr_v1, then
    /// Ethernet. A frame that `sink` refuses (false) stays in the ring, and the call ends. Returns how many were accepted.
    ///
    /// When the rings are empty the guest is asked to kick; when the budget or `sink` ended the call it is not, and the caller
    /// must call again by itself. While QEMU has a ring disabled, frames are consumed and discarded, as vhost-user demands.
    pub fn collect_tx(&mut self, budget_frames: usize, sink: &mut impl FnMut(&[u8]) -> bool) -> usize {
        // Nothing in `collect` looks at it, so it can be away meanwhile.
        let mut frame = std::mem::take(&mut self.scratch.frame);
        let mut look = Look { frame: &mut frame, len: 0, longest: self.longest_tx_bytes, look: sink };
        let accepted = self.collect(budget_frames, &mut look);
        self.longest_tx_bytes = look.longest;
        self.scratch.frame = frame;
        accepted
    }

    /// As [`Self::collect_tx`], into memory that the sink gives: one copy, the one that takes the frame out of the guest's
    /// reach.
    pub fn collect(&mut self, budget_frames: usize, sink: &mut impl FrameSink) -> usize {
        if self.broken {
            return 0;
        }
        let mut accepted = 0;
        // The pairs take turns, so that a busy one cannot starve the others; a turn's start is where the last call ended.
        let pairs = self.pairs_in_use;
        let mut empty_in_a_row = 0;
        // What is discarded counts as work, too: a guest that sends nothing but rubbish must not keep us here.
        let mut turns = (budget_frames.div_ceil(BURST_FRAMES) + 1) * pairs;
        while empty_in_a_row < pairs {
            if accepted == budget_frames {
                return accepted;
            }
            let index = RingIndex::transmit(self.next_transmit % pairs);
            if turns == 0 {
                self.come_back(index);
                return accepted;
            }
            turns -= 1;
            let wanted = (budget_frames - accepted).min(BURST_FRAMES);
            match self.collect_turn(index, wanted, sink, &mut accepted) {
                Ok(TxEnd::Empty) => empty_in_a_row += 1,
                Ok(TxEnd::Turn) => empty_in_a_row = 0,
                Ok(TxEnd::Refused) => return accepted,
                Err(fault) => {
                    self.break_ring(index, fault);
                    return accepted;
                }
            }
            self.next_transmit = (self.next_transmit + 1) % pairs;
        }
        accepted
    }

    /// One turn of one transmit ring.
    fn collect_turn(
        &mut self,
        index: RingIndex,
        wanted: usize,
        sink: &mut impl FrameSink,
        accepted: &mut usize,
    ) -> Result<TxEnd, RingFault> {
        let (features, bursts) = (self.features, self.bursts());
        let Self { slots, counters, scratch, .. } = self;
        let slot = &mut slots[usize::from(index.0)];
        let Some(ring) = slot.ring.as_deref_mut() else {
            return Ok(TxEnd::Empty);
        };
        let simple = slot.enabled && bursts;
        let mut left = wanted;
        while left > 0 {
            if simple {
                let (taken, end) = ring.drain_burst(left, sink)?;
                *accepted += taken;
                counters.tx_frames += taken as u64;
                left -= taken;
                match end {
                    End::All => return Ok(TxEnd::Turn),
                    End::Refused => return Ok(TxEnd::Refused),
                    End::Exhausted if ring.is_polling() => return Ok(TxEnd::Empty),
                    End::Exhausted if next_or_arm(ring)?.is_none() => return Ok(TxEnd::Empty),
                    End::Exhausted => continue,
                    End::Unusual => {}
                }
            }
            let Some(head) = next_or_arm(ring)? else {
                return Ok(TxEnd::Empty);
            };
            left -= 1;
            if !slot.enabled {
                counters.tx_disabled += 1;
                ring.complete(head, 0);
                ring.publish();
                continue;
            }
            match collect_unusual(ring, features, scratch, head, sink)? {
                Taken::Accepted => {
                    *accepted += 1;
                    counters.tx_frames += 1;
                }
                Taken::BadLength => counters.tx_bad_length += 1,
                Taken::Refused => return Ok(TxEnd::Refused),
            }
        }
        Ok(TxEnd::Turn)
    }

    /// Makes the ring look kicked: the caller sees fewer frames than it allowed, and would otherwise wait for a kick that nobody
    /// was asked for.
    #[cold]
    fn come_back(&self, index: RingIndex) {
        if let (Some(kick), false) = (&self.slots[usize::from(index.0)].kick, self.polling) {
            signal(kick);
        }
    }
}

/// What became of an unusual frame for the guest.
enum Unusual {
    Placed,
    TooLarge,
    /// A kick has been asked for.
    NoBuffers,
}

#[inline(never)]
fn inject_unusual(
    ring: &mut Ring,
    features: Features,
    scratch: &mut Scratch,
    frame: &[u8],
) -> Result<Unusual, RingFault> {
    let Scratch { pieces, chains, .. } = scratch;
    let header_bytes = features.header_bytes();
    let need = (header_bytes + frame.len() - VNET_HEADER_BYTES) as u64;
    loop {
        match find_room(ring, need, features.mergeable(), pieces, chains)? {
            Room::Enough => break,
            Room::Never => {
                // It waits no longer, whatever is offered.
                ring.starving = false;
                return Ok(Unusual::TooLarge);
            }
            Room::NotYet => {
                ring.starving = true;
                if !ring.arm()? {
                    return Ok(Unusual::NoBuffers);
                }
            }
        }
    }
    let mut header = [0; VNET_HEADER_BYTES];
    header.copy_from_slice(&frame[..VNET_HEADER_BYTES]);
    header[NUM_BUFFERS_OFFSET..].copy_from_slice(&(chains.len() as u16).to_le_bytes());
    scatter(ring, pieces, [&header[..header_bytes], &frame[VNET_HEADER_BYTES..]]);
    let mut left = need;
    for &(head, room) in chains.iter() {
        let written = left.min(room);
        ring.complete(head, written as u32);
        left -= written;
    }
    // All buffers of a frame become visible together (virtio 1.2 §5.1.6.4.1).
    ring.publish();
    ring.settle();
    mark_pieces(ring, pieces, need);
    Ok(Unusual::Placed)
}

/// What became of an unusual frame from the guest.
enum Taken {
    Accepted,
    BadLength,
    Refused,
}

#[inline(never)]
fn collect_unusual(
    ring: &mut Ring,
    features: Features,
    scratch: &mut Scratch,
    head: u16,
    sink: &mut impl FrameSink,
) -> Result<Taken, RingFault> {
    let header_bytes = features.header_bytes();
    let pieces = &mut scratch.pieces;
    pieces.clear();
    let len = ring.walk(head, pieces)?;
    if len < header_bytes as u64 {
        return Err(RingFault::NoHeader { len });
    }
    let len = len + (VNET_HEADER_BYTES - header_bytes) as u64;
    let taken = if (MIN_FRAME_BYTES as u64..=MAX_FRAME_BYTES as u64).contains(&len) {
        let Some(room) = sink.room(len as usize) else {
            return Ok(Taken::Refused);
        };
        gather(ring, pieces, header_bytes, room);
        if !sink.commit() {
            return Ok(Taken::Refused);
        }
        Taken::Accepted
    } else {
        Taken::BadLength
    };
    ring.complete(head, 0);
    ring.publish();
    Ok(taken)
}

/// Whether the receive ring has room for a frame.
enum Room {
    Enough,
    NotYet,
    Never,
}

/// Finds chains with `need` bytes of room, without consuming them: their memory goes to `pieces`, heads and sizes to `chains`.
fn find_room(
    ring: &mut Ring,
    need: u64,
    mergeable: bool,
    pieces: &mut Vec<Piece>,
    chains: &mut Vec<(u16, u64)>,
) -> Result<Room, RingFault> {
    pieces.clear();
    chains.clear();
    let mut room = 0;
    for ahead in 0..ring.size() {
        let Some(head) = ring.peek(ahead)? else {
            return Ok(Room::NotYet);
        };
        let bytes = ring.walk(head, pieces)?;
        chains.push((head, bytes));
        room += bytes;
        if room >= need {
            return Ok(Room::Enough);
        }
        if !mergeable {
            return Ok(Room::Never);
        }
    }
    // Every buffer that the ring can hold together is too small.
    Ok(Room::Never)
}

/// The next chain of a transmit ring; if there is none, the guest has been asked to kick.
fn next_or_arm(ring: &mut Ring) -> Result<Option<u16>, RingFault> {
    loop {
        if let Some(head) = ring.peek(0)? {
            ring.disarm();
            return Ok(Some(head));
        }
        // Ends: each turn needs entries that the guest added meanwhile, and peek finds those.
        if !ring.arm()? {
            return Ok(None);
        }
    }
}

/// Writes header and body over the pieces, which have room for both. Marks nothing.
fn scatter(ring: &Ring, pieces: &[Piece], parts: [&[u8]; 2]) {
    let mut pieces = pieces.iter().copied();
    let mut target = None;
    let mut filled = 0;
    for mut bytes in parts {
        while !bytes.is_empty() {
            let piece: Piece = match target {
                Some(piece) => piece,
                None => pieces.next().expect("find_room found enough"),
            };
            let len = bytes.len().min(piece.len as usize - filled);
            ring.ram().fill(piece, filled, &bytes[..len]);
            bytes = &bytes[len..];
            filled += len;
            target = Some(piece);
            if filled == piece.len as usize {
                (target, filled) = (None, 0);
            }
        }
    }
}

/// Marks the first `written` bytes of the pieces; after the fence in `settle`.
fn mark_pieces(ring: &Ring, pieces: &[Piece], mut written: u64) {
    for &piece in pieces {
        let len = written.min(u64::from(piece.len));
        ring.ram().mark(piece, len as u32);
        written -= len;
    }
}

/// Copies a chain to `frame`, which is as long as the chain plus what a short header lacks; that part becomes zero.
fn gather(ring: &Ring, pieces: &[Piece], header_bytes: usize, frame: &mut [u8]) {
    let missing = VNET_HEADER_BYTES - header_bytes;
    let mut at = missing;
    for &piece in pieces {
        let end = at + piece.len as usize;
        ring.ram().take(piece, &mut frame[at..end]);
        at = end;
    }
    if missing > 0 {
        frame.copy_within(missing..VNET_HEADER_BYTES, 0);
        frame[header_bytes..VNET_HEADER_BYTES].fill(0);
    }
}
