//! `[uplink]` of a VM file: which port, and which of its frames are ordered.
//!
//! One table with the fields of every kind, checked as it is read, so that the parser adds file and line to what is wrong.
//! Rejected: an enum that the parser tells apart by itself (its message for a misspelt field is «matches no variant»).

use serde::Deserialize;

use dataplane::uplink::filter::Action;

use super::filter::FilterRule;

/// Longest name of a network interface, the kernel's limit.
const MAX_INTERFACE_BYTES: usize = 15;

/// More queues than senders in the kernel help nobody.
const MAX_QUEUES: u16 = 16;

/// How the VM reaches the network.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct Uplink {
    /// The port.
    pub kind: UplinkKind,
    /// Which frames are ordered, and which are dropped: the first rule that matches decides.
    pub filter: Vec<FilterRule>,
    /// What becomes of frames that no rule matches.
    pub filter_default: FilterAction,
}

/// The port by its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UplinkKind {
    /// A TAP device that the daemon makes.
    Tap {
        /// Its name.
        tap: String,
        /// Bridge to attach it to.
        bridge: Option<String>,
        /// Its queues.
        queues: u16,
    },
    /// A network interface of the host, shared with it.
    AfPacket {
        /// Its name.
        interface: String,
        /// Take frames for every address, not only for the guest's.
        promiscuous: bool,
    },
    /// A port that DPDK drives.
    Dpdk {
        /// What DPDK calls it, with its options.
        port: String,
    },
}

/// What a rule, or the default, does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FilterAction {
    /// The frame becomes an input.
    #[default]
    Order,
    /// The frame is dropped and counted.
    Drop,
}

impl From<FilterAction> for Action {
    fn from(action: FilterAction) -> Action {
        match action {
            FilterAction::Order => Action::Order,
            FilterAction::Drop => Action::Drop,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Tap,
    AfPacket,
    Dpdk,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Tap => "tap",
            Kind::AfPacket => "af_packet",
            Kind::Dpdk => "dpdk",
        }
    }
}

/// The table as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    kind: Option<Kind>,
    tap: Option<String>,
    bridge: Option<String>,
    queues: Option<u16>,
    interface: Option<String>,
    promiscuous: Option<bool>,
    port: Option<String>,
    #[serde(default)]
    filter: Vec<FilterRule>,
    #[serde(default)]
    filter_default: FilterAction,
}

impl TryFrom<Written> for Uplink {
    type Error = String;

    fn try_from(written: Written) -> Result<Uplink, String> {
        let kind = written.kind.unwrap_or(Kind::Tap);
        let owners = [
            ("tap", written.tap.is_some(), Kind::Tap),
            ("bridge", written.bridge.is_some(), Kind::Tap),
            ("queues", written.queues.is_some(), Kind::Tap),
            ("interface", written.interface.is_some(), Kind::AfPacket),
            ("promiscuous", written.promiscuous.is_some(), Kind::AfPacket),
            ("port", written.port.is_some(), Kind::Dpdk),
        ];
        for (field, is_set, owner) in owners {
            if is_set && owner != kind {
                let (owner, kind) = (owner.name(), kind.name());
                return Err(format!(
                    "uplink.{field}: is for kind = \"{owner}\", and this uplink is of kind \"{kind}\"; remove it or write kind = \"{owner}\""
                ));
            }
        }
        let missing = |field: &str, what: &str| format!("uplink.{field}: is missing; name {what}");
        let kind = match kind {
            Kind::Tap => UplinkKind::Tap {
                tap: interface_name("tap", written.tap.ok_or_else(|| missing("tap", "the TAP device to make"))?)?,
                bridge: written.bridge.map(|bridge| interface_name("bridge", bridge)).transpose()?,
                queues: queues(written.queues.unwrap_or(1))?,
            },
            Kind::AfPacket => {
                let interface =
                    written.interface.ok_or_else(|| missing("interface", "the network interface to use"))?;
                UplinkKind::AfPacket {
                    interface: interface_name("interface", interface)?,
                    promiscuous: written.promiscuous.unwrap_or(false),
                }
            }
            Kind::Dpdk => UplinkKind::Dpdk { port: dpdk_port(written.port)? },
        };
        Ok(Uplink { kind, filter: written.filter, filter_default: written.filter_default })
    }
}

impl Uplink {
    /// What no two VMs of a node may both claim, with the field that names it; an interface can be shared.
    pub fn exclusive(&self) -> Option<(&'static str, &str)> {
        match &self.kind {
            UplinkKind::Tap { tap, .. } => Some(("uplink.tap", tap)),
            UplinkKind::AfPacket { .. } => None,
            UplinkKind::Dpdk { port } => Some(("uplink.port", port.split(',').next().unwrap_or(port))),
        }
    }
}

fn interface_name(field: &str, name: String) -> Result<String, String> {
    if name.is_empty() || name.len() > MAX_INTERFACE_BYTES {
        return Err(format!(
            "uplink.{field}: must have 1 to {MAX_INTERFACE_BYTES} bytes, the kernel's limit for a device name"
        ));
    }
    Ok(name)
}

fn queues(queues: u16) -> Result<u16, String> {
    match queues {
        1..=MAX_QUEUES => Ok(queues),
        _ => Err(format!("uplink.queues: is {queues}; allowed are 1 to {MAX_QUEUES}")),
    }
}

fn dpdk_port(port: Option<String>) -> Result<String, String> {
    if !cfg!(feature = "dpdk") {
        return Err("uplink.kind: this plover was built without DPDK; build it with --features dpdk, or use \
                    \"tap\" or \"af_packet\""
            .into());
    }
    let port = port.unwrap_or_default();
    if port.is_empty() {
        return Err(
            "uplink.port: is missing; name a PCI address or a DPDK device such as \"net_virtio_user0,path=…\"".into()
        );
    }
    Ok(port)
}
