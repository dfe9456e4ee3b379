//! Which pair of queues a received frame goes to: by a hash of its flow, as a NIC with receive-side scaling does, so that the
//! frames of one connection stay in order.
//!
//! Leader and secondary choose independently and must choose the same, so the hash depends on the frame's bytes and on the
//! number of pairs, and on nothing else. Rejected: Toeplitz, whose key only matters where guests configure it; our guests cannot.

use super::net::VNET_HEADER_BYTES;

const ETHER_TYPE_OFFSET: usize = VNET_HEADER_BYTES + 12;
const VLAN: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
/// TCP, UDP and SCTP begin with two ports of 16 bits each.
const WITH_PORTS: [u8; 3] = [6, 17, 132];
/// More tags than anybody nests.
const MAX_TAGS: usize = 2;

/// The pair for a frame that begins with its 12 bytes of header, out of `pairs` (at least 1).
pub(super) fn pair_of(frame: &[u8], pairs: usize) -> usize {
    if pairs <= 1 {
        return 0;
    }
    // The upper bits are the well mixed ones.
    (((flow_hash(frame) >> 32) * pairs as u64) >> 32) as usize
}

fn flow_hash(frame: &[u8]) -> u64 {
    let mut at = ETHER_TYPE_OFFSET;
    for _ in 0..MAX_TAGS {
        if bytes::<2>(frame, at).is_some_and(|kind| VLAN.contains(&kind)) {
            at += 4;
        }
    }
    let network = at + 2;
    let found = match bytes::<2>(frame, at) {
        Some(IPV4) => ipv4(frame, network),
        Some(IPV6) => ipv6(frame, network),
        _ => None,
    };
    // Anything else belongs to the talk between two MAC addresses.
    found.unwrap_or_else(|| hash(frame.get(VNET_HEADER_BYTES..ETHER_TYPE_OFFSET).unwrap_or(frame), 0))
}

fn ipv4(frame: &[u8], at: usize) -> Option<u64> {
    let header_bytes = usize::from(frame.get(at)? & 0x0f) * 4;
    let fragment = u16::from_be_bytes(bytes(frame, at + 6)?) & 0x3fff != 0;
    let protocol = *frame.get(at + 9)?;
    let addresses = frame.get(at + 12..at + 20)?;
    // All fragments of a packet go one way, and only the first has ports.
    let ports = if fragment { 0 } else { ports(frame, protocol, at + header_bytes) };
    Some(hash(addresses, ports))
}

fn ipv6(frame: &[u8], at: usize) -> Option<u64> {
    // Behind extension headers ports are not looked for: addresses alone still spread the load.
    let next_header = *frame.get(at + 6)?;
    let addresses = frame.get(at + 8..at + 40)?;
    Some(hash(addresses, ports(frame, next_header, at + 40)))
}

fn ports(frame: &[u8], protocol: u8, at: usize) -> u64 {
    let both = WITH_PORTS.contains(&protocol).then(|| bytes::<4>(frame, at)).flatten();
    both.map_or(0, |both| u64::from(u32::from_le_bytes(both)))
}

fn bytes<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// A multiplicative hash (the constant is that of Fibonacci hashing); it only has to spread, nobody's safety rests on it.
fn hash(addresses: &[u8], ports: u64) -> u64 {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut state = ports.wrapping_mul(FACTOR);
    for chunk in addresses.chunks(4) {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        state = (state.rotate_left(23) ^ u64::from(u32::from_le_bytes(word))).wrapping_mul(FACTOR);
    }
    (state ^ state >> 29).wrapping_mul(FACTOR)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn udp(source_port: u16, tag: bool) -> Vec<u8> {
        let mut frame = vec![0; VNET_HEADER_BYTES];
        frame.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        if tag {
            frame.extend([0x81, 0, 0, 7]);
        }
        frame.extend([8, 0, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(source_port.to_be_bytes());
        frame.extend([0, 53, 0, 12, 0, 0]);
        frame
    }

    #[test]
    fn flows_spread_and_each_stays_where_it_is() {
        for pairs in [1, 2, 3, 8] {
            let mut counts = vec![0; pairs];
            for port in 0..8000 {
                let frame = udp(port, false);
                let mut later = frame.clone();
                // Identification, TTL and checksums change from packet to packet.
                for at in [VNET_HEADER_BYTES + 18, VNET_HEADER_BYTES + 22, VNET_HEADER_BYTES + 24] {
                    later[at] = 77;
                }
                assert_eq!(pair_of(&frame, pairs), pair_of(&later, pairs));
                assert_eq!(flow_hash(&frame), flow_hash(&udp(port, true)), "a tag does not matter");
                counts[pair_of(&frame, pairs)] += 1;
            }
            let fair = 8000 / pairs;
            assert!(counts.iter().all(|&count: &usize| count.abs_diff(fair) < fair / 5), "{counts:?}");
        }
    }

    #[test]
    fn fragments_of_one_packet_stay_together() {
        let mut first = udp(4000, false);
        first[VNET_HEADER_BYTES + 14 + 6] = 0x20;
        let mut second = udp(9999, false);
        second[VNET_HEADER_BYTES + 14 + 7] = 5;
        assert_eq!(flow_hash(&first), flow_hash(&second));
    }

    /// Replicas of different versions may serve one guest during an upgrade: a change of the hash is a change of protocol.
    #[test]
    fn the_choice_is_part_of_the_protocol() {
        let chosen: Vec<usize> = (0..12).map(|port| pair_of(&udp(port, false), 4)).collect();
        assert_eq!(chosen, EXPECTED);
        assert_eq!(pair_of(&[0; VNET_HEADER_BYTES + 14], 4), 0);
    }

    const EXPECTED: [usize; 12] = [0, 2, 3, 2, 3, 0, 0, 3, 3, 3, 1, 1];

    proptest! {
        #[test]
        fn any_bytes_have_a_pair(frame in prop::collection::vec(any::<u8>(), 0..120), pairs in 1..9usize) {
            prop_assert!(pair_of(&frame, pairs) < pairs);
        }
    }
}
