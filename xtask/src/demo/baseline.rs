//! What the guest does without Plover: stock QEMU with its own network backend, on the cores that the leader will have.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail};
use rig::client::protocol::{Job, LoadParameters, LoadReport, Report};
use rig::report::DemoReport;
use rig::testbed::GUEST_IP;
use rig::{Guest, Service, Testbed};

use super::clients::{self, Client};
use super::{Arguments, Cores};
use crate::progress::step;

const PIPELINED: &str = "pipelined";
const UNPIPELINED: &str = "unpipelined";
/// Until queues and caches have settled after the load has changed.
pub const SETTLE: Duration = Duration::from_secs(1);
const REPORT_LIMIT: Duration = Duration::from_secs(60);

/// Boots the guest, measures both kinds of load, ends the guest.
///
/// # Errors
/// When the guest does not come up, or the client saw a fault: then the figures mean nothing.
pub fn measure(bed: &Testbed, arguments: &Arguments, cores: Cores, report: &mut DemoReport) -> Result<()> {
    let guest = Guest::new(Service::Redis);
    let address = SocketAddr::new(GUEST_IP.into(), guest.service.port());
    let qemu = step("unreplicated: the guest boots on stock QEMU", || {
        let qemu = guest.boot_plain(bed.host(0), &[cores.leader])?;
        clients::wait_for_redis(bed, address, cores.client)?;
        Ok(qemu)
    })?;
    let job = Job::RedisLoad(LoadParameters { verify: false, ..clients::load(address, arguments) });
    let mut load = Client::start(bed, "baseline", cores.client, &job)?;
    load.wait_started()?;
    let window = arguments.short_window();
    step("unreplicated: 64 connections, 64 in flight each", || {
        sleep(SETTLE);
        load.mark(PIPELINED)?;
        sleep(window);
        load.mark("change")
    })?;
    step("unreplicated: 64 connections, 1 in flight each", || {
        load.set_in_flight(1)?;
        sleep(SETTLE);
        load.mark(UNPIPELINED)?;
        sleep(window);
        load.mark("end")
    })?;
    let measured = load.finish(REPORT_LIMIT)?;
    qemu.finish()?;
    let Report::RedisLoad(measured) = measured else {
        bail!("the load client reported something else than a load: {measured:?}");
    };
    if measured.connections_lost + measured.errors + measured.wrong_reads > 0 {
        bail!("the unreplicated guest did not serve properly: {measured:?}");
    }
    report.ops_per_s.unreplicated = rate(&measured, PIPELINED);
    report.ops_per_s.unreplicated_unpipelined = rate(&measured, UNPIPELINED);
    Ok(())
}

/// Answers per second in the window of that name.
pub fn rate(report: &LoadReport, label: &str) -> Option<f64> {
    let window = report.windows.iter().find(|window| window.label == label)?;
    Some(window.ops_per_s())
}
