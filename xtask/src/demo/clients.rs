//! The demo's clients: processes of their own in the client's network namespace, pinned to the client's core.

use std::fs::File;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rig::Testbed;
use rig::client::ClientProcess;
use rig::client::protocol::{
    Job, LoadParameters, PingParameters, ProbeParameters, RegisterParameters, Report, Service,
};
use rig::testbed::GUEST_IP;

use super::Arguments;

/// The client program of the rig.
pub const PROGRAM: &str = "rig-client";
/// Connections of the load.
pub const CONNECTIONS: u16 = 64;
/// Requests in flight on each, when pipelined.
pub const IN_FLIGHT: u32 = 64;
/// Connections of the client that records histories of shared keys.
pub const HISTORY_CONNECTIONS: u16 = 6;
/// Keeps the load's keys apart from those of other clients.
const RUN: u32 = 1;
/// To start, or to answer a command; the machine may be busy.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// A server that is silent for longer will not speak again.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// A demo that takes longer has hung.
const LIFE_LIMIT_MS: u64 = 900_000;

/// A running client.
pub struct Client {
    name: &'static str,
    child: Child,
    process: ClientProcess,
}

impl Client {
    /// Starts it on `core`. Its standard error goes to `NAME.log` in the client's directory.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(bed: &Testbed, name: &'static str, core: usize, job: &Job) -> Result<Self> {
        let log = bed.client().directory().join(format!("{name}.log"));
        let log = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = Command::new("taskset");
        command
            .args(["-c", &core.to_string()])
            .arg(rig::release_program(PROGRAM)?)
            .args(job.arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        let mut child = bed
            .client()
            .namespace()
            .run(|| command.spawn())?
            .with_context(|| format!("cannot start the {name} client"))?;
        let process = ClientProcess::from_child(&mut child);
        Ok(Self { name, child, process })
    }

    /// Waits until its first requests leave.
    ///
    /// # Errors
    /// When they do not.
    pub fn wait_started(&self) -> Result<()> {
        self.process.wait_started(ANSWER_LIMIT).with_context(|| format!("the {} client did not start", self.name))
    }

    /// Opens a window; returns when, in milliseconds since the client's start.
    ///
    /// # Errors
    /// When the client does not confirm.
    pub fn mark(&mut self, label: &str) -> Result<f64> {
        self.process
            .mark(label)
            .and_then(|()| self.process.wait_marked(label, ANSWER_LIMIT))
            .with_context(|| format!("the {} client did not mark «{label}»", self.name))
    }

    /// Changes the pipelining of the load.
    ///
    /// # Errors
    /// When the client has gone.
    pub fn set_in_flight(&mut self, in_flight: u32) -> Result<()> {
        self.process.set_in_flight(in_flight).with_context(|| format!("the {} client has gone", self.name))
    }

    /// Answers so far.
    pub fn answers(&self) -> u64 {
        self.process.progress().map_or(0, |progress| progress.ops)
    }

    /// Waits until it has so many answers.
    ///
    /// # Errors
    /// When the server stays silent.
    pub fn wait_for_answers(&self, count: u64) -> Result<()> {
        self.process
            .wait_progress(SILENCE_LIMIT, |progress| progress.ops >= count)
            .with_context(|| format!("the {} client gets no answers any more", self.name))?;
        Ok(())
    }

    /// Has it drain, verify and report.
    ///
    /// # Errors
    /// When there is no report within `limit`.
    pub fn finish(mut self, limit: Duration) -> Result<Report> {
        // A client that has ended by itself may have reported before.
        drop(self.process.stop());
        self.process.report(limit).with_context(|| format!("no report from the {} client", self.name))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It ends by itself when its standard input closes, but not before its verification; nobody waits for that now.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The checking load.
pub fn load(address: SocketAddr, arguments: &Arguments) -> LoadParameters {
    LoadParameters {
        address,
        connections: CONNECTIONS,
        in_flight: IN_FLIGHT,
        seed: arguments.seed,
        run: RUN,
        deadline_ms: LIFE_LIMIT_MS + 2_000 * arguments.duration,
        ..LoadParameters::default()
    }
}

/// Shared keys with a recorded history.
pub fn registers(address: SocketAddr, arguments: &Arguments) -> Job {
    Job::Registers(RegisterParameters {
        address,
        connections: HISTORY_CONNECTIONS,
        seed: arguments.seed,
        run: RUN + 1,
        deadline_ms: LIFE_LIMIT_MS,
        ..RegisterParameters::default()
    })
}

/// The steady ping.
pub fn ping(arguments: &Arguments) -> Job {
    Job::Ping(PingParameters {
        address: GUEST_IP,
        interval_ms: 20,
        deadline_ms: LIFE_LIMIT_MS + 2_000 * arguments.duration,
        ..PingParameters::default()
    })
}

/// Waits until the guest's Redis answers the client.
///
/// # Errors
/// When it does not within the time of a boot.
pub fn wait_for_redis(bed: &Testbed, address: SocketAddr, core: usize) -> Result<()> {
    let limit = Duration::from_secs(rig::guest::BOOT_LIMIT_SECS);
    let job = Job::Probe(ProbeParameters { service: Service::Redis, address, timeout_ms: limit.as_millis() as u64 });
    let probe = Client::start(bed, "probe", core, &job)?;
    probe.process.report(limit + ANSWER_LIMIT).context("the guest's Redis does not answer the client")?;
    Ok(())
}
