//! pgbench, out of the guests' packages.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::guest::artifacts_dir;

use super::client::{Client, Speed, from_guests};

/// From its listening until it serves.
const START_LIMIT: Duration = Duration::from_secs(30);

/// What pgbench does: each session waits for each answer.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Sessions.
    pub sessions: u64,
    /// One of pgbench's own scripts: `tpcb-like`, `simple-update` or `select-only`.
    pub script: &'static str,
}

impl Load {
    /// Makes pgbench's tables with 100 000 accounts, within the server.
    ///
    /// # Errors
    /// pgbench fails.
    pub fn prepare(&self, client: &Client<'_>) -> Result<()> {
        let start = Instant::now();
        loop {
            let outcome = client.output(pgbench(client, &["--initialize", "--init-steps=dtGp", "--quiet"])?);
            let Err(error) = outcome else { return Ok(()) };
            // It listens before it serves.
            let starting = format!("{error:#}").contains("the database system is starting up");
            ensure!(starting && start.elapsed() < START_LIMIT, error);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs for so many milliseconds.
    ///
    /// # Errors
    /// pgbench fails, or a transaction did.
    pub fn run(&self, client: &Client<'_>, milliseconds: u64) -> Result<Speed> {
        let prefix = client.directory.join("transactions");
        let prefix = prefix.to_str().context("the directory's name is no text")?;
        remove_logs(client)?;
        let (sessions, seconds) = (self.sessions.to_string(), milliseconds.div_ceil(1000).to_string());
        let builtin = format!("--builtin={}", self.script);
        // A thread each: one alone would connect one after the other, for seconds where answers are held for 100 ms.
        let arguments =
            ["--no-vacuum", "-c", &sessions, "-j", &sessions, "-T", &seconds, "--log", "--log-prefix", prefix];
        let arguments = [&arguments[..], &[&builtin]].concat();
        let text = client.output(pgbench(client, &arguments)?)?;
        ensure!(!text.contains("aborted") && failed(&text) == Some(0), "transactions failed; pgbench said: {text}");
        let mut times_us = Vec::new();
        for log in logs(client)? {
            let lines = fs::read_to_string(&log).with_context(|| format!("cannot read {}", log.display()))?;
            times_us.extend(lines.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok()));
        }
        remove_logs(client)?;
        speed(&text, times_us).with_context(|| format!("pgbench said: {text}"))
    }
}

fn pgbench(client: &Client<'_>, arguments: &[&str]) -> Result<Command> {
    let versions = artifacts_dir().join("guest-root/usr/lib/postgresql");
    let read = fs::read_dir(&versions).with_context(|| format!("cannot read {}", versions.display()))?;
    let version = read.flatten().next().context("no PostgreSQL is unpacked")?;
    let path = PathBuf::from("usr/lib/postgresql").join(version.file_name()).join("bin/pgbench");
    let [host, port] = client.words();
    let place = ["-h", &host, "-p", &port, "-U", "postgres"];
    from_guests(&path, &[&place[..], arguments, &["postgres"]].concat())
}

fn logs(client: &Client<'_>) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(client.directory)?.collect::<Result<Vec<_>, _>>()?;
    let ours = entries.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with("transactions."));
    Ok(ours.map(fs::DirEntry::path).collect())
}

fn remove_logs(client: &Client<'_>) -> Result<()> {
    logs(client)?.iter().try_for_each(|path| Ok(fs::remove_file(path)?))
}

fn failed(text: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix("number of failed transactions: "))?;
    rest.split(' ').next()?.parse().ok()
}

fn speed(text: &str, mut times_us: Vec<u64>) -> Result<Speed> {
    let rate = text.lines().find_map(|line| line.strip_prefix("tps = ")?.split(' ').next()?.parse().ok());
    let processed = text.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
    let operations: u64 = processed.context("no count of transactions")?.trim().parse()?;
    ensure!(
        operations > 0 && times_us.len() as u64 == operations,
        "{operations} transactions, {} in its logs",
        times_us.len()
    );
    times_us.sort_unstable();
    let quantile = |q: f64| times_us[((times_us.len() - 1) as f64 * q).round() as usize] as f64;
    Ok(Speed { per_s: rate.context("no rate")?, p50_us: quantile(0.5), p99_us: quantile(0.99), operations })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pgbench_is_understood() {
        let text = "pgbench (15.18)\ntransaction type: <builtin: TPC-B (sort of)>\nnumber of transactions actually processed: 4\n\
            number of failed transactions: 0 (0.000%)\nlatency average = 20.1 ms\ntps = 123.400000 (without initial connection time)\n";
        assert_eq!(failed(text), Some(0));
        let expected = Speed { per_s: 123.4, p50_us: 300.0, p99_us: 900.0, operations: 4 };
        assert_eq!(speed(text, vec![900, 100, 300, 200]).unwrap(), expected);
        assert!(speed(text, vec![900, 100, 300]).is_err());
        assert!(speed("pgbench: error: connection refused", vec![]).is_err());
    }
}
