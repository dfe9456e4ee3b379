//! What is read before and after a load, and the difference: the leader's syncvms, bytes on the wire, CPU time.
//!
//! The leader's daemon counts its syncvms and keeps distributions of their times; two looks at those give the
//! distribution of what lay between. Rejected: polling for the last syncvm, which misses most and disturbs all.

use std::fs;

use anyhow::{Context, Result, ensure};
use rig::cluster::{DAEMON, QEMU};
use rig::host::UPLINK;
use rig::{Cluster, Host};
use serde::Deserialize;

/// Clock ticks per second in /proc, on every Linux that there is.
const TICKS_PER_S: f64 = 100.0;
/// Leader, secondary, witness.
pub const HOSTS: usize = 3;

/// How often each time occurred: the time in µs and a count, ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Distribution(Vec<(u64, u64)>);

impl Distribution {
    /// What was added since `before`.
    fn since(&self, before: &Distribution) -> Distribution {
        let earlier = |time: u64| before.0.iter().find(|(at, _)| *at == time).map_or(0, |(_, count)| *count);
        let left = self.0.iter().map(|&(time, count)| (time, count.saturating_sub(earlier(time))));
        Distribution(left.filter(|(_, count)| *count > 0).collect())
    }

    /// In milliseconds; 0 if there is nothing.
    #[must_use]
    pub fn quantile_ms(&self, q: f64) -> f64 {
        let total: u64 = self.0.iter().map(|(_, count)| count).sum();
        let rank = ((total as f64 * q).ceil() as u64).max(1);
        let mut below = 0;
        let found = self.0.iter().find(|(_, count)| {
            below += count;
            below >= rank
        });
        found.map_or(0.0, |(us, _)| *us as f64 / 1000.0)
    }

    /// The longest by the median; 0 if there is nothing.
    #[must_use]
    pub fn longest_by_median(&self) -> f64 {
        let median = self.quantile_ms(0.5);
        if median > 0.0 { self.quantile_ms(1.0) / median } else { 0.0 }
    }
}

/// The leader's syncvms: sums since its start, or what lay between two looks.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Syncs {
    /// Acknowledged ones.
    pub count: u64,
    /// Those that failed and were retried.
    pub failed: u64,
    /// Pages written by either side.
    pub dirty_pages: u64,
    /// Pages that differed.
    pub divergent_pages: u64,
    /// Bytes that crossed the wire for them, both ways.
    pub bytes_sent: u64,
    /// How long the guest stood still.
    pub stop_us: Distribution,
    /// From the stop, or the hashing ahead of it, to the acknowledgement.
    pub whole_us: Distribution,
    /// Where their time went: name and sum of each phase.
    #[serde(default)]
    pub phases_us: Vec<(String, u64)>,
    /// What the bytes were about: name and sum of each part.
    #[serde(default)]
    pub traffic_bytes: Vec<(String, u64)>,
}

impl Syncs {
    fn since(&self, before: &Syncs) -> Syncs {
        Syncs {
            count: self.count - before.count,
            failed: self.failed - before.failed,
            dirty_pages: self.dirty_pages - before.dirty_pages,
            divergent_pages: self.divergent_pages - before.divergent_pages,
            bytes_sent: self.bytes_sent - before.bytes_sent,
            stop_us: self.stop_us.since(&before.stop_us),
            whole_us: self.whole_us.since(&before.whole_us),
            phases_us: added(&self.phases_us, &before.phases_us),
            traffic_bytes: added(&self.traffic_bytes, &before.traffic_bytes),
        }
    }

    /// The mean of each phase, for people.
    #[must_use]
    pub fn phases(&self) -> String {
        let mean_ms = |us: u64| us as f64 / 1000.0 / self.count.max(1) as f64;
        let phases: Vec<String> =
            self.phases_us.iter().map(|(name, us)| format!("{name} {:.2}", mean_ms(*us))).collect();
        phases.join(", ")
    }

    /// The mean bytes of each part of a syncvm's traffic, for people.
    #[must_use]
    pub fn traffic(&self) -> String {
        let parts = self.traffic_bytes.iter();
        let parts: Vec<String> = parts.map(|(name, sum)| format!("{name} {}", sum / self.count.max(1))).collect();
        parts.join(", ")
    }

    /// Share of the pages that were equal although written.
    #[must_use]
    pub fn same_rate(&self) -> f64 {
        if self.dirty_pages == 0 { 0.0 } else { 1.0 - self.divergent_pages as f64 / self.dirty_pages as f64 }
    }
}

/// What was added since `before` to sums that have names.
fn added(sums: &[(String, u64)], before: &[(String, u64)]) -> Vec<(String, u64)> {
    let earlier = |name: &str| before.iter().find(|(other, _)| other == name).map_or(0, |(_, sum)| *sum);
    sums.iter().map(|(name, sum)| (name.clone(), sum - earlier(name))).collect()
}

/// One look.
#[derive(Clone, Debug)]
pub struct Look {
    view: u64,
    syncs: Syncs,
    wire_bytes: u64,
    cpu_s: [[f64; 2]; HOSTS],
}

/// What lay between two looks.
#[derive(Clone, Debug)]
pub struct Between {
    /// The leader's syncvms.
    pub syncs: Syncs,
    /// Bytes on the cables of secondary and witness, both ways: all that replicas say to one another, for no client's frame
    /// comes by there.
    pub wire_bytes: u64,
    /// CPU time of daemon and QEMU on each host, seconds.
    pub cpu_s: [[f64; 2]; HOSTS],
}

impl Look {
    /// Looks now. The first host leads.
    ///
    /// # Errors
    /// A daemon does not answer, or the VM is not as it should be.
    pub fn now(cluster: &Cluster<'_>, unreplicated: bool) -> Result<Look> {
        let hosts = cluster.bed().hosts();
        let status = cluster.status(&hosts[0]).context("the leader's daemon does not answer")?;
        let expected = if unreplicated { "unreplicated" } else { "leader" };
        ensure!(
            status["role"] == expected && status["protected"] == !unreplicated,
            "the first host should be {expected} of a VM that is {}protected; it says {status}",
            if unreplicated { "un" } else { "" }
        );
        let syncs = Syncs::deserialize(&status["totals"]).context("the status has no sums over syncvms")?;
        let mut cpu_s = [[0.0; 2]; HOSTS];
        for (host, both) in hosts.iter().zip(&mut cpu_s) {
            for (name, seconds) in [DAEMON, QEMU].iter().zip(both) {
                // A host that has no such process spends nothing on it.
                let process = host.process(name);
                *seconds = process.map_or(Ok(0.0), |process| cpu_seconds(process.pid()))?;
            }
        }
        let wire_bytes = hosts[1..].iter().map(cable_bytes).sum::<Result<u64>>()?;
        Ok(Look { view: status["view"].as_u64().unwrap_or_default(), syncs, wire_bytes, cpu_s })
    }

    /// What has happened since `before`.
    ///
    /// # Errors
    /// There was a failover.
    pub fn since(&self, before: &Look) -> Result<Between> {
        ensure!(
            self.view == before.view,
            "the leader changed under the load (view {} to {}), so the figures are none",
            before.view,
            self.view
        );
        let spent = |host: usize, process: usize| self.cpu_s[host][process] - before.cpu_s[host][process];
        Ok(Between {
            syncs: self.syncs.since(&before.syncs),
            wire_bytes: self.wire_bytes - before.wire_bytes,
            cpu_s: std::array::from_fn(|host| [spent(host, 0), spent(host, 1)]),
        })
    }
}

/// Of all threads of a process.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    ticks(&stat).map(|ticks| ticks as f64 / TICKS_PER_S).with_context(|| format!("{path} says {stat}"))
}

/// User and system time: fields 14 and 15. The command's name may contain anything, so fields count from its bracket.
fn ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Received and sent on a host's cable to the switch.
fn cable_bytes(host: &Host) -> Result<u64> {
    let table = host.namespace().run(|| fs::read_to_string("/proc/thread-self/net/dev"))?;
    let table = table.context("cannot read the network devices' counters")?;
    device_bytes(&table, UPLINK).with_context(|| format!("{} has no counters of {UPLINK}: {table}", host.name()))
}

fn device_bytes(table: &str, device: &str) -> Option<u64> {
    let line = table.lines().find_map(|line| line.trim().strip_prefix(device)?.strip_prefix(':'))?;
    let fields: Vec<&str> = line.split_whitespace().collect();
    Some(fields.first()?.parse::<u64>().ok()? + fields.get(8)?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distribution(pairs: &[(u64, u64)]) -> Distribution {
        Distribution(pairs.to_vec())
    }

    #[test]
    fn two_looks_give_the_distribution_of_what_lay_between() {
        let before = distribution(&[(1_000, 5), (90_000, 1)]);
        let after = distribution(&[(1_000, 8), (2_000, 96), (8_000, 1), (90_000, 1)]);
        let between = after.since(&before);
        assert_eq!(between, distribution(&[(1_000, 3), (2_000, 96), (8_000, 1)]));
        assert_eq!((between.quantile_ms(0.01), between.quantile_ms(0.5)), (1.0, 2.0));
        assert_eq!((between.quantile_ms(0.99), between.quantile_ms(1.0)), (2.0, 8.0));
        assert_eq!(between.longest_by_median(), 4.0);
        assert_eq!((Distribution::default().quantile_ms(0.5), Distribution::default().longest_by_median()), (0.0, 0.0));
    }

    #[test]
    fn the_sums_of_a_status_are_read_by_name() {
        let totals = serde_json::json!({
            "count": 3, "failed": 1, "dirty_pages": 40, "divergent_pages": 10, "bytes_sent": 600,
            "full_transfer_bytes": 7000, "traffic_bytes": [["sets", 60], ["memory", 540]], "stop_ms_p50": 1.5, "stop_us": [[1500, 3]], "whole_us": [[1800, 3]],
        });
        let syncs = Syncs::deserialize(&totals).unwrap();
        assert_eq!((syncs.count, syncs.bytes_sent, syncs.stop_us.quantile_ms(0.5)), (3, 600, 1.5));
        assert_eq!(
            (syncs.traffic(), syncs.since(&syncs).traffic()),
            ("sets 20, memory 180".into(), "sets 0, memory 0".into())
        );
        assert_eq!((syncs.same_rate(), Syncs::default().same_rate()), (0.75, 0.0));
        assert_eq!(syncs.since(&syncs).whole_us, Distribution::default());
    }

    #[test]
    fn the_kernel_s_tables_are_understood() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 250 75 0 0 20 0 1 0 99 1 1";
        assert_eq!((ticks(stat), ticks("7 (a) S 1")), (Some(325), None));
        let table = "Inter-|   Receive    |  Transmit\n face |bytes packets\n  eth0: 100 1 0 0 0 0 0 0 900 2 0 0 0 0 0 0\n\
            eth01: 5 1 0 0 0 0 0 0 5 2 0 0 0 0 0 0\n";
        assert_eq!((device_bytes(table, "eth0"), device_bytes(table, "lo")), (Some(1_000), None));
    }
}
