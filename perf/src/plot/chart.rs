//! The kinds of plots.

use super::scale::{Scale, short};
use super::svg::{Anchor, COLOURS, Drawing, GRID, INK, text_width};
use super::{Axis, Bar, Event, Kind, Panel, Series};

const WIDTH: f64 = 800.0;
const LEFT: f64 = 76.0;
const RIGHT: f64 = 28.0;
/// Title and legend.
const TOP: f64 = 72.0;
/// Names of values and the axis's label.
const BOTTOM: f64 = 58.0;
const LABEL: f64 = 13.0;
const TICK: f64 = 12.0;
/// Lines of text for what happened; a fifth event begins at the top again.
const EVENT_LINES: usize = 4;

/// A line per series over a common axis.
#[must_use]
pub fn lines(title: &str, x: Axis<'_>, y: Axis<'_>, series: &[Series]) -> String {
    let height = 460.0;
    let mut drawing = Drawing::new(WIDTH, height);
    let (xs, ys) = (values(series, |point| point.0), values(series, |point| point.1));
    let (wide, high) = ((LEFT + 16.0, WIDTH - RIGHT - 16.0), (height - BOTTOM, TOP));
    let across = if x.kind == Kind::Log { Scale::log(xs, wide) } else { Scale::linear(xs, wide) };
    let up = if y.kind == Kind::Log { Scale::decades(ys, high) } else { Scale::linear(ys, high) };
    head(&mut drawing, title, series);
    y_axis(&mut drawing, &up, y.label, (TOP, height - BOTTOM));
    x_axis(&mut drawing, &across, x.label, height - BOTTOM);
    for (index, series) in series.iter().enumerate() {
        let points: Vec<_> = series.points.iter().map(|(x, y)| (across.at(*x), up.at(*y))).collect();
        drawing.path(&points, colour(index));
        points.iter().for_each(|point| drawing.dot(*point, 3.5, colour(index)));
    }
    drawing.finish()
}

/// A bar per value, from zero, with the value on top.
#[must_use]
pub fn bars(title: &str, y_label: &str, bars: &[Bar]) -> String {
    let height = 440.0;
    let mut drawing = Drawing::new(WIDTH, height);
    let (top, base) = (TOP, height - BOTTOM);
    let up = Scale::linear(bars.iter().map(|bar| bar.value), (base, top));
    head(&mut drawing, title, &[]);
    y_axis(&mut drawing, &up, y_label, (top, base));
    let slot = (WIDTH - LEFT - RIGHT) / bars.len().max(1) as f64;
    for (index, bar) in bars.iter().enumerate() {
        let (middle, width) = (LEFT + (index as f64 + 0.5) * slot, (slot * 0.62).min(90.0));
        let at = up.at(bar.value);
        drawing.rectangle((middle - width / 2.0, at), width, base - at, colour(0));
        drawing.text((middle, at - 6.0), TICK, Anchor::Middle, &short(bar.value));
        for (line, text) in wrapped(&bar.label, slot - 6.0).iter().enumerate() {
            drawing.text((middle, base + 18.0 + 15.0 * line as f64), TICK, Anchor::Middle, text);
        }
    }
    drawing.line((LEFT, base), (WIDTH - RIGHT, base), INK, 1.2);
    drawing.finish()
}

/// Panels above one another over the same time, with what happened as vertical lines through all of them.
#[must_use]
pub fn timeline(title: &str, panels: &[Panel<'_>], events: &[Event]) -> String {
    let (panel, gap) = (170.0, 22.0);
    // Above the panels, where no line is, there is room for what happened.
    let first = TOP + 15.0 * events.len().min(EVENT_LINES) as f64;
    let height = first + panels.len() as f64 * (panel + gap) - gap + BOTTOM;
    let mut drawing = Drawing::new(WIDTH, height);
    let times = panels.iter().flat_map(|panel| values(&panel.series, |point| point.0));
    let across = Scale::tight(times, (LEFT, WIDTH - RIGHT));
    let legend: Vec<Series> = panels.iter().flat_map(|panel| panel.series.clone()).collect();
    let mut seen = 0;
    for (index, Panel { label, series }) in panels.iter().enumerate() {
        let top = first + index as f64 * (panel + gap);
        let up = Scale::linear(values(series, |point| point.1), (top + panel, top + 6.0));
        y_axis(&mut drawing, &up, label, (top, top + panel));
        drawing.line((LEFT, top + panel), (WIDTH - RIGHT, top + panel), INK, 1.2);
        for one in series {
            for run in unbroken(&one.points) {
                let points: Vec<_> = run.iter().map(|(x, y)| (across.at(*x), up.at(*y))).collect();
                match points[..] {
                    [point] => drawing.dot(point, 1.8, colour(seen)),
                    _ => drawing.path(&points, colour(seen)),
                }
            }
            seen += 1;
        }
    }
    happened(&mut drawing, &across, events, height - BOTTOM);
    head(&mut drawing, title, &legend);
    x_axis(&mut drawing, &across, "time, s", height - BOTTOM);
    drawing.finish()
}

fn happened(drawing: &mut Drawing, across: &Scale, events: &[Event], bottom: f64) {
    for (index, event) in events.iter().enumerate() {
        let at = across.at(event.at_s);
        // Beside its line, on the side where there is room; one below the other, so that neighbours do not meet.
        let y = TOP + 4.0 + 15.0 * (index % EVENT_LINES) as f64;
        drawing.dashes((at, y - 10.0), (at, bottom), INK);
        let leftwards = at + text_width(&event.label, TICK) > WIDTH - RIGHT;
        let (x, anchor) = if leftwards { (at - 5.0, Anchor::End) } else { (at + 5.0, Anchor::Start) };
        drawing.text((x, y), TICK, anchor, &event.label);
    }
}

fn values(series: &[Series], of: fn(&(f64, f64)) -> f64) -> impl Iterator<Item = f64> {
    series.iter().flat_map(move |series| series.points.iter().map(of))
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

/// Title, and a legend if there is more than one thing to tell apart.
fn head(drawing: &mut Drawing, title: &str, series: &[Series]) {
    drawing.bold((LEFT - 52.0, 28.0), 17.0, title);
    if series.len() < 2 {
        return;
    }
    let mut x = LEFT;
    for (index, series) in series.iter().enumerate() {
        drawing.line((x, 49.0), (x + 20.0, 49.0), colour(index), 3.0);
        drawing.text((x + 26.0, 53.5), LABEL, Anchor::Start, &series.name);
        x += 46.0 + text_width(&series.name, LABEL);
    }
}

fn y_axis(drawing: &mut Drawing, up: &Scale, label: &str, (top, bottom): (f64, f64)) {
    for &tick in &up.ticks {
        let y = up.at(tick);
        drawing.line((LEFT, y), (WIDTH - RIGHT, y), GRID, 1.0);
        drawing.text((LEFT - 8.0, y + 4.0), TICK, Anchor::End, &short(tick));
    }
    drawing.line((LEFT, top), (LEFT, bottom), INK, 1.2);
    drawing.upwards((24.0, (top + bottom) / 2.0), LABEL, label);
}

fn x_axis(drawing: &mut Drawing, across: &Scale, label: &str, bottom: f64) {
    drawing.line((LEFT, bottom), (WIDTH - RIGHT, bottom), INK, 1.2);
    for &tick in &across.ticks {
        let x = across.at(tick);
        drawing.line((x, bottom), (x, bottom + 5.0), INK, 1.2);
        drawing.text((x, bottom + 19.0), TICK, Anchor::Middle, &short(tick));
    }
    drawing.text(((LEFT + WIDTH - RIGHT) / 2.0, bottom + 42.0), LABEL, Anchor::Middle, label);
}

/// At most three lines, broken between words.
fn wrapped(text: &str, width: f64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if lines_are_full(line, word, width) => lines.push(word.to_owned()),
            Some(line) => {
                line.push(' ');
                line.push_str(word);
            }
            None => lines.push(word.to_owned()),
        }
    }
    lines.truncate(3);
    lines
}

fn lines_are_full(line: &str, word: &str, width: f64) -> bool {
    text_width(line, TICK) + text_width(word, TICK) + TICK > width
}

/// Runs of points without a gap of more than three times the usual distance.
fn unbroken(points: &[(f64, f64)]) -> impl Iterator<Item = &[(f64, f64)]> {
    let mut distances: Vec<f64> = points.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
    distances.sort_by(f64::total_cmp);
    let usual = distances.get(distances.len() / 2).copied().unwrap_or(f64::INFINITY);
    points.chunk_by(move |a, b| b.0 - a.0 <= 3.0 * usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(name: &str, points: &[(f64, f64)]) -> Series {
        Series { name: name.to_owned(), points: points.to_vec() }
    }

    #[test]
    fn every_series_has_its_line_and_its_name() {
        let both = [series("vsmr", &[(1.0, 100.0), (16.0, 900.0)]), series("mc", &[(1.0, 50.0), (16.0, 200.0)])];
        let svg = lines("Redis", Axis::log("clients"), Axis::linear("requests/s"), &both);
        assert_eq!((svg.matches("<polyline").count(), svg.matches("<circle").count()), (2, 4));
        for text in ["vsmr", "mc", "Redis", "clients", "requests/s", ">16<", ">1000<"] {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn bars_stand_on_the_base_and_are_as_high_as_their_values() {
        let bar = |label: &str, value| Bar { label: label.to_owned(), value };
        let svg = bars("Switches", "ms", &[bar("whole pages only", 10.0), bar("delta", 5.0)]);
        let heights: Vec<f64> = svg
            .lines()
            .filter(|line| line.starts_with("<rect x"))
            .map(|line| line.split("height=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(heights.len(), 2);
        assert!((heights[0] / heights[1] - 2.0).abs() < 0.01, "{heights:?}");
        assert!(bars("Nothing", "ms", &[]).contains("Nothing"));
    }

    #[test]
    fn a_gap_interrupts_the_line_and_events_are_marked() {
        let points: Vec<_> = (0..10).map(|n| (f64::from(n) * 0.02, 5.0)).chain([(1.0, 5.0), (1.02, 6.0)]).collect();
        let panel = Panel { label: "requests/s", series: vec![series("requests", &points)] };
        let event = Event { at_s: 0.2, label: "leader killed".to_owned() };
        let svg = timeline("Failover", &[panel], &[event]);
        assert_eq!((svg.matches("<polyline").count(), svg.matches("stroke-dasharray").count()), (2, 1));
        assert!(svg.contains("leader killed") && svg.contains("time, s"));
    }

    #[test]
    fn long_labels_are_broken_between_words() {
        assert_eq!(wrapped("early resume and delta", 90.0), ["early resume", "and delta"]);
        assert_eq!(wrapped("word", 1.0), ["word"]);
    }
}
