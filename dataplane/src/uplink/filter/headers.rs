//! One pass over a frame's headers: what a filter rule can ask for.
//!
//! Everything is bounded by the bytes that are there and by [`MAX_TAGS`] and [`MAX_EXTENSIONS`]; what is cut off or lies
//! deeper is unknown, and a rule that asks for it does not match. Rejected: a parser crate (etherparse and its like parse
//! and validate whole packets; this needs seven fields and must never refuse a frame).

/// VLAN tags that are looked through.
const MAX_TAGS: usize = 2;
/// IPv6 extension headers that are looked through; more is nothing that a client sends.
const MAX_EXTENSIONS: usize = 8;

pub(super) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(super) const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;

const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_ICMPV6: u8 = 58;
/// TCP, UDP, DCCP, SCTP, UDP-Lite: source and destination port are their first four bytes.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

/// The fields of one frame. `None`: there is none, or it is cut off or out of reach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Fields {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    /// VLAN of the outermost tag; 0: no tag, or one that carries a priority only.
    pub vlan: u16,
    /// What is behind the tags.
    pub ethertype: u16,
    pub protocol: Option<u8>,
    pub icmp_type: Option<u8>,
    pub ports: Option<(u16, u16)>,
}

/// The fields of `packet` (an Ethernet frame without vnet header), or `None` if not even the Ethernet header is whole.
pub(super) fn parse(packet: &[u8]) -> Option<Fields> {
    let (ethernet, mut rest) = packet.split_first_chunk::<14>()?;
    let mut fields = Fields {
        destination: *ethernet.first_chunk().expect("6 of 14 bytes"),
        source: *ethernet[6..].first_chunk().expect("6 of 8 bytes"),
        ethertype: u16::from_be_bytes([ethernet[12], ethernet[13]]),
        ..Fields::default()
    };
    for depth in 0..MAX_TAGS {
        if fields.ethertype != ETHERTYPE_VLAN && fields.ethertype != ETHERTYPE_SERVICE_VLAN {
            break;
        }
        let Some((tag, behind)) = rest.split_first_chunk::<4>() else { break };
        if depth == 0 {
            fields.vlan = u16::from_be_bytes([tag[0], tag[1]]) & 0x0fff;
        }
        fields.ethertype = u16::from_be_bytes([tag[2], tag[3]]);
        rest = behind;
    }
    let transport = match fields.ethertype {
        ETHERTYPE_IPV4 => ipv4(rest, &mut fields),
        ETHERTYPE_IPV6 => ipv6(rest, &mut fields),
        _ => None,
    };
    if let (Some(payload), Some(protocol)) = (transport, fields.protocol) {
        transport_fields(payload, protocol, &mut fields);
    }
    Some(fields)
}

/// Sets the protocol; returns what its header starts with, unless this is a later fragment.
fn ipv4<'a>(packet: &'a [u8], fields: &mut Fields) -> Option<&'a [u8]> {
    let header = packet.first_chunk::<20>()?;
    let header_bytes = usize::from(header[0] & 0x0f) * 4;
    if header[0] >> 4 != 4 || header_bytes < 20 {
        return None;
    }
    fields.protocol = Some(header[9]);
    let fragment_offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
    if fragment_offset != 0 {
        return None;
    }
    // Bytes behind the packet are Ethernet padding. 0 is what a packet of more than 64 KiB says (BIG TCP).
    let total = match u16::from_be_bytes([header[2], header[3]]) {
        0 => packet.len(),
        total => packet.len().min(usize::from(total)),
    };
    packet.get(header_bytes..total)
}

/// As [`ipv4`].
fn ipv6<'a>(packet: &'a [u8], fields: &mut Fields) -> Option<&'a [u8]> {
    let (header, rest) = packet.split_first_chunk::<40>()?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let mut rest = match u16::from_be_bytes([header[4], header[5]]) {
        0 => rest,
        payload => &rest[..rest.len().min(usize::from(payload))],
    };
    let mut next = header[6];
    for _ in 0..=MAX_EXTENSIONS {
        let unit = match next {
            // Hop-by-hop, routing, destination options, mobility, HIP, Shim6: 8 bytes and as many as they say.
            0 | 43 | 60 | 135 | 139 | 140 => 8,
            // Authentication: counts in words of 4 and starts from 2.
            51 => 4,
            44 => {
                let (fragment, behind) = rest.split_first_chunk::<8>()?;
                next = fragment[0];
                if u16::from_be_bytes([fragment[2], fragment[3]]) & 0xfff8 != 0 {
                    // What `next` names starts in the first fragment; an extension there hides the protocol.
                    fields.protocol = (!is_extension(next)).then_some(next);
                    return None;
                }
                rest = behind;
                continue;
            }
            protocol => {
                fields.protocol = Some(protocol);
                return Some(rest);
            }
        };
        let (&named, &length) = (rest.first()?, rest.get(1)?);
        let bytes = if unit == 4 { (usize::from(length) + 2) * 4 } else { (usize::from(length) + 1) * 8 };
        rest = rest.get(bytes..)?;
        next = named;
    }
    None
}

fn is_extension(next: u8) -> bool {
    matches!(next, 0 | 43 | 44 | 51 | 60 | 135 | 139 | 140)
}

fn transport_fields(payload: &[u8], protocol: u8, fields: &mut Fields) {
    if WITH_PORTS.contains(&protocol) {
        if let Some([a, b, c, d]) = payload.first_chunk() {
            fields.ports = Some((u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])));
        }
    } else if protocol == PROTOCOL_ICMP || protocol == PROTOCOL_ICMPV6 {
        fields.icmp_type = payload.first().copied();
    }
}
