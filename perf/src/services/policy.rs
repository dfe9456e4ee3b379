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

const fn protected(name: &'static str, lines: &'static str) -> Policy {
    Policy { name, unreplicated: false, lines }
}

/// Our device and our uplink, without a group.
pub const UNREPLICATED: Policy = Policy { name: "unreplicated", unreplicated: true, lines: "" };
/// What Plover is for: the default policy.
pub const VSMR: Policy = protected("vsmr", "");
/// Checkpointing: a secondary that does not run, all dirty pages, every 100 ms.
pub const MC: Policy = protected("mc", "sync = \"mc\"\n");
/// Both guests run and are made equal every 25 ms.
pub const STR: Policy = protected("str", "sync = \"str\"\n");

/// What each of our switches adds to the one before it; the last line is the default policy (PLOVER's Figure 7).
pub const LADDER: [Policy; 6] = [
    UNREPLICATED,
    protected("ordering", "sync = \"str\"\nbackground_hashing = false\ndelta = false\n"),
    protected("idle", "early_resume = false\nbackground_hashing = false\ndelta = false\n"),
    protected("early_resume", "background_hashing = false\ndelta = false\n"),
    protected("background", "delta = false\n"),
    protected("delta", ""),
];

/// All that each workload is measured under. The first is what the others are compared with.
pub const ALL: [Policy; 4] = [UNREPLICATED, VSMR, STR, MC];
/// What a smoke run does.
pub const SMOKE: [Policy; 2] = [UNREPLICATED, VSMR];
