//! Puts a group together from its configuration and runs it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use consensus::{Config, ReplicaId};
use dataplane::fabric::{BulkPort, FabricConfig, GroupPort, Listener, PeerFabric, PeerId, Replica};
use dataplane::idle::IdleStrategy;
use dataplane::mailbox;
use dataplane::uplink::Uplink;
use dataplane::uplink::af_packet::AfPacket;
use dataplane::uplink::tap::Tap;
use dataplane::wait::{Bell, Poller, now_us};

use super::GroupError;
use super::delivery::Delivery;
use super::egress::Egress;
use super::follow::Follow;
use super::guest::LocalGuest;
use super::hush::Hush;
use super::ingress::{self, Ingress};
use super::memory::{self, Memory};
use super::messages::GuestReport;
use super::ordering::Ordering;
use super::passthrough::{self, Parts};
use super::peers::Peers;
use super::reactor::Reactor;
use super::scheduling::{self, Place};
use super::totals::Totals;
use super::turns::{Pace, TOKEN_FABRIC};
use super::worker::{self, CrashPoints, WorkerSetup};
use crate::config::{Mode, NodeConfig, Policy, SocketSide, TrackerChoice, UplinkKind, VmConfig};
use crate::control::GroupRequest;
use crate::device::{self, BackendDirty, Endpoint, NetDevice, Session};
use crate::node::SocketOverride;

/// What a group needs from its node.
pub struct GroupSetup<'a> {
    /// This node.
    pub node: &'a NodeConfig,
    /// The VM.
    pub vm: &'a VmConfig,
    /// Where its reactor runs.
    pub place: Place,
    /// The peers' door.
    pub listener: &'a Listener,
    /// Requests from the control socket.
    pub requests: mailbox::Receiver<GroupRequest>,
    /// Wakes the reactor.
    pub wake: Arc<Bell>,
    /// Set when the daemon ends.
    pub stopping: &'a AtomicBool,
    /// `--socket-path` or `--fd`.
    pub socket: SocketOverride,
}

/// Runs the group in the calling thread until the daemon ends.
///
/// # Errors
/// When the group cannot be put together or must be started anew.
pub fn run(setup: GroupSetup<'_>) -> Result<(), GroupError> {
    let GroupSetup { node, vm, place, listener, requests, wake, stopping, socket } = setup;
    let system = |what| move |source| GroupError::System { what, source };
    let slot = vm.replica_named(&node.name).expect("checked when the files were read");
    let me = ReplicaId(u8::try_from(slot).expect("three replicas"));
    std::fs::create_dir_all(node.vm_run_dir(&vm.name)).map_err(system("run_dir"))?;

    let poller = Arc::new(Poller::new().map_err(system("epoll"))?);
    let GroupPort { control, bulk } = register(listener, vm, me)?;
    let (device, _session) = open_device(node, vm, socket)?;
    let worker = worker::start(worker_setup(node, vm, me, bulk, device.dirty())).map_err(system("guest worker"))?;
    let idle = choose_idle(node, vm, place);
    let uplink = open_uplink(node, vm)?;
    if vm.mode == Mode::Unreplicated {
        let parts = Parts {
            node,
            vm,
            device,
            uplink,
            filter: ingress::filter_of(&vm.uplink),
            worker,
            pace: Pace::new(idle, poller, now_us()),
            requests,
            wake,
            memory: memory::map(node, place, passthrough::BURST_BYTES)?,
        };
        scheduling::apply(node.scheduling, place.core, idle, "reactor");
        return passthrough::run(parts, stopping);
    }
    // What takes a while comes first: time passes for fabric and consensus once they are there.
    let memory = Memory::new(node, &vm.policy, place)?;
    let fabric = PeerFabric::new(fabric_config(&vm.policy), control, poller.clone(), TOKEN_FABRIC, now_us())
        .map_err(system("fabric"))?;
    let legs = node.log_legs(&vm.name);
    let ordering = Ordering::open(&legs, node.log_options(), consensus_config(vm, me, listener), fabric)?;
    scheduling::apply(node.scheduling, place.core, idle, "reactor");
    let mut reactor = Reactor {
        node,
        vm,
        me,
        ordering,
        device,
        ingress: Ingress::new(&vm.uplink),
        arena: memory.arena,
        pages: memory.pages,
        egress: Egress::new(memory.guard, uplink),
        hush: Hush::default(),
        delivery: Delivery::default(),
        worker,
        guest: LocalGuest::new(vm.policy.idle_threshold_us),
        peers: Peers::new(&vm.replicas, me),
        lead: None,
        follow: Follow::default(),
        totals: Totals::new(),
        last_error: None,
        pace: Pace::new(idle, poller, now_us()),
        requests,
        wake,
        next_progress_us: 0,
        next_report_us: 0,
        reported: GuestReport::default(),
        bulk_seen: 0,
        sync_waiters: Vec::new(),
    };
    reactor.run(stopping)
}

/// The session's thread is on the way of every stop and start of the guest, so it goes before vCPUs.
fn open_device(node: &NodeConfig, vm: &VmConfig, socket: SocketOverride) -> Result<(NetDevice, Session), GroupError> {
    let scheduling = node.scheduling;
    let at_start = move || scheduling::favour(scheduling);
    let opened = device::open(&vm.name, endpoint(node, vm, socket), at_start);
    opened.map_err(|error| GroupError::Device(error.to_string()))
}

fn worker_setup(node: &NodeConfig, vm: &VmConfig, me: ReplicaId, bulk: BulkPort, dirty: BackendDirty) -> WorkerSetup {
    let mut vm = vm.clone();
    if vm.mode == Mode::Unreplicated {
        // Nobody asks what was written, so nothing shall watch it.
        vm.policy.tracker = TrackerChoice::Full;
    }
    WorkerSetup {
        run_dir: node.vm_run_dir(&vm.name),
        vm,
        node: node.name.clone(),
        me,
        hash_cores: node.hash_thread_cores(),
        scheduling: node.scheduling,
        bulk,
        dirty,
        crash_points: Arc::new(CrashPoints::default()),
    }
}

/// The idle strategy; says it, and warns where it costs others.
fn choose_idle(node: &NodeConfig, vm: &VmConfig, place: Place) -> IdleStrategy {
    let (idle, why_not) = place.idle(node);
    match why_not {
        Some(why) => tracing::warn!(vm = %vm.name, %idle, "idle: {why}"),
        None => tracing::info!(vm = %vm.name, %idle, core = place.core, "the reactor starts"),
    }
    idle
}

fn open_uplink(node: &NodeConfig, vm: &VmConfig) -> Result<Box<dyn Uplink>, GroupError> {
    let failed = |name: &str, error: &dyn std::error::Error| GroupError::Uplink {
        name: name.to_owned(),
        reason: error.source().map_or(error.to_string(), |source| format!("{error}: {source}")),
    };
    match &vm.uplink.kind {
        UplinkKind::Tap { tap, bridge, queues } => match Tap::open_queues(tap, bridge.as_deref(), *queues) {
            Ok(port) => Ok(Box::new(port)),
            Err(error) => Err(failed(tap, &error)),
        },
        UplinkKind::AfPacket { interface, promiscuous } => {
            let mac = vm.mac_bytes().map_err(|error| failed(interface, &error))?;
            match AfPacket::open(interface, (!promiscuous).then_some(mac)) {
                Ok(port) => Ok(Box::new(port)),
                Err(error) => Err(failed(interface, &error)),
            }
        }
        #[cfg(feature = "dpdk")]
        UplinkKind::Dpdk { port } => {
            use dataplane::uplink::dpdk;
            let mac = vm.mac_bytes().map_err(|error| failed(port, &error))?;
            match dpdk::start(&node.dpdk_options()).and_then(|()| dpdk::Dpdk::open(port, Some(mac))) {
                Ok(port) => Ok(Box::new(port)),
                Err(error) => Err(failed(port, &error)),
            }
        }
        #[cfg(not(feature = "dpdk"))]
        UplinkKind::Dpdk { .. } => unreachable!("such a configuration is refused by {}", node.name),
    }
}

fn register(listener: &Listener, vm: &VmConfig, me: ReplicaId) -> Result<GroupPort, GroupError> {
    let replicas = (0u8..)
        .zip(&vm.replicas)
        .map(|(id, replica)| Replica {
            id: PeerId(id),
            node: replica.node.clone(),
            addr: replica.address,
            transports: replica.transports.clone(),
        })
        .collect();
    listener.register(&vm.name, replicas, PeerId(me.0)).map_err(|error| GroupError::Fabric(error.to_string()))
}

/// Time between two heartbeats of a leader.
pub(super) fn heartbeat_interval_us(policy: &Policy) -> u64 {
    policy.failure_timeout_ms * 1000 / 4
}

/// A connection outlives a silence that the group bears: its end counts as the peer's death.
fn fabric_config(policy: &Policy) -> FabricConfig {
    let default = FabricConfig::default();
    let borne_us = 2 * policy.failure_timeout_ms * 1000;
    FabricConfig { silence_timeout_us: default.silence_timeout_us.max(borne_us), ..default }
}

fn consensus_config(vm: &VmConfig, me: ReplicaId, listener: &Listener) -> Config {
    let timeout_us = vm.policy.failure_timeout_ms * 1000;
    let default = Config::new(me, ReplicaId(0), listener.identity().instance ^ now_us());
    Config {
        failure_timeout_us: timeout_us,
        heartbeat_interval_us: heartbeat_interval_us(&vm.policy),
        // What is retained fills the arena too.
        retain_bytes: (vm.policy.arena_mib as u64) << 20 >> 2,
        // A secondary that is asked only by heartbeats is not behind because they are rare.
        second_lag_us: default.second_lag_us.max(timeout_us),
        ..default
    }
}

fn endpoint(node: &NodeConfig, vm: &VmConfig, socket: SocketOverride) -> Endpoint {
    if let Some(fd) = socket.fd {
        return Endpoint::Inherited(fd);
    }
    if let Some(path) = socket.path {
        return Endpoint::Listen(path);
    }
    let path = vm.vhost_user_socket.clone().unwrap_or_else(|| node.vm_run_dir(&vm.name).join("vhost.sock"));
    match vm.vhost_user_server {
        SocketSide::Qemu => Endpoint::Connect(path),
        SocketSide::Plover => Endpoint::Listen(path),
    }
}
