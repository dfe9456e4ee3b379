//! A protected VM on the three hosts of a test bed: configuration, daemons, QEMUs, and what they say of themselves.
//!
//! Daemons and QEMUs are kept running as systemd keeps them with `Restart=always`. The status is read as the JSON that
//! `plover status --json` prints: the rig tests the product from outside and shares no type with it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::error::Context;
use crate::testbed::GUEST_IP;
use crate::{Artifacts, Deadline, Guest, Host, Process, Result, RigError, Service, Spawn, Testbed, wait_until};

/// The VM's name in all configurations.
pub const VM: &str = "guest";
/// Name of the daemon's process on each host.
pub const DAEMON: &str = "plover";
/// Name of QEMU's process on each host.
pub const QEMU: &str = "qemu";
/// Port of the fabric.
const FABRIC_PORT: u16 = 7400;
/// As systemd's RestartSec for the two units.
const RESTART_DELAY: Duration = Duration::from_millis(300);

/// How a cluster is set up.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// What the guest runs.
    pub service: Service,
    /// Lines for the VM's `[policy]` table.
    pub policy: String,
    /// Lines for each node's file.
    pub node: String,
    /// Where `plover` and its agent were built.
    pub programs: PathBuf,
    /// Cores of each host's QEMU; an empty list: the kernel chooses.
    pub qemu_cores: Vec<Vec<usize>>,
}

impl ClusterOptions {
    /// A guest with the default policy.
    pub fn new(service: Service, programs: PathBuf) -> Self {
        Self { service, policy: String::new(), node: "debug_hooks = true\n".into(), programs, qemu_cores: vec![Vec::new(); 3] }
    }
}

/// The three hosts of a test bed with a protected VM.
pub struct Cluster<'a> {
    bed: &'a Testbed,
    options: ClusterOptions,
}

impl<'a> Cluster<'a> {
    /// Writes the configuration of all hosts. Nothing runs yet.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn new(bed: &'a Testbed, options: ClusterOptions) -> Result<Self> {
        let cluster = Self { bed, options };
        for host in bed.hosts() {
            cluster.write_config(host)?;
        }
        Ok(cluster)
    }

    /// The test bed.
    pub fn bed(&self) -> &'a Testbed {
        self.bed
    }

    /// Where the guest serves.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(GUEST_IP.into(), self.options.service.port())
    }

    /// A host's `node.toml`.
    pub fn config_path(&self, host: &Host) -> PathBuf {
        host.directory().join("node.toml")
    }

    /// Where a host keeps its durable log.
    pub fn data_dir(&self, host: &Host) -> PathBuf {
        host.directory().join("data")
    }

    fn write_config(&self, host: &Host) -> Result<()> {
        let file = |path: PathBuf, text: String| {
            std::fs::write(&path, text).context(|| format!("cannot write {}", path.display()))
        };
        let vms = host.directory().join("vms");
        std::fs::create_dir_all(&vms).context(|| format!("cannot make {}", vms.display()))?;
        let node = format!(
            "name = {:?}\nlisten = \"{}:{FABRIC_PORT}\"\nrun_dir = {:?}\ndata_dir = {:?}\nqemu = {:?}\nhash_workers = 1\n{}",
            host.name(),
            host.ip(),
            host.socket_directory(),
            self.data_dir(host),
            Artifacts::locate()?.qemu,
            self.options.node
        );
        file(self.config_path(host), node)?;
        let replicas: String = self
            .bed
            .hosts()
            .iter()
            .map(|host| format!("    {{ node = {:?}, address = \"{}:{FABRIC_PORT}\" }},\n", host.name(), host.ip()))
            .collect();
        let vm = format!(
            "memory_mib = {}\nmac = \"52:54:00:77:00:32\"\nreplicas = [\n{replicas}]\nuplink = {{ tap = \"plv0\", bridge = {:?} }}\n\n[policy]\n{}",
            Guest::new(self.options.service).memory_mib,
            crate::host::BRIDGE,
            self.options.policy
        );
        file(vms.join(format!("{VM}.toml")), vm)
    }

    /// A `plover` command with this host's configuration.
    pub fn plover(&self, host: &Host, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.options.programs.join("plover"));
        command.arg("--config").arg(self.config_path(host)).args(arguments);
        command
    }

    /// Starts the daemon of one host.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_daemon(&self, host: &Host) -> Result<Process> {
        host.start(Spawn::new(DAEMON, self.plover(host, &["run"])).restart_after(RESTART_DELAY))
    }

    /// Starts the QEMU of one host, prepared and stopped.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_qemu(&self, host: &Host) -> Result<Process> {
        let number = self.bed.hosts().iter().position(|other| other.name() == host.name()).unwrap_or(0);
        let mut command = self.plover(host, &["launch", VM, "--"]);
        command.args(Guest::new(self.options.service).user_args(&self.console(host))?);
        let cores = self.options.qemu_cores.get(number).map_or(&[][..], Vec::as_slice);
        host.start(Spawn::new(QEMU, command).restart_after(RESTART_DELAY).on_cores(cores))
    }

    /// The guest's console on one host.
    pub fn console(&self, host: &Host) -> PathBuf {
        host.directory().join("console.log")
    }

    /// Starts daemon and QEMU everywhere.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn start_all(&self) -> Result<()> {
        for host in self.bed.hosts() {
            self.start_daemon(host)?;
            self.start_qemu(host)?;
        }
        Ok(())
    }

    /// Asks the daemon of one host a question and returns what it printed.
    ///
    /// # Errors
    /// When it refuses or does not answer; the text says why.
    pub fn ask(&self, host: &Host, arguments: &[&str]) -> Result<String> {
        let output = self
            .plover(host, arguments)
            .output()
            .context(|| "cannot run plover".into())?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(RigError::Tool {
                line: format!("plover {}", arguments.join(" ")),
                said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            })
        }
    }

    /// The status of the group on one host; `None` while its daemon does not answer.
    pub fn status(&self, host: &Host) -> Option<Value> {
        let text = self.ask(host, &["status", VM, "--json"]).ok()?;
        let groups: Value = serde_json::from_str(&text).ok()?;
        groups.get(0).cloned()
    }

    /// The host that leads, by its own word, if one does.
    pub fn leader(&self) -> Option<&'a Host> {
        self.bed.hosts().iter().find(|host| self.status(host).is_some_and(|status| status["role"] == "leader"))
    }

    /// Waits until a leader says that the VM is protected; returns that leader.
    ///
    /// # Errors
    /// When the deadline passes, with what each host says.
    pub fn wait_protected(&self, deadline: Deadline) -> Result<&'a Host> {
        let protected = || {
            self.bed.hosts().iter().find(|host| {
                self.status(host).is_some_and(|status| status["role"] == "leader" && status["protected"] == true)
            })
        };
        wait_until(deadline, "a leader that says «protected»", protected).map_err(|error| self.explain(error))
    }

    /// Waits until a leader serves, protected or not; returns it.
    ///
    /// # Errors
    /// When the deadline passes.
    pub fn wait_leader(&self, deadline: Deadline) -> Result<&'a Host> {
        wait_until(deadline, "a leader", || self.leader()).map_err(|error| self.explain(error))
    }

    /// Adds what each host says to an error.
    pub fn explain(&self, error: RigError) -> RigError {
        let mut text = error.to_string();
        for host in self.bed.hosts() {
            let said = self.ask(host, &["status", VM]).unwrap_or_else(|error| error.to_string());
            text.push_str(&format!("\n{}:\n{said}", host.name()));
        }
        RigError::Explained(text)
    }
}
