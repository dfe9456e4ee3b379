//! Runs one job to its report: what the `rig-client` binary does, callable from tests.

use std::io;
use std::time::{Duration, Instant};

use super::control::Control;
use super::ledger::Ledger;
use super::protocol::{Command, Job, Output, ProbeParameters, Report, Service, VerifyParameters};
use super::{http, memcached, ping, redis, register, verify};

/// One attempt of a probe.
const ATTEMPT: Duration = Duration::from_millis(500);
/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(20);

/// Does the job and returns its report, or the reason why it could not be done.
///
/// # Errors
/// A sentence that says what, where and why.
pub fn run(job: &Job, control: &mut Control, emit: &mut dyn FnMut(Output)) -> Result<Report, String> {
    match job {
        Job::RedisLoad(p) => redis::run(p, control, emit).map(Report::RedisLoad).map_err(|e| e.to_string()),
        Job::Registers(p) => register::run(p, control, emit).map(Report::Registers).map_err(|e| e.to_string()),
        Job::Ping(p) => ping::run(p, control, emit).map(Report::Ping).map_err(|e| e.to_string()),
        Job::VerifyRedis(p) => verify_redis(p).map(Report::VerifyRedis),
        Job::Probe(p) => probe(p, control),
    }
}

fn verify_redis(p: &VerifyParameters) -> Result<super::protocol::Verification, String> {
    let path = p.ledger_file.display();
    let json = std::fs::read(&p.ledger_file).map_err(|error| format!("cannot read the ledger {path}: {error}"))?;
    let mut ledger: Ledger = serde_json::from_slice(&json).map_err(|error| format!("{path} is no ledger: {error}"))?;
    Ok(verify::verify(p.address, &mut ledger, Duration::from_millis(p.timeout_ms)))
}

fn probe(p: &ProbeParameters, control: &mut Control) -> Result<Report, String> {
    let start = Instant::now();
    let limit = Duration::from_millis(p.timeout_ms);
    loop {
        let error = match attempt(p) {
            Ok(()) => {
                return Ok(Report::Probe { ready_after_ms: start.elapsed().as_micros() as f64 / 1000.0 });
            }
            Err(error) => error,
        };
        let stopped = matches!(control.poll(), Some((_, Command::Stop(true))));
        if stopped || start.elapsed() >= limit {
            return Err(format!("{:?} at {} is not ready after {:?}: {error}", p.service, p.address, start.elapsed()));
        }
        std::thread::sleep(RETRY);
    }
}

fn attempt(p: &ProbeParameters) -> io::Result<()> {
    match p.service {
        Service::Redis => redis::probe(p.address, ATTEMPT),
        Service::Memcached => memcached::probe(p.address, ATTEMPT),
        Service::Http => http::get(p.address, ATTEMPT).map(|_| ()),
    }
}
