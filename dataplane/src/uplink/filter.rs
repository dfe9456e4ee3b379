//! Which inbound frames are ordered at all: rules of one VM, applied before a frame costs a log entry.
//!
//! The first rule that matches decides, else the default. Rules are compiled once into three words with masks and a list
//! of port ranges, and a frame's headers are read once, so a frame costs a few comparisons a rule and no allocation. This
//! is no firewall: it keeps no state and looks at headers only. A fragment other than the first has no ports and no ICMP
//! type, so a rule that asks for them does not match it. Rejected: eBPF or nftables on the host (a rule set per host and
//! uplink kind instead of one in the VM's file, and nothing for DPDK ports).

mod headers;
#[cfg(test)]
mod tests;

use crate::frame::VNET_HEADER_BYTES;
use headers::Fields;
use std::ops::RangeInclusive;

/// What becomes of a frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Action {
    /// It becomes an input of the guest.
    #[default]
    Order,
    /// It is dropped and counted.
    Drop,
}

/// A MAC address with the bits of it that count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacMatch {
    /// The address; bits outside of the mask are ignored.
    pub address: [u8; 6],
    /// The bits that must be equal.
    pub mask: [u8; 6],
}

/// Conditions of a rule; all that are set must hold, and none holds for every frame.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conditions {
    /// Sender on the link.
    pub source_mac: Option<MacMatch>,
    /// Receiver on the link.
    pub destination_mac: Option<MacMatch>,
    /// VLAN of the outermost tag; 0 is a frame without one.
    pub vlan: Option<u16>,
    /// EtherType behind up to two VLAN tags.
    pub ethertype: Option<u16>,
    /// IP protocol number, behind IPv6 extension headers; holds for IPv4 and IPv6.
    pub protocol: Option<u8>,
    /// Type of an ICMP or ICMPv6 message.
    pub icmp_type: Option<u8>,
    /// Source ports (TCP, UDP, SCTP, DCCP, UDP-Lite); empty: any.
    pub source_port: Vec<RangeInclusive<u16>>,
    /// Destination ports; empty: any.
    pub destination_port: Vec<RangeInclusive<u16>>,
}

/// A rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    /// What becomes of frames that match.
    pub action: Action,
    /// What matches.
    pub conditions: Conditions,
}

/// A frame's fields, or a rule's conditions, side by side: MAC and VLAN, MAC and EtherType, protocol and ICMP type.
type Words = [u64; 3];

/// Marks a protocol or ICMP type that is known.
const KNOWN: u64 = 0x100;

#[derive(Debug)]
struct Compiled {
    action: Action,
    value: Words,
    mask: Words,
    /// Ranges of the source port, then of the destination port, as inclusive bounds in `Filter::ranges`.
    source: std::ops::Range<usize>,
    destination: std::ops::Range<usize>,
    hits: u64,
}

/// The compiled rules of one VM with their counters. Owned by the reactor thread.
#[derive(Debug, Default)]
pub struct Filter {
    rules: Box<[Compiled]>,
    ranges: Box<[(u16, u16)]>,
    default: Action,
    default_hits: u64,
}

impl Filter {
    /// Rules in the order in which they are tried, and what becomes of a frame that none matches.
    pub fn new(rules: &[Rule], default: Action) -> Filter {
        let mut ranges = Vec::new();
        let mut add = |list: &[RangeInclusive<u16>]| {
            let start = ranges.len();
            ranges.extend(list.iter().map(|range| (*range.start(), *range.end())));
            start..ranges.len()
        };
        let compile = |rule: &Rule| {
            let (value, mask) = words_of(&rule.conditions);
            let source = add(&rule.conditions.source_port);
            let destination = add(&rule.conditions.destination_port);
            Compiled { action: rule.action, value, mask, source, destination, hits: 0 }
        };
        let rules = rules.iter().map(compile).collect();
        Filter { rules, ranges: ranges.into(), default, default_hits: 0 }
    }

    /// Decides on `frame` (vnet header included) and counts it.
    pub fn decide(&mut self, frame: &[u8]) -> Action {
        if self.rules.is_empty() {
            self.default_hits += 1;
            return self.default;
        }
        // A frame without a whole Ethernet header has nothing that a rule could ask for.
        let fields = frame.get(VNET_HEADER_BYTES..).and_then(headers::parse);
        if let Some(fields) = fields {
            let words = words(&fields);
            let ranges = &self.ranges;
            for rule in &mut self.rules {
                if rule.matches(&words, fields.ports, ranges) {
                    rule.hits += 1;
                    return rule.action;
                }
            }
        }
        self.default_hits += 1;
        self.default
    }

    /// Frames that each rule decided on, in the order of the rules, and at the end those of the default.
    pub fn hits(&self) -> impl Iterator<Item = (Action, u64)> + '_ {
        self.rules.iter().map(|rule| (rule.action, rule.hits)).chain([(self.default, self.default_hits)])
    }
}

impl Compiled {
    fn matches(&self, words: &Words, ports: Option<(u16, u16)>, ranges: &[(u16, u16)]) -> bool {
        let wrong = (0..3).fold(0, |wrong, at| wrong | ((words[at] & self.mask[at]) ^ self.value[at]));
        if wrong != 0 {
            return false;
        }
        if self.source.is_empty() && self.destination.is_empty() {
            return true;
        }
        let within = |list: &std::ops::Range<usize>, port: u16| {
            list.is_empty() || ranges[list.clone()].iter().any(|&(first, last)| (first..=last).contains(&port))
        };
        ports
            .is_some_and(|(source, destination)| within(&self.source, source) && within(&self.destination, destination))
    }
}

fn words(fields: &Fields) -> Words {
    let known = |value: Option<u8>| value.map_or(0, |value| KNOWN | u64::from(value));
    [
        number(fields.destination) << 16 | u64::from(fields.vlan),
        number(fields.source) << 16 | u64::from(fields.ethertype),
        known(fields.protocol) << 16 | known(fields.icmp_type),
    ]
}

/// Value and mask. The value has no bit that the mask has not.
fn words_of(conditions: &Conditions) -> (Words, Words) {
    let (mut value, mut mask) = ([0; 3], [0; 3]);
    let mut ask = |word: usize, shift: u32, bits: u64, wanted: Option<u64>| {
        if let Some(wanted) = wanted {
            mask[word] |= bits << shift;
            value[word] |= (wanted & bits) << shift;
        }
    };
    for (word, mac) in [(0, conditions.destination_mac), (1, conditions.source_mac)] {
        let bits = mac.map_or(0, |mac| number(mac.mask));
        ask(word, 16, bits, mac.map(|mac| number(mac.address)));
    }
    ask(0, 0, 0xffff, conditions.vlan.map(u64::from));
    ask(1, 0, 0xffff, conditions.ethertype.map(u64::from));
    ask(2, 16, 0xffff, conditions.protocol.map(|protocol| KNOWN | u64::from(protocol)));
    ask(2, 0, 0xffff, conditions.icmp_type.map(|kind| KNOWN | u64::from(kind)));
    (value, mask)
}

fn number(mac: [u8; 6]) -> u64 {
    mac.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// For a fuzzer: a filter made from the first bytes decides on a frame of the others, and every prefix of it.
#[doc(hidden)]
pub fn fuzz_filter(bytes: &[u8]) {
    let (seed, frame) = bytes.split_at(bytes.len().min(8));
    let byte = |at: usize| seed.get(at).copied().unwrap_or(0);
    let ports = vec![u16::from(byte(0))..=u16::from_be_bytes([byte(1), byte(2)])];
    let protocol = Some(byte(3));
    let rules = [
        Rule {
            action: Action::Drop,
            conditions: Conditions { destination_port: ports.clone(), protocol, ..Conditions::default() },
        },
        Rule { action: Action::Drop, conditions: Conditions { icmp_type: Some(byte(4)), ..Conditions::default() } },
        Rule { action: Action::Order, conditions: Conditions { source_port: ports, ..Conditions::default() } },
        Rule {
            action: Action::Drop,
            conditions: Conditions { vlan: Some(u16::from(byte(5))), protocol, ..Conditions::default() },
        },
    ];
    let mut filter = Filter::new(&rules, Action::Order);
    for len in 0..=frame.len().min(256) {
        filter.decide(&frame[..len]);
    }
    filter.decide(frame);
    let decided: u64 = filter.hits().map(|(_, hits)| hits).sum();
    assert_eq!(decided, frame.len().min(256) as u64 + 2, "each frame is counted once");
}
