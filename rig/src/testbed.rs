//! A whole test bed: a switch, three hosts, a client, and the janitor who removes them.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::error::with_sources;
use crate::host::{Host, Plan, QUIET_BRIDGE, SWITCH_BRIDGE};
use crate::janitor::{self, Id, Janitor, Leave};
use crate::netns::NetNs;
use crate::wait::{Deadline, wait_until};
use crate::{Result, RigError, is_root, tool};

/// The client's address.
pub const CLIENT_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);
/// The protected guest's address, unless a test wants another.
pub const GUEST_IP: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 50);
/// Hosts of a test bed: one group of replicas.
pub const HOSTS: u8 = 3;
/// Between the kill of a process and our knowing it.
const MONITOR_LIMIT_SECS: u64 = 10;

/// Three hosts and a client on one switch. Dropping it removes everything.
pub struct Testbed {
    id: Id,
    hosts: Vec<Host>,
    client: Host,
    _switch: NetNs,
    janitor: Option<Janitor>,
    keep_logs: AtomicBool,
}

impl Testbed {
    /// Brings up hosts `h1` to `h3` (10.77.0.11 to .13) and `client` (10.77.0.100).
    ///
    /// # Errors
    /// [`RigError::NotRoot`], or what `ip` says.
    pub fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        if !is_root() {
            return Err(RigError::NotRoot);
        }
        janitor::sweep()?;
        let id = Id::of_this_process(NUMBER.fetch_add(1, Ordering::Relaxed))?;
        let janitor = Janitor::start(&id)?;
        match Self::build(&id) {
            Ok((switch, hosts, client)) => Ok(Self {
                id,
                hosts,
                client,
                _switch: switch,
                janitor: Some(janitor),
                keep_logs: AtomicBool::new(false),
            }),
            Err(error) => {
                janitor.finish(Leave::Nothing)?;
                Err(error)
            }
        }
    }

    fn build(id: &Id) -> Result<(NetNs, Vec<Host>, Host)> {
        let switch = NetNs::create(&format!("plover-{id}-switch"))?;
        let commands = format!("link add {SWITCH_BRIDGE} {QUIET_BRIDGE}\nlink set {SWITCH_BRIDGE} up\n");
        tool::ip_batch(switch.name(), &commands)?;
        let host = |name: &str, ip: Ipv4Addr| {
            Host::create(Plan {
                name,
                ip,
                namespace: format!("plover-{id}-{name}"),
                switch: switch.name(),
                directory: id.run_dir().join(name),
                sockets: id.socket_dir().join(name),
            })
        };
        let hosts = (1..=HOSTS).map(|n| host(&format!("h{n}"), Ipv4Addr::new(10, 77, 0, 10 + n)));
        let hosts = hosts.collect::<Result<Vec<_>>>()?;
        let client = host("client", CLIENT_IP)?;
        Ok((switch, hosts, client))
    }

    /// Unique among all test beds of this machine; part of every name below `ip netns list`.
    pub fn id(&self) -> String {
        self.id.to_string()
    }

    /// The hosts `h1`, `h2`, `h3`.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// One of them, counted from 0.
    ///
    /// # Panics
    /// When there is none of that number.
    pub fn host(&self, index: usize) -> &Host {
        &self.hosts[index]
    }

    /// The client's host.
    pub fn client(&self) -> &Host {
        &self.client
    }

    /// Logs and data of this run.
    pub fn directory(&self) -> PathBuf {
        self.id.run_dir()
    }

    /// Leaves the logs when the test bed goes, as after a panic, and says where: for a run that failed without one.
    ///
    /// # Errors
    /// When the janitor does not listen any more.
    pub fn keep_logs(&self) -> Result<()> {
        self.keep_logs.store(true, Ordering::Relaxed);
        self.janitor.as_ref().map_or(Ok(()), Janitor::keep_logs)
    }

    fn finish(&mut self, leave: Leave) -> Result<()> {
        let Some(janitor) = self.janitor.take() else {
            return Ok(());
        };
        let everywhere = self.hosts.iter().chain([&self.client]);
        let processes = everywhere.flat_map(Host::processes);
        // From here on nothing starts again, so the janitor sees the last of them.
        let monitors: Vec<_> = processes.filter_map(|process| process.release()).collect();
        janitor.finish(leave)?;
        for monitor in monitors {
            let deadline = Deadline::after_secs(MONITOR_LIMIT_SECS);
            wait_until(deadline, "a process to be reaped", || monitor.is_finished().then_some(()))?;
            // A monitor that panicked has printed why; the clean-up goes on.
            drop(monitor.join());
        }
        Ok(())
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        let failing = std::thread::panicking()
            || self.keep_logs.load(Ordering::Relaxed)
            || std::env::var_os("PLOVER_RIG_KEEP_LOGS").is_some();
        if failing && self.janitor.is_some() {
            eprintln!("rig: the logs of this run stay in {}", self.directory().display());
        }
        let leave = if failing { Leave::Logs } else { Leave::Nothing };
        if let Err(error) = self.finish(leave) {
            eprintln!("rig: {}", with_sources(&error));
        }
    }
}
