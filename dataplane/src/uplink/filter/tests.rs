//! Frames built from a description, whose fields are therefore known; rules against a naive reading of them; arbitrary bytes.

use super::headers::parse;
use super::*;
use proptest::prelude::*;

/// What a frame is built from.
#[derive(Debug, Clone)]
struct Plan {
    destination: [u8; 6],
    source: [u8; 6],
    tags: Vec<(u16, u16)>,
    network: Network,
    padding: usize,
}

#[derive(Debug, Clone)]
enum Network {
    Other { ethertype: u16 },
    V4 { options: u8, fragment: u16, transport: Transport },
    V6 { extensions: Vec<Extension>, transport: Transport },
}

#[derive(Debug, Clone, Copy)]
enum Extension {
    /// Number and length byte.
    Plain(u8, u8),
    Authentication(u8),
    Fragment(u16),
}

#[derive(Debug, Clone, Copy)]
struct Transport {
    protocol: u8,
    source: u16,
    destination: u16,
}

impl Transport {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = self.source.to_be_bytes().to_vec();
        bytes.extend(self.destination.to_be_bytes());
        bytes.extend([0; 16]);
        bytes
    }

    fn expect(self, first: bool, fields: &mut Fields) {
        fields.protocol = Some(self.protocol);
        match self.protocol {
            6 | 17 | 33 | 132 | 136 if first => fields.ports = Some((self.source, self.destination)),
            1 | 58 if first => fields.icmp_type = Some(self.source.to_be_bytes()[0]),
            _ => {}
        }
    }
}

impl Plan {
    /// The frame (with an empty vnet header) and its fields.
    fn build(&self) -> (Vec<u8>, Fields) {
        let mut frame = vec![0u8; VNET_HEADER_BYTES];
        let vlan = self.tags.first().map_or(0, |tag| tag.1 & 0x0fff);
        let mut fields = Fields { destination: self.destination, source: self.source, vlan, ..Fields::default() };
        frame.extend(self.destination);
        frame.extend(self.source);
        for (kind, control) in &self.tags {
            frame.extend(kind.to_be_bytes());
            frame.extend(control.to_be_bytes());
        }
        match &self.network {
            Network::Other { ethertype } => {
                fields.ethertype = *ethertype;
                frame.extend(ethertype.to_be_bytes());
            }
            Network::V4 { options, fragment, transport } => {
                fields.ethertype = 0x0800;
                frame.extend([8, 0]);
                let payload = transport.bytes();
                let total = (20 + usize::from(*options) * 4 + payload.len()) as u16;
                let mut header = vec![0x45 + options, 0];
                header.extend(total.to_be_bytes());
                header.extend([0, 7]);
                header.extend(fragment.to_be_bytes());
                header.extend([64, transport.protocol]);
                header.resize(20 + usize::from(*options) * 4, 0xaa);
                frame.extend(header);
                frame.extend(payload);
                transport.expect(fragment & 0x1fff == 0, &mut fields);
            }
            Network::V6 { extensions, transport } => {
                fields.ethertype = 0x86dd;
                frame.extend([0x86, 0xdd]);
                self.build_v6(extensions, *transport, &mut frame, &mut fields);
            }
        }
        frame.resize(frame.len() + self.padding, 0xff);
        (frame, fields)
    }

    fn build_v6(&self, extensions: &[Extension], transport: Transport, frame: &mut Vec<u8>, fields: &mut Fields) {
        let number = |extension: &Extension| match extension {
            Extension::Plain(number, _) => *number,
            Extension::Authentication(_) => 51,
            Extension::Fragment(_) => 44,
        };
        let numbers: Vec<u8> = extensions.iter().map(number).chain([transport.protocol]).collect();
        let mut payload = Vec::new();
        let mut hidden = extensions.len() > 8;
        let mut later = false;
        for (at, extension) in extensions.iter().enumerate() {
            let next = numbers[at + 1];
            match extension {
                Extension::Plain(_, units) => {
                    payload.extend([next, *units]);
                    payload.extend(vec![0; (usize::from(*units) + 1) * 8 - 2]);
                }
                Extension::Authentication(words) => {
                    payload.extend([next, *words]);
                    payload.extend(vec![0; (usize::from(*words) + 2) * 4 - 2]);
                }
                Extension::Fragment(offset) => {
                    payload.extend([next, 0]);
                    payload.extend((offset << 3 | 1).to_be_bytes());
                    payload.extend([0; 4]);
                    if *offset != 0 && !later && at < 9 {
                        later = true;
                        hidden = at + 1 < extensions.len();
                    }
                }
            }
        }
        payload.extend(transport.bytes());
        frame.extend([0x60, 0, 0, 0]);
        frame.extend((payload.len() as u16).to_be_bytes());
        frame.extend([numbers[0], 64]);
        frame.extend([0xfe; 32]);
        frame.extend(payload);
        if !hidden {
            transport.expect(!later, fields);
        }
    }
}

fn transport() -> impl Strategy<Value = Transport> {
    let protocol = prop_oneof![Just(6u8), Just(17), Just(1), Just(58), Just(132), Just(47), Just(59)];
    (protocol, any::<u16>(), any::<u16>()).prop_map(|(protocol, source, destination)| Transport {
        protocol,
        source,
        destination,
    })
}

fn extension() -> impl Strategy<Value = Extension> {
    prop_oneof![
        4 => (prop_oneof![Just(0u8), Just(43), Just(60), Just(135)], 0u8..3).prop_map(|(n, l)| Extension::Plain(n, l)),
        1 => (1u8..4).prop_map(Extension::Authentication),
        1 => (0u16..3).prop_map(Extension::Fragment),
    ]
}

fn plan() -> impl Strategy<Value = Plan> {
    let network = prop_oneof![
        prop_oneof![Just(0x0806u16), Just(0x88cc)].prop_map(|ethertype| Network::Other { ethertype }),
        (0u8..11, prop_oneof![Just(0u16), Just(0x4000), Just(0x2000), any::<u16>()], transport())
            .prop_map(|(options, fragment, transport)| Network::V4 { options, fragment, transport }),
        (prop::collection::vec(extension(), 0..11), transport())
            .prop_map(|(extensions, transport)| Network::V6 { extensions, transport }),
    ];
    let tags = prop::collection::vec((prop_oneof![Just(0x8100u16), Just(0x88a8)], any::<u16>()), 0..3);
    (any::<[u8; 6]>(), any::<[u8; 6]>(), tags, network, 0usize..30)
        .prop_map(|(destination, source, tags, network, padding)| Plan { destination, source, tags, network, padding })
}

fn ranges() -> impl Strategy<Value = Vec<RangeInclusive<u16>>> {
    prop::collection::vec((any::<u16>(), any::<u16>()).prop_map(|(a, b)| a.min(b)..=a.max(b)), 0..3)
}

/// Conditions that a frame of `fields` often meets.
fn rule_near(fields: Fields) -> impl Strategy<Value = Rule> {
    let mac = |address: [u8; 6]| {
        (any::<bool>(), prop_oneof![Just([0xff; 6]), Just([1, 0, 0, 0, 0, 0]), any::<[u8; 6]>()])
            .prop_map(move |(near, mask)| MacMatch { address: if near { address } else { [2, 3, 4, 5, 6, 7] }, mask })
    };
    let conditions = (
        prop::option::weighted(0.3, mac(fields.source)),
        prop::option::weighted(0.3, mac(fields.destination)),
        prop::option::weighted(0.3, prop_oneof![Just(fields.vlan), Just(0), Just(7)]),
        prop::option::weighted(0.3, prop_oneof![Just(fields.ethertype), Just(0x0806)]),
        prop::option::weighted(0.3, prop_oneof![Just(fields.protocol.unwrap_or(0)), Just(6)]),
        prop::option::weighted(0.2, prop_oneof![Just(fields.icmp_type.unwrap_or(0)), Just(8)]),
        prop_oneof![2 => Just(Vec::new()), 1 => ranges()],
        prop_oneof![2 => Just(Vec::new()), 1 => ranges()],
    );
    let conditions = conditions.prop_map(
        |(source_mac, destination_mac, vlan, ethertype, protocol, icmp_type, source_port, destination_port)| {
            Conditions {
                source_mac,
                destination_mac,
                vlan,
                ethertype,
                protocol,
                icmp_type,
                source_port,
                destination_port,
            }
        },
    );
    (any::<bool>(), conditions)
        .prop_map(|(drop, conditions)| Rule { action: if drop { Action::Drop } else { Action::Order }, conditions })
}

/// Conditions read one by one, as the documentation words them.
fn naive(conditions: &Conditions, fields: &Fields) -> bool {
    let mac = |wanted: Option<MacMatch>, is: [u8; 6]| {
        wanted.is_none_or(|wanted| (0..6).all(|i| (is[i] ^ wanted.address[i]) & wanted.mask[i] == 0))
    };
    let port = |wanted: &[RangeInclusive<u16>], is: Option<u16>| {
        wanted.is_empty() || is.is_some_and(|is| wanted.iter().any(|range| range.contains(&is)))
    };
    mac(conditions.source_mac, fields.source)
        && mac(conditions.destination_mac, fields.destination)
        && conditions.vlan.is_none_or(|vlan| vlan == fields.vlan)
        && conditions.ethertype.is_none_or(|ethertype| ethertype == fields.ethertype)
        && conditions.protocol.is_none_or(|protocol| fields.protocol == Some(protocol))
        && conditions.icmp_type.is_none_or(|kind| fields.icmp_type == Some(kind))
        && port(&conditions.source_port, fields.ports.map(|ports| ports.0))
        && port(&conditions.destination_port, fields.ports.map(|ports| ports.1))
}

proptest! {
    #[test]
    fn the_fields_of_a_frame_are_found(plan in plan()) {
        let (frame, fields) = plan.build();
        prop_assert_eq!(parse(&frame[VNET_HEADER_BYTES..]), Some(fields));
    }

    #[test]
    fn the_first_rule_that_matches_decides(
        (plan, rules) in plan().prop_flat_map(|plan| {
            let fields = plan.build().1;
            (Just(plan), prop::collection::vec(rule_near(fields), 0..6))
        }),
        default in prop_oneof![Just(Action::Order), Just(Action::Drop)],
    ) {
        let (frame, fields) = plan.build();
        let mut filter = Filter::new(&rules, default);
        let at = rules.iter().position(|rule| naive(&rule.conditions, &fields));
        prop_assert_eq!(filter.decide(&frame), at.map_or(default, |at| rules[at].action));
        let hits: Vec<u64> = filter.hits().map(|(_, hits)| hits).collect();
        let expected: Vec<u64> = (0..=rules.len()).map(|i| u64::from(i == at.unwrap_or(rules.len()))).collect();
        prop_assert_eq!(hits, expected);
    }

    #[test]
    fn a_cut_frame_has_no_other_fields_than_the_whole_one(plan in plan(), cut in any::<prop::sample::Index>()) {
        let (frame, whole) = plan.build();
        let packet = &frame[VNET_HEADER_BYTES..];
        if let Some(fields) = parse(&packet[..cut.index(packet.len() + 1)]) {
            prop_assert!(fields.protocol.is_none() || fields.protocol == whole.protocol);
            prop_assert!(fields.ports.is_none() || fields.ports == whole.ports);
            prop_assert!(fields.icmp_type.is_none() || fields.icmp_type == whole.icmp_type);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz_filter(&bytes);
    }

    #[test]
    fn damaged_frames_never_panic(plan in plan(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let (mut frame, _) = plan.build();
        let at = at.index(frame.len());
        frame[at] = byte;
        let mut bytes = vec![0, 0xff, 0xff, 6, 8, 7, 0, 0];
        bytes.extend(frame);
        fuzz_filter(&bytes);
    }
}

#[test]
fn later_fragments_have_a_protocol_and_no_ports() {
    let web = Conditions { protocol: Some(6), destination_port: vec![80..=80], ..Conditions::default() };
    let mut filter = Filter::new(&[Rule { action: Action::Order, conditions: web }], Action::Drop);
    let transport = Transport { protocol: 6, source: 4000, destination: 80 };
    let frame = |fragment| {
        let network = Network::V4 { options: 0, fragment, transport };
        Plan { destination: [2; 6], source: [4; 6], tags: Vec::new(), network, padding: 0 }.build().0
    };
    assert_eq!(filter.decide(&frame(0)), Action::Order);
    assert_eq!(filter.decide(&frame(0x2000)), Action::Order, "the first fragment has them");
    assert_eq!(filter.decide(&frame(0x2001)), Action::Drop);
}

#[test]
fn padding_is_no_port() {
    // An IP packet of 20 bytes in the shortest Ethernet frame.
    let mut frame = [0u8; VNET_HEADER_BYTES + 60];
    frame[VNET_HEADER_BYTES + 12..][..12].copy_from_slice(&[8, 0, 0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6]);
    let fields = parse(&frame[VNET_HEADER_BYTES..]).unwrap();
    assert_eq!((fields.protocol, fields.ports), (Some(6), None));
}
