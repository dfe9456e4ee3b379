//! What a client process and its parent say to one another: jobs, commands, progress and reports.
//!
//! Both ends use these types. The job is given as two arguments (its name and its parameters as JSON); then the parent writes one
//! [`Command`] per line to the client's stdin and reads one [`Output`] per line from its stdout. Every parameter has a
//! default that works; unknown ones are refused, because a misspelt parameter would silently test something else.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::linear::Verdict;

/// What a client process does. Serialises to `{"redis-load": {parameters}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// Checking load on a Redis server; see [`super::redis`].
    RedisLoad(LoadParameters),
    /// Few shared keys with a recorded history; see [`super::register`].
    Registers(RegisterParameters),
    /// Steady ICMP echo; see [`super::ping`].
    Ping(PingParameters),
    /// Reads back what an earlier `redis-load` left in its ledger file.
    VerifyRedis(VerifyParameters),
    /// Waits until a service answers.
    Probe(ProbeParameters),
}

/// Parameters of the Redis load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoadParameters {
    /// Server.
    pub address: SocketAddr,
    /// TCP connections, at most 4095.
    pub connections: u16,
    /// Requests in flight per connection; 1 means unpipelined.
    pub in_flight: u32,
    /// Requests are sent in groups of that many (at most `in_flight`): 1 refills the pipeline at once, `in_flight` sends the
    /// next batch when the last one is answered.
    pub batch: u32,
    /// Keys that each connection owns.
    pub keys_per_connection: u32,
    /// Bytes per value, at least 16.
    pub value_bytes: usize,
    /// Share of GET; the rest are SET.
    pub get_percent: u8,
    /// Seed of the operations.
    pub seed: u64,
    /// Keeps the keys of several runs against one server apart; 0 draws one.
    pub run: u32,
    /// Ends the load by itself; 0 means at [`Command::Stop`].
    pub duration_ms: u64,
    /// Each connection sends that many requests and the load ends when all are answered; 0 means no such limit.
    pub requests_per_connection: u64,
    /// Longest wait for the first connections.
    pub connect_timeout_ms: u64,
    /// A connection that owes an answer for that long is given up.
    pub idle_limit_ms: u64,
    /// Longest wait for outstanding answers after the stop.
    pub drain_ms: u64,
    /// Time between progress lines.
    pub progress_ms: u64,
    /// The report has answers and latencies per interval of that length; 0: it has not.
    pub timeline_ms: u64,
    /// Read every key back after the load, for at most `verify_timeout_ms`.
    pub verify: bool,
    /// See `verify`.
    pub verify_timeout_ms: u64,
    /// Where to leave the ledger for a later `verify-redis`.
    pub ledger_file: Option<PathBuf>,
    /// The process stops at this age, whatever happens.
    pub deadline_ms: u64,
}

impl Default for LoadParameters {
    fn default() -> Self {
        LoadParameters {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 6379)),
            connections: 64,
            in_flight: 64,
            batch: 1,
            keys_per_connection: 256,
            value_bytes: 64,
            get_percent: 50,
            seed: 1,
            run: 0,
            duration_ms: 0,
            requests_per_connection: 0,
            connect_timeout_ms: 10_000,
            idle_limit_ms: 30_000,
            drain_ms: 10_000,
            progress_ms: 100,
            timeline_ms: 0,
            verify: true,
            verify_timeout_ms: 30_000,
            ledger_file: None,
            deadline_ms: 600_000,
        }
    }
}

/// Parameters of the shared registers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegisterParameters {
    /// Server.
    pub address: SocketAddr,
    /// Connections, each with one request in flight.
    pub connections: u16,
    /// Keys that all of them share.
    pub keys: u32,
    /// Pause of a connection between an answer and its next request; bounds the history and the CPU cost.
    pub think_ms: u64,
    /// Share of reads.
    pub get_percent: u8,
    /// Seed of the operations.
    pub seed: u64,
    /// Keeps the keys of several runs against one server apart; 0 draws one.
    pub run: u32,
    /// Ends by itself; 0 means at [`Command::Stop`].
    pub duration_ms: u64,
    /// Longest wait for the first connections.
    pub connect_timeout_ms: u64,
    /// A connection that owes an answer for that long is given up.
    pub idle_limit_ms: u64,
    /// Longest wait for outstanding answers after the stop.
    pub drain_ms: u64,
    /// Where to leave the whole history as JSON.
    pub history_file: Option<PathBuf>,
    /// The process stops at this age, whatever happens.
    pub deadline_ms: u64,
}

impl Default for RegisterParameters {
    fn default() -> Self {
        RegisterParameters {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 6379)),
            connections: 6,
            keys: 3,
            think_ms: 5,
            get_percent: 50,
            seed: 1,
            run: 0,
            duration_ms: 0,
            connect_timeout_ms: 10_000,
            idle_limit_ms: 30_000,
            drain_ms: 10_000,
            history_file: None,
            deadline_ms: 600_000,
        }
    }
}

/// Parameters of the ping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PingParameters {
    /// Target.
    pub address: Ipv4Addr,
    /// Time between two requests.
    pub interval_ms: u64,
    /// Ends by itself; 0 means at [`Command::Stop`].
    pub duration_ms: u64,
    /// Longest wait for outstanding answers after the stop.
    pub drain_ms: u64,
    /// Time between progress lines.
    pub progress_ms: u64,
    /// The process stops at this age, whatever happens.
    pub deadline_ms: u64,
}

impl Default for PingParameters {
    fn default() -> Self {
        PingParameters {
            address: Ipv4Addr::LOCALHOST,
            interval_ms: 10,
            duration_ms: 0,
            drain_ms: 1_000,
            progress_ms: 250,
            deadline_ms: 600_000,
        }
    }
}

/// Parameters of a later verification.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyParameters {
    /// Server.
    pub address: SocketAddr,
    /// What the load left behind.
    pub ledger_file: PathBuf,
    /// Longest duration.
    pub timeout_ms: u64,
}

/// A service that can be asked whether it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// PING is answered with PONG.
    Redis,
    /// A value that was set can be got.
    Memcached,
    /// GET / is answered with status 200.
    Http,
}

/// Parameters of a readiness probe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeParameters {
    /// What to ask.
    pub service: Service,
    /// Whom to ask.
    pub address: SocketAddr,
    /// Keep trying for that long.
    pub timeout_ms: u64,
}

impl Job {
    /// The two arguments of `rig-client` that mean this job.
    pub fn arguments(&self) -> [String; 2] {
        let value = serde_json::to_value(self).expect("a job is plain data");
        let object = value.as_object().expect("a job is externally tagged");
        let (name, parameters) = object.iter().next().expect("a job has a name");
        [name.clone(), parameters.to_string()]
    }

    /// The job that `name` and `parameters` (JSON; `{}` for all defaults) mean.
    ///
    /// # Errors
    /// An unknown name, or parameters that are not this job's.
    pub fn from_arguments(name: &str, parameters: &str) -> Result<Job, serde_json::Error> {
        let parameters: serde_json::Value = serde_json::from_str(parameters)?;
        let mut object = serde_json::Map::new();
        object.insert(name.to_owned(), parameters);
        serde_json::from_value(serde_json::Value::Object(object))
    }

    /// Age at which the process must be gone, in milliseconds.
    pub fn deadline_ms(&self) -> u64 {
        match self {
            Job::RedisLoad(p) => p.deadline_ms,
            Job::Registers(p) => p.deadline_ms,
            Job::Ping(p) => p.deadline_ms,
            Job::VerifyRedis(p) => p.timeout_ms,
            Job::Probe(p) => p.timeout_ms,
        }
    }
}

/// What a parent tells a running client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// `{"mark": "killed"}`: close the present window and open one of this name.
    Mark(String),
    /// `{"in_flight": 1}`: change the pipelining of the load, at most to the parameter it was started with.
    InFlight(u32),
    /// `{"stop": true}`: wait for outstanding answers, verify, report, exit.
    Stop(bool),
}

/// What a client tells its parent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// All connections stand, the first requests leave.
    Started {
        /// The run number in use.
        run: u32,
    },
    /// Every progress interval; left out when the parent does not read.
    Progress(Progress),
    /// The answer to [`Command::Mark`].
    Marked {
        /// As given.
        label: String,
        /// Since the client's start.
        t_ms: f64,
    },
    /// The last line of a client that did its job (whether or not it found faults).
    Report(Box<Report>),
    /// The last line of a client that could not do its job.
    Failed {
        /// What, where, why.
        error: String,
    },
}

/// Counters while the client runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Since the client's start.
    pub t_ms: f64,
    /// Answers so far.
    pub ops: u64,
    /// Acknowledged writes so far.
    pub acknowledged_writes: u64,
    /// Age of the last answer.
    pub last_answer_ms: f64,
    /// Connections given up so far.
    pub connections_lost: u64,
    /// Answers that contradict an acknowledged write, so far.
    pub wrong_reads: u64,
    /// Error answers so far.
    pub errors: u64,
}

/// The result of a job.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one report per process; a box would only be in the reader's way"
)]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// Of [`Job::RedisLoad`].
    RedisLoad(LoadReport),
    /// Of [`Job::Registers`].
    Registers(RegisterReport),
    /// Of [`Job::Ping`].
    Ping(PingReport),
    /// Of [`Job::VerifyRedis`].
    VerifyRedis(Verification),
    /// Of [`Job::Probe`].
    Probe {
        /// How long it took until the service answered.
        ready_after_ms: f64,
    },
}

/// Quantiles of the time between request and answer, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct LatencySummary {
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
    pub p999_us: u64,
    pub max_us: u64,
}

/// One window between two marks. Times are since the client's start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowReport {
    /// Name of the mark that opened it; the first is `start`.
    pub label: String,
    /// When it was opened.
    pub start_ms: f64,
    /// When it was closed.
    pub end_ms: f64,
    /// Answers in it.
    pub operations: u64,
    /// Longest time without any answer.
    pub gap_ms: f64,
    /// When that gap began.
    pub gap_start_ms: f64,
    /// Longest time that a single connection was without an answer.
    pub connection_gap_ms: f64,
    /// Connections given up in it.
    pub connections_lost: u64,
    /// Of the answers in it.
    pub latency: LatencySummary,
}

impl WindowReport {
    /// Answers per second of the window.
    pub fn ops_per_s(&self) -> f64 {
        self.operations as f64 * 1000.0 / (self.end_ms - self.start_ms).max(0.001)
    }
}

/// An answer that contradicts what had been acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrongRead {
    /// Since the client's start; 0 in a verification.
    pub t_ms: u64,
    /// Name of the key.
    pub key: String,
    /// The acknowledged write (or the possible ones).
    pub expected: String,
    /// What was read.
    pub got: String,
}

/// The outcome of reading every key back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    /// Keys that were read.
    pub keys_checked: u64,
    /// Keys whose last acknowledged write is gone.
    pub acknowledged_writes_lost: u64,
    /// The first few of these.
    pub lost: Vec<WrongRead>,
    /// Unanswered writes that turned out to have taken effect.
    pub maybe_writes_applied: u64,
    /// Why the verification is incomplete. A verification with this set proves nothing.
    pub incomplete: Option<String>,
}

/// The outcome of a Redis load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// The run number in use.
    pub run: u32,
    /// From the first request to the last answer.
    pub duration_ms: f64,
    /// Answers.
    pub operations: u64,
    /// Answers per second.
    pub ops_per_s: f64,
    /// Writes that the server acknowledged.
    pub acknowledged_writes: u64,
    /// Different acknowledged writes that a read during the load or the verification found missing. Must be 0.
    pub acknowledged_writes_lost: u64,
    /// Reads that contradict an acknowledged write. Must be 0.
    pub wrong_reads: u64,
    /// The first few of these.
    pub wrong_read_samples: Vec<WrongRead>,
    /// Error answers (the write did not happen).
    pub errors: u64,
    /// The first few texts.
    pub error_samples: Vec<String>,
    /// Connections that stood and had to be given up.
    pub connections_lost: u64,
    /// Why, for the first few.
    pub loss_samples: Vec<String>,
    /// Writes without an answer (their connection was lost, or the drain ended).
    pub unanswered_writes: u64,
    /// Longest time without any answer.
    pub gap_ms: f64,
    /// Longest time that a single connection was without an answer.
    pub connection_gap_ms: f64,
    /// One entry per mark.
    pub windows: Vec<WindowReport>,
    /// Of all answers.
    pub latency: LatencySummary,
    /// Answers per 100 ms.
    pub series_100ms: Vec<u32>,
    /// Per interval, from the start; see [`LoadParameters::timeline_ms`].
    pub timeline: Vec<Moment>,
    /// CPU time of the load thread per answer, in nanoseconds.
    pub cpu_ns_per_operation: f64,
    /// Longest time by which the client woke up late: gaps below it say nothing about the server.
    pub longest_stall_ms: f64,
    /// Present when asked for.
    pub verification: Option<Verification>,
}

/// What one interval brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Answers that came.
    pub answers: u32,
    /// How long they had been waited for, on average; 0 if there were none.
    pub mean_us: u64,
    /// The longest of these times.
    pub slowest_us: u64,
}

/// The outcome of the shared registers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RegisterReport {
    /// Operations that were answered.
    pub operations: u64,
    /// Writes that never were.
    pub unanswered_writes: u64,
    /// Connections that stood and had to be given up.
    pub connections_lost: u64,
    /// Error answers.
    pub errors: u64,
    /// One verdict per key.
    pub keys: Vec<KeyVerdict>,
    /// All of them are linearizable.
    pub linearizable: bool,
}

/// Whether the history of one shared key is linearizable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeyVerdict {
    /// Name of the key.
    pub key: String,
    /// Operations in its history.
    pub operations: u64,
    /// What the checker says.
    pub verdict: Verdict,
}

/// The outcome of a ping.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PingReport {
    /// Requests sent.
    pub sent: u64,
    /// Requests answered (duplicates not counted).
    pub answered: u64,
    /// Requests never answered.
    pub lost: u64,
    /// Answers that came again.
    pub duplicates: u64,
    /// Requests that could not be sent.
    pub send_errors: u64,
    /// Longest time without any answer.
    pub gap_ms: f64,
    /// One entry per mark.
    pub windows: Vec<WindowReport>,
    /// Of all answers.
    pub latency: LatencySummary,
    /// Longest time by which the client woke up late.
    pub longest_stall_ms: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_survives_the_command_line() {
        let job = Job::RedisLoad(LoadParameters { connections: 3, ..Default::default() });
        let [name, parameters] = job.arguments();
        assert_eq!(name, "redis-load");
        assert_eq!(Job::from_arguments(&name, &parameters).unwrap(), job);
        assert_eq!(Job::from_arguments("ping", "{}").unwrap(), Job::Ping(PingParameters::default()));
    }

    #[test]
    fn misspelt_parameters_are_refused() {
        assert!(Job::from_arguments("redis-load", r#"{"conections": 3}"#).is_err());
        assert!(Job::from_arguments("redis-lod", "{}").is_err());
    }

    #[test]
    fn commands_look_as_documented() {
        let mark: Command = serde_json::from_str(r#"{"mark":"killed"}"#).unwrap();
        assert_eq!(mark, Command::Mark("killed".into()));
        let stop: Command = serde_json::from_str(r#"{"stop":true}"#).unwrap();
        assert_eq!(stop, Command::Stop(true));
    }
}
