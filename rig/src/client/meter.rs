//! What a client sees of time: gaps without an answer, latencies and throughput, overall and per marked window.
//!
//! A window begins at a mark («killed») and lasts until the next. A gap counts for the window in which it ends, with its whole
//! length, because the last answer before a fault usually precedes its mark by some microseconds. A gap that is still
//! open when a window closes counts for that window too, as far as it has come.

use hdrhistogram::Histogram;

use super::protocol::{LatencySummary, Moment, WindowReport};

/// Width of one bar of the throughput series, in microseconds.
pub const SERIES_INTERVAL_US: u64 = 100_000;
/// Longest latency that the histogram tells apart, in microseconds; longer ones count as this.
const MAX_LATENCY_US: u64 = 120_000_000;

struct Window {
    label: String,
    start_us: u64,
    operations: u64,
    gap_us: u64,
    gap_start_us: u64,
    connection_gap_us: u64,
    connections_lost: u64,
    latency: Histogram<u64>,
}

impl Window {
    fn new(label: &str, start_us: u64) -> Window {
        let latency =
            Histogram::new_with_bounds(1, MAX_LATENCY_US, 2).expect("constant bounds of the histogram are valid");
        Window {
            label: label.to_owned(),
            start_us,
            operations: 0,
            gap_us: 0,
            gap_start_us: start_us,
            connection_gap_us: 0,
            connections_lost: 0,
            latency,
        }
    }

    fn gap(&mut self, from_us: u64, to_us: u64) {
        let gap_us = to_us.saturating_sub(from_us);
        if gap_us > self.gap_us {
            self.gap_us = gap_us;
            self.gap_start_us = from_us;
        }
    }

    fn report(&self, end_us: u64) -> WindowReport {
        WindowReport {
            label: self.label.clone(),
            start_ms: ms(self.start_us),
            end_ms: ms(end_us),
            operations: self.operations,
            gap_ms: ms(self.gap_us),
            gap_start_ms: ms(self.gap_start_us),
            connection_gap_ms: ms(self.connection_gap_us),
            connections_lost: self.connections_lost,
            latency: summary(&self.latency),
        }
    }
}

/// Answers and latencies of short intervals of equal length.
struct Timeline {
    interval_us: u64,
    intervals: Vec<Interval>,
}

#[derive(Clone, Copy, Default)]
struct Interval {
    answers: u32,
    latency_sum_us: u64,
    slowest_us: u64,
}

impl Timeline {
    /// `count` answers came that had waited `latency_us`.
    fn add(&mut self, now_us: u64, latency_us: u64, count: u32) {
        let slot = (now_us / self.interval_us) as usize;
        if slot >= self.intervals.len() {
            self.intervals.resize(slot + 1, Interval::default());
        }
        let interval = &mut self.intervals[slot];
        interval.answers += count;
        interval.latency_sum_us += latency_us * u64::from(count);
        interval.slowest_us = interval.slowest_us.max(latency_us);
    }

    fn moments(&self) -> Vec<Moment> {
        let moment = |interval: &Interval| Moment {
            answers: interval.answers,
            mean_us: interval.latency_sum_us / u64::from(interval.answers.max(1)),
            slowest_us: interval.slowest_us,
        };
        self.intervals.iter().map(moment).collect()
    }
}

fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

fn summary(histogram: &Histogram<u64>) -> LatencySummary {
    LatencySummary {
        p50_us: histogram.value_at_quantile(0.5),
        p90_us: histogram.value_at_quantile(0.9),
        p99_us: histogram.value_at_quantile(0.99),
        p999_us: histogram.value_at_quantile(0.999),
        max_us: if histogram.is_empty() { 0 } else { histogram.max() },
    }
}

/// Counts answers of one client. All times are microseconds since the client's start.
pub struct Meter {
    windows: Vec<Window>,
    closed: Vec<WindowReport>,
    series: Vec<u32>,
    timeline: Option<Timeline>,
    last_answer_us: u64,
    operations: u64,
}

/// Everything that a [`Meter`] measured.
pub struct Measured {
    /// One entry per mark; the first is called `start`.
    pub windows: Vec<WindowReport>,
    /// Answers per [`SERIES_INTERVAL_US`].
    pub series: Vec<u32>,
    /// If asked for.
    pub timeline: Vec<Moment>,
    /// Latencies of the whole run.
    pub latency: LatencySummary,
}

impl Meter {
    /// Opens the first window, `start`, at `now_us`.
    pub fn new(now_us: u64) -> Meter {
        Meter {
            windows: vec![Window::new("start", now_us)],
            closed: Vec::new(),
            series: Vec::with_capacity(36_000),
            timeline: None,
            last_answer_us: now_us,
            operations: 0,
        }
    }

    /// Also keeps answers and latencies per interval of that length; 0: does not.
    #[must_use]
    pub fn with_timeline(self, interval_us: u64) -> Meter {
        let timeline = (interval_us > 0).then(|| Timeline { interval_us, intervals: Vec::with_capacity(4096) });
        Meter { timeline, ..self }
    }

    fn window(&mut self) -> &mut Window {
        self.windows.last_mut().expect("a window is open from the start")
    }

    /// `count` answers arrived at once, on a connection that had been silent since `connection_since_us`.
    pub fn answers(&mut self, now_us: u64, count: u32, connection_since_us: u64) {
        let since_us = self.last_answer_us;
        self.last_answer_us = now_us;
        self.operations += u64::from(count);
        let slot = (now_us / SERIES_INTERVAL_US) as usize;
        if slot >= self.series.len() {
            self.series.resize(slot + 1, 0);
        }
        self.series[slot] += count;
        let window = self.window();
        window.operations += u64::from(count);
        window.gap(since_us, now_us);
        let connection_gap_us = now_us.saturating_sub(connection_since_us);
        window.connection_gap_us = window.connection_gap_us.max(connection_gap_us);
    }

    /// `count` of the answers that came at `now_us` had waited `latency_us`.
    pub fn latency(&mut self, now_us: u64, latency_us: u64, count: u32) {
        // The histogram would take the value of no answers into its maximum.
        if count > 0 {
            if let Some(timeline) = &mut self.timeline {
                timeline.add(now_us, latency_us, count);
            }
            self.window().latency.saturating_record_n(latency_us.max(1), u64::from(count));
        }
    }

    /// A connection had to be given up.
    pub fn connection_lost(&mut self) {
        self.window().connections_lost += 1;
    }

    /// Closes the window and opens the next at `at_us`, the moment at which the parent said so.
    pub fn mark(&mut self, label: &str, at_us: u64) {
        self.close(at_us);
        self.windows.push(Window::new(label, at_us));
    }

    fn close(&mut self, at_us: u64) {
        let since_us = self.last_answer_us;
        let window = self.window();
        window.gap(since_us, at_us);
        let report = window.report(at_us);
        self.closed.push(report);
    }

    /// When the last answer came.
    pub fn last_answer_us(&self) -> u64 {
        self.last_answer_us
    }

    /// Answers so far.
    pub fn operations(&self) -> u64 {
        self.operations
    }

    /// Ends the last window. `waiting` says that answers are still due, so that silence until now is a gap.
    pub fn finish(mut self, now_us: u64, waiting: bool) -> Measured {
        let end_us = if waiting { now_us } else { self.last_answer_us.max(self.window().start_us) };
        self.close(end_us);
        let mut total = Window::new("total", 0).latency;
        for window in &self.windows {
            total.add(&window.latency).expect("all histograms of the meter have the same bounds");
        }
        let timeline = self.timeline.map(|timeline| timeline.moments()).unwrap_or_default();
        Measured { windows: self.closed, series: self.series, timeline, latency: summary(&total) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_counts_in_the_window_where_it_ends_with_its_whole_length() {
        let mut meter = Meter::new(0);
        meter.answers(1_000, 10, 0);
        meter.answers(9_900, 10, 1_000);
        meter.mark("killed", 10_000);
        meter.answers(310_000, 5, 5_000);
        meter.mark("cut", 320_000);
        meter.answers(330_000, 1, 310_000);
        let measured = meter.finish(400_000, false);
        let gaps: Vec<_> = measured.windows.iter().map(|w| (w.label.as_str(), w.gap_ms)).collect();
        assert_eq!(gaps, [("start", 8.9), ("killed", 300.1), ("cut", 20.0)]);
        assert_eq!(measured.windows[1].gap_start_ms, 9.9);
        assert_eq!(measured.windows[1].connection_gap_ms, 305.0);
        assert_eq!(measured.series, [20, 0, 0, 6]);
    }

    #[test]
    fn silence_that_never_ends_is_a_gap_of_every_window_it_reaches() {
        let mut meter = Meter::new(0);
        meter.answers(1_000, 1, 0);
        meter.mark("killed", 2_000);
        meter.mark("cut", 500_000);
        let measured = meter.finish(900_000, true);
        assert_eq!(measured.windows[1].gap_ms, 499.0);
        assert_eq!(measured.windows[2].gap_ms, 899.0);
    }

    #[test]
    fn a_timeline_has_answers_and_latencies_of_every_interval() {
        let mut meter = Meter::new(0).with_timeline(20_000);
        meter.latency(1_000, 100, 2);
        meter.latency(19_999, 400, 1);
        meter.latency(60_000, 50_000, 1);
        let moments = meter.finish(70_000, false).timeline;
        let found: Vec<_> = moments.iter().map(|m| (m.answers, m.mean_us, m.slowest_us)).collect();
        assert_eq!(found, [(3, 200, 400), (0, 0, 0), (0, 0, 0), (1, 50_000, 50_000)]);
        assert!(Meter::new(0).finish(9, false).timeline.is_empty());
    }

    #[test]
    fn latencies_of_all_windows_add_up() {
        let mut meter = Meter::new(0);
        meter.latency(5, 100, 98);
        meter.mark("killed", 10);
        meter.latency(20_005, 5_000, 2);
        let measured = meter.finish(20, false);
        assert_eq!(measured.windows[0].latency.max_us, 100);
        assert!(measured.windows[1].latency.p50_us >= 4_950);
        assert_eq!(measured.latency.p50_us, 100);
        assert!(measured.latency.p99_us >= 4_950);
    }
}
