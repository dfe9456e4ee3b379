//! Group `failover`: what clients see while the leader's host dies, 20 ms by 20 ms.
//!
//! Three hosts as in the demo, a Redis guest on each, and 64 clients that wait for each answer. The host of the leader is killed
//! under that load; the other two go on, and once the witness has rejoined as secondary the host boots again and the next leader
//! is killed. No answer may be wrong and no acknowledged write lost, or the run fails.

mod load;

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rig::client::protocol::{LoadParameters, Moment};
use rig::{Cluster, ClusterOptions, Deadline, Host, Service, Testbed, wait_until};

use crate::group::Sink;
use crate::plot::{self, Event, Panel, Series};
use crate::sample::{Better, Figure, alone};
use crate::services::copy_programs;
use crate::{Effort, pin, results};
use load::Load;

/// One bar of the series.
const INTERVAL_MS: u64 = 20;
/// Longest life of the load: more than all deadlines together.
const LOAD_LIMIT_MS: u64 = 900_000;
/// Until everything that has to come back has come back.
const LIMIT_SECS: u64 = 120;
/// The plot begins that long before the kill, and ends that long after the last event, in seconds.
const AROUND_S: f64 = 1.5;
/// The plot is no longer, in seconds: what happens later is not what clients feel.
const LONGEST_S: f64 = 12.0;

/// Measures, and draws the last failover.
///
/// # Errors
/// Not root, a group that does not survive, or a client that saw something wrong.
pub fn run(effort: Effort, sink: Sink<'_>) -> Result<()> {
    let bed = Testbed::new().context("a failover needs hosts and guests")?;
    let outcome = measure(&bed, effort, sink);
    if outcome.is_err() {
        bed.keep_logs()?;
    }
    outcome
}

/// One death of a leader, on the load's clock.
struct Kill {
    label: String,
    at_ms: f64,
    /// A leader is there again, and protected.
    protected_ms: f64,
}

fn measure(bed: &Testbed, effort: Effort, sink: Sink<'_>) -> Result<()> {
    let cpus = pin::two_cpus()?;
    let scratch = results::Scratch::new(&std::env::temp_dir(), "plover-perf-failover")?;
    copy_programs(scratch.path())?;
    let mut options = ClusterOptions::new(Service::Redis, scratch.path().to_owned());
    options.node = String::new();
    options.qemu_cores = vec![vec![cpus[0]], vec![cpus[1]], Vec::new()];
    options.daemon_cores = vec![cpus[1]];
    let cluster = Cluster::new(bed, options)?;
    cluster.start_all()?;
    bed.client()
        .wait_for_port(cluster.address(), Deadline::after_secs(LIMIT_SECS))
        .map_err(|error| cluster.explain(error))?;
    whole(&cluster)?;
    let parameters = LoadParameters {
        address: cluster.address(),
        connections: 64,
        in_flight: 1,
        timeline_ms: INTERVAL_MS,
        deadline_ms: LOAD_LIMIT_MS,
        ..LoadParameters::default()
    };
    let mut load = Load::start(bed, cpus[1], parameters)?;
    let kills = effort.pick(3, 1);
    let calm = Duration::from_secs(effort.pick(3, 1));
    let suffered = (1..=kills).map(|number| suffer(&cluster, &mut load, number, number < kills, calm));
    let suffered = suffered.collect::<Result<Vec<Kill>>>()?;
    let report = load.finish()?;
    let window = |kill: &Kill| report.windows.iter().find(|window| window.label == kill.label);
    let windows = suffered.iter().map(window).collect::<Option<Vec<_>>>().context("every kill has its window")?;
    let gaps: Vec<f64> = windows.iter().map(|window| window.gap_ms).collect();
    let one_client: Vec<f64> = windows.iter().map(|window| window.connection_gap_ms).collect();
    let again: Vec<f64> = suffered.iter().map(|kill| kill.protected_ms - kill.at_ms).collect();
    let rows = [
        ("failover.gap_ms", gaps.clone()),
        ("failover.connection_gap_ms", one_client),
        ("failover.protected_again_ms", again),
    ];
    for (id, values) in rows {
        if sink.wants(id) {
            sink(alone(Figure { id, unit: "ms", better: Better::Lower }, effort, values))?;
        }
    }
    let (Some(last), Some(gap_ms)) = (suffered.last(), gaps.last()) else { return Ok(()) };
    draw(last, *gap_ms, &report.timeline, effort)
}

/// Kills the leader's host and waits until the others are protected; then boots it again, if another kill follows.
fn suffer(cluster: &Cluster<'_>, load: &mut Load, number: usize, repair: bool, calm: Duration) -> Result<Kill> {
    sleep(calm);
    let leader = cluster.leader().context("nobody leads")?;
    let label = format!("kill {number}");
    let at_ms = load.mark(&label)?;
    let since = Instant::now();
    let fault = leader.crash()?;
    protected(cluster, None)?;
    let protected_ms = at_ms + since.elapsed().as_secs_f64() * 1e3;
    // Late effects still belong to this kill.
    sleep(calm);
    load.mark(&format!("after {label}"))?;
    if repair {
        fault.undo()?;
        whole(cluster)?;
    }
    Ok(Kill { label, at_ms, protected_ms })
}

/// Waits until somebody leads and is protected; with all of `peers` connected, if that matters. Each look is a few processes, so
/// it does not look often: it would disturb the load.
fn protected(cluster: &Cluster<'_>, peers: Option<usize>) -> Result<()> {
    let deadline = Deadline::after_secs(LIMIT_SECS);
    let so = |host: &Host| {
        let Some(status) = cluster.status(host) else { return false };
        let connected =
            status["peers"].as_array().map_or(0, |all| all.iter().filter(|p| p["connected"] == true).count());
        status["role"] == "leader" && status["protected"] == true && peers.is_none_or(|peers| connected == peers)
    };
    let look = || {
        let found = cluster.bed().hosts().iter().any(so);
        if !found {
            sleep(Duration::from_millis(200));
        }
        found.then_some(())
    };
    Ok(wait_until(deadline, "a protected leader", look).map_err(|error| cluster.explain(error))?)
}

/// Waits until all three hosts are there, each with its guest.
fn whole(cluster: &Cluster<'_>) -> Result<()> {
    protected(cluster, Some(2))?;
    for host in cluster.bed().hosts() {
        let ready = || {
            let status = cluster.status(host)?;
            ["prepared", "running", "stopped"].contains(&status["guest"].as_str()?).then_some(())
        };
        wait_until(Deadline::after_secs(LIMIT_SECS), "a guest on every host", ready)
            .map_err(|error| cluster.explain(error))?;
    }
    Ok(())
}

/// Time zero is the kill. Nothing is drawn of a smoke run.
fn draw(kill: &Kill, gap_ms: f64, timeline: &[Moment], effort: Effort) -> Result<()> {
    if effort == Effort::Smoke {
        return Ok(());
    }
    let protected_s = (kill.protected_ms - kill.at_ms) / 1e3;
    let end_s = (protected_s + AROUND_S).min(LONGEST_S);
    let at_s = |index: usize| (index as f64 * INTERVAL_MS as f64 - kill.at_ms) / 1e3;
    let shown: Vec<(f64, Moment)> = timeline
        .iter()
        .enumerate()
        .map(|(index, moment)| (at_s(index), *moment))
        .filter(|(at_s, _)| (-AROUND_S..=end_s).contains(at_s))
        .collect();
    let rate = |moment: &Moment| f64::from(moment.answers) * 1e3 / INTERVAL_MS as f64;
    let series = |name: &str, points: Vec<(f64, f64)>| Series { name: name.to_owned(), points };
    // An interval without an answer has no latency.
    let latencies = |of: fn(&Moment) -> u64| -> Vec<(f64, f64)> {
        let answered = shown.iter().filter(|(_, moment)| moment.answers > 0);
        answered.map(|(at_s, moment)| (*at_s, of(moment) as f64 / 1e3)).collect()
    };
    let rates = shown.iter().map(|(at_s, moment)| (*at_s, rate(moment))).collect();
    let panels = [
        Panel { label: "requests/s", series: vec![series("answered requests", rates)] },
        Panel {
            label: "latency, ms",
            series: vec![
                series("mean latency", latencies(|moment| moment.mean_us)),
                series("slowest", latencies(|moment| moment.slowest_us)),
            ],
        },
    ];
    let mut events =
        vec![Event { at_s: 0.0, label: format!("leader's host killed; {gap_ms:.0} ms without an answer") }];
    if protected_s <= LONGEST_S {
        events.push(Event { at_s: protected_s, label: "protected again".to_owned() });
    }
    let title = format!("Failover under load: 64 Redis clients, per {INTERVAL_MS} ms");
    let path = plot::write(&results::directory(), "failover", &plot::timeline(&title, &panels, &events))?;
    println!("plot: {}", path.display());
    Ok(())
}
