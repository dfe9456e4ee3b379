//! A protected VM on the three hosts of a test bed: configuration, daemons, QEMUs, and what they say of themselves.
//!
//! Daemons and QEMUs are kept running as systemd keeps them with `Restart=always`. The status is read as the JSON that
//! `plover status --json` prints: the rig tests the product from outside and shares no type with it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::error::Context;
use crate::fault::DataDisk;
use crate::testbed::GUEST_IP;
use crate::tool;
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
/// Longest answer: a planned failover includes a syncvm.
const ANSWER_LIMIT: Duration = Duration::from_secs(45);
/// A daemon that does not say how it is within this time is not well.
const STATUS_LIMIT: Duration = Duration::from_millis(1500);

/// How a cluster is set up.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// What the guest runs.
    pub service: Service,
    /// Lines for the VM's `[policy]` table.
    pub policy: String,
    /// Lines for the VM's file, before its tables.
    pub vm: String,
    /// Lines for each node's file.
    pub node: String,
    /// What carries messages between the replicas: words for each one's `transports`.
    pub transports: &'static [&'static str],
    /// Where `plover` and its agent were built.
    pub programs: PathBuf,
    /// The VM runs on the first host alone, and nothing protects it.
    pub unreplicated: bool,
    /// Cores of each host's QEMU; an empty list: the kernel chooses.
    pub qemu_cores: Vec<Vec<usize>>,
    /// Cores of all daemons; an empty list: the kernel chooses.
    pub daemon_cores: Vec<usize>,
    /// Gives each host a disk of its own of this size for its log, so that it can be filled.
    pub data_disk_mib: Option<u32>,
    /// Where the hosts keep their durable logs, a directory each; `None`: where everything else of a host is.
    pub logs: Option<PathBuf>,
    /// More words for the guest's kernel command line.
    pub append: String,
}

impl ClusterOptions {
    /// A guest with the default policy.
    pub fn new(service: Service, programs: PathBuf) -> Self {
        Self {
            service,
            policy: String::new(),
            vm: String::new(),
            node: "debug_hooks = true\n".into(),
            transports: &[],
            programs,
            unreplicated: false,
            qemu_cores: vec![Vec::new(); 3],
            daemon_cores: Vec::new(),
            data_disk_mib: None,
            logs: None,
            append: String::new(),
        }
    }
}

/// The three hosts of a test bed with a protected VM.
pub struct Cluster<'a> {
    bed: &'a Testbed,
    options: ClusterOptions,
    disks: Vec<DataDisk>,
}

impl<'a> Cluster<'a> {
    /// Writes the configuration of all hosts. Nothing runs yet.
    ///
    /// # Errors
    /// When a file cannot be written or a disk not be mounted.
    pub fn new(bed: &'a Testbed, options: ClusterOptions) -> Result<Self> {
        let disks = match options.data_disk_mib {
            Some(size_mib) => {
                let disks = bed.hosts().iter().map(|host| host.mount_data_disk(size_mib));
                disks.collect::<Result<_>>()?
            }
            None => Vec::new(),
        };
        let cluster = Self { bed, options, disks };
        cluster.share_key()?;
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

    /// The guest, as every replica starts it.
    pub fn guest(&self) -> Guest {
        Guest { append: self.options.append.clone(), ..Guest::new(self.options.service) }
    }

    /// A host's own disk, if [`ClusterOptions::data_disk_mib`] asked for one.
    pub fn data_disk(&self, host: &Host) -> Option<&DataDisk> {
        self.disks.get(self.number(host))
    }

    fn number(&self, host: &Host) -> usize {
        let same = |other: &Host| other.name() == host.name();
        self.bed.hosts().iter().position(same).unwrap_or(0)
    }

    /// A host's `node.toml`.
    pub fn config_path(&self, host: &Host) -> PathBuf {
        host.directory().join("node.toml")
    }

    /// Where a host keeps its durable log.
    pub fn data_dir(&self, host: &Host) -> PathBuf {
        match &self.options.logs {
            Some(logs) => logs.join(host.name()),
            None => host.directory().join("data"),
        }
    }

    /// A host's key for the traffic between the hosts.
    pub fn key_path(&self, host: &Host) -> PathBuf {
        host.directory().join("fabric.key")
    }

    /// One key on all hosts, made and copied as the manual says.
    fn share_key(&self) -> Result<()> {
        let [first, others @ ..] = self.bed.hosts() else { return Ok(()) };
        let first = self.key_path(first);
        if !first.exists() {
            let plover = self.options.programs.join("plover");
            tool::run(&plover.to_string_lossy(), &["keygen", &first.to_string_lossy()], "")?;
        }
        for host in others {
            std::fs::copy(&first, self.key_path(host)).context(|| format!("cannot copy {}", first.display()))?;
        }
        Ok(())
    }

    fn write_config(&self, host: &Host) -> Result<()> {
        let file = |path: PathBuf, text: String| {
            std::fs::write(&path, text).context(|| format!("cannot write {}", path.display()))
        };
        let vms = host.directory().join("vms");
        std::fs::create_dir_all(&vms).context(|| format!("cannot make {}", vms.display()))?;
        let node = format!(
            "name = {:?}\nlisten = \"{}:{FABRIC_PORT}\"\nfabric_key = \"fabric.key\"\nrun_dir = {:?}\ndata_dir = {:?}\nqemu = {:?}\nhash_workers = 1\nlog_segment_mib = 4\n{}",
            host.name(),
            host.ip(),
            host.socket_directory(),
            self.data_dir(host),
            Artifacts::locate()?.qemu,
            self.options.node
        );
        file(self.config_path(host), node)?;
        let (mode, members) = if self.options.unreplicated { ("unreplicated", 1) } else { ("replicated", 3) };
        let replicas: String = self
            .bed
            .hosts()
            .iter()
            .take(members)
            .map(|host| {
                let (name, ip, transports) = (host.name(), host.ip(), self.options.transports);
                format!("    {{ node = {name:?}, address = \"{ip}:{FABRIC_PORT}\", transports = {transports:?} }},\n")
            })
            .collect();
        let vm = format!(
            "mode = {mode:?}\nmemory_mib = {}\nmac = \"52:54:00:77:00:32\"\nreplicas = [\n{replicas}]\nuplink = {{ tap = \"plv0\", bridge = {:?} }}\n{}\n[policy]\n{}",
            self.guest().memory_mib,
            crate::host::BRIDGE,
            self.options.vm,
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
        host.start(
            Spawn::new(DAEMON, self.plover(host, &["run"]))
                .restart_after(RESTART_DELAY)
                .on_cores(&self.options.daemon_cores),
        )
    }

    /// Starts the QEMU of one host, prepared and stopped.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_qemu(&self, host: &Host) -> Result<Process> {
        let mut command = self.plover(host, &["launch", VM, "--"]);
        command.args(self.guest().user_args(&self.console(host))?);
        let cores = self.options.qemu_cores.get(self.number(host)).map_or(&[][..], Vec::as_slice);
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
        self.ask_within(host, arguments, ANSWER_LIMIT)
    }

    /// Like [`Cluster::ask`] with a limit of its own: a frozen daemon does not answer for as long as it is frozen.
    ///
    /// # Errors
    /// When it refuses or does not answer in time; the text says why.
    pub fn ask_within(&self, host: &Host, arguments: &[&str], limit: Duration) -> Result<String> {
        let mut command = self.plover(host, arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context(|| "cannot run plover".into())?;
        // What it prints fits into the pipes, so it ends before anybody reads.
        let ended = wait_until(Deadline::after(limit), "an answer", || child.try_wait().transpose());
        if ended.is_err() {
            // It may have ended at this moment: then there is nothing to kill.
            let _ = child.kill();
        }
        let output = child.wait_with_output().context(|| "cannot run plover".into())?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let mut said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if said.is_empty() {
            said = format!("no answer within {limit:?}");
        }
        let line = format!("plover {}", arguments.join(" "));
        Err(RigError::Tool { line, said })
    }

    /// The status of the group on one host; `None` while its daemon does not answer.
    pub fn status(&self, host: &Host) -> Option<Value> {
        let text = self.ask_within(host, &["status", VM, "--json"], STATUS_LIMIT).ok()?;
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
            let said = self.ask_within(host, &["status", VM], STATUS_LIMIT).unwrap_or_else(|error| error.to_string());
            text.push_str(&format!("\n{}:\n{said}", host.name()));
        }
        RigError::Explained(text)
    }
}
