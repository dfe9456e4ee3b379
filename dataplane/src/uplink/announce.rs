//! The frame by which a new leader tells the switches where the guest's MAC is now.

use crate::frame::VNET_HEADER_BYTES;

/// Bytes of an announcement: vnet header and the shortest Ethernet frame.
pub const RARP_BYTES: usize = VNET_HEADER_BYTES + 60;

/// A RARP request (RFC 903) broadcast from `mac`, asking for its own address; nobody answers, every
/// switch learns the port. The same frame that QEMU sends after a migration. Needs no IP address,
/// which a backend does not know.
pub fn rarp(mac: [u8; 6]) -> [u8; RARP_BYTES] {
    let mut frame = [0u8; RARP_BYTES];
    let ethernet = &mut frame[VNET_HEADER_BYTES..];
    ethernet[0..6].fill(0xff);
    ethernet[6..12].copy_from_slice(&mac);
    ethernet[12..14].copy_from_slice(&0x8035u16.to_be_bytes());
    let arp = &mut ethernet[14..];
    arp[0..2].copy_from_slice(&1u16.to_be_bytes()); // hardware: Ethernet
    arp[2..4].copy_from_slice(&0x0800u16.to_be_bytes()); // protocol: IPv4
    arp[4] = 6;
    arp[5] = 4;
    arp[6..8].copy_from_slice(&3u16.to_be_bytes()); // request reverse
    arp[8..14].copy_from_slice(&mac);
    arp[18..24].copy_from_slice(&mac);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_announcement_is_the_one_that_qemu_sends() {
        let frame = rarp([0x52, 0x54, 0, 1, 2, 3]);
        let mut expected = vec![0u8; 12];
        expected.extend([0xff; 6]);
        expected.extend([0x52, 0x54, 0, 1, 2, 3, 0x80, 0x35]);
        expected.extend([0, 1, 8, 0, 6, 4, 0, 3]);
        expected.extend([0x52, 0x54, 0, 1, 2, 3, 0, 0, 0, 0]);
        expected.extend([0x52, 0x54, 0, 1, 2, 3, 0, 0, 0, 0]);
        expected.resize(RARP_BYTES, 0);
        assert_eq!(frame.as_slice(), expected);
    }
}
