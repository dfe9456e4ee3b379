//! `[[uplink.filter]]`: rules as a user writes them, made into what the dataplane matches.

use std::fmt::Write as _;
use std::ops::RangeInclusive;

use serde::Deserialize;
use toml::Value;

use dataplane::uplink::filter::{Conditions, MacMatch, Rule};

use super::uplink::FilterAction;

/// EtherTypes that have a name here.
const ETHERTYPES: [(&str, u16); 6] =
    [("ipv4", 0x0800), ("arp", 0x0806), ("rarp", 0x8035), ("ipv6", 0x86dd), ("lldp", 0x88cc), ("ptp", 0x88f7)];
/// IP protocols that have a name here.
const PROTOCOLS: [(&str, u16); 6] = [("icmp", 1), ("igmp", 2), ("tcp", 6), ("udp", 17), ("icmpv6", 58), ("sctp", 132)];
/// Protocols whose headers begin with ports.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

/// One rule and its text for `plover status`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct FilterRule {
    /// The rule, in one line.
    pub text: String,
    /// The rule.
    pub rule: Rule,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    action: FilterAction,
    source_mac: Option<String>,
    destination_mac: Option<String>,
    vlan: Option<u16>,
    ethertype: Option<Value>,
    protocol: Option<Value>,
    icmp_type: Option<u8>,
    source_port: Option<Value>,
    destination_port: Option<Value>,
}

impl TryFrom<Written> for FilterRule {
    type Error = String;

    fn try_from(written: Written) -> Result<FilterRule, String> {
        let text = written.text();
        let in_filter = |problem: String| format!("uplink.filter.{problem}");
        let conditions = written.conditions().map_err(in_filter)?;
        check(&conditions).map_err(in_filter)?;
        Ok(FilterRule { text, rule: Rule { action: written.action.into(), conditions } })
    }
}

impl Written {
    fn text(&self) -> String {
        let mut text = match self.action {
            FilterAction::Order => "order".to_owned(),
            FilterAction::Drop => "drop".to_owned(),
        };
        let string = |text: &Option<String>| text.clone().map(Value::String);
        let fields = [
            ("source_mac", string(&self.source_mac)),
            ("destination_mac", string(&self.destination_mac)),
            ("vlan", self.vlan.map(|vlan| Value::Integer(vlan.into()))),
            ("ethertype", self.ethertype.clone()),
            ("protocol", self.protocol.clone()),
            ("icmp_type", self.icmp_type.map(|kind| Value::Integer(kind.into()))),
            ("source_port", self.source_port.clone()),
            ("destination_port", self.destination_port.clone()),
        ];
        for (name, value) in fields.iter().filter_map(|(name, value)| Some((name, value.as_ref()?))) {
            let _ = match value {
                Value::String(value) => write!(text, " {name}={value}"),
                value => write!(text, " {name}={value}"),
            };
        }
        text
    }

    fn conditions(&self) -> Result<Conditions, String> {
        let mac = |field, text: &Option<String>| text.as_deref().map(|text| mac(field, text)).transpose();
        let number = |field, value: &Option<Value>, names, most| {
            value.as_ref().map(|value| number(field, value, names, most)).transpose()
        };
        let ports = |field, value: &Option<Value>| value.as_ref().map_or(Ok(Vec::new()), |value| ports(field, value));
        if self.vlan.is_some_and(|vlan| vlan > 4095) {
            return Err("vlan: must be 0 (no VLAN) to 4095".into());
        }
        let protocol = number("protocol", &self.protocol, &PROTOCOLS, 255)?;
        Ok(Conditions {
            source_mac: mac("source_mac", &self.source_mac)?,
            destination_mac: mac("destination_mac", &self.destination_mac)?,
            vlan: self.vlan,
            ethertype: number("ethertype", &self.ethertype, &ETHERTYPES, u16::MAX)?,
            protocol: protocol.map(|protocol| u8::try_from(protocol).expect("at most 255")),
            icmp_type: self.icmp_type,
            source_port: ports("source_port", &self.source_port)?,
            destination_port: ports("destination_port", &self.destination_port)?,
        })
    }
}

/// Conditions that exclude each other would make a rule that silently never matches.
fn check(conditions: &Conditions) -> Result<(), String> {
    let wants_ports = !conditions.source_port.is_empty() || !conditions.destination_port.is_empty();
    if wants_ports && conditions.protocol.is_some_and(|protocol| !WITH_PORTS.contains(&protocol)) {
        return Err("protocol: has no ports; remove the ports or name tcp, udp or sctp".into());
    }
    if conditions.icmp_type.is_some() && !matches!(conditions.protocol, Some(1 | 58)) {
        return Err("icmp_type: needs protocol = \"icmp\" or \"icmpv6\", whose types differ".into());
    }
    let is_ip = matches!(conditions.ethertype, None | Some(0x0800 | 0x86dd));
    if !is_ip && (wants_ports || conditions.protocol.is_some()) {
        return Err("ethertype: only ipv4 and ipv6 have protocols and ports; remove one of the conditions".into());
    }
    Ok(())
}

fn mac(field: &str, text: &str) -> Result<MacMatch, String> {
    let bad = || {
        format!(
            "{field}: {text:?} is no MAC address; write 52:54:00:12:34:56, or with a mask 01:00:00:00:00:00/01:00:00:00:00:00"
        )
    };
    let (address, mask) = match text.split_once('/') {
        None => (super::parse_mac(text).ok_or_else(bad)?, [0xff; 6]),
        Some((address, mask)) => (super::parse_mac(address).ok_or_else(bad)?, super::parse_mac(mask).ok_or_else(bad)?),
    };
    Ok(MacMatch { address, mask })
}

fn number(field: &str, value: &Value, names: &[(&str, u16)], most: u16) -> Result<u16, String> {
    let found = match value {
        Value::String(text) => names.iter().find(|(name, _)| name == text).map(|(_, number)| *number),
        Value::Integer(number) => u16::try_from(*number).ok().filter(|number| *number <= most),
        _ => None,
    };
    found.ok_or_else(|| {
        let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
        format!("{field}: {value} is none; write a number of 0 to {most} or one of {}", names.join(", "))
    })
}

/// A port, a range, or a list of those.
fn ports(field: &str, value: &Value) -> Result<Vec<RangeInclusive<u16>>, String> {
    let bad = |value: &Value| {
        format!("{field}: {value} is no port; write 80, \"8000-8100\" or a list such as [80, \"8000-8100\"]")
    };
    let one = |value: &Value| match value {
        Value::Integer(port) => u16::try_from(*port).map(|port| port..=port).map_err(|_| bad(value)),
        Value::String(text) => {
            let range = text.split_once('-').and_then(|(first, last)| {
                let range = first.trim().parse().ok()?..=last.trim().parse().ok()?;
                (!range.is_empty()).then_some(range)
            });
            range.ok_or_else(|| bad(value))
        }
        _ => Err(bad(value)),
    };
    match value {
        Value::Array(list) if list.is_empty() => Err(format!("{field}: is an empty list, which no frame could match")),
        Value::Array(list) => list.iter().map(one).collect(),
        value => Ok(vec![one(value)?]),
    }
}
