//! Nodes on the loopback interface, driven by the test's own thread, and a peer that is written by hand.

use dataplane::fabric::{
    Fabric, FabricConfig, FabricEvent, FabricKey, Listener, LostReason, NodeIdentity, PeerFabric, PeerId, Refusal,
    Replica, Security, Transport,
};
use dataplane::wait::{Poller, now_us};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

pub const GROUP: &str = "vm1";
const KEY: [u8; 32] = *b"the key of all nodes in a test..";

/// What the nodes of a test use unless it says otherwise.
pub fn encrypted() -> Security {
    Security::Encrypted(FabricKey::from_bytes(KEY))
}

/// An event of a fabric, kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen {
    Connected(u8, u64),
    Lost(u8, LostReason),
    Message(u8, Vec<u8>),
    Refused(u8, Refusal),
}

/// A listener on a free port.
pub fn listen(name: &str, instance: u64) -> Listener {
    listen_with(name, instance, encrypted())
}

pub fn listen_with(name: &str, instance: u64, security: Security) -> Listener {
    let identity = NodeIdentity { name: name.to_owned(), instance };
    Listener::bind("127.0.0.1:0".parse().unwrap(), identity, security).unwrap()
}

pub fn replicas(addrs: &[SocketAddr]) -> Vec<Replica> {
    replicas_over(addrs, &[])
}

pub fn replicas_over(addrs: &[SocketAddr], transports: &[Transport]) -> Vec<Replica> {
    let node = |(id, addr): (usize, &SocketAddr)| Replica {
        id: PeerId(id as u8),
        node: format!("node{id}"),
        addr: *addr,
        transports: transports.to_vec(),
    };
    addrs.iter().enumerate().map(node).collect()
}

/// One replica: its fabric and what it reported.
pub struct Node {
    pub fabric: PeerFabric,
    pub seen: Vec<Seen>,
    poller: Arc<Poller>,
}

impl Node {
    pub fn new(listener: &Listener, addrs: &[SocketAddr], me: u8, config: FabricConfig) -> Node {
        Node::with(listener, replicas(addrs), me, config)
    }

    pub fn with(listener: &Listener, replicas: Vec<Replica>, me: u8, config: FabricConfig) -> Node {
        let port = listener.register(GROUP, replicas, PeerId(me)).unwrap();
        let poller = Arc::new(Poller::new().unwrap());
        let fabric = PeerFabric::new(config, port.control, Arc::clone(&poller), 1000, now_us()).unwrap();
        Node { fabric, seen: Vec::new(), poller }
    }

    /// Polls once as if it were `ahead_us` later than it is.
    pub fn poll_ahead(&mut self, ahead_us: u64) {
        let seen = &mut self.seen;
        self.fabric.poll(now_us() + ahead_us, &mut |event| {
            seen.push(match event {
                FabricEvent::Connected { peer, instance } => Seen::Connected(peer.0, instance),
                FabricEvent::Lost { peer, reason } => Seen::Lost(peer.0, reason.clone()),
                FabricEvent::Message { peer, bytes } => Seen::Message(peer.0, bytes.to_vec()),
                FabricEvent::Refused { peer, reason } => Seen::Refused(peer.0, reason.clone()),
            });
        });
    }

    /// Waits for this node's sockets and polls, up to 2 ms.
    pub fn step(&mut self) {
        let left_us = self.fabric.next_deadline_us().saturating_sub(now_us());
        let mut ready = Vec::new();
        self.poller.wait(Some(left_us.min(2_000)), &mut ready).unwrap();
        assert!(ready.iter().all(|event| (1000..=1255).contains(&event.token)));
        self.poll_ahead(0);
    }

    pub fn messages(&self) -> Vec<&[u8]> {
        let mut messages = Vec::new();
        for seen in &self.seen {
            if let Seen::Message(_, bytes) = seen {
                messages.push(bytes.as_slice());
            }
        }
        messages
    }

    pub fn lost(&self) -> Vec<&LostReason> {
        let mut reasons = Vec::new();
        for seen in &self.seen {
            if let Seen::Lost(_, reason) = seen {
                reasons.push(reason);
            }
        }
        reasons
    }

    pub fn connections(&self) -> Vec<u64> {
        let instance = |seen: &Seen| match seen {
            Seen::Connected(_, instance) => Some(*instance),
            _ => None,
        };
        self.seen.iter().filter_map(instance).collect()
    }
}

/// Drives the nodes until `done` or, after 20 s, panics.
pub fn drive(nodes: &mut [&mut Node], mut done: impl FnMut(&mut [&mut Node]) -> bool) {
    let deadline = now_us() + 20_000_000;
    while !done(nodes) {
        for node in nodes.iter_mut() {
            node.step();
        }
        if now_us() > deadline {
            let seen: Vec<_> = nodes.iter().map(|node| &node.seen[node.seen.len().saturating_sub(5)..]).collect();
            panic!("not within 20 s; last events {seen:?}");
        }
    }
}

/// Two connected nodes: 0, which dials, and 1.
pub fn pair(config: &FabricConfig) -> (Listener, Listener, Node, Node) {
    pair_with(config, &encrypted())
}

pub fn pair_with(config: &FabricConfig, security: &Security) -> (Listener, Listener, Node, Node) {
    let left = listen_with("node0", 100, security.clone());
    let right = listen_with("node1", 101, security.clone());
    let addrs = [left.local_addr(), right.local_addr()];
    let mut a = Node::new(&left, &addrs, 0, config.clone());
    let mut b = Node::new(&right, &addrs, 1, config.clone());
    drive(&mut [&mut a, &mut b], |n| n.iter().all(|node| node.connections().len() == 1));
    (left, right, a, b)
}

/// A hello as the protocol's description says, written by hand.
pub struct RawHello {
    pub magic: [u8; 8],
    pub version: u16,
    /// 1: encrypted.
    pub mode: u8,
    pub key: [u8; 32],
    pub lane: u8,
    pub from: u8,
    pub to: u8,
    /// 0: TCP, 1: shared memory.
    pub transport: u8,
    pub instance: u64,
    pub group: String,
    pub node: String,
}

impl RawHello {
    /// Replica 0 on node0 to replica 1, encrypted.
    pub fn good(instance: u64) -> RawHello {
        RawHello {
            magic: *b"PLVRHELO",
            version: 2,
            mode: 1,
            key: KEY,
            lane: 1,
            from: 0,
            to: 1,
            transport: 0,
            instance,
            group: GROUP.to_owned(),
            node: "node0".to_owned(),
        }
    }

    pub fn clear(instance: u64) -> RawHello {
        RawHello { mode: 0, ..RawHello::good(instance) }
    }

    pub fn preamble(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend([self.mode, 0]);
        out
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = ((32 + self.group.len() + self.node.len()) as u16).to_le_bytes().to_vec();
        out.extend([self.lane, self.from, self.to, self.group.len() as u8, self.node.len() as u8, self.transport]);
        out.extend(self.instance.to_le_bytes());
        out.extend([0; 16]);
        out.extend(self.group.as_bytes());
        out.extend(self.node.as_bytes());
        out
    }

    /// Connects and says hello, after the handshake if the other side agrees to one.
    pub fn dial(&self, addr: SocketAddr) -> RawPeer {
        let mut peer = self.shake(addr);
        if self.mode != 1 || peer.noise.is_some() {
            peer.write(&self.bytes());
        }
        peer
    }

    /// Connects and goes as far as the hello.
    pub fn shake(&self, addr: SocketAddr) -> RawPeer {
        let mut peer = RawPeer::connect(addr);
        if self.mode != 1 {
            peer.write_raw(&self.preamble());
            return peer;
        }
        let pattern = "Noise_NNpsk0_25519_AESGCM_BLAKE2s".parse().unwrap();
        let builder = snow::Builder::new(pattern).psk(0, &self.key).unwrap();
        let mut noise = builder.prologue(&self.preamble()).unwrap().build_initiator().unwrap();
        let mut message = [0; 48];
        assert_eq!(noise.write_message(&[], &mut message).unwrap(), 48);
        peer.write_raw(&[&self.preamble(), &message[..]].concat());
        let mut magic = [0; 8];
        while peer.stream.peek(&mut magic).unwrap() < 8 {}
        if magic != *b"PLVRNOIS" {
            return peer;
        }
        let reply = peer.read_raw(8 + 48);
        noise.read_message(&reply[8..], &mut [0; 48]).unwrap();
        peer.noise = Some(noise.into_transport_mode().unwrap());
        peer
    }
}

/// The other end of a connection, without any of the code under test.
pub struct RawPeer {
    pub stream: TcpStream,
    pub noise: Option<snow::TransportState>,
    /// Everything that was written to and read from the socket.
    pub sent: Vec<u8>,
    pub received: Vec<u8>,
    plain: Vec<u8>,
}

impl RawPeer {
    pub fn connect(addr: SocketAddr) -> RawPeer {
        let stream = TcpStream::connect(addr).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        RawPeer { stream, noise: None, sent: Vec::new(), received: Vec::new(), plain: Vec::new() }
    }

    pub fn write_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
        self.sent.extend(bytes);
    }

    pub fn read_raw(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        self.received.extend(&bytes);
        bytes
    }

    /// `bytes` as they cross the wire: one record, if there are keys.
    pub fn seal(&mut self, bytes: &[u8]) -> Vec<u8> {
        let Some(noise) = &mut self.noise else { return bytes.to_vec() };
        let mut record = vec![0; 2 + bytes.len() + 16];
        let len = noise.write_message(bytes, &mut record[2..]).unwrap();
        record[..2].copy_from_slice(&(len as u16).to_le_bytes());
        record
    }

    pub fn write(&mut self, bytes: &[u8]) {
        let sealed = self.seal(bytes);
        self.write_raw(&sealed);
    }

    pub fn read(&mut self, count: usize) -> Vec<u8> {
        if self.noise.is_none() {
            return self.read_raw(count);
        }
        while self.plain.len() < count {
            let header = self.read_raw(2);
            let record = self.read_raw(usize::from(u16::from_le_bytes([header[0], header[1]])));
            let mut plain = vec![0; record.len()];
            let len = self.noise.as_mut().unwrap().read_message(&record, &mut plain).unwrap();
            self.plain.extend(&plain[..len]);
        }
        let rest = self.plain.split_off(count);
        std::mem::replace(&mut self.plain, rest)
    }

    /// Reads the answer: its code, and the acceptor's instance or the text.
    pub fn read_answer(&mut self) -> (u8, u64, String) {
        let fixed = self.read(24);
        assert_eq!(fixed[..8], *b"PLVRANSW");
        let text = self.read(usize::from(u16::from_le_bytes([fixed[10], fixed[11]])));
        (fixed[8], u64::from_le_bytes(fixed[16..24].try_into().unwrap()), String::from_utf8(text).unwrap())
    }

    /// Waits for the end of the connection; true if it came without a byte before.
    pub fn has_ended(&mut self) -> bool {
        // A reset if we sent what was never read.
        !matches!(self.stream.read(&mut [0]), Ok(1..))
    }

    pub fn addr(&self) -> SocketAddr {
        self.stream.local_addr().unwrap()
    }
}

/// A message as it stands on the control lane.
pub fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}

/// All that the test program logged.
#[derive(Debug, Clone, Copy)]
pub struct Log;

static LOGGED: Mutex<Vec<u8>> = Mutex::new(Vec::new());

impl Log {
    pub fn start() -> Log {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log);
            tracing::subscriber::set_global_default(subscriber.finish()).unwrap();
        });
        Log
    }

    /// The lines that have all of `words`, as soon as there is one.
    pub fn wait_for(self, words: &[&str]) -> Vec<String> {
        let deadline = now_us() + 20_000_000;
        loop {
            let text = String::from_utf8(LOGGED.lock().unwrap().clone()).unwrap();
            let fits = |line: &&str| words.iter().all(|word| line.contains(word));
            let lines: Vec<String> = text.lines().filter(fits).map(str::to_owned).collect();
            if !lines.is_empty() {
                return lines;
            }
            assert!(now_us() < deadline, "no line with {words:?} in\n{text}");
            std::thread::yield_now();
        }
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOGGED.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
