//! The one listening socket of a node: reads hellos, refuses what does not belong here, and hands the
//! rest to the groups.
//!
//! A thread of its own, so that no stranger's connection costs a reactor anything. Half-open
//! connections are bounded in number and time; when there are too many, the oldest goes, because a real
//! peer sends its hello at once.

use super::bulk::BulkLink;
use super::hello::{Answer, Hello, Lane, MAX_NAME_BYTES, Refusal, RefusalCode};
use super::port::{BulkPort, ControlPort, GroupPort, Inbox, IncomingBulk, IncomingControl, Membership};
use super::secure::{Accept, Security, encode_answer};
use super::{NodeIdentity, PeerId, Replica, socket};
use crate::wait::{EventFd, Interest, Poller, Ready, now_us};
use rustix::fd::{AsFd, OwnedFd};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A hello must be complete, and a refused connection closed by the dialer, within this time.
const HELLO_DEADLINE_US: u64 = 1_000_000;
const MAX_HALF_OPEN: usize = 64;
/// Connections that may wait for a reactor; a group has two peers, so more are retries.
const CONTROL_INBOX: usize = 16;
const BULK_INBOX: usize = 8;
/// One log line per address and code in this time.
const LOG_INTERVAL_US: u64 = 10_000_000;
const MAX_LOG_KEYS: usize = 256;
/// More than a dialer sends before it waits for us.
const READ_BYTES: usize = 1024;
/// Pause after accept(2) failed for want of files or memory.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

const LISTENER_TOKEN: u64 = 0;
const WAKE_TOKEN: u64 = 1;
const FIRST_HALF_OPEN_TOKEN: u64 = 2;

/// Why a group was not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The group is served already.
    #[error("the group {group} is served by this node already; name each group once")]
    Twice {
        /// The group.
        group: String,
    },
    /// The list of replicas makes no sense.
    #[error("the group {group}: {problem}; correct the replicas in its configuration")]
    Replicas {
        /// The group.
        group: String,
        /// What is wrong.
        problem: String,
    },
}

#[derive(Debug)]
struct Group {
    generation: u64,
    membership: Arc<Membership>,
    control: Arc<Inbox<IncomingControl>>,
    bulk: Arc<Inbox<IncomingBulk>>,
}

#[derive(Debug)]
struct Shared {
    identity: NodeIdentity,
    security: Security,
    groups: Mutex<HashMap<String, Group>>,
    generation: AtomicU64,
    stop: AtomicBool,
    wake: EventFd,
}

/// Deregisters a group when dropped.
#[derive(Debug)]
pub(super) struct Registration {
    shared: Arc<Shared>,
    group: String,
    generation: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut groups = self.shared.groups.lock().unwrap_or_else(|poison| poison.into_inner());
        if groups.get(&self.group).is_some_and(|group| group.generation == self.generation) {
            groups.remove(&self.group);
        }
    }
}

/// A node's end of the fabric; one per process. Dropping it ends its thread; connections that were
/// handed over stay.
#[derive(Debug)]
pub struct Listener {
    shared: Arc<Shared>,
    local_addr: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens on `addr` as the node `identity`. All connections of its groups, dialed ones too, are protected by
    /// `security`.
    ///
    /// # Errors
    /// Those of bind(2) and listen(2), with the address and the remedy in the text.
    pub fn bind(addr: SocketAddr, identity: NodeIdentity, security: Security) -> io::Result<Listener> {
        super::shm::sweep();
        let listener = TcpListener::bind(addr).map_err(|error| {
            let text = format!(
                "cannot listen on {addr} for the fabric: {error}. Is another plover running here, and \
                 is the address one of this host's?"
            );
            io::Error::new(error.kind(), text)
        })?;
        listener.set_nonblocking(true)?;
        let local_addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            identity,
            security,
            groups: Mutex::default(),
            generation: AtomicU64::new(1),
            stop: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let acceptor = Acceptor::new(listener, Arc::clone(&shared))?;
        let thread = std::thread::Builder::new().name("fabric-accept".to_owned()).spawn(move || acceptor.run())?;
        Ok(Listener { shared, local_addr, thread: Some(thread) })
    }

    /// Where it listens; tells the port if 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Who this node is.
    pub fn identity(&self) -> &NodeIdentity {
        &self.shared.identity
    }

    /// Takes connections for `group`, of which this node holds replica `me`, until the returned port's
    /// control half is dropped.
    ///
    /// # Errors
    /// [`RegisterError`] if the group is there already or `replicas` does not fit this node.
    ///
    /// # Panics
    /// If no eventfd can be made.
    pub fn register(&self, group: &str, replicas: Vec<Replica>, me: PeerId) -> Result<GroupPort, RegisterError> {
        check_replicas(group, &replicas, me, &self.shared.identity)
            .map_err(|problem| RegisterError::Replicas { group: group.to_owned(), problem })?;
        let identity = self.shared.identity.clone();
        let security = self.shared.security.clone();
        let membership = Arc::new(Membership { group: group.to_owned(), me, replicas, identity, security });
        let control = Arc::new(Inbox::new(CONTROL_INBOX).expect("an eventfd for the control lane"));
        let bulk = Arc::new(Inbox::new(BULK_INBOX).expect("an eventfd for the bulk lane"));
        let generation = self.shared.generation.fetch_add(1, Ordering::Relaxed);
        let mut groups = self.shared.groups.lock().unwrap_or_else(|poison| poison.into_inner());
        if groups.contains_key(group) {
            return Err(RegisterError::Twice { group: group.to_owned() });
        }
        let entry = Group {
            generation,
            membership: Arc::clone(&membership),
            control: Arc::clone(&control),
            bulk: Arc::clone(&bulk),
        };
        groups.insert(group.to_owned(), entry);
        let registration = Registration { shared: Arc::clone(&self.shared), group: group.to_owned(), generation };
        Ok(GroupPort {
            control: ControlPort { inbox: control, membership: Arc::clone(&membership), _registration: registration },
            bulk: BulkPort { inbox: bulk, membership },
        })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the fabric's accept thread panicked");
        }
    }
}

fn check_replicas(group: &str, replicas: &[Replica], me: PeerId, identity: &NodeIdentity) -> Result<(), String> {
    let names = [group, &identity.name];
    for name in names.into_iter().chain(replicas.iter().map(|replica| replica.node.as_str())) {
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(format!("the name {name:?} is not 1 to {MAX_NAME_BYTES} bytes long"));
        }
    }
    for (i, replica) in replicas.iter().enumerate() {
        for other in &replicas[..i] {
            if other.id == replica.id {
                return Err(format!("replica {} is listed twice", replica.id));
            }
            if other.node == replica.node {
                return Err(format!("the node {} holds two replicas", replica.node));
            }
        }
    }
    match replicas.iter().find(|replica| replica.id == me) {
        None => Err(format!("replica {me}, which this node is to hold, is not listed")),
        Some(replica) if replica.node != identity.name => {
            Err(format!("replica {me} belongs to the node {}, but this node is {}", replica.node, identity.name))
        }
        Some(_) => Ok(()),
    }
}

/// A connection between accept and hand-over.
struct HalfOpen {
    fd: OwnedFd,
    addr: SocketAddr,
    received: Vec<u8>,
    greeting: Accept,
    /// The refusal is written; only the dialer's close is awaited, because closing first could
    /// destroy the text on its way.
    refused: bool,
    deadline_us: u64,
}

impl HalfOpen {
    /// Nothing came on it.
    fn silent(&self) -> bool {
        self.received.is_empty() && self.greeting.is_untouched()
    }
}

/// The accept thread's state.
struct Acceptor {
    listener: TcpListener,
    shared: Arc<Shared>,
    poller: Poller,
    half_open: [Option<Box<HalfOpen>>; MAX_HALF_OPEN],
    logged: HashMap<(IpAddr, RefusalCode), u64>,
}

impl Acceptor {
    fn new(listener: TcpListener, shared: Arc<Shared>) -> io::Result<Acceptor> {
        let poller = Poller::new()?;
        poller.add(&listener, LISTENER_TOKEN, Interest::Read)?;
        poller.add(&shared.wake, WAKE_TOKEN, Interest::Read)?;
        Ok(Acceptor { listener, shared, poller, half_open: [const { None }; MAX_HALF_OPEN], logged: HashMap::new() })
    }

    fn run(mut self) {
        let mut ready: Vec<Ready> = Vec::new();
        while !self.shared.stop.load(Ordering::Acquire) {
            let now = now_us();
            let deadline = self.half_open.iter().flatten().map(|half| half.deadline_us).min();
            let timeout_us = deadline.map(|deadline_us| deadline_us.saturating_sub(now));
            if let Err(error) = self.poller.wait(timeout_us, &mut ready) {
                tracing::error!(%error, "the fabric's accept thread cannot wait; it takes no more connections");
                return;
            }
            let now = now_us();
            for slot in 0..MAX_HALF_OPEN {
                if let Some(half) = self.half_open[slot].take_if(|half| half.deadline_us <= now) {
                    self.give_up(&half, "did not go on", now);
                }
            }
            for event in &ready {
                match event.token {
                    LISTENER_TOKEN => self.accept(now),
                    WAKE_TOKEN => {}
                    token => self.read_hello((token - FIRST_HALF_OPEN_TOKEN) as usize, now),
                }
            }
        }
    }

    fn accept(&mut self, now_us: u64) {
        let (stream, addr) = match self.listener.accept() {
            Ok(accepted) => accepted,
            Err(error) => {
                use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
                if !matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock) {
                    tracing::warn!(%error, "accepting a fabric connection failed; raise the limit of open files");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
                return;
            }
        };
        let fd = OwnedFd::from(stream);
        if rustix::io::ioctl_fionbio(&fd, true).is_err() {
            return;
        }
        let slot = self.free_slot();
        let token = FIRST_HALF_OPEN_TOKEN + slot as u64;
        if self.poller.add(&fd, token, Interest::Read).is_ok() {
            let deadline_us = now_us + HELLO_DEADLINE_US;
            let greeting = Accept::new(self.shared.security.clone());
            let half = HalfOpen { fd, addr, received: Vec::new(), greeting, refused: false, deadline_us };
            self.half_open[slot] = Some(Box::new(half));
        }
    }

    /// An empty slot, or the oldest one, emptied.
    fn free_slot(&mut self) -> usize {
        let age = |slot: &Option<Box<HalfOpen>>| slot.as_ref().map_or(0, |half| half.deadline_us);
        let slot = (0..MAX_HALF_OPEN).min_by_key(|&i| age(&self.half_open[i])).expect("there are slots");
        self.half_open[slot] = None;
        slot
    }

    fn read_hello(&mut self, slot: usize, now_us: u64) {
        // The slot may have been emptied or reused earlier in the same round; then the read below finds
        // nothing and the event comes again.
        let Some(mut half) = self.half_open[slot].take() else {
            return;
        };
        let mut chunk = [0u8; READ_BYTES];
        match socket::recv(&half.fd, &mut chunk) {
            Ok(None) => self.half_open[slot] = Some(half),
            Ok(Some(0)) | Err(_) => self.give_up(&half, "closed it", now_us),
            Ok(Some(_)) if half.refused => self.half_open[slot] = Some(half),
            Ok(Some(received)) => {
                half.received.extend_from_slice(&chunk[..received]);
                self.greet(slot, half, now_us);
            }
        }
    }

    /// Goes on with the handshake after new bytes.
    fn greet(&mut self, slot: usize, mut half: Box<HalfOpen>, now_us: u64) {
        let mut reply = Vec::new();
        let step = half.greeting.advance(&mut half.received, &mut reply);
        // The socket's buffer is empty, so a part of a reply means a connection of no use.
        if !reply.is_empty() && socket::send(&half.fd, &[io::IoSlice::new(&reply)]) != Ok(Some(reply.len())) {
            return;
        }
        match step {
            Ok(None) => self.half_open[slot] = Some(half),
            Ok(Some(hello)) => {
                if let Err((half, refusal)) = self.admit(half, hello) {
                    self.refuse(slot, half, refusal, now_us);
                }
            }
            Err(refusal) => self.refuse(slot, half, refusal, now_us),
        }
    }

    /// A connection ended or was slow before its hello was whole. Those that never sent a byte (a port scan, a load
    /// balancer's check) are not worth a line.
    fn give_up(&mut self, half: &HalfOpen, how: &str, now_us: u64) {
        if half.refused || half.silent() {
            return;
        }
        let text = format!(
            "the connecting side {how} in the middle of its hello; if that repeats, check the network and that it runs \
             the same release of plover"
        );
        self.log(half.addr, &Refusal::new(RefusalCode::NotPlover, text), now_us);
    }

    /// Hands a connection to its group, or gives it back with the reason why not.
    fn admit(&mut self, half: Box<HalfOpen>, hello: Hello) -> Result<(), (Box<HalfOpen>, Refusal)> {
        let groups = self.shared.groups.lock().unwrap_or_else(|poison| poison.into_inner());
        let group = match check_hello(&self.shared.identity, &groups, &hello, half.addr) {
            Ok(group) => group,
            Err(refusal) => return Err((half, refusal)),
        };
        let full = match hello.lane {
            Lane::Control => group.control.is_full(),
            Lane::Bulk => group.bulk.is_full(),
        };
        if full {
            let text = format!("the group {} has too many waiting connections; it tries again", hello.group);
            return Err((half, Refusal::new(RefusalCode::Busy, text)));
        }
        // Only this thread pushes, so there is room; a socket that fails here is simply dropped.
        let _ = self.poller.remove(&half.fd);
        let HalfOpen { fd, addr, greeting, .. } = *half;
        let mut cipher = greeting.into_cipher();
        match hello.lane {
            Lane::Control => {
                if socket::tune_control(fd.as_fd()).is_ok() {
                    let _ = group.control.push(IncomingControl { fd, cipher, hello, addr });
                }
            }
            Lane::Bulk => {
                let answer = Answer::Welcome { instance: self.shared.identity.instance };
                let welcome = encode_answer(&answer, cipher.as_deref_mut());
                let welcomed = socket::tune_bulk(fd.as_fd()).is_ok()
                    && socket::send(&fd, &[io::IoSlice::new(&welcome)]) == Ok(Some(welcome.len()));
                if welcomed {
                    let _ = group.bulk.push(IncomingBulk {
                        peer: hello.from,
                        instance: hello.instance,
                        view: hello.view,
                        number: hello.number,
                        link: BulkLink::from_stream(fd, cipher, hello.transport),
                    });
                }
            }
        }
        Ok(())
    }

    fn refuse(&mut self, slot: usize, mut half: Box<HalfOpen>, refusal: Refusal, now_us: u64) {
        self.log(half.addr, &refusal, now_us);
        let answer = half.greeting.answer(&Answer::Refused(refusal));
        let written = socket::send(&half.fd, &[io::IoSlice::new(&answer)]);
        if written == Ok(Some(answer.len())) && rustix::net::shutdown(&half.fd, rustix::net::Shutdown::Write).is_ok() {
            half.refused = true;
            half.received = Vec::new();
            self.half_open[slot] = Some(half);
        }
    }

    fn log(&mut self, addr: SocketAddr, refusal: &Refusal, now_us: u64) {
        let key = (addr.ip(), refusal.code);
        if self.logged.get(&key).is_some_and(|&at_us| now_us < at_us + LOG_INTERVAL_US) {
            return;
        }
        if self.logged.len() >= MAX_LOG_KEYS {
            self.logged.clear();
        }
        self.logged.insert(key, now_us);
        tracing::warn!(%addr, code = ?refusal.code, "refused a fabric connection: {refusal}");
    }
}

/// The group that `hello` belongs to, or why it does not belong here.
fn check_hello<'g>(
    identity: &NodeIdentity,
    groups: &'g HashMap<String, Group>,
    hello: &Hello,
    addr: SocketAddr,
) -> Result<&'g Group, Refusal> {
    let refuse = |code, text| Err(Refusal::new(code, text));
    let us = &identity.name;
    let Hello { group: name, node, from, to, .. } = hello;
    if node == us {
        let text = format!(
            "this node is named {us} too (instance {:016x}, yours is {:016x}, from {addr}); two nodes \
             must not have one name: correct `name` in one node.toml",
            identity.instance, hello.instance
        );
        return refuse(RefusalCode::SameName, text);
    }
    let Some(group) = groups.get(name) else {
        let text = format!(
            "the node {us} does not serve the group {name}: add it to the node's vms or correct the group's replicas"
        );
        return refuse(RefusalCode::UnknownGroup, text);
    };
    let me = group.membership.me;
    if *to != me || *from == me {
        let text = format!(
            "the node {us} holds replica {me} of the group {name}, and replica {from} connected to it as \
             replica {to}: the group's replicas must be listed alike on all nodes"
        );
        return refuse(RefusalCode::WrongReplica, text);
    }
    match group.membership.replica(*from) {
        Some(replica) if replica.node == *node => {}
        Some(replica) => {
            let text = format!(
                "replica {from} of the group {name} belongs to the node {}, but {node} at {addr} claims \
                 it: the group's replicas must be listed alike on all nodes",
                replica.node
            );
            return refuse(RefusalCode::WrongNode, text);
        }
        None => {
            let text = format!("the group {name} has no replica {from} in the configuration of the node {us}");
            return refuse(RefusalCode::WrongNode, text);
        }
    }
    if hello.lane == Lane::Control && *from > me {
        let text = format!("replica {from} must wait for replica {me} to connect, the lower one dials");
        return refuse(RefusalCode::WrongReplica, text);
    }
    let transport = group.membership.transport_to(*from);
    if hello.transport != transport {
        let text = format!(
            "the node {us} uses {transport} between the replicas {from} and {me} of the group {name}, and {node} wants \
             {}: the replicas' `transports` must be listed alike on all nodes",
            hello.transport
        );
        return refuse(RefusalCode::Transport, text);
    }
    Ok(group)
}
