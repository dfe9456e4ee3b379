//! redis-benchmark, and a few words with the guest's Redis before and after.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::client::{Client, Speed, from_guests};

/// Filling a large keyspace is one command that takes seconds.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// As in the comparison with COLO.
const VALUE_BYTES: u64 = 64;
/// Requests per client of the first attempt to find out how fast the guest is: few, for a policy may answer ten per second.
const FIRST_PER_CLIENT: u64 = 16;
/// An attempt of this length tells how fast the guest is, seconds.
const TELLING_S: f64 = 0.5;

/// What redis-benchmark does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Connections.
    pub clients: u64,
    /// Requests that each sends at once; it waits for all answers before it sends more.
    pub batch: u64,
    /// Keys that SET chooses from; none: INCR of one key.
    pub keys: Option<u64>,
}

impl Load {
    /// Leaves all keys there, and nothing else.
    ///
    /// # Errors
    /// Redis does not do it.
    pub fn prepare(&self, client: &Client<'_>) -> Result<()> {
        ask(client, "FLUSHALL")?;
        let Some(keys) = self.keys else { return Ok(()) };
        // redis-benchmark's names of keys.
        let script = "for i=0,ARGV[1]-1 do redis.call('SET',string.format('key:%012d',i),ARGV[2]) end return 1";
        let value = "x".repeat(VALUE_BYTES as usize);
        ask(client, &format!("EVAL \"{script}\" 0 {keys} {value}"))?;
        let size = ask(client, "DBSIZE")?;
        ensure!(size == keys.to_string(), "the guest's Redis has {size} keys instead of {keys}");
        Ok(())
    }

    /// How many requests take `seconds`, found by trying.
    ///
    /// # Errors
    /// redis-benchmark fails.
    pub fn requests_for(&self, client: &Client<'_>, seconds: f64) -> Result<u64> {
        let per_round = self.clients * self.batch;
        let rounded = |requests: f64| (requests as u64).div_ceil(per_round).max(1) * per_round;
        let mut requests = rounded((FIRST_PER_CLIENT * self.clients) as f64);
        loop {
            let speed = self.run(client, requests)?;
            let took_s = requests as f64 / speed.per_s;
            if took_s >= TELLING_S.min(seconds) {
                return Ok(rounded(speed.per_s * seconds));
            }
            requests = rounded(speed.per_s * TELLING_S * 1.2).max(2 * requests);
        }
    }

    /// Sends so many.
    ///
    /// # Errors
    /// redis-benchmark fails, or Redis counted another number.
    pub fn run(&self, client: &Client<'_>, requests: u64) -> Result<Speed> {
        let before = Commands::now(client, self.kind())?;
        let [host, port] = client.words();
        let [clients, batch, count] = [self.clients, self.batch, requests].map(|number| number.to_string());
        let (size, keys) = (VALUE_BYTES.to_string(), self.keys.unwrap_or_default().to_string());
        let mut arguments = vec!["-h", &host, "-p", &port, "-c", &clients, "-P", &batch, "-n", &count];
        arguments.extend(["-d", &size, "-t", self.kind(), "--csv"]);
        if self.keys.is_some() {
            arguments.extend(["-r", &keys]);
        }
        let text = client.output(from_guests(Path::new("usr/bin/redis-benchmark"), &arguments)?)?;
        let after = Commands::now(client, self.kind())?;
        let (served, failed) = (after.calls - before.calls, after.errors - before.errors);
        // The last answer ends the benchmark, requests of other clients may then be under way.
        ensure!(
            served >= requests && failed == 0,
            "the guest's Redis served {served} of {requests} requests and {failed} of those with an error"
        );
        speed(&text, requests).with_context(|| format!("redis-benchmark said: {text}"))
    }

    fn kind(&self) -> &'static str {
        if self.keys.is_some() { "set" } else { "incr" }
    }
}

/// What Redis has counted.
struct Commands {
    calls: u64,
    errors: u64,
}

impl Commands {
    fn now(client: &Client<'_>, kind: &str) -> Result<Commands> {
        let calls = counter(&ask(client, "INFO commandstats")?, &format!("cmdstat_{kind}:calls="));
        let errors = counter(&ask(client, "INFO stats")?, "total_error_replies:");
        // No line: never called.
        Ok(Commands { calls: calls.unwrap_or(0), errors: errors.context("INFO has no count of errors")? })
    }
}

fn counter(info: &str, prefix: &str) -> Option<u64> {
    info.lines().find_map(|line| line.strip_prefix(prefix)?.split(',').next()?.trim().parse().ok())
}

/// One inline command on a connection of its own.
fn ask(client: &Client<'_>, command: &str) -> Result<String> {
    client
        .here(|| {
            let stream = TcpStream::connect_timeout(&client.address, ANSWER_LIMIT)?;
            stream.set_read_timeout(Some(ANSWER_LIMIT))?;
            stream.set_nodelay(true)?;
            (&stream).write_all(format!("{command}\r\n").as_bytes())?;
            answer(&mut BufReader::new(&stream))
        })?
        .with_context(|| format!("the guest's Redis does not do «{}»", command.split(' ').next().unwrap_or_default()))
}

/// One answer that is no array.
fn answer(from: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    let line = line.trim_end();
    match line.split_at_checked(1) {
        Some(("+" | ":", text)) => Ok(text.to_owned()),
        Some(("$", length)) => {
            let mut text = vec![0; length.parse()?];
            from.read_exact(&mut text)?;
            Ok(String::from_utf8(text)?)
        }
        _ => bail!("it answers «{line}»"),
    }
}

/// From redis-benchmark's table: a line of titles, then one for the command.
fn speed(text: &str, operations: u64) -> Result<Speed> {
    let mut lines = text.lines().map(|line| line.split(',').map(|cell| cell.trim_matches('"')).collect::<Vec<_>>());
    let titles = lines.find(|cells| cells.contains(&"rps")).context("no titles")?;
    let cells = lines.next().context("no figures")?;
    let number = |title: &str| -> Result<f64> {
        let at = titles.iter().position(|cell| *cell == title).with_context(|| format!("no {title}"))?;
        Ok(cells.get(at).context("a short line")?.parse()?)
    };
    let (p50_us, p99_us) = (number("p50_latency_ms")? * 1e3, number("p99_latency_ms")? * 1e3);
    Ok(Speed { per_s: number("rps")?, p50_us, p99_us, operations })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redis_benchmark_is_understood() {
        let text = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\"p99_latency_ms\",\"max_latency_ms\"\n\
            \"SET\",\"2000.00\",\"0.4\",\"0.1\",\"0.300\",\"0.5\",\"0.900\",\"2.1\"\n";
        let expected = Speed { per_s: 2_000.0, p50_us: 300.0, p99_us: 900.0, operations: 7 };
        assert_eq!(speed(text, 7).unwrap(), expected);
        assert!(speed("Could not connect\n", 7).is_err());
    }

    #[test]
    fn redis_answers_are_read() {
        let read = |text: &str| answer(&mut text.as_bytes());
        assert_eq!(read("+OK\r\n").unwrap(), "OK");
        assert_eq!(read(":100\r\n").unwrap(), "100");
        assert_eq!(read("$5\r\nab\r\nc\r\n").unwrap(), "ab\r\nc");
        for wrong in ["-ERR no\r\n", "", "$x\r\n", "$9\r\nab\r\n"] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
        let info = "# Commandstats\r\ncmdstat_set:calls=7,usec=9\r\ncmdstat_config|get:calls=3,usec=1\r\n";
        assert_eq!((counter(info, "cmdstat_set:calls="), counter(info, "cmdstat_incr:calls=")), (Some(7), None));
        assert_eq!(counter("total_error_replies:12\r\n", "total_error_replies:"), Some(12));
    }
}
