//! UDP and TCP packets with the checksum left to do, and their checksums done the slow way.

use dataplane::VNET_HEADER_BYTES;

/// A UDP datagram with its vnet header; the checksum is left to whoever sends it.
pub fn udp(macs: [[u8; 6]; 2], addresses: [[u8; 4]; 2], ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let mut frame = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    frame.extend(macs[0]);
    frame.extend(macs[1]);
    frame.extend([8, 0, 0x45, 0]);
    frame.extend((20 + length).to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 17, 0, 0]);
    frame.extend(addresses[0]);
    frame.extend(addresses[1]);
    let header = VNET_HEADER_BYTES + 14;
    let sum = !sum(0, &frame[header..]);
    frame[header + 10..header + 12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ports[0].to_be_bytes());
    frame.extend(ports[1].to_be_bytes());
    frame.extend(length.to_be_bytes());
    frame.extend(pseudo(addresses, length).to_be_bytes());
    frame.extend(payload);
    frame
}

/// The same frame as it must arrive.
pub fn finished(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    frame[..VNET_HEADER_BYTES].fill(0);
    let start = VNET_HEADER_BYTES + 34;
    // The field holds the sum over the pseudo header.
    let sum = match !sum(0, &frame[start..]) {
        0 => 0xffff,
        sum => sum,
    };
    frame[start + 6..start + 8].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn pseudo(addresses: [[u8; 4]; 2], length: u16) -> u16 {
    sum(u32::from(length) + 17, addresses.as_flattened())
}

fn sum(start: u32, bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = start + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
