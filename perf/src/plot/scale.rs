//! From values to pixels, and which values an axis names.

/// How values lie on an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Equal steps are equally long; begins at zero unless a value is below.
    Linear,
    /// Doubling is equally long everywhere. Across, every value that occurs is named.
    Log,
}

/// An axis.
#[derive(Clone, Debug)]
pub struct Scale {
    kind: Kind,
    low: f64,
    high: f64,
    pixels: (f64, f64),
    /// The values that are named.
    pub ticks: Vec<f64>,
}

impl Scale {
    /// From zero, or the least of `values`, to beyond the greatest.
    #[must_use]
    pub fn linear(values: impl Iterator<Item = f64>, pixels: (f64, f64)) -> Scale {
        let (least, greatest) = bounds(values);
        let least = least.min(0.0);
        let step = step((greatest - least).max(f64::MIN_POSITIVE));
        let (low, high) = ((least / step).floor() * step, (greatest / step).ceil() * step);
        Scale { kind: Kind::Linear, low, high, pixels, ticks: multiples(low, high, step) }
    }

    /// As [`linear`](Self::linear), but exactly as long as the values: for time, whose end is the end of the measurement.
    #[must_use]
    pub fn tight(values: impl Iterator<Item = f64>, pixels: (f64, f64)) -> Scale {
        let (low, high) = bounds(values);
        let step = step((high - low).max(f64::MIN_POSITIVE));
        let ticks = multiples((low / step).ceil() * step, high, step);
        Scale { kind: Kind::Linear, low, high: high.max(low + f64::MIN_POSITIVE), pixels, ticks }
    }

    /// From the least to the greatest of `values`, which must be above zero; each of them is named.
    #[must_use]
    pub fn log(values: impl Iterator<Item = f64>, pixels: (f64, f64)) -> Scale {
        let mut ticks: Vec<f64> = values.filter(|value| value.is_finite() && *value > 0.0).collect();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        let (low, high) = (ticks.first().copied().unwrap_or(1.0), ticks.last().copied().unwrap_or(2.0));
        Scale { kind: Kind::Log, low, high: if high > low { high } else { 2.0 * low }, pixels, ticks }
    }

    /// As [`log`](Self::log), but between round values: 1, 2 and 5 times powers of ten, or the powers alone if they are many.
    #[must_use]
    pub fn decades(values: impl Iterator<Item = f64>, pixels: (f64, f64)) -> Scale {
        let (least, greatest) = bounds(values.filter(|value| *value > 0.0));
        let (least, greatest) = if least > 0.0 { (least, greatest) } else { (greatest / 10.0, greatest) };
        let round = |power: i32| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power));
        let (first, last) = (least.log10().floor() as i32, greatest.log10().floor() as i32 + 1);
        let all: Vec<f64> = (first..=last).flat_map(round).collect();
        let low = all.iter().copied().rfind(|tick| *tick <= least * (1.0 + 1e-9)).unwrap_or(least);
        let high = all.iter().copied().find(|tick| *tick >= greatest * (1.0 - 1e-9)).unwrap_or(greatest);
        let mut ticks: Vec<f64> = all.into_iter().filter(|tick| (low..=high).contains(tick)).collect();
        if ticks.len() > 9 {
            ticks.retain(|tick| tick.log10().fract().abs() < 1e-9);
        }
        Scale { kind: Kind::Log, low, high: if high > low { high } else { 2.0 * low }, pixels, ticks }
    }

    /// Where a value lies. Beyond the ends: at the end.
    #[must_use]
    pub fn at(&self, value: f64) -> f64 {
        let of = |value: f64| if self.kind == Kind::Log { value.max(f64::MIN_POSITIVE).ln() } else { value };
        let share = (of(value) - of(self.low)) / (of(self.high) - of(self.low));
        let (from, to) = self.pixels;
        from + (to - from) * if share.is_finite() { share.clamp(0.0, 1.0) } else { 0.0 }
    }
}

fn bounds(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let values = values.filter(|value| value.is_finite());
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    match (low.is_finite(), high > low) {
        (false, _) => (0.0, 1.0),
        (true, true) => (low, high),
        (true, false) if low > 0.0 => (0.0, low),
        (true, false) => (low, low + 1.0),
    }
}

/// 1, 2 or 5 times a power of ten, such that the span has four to nine of them.
fn step(span: f64) -> f64 {
    let rough = span / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0].into_iter().map(|digit| digit * power).find(|step| *step * 1.25 >= rough);
    step.unwrap_or(10.0 * power)
}

fn multiples(low: f64, high: f64, step: f64) -> Vec<f64> {
    let first = (low / step).round() as i64;
    let count = ((high - low) / step * (1.0 + 1e-9)).floor().min(100.0) as i64;
    (first..=first + count).map(|n| n as f64 * step).collect()
}

/// As short as possible: `0`, `0.05`, `2.5`, `1 200`, `12k`, `3.5M`.
#[must_use]
pub fn short(value: f64) -> String {
    let (value, suffix) = match value.abs() {
        v if v >= 1e6 => (value / 1e6, "M"),
        v if v >= 1e4 => (value / 1e3, "k"),
        _ => (value, ""),
    };
    let decimals = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{}{suffix}", if text == "-0" { "0" } else { text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        let scale = Scale::linear([3.0, 87.0].into_iter(), (100.0, 0.0));
        assert_eq!(scale.ticks, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!((scale.at(0.0), scale.at(100.0), scale.at(50.0), scale.at(1e9)), (100.0, 0.0, 50.0, 0.0));
        for greatest in [1e-6, 0.7, 1.0, 9.9, 12_345.0, 7e11] {
            let ticks = Scale::linear([greatest].into_iter(), (0.0, 1.0)).ticks;
            assert!((4..=11).contains(&ticks.len()), "{greatest}: {ticks:?}");
            assert!(*ticks.last().unwrap() >= greatest * 0.999_999, "{greatest}: {ticks:?}");
        }
    }

    #[test]
    fn a_tight_axis_ends_with_the_values_and_a_log_axis_names_them() {
        let scale = Scale::tight([-1.0, 2.3].into_iter(), (0.0, 330.0));
        assert_eq!(scale.ticks, [-1.0, 0.0, 1.0, 2.0]);
        assert_eq!((scale.at(-1.0), scale.at(2.3)), (0.0, 330.0));
        let scale = Scale::log([16.0, 1.0, 64.0, 16.0].into_iter(), (0.0, 6.0));
        assert_eq!(scale.ticks, [1.0, 16.0, 64.0]);
        assert!((scale.at(16.0) - 4.0).abs() < 1e-9);
    }

    #[test]
    fn a_scale_of_decades_has_round_ends() {
        let scale = Scale::decades([230.0, 9_400.0, 800.0].into_iter(), (0.0, 1.0));
        assert_eq!(scale.ticks, [200.0, 500.0, 1_000.0, 2_000.0, 5_000.0, 10_000.0]);
        assert_eq!((scale.at(200.0), scale.at(10_000.0)), (0.0, 1.0));
        assert_eq!(Scale::decades([3.0, 2e5].into_iter(), (0.0, 1.0)).ticks, [10.0, 100.0, 1e3, 1e4, 1e5]);
    }

    #[test]
    fn no_value_and_odd_values_still_give_an_axis() {
        for values in [vec![], vec![0.0], vec![f64::NAN], vec![5.0], vec![-2.0]] {
            for scale in [
                Scale::linear(values.clone().into_iter(), (0.0, 9.0)),
                Scale::tight(values.clone().into_iter(), (0.0, 9.0)),
                Scale::log(values.clone().into_iter(), (0.0, 9.0)),
                Scale::decades(values.clone().into_iter(), (0.0, 9.0)),
            ] {
                assert!(scale.ticks.len() < 20 && scale.at(3.0).is_finite() && scale.at(f64::NAN).is_finite());
            }
        }
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 0.05, 2.5, 1200.0, 12_000.0, 3.5e6, -0.0001, 99.96].map(short);
        assert_eq!(shown, ["0", "0.05", "2.5", "1200", "12k", "3.5M", "0", "100"]);
    }
}
