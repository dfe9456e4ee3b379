//! What a frame is: a 12-byte `virtio_net_hdr_v1` followed by an Ethernet frame, as one `&[u8]`.
//!
//! The header travels with the frame everywhere (TAP, log, ring, guard), so offloads (checksums left
//! to compute, TSO packets of 64 KiB) pass from one end to the other without being undone.

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of the virtio-net header in front of each frame (virtio 1.2 §5.1.6, `virtio_net_hdr_v1`).
pub const VNET_HEADER_BYTES: usize = 12;

/// The largest frame that any part carries: header, 65535 bytes of packet, Ethernet and VLAN headers,
/// rounded up to 32 bytes.
pub const MAX_FRAME_BYTES: usize = (VNET_HEADER_BYTES + 65_535 + 18).next_multiple_of(32);

const _: () = assert!(size_of::<VnetHeader>() == VNET_HEADER_BYTES);
const _: () = assert!(MAX_FRAME_BYTES == 65_568);

/// The header in front of a frame (virtio 1.2 §5.1.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VnetHeader {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Bytes of Ethernet + IP + TCP headers of a GSO packet.
    pub hdr_len: U16,
    /// Segment size of a GSO packet, bytes.
    pub gso_size: U16,
    /// Where the checksum starts, bytes from the start of the Ethernet frame.
    pub csum_start: U16,
    /// Where the checksum is stored, bytes from `csum_start`.
    pub csum_offset: U16,
    /// RX buffers that the frame takes; whoever fills the guest's ring sets it.
    pub num_buffers: U16,
}

impl VnetHeader {
    /// The header of `frame`, or `None` if the frame is too short to have one.
    pub fn of(frame: &[u8]) -> Option<&VnetHeader> {
        VnetHeader::ref_from_prefix(frame).ok().map(|(header, _)| header)
    }
}

/// Whether a frame is an acknowledgement of TCP and nothing else: no data, no SYN, FIN or RST. Nobody waits for one to go on.
pub fn is_bare_ack(frame: &[u8]) -> bool {
    bare_ack(frame).unwrap_or(false)
}

/// `None` if the frame ends before that is known.
fn bare_ack(frame: &[u8]) -> Option<bool> {
    const IPPROTO_TCP: u8 = 6;
    const FLAGS: usize = 13;
    const FIN_SYN_RST: u8 = 0x07;
    const ACK: u8 = 0x10;
    let u16_at =
        |bytes: &[u8], at: usize| Some(usize::from(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?])));
    let ethernet = frame.get(VNET_HEADER_BYTES..)?;
    let ip = ethernet.get(14..)?;
    let (protocol, tcp_at, ends_at) = match u16_at(ethernet, 12)? {
        0x0800 => (*ip.get(9)?, usize::from(ip.first()? & 0x0f) * 4, u16_at(ip, 2)?),
        0x86dd => (*ip.get(6)?, 40, 40 + u16_at(ip, 4)?),
        _ => return Some(false),
    };
    let tcp = ip.get(tcp_at..)?;
    let data_at = tcp_at + usize::from(tcp.get(12)? >> 4) * 4;
    let flags = *tcp.get(FLAGS)?;
    Some(protocol == IPPROTO_TCP && flags & (FIN_SYN_RST | ACK) == ACK && data_at == ends_at)
}

/// Why a frame was not taken into a batch or a guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PushError {
    /// No room now; the frame was left out and the container is unchanged.
    #[error("no room for the frame")]
    Full,
    /// No container ever takes a frame of this length; the caller drops it and counts it.
    #[error("a frame of {len} bytes is outside {VNET_HEADER_BYTES}..={MAX_FRAME_BYTES}")]
    BadLength {
        /// The length in bytes.
        len: usize,
    },
}

impl PushError {
    /// Whether the same frame would fit after the container was emptied.
    pub fn is_full(self) -> bool {
        self == PushError::Full
    }
}

/// Checks that `len` bytes can be a frame.
#[inline]
pub(crate) fn check_length(len: usize) -> Result<(), PushError> {
    if (VNET_HEADER_BYTES..=MAX_FRAME_BYTES).contains(&len) { Ok(()) } else { Err(PushError::BadLength { len }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TCP packet of IPv4 or IPv6 with these flags and so much data.
    fn tcp(is_v6: bool, flags: u8, data_bytes: usize) -> Vec<u8> {
        let ip_bytes = if is_v6 { 40 } else { 20 };
        let mut frame = vec![0; VNET_HEADER_BYTES + 14 + ip_bytes + 32 + data_bytes];
        let (ethernet, rest) = frame[VNET_HEADER_BYTES..].split_at_mut(14);
        let (ip, tcp) = rest.split_at_mut(ip_bytes);
        if is_v6 {
            ethernet[12..].copy_from_slice(&[0x86, 0xdd]);
            ip[5] = 32 + data_bytes as u8;
            ip[6] = 6;
        } else {
            ethernet[12..].copy_from_slice(&[8, 0]);
            ip[0] = 0x45;
            ip[3] = 52 + data_bytes as u8;
            ip[9] = 6;
        }
        tcp[12] = 8 << 4;
        tcp[13] = flags;
        frame
    }

    #[test]
    fn an_acknowledgement_is_bare_without_data_and_without_another_meaning() {
        for is_v6 in [false, true] {
            let bare = tcp(is_v6, 0x10, 0);
            assert!(is_bare_ack(&bare));
            // Ethernet's shortest frame is longer than some.
            assert!(is_bare_ack(&[&bare[..], &[0; 6]].concat()));
            assert!(!is_bare_ack(&tcp(is_v6, 0x18, 5)), "data");
            for flags in [0x11, 0x12, 0x14, 0x04] {
                assert!(!is_bare_ack(&tcp(is_v6, flags, 0)), "{flags:#x}");
            }
            for length in 0..bare.len() - 18 {
                assert!(!is_bare_ack(&bare[..length]), "cut off after {length}");
            }
        }
        let mut udp = tcp(false, 0x10, 0);
        udp[VNET_HEADER_BYTES + 14 + 9] = 17;
        assert!(!is_bare_ack(&udp));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_judged(bytes: Vec<u8>, ethertype in proptest::sample::select(vec![[8u8, 0], [0x86, 0xdd]])) {
            let mut frame = vec![0; VNET_HEADER_BYTES + 12];
            frame.extend(ethertype);
            frame.extend(bytes);
            is_bare_ack(&frame);
        }
    }

    #[test]
    fn header_fields_sit_where_virtio_puts_them() {
        let bytes = [1, 4, 54, 0, 0xb4, 5, 34, 0, 16, 0, 2, 0, 0xff];
        let header = VnetHeader::of(&bytes).unwrap();
        assert_eq!((header.flags, header.gso_type), (1, 4));
        assert_eq!(header.gso_size.get(), 1460);
        assert_eq!(header.csum_start.get(), 34);
        assert_eq!(header.num_buffers.get(), 2);
        assert!(VnetHeader::of(&bytes[..11]).is_none());
    }
}
