//! The memory of a group's frames: the guard's ring and the arena of inputs, both for the life of the group.

use std::sync::Once;

use consensus::Payload;
use dataplane::arena::{Arena, ArenaBytes};
use dataplane::guard::Guard;
use dataplane::region::{NumaNode, PageSize, Region};

use super::{GroupError, Place};
use crate::config::{HugePages, NodeConfig, Policy};

/// What a group's frames live in.
pub struct Memory {
    /// Input, from its arrival until consensus has no use for it.
    pub arena: Arena,
    /// Output that is held.
    pub guard: Guard,
    /// The pages of both.
    pub pages: PageSize,
}

impl Memory {
    /// Takes what the policy asks for, on the pages and near the core that the node's file names.
    ///
    /// # Errors
    /// There is not even that much normal memory.
    pub fn new(node: &NodeConfig, policy: &Policy, place: Place) -> Result<Self, GroupError> {
        let (guard, arena) = (map(node, place, policy.guard_mib << 20)?, map(node, place, policy.arena_mib << 20)?);
        let pages = if guard.pages() == arena.pages() { arena.pages() } else { PageSize::Normal };
        Ok(Self { arena: Arena::new(arena), guard: Guard::new(guard), pages })
    }
}

/// Memory on the pages and near the core that the node's file names.
///
/// # Errors
/// There is not even that much normal memory.
pub fn map(node: &NodeConfig, place: Place, bytes: usize) -> Result<Region, GroupError> {
    let near = node.numa_node.map(NumaNode).or_else(|| NumaNode::of_core(place.core?));
    let mapped = Region::map_or_normal(bytes, page_size(node.hugepages, bytes), near);
    let (region, fallback) = mapped.map_err(|error| GroupError::Memory(error.to_string()))?;
    if let Some(why) = fallback {
        say_once(node.hugepages, &why.to_string());
    }
    Ok(region)
}

/// A handle of the arena as the payload of an entry or of the entries of a message: nothing is copied or allocated.
pub fn shared(bytes: ArenaBytes) -> Payload {
    let (chunk, at, len) = bytes.into_parts();
    Payload::within(chunk, at, len)
}

/// A page of 1 GiB for a guard of 32 MiB would waste most of what is scarcest: only memory that fills half of one
/// gets it.
fn page_size(wanted: HugePages, bytes: usize) -> PageSize {
    match wanted {
        HugePages::Size1G if bytes >= PageSize::Huge1G.bytes() / 2 => PageSize::Huge1G,
        HugePages::Auto | HugePages::Size2M | HugePages::Size1G => PageSize::Huge2M,
        HugePages::Off => PageSize::Normal,
    }
}

/// One line per daemon, not one per group and restart; a warning only if somebody asked for these pages.
fn say_once(wanted: HugePages, why: &str) {
    static SAID: Once = Once::new();
    SAID.call_once(|| match wanted {
        HugePages::Auto => tracing::info!("normal pages hold the frames: {why}; or set hugepages = \"off\""),
        _ => tracing::warn!("normal pages hold the frames: {why}"),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_a_gibibyte_are_for_memory_that_fills_them() {
        let small = (HugePages::Size1G, 64 << 20);
        assert_eq!(page_size(small.0, small.1), PageSize::Huge2M);
        assert_eq!(page_size(HugePages::Size1G, 512 << 20), PageSize::Huge1G);
        assert_eq!(page_size(HugePages::Size2M, 4 << 30), PageSize::Huge2M);
        assert_eq!(page_size(HugePages::Off, 4 << 30), PageSize::Normal);
    }

    #[test]
    fn a_group_gets_its_memory_whatever_pages_there_are() {
        for hugepages in ["auto", "2M", "1G", "off"] {
            let text = format!("name = \"a\"\nlisten = \"127.0.0.1:7400\"\nhugepages = \"{hugepages}\"");
            let node: NodeConfig = toml::from_str(&text).unwrap();
            let policy = Policy { guard_mib: 1, arena_mib: 16, ..Policy::default() };
            let mut memory = Memory::new(&node, &policy, Place::of(&node, 0, 1, 2)).unwrap();
            let payload = shared(memory.arena.put(&[3; 500]).unwrap());
            assert_eq!(*payload, [3; 500]);
            memory.guard.push(0, &[0; 60]).unwrap();
            assert!(memory.arena.bytes().0 >= 16 << 20);
        }
    }
}
