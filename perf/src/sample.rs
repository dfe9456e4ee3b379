//! Runs in a fixed order, and what they amount to.
//!
//! A machine's speed drifts (clock, heat, neighbours), so the two sides alternate, and each of our runs is
//! compared with the peer's run right next to it: drift that is slower than a pair cancels. Which side goes
//! first alternates as well (AB BA AB …), so that a constant trend cancels too. Medians and quartiles, because
//! disturbances only ever lengthen a run, and by any amount.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};

use crate::Effort;
use crate::row::Row;

/// Anything longer counts as this.
const LONGEST_NS: u64 = 60_000_000_000;

/// Which way a unit points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Times.
    Lower,
    /// Rates.
    Higher,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub struct Figure<'a> {
    /// As in [`Row::id`].
    pub id: &'a str,
    /// As in [`Row::unit`].
    pub unit: &'a str,
    /// Which way the unit points.
    pub better: Better,
}

/// Measures ours against a peer. Each function does the same work in every call and returns one value in the
/// figure's unit; the first call of each is a warm-up and does not count.
///
/// # Errors
/// What a function returns, with the figure's id; or a value that is not a positive number.
pub fn compare(
    figure: Figure<'_>,
    effort: Effort,
    peer_name: &str,
    mut ours: impl FnMut() -> Result<f64>,
    mut peer: impl FnMut() -> Result<f64>,
) -> Result<Row> {
    let what = |side: &str| format!("{}, {side}", figure.id);
    let mut run_ours = || checked(ours()).with_context(|| what("ours"));
    let mut run_peer = || checked(peer()).with_context(|| what(peer_name));
    run_ours()?;
    run_peer()?;
    let (mut values, mut peer_values) = (Vec::new(), Vec::new());
    for run in 0..effort.runs() {
        let (value, peer_value);
        if run % 2 == 0 {
            value = run_ours()?;
            peer_value = run_peer()?;
        } else {
            peer_value = run_peer()?;
            value = run_ours()?;
        }
        values.push(value);
        peer_values.push(peer_value);
    }
    Ok(paired(figure, effort, peer_name, values, peer_values))
}

/// The row of runs that were made elsewhere: each of ours belongs to the peer's at the same place.
///
/// # Panics
/// When there are none, or not as many on both sides.
#[must_use]
pub fn paired(figure: Figure<'_>, effort: Effort, peer_name: &str, values: Vec<f64>, peer_values: Vec<f64>) -> Row {
    assert_eq!(values.len(), peer_values.len(), "{}: runs in pairs", figure.id);
    let ratio = |(value, peer_value): (&f64, &f64)| match figure.better {
        Better::Lower => peer_value / value,
        Better::Higher => value / peer_value,
    };
    let ratios = sorted(values.iter().zip(&peer_values).map(ratio).collect());
    let mut row = alone(figure, effort, values);
    row.peer = Some(peer_name.to_owned());
    row.peer_value = Some(median(peer_values));
    row.ratio = Some(quantile(&ratios, 0.5));
    row.spread = spread(&ratios);
    row
}

/// Measures a figure that has no peer. The first call is a warm-up.
///
/// # Errors
/// As [`compare`].
pub fn measure(figure: Figure<'_>, effort: Effort, mut ours: impl FnMut() -> Result<f64>) -> Result<Row> {
    let mut run = || checked(ours()).with_context(|| figure.id.to_owned());
    run()?;
    let values = (0..effort.runs()).map(|_| run()).collect::<Result<Vec<f64>>>()?;
    Ok(alone(figure, effort, values))
}

fn checked(value: Result<f64>) -> Result<f64> {
    let value = value?;
    ensure!(value.is_finite() && value > 0.0, "a run gave {value}, which is no measurement");
    Ok(value)
}

/// The row of runs that were made elsewhere and have no peer.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn alone(figure: Figure<'_>, effort: Effort, values: Vec<f64>) -> Row {
    let values = sorted(values);
    Row {
        id: figure.id.to_owned(),
        value: quantile(&values, 0.5),
        unit: figure.unit.to_owned(),
        peer: None,
        peer_value: None,
        ratio: None,
        runs: values.len(),
        spread: spread(&values),
        commit: String::new(),
        smoke: effort == Effort::Smoke,
    }
}

/// The middle of the values.
///
/// # Panics
/// When there are none.
#[must_use]
pub fn median(values: Vec<f64>) -> f64 {
    quantile(&sorted(values), 0.5)
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// By linear interpolation between the two neighbours.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = q * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

fn spread(sorted: &[f64]) -> f64 {
    let width = quantile(sorted, 0.75) - quantile(sorted, 0.25);
    // A share may be 0 in every run.
    if width == 0.0 { 0.0 } else { width / quantile(sorted, 0.5) }
}

/// What the calling thread has used of its CPU. For work of one thread that never waits: unlike the time of
/// day it stands still while another process has the CPU.
#[must_use]
pub fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// Times of single operations within one run, in nanoseconds to three digits.
#[derive(Debug)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Latencies {
        // Explicit bounds: a histogram that grows by itself does not grow in saturating_record.
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, 3);
        Latencies(histogram.expect("the bounds are constants that fit"))
    }
}

impl Latencies {
    /// Adds one operation.
    pub fn add(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(LONGEST_NS);
        self.0.saturating_record(ns);
    }

    /// The median in microseconds; 0 if nothing was added.
    #[must_use]
    pub fn p50_us(&self) -> f64 {
        self.0.value_at_quantile(0.5) as f64 / 1_000.0
    }

    /// The time within which 99 % were done, in microseconds; 0 if nothing was added.
    #[must_use]
    pub fn p99_us(&self) -> f64 {
        self.0.value_at_quantile(0.99) as f64 / 1_000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    const TIME: Figure<'_> = Figure { id: "t", unit: "us", better: Better::Lower };

    #[test]
    fn sides_alternate_and_the_first_of_each_does_not_count() {
        let order = RefCell::new(String::new());
        let side = |name: char, value: f64| {
            let order = &order;
            let mut first = true;
            move || {
                order.borrow_mut().push(name);
                Ok(if std::mem::take(&mut first) { 1e9 } else { value })
            }
        };
        let row = compare(TIME, Effort::Smoke, "p", side('a', 2.0), side('b', 5.0)).unwrap();
        assert_eq!(*order.borrow(), "ababbaab");
        assert_eq!((row.value, row.peer_value), (2.0, Some(5.0)));
        assert_eq!((row.runs, row.spread, row.smoke), (3, 0.0, true));
    }

    #[test]
    fn a_ratio_above_one_means_better_for_times_and_rates() {
        let rate = Figure { better: Better::Higher, ..TIME };
        let ratio =
            |figure, ours: f64, peer: f64| compare(figure, Effort::Smoke, "p", || Ok(ours), || Ok(peer)).unwrap().ratio;
        assert_eq!(ratio(TIME, 2.0, 5.0), Some(2.5));
        assert_eq!(ratio(rate, 2.0, 5.0), Some(0.4));
    }

    #[test]
    fn drift_that_hits_both_sides_of_a_pair_leaves_the_ratio_alone() {
        let drifting = |base: f64| {
            let mut run = 0;
            move || {
                run += 1;
                Ok(base * f64::from(run))
            }
        };
        let row = compare(TIME, Effort::Full, "p", drifting(10.0), drifting(30.0)).unwrap();
        assert_eq!((row.ratio, row.spread), (Some(3.0), 0.0));
    }

    #[test]
    fn quartiles_ignore_a_single_disturbed_run() {
        let values = sorted(vec![10.0, 11.0, 500.0, 9.0, 10.0]);
        assert_eq!(quantile(&values, 0.5), 10.0);
        assert_eq!(spread(&values), 0.1);
        assert_eq!(quantile(&[1.0, 2.0], 0.5), 1.5);
    }

    #[test]
    fn no_measurement_is_an_error_with_the_id() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = measure(TIME, Effort::Smoke, || Ok(bad)).unwrap_err();
            assert!(format!("{error:#}").starts_with("t: a run gave"), "{error:#}");
        }
    }

    #[test]
    fn the_median_of_latencies_is_in_microseconds() {
        let mut latencies = Latencies::default();
        for us in [5, 7, 900] {
            latencies.add(Duration::from_micros(us));
        }
        assert!((latencies.p50_us() - 7.0).abs() < 0.01);
        assert_eq!(Latencies::default().p50_us(), 0.0);
    }
}
