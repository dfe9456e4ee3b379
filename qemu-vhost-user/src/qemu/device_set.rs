//! What devices a VM has, in a form that two replicas can compare: `info qtree` without what is only true of one host
//! (paths, descriptors, names of host-side back ends) or one moment (where the guest mapped a BAR).
//!
//! The text is kept, so that a mismatch can name the lines that differ. Rejected: walking the object tree with qom-get
//! (thousands of commands), comparing command lines (an equal VM can be written in many ways).

use serde::{Deserialize, Serialize};

/// A VM's devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSet {
    /// Hash of `text` (FNV-1a, 64 bit); to print and compare at a glance, not a proof.
    pub hash: u64,
    /// The canonical text: a device or property per line.
    pub text: String,
}

/// Properties that name something of the host.
const HOST_PROPERTIES: [&str; 14] = [
    "netdev",
    "chardev",
    "drive",
    "memdev",
    "audiodev",
    "display",
    "evdev",
    "host",
    "hostdev",
    "fd",
    "vhostfd",
    "rng",
    "romfile",
    "ebpf-rss-fds",
];
/// Properties that the guest or QEMU changes while it runs.
const CHANGING_PROPERTIES: [&str; 3] = ["busnr", "romsize", "smb_io_base"];

impl DeviceSet {
    /// Makes the canonical form of `info qtree`'s text, with further lines (CPU model and the like) in front.
    pub fn from_qtree(further: &[String], qtree: &str) -> DeviceSet {
        let mut text = String::new();
        let canonical = qtree.lines().filter_map(canonical_line);
        for line in further.iter().cloned().chain(canonical) {
            text.push_str(&line);
            text.push('\n');
        }
        DeviceSet { hash: fnv1a(text.as_bytes()), text }
    }

    /// The lines that only `self` has, each with the device that it belongs to.
    pub fn lines_missing_in(&self, other: &DeviceSet) -> Vec<String> {
        let mut theirs = std::collections::HashMap::new();
        for line in with_owners(&other.text) {
            *theirs.entry(line).or_insert(0usize) += 1;
        }
        with_owners(&self.text)
            .filter(|line| match theirs.get_mut(line) {
                Some(count) if *count > 0 => {
                    *count -= 1;
                    false
                }
                _ => true,
            })
            .collect()
    }
}

/// Each line behind the names of the devices that it belongs to: `virtio-net-pci / mac = "52:…"`.
fn with_owners(text: &str) -> impl Iterator<Item = String> {
    let mut owners: Vec<(usize, &str)> = Vec::new();
    text.lines().map(move |line| {
        let content = line.trim_start();
        let depth = line.len() - content.len();
        owners.retain(|(owner_depth, _)| *owner_depth < depth);
        let owner = owners.last().map_or(String::new(), |(_, name)| format!("{name}: "));
        if let Some(device) = content.strip_prefix("dev: ") {
            owners.push((depth, device.split(',').next().unwrap_or(device)));
        }
        format!("{owner}{content}")
    })
}

fn canonical_line(line: &str) -> Option<String> {
    let content = line.trim_start();
    let indent = &line[..line.len() - content.len()];
    let content = content.trim_end();
    if content.is_empty() {
        return None;
    }
    if let Some(bar) = content.strip_prefix("bar ") {
        return canonical_bar(bar).map(|bar| format!("{indent}{bar}"));
    }
    if let Some(size) = content.strip_prefix("mmio ").and_then(|mmio| mmio.split_once('/')) {
        return Some(format!("{indent}mmio {}", size.1));
    }
    if let Some((class, rest)) = content.split_once(", addr ") {
        // The bus number is the guest's doing.
        let place = rest.split_once(':').map_or(rest, |(_, place)| place);
        return Some(format!("{indent}{class}, addr {place}"));
    }
    if let Some((property, value)) = content.split_once(" = ") {
        if HOST_PROPERTIES.contains(&property) || CHANGING_PROPERTIES.contains(&property) {
            return None;
        }
        if value.starts_with("\"/") {
            return Some(format!("{indent}{property} = <path>"));
        }
    }
    Some(format!("{indent}{content}"))
}

/// `0: i/o at 0xc000 [0xc01f]`: kind and size stay, the address is the guest's choice. An unmapped BAR has address -1
/// and an end that wrapped around, which gives the same size.
fn canonical_bar(bar: &str) -> Option<String> {
    let (kind, place) = bar.split_once(" at ")?;
    let (start, end) = place.split_once(" [")?;
    let hex = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let size = hex(end.strip_suffix(']')?)?.wrapping_sub(hex(start)?).wrapping_add(1);
    Some(format!("bar {kind}, {size} bytes"))
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BEFORE_BOOT: &str = r#"bus: main-system-bus
  type System
  dev: hpet, id ""
    mmio 00000000fed00000/0000000000000400
  dev: i440FX-pcihost, id ""
    bus: pci.0
      type PCI
      dev: virtio-net-pci, id ""
        vectors = 4 (0x4)
        romfile = ""
        busnr = 0 (0x0)
        smb_io_base = 45312 (0xb100)
        class Ethernet controller, addr 00:02.0, pci id 1af4:1000 (sub 1af4:0001)
        bar 0: i/o at 0xffffffffffffffff [0x1e]
        bar 1: mem at 0xffffffffffffffff [0xffe]
        bus: virtio-bus
          dev: virtio-net-device, id ""
            mac = "52:54:00:12:34:56"
            netdev = "n0"
            tx = ""

"#;

    #[test]
    fn boot_and_host_names_make_no_difference() {
        let after_boot = BEFORE_BOOT
            .replace("i/o at 0xffffffffffffffff [0x1e]", "i/o at 0xc000 [0xc01f]")
            .replace("mem at 0xffffffffffffffff [0xffe]", "mem at 0xfebd1000 [0xfebd1fff]")
            .replace("addr 00:02.0", "addr 01:02.0")
            .replace("busnr = 0 (0x0)", "busnr = 1 (0x1)")
            .replace("45312 (0xb100)", "1792 (0x700)")
            .replace("netdev = \"n0\"", "netdev = \"hostnet0\"")
            .replace("romfile = \"\"", "romfile = \"/usr/share/x.rom\"");
        let (before, after) = (DeviceSet::from_qtree(&[], BEFORE_BOOT), DeviceSet::from_qtree(&[], &after_boot));
        assert_eq!(before, after);
        assert!(before.text.contains("bar 0: i/o, 32 bytes\n") && before.text.contains("bar 1: mem, 4096 bytes\n"));
    }

    #[test]
    fn guest_visible_differences_are_named_with_their_device() {
        let mine = DeviceSet::from_qtree(&["cpu 0: max".into()], BEFORE_BOOT);
        let theirs = DeviceSet::from_qtree(&["cpu 0: qemu64".into()], &BEFORE_BOOT.replace("34:56", "34:57"));
        assert_ne!(mine.hash, theirs.hash);
        assert_eq!(mine.lines_missing_in(&theirs), ["cpu 0: max", "virtio-net-device: mac = \"52:54:00:12:34:56\""]);
        assert_eq!(theirs.lines_missing_in(&mine).len(), 2);
        assert!(mine.lines_missing_in(&mine).is_empty());
    }

    #[test]
    fn a_second_equal_device_is_noticed() {
        let one = DeviceSet::from_qtree(&[], "  dev: e1000, id \"\"\n");
        let two = DeviceSet::from_qtree(&[], "  dev: e1000, id \"\"\n  dev: e1000, id \"\"\n");
        assert_eq!(two.lines_missing_in(&one), ["dev: e1000, id \"\""]);
        assert!(one.lines_missing_in(&two).is_empty());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics_and_is_canonical_once(text in "( {0,6}(bar|mmio|dev:|class x, addr|a =)? ?[ -~é]{0,30}\n){0,6}") {
            let set = DeviceSet::from_qtree(&[], &text);
            prop_assert!(set.lines_missing_in(&set).is_empty());
        }
    }
}
