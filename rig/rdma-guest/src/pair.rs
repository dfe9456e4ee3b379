//! One of two guests that send each other messages, as long as it takes: a connection that ends begins anew, from the first
//! message on.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Result, ensure};
use dataplane::fabric::conformance::End;
use dataplane::fabric::{FabricConfig, Listener, NodeIdentity};

use crate::{LIMIT, replicas, security};

/// Lines on the console: each so many messages.
const TELL_EACH: u64 = 20;
const DONE: &[u8] = b"done";
const LONGEST_BYTES: u64 = 1 << 17;

/// Message `number` of a sender: of all lengths up to the longest, short ones as often as long ones.
fn message(sender: u8, number: u64) -> Vec<u8> {
    let mut word = (number << 8 | u64::from(sender)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word
    };
    let longest = LONGEST_BYTES >> (next() % 12);
    let length = DONE.len() as u64 + 1 + next() % longest;
    (0..length.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(length as usize).collect()
}

/// Sends `count` messages to the other of the `addresses` and takes as many.
///
/// # Errors
/// A message that is not what was sent, or the time is over.
pub fn run(me: u8, addresses: [IpAddr; 2], count: u64) -> Result<()> {
    let listener = Listener::bind(
        SocketAddr::new(addresses[usize::from(me)], crate::PORT),
        NodeIdentity::new(&format!("node{me}"))?,
        security(),
    )?;
    let config = FabricConfig { silence_timeout_us: 3_000_000, ..FabricConfig::default() };
    let mut end = End::new(listener, replicas(&addresses), me, &config);
    let start = Instant::now();
    let (mut connections, mut sent, mut received, mut peer_is_done) = (0, 0, 0, false);
    while sent <= count || !peer_is_done || end.fabric.queued_bytes(end.peer) > 0 {
        ensure!(start.elapsed() < LIMIT, "{sent} sent, {received} received, lost {:?}", end.lost);
        end.step(100_000);
        if end.lost.len() == end.connected.len() {
            continue;
        }
        if connections < end.connected.len() {
            connections = end.connected.len();
            // What came before the new connection is of the old one.
            (sent, received, peer_is_done) = (0, 0, false);
            println!("connected {connections}");
        }
        while let Some(bytes) = end.messages.pop_front() {
            if bytes == DONE {
                ensure!(received == count, "the peer is done after {received} messages");
                peer_is_done = true;
                continue;
            }
            ensure!(bytes == message(1 - me, received), "message {received} of connection {connections} is another");
            received += 1;
            if received % TELL_EACH == 0 {
                println!("received {received}");
            }
        }
        for _ in 0..4 {
            // Replica 1 has the last word, so that each knows that all has arrived.
            let may_end = me == 0 || peer_is_done;
            if end.fabric.is_connected(end.peer) && (sent < count || sent == count && may_end) {
                let next = if sent < count { message(me, sent) } else { DONE.to_vec() };
                sent += u64::from(end.send(&next));
            }
        }
    }
    let before = end.lost.len();
    while me == 1 && end.lost.len() == before {
        ensure!(start.elapsed() < LIMIT, "the peer does not leave");
        end.step(100_000);
    }
    println!("exchanged {count} over connection {connections}; ended before: {:?}", &end.lost[..before]);
    Ok(())
}
