//! The demo's result: what a program reads (JSON), what a person reads ([`DemoReport::render`]), and whether it is good enough.
//!
//! The promises are judged here and nowhere else, so that the table's last line, the JSON and the exit status cannot disagree.
//! A figure that was not measured is `null` and breaks its promise: a demo that did not get that far has shown nothing.

mod table;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use table::Style;

/// Longest time without an answer after a host was killed, in milliseconds.
pub const KILLED_GAP_LIMIT_MS: f64 = 1_500.0;
/// Longest time without an answer after a link was cut, in milliseconds.
pub const CUT_GAP_LIMIT_MS: f64 = 2_500.0;
/// Least share of the unreplicated throughput while protected.
pub const PROTECTED_SHARE: f64 = 0.4;

/// Everything that a demo found out. Times are milliseconds since the load began.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DemoReport {
    /// Seed of the run.
    pub seed: u64,
    /// How long the whole run took.
    pub duration_ms: f64,
    /// Connections of the load.
    pub connections: u32,
    /// Connections of the client that records histories.
    pub history_connections: u32,
    /// Requests in flight per connection.
    pub in_flight: u32,
    /// Answers that the client got.
    pub operations: u64,
    /// Writes that the server acknowledged.
    pub acknowledged_writes: u64,
    /// Of these, writes that could not be read any more. Must be 0.
    pub acknowledged_writes_lost: u64,
    /// The first faults that the clients found, in words.
    pub samples: Vec<String>,
    /// Answers that contradict an acknowledged write, or refuse a request. Must be 0.
    pub wrong_answers: u64,
    /// Whether the histories of the shared keys have an order that explains them; `None` if that was not found out.
    pub linearizable: Option<bool>,
    /// Operations in these histories.
    pub checked_operations: u64,
    /// Connections that the client had to give up. Must be 0.
    pub connections_lost: u64,
    /// Why the final read-back is missing or incomplete.
    pub verification_incomplete: Option<String>,
    /// The failures that were caused, in order.
    pub failures: Vec<Failure>,
    /// Throughput in each state.
    pub ops_per_s: OpsPerSecond,
    /// What synchronising cost.
    pub syncvm: SyncvmFigures,
    /// What happened, in order.
    pub events: Vec<Event>,
    /// Answers per 100 ms.
    pub series_100ms: Vec<u32>,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When.
    pub t_ms: f64,
    /// What, as a person would say it.
    pub text: String,
}

/// One failure and what the client felt of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// For instance `host killed` or `link cut`.
    pub kind: String,
    /// When it was caused.
    pub at_ms: f64,
    /// Longest time without any answer to the load client.
    pub gap_ms: f64,
    /// Longest time that any single connection was without an answer.
    pub connection_gap_ms: f64,
    /// What is promised for this kind.
    pub gap_limit_ms: f64,
    /// Longest time without an answer to the ping.
    pub ping_gap_ms: Option<f64>,
    /// How long after the failure the group was protected again; `None` if it never was.
    pub protected_again_ms: Option<f64>,
}

/// Answers per second, in each state of the group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct OpsPerSecond {
    /// The same guest without Plover's replication.
    pub unreplicated: Option<f64>,
    /// Leader and secondary in step.
    pub protected: Option<f64>,
    /// One replica serves alone, as after a failure.
    pub degraded: Option<f64>,
    /// As `protected`, with one request in flight per connection.
    pub protected_unpipelined: Option<f64>,
    /// As `unreplicated`, with one request in flight per connection.
    pub unreplicated_unpipelined: Option<f64>,
}

/// Sums over all syncvms of the run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct SyncvmFigures {
    /// Syncvms.
    pub count: u64,
    /// Pages in the union of both dirty sets.
    pub dirty_pages: u64,
    /// Pages that differed and were sent.
    pub divergent_pages: u64,
    /// Bytes that the transfers took.
    pub bytes_sent: u64,
    /// Bytes that sending every dirty page would have taken.
    pub full_transfer_bytes: u64,
    /// Median time that the leader's guest stood still.
    pub stop_ms_p50: f64,
    /// The same, 99 %.
    pub stop_ms_p99: f64,
}

/// One thing that the demo promises to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promise {
    /// Whether it did.
    pub kept: bool,
    /// The promise.
    pub name: String,
    /// The figure behind it.
    pub figure: String,
}

impl OpsPerSecond {
    /// Protected throughput as a share of the unreplicated.
    pub fn protected_share(&self) -> Option<f64> {
        share(self.protected, self.unreplicated)
    }
}

fn share(part: Option<f64>, whole: Option<f64>) -> Option<f64> {
    match (part, whole) {
        (Some(part), Some(whole)) if whole > 0.0 => Some(part / whole),
        _ => None,
    }
}

impl DemoReport {
    /// Every promise, kept or not.
    pub fn promises(&self) -> Vec<Promise> {
        let mut promises = vec![
            self.no_write_lost(),
            self.no_wrong_answer(),
            self.histories(),
            self.no_connection_lost(),
            self.throughput(),
        ];
        if self.failures.is_empty() {
            promises.push(Promise {
                kept: false,
                name: "survives a failure".into(),
                figure: "no failure was caused".into(),
            });
        }
        for failure in &self.failures {
            promises.push(Promise {
                kept: failure.gap_ms <= failure.gap_limit_ms,
                name: format!("{}: short gap", failure.kind),
                figure: format!(
                    "{} ms, at most {} ms",
                    table::grouped(failure.gap_ms),
                    table::grouped(failure.gap_limit_ms)
                ),
            });
            promises.push(Promise {
                kept: failure.protected_again_ms.is_some(),
                name: format!("{}: protected again", failure.kind),
                figure: failure.protected_again_ms.map_or("never".into(), |ms| format!("after {}", table::seconds(ms))),
            });
        }
        promises
    }

    fn no_write_lost(&self) -> Promise {
        let lost = self.acknowledged_writes_lost;
        let written = table::grouped(self.acknowledged_writes as f64);
        Promise {
            kept: lost == 0 && self.verification_incomplete.is_none() && self.acknowledged_writes > 0,
            name: "no acknowledged write lost".into(),
            figure: match &self.verification_incomplete {
                Some(why) => format!("not proven: {why}"),
                None => format!("{} of {written}", table::grouped(lost as f64)),
            },
        }
    }

    fn no_wrong_answer(&self) -> Promise {
        Promise {
            kept: self.wrong_answers == 0 && self.operations > 0,
            name: "no wrong answer".into(),
            figure: format!(
                "{} of {}",
                table::grouped(self.wrong_answers as f64),
                table::grouped(self.operations as f64)
            ),
        }
    }

    fn histories(&self) -> Promise {
        Promise {
            kept: self.linearizable == Some(true) && self.checked_operations > 0,
            name: "shared keys linearizable".into(),
            figure: match self.linearizable {
                Some(_) => format!("{} operations checked", table::grouped(self.checked_operations as f64)),
                None => "not checked".into(),
            },
        }
    }

    fn no_connection_lost(&self) -> Promise {
        Promise {
            kept: self.connections_lost == 0 && self.connections > 0,
            name: "no connection lost".into(),
            figure: format!("{} of {}", self.connections_lost, self.connections + self.history_connections),
        }
    }

    fn throughput(&self) -> Promise {
        let share = self.ops_per_s.protected_share();
        Promise {
            kept: share.is_some_and(|share| share >= PROTECTED_SHARE),
            name: "protected throughput".into(),
            figure: share.map_or("not measured".into(), |share| {
                format!("{share:.2} of unreplicated, at least {PROTECTED_SHARE:.2}")
            }),
        }
    }

    /// Whether every promise was kept: the demo's exit status.
    pub fn is_success(&self) -> bool {
        self.promises().iter().all(|promise| promise.kept)
    }

    /// The table for a person; ends with a line feed.
    pub fn render(&self, style: Style) -> String {
        table::render(self, style)
    }
}
