//! What runs inside the guests of `rig/tests/rdma.rs`: the fabric over RDMA.

use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dataplane::fabric::conformance::{self, Bed, End, Loopback};
use dataplane::fabric::rdma::{rtt, selftest};
use dataplane::fabric::{FabricConfig, FabricKey, PeerId, Replica, Security, Transport};

mod pair;
mod replica;

const PORT: u16 = 7400;
/// Nothing in here takes longer.
const LIMIT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["selftest", address] => parse(address).map(lane_cases).and_then(|()| round_trips(address, "3", "200")),
        ["conformance", address] => parse(address).map(fabric_cases),
        ["child"] => {
            conformance::run_child();
            Ok(())
        }
        ["rtt", address, runs, trips] => round_trips(address, runs, trips),
        ["pair", me, ref addresses @ .., count] => pair_of(me, addresses, count),
        ["replica", me, ref addresses @ ..] => replica_of(me, addresses),
        _ => Err(anyhow::anyhow!("unknown arguments {words:?}")),
    };
    match outcome {
        Ok(()) => {
            println!("PLOVER-RDMA-OK {}", words[0]);
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("PLOVER-RDMA-FAILED {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn parse(address: &str) -> Result<IpAddr> {
    address.parse().with_context(|| format!("«{address}» is no address"))
}

fn parse_all<const N: usize>(addresses: &[&str]) -> Result<[IpAddr; N]> {
    let parsed: Vec<IpAddr> = addresses.iter().map(|address| parse(address)).collect::<Result<_>>()?;
    parsed.try_into().map_err(|other: Vec<_>| anyhow::anyhow!("{N} addresses are needed, not {}", other.len()))
}

fn pair_of(me: &str, addresses: &[&str], count: &str) -> Result<()> {
    pair::run(me.parse()?, parse_all(addresses)?, count.parse()?)
}

fn replica_of(me: &str, addresses: &[&str]) -> Result<()> {
    replica::run(me.parse()?, parse_all(addresses)?)
}

/// The group's replicas, one at each address.
fn replicas(addresses: &[IpAddr]) -> Vec<Replica> {
    let replica = |(id, address): (u8, &IpAddr)| Replica {
        id: PeerId(id),
        node: format!("node{id}"),
        addr: SocketAddr::new(*address, PORT),
        transports: vec![Transport::Rdma],
    };
    (0..).zip(addresses).map(replica).collect()
}

fn security() -> Security {
    Security::Encrypted(FabricKey::from_bytes(*b"the key of the rig's RDMA guests"))
}

/// The lane by itself, both ends in this process. A case that fails panics, which ends the guest with its status.
fn lane_cases(address: IpAddr) {
    println!("the device takes {} bytes into a work request", selftest::inline_bytes(address));
    for (name, case) in selftest::CASES {
        timed(name, || case(address));
    }
}

/// Round trips over the lane and over bare RDMA WRITE, in turns: the medians of each run as a line of JSON. The first run
/// warms up.
fn round_trips(address: &str, runs: &str, trips: &str) -> Result<()> {
    let address = parse(address)?;
    let (runs, trips): (usize, usize) = (runs.parse()?, trips.parse()?);
    let (mut lanes, mut bare) = (rtt::Lanes::new(address), rtt::Bare::new(address));
    let mut ours = || median_us(lanes.round_trips(trips));
    let mut peers = || median_us(bare.round_trips(trips));
    for run in 0..runs {
        let (ours_us, bare_us);
        // As perf pairs them: AB, then AB BA AB …
        if run == 0 || run % 2 == 1 {
            ours_us = ours();
            bare_us = peers();
        } else {
            bare_us = peers();
            ours_us = ours();
        }
        println!("{}", serde_json::json!({ "ours_us": ours_us, "bare_us": bare_us }));
    }
    Ok(())
}

fn median_us(mut times_ns: Vec<u64>) -> f64 {
    times_ns.sort_unstable();
    times_ns[times_ns.len() / 2] as f64 / 1000.0
}

/// What every transport must keep, between two nodes at this address.
fn fabric_cases(address: IpAddr) {
    let child = || {
        let mut command = Command::new("/proc/self/exe");
        command.arg("child");
        command
    };
    for (name, case) in conformance::CASES {
        let bed = Loopback::encrypted(address, Transport::Rdma, Some(child));
        match *name {
            "silence" => timed(name, || case(&mut { bed })),
            _ => timed(name, || case(&mut Patient(bed))),
        }
    }
}

/// An emulated machine may stand still for as long as a real one may be silent.
struct Patient(Loopback);

impl Bed for Patient {
    fn end(&mut self, me: u8, config: &FabricConfig) -> End {
        const PATIENCE_US: u64 = 30_000_000;
        let FabricConfig { silence_timeout_us, connect_timeout_us, .. } = *config;
        self.0.end(
            me,
            &FabricConfig {
                silence_timeout_us: silence_timeout_us.max(PATIENCE_US),
                connect_timeout_us: connect_timeout_us.max(PATIENCE_US),
                ..config.clone()
            },
        )
    }

    fn child(&mut self) -> Option<Child> {
        self.0.child()
    }
}

fn timed(name: &str, case: impl FnOnce()) {
    let start = Instant::now();
    case();
    println!("case {name}: ok ({:.1} s)", start.elapsed().as_secs_f32());
}
