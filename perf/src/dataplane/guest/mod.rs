//! A real guest on our device and uplink, unprotected, against the same guest on QEMU's own TAP backend.
//!
//! Both guests boot once and stay; runs alternate, and the one that is not measured is idle. What is measured are the tools
//! that people know, iperf3 and redis-benchmark. Rejected: the rig's own checking client, which is fast and trustworthy, but
//! whose figures nobody can set beside his own.

mod pair;
mod tools;

use anyhow::{Context, Result};
use rig::Testbed;

use crate::Effort;
use crate::group::Sink;
use crate::pin::two_cpus;
use crate::results::Scratch;
use crate::row::Row;
use crate::sample::{Better, Figure, compare};
use pair::Pair;
use tools::{Client, Direction, Load};

const PEER: &str = "QEMU tap netdev";
/// Clients of redis-benchmark, and how many requests of a kind they send in a turn: about half a second's worth, or very few.
const LOADS: [(u32, u32, u32); 3] = [(1, 400, 50), (16, 1_300, 100), (64, 1_600, 200)];
/// Turns of either side in a run.
const SLICES: usize = 3;

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

/// Both figures come from the same runs, each of which is [`SLICES`] turns of either side: a virtual CPU's speed changes from one
/// second to the next, and p99 of one turn is a handful of requests. The comparisons take what was measured before them.
fn redis(client: &Client<'_>, pair: &Pair<'_>, clients: u32, requests: u32, effort: Effort) -> Result<[Row; 2]> {
    let guests = [pair.ours(), pair.peer()];
    let mut loads = [Vec::new(), Vec::new()];
    for _ in 0..=effort.runs() {
        let mut run = [Load::default(), Load::default()];
        for slice in 0..SLICES {
            // AB BA AB …
            for side in [slice % 2, 1 - slice % 2] {
                run[side].add(client.redis(guests[side], clients, requests)?);
            }
        }
        loads.iter_mut().zip(run).for_each(|(loads, load)| loads.push(load));
    }
    let [ours, peer] = &loads;
    let row = |id: &str, unit, better, value: fn(&Load) -> f64| {
        let id = format!("guest.redis.c{clients}.{id}");
        let next = |loads: &'_ [Load]| {
            let values: Vec<f64> = loads.iter().map(value).collect();
            let mut values = values.into_iter();
            move || values.next().context("more runs than before")
        };
        compare(Figure { id: &id, unit, better }, effort, PEER, next(ours), next(peer))
    };
    Ok([row("rps", "1/s", Better::Higher, Load::requests_per_s)?, row("p99", "us", Better::Lower, Load::p99_us)?])
}
