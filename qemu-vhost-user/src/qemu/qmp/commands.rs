//! The monitor commands that Plover uses, typed. None of them is assumed to exist: see [`Qmp::missing_commands`].

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Qmp, QmpError};

/// The VM's run state, as far as Plover tells states apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// The CPUs run.
    Running,
    /// Started with `-S` and not run yet.
    Prelaunch,
    /// Stopped by `stop`.
    Paused,
    /// Shut down with `-no-shutdown`.
    Shutdown,
    /// The guest reported its own crash.
    GuestPanicked,
    /// Another state, by QEMU's name.
    Other(String),
}

/// A vCPU and its thread.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct CpuThread {
    /// Number of the vCPU.
    #[serde(rename = "cpu-index")]
    pub index: u32,
    /// Its thread's id as QEMU sees it.
    #[serde(rename = "thread-id")]
    pub thread_id: i32,
    /// Its object, for `qom-get`.
    #[serde(rename = "qom-path")]
    pub qom_path: String,
}

/// A memory backend.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MemoryBackend {
    /// Its id (`-object …,id=ID`); absent for one that QEMU made itself.
    pub id: Option<String>,
    /// Its size.
    #[serde(rename = "size")]
    pub size_bytes: u64,
    /// Whether another process can map it.
    #[serde(default)]
    pub share: bool,
}

/// A drive of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct BlockDevice {
    /// The id of its `-drive`; empty for a `-blockdev`.
    pub device: String,
    /// The device that has it: its id, or its place in the object tree.
    pub qdev: Option<String>,
    /// What is in it; absent for an empty drive.
    pub inserted: Option<BlockNode>,
}

/// A node of QEMU's block layer.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct BlockNode {
    /// Whether nobody can write through it.
    #[serde(rename = "ro")]
    pub read_only: bool,
    /// Its driver: a format, a protocol or a filter.
    #[serde(rename = "drv")]
    pub driver: String,
    /// What it is of.
    pub file: String,
    /// How it is cached.
    pub cache: BlockCache,
    /// Its contents.
    pub image: BlockImage,
}

/// How a node of the block layer is cached.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct BlockCache {
    /// The host's page cache is not used (O_DIRECT).
    pub direct: bool,
}

/// What a node of the block layer contains.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct BlockImage {
    /// How much of it the guest sees.
    #[serde(rename = "virtual-size")]
    pub virtual_size_bytes: u64,
}

/// Id of the object that says that a VM is not as QEMU started it.
const USED_MARK: &str = "plover-used";
/// Id of the object that says that the VM follows another's execution.
const FOLLOWS_MARK: &str = "plover-follows";

/// The commands that Plover cannot do without.
pub const NEEDED_COMMANDS: [&str; 12] = [
    "stop",
    "cont",
    "query-status",
    "query-memdev",
    "query-block",
    "query-named-block-nodes",
    "qom-get",
    "qom-list",
    "object-add",
    "human-monitor-command",
    "xen-save-devices-state",
    "xen-load-devices-state",
];

impl Qmp {
    /// Stops the guest's CPUs and flushes its devices; back when done.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn stop(&mut self) -> Result<(), QmpError> {
        self.execute("stop", Value::Null).map(drop)
    }

    /// Lets the guest's CPUs run.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn cont(&mut self) -> Result<(), QmpError> {
        self.execute("cont", Value::Null).map(drop)
    }

    /// Resets the stopped VM's devices, as its reset button would, and waits until that is done. The VM stays stopped.
    /// `reboot_is_shutdown`: QEMU runs with `-no-reboot`, which would make it end instead; that is lifted meanwhile.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; [`QmpError::Timeout`] if the reset does not come.
    pub fn reset(&mut self, reboot_is_shutdown: bool) -> Result<(), QmpError> {
        if reboot_is_shutdown {
            self.execute("set-action", json!({"reboot": "reset"}))?;
        }
        let done = self.execute("system_reset", Value::Null).and_then(|_| self.await_reset());
        if reboot_is_shutdown {
            self.execute("set-action", json!({"reboot": "shutdown"}))?;
        }
        done
    }

    /// Ends QEMU. That the connection closes instead of an answer is a success.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn quit(&mut self) -> Result<(), QmpError> {
        match self.execute("quit", Value::Null) {
            Err(error) if !error.is_disconnected() => Err(error),
            _ => Ok(()),
        }
    }

    /// The VM's run state.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn query_status(&mut self) -> Result<RunState, QmpError> {
        #[derive(Deserialize)]
        struct Status {
            status: String,
        }
        let status: Status = self.ask("query-status", Value::Null)?;
        Ok(match status.status.as_str() {
            "running" => RunState::Running,
            "prelaunch" => RunState::Prelaunch,
            "paused" => RunState::Paused,
            "shutdown" => RunState::Shutdown,
            "guest-panicked" => RunState::GuestPanicked,
            _ => RunState::Other(status.status),
        })
    }

    /// Whether the VM is as QEMU started it: it has never run, and nobody has given it another's state. Its run state does
    /// not say that: a load leaves it as it is, and a reset puts it back to [`RunState::Prelaunch`].
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn is_fresh(&mut self) -> Result<bool, QmpError> {
        Ok(self.query_status()? == RunState::Prelaunch && !self.is_marked(USED_MARK)?)
    }

    /// Notes in QEMU itself, for as long as its process lives, that the VM is no longer [fresh](Qmp::is_fresh): whoever
    /// attaches next must know, and remembers nothing. To be called before the first byte of its memory is changed.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn mark_used(&mut self) -> Result<(), QmpError> {
        self.set_mark(USED_MARK, true)
    }

    /// Notes in QEMU itself whether the VM follows another's execution, so that it may be in the middle of being given another's
    /// state at any moment.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn mark_following(&mut self, follows: bool) -> Result<(), QmpError> {
        self.set_mark(FOLLOWS_MARK, follows)
    }

    /// Whether [`Qmp::mark_following`] noted that, perhaps for another process.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn is_following(&mut self) -> Result<bool, QmpError> {
        self.is_marked(FOLLOWS_MARK)
    }

    fn set_mark(&mut self, name: &str, set: bool) -> Result<(), QmpError> {
        if self.is_marked(name)? == set {
            return Ok(());
        }
        if !set {
            return self.execute("object-del", json!({"id": name})).map(drop);
        }
        // Any object would do; this type is in every build and does nothing.
        let mark = json!({"qom-type": "secret", "id": name, "data": "set"});
        self.execute("object-add", mark).map(drop)
    }

    fn is_marked(&mut self, name: &str) -> Result<bool, QmpError> {
        #[derive(Deserialize)]
        struct Object {
            name: String,
        }
        let objects: Vec<Object> = self.ask("qom-list", json!({"path": "/objects"}))?;
        Ok(objects.iter().any(|object| object.name == name))
    }

    /// Writes the state of all devices and CPUs, everything but RAM, to a file that QEMU creates or truncates. The
    /// guest should be stopped, otherwise QEMU stops it for the time of writing.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn save_devices_state(&mut self, path: &Path) -> Result<(), QmpError> {
        // live=false: with true QEMU hands its disks over to somebody else.
        let arguments = json!({"filename": path_text(path), "live": false});
        self.execute("xen-save-devices-state", arguments).map(drop)
    }

    /// Loads what [`Qmp::save_devices_state`] of an equal VM wrote. The guest must be stopped and its RAM be in
    /// place.
    ///
    /// The agent must have registered the migration yank instance **before each call**
    /// ([`crate::qemu::agent::AgentClient::register_yank`]), or QEMU aborts.
    ///
    /// # Errors
    /// As [`Qmp::execute`]. After [`QmpError::Command`] the devices are in an undefined state: do not run the guest
    /// before another load succeeded.
    pub fn load_devices_state(&mut self, path: &Path) -> Result<(), QmpError> {
        self.execute("xen-load-devices-state", json!({"filename": path_text(path)})).map(drop)
    }

    /// Runs a command of the human monitor and returns its text.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn hmp(&mut self, command: &str) -> Result<String, QmpError> {
        self.ask("human-monitor-command", json!({"command-line": command}))
    }

    /// The names of all commands that this QEMU has.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn query_commands(&mut self) -> Result<BTreeSet<String>, QmpError> {
        #[derive(Deserialize)]
        struct Command {
            name: String,
        }
        let commands: Vec<Command> = self.ask("query-commands", Value::Null)?;
        Ok(commands.into_iter().map(|command| command.name).collect())
    }

    /// Those of [`NEEDED_COMMANDS`] that this QEMU lacks.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn missing_commands(&mut self) -> Result<Vec<&'static str>, QmpError> {
        let known = self.query_commands()?;
        Ok(NEEDED_COMMANDS.into_iter().filter(|name| !known.contains(*name)).collect())
    }

    /// Size of the guest's RAM.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn query_memory_size(&mut self) -> Result<u64, QmpError> {
        #[derive(Deserialize)]
        struct Summary {
            #[serde(rename = "base-memory")]
            base: u64,
            #[serde(rename = "plugged-memory", default)]
            plugged: u64,
        }
        let summary: Summary = self.ask("query-memory-size-summary", Value::Null)?;
        Ok(summary.base.saturating_add(summary.plugged))
    }

    /// All memory backends.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn query_memory_backends(&mut self) -> Result<Vec<MemoryBackend>, QmpError> {
        self.ask("query-memdev", Value::Null)
    }

    /// The guest's drives.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn query_block(&mut self) -> Result<Vec<BlockDevice>, QmpError> {
        self.ask("query-block", Value::Null)
    }

    /// All nodes of the block layer that have a name, which all have: also those below what a device sees.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn query_block_nodes(&mut self) -> Result<Vec<BlockNode>, QmpError> {
        self.ask("query-named-block-nodes", json!({"flat": true}))
    }

    /// The vCPUs and their threads.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn query_cpus(&mut self) -> Result<Vec<CpuThread>, QmpError> {
        self.ask("query-cpus-fast", Value::Null)
    }

    /// The machine type, without QEMU's suffix: `pc-i440fx-10.0`.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn machine_type(&mut self) -> Result<String, QmpError> {
        let name: String = self.qom_get("/machine", "type")?;
        Ok(name.strip_suffix("-machine").unwrap_or(&name).to_owned())
    }

    /// Whether the guest runs under KVM (and not under TCG).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn uses_kvm(&mut self) -> Result<bool, QmpError> {
        #[derive(Deserialize)]
        struct Kvm {
            enabled: bool,
        }
        self.ask::<Kvm>("query-kvm", Value::Null).map(|kvm| kvm.enabled)
    }

    /// A property of an object.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; [`QmpError::Answer`] if it has another type.
    pub fn qom_get<T: for<'de> Deserialize<'de>>(&mut self, path: &str, property: &str) -> Result<T, QmpError> {
        self.ask("qom-get", json!({"path": path, "property": property}))
    }

    fn ask<T: for<'de> Deserialize<'de>>(&mut self, command: &str, arguments: Value) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments)?;
        T::deserialize(&answer).map_err(|_| QmpError::Answer {
            command: command.to_owned(),
            answer: answer.to_string().chars().take(200).collect(),
        })
    }
}

/// QMP is JSON and so cannot name a file whose path is not UTF-8; [`crate::qemu::state_file`] makes none.
fn path_text(path: &Path) -> std::borrow::Cow<'_, str> {
    path.to_string_lossy()
}
