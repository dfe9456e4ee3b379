//! One table per workload for people, and the rows.

use crate::Effort;
use crate::row::Row;
use crate::sample::{Better, Figure, alone, median, paired};

use super::cell::Cell;
use super::policy::{LADDER, MC, Policy, STR, UNREPLICATED, VSMR};
use super::workload::{FIGURE_7, REDIS_COLO, REDIS_INCR, REDIS_PLAIN_16, Workload};

/// What COLO's checkpoint modes reach of the same guest alone: 64 clients × 16 in flight, 64-byte values, 100 keys, two
/// QEMUs under TCG on two cores. Measured earlier, on its own; «alone» was its own unreplicated guest.
const COLO: [(&str, &str, f64); 2] = [
    ("vs_colo_25ms", "QEMU COLO, checkpoint every 25 ms", 12_739.0 / 47_619.0),
    ("vs_colo_100ms", "QEMU COLO, checkpoint every 100 ms", 9_390.0 / 47_619.0),
];

/// The rows, after a workload's id, that compare with this policy.
#[must_use]
pub fn rows_against(policy: Policy) -> Vec<String> {
    let mut rows = vec![format!("vs_{}", policy.name), policy.name.to_owned()];
    if policy == MC {
        rows.extend(["bytes_vs_mc", "wire_vs_mc"].map(str::to_owned));
    }
    if policy == UNREPLICATED {
        rows.extend(COLO.map(|(row, ..)| row.to_owned()));
        // Every switch is compared with it.
        rows.extend(LADDER.map(|policy| policy.name.to_owned()));
    }
    rows
}

/// A workload's cells under one policy, one per pass.
#[derive(Debug)]
pub struct Column {
    /// The policy.
    pub policy: Policy,
    /// In the order of the passes.
    pub cells: Vec<Cell>,
}

/// All that was measured of one workload.
#[derive(Debug)]
pub struct Measured<'a> {
    /// Which.
    pub workload: &'a Workload,
    /// Per policy.
    pub columns: Vec<Column>,
}

impl Column {
    fn each(&self, figure: impl Fn(&Cell) -> f64) -> Vec<f64> {
        self.cells.iter().map(figure).collect()
    }

    fn median(&self, figure: impl Fn(&Cell) -> f64) -> f64 {
        median(self.each(figure))
    }
}

impl Measured<'_> {
    fn column(&self, policy: &str) -> Option<&Column> {
        self.columns.iter().find(|column| column.policy.name == policy && !column.cells.is_empty())
    }

    /// The table, a line per policy.
    #[must_use]
    pub fn table(&self) -> String {
        let passes = self.columns.iter().map(|column| column.cells.len()).max().unwrap_or(0);
        let mut lines = vec![HEAD.map(str::to_owned)];
        lines.extend(self.columns.iter().filter(|column| !column.cells.is_empty()).map(line));
        let widths: [usize; HEAD.len()] =
            std::array::from_fn(|at| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0));
        let mut text = format!("{}: {}; medians of {passes}\n", self.workload.id, self.workload.about);
        for line in &lines {
            let cells =
                line.iter().zip(widths).enumerate().map(|(at, (cell, width))| {
                    if at == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                });
            text += &format!("  {}\n", cells.collect::<Vec<_>>().join("  "));
        }
        text
    }

    /// The rows of the default policy against the others.
    #[must_use]
    pub fn rows(&self, effort: Effort, others: &[Measured<'_>]) -> Vec<Row> {
        if self.workload.id == FIGURE_7 {
            return self.switches(effort);
        }
        let mut rows = Vec::new();
        let Some(ours) = self.column(VSMR.name) else { return rows };
        let id = |row: &str| format!("{}.{row}", self.workload.id);
        let versus = |row: &str, unit, better, peer: &Column, figure: fn(&Cell) -> f64| {
            let id = id(row);
            let figures = Figure { id: &id, unit, better };
            paired(figures, effort, peer.policy.name, ours.each(figure), peer.each(figure))
        };
        for name in [UNREPLICATED, MC, STR].map(|policy| policy.name) {
            let Some(peer) = self.column(name) else { continue };
            rows.push(versus(&format!("vs_{name}"), "1/s", Better::Higher, peer, |cell| cell.speed.per_s));
            if name == MC.name {
                rows.push(versus("bytes_vs_mc", "B", Better::Lower, peer, Cell::sync_bytes_per_operation));
                rows.push(versus("wire_vs_mc", "B", Better::Lower, peer, Cell::wire_bytes_per_operation));
            }
        }
        let mut single = |row: &str, unit, better, figure: fn(&Cell) -> f64| {
            rows.push(alone(Figure { id: &id(row), unit, better }, effort, ours.each(figure)));
        };
        single("same_rate", "share", Better::Higher, |cell| cell.cost.syncs.same_rate());
        single("p50", "us", Better::Lower, |cell| cell.speed.p50_us);
        single("p99", "us", Better::Lower, |cell| cell.speed.p99_us);
        single("longest_syncvm", "medians", Better::Lower, |cell| cell.cost.syncs.whole_us.longest_by_median());
        rows.extend(self.special(effort, ours, others));
        rows
    }

    /// Operations per second under each policy.
    #[must_use]
    pub fn per_s(&self) -> Vec<(&'static str, f64)> {
        let measured = self.columns.iter().filter(|column| !column.cells.is_empty());
        measured.map(|column| (column.policy.name, column.median(|cell| cell.speed.per_s))).collect()
    }

    /// A row per switch, with all before it, against the unreplicated guest.
    fn switches(&self, effort: Effort) -> Vec<Row> {
        let Some(alone) = self.column(UNREPLICATED.name) else { return Vec::new() };
        let protected = self.columns.iter().filter(|column| !column.policy.unreplicated && !column.cells.is_empty());
        let rate = |cell: &Cell| cell.speed.per_s;
        let row = |column: &Column| {
            let id = format!("{}.{}", self.workload.id, column.policy.name);
            let figure = Figure { id: &id, unit: "1/s", better: Better::Higher };
            paired(figure, effort, UNREPLICATED.name, column.each(rate), alone.each(rate))
        };
        protected.map(row).collect()
    }

    /// Rows that only one workload has.
    fn special(&self, effort: Effort, ours: &Column, others: &[Measured<'_>]) -> Vec<Row> {
        let id = |row: &str| format!("{}.{row}", self.workload.id);
        match self.workload.id {
            REDIS_COLO => {
                let Some(alone) = self.column(UNREPLICATED.name) else { return Vec::new() };
                let (ours, alone) = (ours.each(|cell| cell.speed.per_s), alone.each(|cell| cell.speed.per_s));
                let shares: Vec<f64> = ours.iter().zip(alone).map(|(ours, alone)| ours / alone).collect();
                let row = |(row, peer, share): (&str, &str, f64)| {
                    let figure = Figure { id: &id(row), unit: "of alone", better: Better::Higher };
                    paired(figure, effort, peer, shares.clone(), vec![share; shares.len()])
                };
                COLO.map(row).to_vec()
            }
            REDIS_INCR => {
                let plain = others.iter().find(|other| other.workload.id == REDIS_PLAIN_16);
                let Some(plain) = plain.and_then(|plain| plain.column(VSMR.name)) else { return Vec::new() };
                let figure = Figure { id: &id("vs_set"), unit: "1/s", better: Better::Higher };
                let rate = |cell: &Cell| cell.speed.per_s;
                vec![paired(figure, effort, "SET under vsmr", ours.each(rate), plain.each(rate))]
            }
            _ => Vec::new(),
        }
    }
}

const HEAD: [&str; 17] = [
    "policy",
    "1/s",
    "p50 ms",
    "p99 ms",
    "syncvms/s",
    "stop p50 ms",
    "p99 ms",
    "syncvm p50 ms",
    "longest",
    "failed",
    "dirty",
    "same",
    "sync B/op",
    "wire B/op",
    "CPU h1",
    "h2",
    "h3",
];

fn line(column: &Column) -> [String; HEAD.len()] {
    let one = |figure: fn(&Cell) -> f64| format!("{:.1}", column.median(figure));
    let two = |figure: fn(&Cell) -> f64| format!("{:.2}", column.median(figure));
    let whole = |figure: fn(&Cell) -> f64| format!("{:.0}", column.median(figure));
    // Daemon and QEMU, in hundredths of a CPU.
    let cpu = |host: usize| {
        let share = |process: usize| 100.0 * column.median(|cell| cell.cost.cpu_s[host][process] / cell.seconds());
        format!("{:.0}+{:.0} %", share(0), share(1))
    };
    let protected = |text: String| if column.policy.unreplicated { "-".to_owned() } else { text };
    [
        column.policy.name.to_owned(),
        whole(|cell| cell.speed.per_s),
        two(|cell| cell.speed.p50_us / 1e3),
        two(|cell| cell.speed.p99_us / 1e3),
        protected(one(|cell| cell.cost.syncs.count as f64 / cell.seconds())),
        protected(two(|cell| cell.cost.syncs.stop_us.quantile_ms(0.5))),
        protected(two(|cell| cell.cost.syncs.stop_us.quantile_ms(0.99))),
        protected(two(|cell| cell.cost.syncs.whole_us.quantile_ms(0.5))),
        protected(one(|cell| cell.cost.syncs.whole_us.longest_by_median())),
        protected(whole(|cell| cell.cost.syncs.failed as f64)),
        protected(whole(|cell| cell.cost.syncs.dirty_pages as f64 / cell.cost.syncs.count.max(1) as f64)),
        protected(two(|cell| cell.cost.syncs.same_rate())),
        protected(whole(Cell::sync_bytes_per_operation)),
        protected(whole(Cell::wire_bytes_per_operation)),
        cpu(0),
        protected(cpu(1)),
        protected(cpu(2)),
    ]
}

/// How to read the tables.
pub const LEGEND: &str = "\
syncvms/s, stop (the guest stands still), syncvm (stop to acknowledgement), longest (by the median syncvm), dirty (pages per syncvm, of either
side) and same (their share that was equal) are the leader's; sync B/op: bytes of syncvms per operation; wire B/op: everything between the
replicas; CPU: daemon + QEMU of leader, secondary and witness, of one CPU each
";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::client::Speed;
    use crate::services::counters::{Between, Syncs};
    use crate::services::workload;

    fn column(policy: Policy, rates: &[f64], bytes_sent: u64) -> Column {
        let cell = |&per_s: &f64| Cell {
            speed: Speed { per_s, p50_us: 250.0, p99_us: 2_500.0, operations: 1_000 },
            cost: Between {
                syncs: Syncs { count: 10, dirty_pages: 400, divergent_pages: 100, bytes_sent, ..Syncs::default() },
                wire_bytes: 2 * bytes_sent,
                cpu_s: [[0.1, 0.9], [0.2, 0.7], [0.0, 0.0]],
            },
        };
        Column { policy, cells: rates.iter().map(cell).collect() }
    }

    fn measured<'a>(workload: &'a Workload, columns: Vec<Column>) -> Measured<'a> {
        Measured { workload, columns }
    }

    fn ratio(rows: &[Row], id: &str) -> Option<f64> {
        rows.iter().find(|row| row.id == id).unwrap_or_else(|| panic!("no row {id} in {rows:?}")).ratio
    }

    #[test]
    fn rows_compare_the_default_policy_with_each_other_one_pass_by_pass() {
        let columns = vec![
            column(UNREPLICATED, &[1_000.0, 500.0, 2_000.0], 0),
            column(VSMR, &[800.0, 400.0, 500.0], 3_000),
            column(MC, &[100.0, 100.0, 100.0], 30_000),
        ];
        let rows = measured(&workload::ALL[0].workloads[0], columns).rows(Effort::Full, &[]);
        assert_eq!(ratio(&rows, "redis.c64.k100.vs_unreplicated"), Some(0.8));
        assert_eq!(ratio(&rows, "redis.c64.k100.vs_mc"), Some(5.0));
        assert_eq!(ratio(&rows, "redis.c64.k100.bytes_vs_mc"), Some(10.0));
        assert_eq!(ratio(&rows, "redis.c64.k100.wire_vs_mc"), Some(10.0));
        assert_eq!(ratio(&rows, "redis.c64.k100.same_rate"), None);
        let same_rate = rows.iter().find(|row| row.id.ends_with("same_rate")).map(|row| row.value);
        assert_eq!(same_rate, Some(0.75));
        assert!(rows.iter().all(|row| !row.id.contains("vs_str") && row.spread.is_finite()), "{rows:?}");
    }

    #[test]
    fn some_workloads_have_rows_of_their_own() {
        let find = |id: &str| workload::ALL[0].workloads.iter().find(|one| one.id == id).expect("it is there");
        let two = |rate| vec![column(UNREPLICATED, &[1_000.0], 0), column(VSMR, &[rate], 10)];
        let all = [
            measured(find(REDIS_COLO), two(535.0)),
            measured(find(REDIS_PLAIN_16), two(200.0)),
            measured(find(REDIS_INCR), two(220.0)),
        ];
        let rows: Vec<Row> = all.iter().flat_map(|one| one.rows(Effort::Full, &all)).collect();
        let colo = ratio(&rows, "redis-p16.c64.k100.vs_colo_25ms").unwrap();
        assert!((colo - 2.0).abs() < 0.01, "{colo}");
        assert_eq!(ratio(&rows, "redis-incr.c16.vs_set"), Some(1.1));
        let alone = measured(find(REDIS_INCR), two(220.0)).rows(Effort::Full, &[]);
        assert!(alone.iter().all(|row| !row.id.ends_with("vs_set")));
    }

    #[test]
    fn switches_have_a_row_each_and_plots_are_drawn_of_what_is_whole() {
        let find = |id: &str| {
            let mut all = workload::ALL.iter().flat_map(|suite| suite.workloads);
            all.find(|one| one.id == id).expect("it is there")
        };
        let columns = LADDER.iter().zip([1_000.0, 100.0, 300.0, 400.0, 450.0, 500.0]);
        let columns = columns.map(|(policy, rate)| column(*policy, &[rate], 10)).collect();
        let ladder = measured(find(FIGURE_7), columns);
        let rows = ladder.rows(Effort::Full, &[]);
        let ratios: Vec<_> = rows.iter().map(|row| (row.id.as_str(), row.ratio)).collect();
        assert_eq!(ratios.len(), 5, "{ratios:?}");
        assert_eq!((ratios[0], ratios[4].1), (("switches.c64.k100.ordering", Some(0.1)), Some(0.5)));
        let directory = crate::results::Scratch::new(&std::env::temp_dir(), "plover-perf-plots").unwrap();
        let two = |id| measured(find(id), vec![column(UNREPLICATED, &[900.0], 0), column(VSMR, &[80.0], 10)]);
        let mut all = vec![ladder, two("redis-plain.c1.k100"), two(REDIS_PLAIN_16)];
        assert_eq!(crate::services::plots::write(&all, directory.path()).unwrap().len(), 1);
        all.push(two("redis-plain.c64.k100"));
        let paths = crate::services::plots::write(&all, directory.path()).unwrap();
        assert_eq!(paths.len(), 2);
        let drawn = std::fs::read_to_string(&paths[0]).unwrap();
        assert!(drawn.contains("vsmr") && drawn.contains("unreplicated"), "{drawn}");
    }

    #[test]
    fn the_table_has_a_line_per_policy_and_aligned_columns() {
        let columns = vec![column(UNREPLICATED, &[1_000.0], 0), column(VSMR, &[800.0], 3_000), column(MC, &[], 0)];
        let text = measured(&workload::ALL[0].workloads[0], columns).table();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].starts_with("redis.c64.k100: SET"), "{text}");
        assert!(lines[2].contains("unreplicated  1000    0.25    2.50") && lines[2].contains("10+90 %"), "{text}");
        assert!(lines[3].contains("0.75") && lines[3].contains("16+56 %"), "{text}");
        assert_eq!(lines[2].chars().count(), lines[3].chars().count(), "{text}");
    }
}
