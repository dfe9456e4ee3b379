//! wrk against a guest's web server.

use anyhow::{Context, Result, ensure};
use rig::guest::artifacts_dir;

use super::client::{Client, Speed};
use crate::peers::installed_or_unpacked;

/// What wrk does: each connection is kept and waits for each answer.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Connections.
    pub connections: u64,
    /// What is asked for.
    pub path: &'static str,
    /// What must be somewhere in the answer.
    pub contains: &'static str,
}

impl Load {
    /// Looks at one answer.
    ///
    /// # Errors
    /// It is not what it should be.
    pub fn prepare(&self, client: &Client<'_>) -> Result<()> {
        let limit = std::time::Duration::from_secs(10);
        let body = client.here(|| rig::client::http::get(client.address, limit))??;
        let body = String::from_utf8_lossy(&body);
        ensure!(body.contains(self.contains), "the guest's web server answers «{body}»");
        Ok(())
    }

    /// Asks for so many milliseconds.
    ///
    /// # Errors
    /// wrk fails, or an answer was an error.
    pub fn run(&self, client: &Client<'_>, milliseconds: u64) -> Result<Speed> {
        let [host, port] = client.words();
        let url = format!("http://{host}:{port}{}", self.path);
        let (connections, seconds) = (self.connections.to_string(), milliseconds.div_ceil(1000).to_string());
        let mut command = installed_or_unpacked(&artifacts_dir().join("load"), "wrk")?;
        command.args(["-t", "1", "-c", &connections, "-d", &seconds, "--timeout", "30", "--latency", &url]);
        let text = client.output(command)?;
        speed(&text).with_context(|| format!("wrk said: {text}"))
    }
}

/// From wrk's report.
fn speed(text: &str) -> Result<Speed> {
    let word_after =
        |label: &str| text.lines().find_map(|line| line.trim().strip_prefix(label)?.split_whitespace().next());
    for trouble in ["Socket errors:", "Non-2xx or 3xx responses:"] {
        ensure!(!text.contains(trouble), "there are errors");
    }
    let quantile = |label: &str| word_after(label).and_then(microseconds).with_context(|| format!("no line {label}"));
    let requests = text.lines().find(|line| line.contains(" requests in ")).context("no count of requests")?;
    Ok(Speed {
        per_s: word_after("Requests/sec:").context("no rate")?.parse()?,
        p50_us: quantile("50%")?,
        p99_us: quantile("99%")?,
        operations: requests.split_whitespace().next().context("an empty line")?.parse()?,
    })
}

/// «635.91us», «1.20ms», «2.00s», «1.5m».
fn microseconds(text: &str) -> Option<f64> {
    let at = text.find(|letter: char| letter.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(at);
    let factor = match unit {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        "m" => 60e6,
        _ => return None,
    };
    Some(number.parse::<f64>().ok()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "Running 3s test @ http://10.77.0.50:80/\n  1 threads and 16 connections\n\
        \x20 Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency     1.71ms  1.20ms   9.52ms   90.95%\n\
        \x20   Req/Sec     2.39k   184.12     2.60k    86.67%\n  Latency Distribution\n     50%    1.29ms\n     75%    1.45ms\n\
        \x20    90%    3.00ms\n     99%  635.91us\n  7138 requests in 3.00s, 1.86MB read\nRequests/sec:   2378.01\nTransfer/sec:    634.93KB\n";

    #[test]
    fn wrk_is_understood() {
        let expected = Speed { per_s: 2_378.01, p50_us: 1_290.0, p99_us: 635.91, operations: 7_138 };
        assert_eq!(speed(REPORT).unwrap(), expected);
        let errors = REPORT.replace("Requests/sec", "  Non-2xx or 3xx responses: 3\nRequests/sec");
        assert!(speed(&errors).is_err());
        assert!(speed("unable to connect").is_err());
        assert_eq!((microseconds("2.00s"), microseconds("1.50m"), microseconds("7")), (Some(2e6), Some(90e6), None));
    }
}
