//! Nodes on the loopback interface, driven by the test's own thread.

use dataplane::fabric::{
    Fabric, FabricConfig, FabricEvent, Listener, LostReason, NodeIdentity, PeerId, Refusal, Replica, TcpFabric,
};
use dataplane::wait::{Poller, now_us};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

pub const GROUP: &str = "vm1";

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
    let identity = NodeIdentity { name: name.to_owned(), instance };
    Listener::bind("127.0.0.1:0".parse().unwrap(), identity).unwrap()
}

pub fn replicas(addrs: &[SocketAddr]) -> Vec<Replica> {
    let node =
        |(id, addr): (usize, &SocketAddr)| Replica { id: PeerId(id as u8), node: format!("node{id}"), addr: *addr };
    addrs.iter().enumerate().map(node).collect()
}

/// One replica: its fabric and what it reported.
pub struct Node {
    pub fabric: TcpFabric,
    pub seen: Vec<Seen>,
    poller: Arc<Poller>,
}

impl Node {
    pub fn new(listener: &Listener, addrs: &[SocketAddr], me: u8, config: FabricConfig) -> Node {
        let port = listener.register(GROUP, replicas(addrs), PeerId(me)).unwrap();
        let poller = Arc::new(Poller::new().unwrap());
        let fabric = TcpFabric::new(config, port.control, Arc::clone(&poller), 1000, now_us()).unwrap();
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
    let (left, right) = (listen("node0", 100), listen("node1", 101));
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
    pub lane: u8,
    pub from: u8,
    pub to: u8,
    pub instance: u64,
    pub group: String,
    pub node: String,
}

impl RawHello {
    /// Replica 0 on node0 to replica 1.
    pub fn good(instance: u64) -> RawHello {
        RawHello {
            magic: *b"PLVRHELO",
            version: 1,
            lane: 1,
            from: 0,
            to: 1,
            instance,
            group: GROUP.to_owned(),
            node: "node0".to_owned(),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(((48 + self.group.len() + self.node.len()) as u16).to_le_bytes());
        out.extend([self.lane, self.from, self.to, self.group.len() as u8, self.node.len() as u8]);
        out.extend([0; 7]);
        out.extend(self.instance.to_le_bytes());
        out.extend([0; 16]);
        out.extend(self.group.as_bytes());
        out.extend(self.node.as_bytes());
        out
    }

    /// Connects and sends it.
    pub fn dial(&self, addr: SocketAddr) -> TcpStream {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(&self.bytes()).unwrap();
        stream
    }
}

/// Reads the answer: its code, and the acceptor's instance or the text.
pub fn read_answer(stream: &mut TcpStream) -> (u8, u64, String) {
    let mut fixed = [0; 24];
    stream.read_exact(&mut fixed).unwrap();
    assert_eq!(fixed[..8], *b"PLVRANSW");
    let mut text = vec![0; u16::from_le_bytes([fixed[10], fixed[11]]) as usize];
    stream.read_exact(&mut text).unwrap();
    (fixed[8], u64::from_le_bytes(fixed[16..24].try_into().unwrap()), String::from_utf8(text).unwrap())
}

/// A message as it stands on the control lane.
pub fn framed(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_le_bytes(), bytes].concat()
}
