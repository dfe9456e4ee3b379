//! iperf3 and redis-benchmark in the client's namespace, out of the packages that the guests are made of.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::guest::artifacts_dir;
use rig::{Host, Service};
use serde_json::Value;

use crate::Effort;
use crate::peers::output;
use crate::pin::pin;

/// Longest run of a tool, far above what it is asked to take.
const LIMIT: Duration = Duration::from_secs(60);
/// iperf3's server needs a moment after a test until it serves the next one.
const SERVER_LIMIT: Duration = Duration::from_secs(5);
/// Bytes of a value that redis-benchmark sets.
const VALUE_BYTES: &str = "64";

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the client into the guest.
    In,
    /// Out of the guest.
    Out,
}

/// What redis-benchmark found, in one run or several.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Answers, of SETs and GETs.
    requests: f64,
    seconds: f64,
    /// How many answers took this long in microseconds, rounded up to the next time that is reported: near the 99th of a hundred
    /// that is every eighth of a percent or closer.
    times: Vec<(f64, u64)>,
}

impl Load {
    /// Adds another run's.
    pub fn add(&mut self, other: Load) {
        self.requests += other.requests;
        self.seconds += other.seconds;
        self.times.extend(other.times);
    }

    /// Over SETs and GETs, which come one after the other.
    pub fn requests_per_s(&self) -> f64 {
        self.requests / self.seconds
    }

    /// The time within which 99 % are answered.
    pub fn p99_us(&self) -> f64 {
        let mut times = self.times.clone();
        times.sort_by(|one, other| one.0.total_cmp(&other.0));
        let total: u64 = times.iter().map(|(_, count)| count).sum();
        let mut seen = 0;
        let reached = times.iter().find(|(_, count)| {
            seen += count;
            100 * seen >= 99 * total
        });
        reached.map_or(0.0, |(us, _)| *us)
    }
}

/// Where the tools run.
#[derive(Clone, Copy)]
pub struct Client<'a> {
    /// Its network namespace.
    pub host: &'a Host,
    /// The CPU.
    pub cpu: usize,
    /// For their output.
    pub directory: &'a Path,
}

impl Client<'_> {
    /// Bytes that arrived, in Gbit/s, over one TCP connection.
    ///
    /// # Errors
    /// The tool fails, or not all bytes arrived.
    pub fn iperf(&self, guest: Ipv4Addr, direction: Direction, effort: Effort) -> Result<f64> {
        let guest = guest.to_string();
        let mut arguments = vec!["--client", &guest, "--json"];
        arguments.extend(["--bytes", effort.pick("128M", "4M")]);
        arguments.extend((direction == Direction::Out).then_some("--reverse"));
        let start = Instant::now();
        loop {
            // With --json it reports most errors there and succeeds.
            let outcome = self.output("iperf3", &arguments).and_then(|text| received(&serde_json::from_str(&text)?));
            let Err(error) = outcome else { return outcome };
            let text = format!("{error:#}");
            let between_tests = text.contains("server is busy") || text.contains("Connection refused");
            ensure!(between_tests && start.elapsed() < SERVER_LIMIT, error);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// SETs, then GETs, `requests` of each, from that many clients that wait for each answer.
    ///
    /// # Errors
    /// The tool fails, or the guest's Redis counted another number of requests.
    pub fn redis(&self, guest: Ipv4Addr, clients: u32, requests: u32) -> Result<Load> {
        let before = self.commands(guest)?;
        let [guest_text, clients, count] = [guest.to_string(), clients.to_string(), requests.to_string()];
        let arguments = ["-h", &guest_text, "-c", &clients, "-n", &count, "-d", VALUE_BYTES, "-t", "set,get"];
        let text = self.output("redis-benchmark", &arguments)?;
        let after = self.commands(guest)?;
        for (kind, before, after) in [("set", before[0], after[0]), ("get", before[1], after[1])] {
            let counted = after - before;
            // The last answer ends the benchmark, requests of other clients may then be under way.
            ensure!(
                counted >= u64::from(requests),
                "the guest's Redis served {counted} requests «{kind}» instead of {requests}"
            );
        }
        load(&text).with_context(|| format!("redis-benchmark said: {text}"))
    }

    /// SETs and GETs that the guest's Redis has served.
    fn commands(&self, guest: Ipv4Addr) -> Result<[u64; 2]> {
        let text = self.host.namespace().run(|| info(guest))?;
        let text = text.with_context(|| format!("no statistics from the Redis at {guest}"))?;
        Ok(["set", "get"].map(|kind| calls(&text, kind)))
    }

    fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let command = tool(program, arguments)?;
        self.host.namespace().run(|| {
            pin(self.cpu)?;
            output(command, self.directory, LIMIT)
        })?
    }
}

/// A program out of the guests' packages, by their own loader.
fn tool(program: &str, arguments: &[&str]) -> Result<Command> {
    let root = artifacts_dir().join("guest-root");
    let path = root.join("usr/bin").join(program);
    ensure!(path.exists(), "{} is missing; run «cargo xtask setup»", path.display());
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|place| root.join(place));
    let search = libraries.map(|place| place.display().to_string()).join(":");
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(root.join("lib64/ld-linux-x86-64.so.2"));
    command.arg("--library-path").arg(search).arg(path).args(arguments).stdin(Stdio::null());
    Ok(command)
}

/// From iperf3's report.
fn received(report: &Value) -> Result<f64> {
    let [sent, received] = ["sum_sent", "sum_received"].map(|sum| &report["end"][sum]);
    let bytes = |sum: &Value| sum["bytes"].as_u64().unwrap_or_default();
    ensure!(
        bytes(received) > 0 && bytes(received) <= bytes(sent),
        "iperf3 sent {} bytes and received {}: {report}",
        bytes(sent),
        bytes(received)
    );
    let rate = received["bits_per_second"].as_f64().context("iperf3 reports no rate")?;
    Ok(rate / 1e9)
}

/// From redis-benchmark's report: for each kind its name, then a distribution of times with cumulative counts, and the rate. Lines
/// of progress end with a carriage return.
fn load(text: &str) -> Result<Load> {
    let mut load = Load::default();
    let (mut kinds, mut counts, mut in_percentiles) = (Vec::new(), 0, false);
    for line in text.split(['\n', '\r']).map(str::trim) {
        if let Some(kind) = line.strip_prefix("====== ").and_then(|rest| rest.strip_suffix(" ======")) {
            kinds.push(kind.to_owned());
            counts = 0;
        } else if line.ends_with(':') {
            in_percentiles = line == "Latency by percentile distribution:";
        } else if let (true, Some((us, cumulative))) = (in_percentiles, percentile(line)) {
            load.times.push((us, cumulative.checked_sub(counts).context("a cumulative count that falls")?));
            counts = cumulative;
        } else if let Some(rest) = line.strip_prefix("throughput summary: ") {
            let rate: f64 = rest.split(' ').next().context("no rate")?.parse()?;
            load.requests += counts as f64;
            load.seconds += counts as f64 / rate;
        }
    }
    ensure!(kinds == ["SET", "GET"], "reports for {kinds:?}");
    ensure!(load.requests > 0.0 && load.seconds.is_finite(), "no rates");
    Ok(load)
}

/// `99.219% <= 0.551 milliseconds (cumulative count 1985)`, as microseconds and count.
fn percentile(line: &str) -> Option<(f64, u64)> {
    let (_, rest) = line.split_once("% <= ")?;
    let (ms, rest) = rest.split_once(" milliseconds (cumulative count ")?;
    Some((ms.parse::<f64>().ok()? * 1e3, rest.strip_suffix(')')?.parse().ok()?))
}

/// What Redis has counted per command.
fn info(guest: Ipv4Addr) -> Result<String> {
    let stream = TcpStream::connect_timeout(&(guest, Service::Redis.port()).into(), SERVER_LIMIT)?;
    stream.set_read_timeout(Some(SERVER_LIMIT))?;
    (&stream).write_all(b"INFO commandstats\r\n")?;
    let mut answer = BufReader::new(&stream);
    let mut header = String::new();
    answer.read_line(&mut header)?;
    let length: usize = header.trim().strip_prefix('$').context("not a bulk string")?.parse()?;
    let mut text = vec![0; length];
    answer.read_exact(&mut text)?;
    Ok(String::from_utf8(text)?)
}

fn calls(info: &str, command: &str) -> u64 {
    let prefix = format!("cmdstat_{command}:calls=");
    let count = info.lines().find_map(|line| line.strip_prefix(&prefix)?.split(',').next()?.parse().ok());
    // No line: never called.
    count.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "SET: rps=0.0 (overall: nan) avg_msec=nan (overall: nan)\r====== SET ======                     \n  \
        100 requests completed in 0.05 seconds\n\nLatency by percentile distribution:\n\
        0.000% <= 0.100 milliseconds (cumulative count 1)\n98.000% <= 0.300 milliseconds (cumulative count 98)\n\
        100.000% <= 2.000 milliseconds (cumulative count 100)\n\nCumulative distribution of latencies:\n\
        100.000% <= 2.103 milliseconds (cumulative count 100)\n\nSummary:\n  throughput summary: 2000.00 requests per second\n\
        \n====== GET ======\n\nLatency by percentile distribution:\n99.000% <= 0.500 milliseconds (cumulative count 99)\n\
        100.000% <= 0.700 milliseconds (cumulative count 100)\n\nSummary:\n  throughput summary: 6000.00 requests per second\n";

    #[test]
    fn redis_benchmark_is_understood() {
        let mut load_of_both = load(REPORT).unwrap();
        assert!((load_of_both.requests_per_s() - 3000.0).abs() < 1e-6, "{load_of_both:?}");
        // 197 of 200 within 0.5 ms, 198 within 0.7 ms.
        assert!((load_of_both.p99_us() - 700.0).abs() < 1e-6, "{load_of_both:?}");
        load_of_both.add(load(&REPORT.replace("2.000 mill", "0.400 mill")).unwrap());
        assert!((load_of_both.requests_per_s() - 3000.0).abs() < 1e-6, "{load_of_both:?}");
        // 396 of 400: two took 2 ms, two 0.7 ms.
        assert!((load_of_both.p99_us() - 500.0).abs() < 1e-6, "{load_of_both:?}");
        let set_only = REPORT.split("====== GET").next().unwrap();
        assert!(load(set_only).unwrap_err().to_string().contains("SET"));
        assert!(load("Could not connect\n").is_err());
        assert!(load(&REPORT.replace("count 98)", "count 0)")).is_err());
    }

    #[test]
    fn iperf_counts_what_arrived() {
        let report = |sent: u64, received: u64| {
            serde_json::json!({"end": {
                "sum_sent": {"bytes": sent, "bits_per_second": 9e9},
                "sum_received": {"bytes": received, "bits_per_second": 2e9},
            }})
        };
        assert!((received(&report(1000, 900)).unwrap() - 2.0).abs() < 1e-9);
        assert!(received(&report(1000, 0)).is_err());
        assert!(received(&report(900, 1000)).is_err());
        assert!(received(&serde_json::json!({"error": "busy"})).is_err());
    }

    #[test]
    fn redis_counts_commands() {
        let info = "# Commandstats\r\ncmdstat_get:calls=7,usec=9\r\ncmdstat_config|get:calls=3,usec=1\r\n";
        assert_eq!((calls(info, "get"), calls(info, "set")), (7, 0));
    }
}
