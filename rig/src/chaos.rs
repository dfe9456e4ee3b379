//! Random faults from a seed: which fault, on which host, for how long, and in which phase of a syncvm.
//!
//! The seed decides what is done, not what comes of it: the machine's timing is its own. A plan is therefore printed before
//! it is carried out, and a failed run names seed and step. Faults that take the guest's last whole copy are left out by
//! construction: one at a time, and only on a whole group.

use std::fmt;
use std::time::Duration;

use crate::client::rng::Rng;
use crate::cluster::{DAEMON, QEMU, VM};
use crate::fault::Cut;
use crate::scenario::{Expect, Roles, Scenario};
use crate::wait::wait_until_every;
use crate::{Cluster, Deadline, Fault, Host, Process, Result, RigError};

/// A fault that lasts stays on for at most this long after clients are served again.
const LONGEST_HOLD_MS: u32 = 800;
/// Under load there are many syncvms per second; one must come to an armed crash point within this time.
const CRASH_POINT_LIMIT: Duration = Duration::from_secs(15);

/// A daemon answers within this that a crash point is armed, unless it comes to it first.
const CRASH_POINT_ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// Within this the rig sees what has happened to a daemon that gave no answer.
const CRASH_SEEN_LIMIT: Duration = Duration::from_secs(1);

/// A host by its role at the time of the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The leader.
    Leader,
    /// The secondary.
    Secondary,
    /// The witness.
    Witness,
}

impl Role {
    const ALL: [Self; 3] = [Self::Leader, Self::Secondary, Self::Witness];

    /// Which host that is.
    pub fn of(self, roles: &Roles) -> &Host {
        match self {
            Self::Leader => &roles.leader,
            Self::Secondary => &roles.secondary,
            Self::Witness => &roles.witness,
        }
    }
}

/// What is done to a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SIGKILL to its daemon; it restarts.
    KillDaemon,
    /// SIGKILL to its QEMU; it restarts.
    KillQemu,
    /// SIGKILL to both at once; they restart.
    KillBoth,
    /// The host dies and boots again.
    Crash,
    /// Everything on it stands still for a while.
    Freeze,
    /// Only its daemon stands still for a while.
    FreezeDaemon,
    /// Its link swallows everything.
    CutSilent,
    /// Its cable is pulled.
    CutCarrier,
    /// It hears nothing from one other host.
    DeafTo(Role),
    /// Its link is slow.
    SlowLink,
    /// The disk of its log is full.
    FullDisk,
    /// It dies, in part or whole, at this point of the next syncvm.
    CrashPoint {
        /// The phase's name.
        phase: &'static str,
        /// What dies.
        action: &'static str,
    },
}

/// Points of an exchange on the leader (PLOVER's syncvm, steps 1 to 7). The rounds of a rejoin are left out: a leader without
/// a secondary has the only whole guest.
pub const LEADER_PHASES: [&str; 14] = [
    "leader-stopped",
    "leader-saved",
    "leader-harvested",
    "leader-exchanged",
    "leader-hashed",
    "leader-compared",
    "leader-listed",
    "leader-copied",
    "leader-resumed",
    "leader-digests",
    "leader-sent-half",
    "leader-sent",
    "leader-acked",
    "leader-released",
];

/// Points of an exchange on the follower.
pub const FOLLOWER_PHASES: [&str; 12] = [
    "follower-stopped",
    "follower-harvested",
    "follower-exchanged",
    "follower-hashed",
    "follower-digests",
    "follower-receiving",
    "follower-staged",
    "follower-acked",
    "follower-applied-half",
    "follower-applied",
    "follower-loaded",
    "follower-resumed",
];

/// What can happen at a crash point.
pub const ACTIONS: [&str; 4] = ["kill-daemon", "kill-qemu", "kill-both", "freeze-daemon"];

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number, from 1.
    pub number: usize,
    /// Whom it hits.
    pub role: Role,
    /// How.
    pub kind: Kind,
    /// How long it stays on after clients are served again.
    pub hold: Duration,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, role, kind, .. } = self;
        match kind {
            Kind::CrashPoint { phase, action } => {
                write!(f, "{number}. {role:?}: {action} at {phase}")
            }
            Kind::DeafTo(other) => write!(f, "{number}. {role:?}: deaf to {other:?}"),
            other => write!(f, "{number}. {role:?}: {other:?}"),
        }
    }
}

/// The steps that a seed means.
pub fn plan(seed: u64, steps: usize) -> Vec<Step> {
    let mut rng = Rng::new(seed);
    (1..=steps).map(|number| step(&mut rng, number)).collect()
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    let count = u32::try_from(from.len()).expect("the lists here are short");
    from[rng.below(count) as usize]
}

fn step(rng: &mut Rng, number: usize) -> Step {
    let hold = Duration::from_millis(rng.below(LONGEST_HOLD_MS).into());
    // One in three hits a syncvm in a chosen phase; the others hit whatever is going on.
    let (role, kind) = if rng.below(3) == 0 {
        crash_point(rng)
    } else {
        let role = pick(rng, &Role::ALL);
        (role, plain(rng, role))
    };
    Step { number, role, kind, hold }
}

fn crash_point(rng: &mut Rng) -> (Role, Kind) {
    let action = pick(rng, &ACTIONS);
    let (role, phase) = if rng.percent(50) {
        (Role::Leader, pick(rng, &LEADER_PHASES))
    } else {
        (Role::Secondary, pick(rng, &FOLLOWER_PHASES))
    };
    (role, Kind::CrashPoint { phase, action })
}

fn plain(rng: &mut Rng, role: Role) -> Kind {
    match rng.below(11) {
        0 => Kind::KillDaemon,
        1 => Kind::KillQemu,
        2 => Kind::KillBoth,
        3 => Kind::Crash,
        4 => Kind::Freeze,
        5 => Kind::FreezeDaemon,
        6 => Kind::CutSilent,
        7 => Kind::CutCarrier,
        8 => Kind::SlowLink,
        9 => Kind::FullDisk,
        _ => {
            let others: Vec<Role> = Role::ALL.into_iter().filter(|&other| other != role).collect();
            Kind::DeafTo(pick(rng, &others))
        }
    }
}

/// Carries one step out, from a whole group to a whole group.
///
/// # Errors
/// When clients are not served meanwhile or the group does not become whole again.
pub fn carry_out(scenario: &mut Scenario, step: &Step) -> Result<()> {
    scenario.survive(&step.to_string(), Expect::Either, step.hold, |cluster, roles| strike(cluster, roles, step))
}

fn strike(cluster: &Cluster, roles: &Roles, step: &Step) -> Result<Vec<Fault>> {
    let host = step.role.of(roles);
    let (daemon, qemu) = (process(host, DAEMON)?, process(host, QEMU)?);
    Ok(match &step.kind {
        Kind::KillDaemon => daemon.kill().map(|()| Vec::new())?,
        Kind::KillQemu => qemu.kill().map(|()| Vec::new())?,
        Kind::KillBoth => host.kill_everything().map(|()| Vec::new())?,
        Kind::Crash => vec![host.crash()?],
        Kind::Freeze => vec![host.freeze()?],
        Kind::FreezeDaemon => vec![daemon.frozen()?],
        Kind::CutSilent => vec![host.cut_link(Cut::Silent)?],
        Kind::CutCarrier => vec![host.cut_link(Cut::CarrierLoss)?],
        Kind::DeafTo(other) => vec![host.drop_from(other.of(roles))?],
        Kind::SlowLink => vec![host.slow_link(20, 50)?],
        Kind::FullDisk => {
            let disk = cluster
                .data_disk(host)
                .ok_or_else(|| RigError::Explained("chaos needs ClusterOptions::data_disk_mib".into()))?;
            vec![disk.fill()?]
        }
        Kind::CrashPoint { phase, action } => crash_at(cluster, host, phase, action)?,
    })
}

/// Arms a crash point on a host, waits until it was reached, and returns what is to be undone.
///
/// # Errors
/// When the daemon refuses it, or no syncvm comes by.
pub fn crash_at(cluster: &Cluster, host: &Host, phase: &str, action: &str) -> Result<Vec<Fault>> {
    let (daemon, qemu) = (process(host, DAEMON)?, process(host, QEMU)?);
    let (daemon_starts, qemu_starts) = (daemon.starts(), qemu.starts());
    // The point may be reached before the daemon has answered, and then it never does: what happens to it decides.
    let asked = cluster.ask_within(host, &["crash-point", VM, phase, action], CRASH_POINT_ANSWER_LIMIT);
    let limit = if asked.is_ok() { CRASH_POINT_LIMIT } else { CRASH_SEEN_LIMIT };
    let died = |process: &Process, starts: u32| !process.is_running() || process.starts() > starts;
    let what = format!("{} to come to {phase} and {action}", host.name());
    let interval = Duration::from_millis(2);
    let reached = wait_until_every(interval, Deadline::after(limit), &what, || {
        let reached = match action {
            "kill-qemu" => died(&qemu, qemu_starts),
            "freeze-daemon" => is_stopped(daemon.pid()),
            _ => died(&daemon, daemon_starts),
        };
        reached.then_some(())
    });
    if let Err(missed) = reached {
        return Err(asked.err().unwrap_or_else(|| cluster.explain(missed)));
    }
    // A daemon that has stopped itself is thawed by the fault's end; stopping it again changes nothing.
    Ok(if action == "freeze-daemon" { vec![daemon.frozen()?] } else { Vec::new() })
}

fn process(host: &Host, name: &str) -> Result<Process> {
    let found = host.process(name);
    found.ok_or_else(|| RigError::Explained(format!("{name} was never started on {}", host.name())))
}

/// Whether a process is stopped by a signal: state T in its stat line, after the name in brackets.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_one_plan() {
        assert_eq!(plan(7, 50), plan(7, 50));
        assert_ne!(plan(7, 50), plan(8, 50));
        assert_eq!(plan(7, 50)[..20], plan(7, 20), "a longer run begins like a shorter one");
    }

    #[test]
    fn every_kind_role_and_phase_comes_up() {
        let text: Vec<String> = plan(1, 3_000).iter().map(Step::to_string).collect();
        let seen = |what: &str| text.iter().any(|step| step.ends_with(what));
        for phase in LEADER_PHASES.iter().chain(&FOLLOWER_PHASES) {
            for action in ACTIONS {
                assert!(seen(&format!("{action} at {phase}")), "{action} at {phase}");
            }
        }
        for role in Role::ALL {
            for kind in ["KillDaemon", "KillQemu", "KillBoth", "Crash", "Freeze", "FreezeDaemon"] {
                assert!(seen(&format!("{role:?}: {kind}")), "{role:?} {kind}");
            }
            for kind in ["CutSilent", "CutCarrier", "SlowLink", "FullDisk"] {
                assert!(seen(&format!("{role:?}: {kind}")), "{role:?} {kind}");
            }
        }
    }
}
