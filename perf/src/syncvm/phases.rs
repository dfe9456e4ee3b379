//! Where the time of a syncvm goes, mode by mode.

use syncvm::exchange::{PhaseTimes, SyncReport};

use super::pair::Synced;
use crate::sample::median;

/// A phase and where a report has it.
type Phase = (&'static str, fn(&PhaseTimes) -> u64);

/// In the order in which they happen on either side.
const PHASES: [Phase; 14] = [
    ("compare ahead", |times| times.ahead_us),
    ("stop", |times| times.stop_us),
    ("save device state", |times| times.save_us),
    ("harvest", |times| times.harvest_us),
    ("exchange sets", |times| times.exchange_us),
    ("hash and compare", |times| times.compare_us),
    ("list divergent pages", |times| times.list_us),
    ("copy", |times| times.copy_us),
    ("resume", |times| times.resume_us),
    ("digest blocks", |times| times.digest_us),
    ("transfer", |times| times.transfer_us),
    ("acknowledge", |times| times.ack_us),
    ("apply pages", |times| times.apply_us),
    ("load device state", |times| times.load_us),
];

/// Medians over the slots of each mode: the leader's and the follower's.
#[must_use]
pub fn table(modes: &[(&str, &[Synced])]) -> String {
    let mut lines = vec![vec!["ms, leader | follower".to_owned()]];
    lines[0].extend(modes.iter().map(|(name, _)| (*name).to_owned()));
    let mut add = |name: &str, of: &dyn Fn(&SyncReport) -> u64| {
        let median_ms = |reports: Vec<&SyncReport>| median(reports.into_iter().map(|r| of(r) as f64 / 1e3).collect());
        let cells = modes.iter().map(|(_, slots)| {
            let led = median_ms(slots.iter().map(|slot| &slot.led).collect());
            let followed = median_ms(slots.iter().map(|slot| &slot.followed).collect());
            format!("{led:.2} | {followed:6.2}")
        });
        lines.push(std::iter::once(name.to_owned()).chain(cells).collect());
    };
    for (name, of) in PHASES {
        add(name, &|report| of(&report.phases));
    }
    add("= guest stood still", &|report| report.guest_stop_us);
    add("= whole syncvm", &|report| report.total_us);
    aligned(&lines)
}

/// What each mode costs.
#[must_use]
pub fn effects(modes: &[(&str, &[Synced])]) -> String {
    let mut lines = vec![
        ["mode", "stop ms", "syncvm ms", "MB both ways", "of the 256-byte blocks", "hashed ahead", "copied ahead"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for (name, slots) in modes {
        let median_of = |of: &dyn Fn(&Synced) -> f64| median(slots.iter().map(of).collect());
        lines.push(vec![
            (*name).to_owned(),
            format!("{:.2}", median_of(&Synced::stop_ms)),
            format!("{:.2}", median_of(&|slot| slot.led.total_us as f64 / 1_000.0)),
            format!("{:.2}", median_of(&|slot| slot.bytes() as f64 / 1e6)),
            format!("{:.2} x", median_of(&|slot| slot.bytes() as f64 / slot.difference.block_bytes() as f64)),
            format!("{:.0}", median_of(&|slot| slot.led.known_hashes as f64)),
            format!("{:.0}", median_of(&|slot| slot.led.copied_ahead as f64)),
        ]);
    }
    aligned(&lines)
}

/// Columns under one another: words to the left, then figures to the right.
fn aligned(lines: &[Vec<String>]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut text = String::new();
    for line in lines {
        text += &format!("{:<1$}", line[0], widths[0]);
        for (cell, width) in line.iter().zip(&widths).skip(1) {
            text += &format!("  {cell:>width$}");
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::syncvm::compare::Difference;

    #[test]
    fn medians_stand_in_their_columns() {
        let slot = |us: u64| {
            let phases = PhaseTimes { stop_us: us, harvest_us: 2 * us, ..PhaseTimes::default() };
            let led = SyncReport { phases, guest_stop_us: 4 * us, bytes_sent: 3_000_000, ..SyncReport::default() };
            let mut difference = Difference::default();
            difference.blocks_256 = 10_000;
            Synced { difference, led, followed: SyncReport::default() }
        };
        let slots = [slot(1_000), slot(9_000), slot(2_000)];
        let text = table(&[("pages", &slots)]);
        assert!(text.lines().next().unwrap().ends_with("          pages"), "{text}");
        assert!(text.contains("\nstop                   2.00 |   0.00\n"), "{text}");
        assert!(text.contains("\n= guest stood still    8.00 |   0.00\n"), "{text}");
        let text = effects(&[("pages", &slots)]);
        assert!(text.contains("8.00") && text.contains("3.00") && text.contains("1.17 x"), "{text}");
    }
}
