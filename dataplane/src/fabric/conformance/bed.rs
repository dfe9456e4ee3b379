//! Pairs of fabrics, made as nodes make them.

use crate::fabric::{
    BulkPort, Fabric, FabricConfig, FabricEvent, FabricKey, GroupPort, Listener, LostReason, NodeIdentity, PeerFabric,
    PeerId, Replica, Security, SendError, Transport,
};
use crate::wait::{Poller, Ready, now_us};
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command};
use std::sync::Arc;

const GROUP: &str = "conformance";
const FIRST_TOKEN: u64 = 1000;
/// Nothing in a case takes longer, µs; a machine that builds something else meanwhile included.
const DEADLINE_US: u64 = 60_000_000;
/// Tells a child what to be: transport, mode, and both addresses.
const CHILD_VARIABLE: &str = "PLOVER_CONFORMANCE_CHILD";

/// Makes the ends of a pair: replica 0, which dials, and replica 1.
pub trait Bed {
    /// The end of replica `me`, as of a process that just started. The one before must be gone.
    fn end(&mut self, me: u8, config: &FabricConfig) -> End;

    /// A process that is replica 1 and sends without an end; see [`run_child`]. `None`: there are no processes here.
    fn child(&mut self) -> Option<Child>;
}

/// One replica of the pair and what came of its fabric.
pub struct End {
    /// Of this end.
    pub fabric: Box<dyn Fabric>,
    /// Bulk links of this end.
    pub bulk: BulkPort,
    /// The other end.
    pub peer: PeerId,
    /// Instances of the peer that connected, in order.
    pub connected: Vec<u64>,
    /// Why connections ended, in order.
    pub lost: Vec<LostReason>,
    /// Messages that were not looked at yet.
    pub messages: VecDeque<Vec<u8>>,
    /// What the peer's node, or the lane's set-up, says against us.
    pub refused: Vec<String>,
    poller: Arc<Poller>,
    ready: Vec<Ready>,
    deadline_us: u64,
    /// Behind the fabric, so that it goes first.
    _listener: Listener,
}

impl End {
    /// An end over `listener`.
    ///
    /// # Panics
    /// If the group cannot be registered.
    pub fn new(listener: Listener, replicas: Vec<Replica>, me: u8, config: &FabricConfig) -> End {
        let GroupPort { control, bulk } = listener.register(GROUP, replicas, PeerId(me)).expect("a good group");
        let poller = Arc::new(Poller::new().expect("a poller"));
        let fabric = PeerFabric::new(config.clone(), control, Arc::clone(&poller), FIRST_TOKEN, now_us());
        End {
            fabric: Box::new(fabric.expect("a fabric")),
            bulk,
            peer: PeerId(1 - me),
            connected: Vec::new(),
            lost: Vec::new(),
            messages: VecDeque::new(),
            refused: Vec::new(),
            poller,
            ready: Vec::new(),
            deadline_us: now_us() + DEADLINE_US,
            _listener: listener,
        }
    }

    /// Puts something around the fabric.
    pub fn wrap(self, wrap: impl FnOnce(Box<dyn Fabric>) -> Box<dyn Fabric>) -> End {
        End { fabric: wrap(self.fabric), ..self }
    }

    /// Sends if there is room; `false` if not.
    ///
    /// # Panics
    /// If there is no connection.
    pub fn send(&mut self, message: &[u8]) -> bool {
        // In parts, as users do.
        let (head, tail) = message.split_at(message.len().min(3));
        match self.fabric.send(self.peer, &[head, tail]) {
            Ok(()) => true,
            Err(SendError::Full) => false,
            Err(error) => panic!("{error}; lost {:?}", self.lost),
        }
    }

    /// Polls as if it were `ahead_us` later than it is.
    pub fn poll_ahead(&mut self, ahead_us: u64) {
        let End { fabric, connected, lost, messages, refused, .. } = self;
        fabric.poll(now_us() + ahead_us, &mut |event| match event {
            FabricEvent::Connected { instance, .. } => connected.push(instance),
            FabricEvent::Lost { reason, .. } => lost.push(reason.clone()),
            FabricEvent::Message { bytes, .. } => messages.push_back(bytes.to_vec()),
            FabricEvent::Refused { reason, .. } => refused.push(reason.text.clone()),
        });
    }

    /// Sleeps until there is something, for `longest_us` at most, and polls. As a reactor does, with the same wake-ups.
    ///
    /// # Panics
    /// After the deadline of the case.
    pub fn step(&mut self, longest_us: u64) {
        let now = now_us();
        assert!(
            now < self.deadline_us,
            "not in time; {} connections, lost {:?}, refused {:?}, trouble {:?}",
            self.connected.len(),
            self.lost,
            self.refused,
            self.fabric.trouble(self.peer)
        );
        let due_us = self.fabric.next_deadline_us().saturating_sub(now);
        let sleep_us = if self.fabric.arm() { 0 } else { due_us.min(longest_us).min(self.deadline_us - now) };
        self.poller.wait(Some(sleep_us), &mut self.ready).expect("epoll works");
        self.poll_ahead(0);
    }
}

/// Polls both until `done`.
pub fn drive(left: &mut End, right: &mut End, mut done: impl FnMut(&mut End, &mut End) -> bool) {
    while !done(left, right) {
        left.step(500);
        right.step(500);
    }
}

/// Two nodes at addresses of this machine.
#[derive(Debug)]
pub struct Loopback {
    transport: Transport,
    security: Security,
    addrs: [SocketAddr; 2],
    /// Bound already, so that the ports are ours.
    spare: [Option<Listener>; 2],
    child: Option<fn() -> Command>,
    made: u64,
}

impl Loopback {
    /// Nodes at free ports of `addr`. `child` starts a process that calls [`run_child`].
    ///
    /// # Panics
    /// If nothing can be bound there.
    pub fn new(addr: IpAddr, transport: Transport, security: Security, child: Option<fn() -> Command>) -> Loopback {
        let bind = |me: u8| bind(SocketAddr::new(addr, 0), me, u64::from(me) + 1, &security);
        let listeners = [bind(0), bind(1)];
        let addrs = listeners.each_ref().map(Listener::local_addr);
        Loopback { transport, security, addrs, spare: listeners.map(Some), child, made: 2 }
    }

    /// The same with encryption on, under a key that every such bed has.
    pub fn encrypted(addr: IpAddr, transport: Transport, child: Option<fn() -> Command>) -> Loopback {
        Loopback::new(addr, transport, security("encrypted"), child)
    }
}

impl Bed for Loopback {
    fn end(&mut self, me: u8, config: &FabricConfig) -> End {
        self.made += 1;
        let slot = usize::from(me);
        let listener = self.spare[slot].take().unwrap_or_else(|| bind(self.addrs[slot], me, self.made, &self.security));
        End::new(listener, replicas(self.addrs, self.transport), me, config)
    }

    fn child(&mut self) -> Option<Child> {
        let mut command = self.child?();
        self.spare[1] = None;
        let mode = match self.security {
            Security::Encrypted(_) => "encrypted",
            Security::Insecure => "insecure",
        };
        let [left, right] = self.addrs;
        command.env(CHILD_VARIABLE, format!("{} {mode} {left} {right}", self.transport));
        Some(command.spawn().expect("the child starts"))
    }
}

fn bind(addr: SocketAddr, me: u8, instance: u64, security: &Security) -> Listener {
    let identity = NodeIdentity { name: format!("node{me}"), instance };
    Listener::bind(addr, identity, security.clone()).expect("a free port")
}

fn security(mode: &str) -> Security {
    match mode {
        "encrypted" => Security::Encrypted(FabricKey::from_bytes(*b"the key of the conformance suite")),
        _ => Security::Insecure,
    }
}

fn replicas(addrs: [SocketAddr; 2], transport: Transport) -> Vec<Replica> {
    let replica = |(id, addr)| Replica { id: PeerId(id), node: format!("node{id}"), addr, transports: vec![transport] };
    (0..).zip(addrs).map(replica).collect()
}

/// What a child does: it is replica 1 and sends the messages that the case expects until it is killed or the
/// connection ends.
///
/// # Panics
/// If it was not started by [`Loopback`].
pub fn run_child() {
    let told = std::env::var(CHILD_VARIABLE).expect("started by the conformance suite");
    let words: Vec<&str> = told.split(' ').collect();
    let [transport, mode, left, right] = words[..] else { panic!("«{told}» is no order") };
    let addrs = [left, right].map(|addr| addr.parse().expect("an address"));
    let transport = transport.parse().expect("a transport");
    let instance = u64::from(std::process::id()) + 1000;
    let listener = bind(addrs[1], 1, instance, &security(mode));
    let mut end = End::new(listener, replicas(addrs, transport), 1, &FabricConfig::default());
    super::cases::flood(&mut end);
}
