//! What the Redis load counts, apart from time.

use std::collections::BTreeSet;

use super::ledger::{Generation, Missing};
use super::meter::Meter;
use super::protocol::WrongRead;
use super::resp::Reply;
use super::value::Token;

/// How many details of each kind of fault are kept.
pub const SAMPLES: usize = 20;

/// Counters of one load.
pub struct Tally {
    /// Time.
    pub meter: Meter,
    /// Writes answered with OK.
    pub acknowledged_writes: u64,
    /// Reads that contradict an acknowledged write.
    pub wrong_reads: u64,
    /// Details of the first ones.
    pub wrong_read_samples: Vec<WrongRead>,
    /// Acknowledged writes that a read did not find.
    pub missing: BTreeSet<Missing>,
    /// Error answers.
    pub errors: u64,
    /// The first different texts.
    pub error_samples: Vec<String>,
    /// Connections given up.
    pub connections_lost: u64,
    /// Why, for the first ones.
    pub loss_samples: Vec<String>,
    run: u32,
}

impl Tally {
    /// Nothing counted yet.
    pub fn new(run: u32, now_us: u64, timeline_ms: u64) -> Tally {
        Tally {
            meter: Meter::new(now_us).with_timeline(timeline_ms * 1000),
            acknowledged_writes: 0,
            wrong_reads: 0,
            wrong_read_samples: Vec::new(),
            missing: BTreeSet::new(),
            errors: 0,
            error_samples: Vec::new(),
            connections_lost: 0,
            loss_samples: Vec::new(),
            run,
        }
    }

    /// The server refused a request.
    #[cold]
    pub fn error(&mut self, text: &[u8]) {
        self.errors += 1;
        if self.error_samples.len() < SAMPLES {
            let text = String::from_utf8_lossy(text).into_owned();
            if !self.error_samples.contains(&text) {
                self.error_samples.push(text);
            }
        }
    }

    /// A read did not show the last acknowledged write of its key.
    #[cold]
    pub fn wrong_read(&mut self, owned: &Generation, key: u32, reply: Reply, now_us: u64) {
        self.wrong_reads += 1;
        let acknowledged = owned.acknowledged[key as usize];
        if acknowledged != 0 {
            self.missing.insert((owned.connection, owned.generation, key, acknowledged));
        }
        if self.wrong_read_samples.len() < SAMPLES {
            self.wrong_read_samples.push(WrongRead {
                t_ms: now_us / 1000,
                key: owned.key_name(self.run, key),
                expected: expectation(owned, acknowledged),
                got: describe(reply),
            });
        }
    }

    /// A connection was given up.
    #[cold]
    pub fn connection_lost(&mut self, connection: u16, now_us: u64, why: &str) {
        self.connections_lost += 1;
        self.meter.connection_lost();
        if self.loss_samples.len() < SAMPLES {
            self.loss_samples.push(format!("connection {connection} at {} ms: {why}", now_us / 1000));
        }
    }
}

/// What a key should hold, for people.
pub fn expectation(owned: &Generation, acknowledged: u64) -> String {
    match acknowledged {
        0 => "nothing".to_owned(),
        sequence => owned.token(sequence).to_string(),
    }
}

/// What a read returned, for people.
pub fn describe(reply: Reply) -> String {
    match reply {
        Reply::Nil => "nothing".to_owned(),
        Reply::Bulk(bytes) => match Token::of_value(bytes) {
            Some(token) if token.is_value(bytes, bytes.len()) => token.to_string(),
            Some(token) => format!("a damaged value of {} bytes that begins like {token}", bytes.len()),
            None => format!("{} foreign bytes", bytes.len()),
        },
        other => format!("{other:?}"),
    }
}
