//! The demo's table: plain text that reads well in a terminal, in a log file and in a bug report.
//!
//! Colour and block characters are added only where they are understood ([`Style::detect`]); without them every
//! line says the same.

use std::fmt::Write as _;
use std::io::IsTerminal;

use super::{DemoReport, Failure, OpsPerSecond, SyncvmFigures, share};

const BAR_CELLS: usize = 36;
const CHART_CELLS: usize = 72;
const GREEN: &str = "32";
const RED: &str = "31";
const BOLD: &str = "1";

/// What the reader's terminal understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    /// ANSI colours.
    pub colour: bool,
    /// Block characters; `#` and digits otherwise.
    pub unicode: bool,
}

impl Style {
    /// Nothing but ASCII.
    pub const PLAIN: Style = Style { colour: false, unicode: false };

    /// What stdout and the locale suggest; `NO_COLOR` is respected.
    pub fn detect() -> Style {
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .iter()
            .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
            .unwrap_or_default()
            .to_uppercase();
        let quiet = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Style {
            colour: std::io::stdout().is_terminal() && !quiet,
            unicode: locale.contains("UTF-8") || locale.contains("UTF8"),
        }
    }

    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn heading(self, text: &str) -> String {
        format!("\n{}\n", self.paint(BOLD, text))
    }
}

pub(super) fn render(report: &DemoReport, style: Style) -> String {
    let mut out = String::new();
    let title = format!(
        "Plover demo: {} failure{} in {}, {} answers, seed {}",
        report.failures.len(),
        if report.failures.len() == 1 { "" } else { "s" },
        seconds(report.duration_ms),
        grouped(report.operations as f64),
        report.seed
    );
    line(&mut out, &style.paint(BOLD, &title));
    out += &style.heading("What happened");
    for event in &report.events {
        line(&mut out, &format!("  {:>9}  {}", seconds(event.t_ms), event.text));
    }
    chart(&mut out, report, style);
    failures(&mut out, &report.failures, style);
    throughput(&mut out, report, style);
    syncvm(&mut out, &report.syncvm, style);
    promises(&mut out, report, style);
    out
}

fn line(out: &mut String, text: &str) {
    out.push_str(text.trim_end());
    out.push('\n');
}

/// Answers over time in one row, with the failures marked below.
fn chart(out: &mut String, report: &DemoReport, style: Style) {
    let series = &report.series_100ms;
    if series.is_empty() {
        return;
    }
    let cells = CHART_CELLS.min(series.len());
    let cell_of = |slot: usize| slot * cells / series.len();
    let (mut sums, mut counts) = (vec![0u64; cells], vec![0u64; cells]);
    for (slot, &answers) in series.iter().enumerate() {
        sums[cell_of(slot)] += u64::from(answers);
        counts[cell_of(slot)] += 1;
    }
    let rates: Vec<f64> = sums.iter().zip(&counts).map(|(&sum, &n)| sum as f64 * 10.0 / n as f64).collect();
    let peak = rates.iter().copied().fold(1.0, f64::max);
    let levels: Vec<char> = if style.unicode { " ▁▂▃▄▅▆▇█" } else { " .:-=+*#@" }.chars().collect();
    let top = (levels.len() - 1) as f64;
    let row: String = rates.iter().map(|rate| levels[(rate / peak * top).ceil() as usize]).collect();
    let mut marks = vec![' '; cells];
    for (number, failure) in report.failures.iter().enumerate() {
        let slot = (failure.at_ms / 100.0) as usize;
        let digit = char::from_digit(number as u32 + 1, 36).unwrap_or('^');
        marks[cell_of(slot.min(series.len() - 1))] = digit;
    }
    let span = seconds(series.len() as f64 * 100.0);
    out.push_str(&style.heading(&format!("Answers over time ({span} wide, highest {} per second)", grouped(peak))));
    line(out, &format!("  |{row}|"));
    line(out, &format!("   {}", marks.iter().collect::<String>()));
}

fn failures(out: &mut String, failures: &[Failure], style: Style) {
    out.push_str(&style.heading("Failures, as the client felt them"));
    let width = failures.iter().map(|f| f.kind.chars().count()).max().unwrap_or(0).max(4);
    line(
        out,
        &format!(
            "  #  {:<width$}  {:>9}  {:>12}  {:>12}  {:>14}  {:>12}  {:>15}",
            "kind", "at", "no answer", "allowed", "one connection", "no ping", "protected again"
        ),
    );
    let ms = |value: f64| format!("{} ms", grouped(value));
    for (number, failure) in (1..).zip(failures) {
        let gap = format!("{:>12}", ms(failure.gap_ms));
        let colour = if failure.gap_ms <= failure.gap_limit_ms { GREEN } else { RED };
        line(
            out,
            &format!(
                "  {number}  {:<width$}  {:>9}  {}  {:>12}  {:>14}  {:>12}  {:>15}",
                failure.kind,
                seconds(failure.at_ms),
                style.paint(colour, &gap),
                ms(failure.gap_limit_ms),
                ms(failure.connection_gap_ms),
                failure.ping_gap_ms.map_or("-".into(), ms),
                failure.protected_again_ms.map_or("never".into(), |ms| format!("after {}", seconds(ms))),
            ),
        );
    }
}

fn throughput(out: &mut String, report: &DemoReport, style: Style) {
    let OpsPerSecond { unreplicated, protected, degraded, .. } = report.ops_per_s;
    let mut group = |heading: String, rows: &[(&str, Option<f64>)], whole: Option<f64>| {
        out.push_str(&style.heading(&heading));
        let longest = rows.iter().filter_map(|row| row.1).fold(0.0, f64::max);
        for &(name, rate) in rows {
            let Some(rate) = rate else {
                line(out, &format!("  {name:<12}  {:>11}", "not measured"));
                continue;
            };
            let cells = if longest > 0.0 { (rate / longest * BAR_CELLS as f64).round() as usize } else { 0 };
            let bar = if style.unicode { "█" } else { "#" }.repeat(cells);
            let ratio = match share(Some(rate), whole) {
                Some(share) if name != "unreplicated" => format!("{share:.2} of unreplicated"),
                _ => String::new(),
            };
            let space = " ".repeat(BAR_CELLS - cells);
            line(out, &format!("  {name:<12}  {:>11}  {bar}{space}  {ratio}", grouped(rate)));
        }
    };
    group(
        format!("Answers per second ({} connections, {} in flight each)", report.connections, report.in_flight),
        &[("unreplicated", unreplicated), ("protected", protected), ("degraded", degraded)],
        unreplicated,
    );
    let OpsPerSecond { protected_unpipelined, unreplicated_unpipelined, .. } = report.ops_per_s;
    group(
        format!("Answers per second ({} connections, 1 in flight each)", report.connections),
        &[("unreplicated", unreplicated_unpipelined), ("protected", protected_unpipelined)],
        unreplicated_unpipelined,
    );
}

fn syncvm(out: &mut String, figures: &SyncvmFigures, style: Style) {
    out.push_str(&style.heading("Keeping the two guests the same (syncvm)"));
    let percent = figures.divergent_pages as f64 * 100.0 / figures.dirty_pages.max(1) as f64;
    let mut row = |name: &str, text: String| line(out, &format!("  {name:<16}  {text}"));
    row("syncvms", grouped(figures.count as f64));
    row("guest stopped", format!("{:.1} ms (median), {:.1} ms (99 %)", figures.stop_ms_p50, figures.stop_ms_p99));
    row("pages dirty", grouped(figures.dirty_pages as f64));
    row("pages different", format!("{} ({percent:.1} % of the dirty)", grouped(figures.divergent_pages as f64)));
    let times_less = figures.full_transfer_bytes as f64 / figures.bytes_sent.max(1) as f64;
    row(
        "sent",
        format!(
            "{} instead of {} for all dirty pages ({times_less:.1} x less)",
            bytes(figures.bytes_sent),
            bytes(figures.full_transfer_bytes)
        ),
    );
}

fn promises(out: &mut String, report: &DemoReport, style: Style) {
    out.push_str(&style.heading("Promises"));
    let promises = report.promises();
    let width = promises.iter().map(|promise| promise.name.chars().count()).max().unwrap_or(0);
    for promise in &promises {
        let (word, colour) = if promise.kept { ("kept  ", GREEN) } else { ("BROKEN", RED) };
        line(out, &format!("  {}  {:<width$}  {}", style.paint(colour, word), promise.name, promise.figure));
    }
    for sample in &report.samples {
        line(out, &format!("          seen: {sample}"));
    }
    let broken = promises.iter().filter(|promise| !promise.kept).count();
    let verdict = match broken {
        0 => style.paint(GREEN, "Verdict: the guest survived, and no client could tell."),
        1 => style.paint(RED, "Verdict: FAILED, 1 promise broken."),
        more => style.paint(RED, &format!("Verdict: FAILED, {more} promises broken.")),
    };
    let _ = write!(out, "\n{verdict}\n");
}

/// A whole number with its thousands apart.
pub(super) fn grouped(number: f64) -> String {
    let digits = format!("{:.0}", number.max(0.0));
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// A time in seconds.
pub(super) fn seconds(ms: f64) -> String {
    format!("{:.1} s", ms / 1000.0)
}

fn bytes(count: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} bytes") } else { format!("{value:.1} {}", units[unit]) }
}
