//! What a device state says of itself: the optional parts that it has, and whether it changes the vCPUs' common state.
//!
//! QEMU writes an optional part (a «subsection») only while it matters, and a load leaves alone what the stream does not
//! have. So a guest whose `virtio/disabled` is set stays so after loading a state that was saved without it: replicas that
//! look synchronised would differ in a place that decides whether the network works. Migration never meets this, because
//! it loads into a freshly reset machine. We compare the lists of optional parts before anything is applied.
//!
//! The stream's format (QEMU migration/savevm.c, vmstate.c): sections `04 id:be32 len name instance:be32 version:be32 …
//! 7e id:be32`, and in them subsections `05 len name version:be32 …`. Their inner layout is not self-describing, so this is a
//! scan for headers that are whole and plausible, not a parse.
//!
//! Loading a vCPU's common state (whether it is halted, which interrupts wait) makes TCG forget all translations, because a
//! load usually brings other RAM with it. At every syncvm that would keep a secondary busy with translating its guest's code
//! again, for most of its time. So that section can be taken out of a state, and what it says be done otherwise.

use std::collections::BTreeMap;

use plover_agent::protocol::VcpuCommon;

const SECTION_FULL: u8 = 0x04;
const SUBSECTION: u8 = 0x05;
const SECTION_FOOTER: u8 = 0x7e;
/// A byte and an id.
const FOOTER_BYTES: usize = 5;
/// Of the section that is common to the vCPUs of all architectures; there is one for each.
const VCPU_COMMON: &str = "cpu_common";
/// Before its content: a byte, id, length of the name, name, instance, version.
const VCPU_HEADER_BYTES: usize = 1 + 4 + 1 + VCPU_COMMON.len() + 4 + 4;
/// Its content without any of its rare subsections: two words.
const VCPU_CONTENT_BYTES: usize = 8;
/// With header, content and footer.
const VCPU_SECTION_BYTES: usize = VCPU_HEADER_BYTES + VCPU_CONTENT_BYTES + FOOTER_BYTES;
/// Shortest name of a subsection: one byte, a slash, one byte.
const MIN_NAME_BYTES: usize = 3;

/// Optional parts by section and name, with how often they occur.
type Parts = BTreeMap<(String, String), usize>;

/// The optional parts that `present` has and `incoming` lacks: loading `incoming` would leave them as they are.
pub fn leftovers(present: &[u8], incoming: &[u8]) -> Vec<String> {
    let incoming = optional_parts(incoming);
    optional_parts(present)
        .into_iter()
        .filter(|(part, count)| incoming.get(part).copied().unwrap_or(0) < *count)
        .map(|((section, name), _)| format!("{name} of {section}"))
        .collect()
}

/// The common state of the guest's vCPUs, and the rest of its state.
#[derive(Debug, PartialEq, Eq)]
pub struct Divided {
    /// By QEMU's number of each.
    pub vcpus: BTreeMap<u16, VcpuCommon>,
    /// A whole state without them.
    pub rest: Vec<u8>,
}

/// Takes the vCPUs' common state out. `None` if there is none, or if one has more to say than usual.
pub fn divide(state: &[u8]) -> Option<Divided> {
    let mut divided = Divided { vcpus: BTreeMap::new(), rest: Vec::with_capacity(state.len()) };
    let (mut at, mut from) = (0, 0);
    while at < state.len() {
        let start = at + FOOTER_BYTES;
        if section_after_footer(&state[at..]) != Some(VCPU_COMMON) {
            at += 1;
            continue;
        }
        let (index, vcpu) = vcpu(state.get(start..start + VCPU_SECTION_BYTES)?)?;
        if divided.vcpus.insert(index, vcpu).is_some() {
            return None;
        }
        divided.rest.extend_from_slice(&state[from..start]);
        from = start + VCPU_SECTION_BYTES;
        // The next section is found by this one's footer.
        at = from - FOOTER_BYTES;
    }
    divided.rest.extend_from_slice(&state[from..]);
    (!divided.vcpus.is_empty()).then_some(divided)
}

/// What a section of the usual length says.
fn vcpu(section: &[u8]) -> Option<(u16, VcpuCommon)> {
    let word = |at: usize| Some(u32::from_be_bytes(section.get(at..at + 4)?.try_into().ok()?));
    let footer = VCPU_HEADER_BYTES + VCPU_CONTENT_BYTES;
    let is_whole = section[footer] == SECTION_FOOTER && section[footer + 1..] == section[1..FOOTER_BYTES];
    let index = u16::try_from(word(VCPU_HEADER_BYTES - 8)?).ok()?;
    let (halted, interrupts) = (word(VCPU_HEADER_BYTES)?, word(VCPU_HEADER_BYTES + 4)?);
    // A load ignores the lowest bit of the interrupts, which old versions used.
    (is_whole && halted <= 1 && interrupts & 1 == 0).then_some((index, VcpuCommon { halted: halted == 1, interrupts }))
}

fn optional_parts(state: &[u8]) -> Parts {
    let mut parts = Parts::new();
    let mut section = String::from("the first section");
    let mut at = 0;
    while at < state.len() {
        if let Some(name) = section_after_footer(&state[at..]) {
            section = name.to_owned();
        } else if let Some(name) = subsection(&state[at..]) {
            *parts.entry((section.clone(), name.to_owned())).or_insert(0) += 1;
        }
        at += 1;
    }
    parts
}

/// The name of a section that begins right behind the footer of the one before.
fn section_after_footer(bytes: &[u8]) -> Option<&str> {
    let [SECTION_FOOTER, _, _, _, _, SECTION_FULL, _, _, _, _, rest @ ..] = bytes else { return None };
    name(rest)
}

/// The name of a subsection that begins here: «parent/part».
fn subsection(bytes: &[u8]) -> Option<&str> {
    let [SUBSECTION, rest @ ..] = bytes else { return None };
    name(rest).filter(|name| name.len() >= MIN_NAME_BYTES && name.contains('/'))
}

/// A length byte and that many printable bytes.
fn name(bytes: &[u8]) -> Option<&str> {
    let (length, rest) = bytes.split_first()?;
    let name = rest.get(..usize::from(*length))?;
    let printable = !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
    std::str::from_utf8(name).ok().filter(|_| printable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn section(id: u32, name: &str, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![SECTION_FULL];
        bytes.extend(id.to_be_bytes());
        bytes.push(name.len() as u8);
        bytes.extend(name.as_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        bytes.push(SECTION_FOOTER);
        bytes.extend(id.to_be_bytes());
        bytes
    }

    fn part(name: &str, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![SUBSECTION, name.len() as u8];
        bytes.extend(name.as_bytes());
        bytes.extend([0, 0, 0, 1]);
        bytes.extend(value);
        bytes
    }

    fn state(parts: &[Vec<u8>]) -> Vec<u8> {
        let body = [b"fields".to_vec(), parts.concat()].concat();
        [b"QEVM\0\0\0\x03".to_vec(), section(1, "timer", b"t"), section(2, "0000:00:02.0/virtio-net", &body)].concat()
    }

    #[test]
    fn what_only_this_guest_has_is_named_with_its_section() {
        let (started, disabled) = (part("virtio/started", &[1]), part("virtio/disabled", &[1]));
        let ours = state(&[started.clone(), disabled.clone()]);
        let theirs = state(&[started]);
        assert_eq!(leftovers(&ours, &theirs), ["virtio/disabled of 0000:00:02.0/virtio-net"]);
        assert!(leftovers(&theirs, &ours).is_empty(), "more in the incoming state is loaded and harmless");
        assert!(leftovers(&ours, &ours).is_empty());
    }

    #[test]
    fn the_same_part_of_two_devices_counts_for_each() {
        let disabled = part("virtio/disabled", &[1]);
        let both = [section(1, "a", b""), section(2, "nic-1", &disabled), section(3, "nic-2", &disabled)].concat();
        let other = [section(1, "a", b""), section(2, "nic-1", &disabled), section(3, "nic-2", b"")].concat();
        assert_eq!(leftovers(&both, &other), ["virtio/disabled of nic-2"]);
    }

    fn with_vcpus(words: &[[u8; 8]], device: &[u8]) -> Vec<u8> {
        let mut bytes = [b"QEVM\0\0\0\x03".to_vec(), section(1, "timer", b"t")].concat();
        for (at, words) in words.iter().enumerate() {
            let mut vcpu = section(2 + 2 * at as u32, "cpu_common", words);
            vcpu[VCPU_HEADER_BYTES - 5] = at as u8;
            bytes.extend(vcpu);
            bytes.extend(section(3 + 2 * at as u32, "cpu", b"registers"));
        }
        bytes.extend(section(40, "0000:00:02.0/virtio-net", device));
        bytes
    }

    #[test]
    fn vcpus_are_taken_out_and_the_rest_stays_a_state() {
        let (halted, waiting) = ([0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 2]);
        let state = with_vcpus(&[halted, waiting], b"device");
        let divided = divide(&state).unwrap();
        let vcpus = [(0, true, 0), (1, false, 0x102)];
        let vcpus = vcpus.map(|(index, halted, interrupts)| (index, VcpuCommon { halted, interrupts }));
        assert_eq!(divided.vcpus, BTreeMap::from(vcpus));
        let without = with_vcpus(&[], b"device");
        let cpus = (0..2).flat_map(|at| section(3 + 2 * at, "cpu", b"registers")).collect::<Vec<u8>>();
        let before_device = without.len() - section(40, "0000:00:02.0/virtio-net", b"device").len();
        assert_eq!(divided.rest, [&without[..before_device], &cpus, &without[before_device..]].concat());
        assert_eq!(divide(&divided.rest), None, "none left");
    }

    #[test]
    fn vcpus_with_more_to_say_are_left_where_they_are() {
        let usual = [0; 8];
        assert!(divide(&with_vcpus(&[usual], b"")).is_some());
        let mut longer = section(2, "cpu_common", &[&usual[..], &part("cpu_common/exception_index", &[3; 4])].concat());
        longer.splice(..0, section(1, "timer", b"t"));
        assert_eq!(divide(&longer), None);
        for odd in [[0, 0, 0, 2, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]] {
            assert_eq!(divide(&with_vcpus(&[odd], b"")), None);
        }
        let state = with_vcpus(&[usual], b"");
        let end = state.windows(10).position(|name| name == b"cpu_common").unwrap() + VCPU_SECTION_BYTES - 6;
        assert!(divide(&state[..end]).is_some());
        assert_eq!(divide(&state[..end - 1]), None, "a section without an end");
    }

    proptest! {
        #[test]
        fn any_bytes_are_scanned_without_a_panic(
            present in proptest::collection::vec(any::<u8>(), 0..400),
            incoming in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let _ = leftovers(&present, &incoming);
            let _ = divide(&present);
            prop_assert!(leftovers(&present, &present).is_empty());
        }
    }
}
