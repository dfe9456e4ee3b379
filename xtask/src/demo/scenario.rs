//! The play itself: one leader alone, protected, its host killed, its successor's link cut, all under one load.
//!
//! The load keeps its connections from the first act to the last. Windows of the clients are marked for each act; what is in
//! them is read from their reports at the end. Times are those of the load's clock.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rig::client::protocol::{Job, LoadReport, PingReport, RegisterReport, Report, WindowReport};
use rig::client::rng::Rng;
use rig::fault::Cut;
use rig::report::{CUT_GAP_LIMIT_MS, DemoReport, Event, Failure, KILLED_GAP_LIMIT_MS};
use rig::{Cluster, Deadline, Fault, Host, wait_until};

use super::baseline::{SETTLE, rate};
use super::clients::{self, Client};
use super::syncvms::Collected;
use super::watch::{self, Leader};
use super::{Arguments, Cores};
use crate::progress::step;

const DEGRADED: &str = "degraded";
const PROTECTED: &str = "protected";
const UNPIPELINED: &str = "unpipelined";
/// The load goes on that long before a failure and after the recovery, so that late effects are seen, too.
const CALM: Duration = Duration::from_secs(2);
/// The seed decides how much later than [`CALM`] a failure comes.
const JITTER_MS: u32 = 1_000;
/// Until a booted host has loaded its guest.
const BOOT_LIMIT_SECS: u64 = 60;
/// Details of each kind of fault in the table.
const SAMPLES: usize = 4;
/// A client drains, reads everything back and reports.
const REPORT_LIMIT: Duration = Duration::from_secs(90);

/// What is running, and what was seen so far.
pub struct Scenario<'a> {
    cluster: &'a Cluster<'a>,
    arguments: &'a Arguments,
    cores: Cores,
    report: &'a mut DemoReport,
    load: Option<Client>,
    ping: Option<Client>,
    registers: Option<Client>,
    /// When the load's clock was zero.
    origin: Instant,
    syncvms: Collected,
    rng: Rng,
}

/// A kind of failure.
struct Blow {
    kind: &'static str,
    gap_limit_ms: f64,
    strike: fn(&Host) -> rig::Result<Fault>,
    /// What happened, after the host's name.
    event: &'static str,
    /// What happens when it is over, after the host's name.
    undone: &'static str,
}

const HOST_KILLED: Blow = Blow {
    kind: "leader host killed",
    gap_limit_ms: KILLED_GAP_LIMIT_MS,
    strike: Host::crash,
    event: "the leader's host, is killed",
    undone: "boots again",
};

const LINK_CUT: Blow = Blow {
    kind: "leader link cut",
    gap_limit_ms: CUT_GAP_LIMIT_MS,
    strike: |host| host.cut_link(Cut::Silent),
    event: "the leader, is cut off",
    undone: "is reachable again",
};

impl<'a> Scenario<'a> {
    /// Nothing runs yet.
    pub fn new(cluster: &'a Cluster<'a>, arguments: &'a Arguments, cores: Cores, report: &'a mut DemoReport) -> Self {
        Self {
            cluster,
            arguments,
            cores,
            report,
            load: None,
            ping: None,
            registers: None,
            origin: Instant::now(),
            syncvms: Collected::default(),
            rng: Rng::new(arguments.seed),
        }
    }

    /// All acts. Afterwards, also after an error, comes [`Scenario::finish`].
    ///
    /// # Errors
    /// When the group did not get to where it should.
    pub fn play(&mut self) -> Result<()> {
        self.serve_alone()?;
        self.become_protected()?;
        self.measure_protected()?;
        self.start_registers()?;
        self.suffer(&HOST_KILLED)?;
        self.suffer(&LINK_CUT)
    }

    fn now_ms(&self) -> f64 {
        self.origin.elapsed().as_secs_f64() * 1000.0
    }

    fn event(&mut self, t_ms: f64, text: impl Into<String>) {
        let text = text.into();
        self.report.events.push(Event { t_ms, text });
    }

    /// Opens a window of this name in load and ping; returns when on the load's clock.
    fn mark(&mut self, label: &str) -> Result<f64> {
        let load = self.load.as_mut().context("there is no load")?;
        let t_ms = load.mark(label)?;
        self.origin = Instant::now() - Duration::from_secs_f64(t_ms / 1000.0);
        if let Some(ping) = &mut self.ping {
            ping.mark(label)?;
        }
        Ok(t_ms)
    }

    fn serve_alone(&mut self) -> Result<()> {
        let (cluster, cores) = (self.cluster, self.cores);
        let hosts = cluster.bed().hosts();
        step("daemons on three hosts, a guest on h1 only", || {
            for host in hosts {
                cluster.start_daemon(host)?;
            }
            cluster.start_qemu(&hosts[0])?;
            clients::wait_for_redis(cluster.bed(), cluster.address(), cores.client)
                .map_err(|error| watch::explain(cluster, error))
        })?;
        let job = Job::RedisLoad(clients::load(cluster.address(), self.arguments));
        let load = Client::start(cluster.bed(), "load", cores.client, &job)?;
        load.wait_started()?;
        let ping = clients::ping(self.arguments);
        let ping = Client::start(cluster.bed(), "ping", cores.client, &ping)?;
        ping.wait_started()?;
        (self.load, self.ping) = (Some(load), Some(ping));
        self.mark("alone")?;
        self.event(0.0, "h1 serves alone, load begins");
        let window = self.arguments.short_window();
        step("degraded: h1 serves alone, under load", || {
            sleep(SETTLE);
            self.mark(DEGRADED)?;
            sleep(window);
            self.mark("joining").map(drop)
        })
    }

    fn become_protected(&mut self) -> Result<()> {
        let cluster = self.cluster;
        let begun_ms = self.now_ms();
        self.event(begun_ms, "h2 and h3 get their QEMUs");
        let leader = step("guests on h2 and h3, waiting until protected", || {
            for host in &cluster.bed().hosts()[1..] {
                cluster.start_qemu(host)?;
            }
            let whole = |leader: &Leader| leader.is_protected() && leader.is_connected();
            watch::wait(cluster, "«protected»", None, |_| {}, whole)
        })?;
        let t_ms = self.now_ms();
        self.event(t_ms, format!("protected: {}", leader.describe()));
        Ok(())
    }

    fn measure_protected(&mut self) -> Result<()> {
        let (long, short) = (self.arguments.long_window(), self.arguments.short_window());
        let view = self.protected_view()?;
        step("protected: 64 connections, 64 in flight each", || {
            sleep(SETTLE);
            self.mark(PROTECTED)?;
            sleep(long);
            self.mark("change").map(drop)
        })?;
        step("protected: 64 connections, 1 in flight each", || {
            self.set_in_flight(1)?;
            sleep(SETTLE);
            self.mark(UNPIPELINED)?;
            sleep(short);
            self.mark("change back")?;
            self.set_in_flight(clients::IN_FLIGHT)
        })?;
        let after = self.protected_view()?;
        ensure!(
            after == view,
            "the leader changed while the protected throughput was measured (view {view} to {after}), so the figure is none"
        );
        Ok(())
    }

    fn set_in_flight(&mut self, in_flight: u32) -> Result<()> {
        let load = self.load.as_mut().context("there is no load")?;
        load.set_in_flight(in_flight)
    }

    fn protected_view(&mut self) -> Result<u64> {
        let leader = watch::leader(self.cluster, None).context("nobody leads")?;
        let why = &leader.status["unprotected_reason"];
        ensure!(leader.is_protected(), "not protected any more: {why}");
        self.syncvms.collect(self.cluster);
        Ok(leader.view)
    }

    fn start_registers(&mut self) -> Result<()> {
        let job = clients::registers(self.cluster.address(), self.arguments);
        let core = self.cores.client;
        let registers = Client::start(self.cluster.bed(), "registers", core, &job)?;
        registers.wait_started()?;
        self.registers = Some(registers);
        Ok(())
    }

    /// One failure, until the group is protected again, and then until all three hosts are back.
    fn suffer(&mut self, blow: &Blow) -> Result<()> {
        sleep(CALM + Duration::from_millis(self.rng.below(JITTER_MS).into()));
        let cluster = self.cluster;
        let struck = watch::leader(cluster, None).context("nobody leads")?;
        self.syncvms.collect(cluster);
        let number = self.report.failures.len() + 1;
        let name = struck.host.name();
        let at_ms = self.mark(&failure_label(number))?;
        let fault = (blow.strike)(struck.host)?;
        self.event(at_ms, format!("{name}, {}", blow.event));
        self.report.failures.push(Failure {
            kind: blow.kind.into(),
            at_ms,
            gap_ms: 0.0,
            connection_gap_ms: 0.0,
            gap_limit_ms: blow.gap_limit_ms,
            ping_gap_ms: None,
            protected_again_ms: None,
        });
        let recovered = self.recover(&struck, blow, at_ms);
        // Late effects on the client still belong to the failure, and so does a silence, until it ends.
        let answered = recovered.and_then(|()| {
            sleep(CALM);
            self.wait_for_answers()
        });
        self.mark(&repair_label(number))?;
        answered?;
        self.repair(struck.host, blow, fault)
    }

    fn wait_for_answers(&mut self) -> Result<()> {
        let load = self.load.as_ref().context("there is no load")?;
        let before = load.answers();
        step("the load goes on", || load.wait_for_answers(before + 1))
    }

    fn recover(&mut self, struck: &Leader, blow: &Blow, at_ms: f64) -> Result<()> {
        let (cluster, origin) = (self.cluster, self.origin);
        let now_ms = || origin.elapsed().as_secs_f64() * 1000.0;
        let mut successor = None;
        let see = |leader: &Leader| {
            successor.get_or_insert_with(|| (now_ms(), leader.host.name().to_owned()));
        };
        let what = format!("{}: waiting until protected again", blow.kind);
        let outcome = step(&what, || {
            let enough = |leader: &Leader| leader.is_protected();
            watch::wait(cluster, "«protected» again", Some(struck.view), see, enough)
        });
        let again_ms = now_ms();
        if let Some((t_ms, name)) = successor {
            self.event(t_ms, format!("{name} leads"));
        }
        let leader = outcome?;
        self.event(again_ms, format!("protected again: {}", leader.describe()));
        if let Some(failure) = self.report.failures.last_mut() {
            failure.protected_again_ms = Some(again_ms - at_ms);
        }
        Ok(())
    }

    fn repair(&mut self, host: &Host, blow: &Blow, fault: Fault) -> Result<()> {
        let (cluster, name) = (self.cluster, host.name());
        let begun_ms = self.now_ms();
        self.event(begun_ms, format!("{name} {}", blow.undone));
        let what = format!("{name} {}: waiting until all three are back", blow.undone);
        let leader = step(&what, || {
            fault.undo()?;
            let deadline = Deadline::after_secs(BOOT_LIMIT_SECS);
            wait_until(deadline, &format!("the guest of {name}"), || {
                watch::guest_is_ready(cluster, host).then_some(())
            })
            .map_err(|error| watch::explain(cluster, error.into()))?;
            let whole = |leader: &Leader| leader.is_protected() && leader.is_connected();
            watch::wait(cluster, "three connected hosts", None, |_| {}, whole)
        })?;
        let t_ms = self.now_ms();
        self.event(t_ms, format!("all three are back: {}", leader.describe()));
        Ok(())
    }

    /// Ends the clients and takes their findings into the report.
    ///
    /// # Errors
    /// When a client does not report.
    pub fn finish(mut self) -> Result<()> {
        let Some(load) = self.load.take() else {
            return Ok(());
        };
        let (registers, ping) = (self.registers.take(), self.ping.take());
        let findings = step("clients stop, every key is read back", || {
            let registers = registers.map(|client| client.finish(REPORT_LIMIT));
            let ping = ping.map(|client| client.finish(REPORT_LIMIT));
            // The load's findings are worth most: the others' absence must not hide them.
            Ok((load.finish(REPORT_LIMIT)?, registers, ping))
        });
        self.syncvms.collect(self.cluster);
        self.report.syncvm = self.syncvms.sums();
        let (load, registers, ping) = findings?;
        if let Report::RedisLoad(load) = load {
            self.take_load(load);
        }
        if let Some(Report::Ping(ping)) = ping.transpose()? {
            self.take_ping(&ping);
        }
        if let Some(Report::Registers(registers)) = registers.transpose()? {
            self.take_registers(&registers);
        }
        Ok(())
    }

    fn take_load(&mut self, load: LoadReport) {
        let report = &mut *self.report;
        report.operations = load.operations;
        report.acknowledged_writes = load.acknowledged_writes;
        report.acknowledged_writes_lost = load.acknowledged_writes_lost;
        report.wrong_answers += load.wrong_reads + load.errors;
        report.connections_lost += load.connections_lost;
        let wrong = load.wrong_read_samples.iter();
        let lost = load.verification.iter().flat_map(|found| &found.lost);
        let samples = wrong
            .chain(lost)
            .map(|sample| format!("{}: {} expected, {} read", sample.key, sample.expected, sample.got));
        report.samples = samples.take(SAMPLES).collect();
        let refused = load.error_samples.iter().take(SAMPLES);
        let given_up = load.loss_samples.iter().take(SAMPLES);
        report.samples.extend(refused.chain(given_up).cloned());
        report.verification_incomplete = match &load.verification {
            Some(found) => found.incomplete.clone(),
            None => Some("the keys were not read back".into()),
        };
        report.ops_per_s.degraded = rate(&load, DEGRADED);
        report.ops_per_s.protected = rate(&load, PROTECTED);
        report.ops_per_s.protected_unpipelined = rate(&load, UNPIPELINED);
        for (number, failure) in (1..).zip(&mut report.failures) {
            if let Some(window) = window_of(&load.windows, &failure_label(number)) {
                failure.gap_ms = window.gap_ms;
                failure.connection_gap_ms = window.connection_gap_ms;
            }
            // A connection that was served late of all may have been waiting since the failure.
            if let Some(after) = window_of(&load.windows, &repair_label(number)) {
                let gap_ms = failure.connection_gap_ms.max(after.connection_gap_ms);
                failure.connection_gap_ms = gap_ms;
            }
        }
        report.series_100ms = load.series_100ms;
    }

    fn take_ping(&mut self, ping: &PingReport) {
        for (number, failure) in (1..).zip(&mut self.report.failures) {
            failure.ping_gap_ms = window_of(&ping.windows, &failure_label(number)).map(|window| window.gap_ms);
        }
    }

    fn take_registers(&mut self, registers: &RegisterReport) {
        let report = &mut *self.report;
        report.connections_lost += registers.connections_lost;
        report.wrong_answers += registers.errors;
        report.linearizable = Some(registers.linearizable);
        report.checked_operations = registers.operations;
        for key in &registers.keys {
            if !registers.linearizable {
                report.samples.push(format!("{}: {:?}", key.key, key.verdict));
            }
        }
    }
}

fn failure_label(number: usize) -> String {
    format!("failure {number}")
}

fn repair_label(number: usize) -> String {
    format!("repair {number}")
}

fn window_of<'a>(windows: &'a [WindowReport], label: &str) -> Option<&'a WindowReport> {
    windows.iter().find(|window| window.label == label)
}
