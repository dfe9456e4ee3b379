//! The rig's checking Redis client, which records answers and latencies per interval.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rig::Testbed;
use rig::client::ClientProcess;
use rig::client::protocol::{Job, LoadParameters, LoadReport, Report};

/// To start, or to answer a command; the machine may be busy.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// To get the last answers, read every key back and report.
const REPORT_LIMIT: Duration = Duration::from_secs(90);

/// The running client.
pub struct Load {
    child: Child,
    process: ClientProcess,
}

impl Load {
    /// Starts it in the client's network namespace, on `cpu`.
    ///
    /// # Errors
    /// It cannot be started, or reaches no server.
    pub fn start(bed: &Testbed, cpu: usize, parameters: LoadParameters) -> Result<Load> {
        let log = bed.client().directory().join("load.log");
        let log = std::fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = Command::new("taskset");
        command
            .args(["-c", &cpu.to_string()])
            .arg(rig::release_program("rig-client")?)
            .args(Job::RedisLoad(parameters).arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        let child = bed.client().namespace().run(|| command.spawn())?;
        let mut child = child.context("cannot start the client (is taskset of util-linux installed?)")?;
        let process = ClientProcess::from_child(&mut child);
        let load = Load { child, process };
        load.process.wait_started(ANSWER_LIMIT).context("the load did not start")?;
        Ok(load)
    }

    /// Begins a window of this name; returns when, in milliseconds since the client's start.
    ///
    /// # Errors
    /// The client does not confirm.
    pub fn mark(&mut self, label: &str) -> Result<f64> {
        self.process.mark(label)?;
        Ok(self.process.wait_marked(label, ANSWER_LIMIT)?)
    }

    /// Ends the load. Nothing may have been lost.
    ///
    /// # Errors
    /// No report, or an answer that was wrong, or a write or a connection that was lost.
    pub fn finish(mut self) -> Result<LoadReport> {
        self.process.stop()?;
        let Report::RedisLoad(report) = self.process.report(REPORT_LIMIT).context("no report from the load")? else {
            anyhow::bail!("the load reports about something else");
        };
        let verification = report.verification.as_ref().context("the keys were not read back")?;
        ensure!(verification.incomplete.is_none(), "not every key was read back: {:?}", verification.incomplete);
        let faults = [
            ("acknowledged writes lost", report.acknowledged_writes_lost),
            ("wrong answers", report.wrong_reads),
            ("errors", report.errors),
            ("connections lost", report.connections_lost),
        ];
        for (what, count) in faults {
            ensure!(count == 0, "{count} {what}: {:?} {:?}", report.wrong_read_samples, report.loss_samples);
        }
        Ok(report)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        // It ends by itself when its standard input closes, but not before its verification; nobody waits for that now.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
