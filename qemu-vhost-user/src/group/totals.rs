//! Sums and distributions over all syncvms of this process, for `plover status` and the demo's table.

use hdrhistogram::Histogram;
use syncvm::exchange::SyncReport;
use syncvm::slot::SlotEnd;

use crate::status::{SyncStatus, SyncTotals};

/// Every reason, in the order of its number.
const SLOT_ENDS: [SlotEnd; 4] = [SlotEnd::Idle, SlotEnd::GuardPressure, SlotEnd::OldestFrame, SlotEnd::MaxLength];

/// What has been counted so far.
pub struct Totals {
    stop_us: Histogram<u64>,
    sums: SyncTotals,
    last: Option<SyncStatus>,
    slot_ends: [u64; SLOT_ENDS.len()],
    /// Syncvms that failed.
    pub failed: u64,
    /// Verifications that found a difference.
    pub diverged: u64,
    /// What the last syncvm took from stop to acknowledgement.
    pub last_cost_us: u64,
}

impl Totals {
    /// Nothing yet.
    pub fn new() -> Self {
        Self {
            stop_us: Histogram::new_with_bounds(1, 600_000_000, 3).expect("constant bounds are valid"),
            sums: SyncTotals::default(),
            last: None,
            slot_ends: [0; SLOT_ENDS.len()],
            failed: 0,
            diverged: 0,
            last_cost_us: 0,
        }
    }

    /// A syncvm that this replica led was acknowledged.
    pub fn led(&mut self, report: &SyncReport) {
        self.stop_us.saturating_record(report.guest_stop_us.max(1));
        self.sums.count += 1;
        self.sums.dirty_pages += report.union_pages as u64;
        self.sums.divergent_pages += report.divergent_pages as u64;
        self.sums.bytes_sent += report.bytes_sent + report.bytes_received;
        self.sums.full_transfer_bytes += report.full_transfer_bytes;
        self.sums.verified += u64::from(report.verified);
        self.last_cost_us = report.total_us;
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
            stop_ms_p50: self.stop_us.value_at_quantile(0.5) as f64 / 1000.0,
            stop_ms_p99: self.stop_us.value_at_quantile(0.99) as f64 / 1000.0,
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
    let times = &report.phases;
    [
        ("stop", times.stop_us),
        ("save", times.save_us),
        ("harvest", times.harvest_us),
        ("exchange", times.exchange_us),
        ("compare", times.compare_us),
        ("list", times.list_us),
        ("copy", times.copy_us),
        ("resume", times.resume_us),
        ("digest", times.digest_us),
        ("transfer", times.transfer_us),
        ("ack", times.ack_us),
        ("apply", times.apply_us),
        ("load", times.load_us),
        ("verify", times.verify_us),
    ]
    .into_iter()
    .filter(|(_, us)| *us > 0)
    .map(|(name, us)| (name.to_owned(), us))
    .collect()
}
