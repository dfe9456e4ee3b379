//! Joins TCP segments that follow one another on their way to the guest.
//!
//! A client whose answers are held back sees long round trips, and its TCP cuts what it sends into many small packets
//! although nothing on the way asks for that. Each costs the guest an RX buffer, a walk through its network stack and an
//! acknowledgement, on leader and secondary. So a packet that continues the one before it in the batch is appended to it, as
//! the kernel's GRO would. It happens before the batch is proposed: both guests get the same frames.
//!
//! Only a packet that is marked for segmentation already is appended to, which proves that the guest takes such packets. All
//! headers must be equal but for what differs between neighbours; PSH is no reason to stop, unlike in the kernel, because
//! the sender sets it on each of its pieces. Rejected: looking for the flow among earlier frames of the batch (pieces of one
//! write arrive together), and waiting for more to come (nothing is delayed).

use crate::frame::{VNET_HEADER_BYTES, VnetHeader};

/// The only flag that both must have: the checksum is left to compute, so nothing has to be summed again.
const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;

// Where things are, counted from the start of the frame.
const ETHERTYPE: usize = VNET_HEADER_BYTES + 12;
const IP: usize = VNET_HEADER_BYTES + 14;
const IP_LENGTH: usize = IP + 2;
const IP_FRAGMENT: usize = IP + 6;
const IP_PROTOCOL: usize = IP + 9;
const IP_CHECKSUM: usize = IP + 10;
const IP_ADDRESSES: usize = IP + 12;
const TCP: usize = IP + 20;
const TCP_SEQUENCE: usize = TCP + 4;
const TCP_ACK: usize = TCP + 8;
const TCP_OFFSET: usize = TCP + 12;
const TCP_FLAGS: usize = TCP + 13;
const TCP_WINDOW: usize = TCP + 14;
const TCP_CHECKSUM: usize = TCP + 16;
const TCP_URGENT: usize = TCP + 18;

const FLAG_PSH: u8 = 0x08;
const FLAG_ACK: u8 = 0x10;
const IPPROTO_TCP: u8 = 6;

fn u16_at(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

fn u32_at(frame: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]])
}

/// The one's complement sum of big-endian words, folded.
fn sum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = bytes.as_chunks::<2>().0.iter().fold(start, |sum, word| sum + u32::from(u16::from_be_bytes(*word)));
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Bytes of all headers of a plain piece of a TCP stream over IPv4, or `None` if the frame is anything else.
fn header_bytes(frame: &[u8]) -> Option<usize> {
    let vnet = VnetHeader::of(frame)?;
    let checksum = (vnet.flags, usize::from(vnet.csum_start.get()), usize::from(vnet.csum_offset.get()));
    if checksum != (NEEDS_CSUM, TCP - VNET_HEADER_BYTES, TCP_CHECKSUM - TCP) || frame.len() < TCP + 20 {
        return None;
    }
    let end = TCP + usize::from(frame[TCP_OFFSET] >> 4) * 4;
    let plain = u16_at(frame, ETHERTYPE) == 0x0800
        && frame[IP] == 0x45
        && usize::from(u16_at(frame, IP_LENGTH)) == frame.len() - IP
        // More fragments, or not the first one.
        && u16_at(frame, IP_FRAGMENT) & 0x3fff == 0
        && frame[IP_PROTOCOL] == IPPROTO_TCP
        && sum(0, &frame[IP..TCP]) == 0xffff
        && end >= TCP + 20
        && end < frame.len()
        && frame[TCP_FLAGS] & !FLAG_PSH == FLAG_ACK;
    plain.then_some(end)
}

/// Whether `next` continues `first`. Returns the bytes of the headers of both.
fn continues(first: &[u8], next: &[u8]) -> Option<usize> {
    let vnet = VnetHeader::of(first)?;
    let segment_bytes = usize::from(vnet.gso_size.get());
    if vnet.gso_type != GSO_TCPV4 || segment_bytes == 0 {
        return None;
    }
    let end = header_bytes(first)?;
    if header_bytes(next)? != end {
        return None;
    }
    let (ours, theirs) = (first.len() - end, next.len() - end);
    let next_vnet = VnetHeader::of(next)?;
    let fits = match next_vnet.gso_type {
        GSO_TCPV4 => usize::from(next_vnet.gso_size.get()) == segment_bytes,
        0 => theirs <= segment_bytes,
        _ => false,
    };
    let same = |from: usize, to: usize| first[from..to] == next[from..to];
    let neighbours = fits
        && ours.is_multiple_of(segment_bytes)
        && first.len() - IP + theirs <= usize::from(u16::MAX)
        && u32_at(next, TCP_SEQUENCE) == u32_at(first, TCP_SEQUENCE).wrapping_add(ours as u32)
        // Not compared: IP's length, identification and checksum, TCP's sequence number, flags and checksum.
        && same(VNET_HEADER_BYTES, IP_LENGTH)
        && same(IP_FRAGMENT, IP_CHECKSUM)
        && same(IP_ADDRESSES, TCP_SEQUENCE)
        && same(TCP_ACK, TCP_FLAGS)
        && same(TCP_WINDOW, TCP_CHECKSUM)
        && same(TCP_URGENT, end);
    neighbours.then_some(end)
}

/// Appends the payload of the frame at `next..next + next_bytes` to the one at `first..first + first_bytes`, which lies before
/// it, and returns how long that is then; `None` if the two are not neighbours, and then nothing changes.
///
/// # Panics
/// If the two do not lie in `memory` in this order.
pub(crate) fn join(
    memory: &mut [u8],
    (first, first_bytes): (usize, usize),
    (next, next_bytes): (usize, usize),
) -> Option<usize> {
    let end = continues(&memory[first..first + first_bytes], &memory[next..next + next_bytes])?;
    let flags = memory[next + TCP_FLAGS];
    memory.copy_within(next + end..next + next_bytes, first + first_bytes);
    let bytes = first_bytes + next_bytes - end;
    let frame = &mut memory[first..first + bytes];
    let put = |frame: &mut [u8], at: usize, value: u16| frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
    frame[TCP_FLAGS] |= flags;
    put(frame, IP_LENGTH, (bytes - IP) as u16);
    put(frame, IP_CHECKSUM, 0);
    let checksum = !sum(0, &frame[IP..TCP]);
    put(frame, IP_CHECKSUM, checksum);
    // What is left to compute begins with the sum over the pseudo header.
    let pseudo = sum(u32::from(IPPROTO_TCP) + (bytes - TCP) as u32, &frame[IP_ADDRESSES..TCP]);
    put(frame, TCP_CHECKSUM, pseudo);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{BatchBuilder, MIN_BATCH_BYTES, frames};
    use crate::uplink::Intake;
    use crate::uplink::filter::{Action, Filter};
    use crate::uplink::offload::Segments;
    use proptest::prelude::*;

    const SEGMENT: usize = 1448;
    const OPTIONS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];

    /// A piece of the stream that has the byte `n as u8` at place `n`, cut for `SEGMENT` if it is longer.
    fn piece(from: usize, bytes: usize) -> Vec<u8> {
        let mut frame = vec![0; TCP + 20];
        let gso = if bytes > SEGMENT { (GSO_TCPV4, SEGMENT as u16) } else { (0, 0) };
        frame[..2].copy_from_slice(&[NEEDS_CSUM, gso.0]);
        frame[2..4].copy_from_slice(&66u16.to_le_bytes());
        frame[4..6].copy_from_slice(&gso.1.to_le_bytes());
        frame[6..10].copy_from_slice(&[34, 0, 16, 0]);
        frame[ETHERTYPE..ETHERTYPE + 2].copy_from_slice(&[8, 0]);
        frame[IP] = 0x45;
        frame[IP_FRAGMENT] = 0x40;
        frame[IP + 8..IP + 10].copy_from_slice(&[64, IPPROTO_TCP]);
        frame[IP_ADDRESSES..TCP].copy_from_slice(&[10, 77, 0, 9, 10, 77, 0, 50]);
        frame[TCP..TCP + 4].copy_from_slice(&[0x90, 1, 0x18, 0xeb]);
        // Near the end of the sequence numbers, which start over.
        let sequence = (from as u32).wrapping_sub(3000);
        frame[TCP_SEQUENCE..TCP_SEQUENCE + 4].copy_from_slice(&sequence.to_be_bytes());
        frame[TCP_OFFSET..TCP_OFFSET + 4].copy_from_slice(&[0x80, FLAG_ACK | FLAG_PSH, 2, 0]);
        frame.extend(OPTIONS);
        frame.extend((from..from + bytes).map(|place| place as u8));
        let length = (frame.len() - IP) as u16;
        frame[IP_LENGTH..IP_LENGTH + 2].copy_from_slice(&length.to_be_bytes());
        frame[IP + 4..IP + 6].copy_from_slice(&(from as u16).to_be_bytes());
        let checksum = !sum(0, &frame[IP..TCP]);
        frame[IP_CHECKSUM..IP_CHECKSUM + 2].copy_from_slice(&checksum.to_be_bytes());
        let pseudo = sum(u32::from(IPPROTO_TCP) + (frame.len() - TCP) as u32, &frame[IP_ADDRESSES..TCP]);
        frame[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&pseudo.to_be_bytes());
        frame
    }

    /// What a batch holds after these frames came in.
    fn batch_of(arriving: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut batch = BatchBuilder::new(4 * MIN_BATCH_BYTES);
        let mut filter = Filter::new(&[], Action::Order);
        let mut intake = Intake::new(&mut batch, &mut filter);
        for frame in arriving {
            intake.spare(frame.len()).unwrap().copy_from_slice(frame);
            intake.commit(frame.len());
        }
        let payload = batch.finish();
        frames(&payload).unwrap().map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn pieces_of_one_write_reach_the_guest_as_one_packet() {
        let pieces = [piece(0, 2896), piece(2896, 2896), piece(5792, 1056)];
        let mut whole = piece(0, 6848);
        // Identification is that of the first, and so is everything else.
        assert_eq!(batch_of(&pieces), [whole.clone()]);
        // A short piece ends it; what follows is a packet of its own.
        assert_eq!(batch_of(&[&pieces[..], &[piece(6848, 2896)]].concat()), [whole.clone(), piece(6848, 2896)]);
        // It is cut again as if it had come so.
        whole[TCP_FLAGS] &= !FLAG_PSH;
        assert_eq!(Segments::of(&whole).unwrap().len(), 5);
    }

    #[test]
    fn whatever_else_differs_stays_apart() {
        let (first, next) = (piece(0, 2896), piece(2896, 1000));
        assert_eq!(batch_of(&[first.clone(), next.clone()]).len(), 1);
        // Every bit of every header of the second, but what may differ. Its identification may: then the IP checksum is wrong.
        let may_differ = |bit: usize| bit == TCP_FLAGS * 8 + 3 || (TCP_CHECKSUM * 8..TCP_URGENT * 8).contains(&bit);
        // Of the vnet header: how long the headers are, and how many buffers; both are the first packet's.
        let ignored = |bit: usize| {
            (2 * 8..4 * 8).contains(&bit) || (10 * 8..12 * 8).contains(&bit) || (4 * 8..6 * 8).contains(&bit)
        };
        for bit in 0..(TCP + 32) * 8 {
            let mut other = next.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            let joined = batch_of(&[first.clone(), other]).len() == 1;
            assert_eq!(joined, may_differ(bit) || ignored(bit), "bit {} of byte {}", bit % 8, bit / 8);
        }
        assert_eq!(batch_of(&[piece(0, 1448), piece(1448, 100)]).len(), 2, "nothing shows that the guest takes more");
        assert_eq!(batch_of(&[piece(0, 2000), piece(2000, 100)]).len(), 2, "a short segment is the last");
        assert_eq!(batch_of(&[first.clone(), piece(2897, 100)]).len(), 2, "a gap");
        assert_eq!(batch_of(&[first, piece(2896, 0)]).len(), 2, "an acknowledgement");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]
        #[test]
        fn the_stream_is_what_it_was(sizes in prop::collection::vec((1usize..6, 0usize..1448), 1..24)) {
            let mut from = 0;
            let mut arriving = Vec::new();
            for (segments, rest) in sizes {
                // Mostly whole segments.
                let bytes = segments * SEGMENT + if rest % 3 == 0 { rest } else { 0 };
                arriving.push(piece(from, bytes));
                from += bytes;
            }
            let mut stream = Vec::new();
            for frame in batch_of(&arriving) {
                let end = header_bytes(&frame).expect("still a plain piece");
                prop_assert_eq!(u32_at(&frame, TCP_SEQUENCE), (stream.len() as u32).wrapping_sub(3000));
                prop_assert_eq!(u16_at(&frame, TCP_CHECKSUM), sum(u32::from(IPPROTO_TCP) + (frame.len() - TCP) as u32, &frame[IP_ADDRESSES..TCP]));
                stream.extend_from_slice(&frame[end..]);
            }
            let expected: Vec<u8> = (0..from).map(|place| place as u8).collect();
            prop_assert_eq!(stream, expected);
        }

        #[test]
        fn nothing_that_arrives_can_harm(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 12..200), 2..4), valid in any::<bool>()) {
            let mut frames = frames;
            if valid {
                frames.insert(0, piece(0, 2896));
                let header = piece(2896, 1);
                for frame in &mut frames[1..] {
                    let take = frame.len().min(TCP + 33);
                    let keep = usize::from(frame[11]) % take;
                    frame[..keep].copy_from_slice(&header[..keep]);
                }
            }
            let before: usize = frames.iter().map(Vec::len).sum();
            prop_assert!(batch_of(&frames).iter().map(Vec::len).sum::<usize>() <= before);
        }
    }
}
