//! A host of the test bed: a network namespace with an address, a bridge for its guest, and processes.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::error::Context;
use crate::fault::LinkCuts;
use crate::netns::NetNs;
use crate::process::{Process, Spawn};
use crate::wait::{Deadline, wait_until};
use crate::{Result, tool};

/// The bridge that joins the uplink and the guest's TAP device.
pub const BRIDGE: &str = "br0";
/// The host's end of the cable to the switch.
pub const UPLINK: &str = "eth0";

/// A host; clones mean the same one. It ends with its test bed.
#[derive(Clone)]
pub struct Host {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub name: String,
    pub ip: Ipv4Addr,
    pub namespace: NetNs,
    /// Name of the switch's namespace, where this host's port is called like the host.
    pub switch: String,
    pub directory: PathBuf,
    pub sockets: PathBuf,
    pub processes: Mutex<Vec<Process>>,
    pub link_cuts: Mutex<LinkCuts>,
    taps: AtomicU32,
}

/// Everything a host needs to come up.
pub(crate) struct Plan<'a> {
    pub name: &'a str,
    pub ip: Ipv4Addr,
    pub namespace: String,
    pub switch: &'a str,
    pub directory: PathBuf,
    pub sockets: PathBuf,
}

impl Host {
    /// Makes the namespace, the cable to the switch and the bridge.
    pub(crate) fn create(plan: Plan) -> Result<Self> {
        let Plan { name, ip, namespace, switch, directory, sockets } = plan;
        for directory in [&directory, &sockets] {
            fs::create_dir_all(directory).context(|| format!("cannot create {}", directory.display()))?;
        }
        let namespace = NetNs::create(&namespace)?;
        let inside = namespace.name();
        tool::ip_batch(
            switch,
            &format!(
                "link add {name} type veth peer name {UPLINK} netns {inside}\n\
                 link set {name} master {SWITCH_BRIDGE} up\n"
            ),
        )?;
        // Without an address of its own the bridge would take over a new one whenever a TAP device joins.
        let [.., low] = ip.octets();
        tool::ip_batch(
            inside,
            &format!(
                "link add {BRIDGE} address 02:00:0a:4d:00:{low:02x} {QUIET_BRIDGE}\n\
                 link set {UPLINK} master {BRIDGE} up\n\
                 link set {BRIDGE} up\n\
                 addr add {ip}/{PREFIX_BITS} dev {BRIDGE}\n"
            ),
        )?;
        let (name, switch) = (name.to_owned(), switch.to_owned());
        let (processes, link_cuts, taps) = (Mutex::default(), Mutex::default(), AtomicU32::new(0));
        let inner = Inner { name, ip, namespace, switch, directory, sockets, processes, link_cuts, taps };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// `h1`, `h2`, …, or `client`.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The address on the bridge, for the fabric and for clients.
    pub fn ip(&self) -> Ipv4Addr {
        self.inner.ip
    }

    /// Its network namespace, to run threads in.
    pub fn namespace(&self) -> &NetNs {
        &self.inner.namespace
    }

    /// For logs, configuration files and data; below `target/rig-run`.
    pub fn directory(&self) -> &Path {
        &self.inner.directory
    }

    /// For unix sockets: short enough for a socket address.
    pub fn socket_directory(&self) -> &Path {
        &self.inner.sockets
    }

    /// Starts a command on this host. Its output goes to `directory()/NAME.log`.
    pub fn spawn(&self, name: &str, command: Command) -> Result<Process> {
        self.start(Spawn::new(name, command))
    }

    /// Like [`Host::spawn`], with restarts or pinned to cores.
    pub fn start(&self, spawn: Spawn) -> Result<Process> {
        let inner = &self.inner;
        let process = Process::start(spawn, inner.namespace.raw_fd(), &inner.directory)?;
        inner.processes.lock().expect("no holder panics").push(process.clone());
        Ok(process)
    }

    /// Everything that was started here, in order.
    pub fn processes(&self) -> Vec<Process> {
        self.inner.processes.lock().expect("no holder panics").clone()
    }

    /// The process of that name that was started last.
    pub fn process(&self, name: &str) -> Option<Process> {
        self.processes().into_iter().rev().find(|process| process.name() == name)
    }

    /// Runs a command on this host to its end and returns what it printed.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let line = ["netns", "exec", self.namespace().name(), program];
        tool::run("ip", &[&line[..], arguments].concat(), "")
    }

    /// Waits until something accepts TCP connections at the address, seen from this host.
    ///
    /// # Errors
    /// When the deadline passes.
    pub fn wait_for_port(&self, address: SocketAddr, deadline: Deadline) -> Result<()> {
        self.namespace().run(|| {
            wait_until(deadline, &format!("a listener at {address}"), || {
                TcpStream::connect_timeout(&address, CONNECT_LIMIT).ok().map(drop)
            })
        })?
    }

    /// Makes a TAP device (with vnet headers) on the bridge, for a guest with QEMU's own network backend.
    pub fn add_tap(&self) -> Result<String> {
        let tap = format!("tap{}", self.inner.taps.fetch_add(1, Ordering::Relaxed));
        tool::ip_batch(
            self.namespace().name(),
            &format!("tuntap add dev {tap} mode tap vnet_hdr\nlink set {tap} master {BRIDGE} up\n"),
        )?;
        Ok(tap)
    }
}

pub(crate) const SWITCH_BRIDGE: &str = "switch";
/// No spanning tree, no learning delay, no multicast queries: a frame on the wire was sent by somebody under test.
pub(crate) const QUIET_BRIDGE: &str = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0";
pub(crate) const PREFIX_BITS: u8 = 24;
/// One attempt to connect; a lost SYN would otherwise cost a second.
const CONNECT_LIMIT: Duration = Duration::from_millis(500);
