//! What a port or a guest cannot do by itself: checksums and segments computed in software.
//!
//! A frame's vnet header says what is left to do (a checksum to fill in, a large TCP or UDP packet to cut). A TAP has the
//! kernel do it; a packet socket hands such frames over as they are, and a DPDK port may lack the offload. The frames come
//! from a guest or from the wire, so nothing in them is trusted: one that does not add up is refused. Rejected: DPDK's
//! rte_gso (packet sockets need the same, and it leaves the checksums to the port).

use super::OffloadFlags;
use crate::frame::{VNET_HEADER_BYTES, VnetHeader};

/// Most pieces of one packet. 64 KiB in segments of 256 bytes; a guest that asks for smaller ones could keep the reactor busy
/// for so long that its peers take it for dead.
pub(crate) const MAX_SEGMENTS: usize = 256;

/// The checksum from `csum_start` on is not computed (virtio 1.2 §5.1.6).
pub(crate) const NEEDS_CSUM: u8 = 1;
pub(crate) const GSO_TCPV4: u8 = 1;
pub(crate) const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
pub(super) const GSO_ECN: u8 = 0x80;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Whether something is left to do on a frame before it is for someone who can do no more than `can`.
pub fn is_needed(header: &VnetHeader, can: OffloadFlags) -> bool {
    let ecn = header.gso_type & GSO_ECN == 0 || can.ecn;
    match header.gso_type & !GSO_ECN {
        0 => header.flags & NEEDS_CSUM != 0 && !can.csum,
        GSO_TCPV4 => !(can.csum && can.tso4 && ecn),
        GSO_TCPV6 => !(can.csum && can.tso6 && ecn),
        _ => true,
    }
}

/// A frame whose headers contradict one another, or of a kind that is never negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the frame's headers do not add up")]
pub struct Malformed;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Tcp,
    Udp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Fill in the checksum, of which the sum over the pseudo header is there.
    Checksum { start: usize, field: usize },
    /// Cut into pieces.
    Segment { ip: usize, is_v6: bool, start: usize, transport: Transport },
}

/// How a frame becomes frames that need no offload. Plain numbers; the frame is passed to each call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    work: Work,
    /// Bytes of all headers, vnet header not counted.
    header_bytes: usize,
    payload_bytes: usize,
    segment_bytes: usize,
    count: usize,
}

impl Segments {
    /// Looks at `frame` (vnet header included), for which [`is_needed`] holds.
    ///
    /// # Errors
    /// [`Malformed`]: it cannot be done, and the frame is to be dropped.
    pub fn of(frame: &[u8]) -> Result<Segments, Malformed> {
        let header = VnetHeader::of(frame).ok_or(Malformed)?;
        let packet = &frame[VNET_HEADER_BYTES..];
        match header.gso_type & !GSO_ECN {
            0 => {
                let start = usize::from(header.csum_start.get());
                let field = start + usize::from(header.csum_offset.get());
                if header.flags & NEEDS_CSUM == 0 || field + 2 > packet.len() {
                    return Err(Malformed);
                }
                let work = Work::Checksum { start, field };
                let bytes = packet.len();
                Ok(Segments { work, header_bytes: bytes, payload_bytes: 0, segment_bytes: 1, count: 1 })
            }
            GSO_TCPV4 => Self::cut(header, packet, Some(false), Transport::Tcp),
            GSO_TCPV6 => Self::cut(header, packet, Some(true), Transport::Tcp),
            GSO_UDP_L4 => Self::cut(header, packet, None, Transport::Udp),
            _ => Err(Malformed),
        }
    }

    /// `want_v6`: what the vnet header says; UDP does not say.
    fn cut(header: &VnetHeader, packet: &[u8], want_v6: Option<bool>, transport: Transport) -> Result<Self, Malformed> {
        let (ip, is_v6) = network_header(packet).ok_or(Malformed)?;
        if want_v6.is_some_and(|want| want != is_v6) {
            return Err(Malformed);
        }
        let ip_bytes = if is_v6 { 40 } else { usize::from(packet[ip] & 0x0f) * 4 };
        if !is_v6 && (ip_bytes < 20 || packet[ip + 9] != transport.protocol()) {
            return Err(Malformed);
        }
        let start = match header.flags & NEEDS_CSUM {
            0 => ip + ip_bytes,
            _ => usize::from(header.csum_start.get()),
        };
        let known = if is_v6 { start >= ip + ip_bytes } else { start == ip + ip_bytes };
        if !known {
            return Err(Malformed);
        }
        let transport_bytes = match transport {
            Transport::Tcp => usize::from(packet.get(start + 12).ok_or(Malformed)? >> 4) * 4,
            Transport::Udp => 8,
        };
        let least = if transport == Transport::Tcp { 20 } else { 8 };
        let header_bytes = start + transport_bytes;
        let segment_bytes = usize::from(header.gso_size.get());
        if transport_bytes < least || header_bytes >= packet.len() || segment_bytes == 0 {
            return Err(Malformed);
        }
        let payload_bytes = packet.len() - header_bytes;
        if header_bytes - ip + segment_bytes.min(payload_bytes) > usize::from(u16::MAX) {
            return Err(Malformed);
        }
        let count = payload_bytes.div_ceil(segment_bytes);
        if count > MAX_SEGMENTS {
            return Err(Malformed);
        }
        let work = Work::Segment { ip, is_v6, start, transport };
        Ok(Segments { work, header_bytes, payload_bytes, segment_bytes, count })
    }

    /// Into how many frames it is cut.
    #[expect(clippy::len_without_is_empty, reason = "there is always one")]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Bytes of frame `at`, vnet header included.
    pub fn bytes(&self, at: usize) -> usize {
        VNET_HEADER_BYTES + self.header_bytes + self.payload(at).len()
    }

    /// Writes frame `at` of `frame` to `into`, and returns its length. Its vnet header asks for nothing.
    ///
    /// # Panics
    /// If `frame` is not the one that was looked at, `at` is not below [`len`](Self::len), or `into` is shorter than
    /// [`bytes`](Self::bytes).
    pub fn write(&self, frame: &[u8], at: usize, into: &mut [u8]) -> usize {
        assert!(at < self.count, "frame {at} of {}", self.count);
        let source = &frame[VNET_HEADER_BYTES..];
        let payload = self.payload(at);
        let into = &mut into[..VNET_HEADER_BYTES + self.header_bytes + payload.len()];
        into[..VNET_HEADER_BYTES].fill(0);
        let packet = &mut into[VNET_HEADER_BYTES..];
        packet[..self.header_bytes].copy_from_slice(&source[..self.header_bytes]);
        packet[self.header_bytes..].copy_from_slice(&source[self.header_bytes..][payload]);
        match self.work {
            Work::Checksum { start, field } => {
                // The field holds the sum over the pseudo header, which counts.
                let sum = finish(add(0, &packet[start..]));
                // A UDP checksum of 0 means that there is none.
                let sum = if sum == 0 && field - start == 6 { 0xffff } else { sum };
                packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
            }
            Work::Segment { ip, is_v6, start, transport } => {
                self.fix_network(packet, at, ip, is_v6);
                self.fix_transport(packet, at, start, transport);
                set_checksum(packet, ip, is_v6, start, transport);
            }
        }
        into.len()
    }

    fn payload(&self, at: usize) -> std::ops::Range<usize> {
        let start = (at * self.segment_bytes).min(self.payload_bytes);
        start..(start + self.segment_bytes).min(self.payload_bytes)
    }

    fn fix_network(&self, packet: &mut [u8], at: usize, ip: usize, is_v6: bool) {
        let length = packet.len() - ip;
        if is_v6 {
            packet[ip + 4..ip + 6].copy_from_slice(&word(length - 40));
            return;
        }
        packet[ip + 2..ip + 4].copy_from_slice(&word(length));
        let id = u16::from_be_bytes([packet[ip + 4], packet[ip + 5]]).wrapping_add(at as u16);
        packet[ip + 4..ip + 6].copy_from_slice(&id.to_be_bytes());
        packet[ip + 10..ip + 12].fill(0);
        let end = ip + usize::from(packet[ip] & 0x0f) * 4;
        let sum = finish(add(0, &packet[ip..end]));
        packet[ip + 10..ip + 12].copy_from_slice(&sum.to_be_bytes());
    }

    fn fix_transport(&self, packet: &mut [u8], at: usize, start: usize, transport: Transport) {
        if transport == Transport::Udp {
            let length = word(packet.len() - start);
            packet[start + 4..start + 6].copy_from_slice(&length);
            return;
        }
        let field = &mut packet[start + 4..start + 8];
        let sequence = u32::from_be_bytes([field[0], field[1], field[2], field[3]]);
        let sequence = sequence.wrapping_add((at * self.segment_bytes) as u32);
        field.copy_from_slice(&sequence.to_be_bytes());
        if at > 0 {
            packet[start + 13] &= !TCP_CWR;
        }
        if at + 1 < self.count {
            packet[start + 13] &= !(TCP_FIN | TCP_PSH);
        }
    }
}

impl Transport {
    fn protocol(self) -> u8 {
        match self {
            Transport::Tcp => 6,
            Transport::Udp => 17,
        }
    }
}

/// What a port must know to compute the checksum of a packet. Lengths in bytes.
#[cfg(feature = "dpdk")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PortChecksum {
    pub l2_bytes: u16,
    pub l3_bytes: u16,
    pub is_v6: bool,
    pub is_tcp: bool,
}

/// Whether the checksum that is left to do on `frame` (vnet header included, not large) is one that ports know how to do.
#[cfg(feature = "dpdk")]
pub(super) fn port_checksum(frame: &[u8]) -> Option<PortChecksum> {
    let header = VnetHeader::of(frame)?;
    let packet = &frame[VNET_HEADER_BYTES..];
    let (ip, is_v6) = network_header(packet)?;
    let (start, protocol) = transport_header(packet, ip, is_v6)?;
    let is_tcp = protocol == Transport::Tcp;
    let known = usize::from(header.csum_start.get()) == start
        && header.csum_offset.get() == if is_tcp { 16 } else { 6 }
        && packet.len() >= start + if is_tcp { 20 } else { 8 };
    let (l2_bytes, l3_bytes) = (u16::try_from(ip).ok()?, u16::try_from(start - ip).ok()?);
    known.then_some(PortChecksum { l2_bytes, l3_bytes, is_v6, is_tcp })
}

/// Computes the checksum of a TCP or UDP packet whose data are known to be right. Other packets stay as they are.
#[cfg(feature = "dpdk")]
pub(super) fn repair_checksum(packet: &mut [u8]) {
    let Some((ip, is_v6)) = network_header(packet) else { return };
    let Some((start, transport)) = transport_header(packet, ip, is_v6) else { return };
    let (field, base) = if is_v6 { (ip + 4, ip + 40) } else { (ip + 2, ip) };
    // Bytes behind the packet are padding.
    let end = base + usize::from(u16::from_be_bytes([packet[field], packet[field + 1]]));
    let least = start + if transport == Transport::Tcp { 20 } else { 8 };
    if (least..=packet.len()).contains(&end) {
        set_checksum(&mut packet[..end], ip, is_v6, start, transport);
    }
}

/// Where the TCP or UDP header starts, directly behind the IP header, of a packet that is no fragment.
#[cfg(feature = "dpdk")]
fn transport_header(packet: &[u8], ip: usize, is_v6: bool) -> Option<(usize, Transport)> {
    let (start, protocol) = match is_v6 {
        true => (ip + 40, packet[ip + 6]),
        false => (ip + usize::from(packet[ip] & 0x0f) * 4, packet[ip + 9]),
    };
    let is_fragment = !is_v6 && u16::from_be_bytes([packet[ip + 6], packet[ip + 7]]) & 0x3fff != 0;
    let transport = [Transport::Tcp, Transport::Udp].into_iter().find(|known| known.protocol() == protocol)?;
    (start >= ip + 20 && !is_fragment).then_some((start, transport))
}

/// Where the IP header is, and whether it is version 6. It is whole.
fn network_header(packet: &[u8]) -> Option<(usize, bool)> {
    let mut at = 12;
    for _ in 0..3 {
        let kind = u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]);
        match kind {
            0x8100 | 0x88a8 => at += 4,
            0x0800 => return (packet.get(at + 2)? >> 4 == 4 && packet.len() >= at + 22).then_some((at + 2, false)),
            0x86dd => return (packet.get(at + 2)? >> 4 == 6 && packet.len() >= at + 42).then_some((at + 2, true)),
            _ => return None,
        }
    }
    None
}

fn set_checksum(packet: &mut [u8], ip: usize, is_v6: bool, start: usize, transport: Transport) {
    let field = start + if transport == Transport::Tcp { 16 } else { 6 };
    packet[field..field + 2].fill(0);
    let addresses = if is_v6 { ip + 8..ip + 40 } else { ip + 12..ip + 20 };
    let length = packet.len() - start;
    let pseudo = add(length as u64 + u64::from(transport.protocol()), &packet[addresses]);
    let sum = finish(add(pseudo, &packet[start..]));
    let sum = if sum == 0 && transport == Transport::Udp { 0xffff } else { sum };
    packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

fn word(length: usize) -> [u8; 2] {
    u16::try_from(length).expect("checked when the frame was looked at").to_be_bytes()
}

/// Adds the 16-bit words of `bytes` to `sum` (RFC 1071), four bytes at a time: the carries are folded at the end.
pub(crate) fn add(sum: u64, bytes: &[u8]) -> u64 {
    let (fours, rest) = bytes.as_chunks::<4>();
    let sum = fours.iter().fold(sum, |sum, four| sum + u64::from(u32::from_be_bytes(*four)));
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    sum + u64::from(u32::from_be_bytes(last))
}

/// Folds a sum into the checksum that it makes.
pub(crate) fn finish(sum: u64) -> u16 {
    let mut sum = sum;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// For a fuzzer: any frame is refused or becomes frames that need nothing more.
#[doc(hidden)]
pub fn fuzz_segments(frame: &[u8]) {
    let Ok(segments) = Segments::of(frame) else { return };
    let mut into = vec![0xaa; crate::MAX_FRAME_BYTES + frame.len()];
    for at in 0..segments.len().min(64) {
        let len = segments.write(frame, at, &mut into);
        assert_eq!(len, segments.bytes(at));
        let header = VnetHeader::of(&into).expect("a frame has a header");
        assert!(!is_needed(header, OffloadFlags::default()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_frames_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0usize..5) {
            let mut bytes = bytes;
            // Most of the interesting ones begin like this.
            let start: &[u8] = [&[][..], &[1, 0], &[1, 1], &[1, 4], &[1, 5]][kind];
            for (to, from) in bytes.iter_mut().zip(start) {
                *to = *from;
            }
            fuzz_segments(&bytes);
            if bytes.len() > 40 {
                bytes[24..26].copy_from_slice(if kind == 3 { &[0x86, 0xdd] } else { &[8, 0] });
                bytes[26] = if kind == 3 { 0x60 } else { 0x45 };
                bytes[6..8].copy_from_slice(&[if kind == 3 { 54 } else { 34 }, 0]);
                bytes[35] = if kind == 4 { 17 } else { 6 };
                fuzz_segments(&bytes);
            }
        }

        #[test]
        fn the_sum_is_that_of_rfc_1071(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
            let mut sum: u32 = words.sum();
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            prop_assert_eq!(finish(add(0, &bytes)), !(sum as u16));
        }
    }

    #[test]
    fn what_is_needed_depends_on_who_takes_it() {
        let all = OffloadFlags { csum: true, tso4: true, tso6: true, ecn: true };
        let needed = |flags, gso_type, can| is_needed(&VnetHeader { flags, gso_type, ..VnetHeader::default() }, can);
        assert!(!needed(0, 0, OffloadFlags::default()));
        assert!(needed(1, 0, OffloadFlags::default()) && !needed(1, 0, all));
        assert!(needed(1, GSO_TCPV4, OffloadFlags { tso4: false, ..all }) && !needed(1, GSO_TCPV4, all));
        assert!(needed(1, GSO_TCPV4, OffloadFlags { csum: false, ..all }), "large packets come without checksums");
        assert!(needed(1, GSO_TCPV6, OffloadFlags { tso6: false, ..all }) && !needed(1, GSO_TCPV6, all));
        assert!(needed(1, GSO_TCPV4 | GSO_ECN, OffloadFlags { ecn: false, ..all }));
        assert!(needed(1, GSO_UDP_L4, all), "never negotiated");
    }
}
