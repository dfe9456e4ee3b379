//! `vms/NAME.toml`: one protected VM. The same file belongs on all three nodes.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use dataplane::fabric::Transport;
use serde::de::Error;
use serde::{Deserialize, Deserializer};

use super::uplink::Uplink;
use super::{ConfigError, invalid, parse_mac, read_toml};
use crate::device::MAX_QUEUE_PAIRS;

/// What to do while only one replica has the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Degraded {
    /// Serve without holding output: the group has used up its one failure.
    #[default]
    Serve,
    /// Hold output until a secondary is back.
    Hold,
}

/// Whether a VM is protected at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// By a group of three replicas.
    #[default]
    Replicated,
    /// By nothing: one node passes its frames through. For comparison.
    Unreplicated,
}

/// Which page hash the replicas compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum HashKind {
    /// 128-bit CityHash, the paper's choice (PLOVER §5.2).
    #[default]
    City128,
    /// XXH3 with 128 bits.
    #[serde(rename = "xxh3-128")]
    Xxh3,
}

/// Which dirty tracker to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum TrackerChoice {
    /// The best that the kernel offers.
    #[default]
    Auto,
    /// userfaultfd write protection and PAGEMAP_SCAN.
    Uffd,
    /// Soft-dirty bits.
    SoftDirty,
    /// Every page is dirty every time.
    Full,
}

/// Where the guest's memory lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryBackend {
    /// memfd.
    #[default]
    Memfd,
    /// memfd on hugepages.
    Hugepages,
}

/// Who listens on the vhost-user socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum SocketSide {
    /// QEMU listens, Plover connects (and reconnects).
    #[default]
    Qemu,
    /// Plover listens, QEMU connects.
    Plover,
}

/// When the guests are made identical, and what the secondary's does meanwhile. All but the default are what others
/// do, by the same engine, so that they can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum SyncPolicy {
    /// Both guests run; a slot ends when the guest is idle; divergent pages are sent (PLOVER).
    #[default]
    Vsmr,
    /// Both guests run; slots have a fixed length; divergent pages are sent.
    Str,
    /// Micro-checkpointing as in Remus: the secondary's guest stands still, slots have a fixed length, and every
    /// dirty page is sent.
    Mc,
}

impl SyncPolicy {
    /// Length of a slot where that is fixed and nobody says otherwise.
    fn usual_interval_ms(self) -> Option<u64> {
        match self {
            Self::Vsmr => None,
            Self::Str => Some(25),
            Self::Mc => Some(100),
        }
    }

    /// Whether the secondary's guest stands still until it takes over.
    pub fn is_passive(self) -> bool {
        self == Self::Mc
    }
}

impl std::fmt::Display for SyncPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Vsmr => "vsmr",
            Self::Str => "str",
            Self::Mc => "mc",
        })
    }
}

/// One member of the group.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaConfig {
    /// The node's name, as in its `node.toml`.
    pub node: String,
    /// Where its daemon listens.
    pub address: SocketAddr,
    /// What may carry messages to and from it, the preferred one first.
    #[serde(default, deserialize_with = "transports")]
    pub transports: Vec<Transport>,
}

fn transports<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Transport>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    names.iter().map(|name| name.parse().map_err(D::Error::custom)).collect()
}

/// When slots end, what is held, how failures are noticed. Times carry their unit.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// When the guests are made identical, and what the secondary's does meanwhile.
    pub sync: SyncPolicy,
    /// With `str` and `mc`: from the end of one syncvm until the next stops the guest.
    pub interval_ms: Option<u64>,
    /// What to do while only one replica has the guest.
    pub degraded: Degraded,
    /// After every syncvm both sides hash all RAM and compare it and the device state (I4). Slow; for tests and doubts.
    pub verify: bool,
    /// The leader's guest runs again after the copy, not after the transfer.
    pub early_resume: bool,
    /// Pages are hashed and compared before the guest is stopped, so that fewer need it while it stands still.
    pub background_hashing: bool,
    /// MiB per second that a rejoin sends at most; 0: no limit.
    pub rejoin_mib_per_s: u64,
    /// Of pages that differ, only the blocks that differ are sent.
    pub delta: bool,
    /// A peer that says nothing for this long counts as failed.
    pub failure_timeout_ms: u64,
    /// The guest counts as idle when its vCPUs stood still for this long (PLOVER §4.3).
    pub idle_threshold_us: u64,
    /// A slot ends at the latest when its oldest held frame is this old.
    pub max_hold_ms: u64,
    /// A slot ends at the latest after this time, if the guest consumed or produced anything.
    pub max_slot_ms: u64,
    /// Longest time that the secondary waits for its guest to become idle before a syncvm.
    pub max_idle_wait_ms: u64,
    /// Longest time for any one step of a syncvm; then it is retried, and then the secondary is given up.
    pub sync_timeout_ms: u64,
    /// MiB of guest output that can be held.
    pub guard_mib: usize,
    /// MiB for input from its arrival until a syncvm has made it needless.
    pub arena_mib: usize,
    /// Which page hash the replicas compare.
    pub hash: HashKind,
    /// Which dirty tracker to use.
    pub tracker: TrackerChoice,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            sync: SyncPolicy::Vsmr,
            interval_ms: None,
            degraded: Degraded::Serve,
            verify: false,
            early_resume: true,
            background_hashing: true,
            rejoin_mib_per_s: 0,
            delta: true,
            failure_timeout_ms: 100,
            idle_threshold_us: 100,
            max_hold_ms: 200,
            max_slot_ms: 200,
            max_idle_wait_ms: 2,
            sync_timeout_ms: 2000,
            guard_mib: 32,
            arena_mib: 64,
            hash: HashKind::City128,
            tracker: TrackerChoice::Auto,
        }
    }
}

impl Policy {
    /// The fixed length of slots, if it is fixed.
    pub fn interval_us(&self) -> Option<u64> {
        let usual_ms = self.sync.usual_interval_ms()?;
        Some(self.interval_ms.unwrap_or(usual_ms) * 1000)
    }

    /// The same for people.
    pub fn describe_sync(&self) -> String {
        match self.interval_us() {
            Some(interval_us) => format!("{} every {} ms", self.sync, interval_us / 1000),
            None => self.sync.to_string(),
        }
    }
}

/// One VM group.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The VM's name: the file's name without `.toml`.
    #[serde(skip)]
    pub name: String,
    /// The file it was read from, for messages.
    #[serde(skip)]
    pub path: PathBuf,
    /// Guest RAM.
    pub memory_mib: u64,
    /// The guest's MAC address, the same on all replicas.
    pub mac: String,
    /// Whether the VM is protected at all.
    #[serde(default)]
    pub mode: Mode,
    /// The three members; the first boots the guest when the group is formed.
    pub replicas: Vec<ReplicaConfig>,
    /// How the VM reaches the network.
    pub uplink: Uplink,
    /// Where the guest's memory lives.
    #[serde(default)]
    pub memory_backend: MemoryBackend,
    /// Pairs of receive and transmit queues of the guest's network device; a guest uses as many as it has vCPUs.
    #[serde(default = "one_pair")]
    pub queue_pairs: u16,
    /// Who listens on the vhost-user socket.
    #[serde(default)]
    pub vhost_user_server: SocketSide,
    /// The vhost-user socket; `run_dir/NAME/vhost.sock` when absent.
    #[serde(default)]
    pub vhost_user_socket: Option<PathBuf>,
    /// QEMU's QMP socket; `run_dir/NAME/qmp.sock` when absent.
    #[serde(default)]
    pub qmp_socket: Option<PathBuf>,
    /// The agent's socket; `run_dir/NAME/agent.sock` when absent.
    #[serde(default)]
    pub agent_socket: Option<PathBuf>,
    /// When slots end, what is held, how failures are noticed.
    #[serde(default)]
    pub policy: Policy,
}

fn one_pair() -> u16 {
    1
}

impl VmConfig {
    /// Reads one VM file; the VM is named like the file.
    ///
    /// # Errors
    /// A [`ConfigError`] that names file, line and field.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut vm: VmConfig = read_toml(path)?;
        vm.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        vm.path = path.to_owned();
        vm.check()?;
        Ok(vm)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let bad = |field: &str, message: String| Err(invalid(&self.path, field, message));
        let (count, remedy) = match self.mode {
            Mode::Replicated => (3, "a group has exactly three (and mode = \"unreplicated\" exactly one)"),
            Mode::Unreplicated => (1, "with mode = \"unreplicated\" there is exactly one"),
        };
        if self.replicas.len() != count {
            return bad("replicas", format!("names {} nodes; {remedy}", self.replicas.len()));
        }
        for (at, replica) in self.replicas.iter().enumerate() {
            for other in &self.replicas[..at] {
                if other.node == replica.node {
                    return bad("replicas", format!("names node {:?} twice; each node has one replica", other.node));
                }
                if other.address == replica.address {
                    return bad("replicas", format!("gives {} to two nodes; each has its own", other.address));
                }
            }
        }
        if !(1..=1 << 20).contains(&self.memory_mib) {
            return bad("memory_mib", format!("is {}; allowed are 1 to {}", self.memory_mib, 1 << 20));
        }
        if !(1..=MAX_QUEUE_PAIRS).contains(&usize::from(self.queue_pairs)) {
            return bad("queue_pairs", format!("is {}; allowed are 1 to {MAX_QUEUE_PAIRS}", self.queue_pairs));
        }
        self.mac_bytes()?;
        self.check_policy()
    }

    fn check_policy(&self) -> Result<(), ConfigError> {
        if self.policy.interval_ms.is_some() && self.policy.sync == SyncPolicy::Vsmr {
            let message = "means nothing with sync = \"vsmr\"; leave it out, or set sync = \"str\" or \"mc\"";
            return Err(invalid(&self.path, "policy.interval_ms", message.to_owned()));
        }
        let ranges = [
            ("policy.interval_ms", self.policy.interval_ms.unwrap_or(1), 1, 60_000),
            ("policy.failure_timeout_ms", self.policy.failure_timeout_ms, 20, 60_000),
            ("policy.idle_threshold_us", self.policy.idle_threshold_us, 20, 100_000),
            ("policy.max_hold_ms", self.policy.max_hold_ms, 1, 60_000),
            ("policy.max_slot_ms", self.policy.max_slot_ms, 1, 60_000),
            ("policy.max_idle_wait_ms", self.policy.max_idle_wait_ms, 0, 60_000),
            ("policy.sync_timeout_ms", self.policy.sync_timeout_ms, 50, 600_000),
            ("policy.guard_mib", self.policy.guard_mib as u64, 1, 4096),
            ("policy.arena_mib", self.policy.arena_mib as u64, 16, 65_536),
            ("policy.rejoin_mib_per_s", self.policy.rejoin_mib_per_s, 0, 1 << 20),
        ];
        for (field, value, least, most) in ranges {
            if !(least..=most).contains(&value) {
                return Err(invalid(&self.path, field, format!("is {value}; allowed are {least} to {most}")));
            }
        }
        // Messages have up to 1 MiB, and the pauses between them must not look like a failure.
        let slowest = 2000 / self.policy.sync_timeout_ms + 1;
        if (1..slowest).contains(&self.policy.rejoin_mib_per_s) {
            let message = format!(
                "is {}; with sync_timeout_ms = {} allowed are 0 (no limit) and {slowest} or more",
                self.policy.rejoin_mib_per_s, self.policy.sync_timeout_ms
            );
            return Err(invalid(&self.path, "policy.rejoin_mib_per_s", message));
        }
        Ok(())
    }

    /// The MAC address as bytes.
    ///
    /// # Errors
    /// When the text is not six hexadecimal bytes of a unicast address.
    pub fn mac_bytes(&self) -> Result<[u8; 6], ConfigError> {
        parse_mac(&self.mac).filter(|mac| mac[0] & 1 == 0).ok_or_else(|| {
            let message = format!("{:?} is no unicast MAC address; write it like 52:54:00:12:34:56", self.mac);
            invalid(&self.path, "mac", message)
        })
    }

    /// The position of a node in the group.
    pub fn replica_named(&self, node: &str) -> Option<usize> {
        self.replicas.iter().position(|replica| replica.node == node)
    }
}
