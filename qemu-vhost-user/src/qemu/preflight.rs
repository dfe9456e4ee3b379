//! Can this QEMU be protected? Looks at everything that would go wrong later, and refuses with the remedy.
//!
//! Facts are gathered first and judged by a function of their own, which the tests can feed. The last check is the
//! whole chain itself: a VM that has not run yet saves its device state and loads it again, which finds devices that
//! cannot do that. A VM that ran already, or was given another's state, is not put to that risk.

mod devices;

use std::path::{Path, PathBuf};

use super::agent::{AgentClient, AgentError};
use super::device_set::DeviceSet;
use super::fingerprint::Fingerprint;
use super::qmp::{BlockDevice, BlockNode, Qmp, QmpError, Version};
use super::ram::{self, RamBlock, RamError, RamInfo};
use super::state_file::{StateFile, StateFileError};

/// The oldest QEMU that works: older ones crash with vhost-user-net and MSI-X under TCG.
pub const OLDEST_QEMU: (u32, u32) = (10, 0);
/// The one machine family whose device state can be loaded more than once.
const MACHINE_FAMILY: &str = "pc-i440fx-";
/// First bytes of a device state: QEMU_VM_FILE_MAGIC and QEMU_VM_FILE_VERSION of QEMU's migration/savevm.h.
const STREAM_START: [u8; 8] = *b"QEVM\x00\x00\x00\x03";
/// Bit of CAP_SYS_PTRACE in CapEff.
const CAP_SYS_PTRACE: u32 = 19;

/// Why this QEMU cannot be protected.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// QEMU is too old.
    #[error("QEMU {0} is too old: plover needs 10.0 or newer (Debian 12: qemu-system-x86 from bookworm-backports)")]
    QemuTooOld(Version),
    /// q35 and others.
    #[error(
        "machine type «{0}» cannot be protected yet: QEMU aborts when its device state is loaded twice; start QEMU with -machine pc"
    )]
    Machine(String),
    /// RAM is missing, private or not to be found.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Guest-writable memory that syncvm would not carry over.
    #[error("the guest can write memory outside of the memory backend ({}): {}", blocks.join(", "), block_remedy(blocks))]
    WritableBlocks {
        /// Names of the RAM blocks.
        blocks: Vec<String>,
    },
    /// Loads would fail.
    #[error("the device state has a trailing description that a load refuses: add suppress-vmdesc=on to -machine")]
    VmDescription,
    /// Loads would fail.
    #[error(
        "the device state would lack a configuration section: start QEMU with -global migration.send-configuration=off"
    )]
    SendConfiguration,
    /// Nobody answers on the agent's socket.
    #[error(
        "there is no agent in QEMU: start it with LD_PRELOAD=libplover_agent.so and PLOVER_AGENT_SOCKET=PATH (`plover launch` does, `plover qemu-args` prints both)"
    )]
    AgentMissing,
    /// The agent sits in another process than the monitor.
    #[error(
        "the agent is in process {agent_pid}, the monitor in process {qmp_pid}: two VMs share a socket path; give each VM its own PLOVER_AGENT_SOCKET"
    )]
    AgentElsewhere {
        /// Process of the agent.
        agent_pid: i32,
        /// Process of the monitor.
        qmp_pid: i32,
    },
    /// The agent failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// QEMU has no commands to save or load device state.
    #[error("this QEMU lacks the monitor commands {}: install a build that has them (Debian's and Fedora's do)", .0.join(", "))]
    MissingCommands(Vec<&'static str>),
    /// The guest would announce itself after each syncvm.
    #[error(
        "a network device would announce itself after every syncvm: add guest_announce=off to its -device virtio-net-pci"
    )]
    GuestAnnounce,
    /// Each replica would write a disk of its own.
    #[error(
        "the guest can write to {}: each replica would write its own copy, and no syncvm makes the copies equal; start QEMU without it (the guest runs from its initramfs or from network storage), or attach it with readonly=on and the same content on all nodes",
        .0.join(", ")
    )]
    WritableDisks(Vec<String>),
    /// Reads of a disk would change memory unseen.
    #[error(
        "the guest reads {} past the host's page cache, which writes its memory unseen: attach it with cache.direct=off (cache=writeback) and aio=threads",
        .0.join(", ")
    )]
    DirectDisks(Vec<String>),
    /// A device that cannot be followed.
    #[error("the guest has a device {device}: {why}; remove its -device")]
    Device {
        /// Its type.
        device: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A network card that is not ours.
    #[error(
        "the network card {card} (on a backend «{kind}») would be served past plover, its frames neither ordered nor held: give the VM one network card, on plover's vhost-user socket"
    )]
    Network {
        /// Its name.
        card: String,
        /// The type of its -netdev.
        kind: String,
    },
    /// This process may not look into QEMU.
    #[error(
        "plover runs without CAP_SYS_PTRACE and cannot follow the guest's memory: run it as root or give it CAP_SYS_PTRACE and CAP_NET_ADMIN"
    )]
    Privileges,
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The device state file failed.
    #[error(transparent)]
    StateFile(#[from] StateFileError),
    /// A file of /proc could not be read.
    #[error("cannot read {}: {source}; run plover as root", path.display())]
    Proc {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The trial gave something else than a device state.
    #[error(
        "xen-save-devices-state wrote something else than a device state (starts with {0:02x?}): is this stock QEMU?"
    )]
    TrialStream(Vec<u8>),
    /// The trial load failed.
    #[error(
        "a trial load of the device state failed ({0}): remove the device that QEMU's standard error names, and start QEMU with -global migration.send-configuration=off -machine …,suppress-vmdesc=on"
    )]
    TrialLoad(QmpError),
}

fn block_remedy(blocks: &[String]) -> &'static str {
    if blocks.iter().any(|name| name.contains("vga") || name.contains("vram") || name.contains("qxl")) {
        "start QEMU with -nodefaults -vga none and without a display device"
    } else {
        "remove the device that owns it (firmware in flash: use -bios; memory devices: put all RAM in one backend)"
    }
}

/// What is known about a QEMU before it is judged.
#[derive(Clone, Debug)]
struct Facts {
    version: Version,
    machine: String,
    missing_commands: Vec<&'static str>,
    suppress_vmdesc: bool,
    /// `None` if QEMU's arguments do not say.
    send_configuration: Option<bool>,
    rtc_clock_vm: bool,
    blocks: Vec<RamBlock>,
    backend: String,
    qtree: String,
    disks: Vec<BlockDevice>,
    block_nodes: Vec<BlockNode>,
    networks: String,
}

/// A QEMU that can be protected.
#[derive(Debug)]
pub struct Accepted {
    /// To compare with the other replica's.
    pub fingerprint: Fingerprint,
    /// Where its RAM is.
    pub ram: RamInfo,
    /// The VM is as QEMU started it: it may be booted.
    pub fresh: bool,
}

/// Checks the QEMU behind `qmp` and the agent in it. `agent` is `None` if nobody answered on its socket; `replica` names this
/// replica in messages; `run_directory` is where a trial's device state may lie for a moment.
///
/// A VM that is as QEMU started it (`-S`) also saves and loads its device state once. It is left as it was found.
///
/// # Errors
/// A [`Refusal`], each with its remedy.
pub fn check(
    qmp: &mut Qmp,
    agent: Option<&mut AgentClient>,
    replica: &str,
    run_directory: &Path,
) -> Result<Accepted, Refusal> {
    // The order matters: what makes later checks meaningless or dangerous comes first.
    check_version(qmp.version())?;
    check_privileges(&read_proc(Path::new("/proc/self/status"))?)?;
    check_machine(&qmp.machine_type()?)?;
    let agent = agent.ok_or(Refusal::AgentMissing)?;
    check_agent(qmp, agent)?;
    let ram = ram::locate(qmp)?;
    let facts = gather(qmp, &ram)?;
    judge(&facts)?;
    let fresh = qmp.is_fresh()?;
    if fresh {
        try_state_round_trip(qmp, agent, replica, run_directory)?;
    }
    let fingerprint = fingerprint(qmp, &facts, &ram, replica)?;
    Ok(Accepted { fingerprint, ram, fresh })
}

fn check_version(version: &Version) -> Result<(), Refusal> {
    if (version.major, version.minor) < OLDEST_QEMU {
        return Err(Refusal::QemuTooOld(version.clone()));
    }
    Ok(())
}

fn check_machine(machine: &str) -> Result<(), Refusal> {
    if machine.starts_with(MACHINE_FAMILY) { Ok(()) } else { Err(Refusal::Machine(machine.to_owned())) }
}

/// `status` is the text of /proc/self/status.
fn check_privileges(status: &str) -> Result<(), Refusal> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|value| u64::from_str_radix(value.trim(), 16).ok())
        .unwrap_or(0);
    if effective & (1 << CAP_SYS_PTRACE) == 0 { Err(Refusal::Privileges) } else { Ok(()) }
}

fn check_agent(qmp: &Qmp, agent: &mut AgentClient) -> Result<(), Refusal> {
    let (agent_pid, qmp_pid) = (agent.peer_pid()?, qmp.peer_pid()?);
    if agent_pid != qmp_pid {
        return Err(Refusal::AgentElsewhere { agent_pid, qmp_pid });
    }
    if !agent.hello()?.has_yank {
        return Err(AgentError::NoYank.into());
    }
    Ok(())
}

fn read_proc(path: &Path) -> Result<String, Refusal> {
    let bytes = std::fs::read(path).map_err(|source| Refusal::Proc { path: path.to_owned(), source })?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn gather(qmp: &mut Qmp, ram: &RamInfo) -> Result<Facts, Refusal> {
    let command_line = read_proc(&PathBuf::from(format!("/proc/{}/cmdline", ram.qemu_pid)))?;
    let arguments: Vec<&str> = command_line.split('\0').collect();
    Ok(Facts {
        version: qmp.version().clone(),
        machine: qmp.machine_type()?,
        missing_commands: qmp.missing_commands()?,
        suppress_vmdesc: qmp.qom_get("/machine", "suppress-vmdesc")?,
        send_configuration: send_configuration(&arguments),
        rtc_clock_vm: values_of(&arguments, "rtc").any(|value| value.split(',').any(|part| part == "clock=vm")),
        blocks: ram::parse_ramblocks(&qmp.hmp("info ramblock")?),
        backend: ram.backend.clone(),
        qtree: qmp.hmp("info qtree")?,
        disks: qmp.query_block()?,
        block_nodes: qmp.query_block_nodes()?,
        networks: qmp.hmp("info network")?,
    })
}

/// The values of an option, which QEMU accepts with one or two dashes.
fn values_of<'a>(arguments: &'a [&'a str], option: &'a str) -> impl Iterator<Item = &'a str> {
    arguments.windows(2).filter_map(move |pair| {
        let name = pair[0].strip_prefix('-')?;
        (name.strip_prefix('-').unwrap_or(name) == option).then_some(pair[1])
    })
}

/// The last `-global migration.send-configuration=…` counts. The migration object has no place in QEMU's object tree,
/// so the monitor cannot be asked.
fn send_configuration(arguments: &[&str]) -> Option<bool> {
    values_of(arguments, "global")
        .filter_map(|value| {
            let short = value.strip_prefix("migration.send-configuration=");
            let long = || value.strip_prefix("driver=migration,property=send-configuration,value=");
            short.or_else(long)
        })
        .last()
        .map(|value| !matches!(value, "off" | "false" | "no" | "n"))
}

fn judge(facts: &Facts) -> Result<(), Refusal> {
    check_version(&facts.version)?;
    check_machine(&facts.machine)?;
    if !facts.missing_commands.is_empty() {
        return Err(Refusal::MissingCommands(facts.missing_commands.clone()));
    }
    let backend_names = [facts.backend.clone(), format!("/objects/{}", facts.backend)];
    let blocks: Vec<String> = facts
        .blocks
        .iter()
        .filter(|block| !block.read_only && !backend_names.contains(&block.name))
        .map(|block| block.name.clone())
        .collect();
    if !blocks.is_empty() {
        return Err(Refusal::WritableBlocks { blocks });
    }
    if !facts.suppress_vmdesc {
        return Err(Refusal::VmDescription);
    }
    // Without a word on the command line the default holds, which is on. (A -readconfig file could say otherwise; the
    // remedy is the same.)
    if facts.send_configuration.unwrap_or(true) {
        return Err(Refusal::SendConfiguration);
    }
    if facts.qtree.lines().any(|line| line.trim() == "guest_announce = true") {
        return Err(Refusal::GuestAnnounce);
    }
    devices::check_disks(&facts.disks, &facts.block_nodes)?;
    devices::check_devices(&facts.qtree)?;
    devices::check_networks(&facts.networks)
}

/// Saves the state of a VM that never ran and loads it again: for the VM nothing changes, and what cannot be loaded
/// shows now and not at the first syncvm.
fn try_state_round_trip(
    qmp: &mut Qmp,
    agent: &mut AgentClient,
    replica: &str,
    run_directory: &Path,
) -> Result<(), Refusal> {
    let file = StateFile::create(run_directory, &format!("preflight-{replica}"))?;
    qmp.save_devices_state(file.path())?;
    let mut state = Vec::new();
    file.read_into(&mut state)?;
    check_stream(&state)?;
    agent.register_yank()?;
    match qmp.load_devices_state(file.path()) {
        Err(error) if error.is_command_error() => Err(Refusal::TrialLoad(error)),
        other => Ok(other?),
    }
}

fn check_stream(state: &[u8]) -> Result<(), Refusal> {
    if state.starts_with(&STREAM_START) {
        return Ok(());
    }
    Err(Refusal::TrialStream(state.iter().take(STREAM_START.len()).copied().collect()))
}

fn fingerprint(qmp: &mut Qmp, facts: &Facts, ram: &RamInfo, replica: &str) -> Result<Fingerprint, Refusal> {
    let cpus = qmp.query_cpus()?;
    let mut further = Vec::new();
    for cpu in &cpus {
        let model: String = qmp.qom_get(&cpu.qom_path, "type")?;
        let features: serde_json::Value = qmp.qom_get(&cpu.qom_path, "feature-words")?;
        further.push(format!("cpu {}: {model}", cpu.index));
        further.extend(feature_lines(cpu.index, &features));
    }
    // Kernel and initrd are files of the host; the command line is the part that users get wrong.
    let append: String = qmp.qom_get("/machine", "append")?;
    if !append.is_empty() {
        further.push(format!("kernel command line: {append}"));
    }
    further.extend(devices::disk_lines(&facts.disks));
    let mut warnings = Vec::new();
    if !facts.rtc_clock_vm {
        warnings.push(
            "the guests' real-time clocks follow their hosts and so differ: add -rtc clock=vm for fewer divergent pages"
                .to_owned(),
        );
    }
    Ok(Fingerprint {
        replica: replica.to_owned(),
        qemu_version: facts.version.clone(),
        machine: facts.machine.clone(),
        ram_bytes: ram.length_bytes,
        vcpus: u32::try_from(cpus.len()).unwrap_or(u32::MAX),
        accelerator: if qmp.uses_kvm()? { "kvm" } else { "tcg" }.to_owned(),
        devices: DeviceSet::from_qtree(&further, &facts.qtree),
        warnings,
    })
}

/// One line per CPUID register that is not 0, in a fixed order: QEMU lists them in whatever order it has them.
fn feature_lines(cpu: u32, features: &serde_json::Value) -> Vec<String> {
    let mut lines: Vec<String> = features
        .as_array()
        .into_iter()
        .flatten()
        .filter(|word| word["features"].as_u64().is_some_and(|bits| bits != 0))
        .map(|word| {
            let subleaf = word["cpuid-input-ecx"].as_u64().map_or(String::new(), |ecx| format!(".{ecx:x}"));
            format!(
                "cpu {cpu}: cpuid {:x}{subleaf} {} = {:#010x}",
                word["cpuid-input-eax"].as_u64().unwrap_or(0),
                word["cpuid-register"].as_str().unwrap_or("?"),
                word["features"].as_u64().unwrap_or(0)
            )
        })
        .collect();
    lines.sort();
    lines
}

#[cfg(test)]
mod tests;
