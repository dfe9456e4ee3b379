//! `node.toml`: what is true of this host, whatever VMs it protects.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use dataplane::fabric::{FabricKey, Security};
use serde::Deserialize;
use storage_log::LegSpec;

#[cfg(feature = "dpdk")]
use super::UplinkKind;
use super::{ConfigError, VmConfig, invalid, read_toml};

/// Where the key is looked for, and where `plover keygen` writes it.
pub const DEFAULT_FABRIC_KEY: &str = "/etc/plover/fabric.key";

/// Cores that a thread can be pinned to (`cpu_set_t`); beyond that, pinning ends the process.
const MAX_CORES: usize = 1024;
/// Hash workers of one VM unless the file says so: more than memory can feed.
const DEFAULT_HASH_WORKERS: usize = 16;
/// Hash workers of one VM that the file may ask for.
const MAX_HASH_WORKERS: usize = 256;

/// How the threads on the packet path are scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Scheduling {
    /// SCHED_RR at a low real-time priority: a busy vCPU cannot delay a heartbeat.
    #[default]
    Realtime,
    /// The kernel's default class.
    Normal,
}

/// What a reactor does while nothing happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Idle {
    /// Spin where the reactor has a core to itself and the machine has cores to spare, else adaptive.
    #[default]
    Auto,
    /// Never sleep, never ask for notifications.
    Spin,
    /// Poll for `spin_us` after the last work, then sleep until notified.
    Adaptive,
}

/// On which pages held and ordered frames lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
pub enum HugePages {
    /// 2 MiB pages if the host has enough of them.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// 2 MiB pages; a warning if there are not enough.
    #[serde(rename = "2M")]
    Size2M,
    /// 1 GiB pages; a warning if there are not enough.
    #[serde(rename = "1G")]
    Size1G,
    /// Normal pages.
    #[serde(rename = "off")]
    Off,
}

/// This host.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// The node's name; unique, and the one that the VMs' `replicas` use.
    pub name: String,
    /// Where the other nodes reach this one.
    pub listen: SocketAddr,
    /// The key that all nodes share; relative to this file.
    #[serde(default = "default_fabric_key")]
    pub fabric_key: PathBuf,
    /// No key: traffic between the nodes is neither encrypted nor authenticated. Alike on all nodes.
    #[serde(default)]
    pub insecure: bool,
    /// Folder of the VM files; relative to this file.
    #[serde(default = "default_vms_dir")]
    pub vms_dir: PathBuf,
    /// Sockets and other short-lived files (a tmpfs).
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// The durable logs, one folder per VM. The one place whose loss matters.
    #[serde(default = "default_data_dir")]
    pub data_dir: PathBuf,
    /// The library that `plover launch` preloads into QEMU; found beside the executable when absent.
    #[serde(default)]
    pub agent_library: Option<PathBuf>,
    /// The QEMU that `plover launch` starts.
    #[serde(default = "default_qemu")]
    pub qemu: PathBuf,
    /// Cores for the reactor threads, one group each in turn; empty: the kernel chooses.
    #[serde(default)]
    pub reactor_cores: Vec<usize>,
    /// What a reactor does while nothing happens.
    #[serde(default)]
    pub idle: Idle,
    /// How long a reactor that sleeps polls after the last work; absent: chosen by the number of cores.
    #[serde(default)]
    pub spin_us: Option<u64>,
    /// On which pages held and ordered frames lie.
    #[serde(default)]
    pub hugepages: HugePages,
    /// The NUMA node whose memory these are; absent: that of the reactor's core.
    #[serde(default)]
    pub numa_node: Option<u32>,
    /// Threads that hash pages and scan page tables beside the one that coordinates; absent: one per entry of `hash_cores`, or one
    /// per core but two.
    #[serde(default)]
    pub hash_workers: Option<usize>,
    /// Cores for these threads, one each in turn; empty: the kernel chooses.
    #[serde(default)]
    pub hash_cores: Vec<usize>,
    /// Scheduling class of the packet path.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// More folders like `data_dir`, on other disks: every log is kept in each of them.
    #[serde(default)]
    pub log_mirrors: Vec<PathBuf>,
    /// Raw devices for the log of a VM, instead of `data_dir` and `log_mirrors`; each holds all of it. Paths, or NVMe namespaces
    /// that SPDK drives (`spdk:0000:01:00.0`).
    #[serde(default)]
    pub log_devices: BTreeMap<String, Vec<PathBuf>>,
    /// Largest size of one VM's log on disk.
    #[serde(default = "default_log_max_mib")]
    pub log_max_mib: u64,
    /// The pieces in which a log takes space and gives it back.
    #[serde(default = "default_log_segment_mib")]
    pub log_segment_mib: u64,
    /// Memory that DPDK gets for the packets of all its ports.
    #[serde(default = "default_dpdk_memory_mib")]
    pub dpdk_memory_mib: u64,
    /// More words for DPDK's command line.
    #[serde(default)]
    pub dpdk_arguments: Vec<String>,
    /// Lets the control socket arm crash points; for tests only.
    #[serde(default)]
    pub debug_hooks: bool,
    /// The VM groups, by name; read from `vms_dir`.
    #[serde(skip)]
    pub vms: BTreeMap<String, VmConfig>,
}

fn default_vms_dir() -> PathBuf {
    "vms".into()
}
fn default_fabric_key() -> PathBuf {
    DEFAULT_FABRIC_KEY.into()
}
fn default_run_dir() -> PathBuf {
    "/run/plover".into()
}
fn default_data_dir() -> PathBuf {
    "/var/lib/plover".into()
}
fn default_qemu() -> PathBuf {
    "qemu-system-x86_64".into()
}
fn default_log_max_mib() -> u64 {
    4096
}
fn default_dpdk_memory_mib() -> u64 {
    64
}
fn default_log_segment_mib() -> u64 {
    32
}

impl NodeConfig {
    /// Reads `path` and every `*.toml` in its `vms_dir`.
    ///
    /// # Errors
    /// A [`ConfigError`] that names file, line and field.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut node: NodeConfig = read_toml(path)?;
        if node.name.is_empty() || node.name.len() > 64 {
            return Err(invalid(path, "name", "must have 1 to 64 bytes"));
        }
        if let Some(spin_us) = node.spin_us.filter(|us| *us > 1_000_000) {
            return Err(invalid(path, "spin_us", format!("is {spin_us}; allowed are 0 to 1000000")));
        }
        for (field, cores) in [("reactor_cores", &node.reactor_cores), ("hash_cores", &node.hash_cores)] {
            if let Some(core) = cores.iter().find(|core| **core >= MAX_CORES) {
                return Err(invalid(path, field, format!("names core {core}; the last possible is {}", MAX_CORES - 1)));
            }
        }
        node.check_hashing(path)?;
        node.check_log(path)?;
        let base = path.parent().unwrap_or(Path::new("."));
        node.fabric_key = base.join(&node.fabric_key);
        let vms_dir = base.join(&node.vms_dir);
        node.vms = load_vms(&vms_dir, &node.name)?;
        node.check_shared_resources(path)?;
        Ok(node)
    }

    fn check_hashing(&self, path: &Path) -> Result<(), ConfigError> {
        for (field, count) in [("hash_workers", self.hash_workers.unwrap_or(0)), ("hash_cores", self.hash_cores.len())]
        {
            if count > MAX_HASH_WORKERS {
                return Err(invalid(path, field, format!("asks for {count} threads; allowed are {MAX_HASH_WORKERS}")));
            }
        }
        if let Some(core) = self.hash_cores.iter().find(|core| self.reactor_cores.contains(core)) {
            let message = format!("names core {core}, which is in reactor_cores: hashing would hold up the packets");
            return Err(invalid(path, "hash_cores", message));
        }
        Ok(())
    }

    fn check_log(&self, path: &Path) -> Result<(), ConfigError> {
        let segment = self.log_segment_mib;
        if !(1..=1024).contains(&segment) {
            return Err(invalid(path, "log_segment_mib", format!("is {segment}; allowed are 1 to 1024")));
        }
        if !(16..=1 << 20).contains(&self.dpdk_memory_mib) {
            let message = format!("is {}; allowed are 16 to {}", self.dpdk_memory_mib, 1 << 20);
            return Err(invalid(path, "dpdk_memory_mib", message));
        }
        let least = 4 * segment;
        if !(least..=1 << 30).contains(&self.log_max_mib) {
            let message = format!("is {}; allowed are {least} (four segments) to {}", self.log_max_mib, 1 << 30);
            return Err(invalid(path, "log_max_mib", message));
        }
        let most = storage_log::MAX_LEGS;
        let mut places = BTreeMap::new();
        let dirs = std::iter::once(&self.data_dir).chain(&self.log_mirrors).map(|dir| ("log_mirrors", dir));
        let devices = self.log_devices.values().flatten().map(|device| ("log_devices", device));
        for (field, place) in dirs.chain(devices) {
            if places.insert(place, field).is_some() {
                return Err(invalid(path, field, format!("names {} twice; each copy has its own", place.display())));
            }
        }
        let sets = self.log_devices.values().map(|devices| ("log_devices", devices.len()));
        for (field, count) in sets.chain([("log_mirrors", self.log_mirrors.len() + 1)]) {
            if !(1..=most).contains(&count) {
                return Err(invalid(path, field, format!("makes {count} copies of a log; 1 to {most} are possible")));
            }
        }
        Ok(())
    }

    /// What protects the traffic between the nodes; reads the key.
    ///
    /// # Errors
    /// The key is missing or others can read it, with the remedy.
    pub fn security(&self) -> Result<Security, ConfigError> {
        if self.insecure {
            return Ok(Security::Insecure);
        }
        Ok(Security::Encrypted(FabricKey::load(&self.fabric_key)?))
    }

    /// How DPDK is started for the VMs of this node.
    #[cfg(feature = "dpdk")]
    pub fn dpdk_options(&self) -> dataplane::uplink::dpdk::EalOptions {
        let ports = self.vms.values().filter_map(|vm| match &vm.uplink.kind {
            UplinkKind::Dpdk { port } => port.split(',').next(),
            _ => None,
        });
        // Other devices have no colon in their names.
        let pci = ports.filter(|device| device.contains(':')).map(Into::into).collect();
        dataplane::uplink::dpdk::EalOptions {
            memory_mib: self.dpdk_memory_mib,
            pci,
            arguments: self.dpdk_arguments.clone(),
        }
    }

    /// Where the log of `vm` is kept: one place per copy.
    pub fn log_legs(&self, vm: &str) -> Vec<LegSpec> {
        match self.log_devices.get(vm) {
            Some(devices) => devices.iter().map(|device| LegSpec::device(device.clone())).collect(),
            None => {
                let dirs = std::iter::once(&self.data_dir).chain(&self.log_mirrors);
                dirs.map(|dir| LegSpec::Dir(dir.join(vm))).collect()
            }
        }
    }

    /// How logs are laid out.
    pub fn log_options(&self) -> storage_log::Options {
        storage_log::Options {
            segment_bytes: self.log_segment_mib << 20,
            max_bytes: self.log_max_mib << 20,
            ..Default::default()
        }
    }

    /// Two VMs of one node must not claim the same port; devices belong to a VM that exists.
    fn check_shared_resources(&self, path: &Path) -> Result<(), ConfigError> {
        if let Some(vm) = self.log_devices.keys().find(|vm| !self.vms.contains_key(*vm)) {
            return Err(invalid(path, "log_devices", format!("names a VM {vm:?}, and there is none of that name")));
        }
        let mut claimed = BTreeMap::new();
        for vm in self.vms.values() {
            let Some((field, name)) = vm.uplink.exclusive() else { continue };
            if let Some(other) = claimed.insert(name, &vm.name) {
                let message = format!("VMs {other} and {} both name {name:?}; give each VM one of its own", vm.name);
                return Err(invalid(path, field, message));
            }
        }
        Ok(())
    }

    /// Where the sockets of `vm` are.
    pub fn vm_run_dir(&self, vm: &str) -> PathBuf {
        self.run_dir.join(vm)
    }

    /// The socket on which the command line reaches the daemon.
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir.join("control.sock")
    }

    /// Hash workers to start, and the core of each: as many as configured, or one per core that is given to them, or all cores but
    /// the guest's and the reactor's. With none the coordinating thread does all.
    pub fn hash_thread_cores(&self) -> Vec<Option<usize>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let spare = cores.saturating_sub(2).min(DEFAULT_HASH_WORKERS);
        let count = self.hash_workers.unwrap_or(if self.hash_cores.is_empty() { spare } else { self.hash_cores.len() });
        let core_of = |at: usize| self.hash_cores.get(at % self.hash_cores.len().max(1)).copied();
        (0..count).map(core_of).collect()
    }
}

/// Reads the VM files of a folder.
fn load_vms(dir: &Path, node: &str) -> Result<BTreeMap<String, VmConfig>, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: dir.to_owned(), source };
    let mut vms = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let vm = VmConfig::load(&path)?;
        if vm.replica_named(node).is_none() {
            return Err(invalid(
                &path,
                "replicas",
                format!("none has node = {node:?}, this node's name; name it there or remove the file from this node"),
            ));
        }
        vms.insert(vm.name.clone(), vm);
    }
    if vms.is_empty() {
        return Err(invalid(dir, "vms_dir", "holds no VM file; write NAME.toml there"));
    }
    Ok(vms)
}
