//! `consensus.vs_etcd`: inputs of 64 bytes per second, many in flight, against puts of 64 bytes to etcd.
//!
//! Everything that would hold etcd back for reasons other than its own is out of its way: its data lies on a tmpfs,
//! so that its syncs cost nothing; the driver talks to the leader directly, keeps hundreds of puts in flight and
//! costs little CPU itself; the nodes log errors only. What stays is what the two do not share: etcd keeps
//! versions of keys in a B-tree and takes requests over gRPC, while our inputs come into the leader's own process.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::grpc::Client;
use super::trio::Trio;
use crate::Effort;
use crate::peers::{self, Running};
use crate::results::Scratch;
use crate::row::Row;
use crate::sample::{Better, Figure, compare};

const INPUT_BYTES: usize = 64;
/// Our inputs in flight.
const DEPTH: u64 = 2048;
/// Puts in flight, over this many connections.
const PUTS_IN_FLIGHT: usize = 512;
const CONNECTIONS: usize = 4;
const KEYS: u32 = 1024;
/// etcd writes and syncs here.
const TMPFS: &str = "/dev/shm";
const START_LIMIT: Duration = Duration::from_secs(60);

/// Measures. The calling thread leads our replicas and drives etcd; nothing is pinned, so that the scheduler does
/// for both what it can.
///
/// # Errors
/// etcd was not unpacked or does not start, or one of the sides does not commit everything.
pub fn measure(effort: Effort) -> Result<Row> {
    let (inputs, puts) = effort.pick((200_000, 8_000), (5_000, 500));
    let mut cluster = Cluster::start()?;
    let client = cluster.client_of_the_leader()?;
    let peer = format!("{} x 3 on tmpfs, gRPC puts, {PUTS_IN_FLIGHT} in flight", version()?);
    let mut trio = Trio::start(None)?;
    let figure = Figure { id: "consensus.vs_etcd", unit: "inputs/s", better: Better::Higher };
    let keys: Vec<Vec<u8>> = (0..KEYS).map(|key| format!("key{key:05}").into_bytes()).collect();
    let mut run = 0u8;
    let row = compare(
        figure,
        effort,
        &peer,
        || per_second(inputs, || trio.commit_many(inputs, DEPTH, &[7; INPUT_BYTES])),
        || {
            run = run.wrapping_add(1);
            let value = [run; INPUT_BYTES];
            let (before, _) = client.get(&keys[0])?;
            let rate = per_second(puts, || client.put_many(puts, PUTS_IN_FLIGHT, &keys, &value))?;
            let (after, found) = client.get(&keys[0])?;
            ensure!(after - before == puts && found == value, "{} of {puts} puts are in etcd", after - before);
            Ok(rate)
        },
    )?;
    trio.close()?;
    cluster.check()?;
    Ok(row)
}

fn per_second(count: u64, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// «etcd 3.4.23».
fn version() -> Result<String> {
    let scratch = Scratch::new(&std::env::temp_dir(), "etcd-version")?;
    let mut command = peers::command("etcd")?;
    command.arg("--version");
    let said = peers::output(command, scratch.path(), START_LIMIT)?;
    let number = said.lines().find_map(|line| line.strip_prefix("etcd Version: "));
    Ok(format!("etcd {}", number.context("etcd does not say its version")?.trim()))
}

/// Three nodes on loopback. The processes end before their directories go.
struct Cluster {
    nodes: Vec<Running>,
    clients: Vec<SocketAddr>,
    scratch: Scratch,
}

impl Cluster {
    fn start() -> Result<Cluster> {
        ensure!(is_tmpfs(Path::new(TMPFS))?, "{TMPFS} is no tmpfs: etcd's syncs would cost what ours do not");
        let scratch = Scratch::new(Path::new(TMPFS), "plover-perf-etcd")?;
        let ports = free_ports(6)?;
        let (clients, members) = ports.split_at(3);
        let url = |addr: &SocketAddr| format!("http://{addr}");
        let named = |(id, addr): (usize, &SocketAddr)| format!("n{id}={}", url(addr));
        let everybody = members.iter().enumerate().map(named).collect::<Vec<_>>().join(",");
        let mut cluster = Cluster { nodes: Vec::new(), clients: clients.to_vec(), scratch };
        for id in 0..3 {
            let (client, member) = (url(&clients[id]), url(&members[id]));
            let mut command = peers::command("etcd")?;
            command.arg(format!("--name=n{id}"));
            command.arg(format!("--data-dir={}", cluster.scratch.path().join(format!("n{id}")).display()));
            command.arg(format!("--listen-client-urls={client}")).arg(format!("--advertise-client-urls={client}"));
            command.arg(format!("--listen-peer-urls={member}")).arg(format!("--initial-advertise-peer-urls={member}"));
            command.arg(format!("--initial-cluster={everybody}")).arg("--initial-cluster-state=new");
            // While ours is measured the nodes wait for the CPU: that must not cost them their leader.
            command.args(["--heartbeat-interval=300", "--election-timeout=3000"]);
            command.args(["--logger=zap", "--log-level=error", "--log-outputs=stderr"]);
            cluster.launch(id, command)?;
        }
        Ok(cluster)
    }

    fn launch(&mut self, id: usize, mut command: Command) -> Result<()> {
        let log = std::fs::File::create(self.scratch.path().join(format!("n{id}.log")))?;
        self.nodes.push(Running::start(command.stdout(log.try_clone()?).stderr(log))?);
        Ok(())
    }

    /// Waits until all nodes agree on a leader, and connects to that one.
    fn client_of_the_leader(&mut self) -> Result<Client> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            self.check()?;
            match self.leader() {
                Ok(leader) => return Client::connect(self.clients[leader], CONNECTIONS),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("etcd is not ready after {} s", START_LIMIT.as_secs())));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn leader(&self) -> Result<usize> {
        let status = |addr: &SocketAddr| Client::connect(*addr, 1)?.status();
        let known = self.clients.iter().map(status).collect::<Result<Vec<_>>>()?;
        let leader = known[0].leader;
        ensure!(known.iter().all(|node| node.leader == leader), "the nodes do not agree on a leader: {known:?}");
        known.iter().position(|node| node.member == leader).context("no leader yet")
    }

    /// Fails if a node has ended, with the end of what it said.
    fn check(&mut self) -> Result<()> {
        for (id, node) in self.nodes.iter_mut().enumerate() {
            node.check().with_context(|| {
                let said = std::fs::read_to_string(self.scratch.path().join(format!("n{id}.log")));
                let said = said.unwrap_or_default();
                let tail: Vec<&str> = said.lines().rev().take(3).collect();
                format!("etcd node {id}: {}", tail.join(" / "))
            })?;
        }
        Ok(())
    }
}

/// Ports that nobody listens on now. Somebody else may take one before etcd does; etcd then says so and ends.
fn free_ports(count: usize) -> Result<Vec<SocketAddr>> {
    let held = (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<std::io::Result<Vec<_>>>()?;
    Ok(held.iter().map(TcpListener::local_addr).collect::<std::io::Result<Vec<_>>>()?)
}

fn is_tmpfs(path: &Path) -> Result<bool> {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let Ok(stat) = rustix::fs::statfs(path) else { bail!("{} is missing", path.display()) };
    Ok(stat.f_type == TMPFS_MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_ports_differ_and_a_disk_is_no_tmpfs() {
        let ports = free_ports(6).unwrap();
        let distinct: std::collections::HashSet<u16> = ports.iter().map(SocketAddr::port).collect();
        assert_eq!(distinct.len(), 6);
        assert!(!is_tmpfs(Path::new("/proc")).unwrap());
    }
}
