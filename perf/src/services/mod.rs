//! Real services in real guests, protected by three real daemons, under each policy.
//!
//! Each pass boots the guest under each policy in turn and measures all loads of the service; the order of the policies
//! alternates from pass to pass. A figure of a table is the median over the passes, a ratio the median of the passes'
//! ratios. Rejected: all policies up at once with cells taking turns. What idle daemons and guests cost would go into
//! every cell, and freezing them makes them think that the others have failed.

mod boot;
mod cell;
mod client;
mod counters;
mod memcached;
mod plots;
mod policy;
mod postgres;
mod redis;
mod report;
mod web;
mod workload;

use std::path::Path;

use anyhow::{Context, Result};
use rig::Testbed;

use crate::Effort;
use crate::group::Sink;
use crate::pin::two_cpus;
use crate::results::{self, Scratch};
use crate::rows::Rows;
pub(crate) use boot::copy_programs;
use cell::Cell;
use client::Client;
use policy::{Policy, VSMR};
use report::{Column, LEGEND, Measured};
use workload::{Suite, Workload};

/// A file system in memory, on every Linux.
const MEMORY: &str = "/dev/shm";

/// Measures everything that is wanted.
///
/// # Errors
/// Not root, a guest that does not come up, a load generator that fails, or a wrong answer.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    let scratch = Scratch::new(&std::env::temp_dir(), "plover-perf-services")?;
    let logs = Scratch::new(Path::new(MEMORY), "plover-perf-services-logs")?;
    boot::copy_programs(scratch.path())?;
    let suites: &[Suite] = effort.pick(&workload::ALL[..], &workload::SMOKE[..]);
    for suite in suites {
        let wanted = suite.workloads.iter().filter(|workload| sink.wants_some(&format!("{}.", workload.id)));
        let wanted: Vec<&Workload> = wanted.collect();
        if wanted.is_empty() {
            continue;
        }
        let rows: &Rows = sink;
        let policies = suite.policies.iter().copied().filter(|policy| is_wanted(*policy, &wanted, rows)).collect();
        let run = Run {
            suite,
            policies,
            wanted,
            cpus: two_cpus()?,
            directory: scratch.path(),
            logs: logs.path(),
            effort,
            passes: rows.passes.unwrap_or(effort.pick(3, 1)),
        };
        let measured = run.measure()?;
        for one in &measured {
            println!("{}", one.table());
        }
        for one in &measured {
            for row in one.rows(effort, &measured) {
                if sink.wants(&row.id) {
                    sink(row)?;
                }
            }
        }
        print!("{LEGEND}");
        for path in plots::write(&measured, &results::directory())? {
            println!("plot: {}", path.display());
        }
    }
    Ok(())
}

/// The default policy always is, any other if some row compares with it.
fn is_wanted(policy: Policy, workloads: &[&Workload], wanted: &Rows) -> bool {
    let rows = report::rows_against(policy);
    // The last of the switches is the default policy under another name.
    let ours = policy.lines == VSMR.lines && !policy.unreplicated;
    ours || workloads.iter().any(|one| rows.iter().any(|row| wanted.wants(&format!("{}.{row}", one.id))))
}

/// Everything about one service.
struct Run<'a> {
    suite: &'a Suite,
    policies: Vec<Policy>,
    wanted: Vec<&'a Workload>,
    cpus: [usize; 2],
    /// With the programs, and for the output of load generators.
    directory: &'a Path,
    /// For the logs of the hosts.
    logs: &'a Path,
    effort: Effort,
    passes: usize,
}

impl<'a> Run<'a> {
    fn measure(&self) -> Result<Vec<Measured<'a>>> {
        let column = |policy: &Policy| Column { policy: *policy, cells: Vec::new() };
        let empty =
            |workload: &&'a Workload| Measured { workload, columns: self.policies.iter().map(column).collect() };
        let mut measured: Vec<Measured<'a>> = self.wanted.iter().map(empty).collect();
        for pass in 0..self.passes {
            let mut order: Vec<usize> = (0..self.policies.len()).collect();
            if pass % 2 == 1 {
                order.reverse();
            }
            for at in order {
                let policy = self.policies[at];
                let cells = self.under(policy);
                let cells = cells.with_context(|| format!("{} under «{}»", self.suite.service.name(), policy.name))?;
                for (one, cell) in measured.iter_mut().zip(cells) {
                    one.columns[at].cells.push(cell);
                }
            }
        }
        Ok(measured)
    }

    /// Boots the guest under one policy and measures all loads.
    fn under(&self, policy: Policy) -> Result<Vec<Cell>> {
        let bed = Testbed::new().context("services run in guests")?;
        let outcome = self.cells(&bed, policy);
        if outcome.is_err() {
            bed.keep_logs()?;
        }
        outcome
    }

    fn cells(&self, bed: &Testbed, policy: Policy) -> Result<Vec<Cell>> {
        let cluster = boot::boot(bed, self.suite.service, policy, self.directory, self.logs, self.cpus)?;
        let client =
            Client { host: bed.client(), cpu: self.cpus[1], directory: self.directory, address: cluster.address() };
        let seconds = self.effort.pick(3.0, 0.3);
        let measure = |workload: &&Workload| {
            let mut cell = Cell::measure(&cluster, &client, policy, workload, seconds);
            if let (Err(error), false) = (&cell, policy.unreplicated) {
                eprintln!("NOTE: {} under {} is measured again: {error:#}", workload.id, policy.name);
                boot::wait_protected(&cluster)?;
                cell = Cell::measure(&cluster, &client, policy, workload, seconds);
            }
            let explain = |error| if policy.unreplicated { error } else { explain(&cluster, &error) };
            let cell = cell.map_err(explain).with_context(|| workload.id.to_owned())?;
            let Cell { speed, cost } = &cell;
            eprintln!("   {} under {}: {:.0} 1/s, p50 {:.0} us", workload.id, policy.name, speed.per_s, speed.p50_us);
            if cost.syncs.count > 0 {
                eprintln!("      a syncvm's phases, mean ms: {}", cost.syncs.phases());
                eprintln!("      a syncvm's traffic, mean bytes: {}", cost.syncs.traffic());
            }
            Ok(cell)
        };
        self.wanted.iter().map(measure).collect()
    }
}

/// With what each host says.
fn explain(cluster: &rig::Cluster<'_>, error: &anyhow::Error) -> anyhow::Error {
    cluster.explain(rig::RigError::Explained(format!("{error:#}"))).into()
}
