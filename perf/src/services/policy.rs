//! What protects the guest: the policies that are compared, as lines of the VM's file.

/// One of the policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// In tables and row ids.
    pub name: &'static str,
    /// The guest runs on one host and nothing protects it.
    pub unreplicated: bool,
    /// Lines of the `[policy]` table.
    pub lines: &'static str,
}

/// Our device and our uplink, without a group.
pub const UNREPLICATED: Policy = Policy { name: "unreplicated", unreplicated: true, lines: "" };
/// What Plover is for: the default policy.
pub const VSMR: Policy = Policy { name: "vsmr", unreplicated: false, lines: "" };

/// All that each workload is measured under. The first is what the others are compared with.
pub const ALL: [Policy; 2] = [UNREPLICATED, VSMR];
/// What a smoke run does.
pub const SMOKE: [Policy; 2] = [UNREPLICATED, VSMR];
