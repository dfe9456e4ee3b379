//! In steady state an encrypted control connection allocates nothing, whatever the size of its messages.
//!
//! A test binary of its own, because it counts with the global allocator. The count is per thread: the harness and the
//! listeners allocate on others.

use counting_allocator::{Counting, allocations};
use dataplane::fabric::{
    Fabric, FabricConfig, FabricEvent, FabricKey, Listener, NodeIdentity, PeerFabric, PeerId, Replica, Security,
};
use dataplane::wait::{Poller, now_us};
use std::sync::Arc;

#[global_allocator]
static COUNTING: Counting = Counting;

const A: PeerId = PeerId(0);
const B: PeerId = PeerId(1);
const DEADLINE_US: u64 = 20_000_000;

struct Pair {
    fabrics: [PeerFabric; 2],
    _listeners: [Listener; 2],
}

impl Pair {
    fn connect(security: &Security) -> Pair {
        let listeners = ["node0", "node1"].map(|name| {
            let identity = NodeIdentity::new(name).unwrap();
            Listener::bind("127.0.0.1:0".parse().unwrap(), identity, security.clone()).unwrap()
        });
        let replica = |(id, listener): (u8, &Listener)| Replica {
            id: PeerId(id),
            node: listener.identity().name.clone(),
            addr: listener.local_addr(),
            transports: Vec::new(),
        };
        let replicas: Vec<Replica> = (0..).zip(&listeners).map(replica).collect();
        let fabric = |me: PeerId| {
            let port = listeners[usize::from(me.0)].register("vm1", replicas.clone(), me).unwrap();
            let poller = Arc::new(Poller::new().unwrap());
            PeerFabric::new(FabricConfig::default(), port.control, poller, 1000, now_us()).unwrap()
        };
        let mut pair = Pair { fabrics: [fabric(A), fabric(B)], _listeners: listeners };
        let deadline_us = now_us() + DEADLINE_US;
        while !pair.fabrics[0].is_connected(B) || !pair.fabrics[1].is_connected(A) {
            for fabric in &mut pair.fabrics {
                fabric.poll(now_us(), &mut |_| {});
            }
            assert!(now_us() < deadline_us, "{:?}", pair.fabrics[0].trouble(B));
        }
        pair
    }

    /// Sends a message of these parts `count` times at once, there and then back.
    fn round_trip(&mut self, parts: &[&[u8]], count: usize) {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        for (from, to) in [(A, B), (B, A)] {
            for _ in 0..count {
                self.fabrics[usize::from(from.0)].send(to, parts).unwrap();
            }
            let deadline_us = now_us() + DEADLINE_US;
            let mut arrived = 0;
            while arrived < count {
                for fabric in &mut self.fabrics {
                    fabric.poll(now_us(), &mut |event| match event {
                        FabricEvent::Message { peer, bytes: got } if peer == from && got.len() == bytes => arrived += 1,
                        other => panic!("{other:?}"),
                    });
                }
                assert!(now_us() < deadline_us, "a message did not arrive");
            }
        }
    }
}

#[test]
fn messages_allocate_nothing_once_the_buffers_have_their_size() {
    let payload = vec![7; 1 << 20];
    for security in [Security::Encrypted(FabricKey::generate().unwrap()), Security::Insecure] {
        let mut pair = Pair::connect(&security);
        // More than a socket takes: now the queues and the buffers have their size.
        pair.round_trip(&[&payload], 12);
        let before = allocations();
        for _ in 0..20 {
            for len in [1, 64, 1500, 60_000, 65_519, 200_000, 1 << 20] {
                let (head, tail) = payload[..len].split_at(len / 3);
                pair.round_trip(&[head, tail], 1);
            }
        }
        assert_eq!(allocations() - before, 0, "{security:?}");
    }
    // The counter counts.
    let before = allocations();
    drop(std::hint::black_box(vec![1u8; 100]));
    assert_eq!(allocations() - before, 1);
}
