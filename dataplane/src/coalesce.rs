//! Joins TCP segments that follow one another on their way to the guest.
//!
//! A client whose answers are held back sees long round trips, paces itself by them, and cuts one write into packets of two
//! segments although nothing on the way asks for that. Each costs the guest an RX buffer, a walk through its network stack,
//! a read of its service that finds half a request, and an acknowledgement, on leader and secondary. So a packet that
//! continues the one before it in the batch is appended to it, as the kernel's GRO would. It happens before the batch is
//! proposed: both guests, and a replay from the log, get the same frames. Nothing is ever waited for.
//!
//! * Only a packet that is marked for segmentation already is appended to, which proves that the guest takes such packets
//!   ([`Uplink::set_offload`](crate::uplink::Uplink::set_offload)) and that the client's side made it for that.
//! * All headers must be equal but for what differs between neighbours, so that cutting the result gives back what came. Two
//!   things are lost: PSH inside, and the identification of packets that may not be fragmented, which means nothing (RFC 6864).
//! * PSH is no reason to stop, unlike in the kernel: Linux sets it on each packet of several segments, to tell a GRO that
//!   waits for more that it should not, and we do not wait.
//!
//! Rejected: looking for the flow among earlier frames of the batch (pieces of one write arrive together); joining two packets
//! of one segment each (they are small writes of their own, and a port that splits large ones is a matter of its driver).

use std::ops::Range;

use crate::frame::{VNET_HEADER_BYTES, VnetHeader};
use crate::uplink::offload::{GSO_TCPV4, GSO_TCPV6, MAX_SEGMENTS, NEEDS_CSUM, add, finish};

/// The port has found the checksum to be right (virtio 1.2 §5.1.6).
const DATA_VALID: u8 = 2;

// Where things are, counted from the start of the frame.
const ETHERTYPE: usize = VNET_HEADER_BYTES + 12;
const IP: usize = VNET_HEADER_BYTES + 14;
const IPV4_LENGTH: usize = IP + 2;
const IPV4_IDENTIFICATION: usize = IP + 4;
const IPV4_FRAGMENT: usize = IP + 6;
const IPV4_PROTOCOL: usize = IP + 9;
const IPV4_CHECKSUM: usize = IP + 10;
const IPV4_ADDRESSES: usize = IP + 12;
const IPV6_LENGTH: usize = IP + 4;
const IPV6_NEXT_HEADER: usize = IP + 6;
const IPV6_ADDRESSES: usize = IP + 8;

// From the start of the TCP header.
const TCP_BYTES: usize = 20;
const SEQUENCE: usize = 4;
const ACKNOWLEDGEMENT: usize = 8;
const OFFSET: usize = 12;
const FLAGS: usize = 13;
const WINDOW: usize = 14;
const CHECKSUM: usize = 16;
const URGENT: usize = 18;

const MAY_NOT_FRAGMENT: u16 = 0x4000;
const FLAG_PSH: u8 = 0x08;
const FLAG_ACK: u8 = 0x10;
const IPPROTO_TCP: u8 = 6;

fn u16_at(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

fn u32_at(frame: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
}

fn put(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Where the headers of a plain piece of a TCP stream are, and where they end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Headers {
    is_v6: bool,
    tcp: usize,
    end: usize,
}

impl Headers {
    /// `None` if the frame is anything else.
    fn of(frame: &[u8]) -> Option<Headers> {
        let is_v6 = match frame.get(ETHERTYPE..IP)? {
            [0x08, 0x00] => false,
            [0x86, 0xdd] => true,
            _ => return None,
        };
        let tcp = IP + if is_v6 { 40 } else { 20 };
        if frame.len() < tcp + TCP_BYTES {
            return None;
        }
        let end = tcp + usize::from(frame[tcp + OFFSET] >> 4) * 4;
        let plain = if is_v6 { is_plain_v6(frame) } else { is_plain_v4(frame) }
            // Bits that the offset's byte has besides are flags too.
            && frame[tcp + OFFSET] & 0x0f == 0
            && frame[tcp + FLAGS] & !FLAG_PSH == FLAG_ACK
            && end >= tcp + TCP_BYTES
            && end < frame.len();
        plain.then_some(Headers { is_v6, tcp, end })
    }

    /// Whether the checksum is left to compute, so that nothing has to be summed again.
    fn is_unsummed(self, vnet: &VnetHeader) -> bool {
        let checksum = (vnet.flags, usize::from(vnet.csum_start.get()), usize::from(vnet.csum_offset.get()));
        checksum == (NEEDS_CSUM, self.tcp - VNET_HEADER_BYTES, CHECKSUM)
    }

    fn gso_type(self) -> u8 {
        if self.is_v6 { GSO_TCPV6 } else { GSO_TCPV4 }
    }

    /// Whether the headers of `next` are those of a later piece of the stream of `first`; lengths, sequence numbers and
    /// checksums not looked at.
    fn are_alike(self, first: &[u8], next: &[u8], segments: usize) -> bool {
        let tcp = self.tcp;
        let same = |from: usize, to: usize| first[from..to] == next[from..to];
        let network = if self.is_v6 {
            same(VNET_HEADER_BYTES, IPV6_LENGTH) && same(IPV6_NEXT_HEADER, tcp)
        } else {
            let follows = || {
                u16_at(next, IPV4_IDENTIFICATION) == u16_at(first, IPV4_IDENTIFICATION).wrapping_add(segments as u16)
            };
            same(VNET_HEADER_BYTES, IPV4_LENGTH)
                && (u16_at(first, IPV4_FRAGMENT) & MAY_NOT_FRAGMENT != 0 || follows())
                && same(IPV4_FRAGMENT, IPV4_CHECKSUM)
                && same(IPV4_ADDRESSES, tcp)
        };
        network
            && same(tcp, tcp + SEQUENCE)
            && same(tcp + ACKNOWLEDGEMENT, tcp + FLAGS)
            && same(tcp + WINDOW, tcp + CHECKSUM)
            && same(tcp + URGENT, self.end)
    }

    /// Makes the headers those of a packet that ends where `frame` does.
    fn complete(self, frame: &mut [u8]) {
        let addresses = if self.is_v6 {
            put(frame, IPV6_LENGTH, (frame.len() - self.tcp) as u16);
            IPV6_ADDRESSES..self.tcp
        } else {
            put(frame, IPV4_LENGTH, (frame.len() - IP) as u16);
            put(frame, IPV4_CHECKSUM, 0);
            let checksum = finish(add(0, &frame[IP..self.tcp]));
            put(frame, IPV4_CHECKSUM, checksum);
            IPV4_ADDRESSES..self.tcp
        };
        // What is left to compute begins with the sum over the pseudo header.
        let length = (frame.len() - self.tcp) as u64;
        let pseudo = !finish(add(length + u64::from(IPPROTO_TCP), &frame[addresses]));
        put(frame, self.tcp + CHECKSUM, pseudo);
    }
}

/// No options, no padding, no fragment. The frame has room for the headers.
fn is_plain_v4(frame: &[u8]) -> bool {
    frame[IP] == 0x45
        && usize::from(u16_at(frame, IPV4_LENGTH)) == frame.len() - IP
        && u16_at(frame, IPV4_FRAGMENT) & !MAY_NOT_FRAGMENT == 0
        && frame[IPV4_PROTOCOL] == IPPROTO_TCP
        && finish(add(0, &frame[IP..IP + 20])) == 0
}

/// No extension headers, no padding. The frame has room for the headers.
fn is_plain_v6(frame: &[u8]) -> bool {
    frame[IP] >> 4 == 6
        && usize::from(u16_at(frame, IPV6_LENGTH)) == frame.len() - IP - 40
        && frame[IPV6_NEXT_HEADER] == IPPROTO_TCP
}

/// Whether `next` continues `first`. Returns the headers of both.
fn continues(first: &[u8], next: &[u8]) -> Option<Headers> {
    let (vnet, next_vnet) = (VnetHeader::of(first)?, VnetHeader::of(next)?);
    // Most frames end here.
    if vnet.gso_type == 0 {
        return None;
    }
    let headers = Headers::of(first)?;
    let segment_bytes = usize::from(vnet.gso_size.get());
    if vnet.gso_type != headers.gso_type() || segment_bytes == 0 || !headers.is_unsummed(vnet) {
        return None;
    }
    if Headers::of(next)? != headers {
        return None;
    }
    let (ours, theirs) = (first.len() - headers.end, next.len() - headers.end);
    let fits = match next_vnet.gso_type {
        0 => theirs <= segment_bytes && (next_vnet.flags == DATA_VALID || headers.is_unsummed(next_vnet)),
        kind => {
            let size = usize::from(next_vnet.gso_size.get());
            kind == vnet.gso_type && size == segment_bytes && headers.is_unsummed(next_vnet)
        }
    };
    let neighbours = fits
        && ours.is_multiple_of(segment_bytes)
        && (ours + theirs).div_ceil(segment_bytes) <= MAX_SEGMENTS
        && first.len() - IP + theirs <= usize::from(u16::MAX)
        && u32_at(next, headers.tcp + SEQUENCE) == u32_at(first, headers.tcp + SEQUENCE).wrapping_add(ours as u32)
        && headers.are_alike(first, next, ours / segment_bytes);
    neighbours.then_some(headers)
}

/// Appends the payload of the frame at `next` to the one at `first`, which lies before it, and returns how long that is then;
/// `None` if the two are not neighbours, and then nothing changes.
///
/// # Panics
/// If the two do not lie in `memory` in this order.
pub(crate) fn join(memory: &mut [u8], first: Range<usize>, next: Range<usize>) -> Option<usize> {
    assert!(first.end <= next.start, "the frame at {} begins before the one at {} ends", next.start, first.start);
    let headers = continues(&memory[first.clone()], &memory[next.clone()])?;
    let flags = memory[next.start + headers.tcp + FLAGS];
    memory.copy_within(next.start + headers.end..next.end, first.end);
    let bytes = first.len() + next.len() - headers.end;
    let frame = &mut memory[first.start..first.start + bytes];
    frame[headers.tcp + FLAGS] |= flags;
    headers.complete(frame);
    Some(bytes)
}

/// For a fuzzer: whatever frames arrive, one behind the other, the batch holds them or what cuts into the same.
#[doc(hidden)]
pub fn fuzz_join(bytes: &[u8]) {
    let mut arriving: Vec<&[u8]> = Vec::new();
    let mut rest = bytes;
    while let Some((length, behind)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(behind.len());
        let (frame, behind) = behind.split_at(length);
        arriving.push(frame);
        rest = behind;
    }
    arriving.retain(|frame| frame.len() >= VNET_HEADER_BYTES);
    let batch = fuzz::batch_of(&arriving);
    let cut = |frames: &[&[u8]]| frames.iter().flat_map(|frame| fuzz::wire(frame)).collect::<Vec<_>>();
    let joined: Vec<&[u8]> = batch.iter().map(Vec::as_slice).collect();
    assert_eq!(cut(&joined), cut(&arriving), "the guest gets something else than what came");
}

/// What fuzzing and tests compare.
mod fuzz {
    use super::{CHECKSUM, put, u16_at};
    use super::{FLAG_PSH, FLAGS, Headers, IPV4_CHECKSUM, IPV4_FRAGMENT, IPV4_IDENTIFICATION, MAY_NOT_FRAGMENT};
    use crate::batch::{BatchBuilder, MIN_BATCH_BYTES, frames};
    use crate::frame::{VNET_HEADER_BYTES, VnetHeader};
    use crate::uplink::Intake;
    use crate::uplink::filter::{Action, Filter};
    use crate::uplink::offload::Segments;

    /// What a batch holds after these frames came in.
    pub fn batch_of(arriving: &[&[u8]]) -> Vec<Vec<u8>> {
        let bytes: usize = arriving.iter().map(|frame| frame.len() + 4).sum();
        let mut batch = BatchBuilder::new(MIN_BATCH_BYTES + bytes);
        let mut filter = Filter::new(&[], Action::Order);
        let mut intake = Intake::new(&mut batch, &mut filter);
        for frame in arriving {
            intake.spare(frame.len()).expect("it has room for all").copy_from_slice(frame);
            intake.commit(frame.len());
        }
        frames(&batch.finish()).expect("a builder made it").map(<[u8]>::to_vec).collect()
    }

    /// A frame as a network without offloads would carry it, without what joining may lose and what follows from the rest.
    pub fn wire(frame: &[u8]) -> Vec<Vec<u8>> {
        let is_cut = VnetHeader::of(frame).is_some_and(|vnet| vnet.gso_type != 0) && Headers::of(frame).is_some();
        let mut pieces = match Segments::of(frame) {
            Ok(segments) if is_cut => (0..segments.len())
                .map(|at| {
                    let mut piece = vec![0; segments.bytes(at)];
                    segments.write(frame, at, &mut piece);
                    piece
                })
                .collect(),
            _ => vec![frame.to_vec()],
        };
        pieces.iter_mut().for_each(|piece| forget(piece));
        pieces
    }

    fn forget(piece: &mut [u8]) {
        let Some(headers) = Headers::of(piece) else { return };
        piece[..VNET_HEADER_BYTES].fill(0);
        piece[headers.tcp + FLAGS] &= !FLAG_PSH;
        put(piece, headers.tcp + CHECKSUM, 0);
        if !headers.is_v6 {
            put(piece, IPV4_CHECKSUM, 0);
            if u16_at(piece, IPV4_FRAGMENT) & MAY_NOT_FRAGMENT != 0 {
                put(piece, IPV4_IDENTIFICATION, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fuzz::batch_of;
    use super::*;
    use crate::uplink::offload::Segments;
    use proptest::prelude::*;

    const SEGMENT: usize = 1448;
    const OPTIONS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    /// Where the bytes of the stream begin: its sequence numbers start over soon.
    const FIRST_SEQUENCE: u32 = u32::MAX - 3000;

    /// A stream that has the byte `n as u8` at place `n`.
    #[derive(Debug, Clone, Copy)]
    struct Stream {
        is_v6: bool,
        segment_bytes: usize,
    }

    const V4: Stream = Stream { is_v6: false, segment_bytes: SEGMENT };
    const V6: Stream = Stream { is_v6: true, segment_bytes: SEGMENT };

    impl Stream {
        fn tcp(self) -> usize {
            IP + if self.is_v6 { 40 } else { 20 }
        }

        /// A piece of it, marked for segmentation if it is longer than a segment.
        fn piece(self, from: usize, bytes: usize) -> Vec<u8> {
            let tcp = self.tcp();
            let mut frame = vec![0; tcp + TCP_BYTES];
            let (gso_type, gso_size) = match bytes > self.segment_bytes {
                true => (if self.is_v6 { GSO_TCPV6 } else { GSO_TCPV4 }, self.segment_bytes),
                false => (0, 0),
            };
            frame[..2].copy_from_slice(&[NEEDS_CSUM, gso_type]);
            let numbers = [tcp + TCP_BYTES + OPTIONS.len() - VNET_HEADER_BYTES, gso_size, tcp - VNET_HEADER_BYTES, 16];
            for (number, field) in numbers.iter().zip(frame[2..10].as_chunks_mut::<2>().0) {
                *field = (*number as u16).to_le_bytes();
            }
            if self.is_v6 {
                frame[ETHERTYPE..IP + 1].copy_from_slice(&[0x86, 0xdd, 0x60]);
                frame[IPV6_NEXT_HEADER..IPV6_ADDRESSES].copy_from_slice(&[IPPROTO_TCP, 64]);
                frame[IPV6_ADDRESSES..tcp].copy_from_slice(&std::array::from_fn::<u8, 32, _>(|at| at as u8));
            } else {
                frame[ETHERTYPE..IP + 1].copy_from_slice(&[8, 0, 0x45]);
                put(&mut frame, IPV4_IDENTIFICATION, (from / self.segment_bytes) as u16);
                put(&mut frame, IPV4_FRAGMENT, MAY_NOT_FRAGMENT);
                frame[IP + 8..IP + 10].copy_from_slice(&[64, IPPROTO_TCP]);
                frame[IPV4_ADDRESSES..tcp].copy_from_slice(&[10, 77, 0, 9, 10, 77, 0, 50]);
            }
            frame[tcp..tcp + SEQUENCE].copy_from_slice(&[0x90, 1, 0x18, 0xeb]);
            let sequence = FIRST_SEQUENCE.wrapping_add(from as u32);
            frame[tcp + SEQUENCE..tcp + ACKNOWLEDGEMENT].copy_from_slice(&sequence.to_be_bytes());
            frame[tcp + OFFSET..tcp + CHECKSUM].copy_from_slice(&[0x80, FLAG_ACK | FLAG_PSH, 2, 0]);
            frame.extend(OPTIONS);
            frame.extend((from..from + bytes).map(|place| place as u8));
            self.complete(&mut frame);
            frame
        }

        fn complete(self, frame: &mut [u8]) {
            Headers { is_v6: self.is_v6, tcp: self.tcp(), end: 0 }.complete(frame);
        }
    }

    fn joined(arriving: &[Vec<u8>]) -> Vec<Vec<u8>> {
        batch_of(&arriving.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    fn are_joined(first: &[u8], next: &[u8]) -> bool {
        batch_of(&[first, next]).len() == 1
    }

    #[test]
    fn pieces_of_one_write_reach_the_guest_as_one_packet() {
        for stream in [V4, V6] {
            let pieces = [stream.piece(0, 2896), stream.piece(2896, 2896), stream.piece(5792, 1056)];
            let whole = stream.piece(0, 6848);
            assert_eq!(joined(&pieces), std::slice::from_ref(&whole));
            // A short piece ends it; what follows is a packet of its own.
            let more = stream.piece(6848, 2896);
            assert_eq!(joined(&[&pieces[..], std::slice::from_ref(&more)].concat()), [whole, more]);
        }
    }

    #[test]
    fn whatever_else_differs_stays_apart() {
        for stream in [V4, V6] {
            let (first, next, tcp) = (stream.piece(0, 2896), stream.piece(2896, 1000), stream.tcp());
            assert!(are_joined(&first, &next));
            // Of the vnet header: how long the headers and a segment are, and how many buffers; all are the first packet's.
            let ignored = [2..6, 10..12, tcp + CHECKSUM..tcp + URGENT];
            // Lengths and sums, and an identification that means nothing.
            let completed = match stream.is_v6 {
                true => [IPV6_LENGTH..IPV6_NEXT_HEADER, 0..0],
                false => [IPV4_LENGTH..IPV4_FRAGMENT, IPV4_CHECKSUM..IPV4_ADDRESSES],
            };
            for bit in 0..(tcp + TCP_BYTES + OPTIONS.len()) * 8 {
                let mut other = next.clone();
                other[bit / 8] ^= 1 << (bit % 8);
                let may_differ = bit == (tcp + FLAGS) * 8 + 3 || ignored.iter().any(|bytes| bytes.contains(&(bit / 8)));
                assert_eq!(are_joined(&first, &other), may_differ, "bit {} of byte {}", bit % 8, bit / 8);
                // With the sums made right it is the headers themselves that are looked at.
                stream.complete(&mut other);
                let expected = may_differ || completed.iter().any(|bytes| bytes.contains(&(bit / 8)));
                assert_eq!(
                    are_joined(&first, &other),
                    expected,
                    "bit {} of byte {}, with right sums",
                    bit % 8,
                    bit / 8
                );
            }
            assert!(
                !are_joined(&stream.piece(0, 1448), &stream.piece(1448, 100)),
                "nothing shows that the guest takes more"
            );
            assert!(!are_joined(&stream.piece(0, 2000), &stream.piece(2000, 100)), "a short segment is the last");
            assert!(!are_joined(&first, &stream.piece(2897, 100)), "a gap");
            assert!(!are_joined(&first, &stream.piece(2895, 100)), "sent again");
            assert!(!are_joined(&first, &stream.piece(2896, 0)), "an acknowledgement");
            let other = Stream { segment_bytes: 1400, ..stream };
            assert!(!are_joined(&first, &other.piece(2896, 2800)), "cut differently");
            let other = Stream { segment_bytes: 8000, ..stream };
            assert!(!are_joined(&first, &other.piece(2896, 2000)), "it came in one piece, and would be cut");
        }
        assert!(!are_joined(&V4.piece(0, 2896), &V6.piece(2896, 100)));
    }

    #[test]
    fn first_packets_that_are_not_plain_take_nothing() {
        for stream in [V4, V6] {
            let (first, next, tcp) = (stream.piece(0, 2896), stream.piece(2896, 1000), stream.tcp());
            let mut set = Vec::new();
            let with = |at: usize, byte: u8| {
                let mut frame = first.clone();
                frame[at] = byte;
                frame
            };
            // FIN, SYN, RST, URG, ECE, CWR, and AE; no ACK; ECN and DATA_VALID in the vnet header; the other version.
            set.extend([1, 2, 4, 0x20, 0x40, 0x80].map(|flag| with(tcp + FLAGS, FLAG_ACK | flag)));
            set.extend([
                with(tcp + OFFSET, 0x81),
                with(tcp + FLAGS, 0),
                with(0, NEEDS_CSUM | DATA_VALID),
                with(0, DATA_VALID),
            ]);
            set.extend(
                [GSO_TCPV4 | 0x80, GSO_TCPV6 | 0x80, 5, GSO_TCPV4 ^ GSO_TCPV6 ^ first[1]].map(|kind| with(1, kind)),
            );
            // The same in both, so that nothing differs.
            for mut frame in set {
                let mut other = next.clone();
                other[tcp + OFFSET..tcp + FLAGS + 1].copy_from_slice(&frame[tcp + OFFSET..tcp + FLAGS + 1]);
                stream.complete(&mut frame);
                assert!(!are_joined(&frame, &other), "{:?}", &frame[..tcp + TCP_BYTES]);
            }
        }
    }

    #[test]
    fn a_push_anywhere_is_one_at_the_end() {
        let with = |mut frame: Vec<u8>, is_push: bool| {
            let flags = if is_push { FLAG_ACK | FLAG_PSH } else { FLAG_ACK };
            frame[V4.tcp() + FLAGS] = flags;
            frame
        };
        for (first, next) in [(false, false), (false, true), (true, false), (true, true)] {
            let pieces = [with(V4.piece(0, 2896), first), with(V4.piece(2896, 2896), next)];
            assert_eq!(joined(&pieces), [with(V4.piece(0, 5792), first || next)]);
        }
    }

    #[test]
    fn what_the_port_has_summed_is_joined_and_what_nobody_has_is_not() {
        let (first, whole) = (V4.piece(0, 2896), V4.piece(0, 3896));
        let mut next = V4.piece(2896, 1000);
        next[6..10].fill(0);
        next[0] = DATA_VALID;
        put(&mut next, V4.tcp() + CHECKSUM, 0x1234);
        assert_eq!(batch_of(&[&first, &next]), [whole]);
        next[0] = 0;
        assert!(!are_joined(&first, &next));
    }

    #[test]
    fn an_identification_counts_where_it_means_something() {
        let at = |from, bytes, identification, fragment| {
            let mut frame = V4.piece(from, bytes);
            put(&mut frame, IPV4_IDENTIFICATION, identification);
            put(&mut frame, IPV4_FRAGMENT, fragment);
            V4.complete(&mut frame);
            frame
        };
        let alike =
            |first: u16, next: u16, fragment| are_joined(&at(0, 2896, first, fragment), &at(2896, 100, next, fragment));
        assert!(alike(7, 9, 0) && alike(0xffff, 1, 0) && alike(7, 1000, MAY_NOT_FRAGMENT));
        assert!(!alike(7, 8, 0) && !alike(7, 7, 0), "two segments have two numbers");
        assert!(!alike(7, 9, 0x2000) && !alike(7, 9, 1) && !alike(7, 9, 0x8000), "fragments, and the reserved bit");
    }

    #[test]
    fn a_packet_grows_no_further_than_ip_and_those_who_cut_it_allow() {
        for (stream, room) in [(V4, 65_535 - 52), (V6, 65_535 - 72)] {
            let pieces: Vec<_> = (0..60).map(|at| stream.piece(at * 2896, 2896)).collect();
            let frames = joined(&pieces);
            assert!(frames.iter().all(|frame| Segments::of(frame).is_ok()));
            let lengths = frames.iter().map(|frame| frame.len() - stream.tcp() - 32).collect::<Vec<_>>();
            assert_eq!(lengths[0], room / 2896 * 2896, "{lengths:?}");
            assert_eq!(lengths.iter().sum::<usize>(), 60 * 2896);
        }
        let small = Stream { segment_bytes: 100, ..V4 };
        let pieces: Vec<_> = (0..200).map(|at| small.piece(at * 200, 200)).collect();
        let frames = joined(&pieces);
        let counts: Vec<_> = frames.iter().map(|frame| Segments::of(frame).map(|segments| segments.len())).collect();
        assert_eq!(counts, [Ok(MAX_SEGMENTS), Ok(400 - MAX_SEGMENTS)]);
    }

    /// What a network without offloads would carry, byte by byte, without PSH inside.
    fn cut(frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        for frame in frames {
            let segments = Segments::of(frame).expect("it is whole");
            for at in 0..segments.len() {
                let mut piece = vec![0; segments.bytes(at)];
                segments.write(frame, at, &mut piece);
                pieces.push(piece);
            }
        }
        pieces
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(256) })]
        /// Cutting undoes joining, checksums and all.
        #[test]
        fn the_guest_gets_what_would_have_come_in_pieces(
            sizes in prop::collection::vec((1usize..6, 0usize..1448, 0u8..10), 1..24),
            is_v6 in any::<bool>(),
        ) {
            let stream = Stream { is_v6, segment_bytes: SEGMENT };
            let (mut from, mut arriving) = (0, Vec::new());
            for (segments, rest, what) in sizes {
                // Mostly whole segments.
                let bytes = segments * SEGMENT + if rest % 3 == 0 { rest } else { 0 };
                let mut piece = stream.piece(from, bytes);
                piece[stream.tcp() + FLAGS] &= !FLAG_PSH;
                match what {
                    // Lost on the way, another window, twice.
                    0 => {}
                    1 => {
                        piece[stream.tcp() + WINDOW] ^= 1;
                        arriving.push(piece);
                    }
                    2 => arriving.extend([piece.clone(), piece]),
                    _ => arriving.push(piece),
                }
                from += bytes;
            }
            let frames = joined(&arriving);
            prop_assert!(frames.len() <= arriving.len());
            prop_assert!(cut(&frames) == cut(&arriving));
        }

        #[test]
        fn nothing_that_arrives_can_harm(
            frames in prop::collection::vec((0usize..3000, any::<u8>(), any::<u8>()), 1..8),
            noise in prop::collection::vec(any::<u8>(), 0..300),
            is_v6 in any::<bool>(),
        ) {
            let stream = Stream { is_v6, segment_bytes: SEGMENT };
            let (mut from, mut bytes) = (0, Vec::new());
            for (size, at, byte) in frames {
                let mut piece = stream.piece(from, if size % 2 == 0 { 2896 } else { size });
                from += piece.len() - stream.tcp() - 32;
                // The second half of the places is no change.
                if at < 128 {
                    piece[usize::from(at) % (stream.tcp() + 32)] = byte;
                }
                bytes.extend_from_slice(&(piece.len() as u16).to_le_bytes());
                bytes.extend_from_slice(&piece);
            }
            bytes.extend_from_slice(&noise);
            fuzz_join(&bytes);
            fuzz_join(&noise);
        }
    }
}
