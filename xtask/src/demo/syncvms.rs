//! Sums over the syncvms of all leaders.
//!
//! A daemon counts what it led since it started, and a killed one forgets. So its count is looked at before each failure;
//! when a daemon has started again, its last known count is put aside and the new one added.

use rig::report::SyncvmFigures;
use rig::{Cluster, cluster::DAEMON};
use serde_json::Value;

#[derive(Default)]
struct Counted {
    starts: u32,
    present: SyncvmFigures,
    earlier: Vec<SyncvmFigures>,
}

impl Counted {
    /// The daemon that was started the `starts`th time says `figures`.
    fn look(&mut self, starts: u32, figures: SyncvmFigures) {
        if starts != self.starts {
            self.earlier.push(self.present);
            self.starts = starts;
        }
        self.present = figures;
    }
}

/// What each host's daemons have led.
#[derive(Default)]
pub struct Collected {
    hosts: Vec<Counted>,
}

impl Collected {
    /// Looks at every host; one that does not answer keeps its last count.
    pub fn collect(&mut self, cluster: &Cluster) {
        let hosts = cluster.bed().hosts();
        self.hosts.resize_with(hosts.len(), Counted::default);
        for (host, counted) in hosts.iter().zip(&mut self.hosts) {
            let starts = host.process(DAEMON).map_or(0, |daemon| daemon.starts());
            let Some(status) = cluster.status(host) else {
                continue;
            };
            counted.look(starts, figures(&status["totals"]));
        }
    }

    /// The sums. Quantiles cannot be added: those of the daemon that led most syncvms stand for all.
    pub fn sums(&self) -> SyncvmFigures {
        let all = || self.hosts.iter().flat_map(|host| host.earlier.iter().chain([&host.present]));
        let sum = |field: fn(&SyncvmFigures) -> u64| all().map(field).sum();
        let most = all().max_by_key(|figures| figures.count).copied();
        SyncvmFigures {
            count: sum(|figures| figures.count),
            dirty_pages: sum(|figures| figures.dirty_pages),
            divergent_pages: sum(|figures| figures.divergent_pages),
            bytes_sent: sum(|figures| figures.bytes_sent),
            full_transfer_bytes: sum(|figures| figures.full_transfer_bytes),
            ..most.unwrap_or_default()
        }
    }
}

fn figures(totals: &Value) -> SyncvmFigures {
    let count = |name: &str| totals[name].as_u64().unwrap_or(0);
    let ms = |name: &str| totals[name].as_f64().unwrap_or(0.0);
    SyncvmFigures {
        count: count("count"),
        dirty_pages: count("dirty_pages"),
        divergent_pages: count("divergent_pages"),
        bytes_sent: count("bytes_sent"),
        full_transfer_bytes: count("full_transfer_bytes"),
        stop_ms_p50: ms("stop_ms_p50"),
        stop_ms_p99: ms("stop_ms_p99"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn led(count: u64, stop_ms_p50: f64) -> SyncvmFigures {
        SyncvmFigures { count, dirty_pages: count * 10, stop_ms_p50, ..SyncvmFigures::default() }
    }

    #[test]
    fn a_daemon_that_starts_again_adds_to_what_it_did_before() {
        let mut collected = Collected::default();
        collected.hosts.resize_with(2, Counted::default);
        collected.hosts[0].look(1, led(100, 3.0));
        collected.hosts[0].look(1, led(700, 4.0));
        collected.hosts[0].look(2, led(5, 90.0));
        collected.hosts[1].look(1, led(60, 8.0));
        let sums = collected.sums();
        assert_eq!((sums.count, sums.dirty_pages), (765, 7_650));
        assert_eq!(sums.stop_ms_p50, 4.0, "the killed one led most");
    }

    #[test]
    fn the_totals_of_a_status_are_read_by_name() {
        let totals = serde_json::json!({
            "count": 3, "failed": 1, "dirty_pages": 40, "divergent_pages": 5, "bytes_sent": 600,
            "full_transfer_bytes": 7000, "stop_ms_p50": 1.5, "stop_ms_p99": 2.5,
        });
        let expected = SyncvmFigures {
            count: 3,
            dirty_pages: 40,
            divergent_pages: 5,
            bytes_sent: 600,
            full_transfer_bytes: 7_000,
            stop_ms_p50: 1.5,
            stop_ms_p99: 2.5,
        };
        assert_eq!(figures(&totals), expected);
    }
}
