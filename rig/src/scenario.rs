//! Faults under a checking load: strike, see that clients are still served, repair, wait until whole, and judge at the end.
//!
//! The group survives one failure at a time, so a [`Scenario`] allows one at a time: a strike ends only when the fault is
//! undone, all three nodes agree on one view, everybody is connected and the leader calls the VM protected again. What
//! clients saw is judged once, by [`Scenario::finish`]: the load has checked every answer on the way.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::ClientProcess;
use crate::client::protocol::{Job, LoadParameters, LoadReport, RegisterParameters, RegisterReport, Report};
use crate::error::Context;
use crate::guest::BOOT_LIMIT_SECS;
use crate::wait::wait_until_every;
use crate::{Cluster, ClusterOptions, Deadline, Fault, Host, Result, RigError, Service, Testbed, program};

/// Between two looks at the status: every look starts three processes on cores that the guests need.
const LOOK_INTERVAL: Duration = Duration::from_millis(40);
/// Requests of the load that are on their way at the same time: connections, and on each.
const CONNECTIONS: u16 = 8;
const IN_FLIGHT: u32 = 16;
/// Answers that cannot all have been on their way when the fault struck: those that were, and as many again.
const SERVED_ANSWERS: u64 = 2 * CONNECTIONS as u64 * IN_FLIGHT as u64;
/// Longest wait for a client's report: it reads every key back before.
const REPORT_LIMIT: Duration = Duration::from_secs(60);
/// Age at which a client ends by itself.
const CLIENT_LIFE_MS: u64 = 7_200_000;

/// A checking client that runs in a host's namespace; it is killed and reaped when dropped.
pub struct Checker {
    child: Child,
    client: ClientProcess,
}

impl Checker {
    /// Starts `rig-client` with a job.
    ///
    /// # Errors
    /// When it is not built or cannot be started.
    pub fn start(host: &Host, job: &Job) -> Result<Self> {
        let mut command = std::process::Command::new(program("rig-client")?);
        command.args(job.arguments()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = host.namespace().run(|| command.spawn())?.context(|| "cannot start rig-client".into())?;
        let client = ClientProcess::from_child(&mut child);
        Ok(Self { child, client })
    }

    /// The handle to talk with it.
    pub fn client(&mut self) -> &mut ClientProcess {
        &mut self.client
    }

    /// Stops it and returns what it found out.
    ///
    /// # Errors
    /// When it does not report.
    pub fn finish(mut self) -> Result<Report> {
        said(self.client.stop())?;
        said(self.client.report(REPORT_LIMIT))
    }
}

impl Drop for Checker {
    fn drop(&mut self) {
        // It may have ended by itself already; either way it is reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn said<T, E: std::fmt::Display>(result: std::result::Result<T, E>) -> Result<T> {
    result.map_err(|error| RigError::Explained(error.to_string()))
}

/// Who is what, by the word of all three.
#[derive(Clone)]
pub struct Roles {
    /// Leads.
    pub leader: Host,
    /// Has the other copy of the guest.
    pub secondary: Host,
    /// The third.
    pub witness: Host,
}

/// Runs `test` on a cluster of its own, started and with the default set-up except for what `change` changes.
///
/// # Errors
/// When it cannot be built or started.
pub fn on_cluster<T>(
    service: Service,
    change: impl FnOnce(&mut ClusterOptions),
    test: impl FnOnce(&Cluster) -> T,
) -> Result<T> {
    let bed = Testbed::new()?;
    let plover = program("plover")?;
    let programs = plover.parent().expect("it lies in a folder").to_owned();
    let mut options = ClusterOptions::new(service, programs);
    change(&mut options);
    let cluster = Cluster::new(&bed, options)?;
    cluster.start_all()?;
    Ok(test(&cluster))
}

/// What a fault must do to the leadership.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The secondary leads afterwards.
    Moves,
    /// The leader stays.
    Stays,
    /// Either is right.
    Either,
}

/// One fault that was survived.
#[derive(Clone, Debug)]
pub struct Survived {
    /// The case's name.
    pub name: String,
    /// Since the scenario's start.
    pub at: Duration,
    /// From the fault to the first answers that came after it.
    pub served_again: Duration,
    /// From the repair to «protected», all connected.
    pub whole_again: Duration,
}

/// A cluster under load, being hurt.
pub struct Scenario<'a> {
    cluster: &'a Cluster<'a>,
    load: Checker,
    registers: Checker,
    start: Instant,
    survived: Vec<Survived>,
}

/// What the clients saw over the whole scenario.
pub struct Verdict {
    /// Of the pipelined load.
    pub load: LoadReport,
    /// Of the shared registers.
    pub registers: RegisterReport,
    /// The faults in order.
    pub survived: Vec<Survived>,
}

impl<'a> Scenario<'a> {
    /// Waits until the cluster is whole and puts it under load: few pipelined connections, and shared registers.
    ///
    /// # Errors
    /// When the cluster does not become protected or a client cannot connect.
    pub fn start(cluster: &'a Cluster<'a>, seed: u64) -> Result<Self> {
        wait_whole(cluster, Deadline::after_secs(90))?;
        let host = cluster.bed().client();
        // Protected comes before booted: the guest is replicated from its first instruction on.
        host.wait_for_port(cluster.address(), Deadline::after_secs(BOOT_LIMIT_SECS))
            .map_err(|error| cluster.explain(error))?;
        let load = Job::RedisLoad(LoadParameters {
            address: cluster.address(),
            connections: CONNECTIONS,
            in_flight: IN_FLIGHT,
            keys_per_connection: 512,
            seed,
            deadline_ms: CLIENT_LIFE_MS,
            ..LoadParameters::default()
        });
        let registers = Job::Registers(RegisterParameters {
            address: cluster.address(),
            connections: 4,
            think_ms: 20,
            seed,
            deadline_ms: CLIENT_LIFE_MS,
            ..RegisterParameters::default()
        });
        let (mut load, mut registers) = (Checker::start(host, &load)?, Checker::start(host, &registers)?);
        for checker in [&mut load, &mut registers] {
            said(checker.client().wait_started(Duration::from_secs(30)))?;
        }
        let (start, survived) = (Instant::now(), Vec::new());
        Ok(Self { cluster, load, registers, start, survived })
    }

    /// The cluster.
    pub fn cluster(&self) -> &'a Cluster<'a> {
        self.cluster
    }

    /// Faults survived so far.
    pub fn survived(&self) -> &[Survived] {
        &self.survived
    }

    /// One fault from beginning to end. `strike` brings it about and returns what is to be undone; clients must be
    /// served while it is on; it is undone after `hold` more; then everything must become whole again.
    ///
    /// # Errors
    /// When any of that does not happen in time, with what each host says.
    pub fn survive(
        &mut self,
        name: &str,
        expect: Expect,
        hold: Duration,
        strike: impl FnOnce(&Cluster<'a>, &Roles) -> Result<Vec<Fault>>,
    ) -> Result<()> {
        let wrong = |error: RigError| RigError::Explained(format!("«{name}»: {error}"));
        let before = wait_whole(self.cluster, Deadline::after_secs(30)).map_err(wrong)?;
        said(self.load.client().mark(name))?;
        let (at, struck) = (self.start.elapsed(), Instant::now());
        let faults = strike(self.cluster, &before).map_err(wrong)?;
        self.wait_served(Deadline::after_secs(30)).map_err(wrong)?;
        let served_again = struck.elapsed();
        // A fault that lasts is more than one that passes: held on purpose, not to wait for something.
        std::thread::sleep(hold);
        self.wait_served(Deadline::after_secs(30)).map_err(wrong)?;
        let repaired = Instant::now();
        for fault in faults {
            fault.undo()?;
        }
        let after = wait_whole(self.cluster, Deadline::after_secs(60)).map_err(wrong)?;
        let whole_again = repaired.elapsed();
        self.wait_served(Deadline::after_secs(10)).map_err(wrong)?;
        check_leader(expect, &before, &after).map_err(wrong)?;
        let survived = Survived { name: name.to_owned(), at, served_again, whole_again };
        println!(
            "{:7.1} s  {name}: {} led, {} leads; served {:.2} s after the fault, whole {:.2} s after the repair",
            at.as_secs_f64(),
            before.leader.name(),
            after.leader.name(),
            served_again.as_secs_f64(),
            whole_again.as_secs_f64(),
        );
        self.survived.push(survived);
        Ok(())
    }

    /// Waits for so many answers that some were asked for after this call.
    ///
    /// # Errors
    /// When the deadline passes, with what each host says.
    pub fn wait_served(&mut self, deadline: Deadline) -> Result<()> {
        let answers = |checker: &mut Checker| checker.client().progress().map_or(0, |p| p.ops);
        let before = answers(&mut self.load);
        let served = said(
            self.load.client().wait_progress(deadline.remaining(), |progress| progress.ops >= before + SERVED_ANSWERS),
        );
        served.map(drop).map_err(|error| self.cluster.explain(error))
    }

    /// Stops the clients and returns what they saw.
    ///
    /// # Errors
    /// When a client does not report.
    pub fn finish(self) -> Result<Verdict> {
        // Both stop before either reads back: the registers must not write on.
        let Report::Registers(registers) = self.registers.finish()? else {
            return Err(RigError::Explained("no report of registers".into()));
        };
        let Report::RedisLoad(load) = self.load.finish()? else {
            return Err(RigError::Explained("no report of the load".into()));
        };
        Ok(Verdict { load, registers, survived: self.survived })
    }
}

impl Verdict {
    /// A table of the faults with what clients noticed of each.
    pub fn table(&self) -> String {
        let mut text = format!("{:>8}  {:<58} {:>9} {:>9} {:>9}\n", "at", "fault", "gap", "served", "whole");
        for row in &self.survived {
            let window = self.load.windows.iter().find(|w| w.label == row.name);
            text += &format!(
                "{:7.1}s  {:<58} {:7.0}ms {:7.0}ms {:7.0}ms\n",
                row.at.as_secs_f64(),
                row.name,
                window.map_or(f64::NAN, |window| window.gap_ms),
                row.served_again.as_secs_f64() * 1e3,
                row.whole_again.as_secs_f64() * 1e3,
            );
        }
        let load = &self.load;
        text += &format!(
            "{} acknowledged writes, {} lost, {} wrong reads, {} connections lost, {:.0} operations/s, longest gap {:.0} ms; \
             {} register operations",
            load.acknowledged_writes,
            load.acknowledged_writes_lost,
            load.wrong_reads,
            load.connections_lost,
            load.ops_per_s,
            load.gap_ms,
            self.registers.operations,
        );
        text
    }

    /// Everything that clients saw is as if nothing had happened, except for time.
    ///
    /// # Panics
    /// When it is not.
    pub fn assert_flawless(&self) {
        let load = &self.load;
        assert_eq!(load.acknowledged_writes_lost, 0, "{:?} {:?}", load.wrong_read_samples, load.verification);
        assert_eq!(load.wrong_reads, 0, "{:?}", load.wrong_read_samples);
        assert_eq!(load.errors, 0, "{:?}", load.error_samples);
        let verification = load.verification.as_ref().expect("it was asked for");
        assert_eq!(verification.incomplete, None);
        assert!(verification.keys_checked > 0, "nothing was read back");
        assert!(load.acknowledged_writes > 0 && self.registers.operations > 0);
        assert!(self.registers.linearizable, "{:?}", self.registers.keys);
        assert_eq!(load.connections_lost, 0, "{:?}", load.loss_samples);
        assert_eq!(self.registers.connections_lost, 0);
    }
}

fn check_leader(expect: Expect, before: &Roles, after: &Roles) -> Result<()> {
    let moved = before.leader.name() != after.leader.name();
    let right = match expect {
        Expect::Moves => moved,
        Expect::Stays => !moved,
        Expect::Either => true,
    };
    if right {
        return Ok(());
    }
    let (was, is) = (before.leader.name(), after.leader.name());
    Err(RigError::Explained(format!(
        "expected that the leadership {expect:?}, but {was} led before and {is} leads now"
    )))
}

/// Waits until all three nodes follow one leader in one view, are connected with one another, have a QEMU that can be
/// used, and the leader calls the VM protected. Returns who is what.
///
/// # Errors
/// When the deadline passes, with what each host says.
pub fn wait_whole(cluster: &Cluster, deadline: Deadline) -> Result<Roles> {
    wait_until_every(LOOK_INTERVAL, deadline, "a whole group", || whole(cluster).ok()).map_err(|error| {
        let why = whole(cluster).err().unwrap_or_default();
        cluster.explain(RigError::Explained(format!("{error} ({why})")))
    })
}

/// Who is what if the group is whole, else the first reason why it is not.
fn whole(cluster: &Cluster) -> std::result::Result<Roles, String> {
    let hosts = cluster.bed().hosts();
    let mut statuses = Vec::new();
    for host in hosts {
        let status = cluster.status(host);
        statuses.push(status.ok_or_else(|| format!("{} does not answer", host.name()))?);
    }
    let led: Vec<usize> = (0..hosts.len()).filter(|&at| statuses[at]["role"] == "leader").collect();
    let &[leader] = led.as_slice() else {
        return Err(format!("{} say that they lead", led.len()));
    };
    if statuses[leader]["protected"] != true {
        return Err(statuses[leader]["unprotected_reason"].to_string());
    }
    for (host, status) in hosts.iter().zip(&statuses) {
        if status["view"] != statuses[leader]["view"]
            || status["leader"] != *hosts[leader].name()
            || status["secondary"] != statuses[leader]["secondary"]
        {
            return Err(format!("{} sees another group", host.name()));
        }
        let peers = status["peers"].as_array().map_or(&[][..], Vec::as_slice);
        if let Some(away) = peers.iter().find(|peer| peer["connected"] != true) {
            return Err(format!("{} is not connected with {}", host.name(), away["node"]));
        }
    }
    let at = |wanted: &Value| hosts.iter().position(|host| *wanted == *host.name());
    let secondary = at(&statuses[leader]["secondary"]).ok_or_else(|| "no secondary".to_owned())?;
    let witness = (0..hosts.len())
        .find(|&other| other != leader && other != secondary)
        .ok_or_else(|| "the leader is its own secondary".to_owned())?;
    for (at, whole) in [(leader, true), (secondary, true), (witness, false)] {
        let guest = statuses[at]["guest"].as_str().unwrap_or_default();
        // A witness's guest must be there to be brought in, in whatever state.
        if !["running", "stopped", "prepared"].contains(&guest) || whole && statuses[at]["guest_intact"] != true {
            return Err(format!("{}: guest {guest}", hosts[at].name()));
        }
    }
    let role = |at: usize| hosts[at].clone();
    Ok(Roles { leader: role(leader), secondary: role(secondary), witness: role(witness) })
}
