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
