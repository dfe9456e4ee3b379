//! A real guest on our device and uplink, unprotected, against the same guest on QEMU's own TAP backend.
//!
//! Both guests boot once and stay; runs alternate, and the one that is not measured is idle. What is measured are the tools
//! that people know, iperf3 and redis-benchmark. Rejected: the rig's own checking client, which is fast and trustworthy, but
//! whose figures nobody can set beside his own.

mod pair;
mod tools;

use std::cell::RefCell;
use std::collections::VecDeque;

use anyhow::{Context, Result};
use rig::Testbed;

use crate::Effort;
use crate::group::Sink;
use crate::pin::two_cpus;
use crate::results::Scratch;
use crate::row::Row;
use crate::sample::{Better, Figure, compare};
use pair::Pair;
use tools::{Client, Direction};

const PEER: &str = "QEMU tap netdev";
/// Clients of redis-benchmark, and how many requests of a kind they send in a run: about a second's worth, or very few.
const LOADS: [(u32, u32, u32); 3] = [(1, 1_500, 100), (16, 5_000, 500), (64, 5_000, 500)];

/// Measures everything.
///
/// # Errors
/// Not root, a guest that does not come up, or a tool that fails.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    let bed = Testbed::new().context("guest.* boots guests")?;
    let outcome = measure(&bed, effort, sink);
    if outcome.is_err() {
        bed.keep_logs()?;
    }
    outcome
}

fn measure(bed: &Testbed, effort: Effort, sink: Sink<'_>) -> Result<()> {
    let cpus = two_cpus()?;
    let scratch = Scratch::new(&std::env::temp_dir(), "plover-perf-guest")?;
    let pair = Pair::boot(bed, cpus)?;
    let client = Client { host: bed.client(), cpu: cpus[1], directory: scratch.path() };
    for (id, direction) in [("guest.iperf.in", Direction::In), ("guest.iperf.out", Direction::Out)] {
        if !sink.wants(id) {
            continue;
        }
        let figure = Figure { id, unit: "Gbit/s", better: Better::Higher };
        let run = |guest| client.iperf(guest, direction, effort);
        sink(compare(figure, effort, PEER, || run(pair.ours()), || run(pair.peer()))?)?;
    }
    for (clients, full, smoke) in LOADS {
        // Both of its rows come from the same runs.
        if !sink.wants_some(&format!("guest.redis.c{clients}.")) {
            continue;
        }
        for row in redis(&client, &pair, clients, effort.pick(full, smoke), effort)? {
            sink(row)?;
        }
    }
    pair.check()
}

/// Both figures come from the same runs: what the second comparison takes was left by the first, which calls in the same order.
fn redis(client: &Client<'_>, pair: &Pair<'_>, clients: u32, requests: u32, effort: Effort) -> Result<[Row; 2]> {
    let p99s = [const { RefCell::new(VecDeque::new()) }; 2];
    let rate = |side: usize, guest| {
        let load = client.redis(guest, clients, requests)?;
        p99s[side].borrow_mut().push_back(load.p99_us);
        Ok(load.requests_per_s)
    };
    let p99 = |side: usize| p99s[side].borrow_mut().pop_front().context("more runs than before");
    let ids = ["rps", "p99"].map(|figure| format!("guest.redis.c{clients}.{figure}"));
    let rates = Figure { id: &ids[0], unit: "1/s", better: Better::Higher };
    let rates = compare(rates, effort, PEER, || rate(0, pair.ours()), || rate(1, pair.peer()))?;
    let times = Figure { id: &ids[1], unit: "us", better: Better::Lower };
    let times = compare(times, effort, PEER, || p99(0), || p99(1))?;
    Ok([rates, times])
}
