//! The usual case of both rings, in bursts: chains of one descriptor whose buffer lies in one region of memory.
//!
//! What costs time at tens of millions of frames a second is cache lines that travel between the guest's core and ours, and
//! whatever makes us wait for one before the next is asked for. So a burst first reads all its descriptors, which brings all
//! buffers under way, then copies, then shows the guest everything at once (to its receive ring: in two halves, so that it begins
//! with the first while we copy the second), and passes one fence (DPDK's vhost library does it packet by packet, with the next one
//! under way). Rejected, because measured side by side they cost time: to claim the next burst's receive buffers ahead while the guest
//! takes this one (it has lines to fetch then, too), and to return transmit buffers only behind what was received. Everything unusual (chains, indirect tables, buffers across regions, faults)
//! ends a burst before it, and the caller takes that one frame by `Ring::walk`, where the rules of the ring stand.

use virtio_bindings::bindings::virtio_ring::VRING_DESC_F_WRITE;

use super::memory::Piece;
use super::net::{MAX_FRAME_BYTES, MIN_FRAME_BYTES, NUM_BUFFERS_OFFSET, VNET_HEADER_BYTES};
use super::ring::{RING_HEADER_BYTES, Ring, RingFault};

/// Frames in one burst: enough to hide a cache miss, few enough for the buffers to stay in the nearest cache.
pub(super) const BURST_FRAMES: usize = 32;
/// So many the guest is shown before the rest of a burst is copied. A guest that answers a burst of 32 then answers half as many again
/// in the same time; one that is only flooded takes a few per cent less, for the line of the index that travels twice.
const FIRST_FRAMES: usize = BURST_FRAMES / 2;

/// Where frames from the guest go: memory is asked for first, so that a frame is copied once.
///
/// Copying is what makes a frame ours: the guest may change its buffer at any time.
pub trait FrameSink {
    /// Memory for a frame of exactly `len_bytes`; None if there is none, and the frame stays in the ring.
    fn room(&mut self, len_bytes: usize) -> Option<&mut [u8]>;

    /// The frame is in the memory that `room` gave last. False refuses it: it stays in the ring.
    fn commit(&mut self) -> bool;
}

/// Why a burst ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// As many as wanted.
    All,
    /// The guest had offered no more when the ring was looked at.
    Exhausted,
    /// The next chain is for `Ring::walk`.
    Unusual,
    /// The sink refused one.
    Refused,
}

/// Chains of a burst.
struct Chains {
    heads: [u16; BURST_FRAMES],
    pieces: [Piece; BURST_FRAMES],
    count: usize,
}

impl Ring {
    /// The next chains, up to `offered` of those that are, as long as each is one descriptor with these flags and `fits` takes
    /// its length.
    #[inline]
    fn simple_chains(
        &mut self,
        offered: usize,
        flags: u16,
        fits: impl Fn(usize, u32) -> bool,
        prefetch: impl Fn(&Self, usize, Piece),
    ) -> Chains {
        let count = offered.min(BURST_FRAMES);
        let mut chains = Chains { heads: [0; BURST_FRAMES], pieces: [Piece::default(); BURST_FRAMES], count: 0 };
        let mask = self.size() - 1;
        for (ahead, head) in chains.heads.iter_mut().enumerate().take(count) {
            let entry = usize::from(self.next_avail.wrapping_add(ahead as u16) & mask);
            *head = self.available.load_u16(RING_HEADER_BYTES + 2 * entry, std::sync::atomic::Ordering::Relaxed);
        }
        let mut region = self.region;
        for at in 0..count {
            let head = chains.heads[at];
            if head > mask {
                break;
            }
            let descriptor = self.own_descriptor(head);
            if descriptor.flags != flags || !fits(at, descriptor.len) {
                break;
            }
            let Some(piece) = self.ram.whole(&mut region, descriptor.address, descriptor.len) else {
                break;
            };
            prefetch(self, at, piece);
            chains.pieces[at] = piece;
            chains.count = at + 1;
        }
        self.region = region;
        self.prefetch_ahead(chains.count);
        chains
    }

    /// Gives frames to the guest, header of 12 bytes included. Returns how many, and why it ended.
    pub(super) fn fill_burst(&mut self, frames: &[&[u8]]) -> Result<(usize, End), RingFault> {
        let (offered, exhausted) = self.offered(frames.len())?;
        let chains = self.simple_chains(
            offered,
            VRING_DESC_F_WRITE as u16,
            |at, len| len as usize >= frames[at].len(),
            |ring, at, piece| ring.ram.prefetch::<true>(piece, frames[at].len()),
        );
        let count = chains.count;
        let taken = || chains.pieces[..count].iter().zip(frames);
        // Headers first: a driver puts them in front of a frame that begins on a line of its own, so each pass writes whole lines
        // and none straddles two. They go by registers: a load that spans several stores in flight waits until those are done, and
        // they are done in order, behind all that wait for the guest's lines.
        for (&piece, frame) in taken() {
            let (start, rest) = header_words(frame);
            self.ram.fill(piece, 0, &start.to_le_bytes());
            self.ram.fill(piece, 8, &rest.to_le_bytes());
        }
        let first = count.min(FIRST_FRAMES);
        for part in [0..first, first..count] {
            for (&piece, frame) in chains.pieces[part.clone()].iter().zip(&frames[part.clone()]) {
                self.ram.fill(piece, VNET_HEADER_BYTES, &frame[VNET_HEADER_BYTES..]);
            }
            for (&head, frame) in chains.heads[part.clone()].iter().zip(&frames[part]) {
                self.complete(head, frame.len() as u32);
            }
            // Bytes, then the index, then the fence in `settle`, then the marks.
            self.publish();
        }
        self.settle();
        for (&piece, frame) in taken() {
            self.ram.mark(piece, frame.len() as u32);
        }
        Ok((count, end_of(count, offered, exhausted)))
    }

    /// Passes up to `wanted` frames of 12 bytes of header and the rest to the sink, and completes those that it took. Returns
    /// how many those are, and why it ended.
    pub(super) fn drain_burst(&mut self, wanted: usize, sink: &mut impl FrameSink) -> Result<(usize, End), RingFault> {
        let (offered, exhausted) = self.offered(wanted.min(BURST_FRAMES))?;
        if offered == 0 {
            return Ok((0, End::Exhausted));
        }
        let sensible = |_, len: u32| (MIN_FRAME_BYTES..=MAX_FRAME_BYTES).contains(&(len as usize));
        let chains = self.simple_chains(offered, 0, sensible, |ring, _, piece| {
            ring.ram.prefetch::<false>(piece, piece.len as usize);
        });
        let mut end = end_of(chains.count, offered, exhausted);
        if chains.count > 0 {
            // Not for a chain that turns out to be a fault: the long way disarms behind its checks, too.
            self.disarm();
        }
        let mut count = 0;
        for &piece in &chains.pieces[..chains.count] {
            let Some(room) = sink.room(piece.len as usize) else {
                end = End::Refused;
                break;
            };
            assert_eq!(room.len(), piece.len as usize, "a sink gives the memory that it was asked for");
            self.ram.take(piece, room);
            if !sink.commit() {
                end = End::Refused;
                break;
            }
            count += 1;
        }
        // Not in between: these writes wait for the guest's lines, and what is written after them waits, too.
        for &head in &chains.heads[..count] {
            self.complete(head, 0);
        }
        self.publish();
        Ok((count, end))
    }
}

/// The header of a frame in one buffer: eight bytes, and four that end with `num_buffers`, as little-endian numbers.
#[inline]
fn header_words(frame: &[u8]) -> (u64, u32) {
    const _: () = assert!(VNET_HEADER_BYTES == 12 && NUM_BUFFERS_OFFSET == 10);
    let start = u64::from_le_bytes(frame[..8].try_into().expect("eight bytes"));
    let middle = u16::from_le_bytes(frame[8..10].try_into().expect("two bytes"));
    (start, u32::from(middle) | 1 << 16)
}

fn end_of(simple: usize, offered: usize, exhausted: bool) -> End {
    if simple < offered {
        End::Unusual
    } else if exhausted {
        End::Exhausted
    } else {
        End::All
    }
}
