//! Scripts with golden output: a line that begins with `> ` is a command, `#` a comment, and everything else
//! is what the simulator said. Playing a script returns it with the output as it is now.

use std::fmt::Write as _;

use super::Mutant;
use super::cluster::{Cluster, GENESIS_LEADER, REPLICAS};
use super::guest::Guest;
use crate::config::Config;
use crate::effects::Event;
use crate::entry::{Entry, Payload};
use crate::ids::{Index, ReplicaId};
use crate::message::Message;

/// A script that cannot be played.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScriptError {
    /// Not a command.
    #[error("line {line}: `{text}` is not a command; see `Command` in consensus/src/sim/transcript.rs")]
    Unknown {
        /// Counted from 1.
        line: usize,
        /// The command.
        text: String,
    },
    /// An invariant broke.
    #[error("line {line}: {what}")]
    Violation {
        /// Counted from 1.
        line: usize,
        /// Which one.
        what: String,
    },
}

/// Heartbeats and acknowledgements tell a reader nothing.
pub(super) fn is_heartbeat(message: &Message) -> bool {
    match message {
        Message::Accept { entries, .. } => entries.is_empty(),
        Message::AcceptOk { .. } => true,
        _ => false,
    }
}

/// One line about a message.
pub(super) fn describe(message: &Message) -> String {
    match message {
        Message::Accept { view, prev, commit, entries, .. } => {
            let list: Vec<String> = entries.iter().map(|(view, entry)| format!("{entry} of {view}")).collect();
            format!("Accept {view} after {prev} commit {commit}: {}", list.join(", "))
        }
        Message::Fetched { view, prev, entries } => format!("Fetched {view} after {prev}: {} entries", entries.len()),
        Message::Promise { view, last, commit } => {
            format!("Promise {view} last {last} commit {commit}")
        }
        Message::Prepare { view, genesis_nonce: 0 } => format!("Prepare {view}"),
        Message::Prepare { view, .. } => format!("Prepare {view} to form the group"),
        Message::PreVote { view } => format!("PreVote {view}"),
        Message::PreVoteReply { view, granted, .. } => {
            format!("PreVoteReply {view} {}", if *granted { "granted" } else { "refused" })
        }
        Message::Fetch { view, from } => format!("Fetch {view} from {from}"),
        Message::Reject { view, prev, have, commit } => {
            format!("Reject {view} prev {prev} have {have} commit {commit}")
        }
        Message::Nack { promised } => format!("Nack promised {promised}"),
        Message::TakeOver { handover: true, .. } => "TakeOver: hand-over".to_owned(),
        Message::TakeOver { handover: false, .. } => "TakeOver: hint".to_owned(),
        Message::Hello { blank, .. } => format!("Hello{}", if *blank { " blank" } else { "" }),
        Message::HelloReply { promised, last, .. } => {
            format!("HelloReply promised {promised} last {last}")
        }
        Message::InstallBase { view, base } => format!("InstallBase {view} {}", base.viewstamp()),
        Message::FetchedBase { view, base } => format!("FetchedBase {view} {}", base.viewstamp()),
        Message::AcceptOk { view, through, voting, .. } => {
            format!("AcceptOk {view} through {through} voting {voting}")
        }
    }
}

enum Command<'a> {
    /// `form`: start three blank replicas with a guest at the genesis leader.
    Form,
    /// `setup`: the same, with r1 as secondary, and without a word.
    Setup,
    /// `run 50`: let so many milliseconds pass.
    Run(u64),
    /// `propose r0 text`
    Propose(ReplicaId, &'a str),
    /// `many r0 50`: so many inputs, 1 ms apart, without a word.
    Many(ReplicaId, u64),
    /// `second r0 r1`: a syncvm makes r1's guest whole and r0 names it secondary; `second r0 none`: nobody.
    Second(ReplicaId, Option<ReplicaId>),
    /// `truncate r0`: r0 says that nobody needs what is committed any more.
    Truncate(ReplicaId),
    /// `wipe r2`: the disk of a dead replica is empty; `rot r2 3`: its last records are bad.
    Wipe(ReplicaId),
    Rot(ReplicaId, usize),
    /// `crash r0`, `start r0`, `lost r0` (its connections break)
    Crash(ReplicaId),
    Start(ReplicaId),
    Lost(ReplicaId),
    /// `cut r0 r1`: both directions; `heal` ends all cuts.
    Cut(ReplicaId, ReplicaId),
    Heal,
    /// `handover r0 r1`
    HandOver(ReplicaId, ReplicaId),
    /// `state`: one line per replica.
    State,
}

impl<'a> Command<'a> {
    fn parse(text: &'a str) -> Option<Command<'a>> {
        let replica = |word: &str| {
            let id = word.strip_prefix('r')?.parse().ok()?;
            (id < REPLICAS).then_some(ReplicaId(id))
        };
        let words: Vec<&str> = text.split_whitespace().collect();
        Some(match *words.as_slice() {
            ["form"] => Command::Form,
            ["setup"] => Command::Setup,
            ["run", ms] => Command::Run(ms.parse().ok()?),
            ["propose", id, text] => Command::Propose(replica(id)?, text),
            ["many", id, count] => Command::Many(replica(id)?, count.parse().ok()?),
            ["second", leader, "none"] => Command::Second(replica(leader)?, None),
            ["second", leader, second] => Command::Second(replica(leader)?, Some(replica(second)?)),
            ["truncate", id] => Command::Truncate(replica(id)?),
            ["wipe", id] => Command::Wipe(replica(id)?),
            ["rot", id, records] => Command::Rot(replica(id)?, records.parse().ok()?),
            ["crash", id] => Command::Crash(replica(id)?),
            ["start", id] => Command::Start(replica(id)?),
            ["lost", id] => Command::Lost(replica(id)?),
            ["cut", a, b] => Command::Cut(replica(a)?, replica(b)?),
            ["heal"] => Command::Heal,
            ["handover", from, to] => Command::HandOver(replica(from)?, replica(to)?),
            ["state"] => Command::State,
            _ => return None,
        })
    }

    fn play(self, cluster: &mut Cluster) {
        match self {
            Command::Form => {
                (0..REPLICAS).for_each(|id| cluster.start(ReplicaId(id)));
                cluster.nodes[GENESIS_LEADER.slot()].guest = Some(Guest::booted(Index(0), GENESIS_LEADER));
                cluster.step(GENESIS_LEADER, Event::GuestIntact(true));
            }
            Command::Setup => {
                let steps = [
                    Command::Form,
                    Command::Run(20),
                    Command::Second(ReplicaId(0), Some(ReplicaId(1))),
                    Command::Run(30),
                ];
                for step in steps {
                    step.play(cluster);
                }
                cluster.trace = None;
            }
            Command::Run(ms) => cluster.run_until(cluster.now_us + ms * 1000),
            Command::Propose(id, text) => {
                cluster.propose(id, Entry::Input(Payload::from(text.as_bytes().to_vec())));
            }
            Command::Many(id, count) => many(cluster, id, count),
            Command::Second(leader, None) => {
                cluster.propose(leader, Entry::Second { replica: None, base: Index(0) });
            }
            Command::Second(leader, Some(second)) => {
                let Some(Ok(base)) = cluster.propose(leader, Entry::SyncVm { with: second }) else {
                    return;
                };
                cluster.run_until(cluster.now_us + 5000);
                cluster.nodes[second.slot()].guest = Some(Guest::booted(base, leader));
                cluster.step(second, Event::GuestIntact(true));
                cluster.propose(leader, Entry::Second { replica: Some(second), base });
            }
            Command::Truncate(id) => cluster.step(id, Event::Truncate(Index(u64::MAX))),
            Command::Wipe(id) => cluster.wipe(id),
            Command::Rot(id, records) => cluster.rot_end(id, records),
            Command::Crash(id) => cluster.crash(id),
            Command::Start(id) => {
                cluster.start(id);
                cluster.announce_link(id, true);
            }
            Command::Lost(id) => cluster.announce_link(id, false),
            Command::Cut(a, b) => {
                let blocked = &mut cluster.weather.blocked;
                (blocked[a.slot()][b.slot()], blocked[b.slot()][a.slot()]) = (true, true);
            }
            Command::Heal => cluster.weather.blocked = Default::default(),
            Command::HandOver(from, to) => cluster.step(from, Event::HandOver { to }),
            Command::State => state(cluster),
        }
    }
}

fn many(cluster: &mut Cluster, id: ReplicaId, count: u64) {
    let trace = cluster.trace.take();
    for number in 0..count {
        cluster.propose(id, Entry::Input(Payload::from(number.to_le_bytes().to_vec())));
        cluster.run_until(cluster.now_us + 1000);
    }
    cluster.trace = trace;
}

/// Truncated entries are gone at once.
fn limits(config: &mut Config) {
    config.retain_bytes = 0;
}

fn state(cluster: &mut Cluster) {
    for id in (0..REPLICAS).map(ReplicaId) {
        let line = match cluster.replica(id) {
            None => format!("{id} dead"),
            Some(replica) => {
                let leads = match (replica.leading(), replica.is_learner()) {
                    (Some(_), _) => ", leading",
                    (None, true) => ", learner",
                    (None, false) => "",
                };
                let (view, last, commit) = (replica.view(), replica.last_index(), replica.commit_index());
                format!("{id} {:?}{leads}, {view}, last {last}, commit {commit}", replica.role())
            }
        };
        cluster.note(|| line);
    }
}

/// Plays a script and returns it with its output as it is now.
///
/// # Errors
/// A line that is no command, or an invariant that breaks.
pub fn play(script: &str) -> Result<String, ScriptError> {
    let mut cluster = Cluster::new(1, Mutant::None, limits);
    let mut result = String::new();
    for (at, text) in script.lines().enumerate() {
        let line = at + 1;
        if let Some(text) = text.strip_prefix("> ") {
            cluster.trace = Some(Vec::new());
            let command = Command::parse(text).ok_or_else(|| ScriptError::Unknown { line, text: text.to_owned() })?;
            command.play(&mut cluster);
            if let Some(what) = cluster.violation.take() {
                return Err(ScriptError::Violation { line, what });
            }
            let lines = cluster.trace.take().unwrap_or_default();
            writeln!(result, "> {text}").expect("a String takes everything");
            for line in lines {
                writeln!(result, "{line}").expect("a String takes everything");
            }
        } else if text.is_empty() || text.starts_with('#') {
            writeln!(result, "{text}").expect("a String takes everything");
        }
    }
    Ok(result)
}
