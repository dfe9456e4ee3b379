//! Linearizability of one register, from the history of its reads and writes.
//!
//! Every write stores a value of its own, so each read names the write it saw. That makes the question easy: a general search
//! (Wing and Gong, with Lowe's memo) is exponential in the number of concurrent operations, but with unique values the
//! *zones* of Gibbons and Korach («Testing shared memories», SIAM J. Comput. 1997, §3) decide in O(n log n).
//!
//! A write and the reads of its value form a *cluster*, which stands as one block in any valid order. Let `f` be the
//! earliest return and `s` the latest invocation in it. Cluster A must come before B as soon as one operation of A returned
//! before one of B was invoked, so iff f(A) < s(B). The history is linearizable iff no read precedes its write and no
//! two clusters must each come before the other (longer cycles contain such a pair).

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What an operation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Stored this value; no other write of the history stores it.
    Write(u64),
    /// Saw this value, or none.
    Read(Option<u64>),
}

/// One operation of one client. Times come from one clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Operation {
    /// Who; for messages only.
    pub client: u32,
    /// What.
    pub action: Action,
    /// Before the request was sent.
    pub invoked_ns: u64,
    /// After the answer had arrived; `None` if it never did. Leave out reads that were not answered.
    pub returned_ns: Option<u64>,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |ns: u64| ns as f64 / 1000.0;
        write!(f, "client {} ", self.client)?;
        match self.action {
            Action::Write(value) => write!(f, "wrote {value}")?,
            Action::Read(Some(value)) => write!(f, "read {value}")?,
            Action::Read(None) => write!(f, "read nothing")?,
        }
        match self.returned_ns {
            Some(returned_ns) => write!(f, " [{:.1} µs, {:.1} µs]", us(self.invoked_ns), us(returned_ns)),
            None => write!(f, " [{:.1} µs, never answered]", us(self.invoked_ns)),
        }
    }
}

/// The checker's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// There is an order that explains every answer.
    Linearizable,
    /// There is none; the text names the operations that contradict one another.
    Violation(String),
}

/// All operations on one value.
struct Cluster {
    write: Operation,
    /// Earliest return; u64::MAX if none returned.
    first_return_ns: u64,
    first_returned: Operation,
    /// Latest invocation.
    last_invoked_ns: u64,
    last_invoked: Operation,
}

impl Cluster {
    fn new(write: Operation) -> Cluster {
        Cluster {
            write,
            first_return_ns: write.returned_ns.unwrap_or(u64::MAX),
            first_returned: write,
            last_invoked_ns: write.invoked_ns,
            last_invoked: write,
        }
    }

    fn add(&mut self, read: Operation, returned_ns: u64) {
        if returned_ns < self.first_return_ns {
            self.first_return_ns = returned_ns;
            self.first_returned = read;
        }
        if read.invoked_ns > self.last_invoked_ns {
            self.last_invoked_ns = read.invoked_ns;
            self.last_invoked = read;
        }
    }

    fn is_forward(&self) -> bool {
        self.first_return_ns < self.last_invoked_ns
    }
}

/// Checks the history of one register that holds nothing at first.
///
/// # Panics
/// If two writes store one value, or an unanswered read is in the history: both are faults of the recorder.
pub fn check(history: &[Operation]) -> Verdict {
    match clusters(history) {
        Ok(clusters) => check_zones(clusters),
        Err(violation) => Verdict::Violation(violation),
    }
}

/// Groups the history by value. The initial «nothing» is a cluster whose write was over before all else began.
fn clusters(history: &[Operation]) -> Result<Vec<Cluster>, String> {
    // Times are shifted by one so that the initial write can return strictly before an operation invoked at 0.
    let shift = |operation: &Operation| Operation {
        invoked_ns: operation.invoked_ns + 1,
        returned_ns: operation.returned_ns.map(|ns| ns + 1),
        ..*operation
    };
    let initial = Operation { client: u32::MAX, action: Action::Read(None), invoked_ns: 0, returned_ns: Some(0) };
    let mut clusters: HashMap<Option<u64>, Cluster> = HashMap::new();
    clusters.insert(None, Cluster::new(initial));
    for operation in history.iter().map(shift) {
        if let Action::Write(value) = operation.action {
            let before = clusters.insert(Some(value), Cluster::new(operation));
            assert!(before.is_none(), "value {value} was written twice: the recorder is at fault");
        }
    }
    for operation in history.iter().map(shift) {
        let Action::Read(value) = operation.action else {
            continue;
        };
        let returned_ns = operation.returned_ns.expect("an unanswered read says nothing: leave it out");
        let Some(cluster) = clusters.get_mut(&value) else {
            return Err(format!("{operation}, which nobody wrote"));
        };
        if returned_ns < cluster.write.invoked_ns {
            return Err(format!("{operation} before {} began", cluster.write));
        }
        cluster.add(operation, returned_ns);
    }
    // A write that was not answered and whose value nobody saw stays: it returned before nothing, so it contradicts nothing.
    Ok(clusters.into_values().collect())
}

fn check_zones(clusters: Vec<Cluster>) -> Verdict {
    let (mut forward, mut backward): (Vec<_>, Vec<_>) = clusters.into_iter().partition(Cluster::is_forward);
    forward.sort_by_key(|cluster| cluster.first_return_ns);
    backward.sort_by_key(|cluster| cluster.last_invoked_ns);
    for pair in forward.windows(2) {
        if pair[1].first_return_ns < pair[0].last_invoked_ns {
            return contradiction(&pair[0], &pair[1]);
        }
    }
    for cluster in &backward {
        // The forward zones do not overlap, so only the last that begins before this one can contain it.
        let next = forward.partition_point(|f| f.first_return_ns < cluster.last_invoked_ns);
        if let Some(around) = next.checked_sub(1).map(|at| &forward[at])
            && cluster.first_return_ns < around.last_invoked_ns
        {
            return contradiction(around, cluster);
        }
    }
    Verdict::Linearizable
}

fn contradiction(a: &Cluster, b: &Cluster) -> Verdict {
    Verdict::Violation(format!(
        "«{}» was over before «{}» began, so the first value was older; but «{}» was over before «{}» began, so it was newer",
        a.first_returned, b.last_invoked, b.first_returned, a.last_invoked
    ))
}
