//! Sums and distributions over all syncvms of this process, for `plover status` and the demo's table.

use hdrhistogram::Histogram;
use syncvm::exchange::{Part, PhaseTimes, SyncReport};
use syncvm::slot::SlotEnd;

use super::slots::SlotTimes;
use crate::status::{SyncStatus, SyncTotals};

/// Every reason, in the order of its number.
const SLOT_ENDS: [SlotEnd; 6] = [
    SlotEnd::Idle,
    SlotEnd::GuardPressure,
    SlotEnd::OldestFrame,
    SlotEnd::Pause,
    SlotEnd::MaxLength,
    SlotEnd::Interval,
];

/// A phase and where a report has it.
type Phase = (&'static str, fn(&PhaseTimes) -> u64);

/// In the order in which they happen on either side.
const PHASES: [Phase; 15] = [
    ("ahead", |times| times.ahead_us),
    ("stop", |times| times.stop_us),
    ("save", |times| times.save_us),
    ("harvest", |times| times.harvest_us),
    ("exchange", |times| times.exchange_us),
    ("compare", |times| times.compare_us),
    ("list", |times| times.list_us),
    ("copy", |times| times.copy_us),
    ("resume", |times| times.resume_us),
    ("digest", |times| times.digest_us),
    ("transfer", |times| times.transfer_us),
    ("ack", |times| times.ack_us),
    ("apply", |times| times.apply_us),
    ("load", |times| times.load_us),
    ("verify", |times| times.verify_us),
];

/// What has been counted so far.
pub struct Totals {
    stop_us: Histogram<u64>,
    whole_us: Histogram<u64>,
    sums: SyncTotals,
    phases_us: [u64; PHASES.len()],
    traffic: [u64; Part::EVERY.len()],
    last: Option<SyncStatus>,
    slot_ends: [u64; SLOT_ENDS.len()],
    /// Syncvms that failed.
    pub failed: u64,
    /// Verifications that found a difference.
    pub diverged: u64,
    /// Where the time of slots goes.
    pub slots: SlotTimes,
}

impl Totals {
    /// Nothing yet.
    pub fn new() -> Self {
        let histogram = || Histogram::new_with_bounds(1, 600_000_000, 2).expect("constant bounds are valid");
        Self {
            stop_us: histogram(),
            whole_us: histogram(),
            sums: SyncTotals::default(),
            phases_us: [0; PHASES.len()],
            traffic: [0; Part::EVERY.len()],
            last: None,
            slot_ends: [0; SLOT_ENDS.len()],
            failed: 0,
            diverged: 0,
            slots: SlotTimes::new(),
        }
    }

    /// A syncvm that this replica led was acknowledged.
    pub fn led(&mut self, report: &SyncReport) {
        self.stop_us.saturating_record(report.guest_stop_us.max(1));
        self.whole_us.saturating_record(report.total_us.max(1));
        self.sums.count += 1;
        for (sum, (_, of)) in self.phases_us.iter_mut().zip(PHASES) {
            *sum += of(&report.phases);
        }
        for (sum, part) in self.traffic.iter_mut().zip(Part::EVERY) {
            *sum += report.traffic.bytes(part);
        }
        self.sums.dirty_pages += report.union_pages as u64;
        self.sums.divergent_pages += report.divergent_pages as u64;
        self.sums.bytes_sent += report.bytes_sent + report.bytes_received;
        self.sums.full_transfer_bytes += report.full_transfer_bytes;
        self.sums.verified += u64::from(report.verified);
        self.last = Some(status_of(report));
    }

    /// A syncvm that this replica followed was applied.
    pub fn followed(&mut self, report: &SyncReport) {
        self.last = Some(status_of(report));
    }

    /// A slot ended, and why.
    pub fn slot_ended(&mut self, end: SlotEnd) {
        self.slot_ends[end as usize] += 1;
    }

    /// The sums.
    pub fn sums(&self) -> SyncTotals {
        SyncTotals {
            failed: self.failed,
            diverged: self.diverged,
            slot_times: self.slots.summary(),
            phases_us: named(&self.phases_us),
            traffic_bytes: Part::EVERY
                .iter()
                .zip(self.traffic)
                .map(|(part, sum)| (part.name().to_owned(), sum))
                .collect(),
            stop_ms_p50: self.stop_us.value_at_quantile(0.5) as f64 / 1000.0,
            stop_ms_p99: self.stop_us.value_at_quantile(0.99) as f64 / 1000.0,
            stop_us: occurrences(&self.stop_us),
            whole_us: occurrences(&self.whole_us),
            slot_ends: SLOT_ENDS
                .iter()
                .map(|end| (end.to_string(), self.slot_ends[*end as usize]))
                .filter(|(_, count)| *count > 0)
                .collect(),
            ..self.sums.clone()
        }
    }

    /// The last one.
    pub fn last(&self) -> Option<SyncStatus> {
        self.last.clone()
    }
}

/// Each value that occurred, and how often.
fn occurrences(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    histogram.iter_recorded().map(|bucket| (bucket.value_iterated_to(), bucket.count_at_value())).collect()
}

fn status_of(report: &SyncReport) -> SyncStatus {
    SyncStatus {
        number: report.number,
        dirty_pages: report.dirty_local as u64,
        union_pages: report.union_pages as u64,
        divergent_pages: report.divergent_pages as u64,
        bytes_sent: report.bytes_sent + report.bytes_received,
        full_transfer_bytes: report.full_transfer_bytes,
        guest_stop_us: report.guest_stop_us,
        phases_us: phases_of(report),
    }
}

/// The phases that took any time, by name.
fn phases_of(report: &SyncReport) -> Vec<(String, u64)> {
    named(&PHASES.map(|(_, of)| of(&report.phases)))
}

fn named(phases_us: &[u64; PHASES.len()]) -> Vec<(String, u64)> {
    let all = PHASES.iter().zip(phases_us).filter(|(_, us)| **us > 0);
    all.map(|((name, _), us)| ((*name).to_owned(), *us)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_hold_every_syncvm_once() {
        let mut totals = Totals::new();
        for guest_stop_us in [900, 900, 2_000_000] {
            totals.led(&SyncReport { guest_stop_us, total_us: 3 * guest_stop_us, ..SyncReport::default() });
        }
        let sums = totals.sums();
        let near = |(time, count): (u64, u64), us: u64, times| count == times && time.abs_diff(us) <= us / 100;
        for (found, us) in [(&sums.stop_us, [900, 2_000_000]), (&sums.whole_us, [2_700, 6_000_000])] {
            assert!(found.len() == 2 && near(found[0], us[0], 2) && near(found[1], us[1], 1), "{found:?}");
        }
    }

    #[test]
    fn phases_are_summed_over_led_syncvms_by_name() {
        let mut totals = Totals::new();
        for stop_us in [20, 22] {
            let phases = PhaseTimes { stop_us, ack_us: 5, ..PhaseTimes::default() };
            totals.led(&SyncReport { phases, ..SyncReport::default() });
        }
        totals.followed(&SyncReport {
            phases: PhaseTimes { load_us: 9, ..PhaseTimes::default() },
            ..SyncReport::default()
        });
        assert_eq!(totals.sums().phases_us, [("stop".to_owned(), 42), ("ack".to_owned(), 10)]);
        assert_eq!(totals.sums().traffic_bytes.len(), Part::EVERY.len(), "each part by its name");
        assert_eq!(totals.last().expect("it was followed").phases_us, [("load".to_owned(), 9)]);
    }
}
