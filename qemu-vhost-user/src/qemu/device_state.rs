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
//! again, for most of its time. So a state is given to QEMU without that section if the guest's own says the same.

use std::collections::BTreeMap;
use std::ops::Range;

const SECTION_FULL: u8 = 0x04;
const SUBSECTION: u8 = 0x05;
const SECTION_FOOTER: u8 = 0x7e;
/// A byte and an id.
const FOOTER_BYTES: usize = 5;
/// Of the section that is common to the vCPUs of all architectures; there is one for each.
const VCPU_COMMON: &str = "cpu_common";
/// Two words, two rare subsections, and room for what later versions add.
const MOST_VCPU_COMMON_BYTES: usize = 128;
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

/// `incoming` without the vCPUs' common state, if that is the same in `present`, the state of the guest that is to load it. A
/// load of the rest then leaves TCG's translations as they are.
pub fn without_known_vcpus(present: &[u8], incoming: &[u8]) -> Option<Vec<u8>> {
    let sections = vcpu_sections(incoming);
    let known = vcpu_sections(present);
    let content = |section: &Range<usize>, of: &[u8]| of[section.clone()].to_vec();
    let same = known.iter().map(|section| content(section, present));
    if sections.is_empty() || !sections.iter().map(|section| content(section, incoming)).eq(same) {
        return None;
    }
    let mut rest = Vec::with_capacity(incoming.len());
    let mut from = 0;
    for section in sections {
        rest.extend_from_slice(&incoming[from..section.start]);
        from = section.end;
    }
    rest.extend_from_slice(&incoming[from..]);
    Some(rest)
}

/// Where the sections of the vCPUs' common state are, footers included.
fn vcpu_sections(state: &[u8]) -> Vec<Range<usize>> {
    let mut sections = Vec::new();
    let mut at = 0;
    while at < state.len() {
        let start = at + FOOTER_BYTES;
        at = match section_after_footer(&state[at..]) {
            Some(VCPU_COMMON) => match footer_of(&state[start..]) {
                Some(length) => {
                    sections.push(start..start + length);
                    // The next section is found by this one's footer.
                    start + length - FOOTER_BYTES
                }
                None => return Vec::new(),
            },
            _ => at + 1,
        };
    }
    sections
}

/// How long a short section that begins here is, up to the end of its footer.
fn footer_of(section: &[u8]) -> Option<usize> {
    let id = section.get(1..FOOTER_BYTES)?;
    let most = section.get(..section.len().min(MOST_VCPU_COMMON_BYTES))?;
    let is_footer = |bytes: &[u8]| bytes[0] == SECTION_FOOTER && &bytes[1..] == id;
    let at = most.windows(FOOTER_BYTES).position(is_footer)?;
    Some(at + FOOTER_BYTES)
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
            bytes.extend(section(2 + 2 * at as u32, "cpu_common", words));
            bytes.extend(section(3 + 2 * at as u32, "cpu", b"registers"));
        }
        bytes.extend(section(40, "0000:00:02.0/virtio-net", device));
        bytes
    }

    #[test]
    fn vcpus_are_left_out_if_they_all_are_the_same() {
        let (halted, waiting) = ([0, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 2]);
        let ours = with_vcpus(&[halted, waiting], b"old");
        let theirs = with_vcpus(&[halted, waiting], b"new");
        let rest = without_known_vcpus(&ours, &theirs).unwrap();
        assert!(vcpu_sections(&rest).is_empty());
        let sections = |name: &str| String::from_utf8_lossy(&rest).matches(name).count();
        assert_eq!((sections("registers"), sections("new"), sections("timer")), (2, 1, 1));
        assert_eq!(rest.len(), theirs.len() - vcpu_sections(&theirs).iter().map(Range::len).sum::<usize>());
        for other in [with_vcpus(&[halted, halted], b"new"), with_vcpus(&[halted], b"new"), with_vcpus(&[], b"new")] {
            assert_eq!(without_known_vcpus(&ours, &other), None);
            assert_eq!(without_known_vcpus(&other, &ours), None);
        }
        let cut = &theirs[..vcpu_sections(&theirs)[1].end - 1];
        assert_eq!(without_known_vcpus(cut, cut), None, "a section without an end");
    }

    proptest! {
        #[test]
        fn any_bytes_are_scanned_without_a_panic(
            present in proptest::collection::vec(any::<u8>(), 0..400),
            incoming in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            let _ = leftovers(&present, &incoming);
            let _ = without_known_vcpus(&present, &incoming);
            prop_assert!(leftovers(&present, &present).is_empty());
        }
    }
}
