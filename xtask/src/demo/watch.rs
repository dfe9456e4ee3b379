//! What the hosts say of the group, and waiting for it. Each look is a process (`plover status --json`), so nobody looks
//! while throughput is measured, and otherwise not often.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Error, Result};
use rig::{Cluster, Deadline, Host, RigError};
use serde_json::Value;

/// Between two looks.
const INTERVAL: Duration = Duration::from_millis(50);
/// Until everything that has to come back has come back; a rejoin takes seconds on a busy machine.
const LIMIT_SECS: u64 = 90;

/// A leader, by its own word.
pub struct Leader<'a> {
    /// Where.
    pub host: &'a Host,
    /// Since which view.
    pub view: u64,
    /// Everything that it said.
    pub status: Value,
}

impl Leader<'_> {
    /// It says «protected».
    pub fn is_protected(&self) -> bool {
        self.status["protected"] == true
    }

    /// Its connections to both others stand.
    pub fn is_connected(&self) -> bool {
        self.status["peers"]
            .as_array()
            .is_some_and(|peers| peers.len() == 2 && peers.iter().all(|peer| peer["connected"] == true))
    }

    /// «h1 leads, h2 is secondary».
    pub fn describe(&self) -> String {
        format!("{} leads, {} is secondary", self.host.name(), self.status["secondary"].as_str().unwrap_or("nobody"))
    }
}

/// The leader of the highest view. One that was cut off may not know yet that it leads no more, hence `beyond`: only
/// later views count.
pub fn leader<'a>(cluster: &Cluster<'a>, beyond: Option<u64>) -> Option<Leader<'a>> {
    let said = cluster.bed().hosts().iter().filter_map(|host| {
        let status = cluster.status(host)?;
        let view = status["view"].as_u64()?;
        let leads = status["role"] == "leader" && beyond.is_none_or(|old| view > old);
        leads.then_some(Leader { host, view, status })
    });
    said.max_by_key(|leader| leader.view)
}

/// Looks until `enough` of the leader is so. `see` gets every look at a leader.
///
/// # Errors
/// When it never is, with what each host says.
pub fn wait<'a>(
    cluster: &Cluster<'a>,
    what: &str,
    beyond: Option<u64>,
    mut see: impl FnMut(&Leader),
    enough: impl Fn(&Leader) -> bool,
) -> Result<Leader<'a>> {
    let deadline = Deadline::after_secs(LIMIT_SECS);
    loop {
        let last = deadline.passed();
        if let Some(leader) = leader(cluster, beyond) {
            see(&leader);
            if enough(&leader) {
                return Ok(leader);
            }
        }
        if last {
            return Err(explain(cluster, deadline.missed(what).into()));
        }
        sleep(INTERVAL.min(deadline.remaining()));
    }
}

/// The guest of a host that came back is loaded and waits for its part.
pub fn guest_is_ready(cluster: &Cluster, host: &Host) -> bool {
    cluster.status(host).is_some_and(|status| {
        status["guest"].as_str().is_some_and(|guest| ["prepared", "running", "stopped"].contains(&guest))
    })
}

/// Adds what each host says to an error.
pub fn explain(cluster: &Cluster, error: Error) -> Error {
    cluster.explain(RigError::Explained(format!("{error:#}"))).into()
}
