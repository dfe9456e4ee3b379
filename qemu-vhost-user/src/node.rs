//! The daemon: one listener, one control socket and one thread per VM group.
//!
//! A group that fails (a full disk, a lost log) is torn down and started again after a second, as if its daemon had
//! restarted; the other groups of the node do not notice. SIGTERM and SIGINT end everything at once: the peers see closed
//! connections, and a secondary of ours elsewhere takes over without waiting for a time-out.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dataplane::fabric::{Listener, NodeIdentity, Security};
use dataplane::wait::Bell;

use crate::config::{NodeConfig, VmConfig};
use crate::control::{ControlServer, GroupHandle, GroupHandles};
use crate::group::{self, GroupSetup, Place};

/// How long a failed group rests before it is started again.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// How long the groups may take to end.
const STOP_DEADLINE: Duration = Duration::from_secs(2);

/// Where the vhost-user socket of the one VM comes from, when it is not the configuration.
#[derive(Debug, Default)]
pub struct SocketOverride {
    /// A path to listen on.
    pub path: Option<PathBuf>,
    /// A connected socket, inherited.
    pub fd: Option<OwnedFd>,
}

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The privileges that the packet path and the dirty tracker need are absent.
    #[error(
        "plover must run as root: it opens TAP devices and reads QEMU's page maps; start it from its systemd unit or with sudo"
    )]
    NotRoot,
    /// The control socket cannot be had.
    #[error("control socket: {0}")]
    Control(std::io::Error),
    /// The peers' port cannot be had.
    #[error("listen = {address}: {reason}")]
    Listen {
        /// The configured address.
        address: std::net::SocketAddr,
        /// What the kernel said and what to do.
        reason: String,
    },
    /// `--socket-path` or `--fd` with several VMs.
    #[error(
        "--socket-path and --fd serve one VM, but the configuration names {0}; put the sockets into the VM files instead"
    )]
    AmbiguousSocket(usize),
    /// The operating system refused something basic.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// Refuses whoever may not run the daemon. Asked first: such a user could not read the key either, and would be told that.
///
/// # Errors
/// [`NodeError::NotRoot`].
pub fn check_privileges() -> Result<(), NodeError> {
    if rustix::process::geteuid().is_root() { Ok(()) } else { Err(NodeError::NotRoot) }
}

/// Runs the daemon until a signal ends it, if [`check_privileges`] allowed it. `security` is that of `config`.
///
/// # Errors
/// When it cannot start. A failing group does not end it.
pub fn run(config: NodeConfig, security: Security, socket: SocketOverride) -> Result<(), NodeError> {
    if matches!(security, Security::Insecure) {
        tracing::warn!(
            "insecure = true: whoever reaches {} or the network between the nodes can read the guests' memory and \
             speak as a node; remove it from node.toml and give all nodes one key (plover keygen)",
            config.listen
        );
    }
    if (socket.path.is_some() || socket.fd.is_some()) && config.vms.len() != 1 {
        return Err(NodeError::AmbiguousSocket(config.vms.len()));
    }
    let signals = block_signals().map_err(|source| NodeError::System { what: "signals", source })?;
    let groups: GroupHandles = Arc::new(Mutex::new(BTreeMap::new()));
    let _control = ControlServer::start(&config.control_socket(), groups.clone()).map_err(NodeError::Control)?;
    let identity =
        NodeIdentity::new(&config.name).map_err(|source| NodeError::System { what: "/dev/urandom", source })?;
    let listener = Listener::bind(config.listen, identity, security)
        .map_err(|error| NodeError::Listen { address: config.listen, reason: error.to_string() })?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let node = Arc::new(Node { config, listener, groups, stopping: AtomicBool::new(false), cores });
    let mut socket = Some(socket);
    let mut threads = Vec::new();
    for (at, vm) in node.config.vms.values().cloned().enumerate() {
        let (node, socket) = (node.clone(), socket.take().unwrap_or_default());
        let wake = Arc::new(Bell::new().map_err(|source| NodeError::System { what: "eventfd", source })?);
        let thread_wake = wake.clone();
        let thread = std::thread::Builder::new()
            .name(format!("plover-{}", vm.name))
            .spawn(move || node.keep_group_running(&vm, at, &thread_wake, socket))
            .map_err(|source| NodeError::System { what: "group thread", source })?;
        threads.push((thread, wake));
    }
    tracing::info!(node = %node.config.name, listen = %node.config.listen, vms = node.config.vms.len(), "running");
    let signal = signals.wait();
    tracing::info!(signal, "ending");
    node.stopping.store(true, Ordering::Release);
    let deadline = Instant::now() + STOP_DEADLINE;
    for (thread, wake) in threads {
        wake.ring();
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }
    Ok(())
}

struct Node {
    config: NodeConfig,
    listener: Listener,
    groups: GroupHandles,
    stopping: AtomicBool,
    /// Cores of the machine, counted before any thread was pinned to one of them.
    cores: usize,
}

impl Node {
    /// Runs one group until the daemon ends, again after every failure.
    fn keep_group_running(&self, vm: &VmConfig, at: usize, wake: &Arc<Bell>, mut socket: SocketOverride) {
        while !self.stopping.load(Ordering::Acquire) {
            let (handle, requests) = GroupHandle::new(wake.clone());
            self.groups.lock().expect("no holder of this lock panics").insert(vm.name.clone(), handle);
            let setup = GroupSetup {
                node: &self.config,
                vm,
                place: Place::of(&self.config, at, self.config.vms.len(), self.cores),
                listener: &self.listener,
                requests,
                wake: wake.clone(),
                stopping: &self.stopping,
                socket: std::mem::take(&mut socket),
            };
            // A violated assertion ends this group's state, not the other groups: it starts from its durable log again.
            match catch_unwind(AssertUnwindSafe(|| group::run(setup))) {
                Ok(Ok(())) => return,
                Ok(Err(error)) => {
                    tracing::error!(vm = %vm.name, "{error}; the group starts again in {RESTART_DELAY:?}");
                }
                Err(_) => {
                    tracing::error!(vm = %vm.name, "the group panicked; it starts again in {RESTART_DELAY:?}");
                }
            }
            let until = Instant::now() + RESTART_DELAY;
            while Instant::now() < until && !self.stopping.load(Ordering::Acquire) {
                std::thread::park_timeout(Duration::from_millis(50));
            }
        }
    }
}

/// SIGTERM and SIGINT, blocked in every thread so that one can wait for them.
struct Signals(libc::sigset_t);

fn block_signals() -> std::io::Result<Signals> {
    // SAFETY: sigset_t is plain data; sigemptyset initialises it before use, and pthread_sigmask only reads it. This runs
    // before any other thread is started, so that all threads inherit the mask.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::sigaddset(&mut set, libc::SIGINT);
        match libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) {
            0 => Ok(Signals(set)),
            code => Err(std::io::Error::from_raw_os_error(code)),
        }
    }
}

impl Signals {
    /// Waits for one of the signals; this is what the main thread is for, so it has no deadline.
    fn wait(&self) -> i32 {
        let mut signal = 0;
        // SAFETY: the set is initialised and outlives the call; `signal` is written by the call.
        while unsafe { libc::sigwait(&self.0, &mut signal) } != 0 {}
        signal
    }
}
