//! The table against its golden text, and each promise broken once.

use super::{CUT_GAP_LIMIT_MS, DemoReport, Event, Failure, KILLED_GAP_LIMIT_MS, OpsPerSecond, Style, SyncvmFigures};

const GOLDEN: &str = include_str!("golden.txt");

fn report() -> DemoReport {
    let event = |t_ms, text: &str| Event { t_ms, text: text.into() };
    let mut series = vec![4_500; 600];
    series[205..209].fill(0);
    series[209..300].fill(9_000);
    series[400..412].fill(0);
    DemoReport {
        seed: 42,
        duration_ms: 61_234.0,
        connections: 64,
        history_connections: 6,
        in_flight: 64,
        operations: 3_012_345,
        acknowledged_writes: 1_506_172,
        linearizable: Some(true),
        checked_operations: 5_432,
        failures: vec![
            Failure {
                kind: "host killed".into(),
                at_ms: 20_500.0,
                gap_ms: 412.4,
                connection_gap_ms: 430.0,
                gap_limit_ms: KILLED_GAP_LIMIT_MS,
                ping_gap_ms: Some(398.0),
                protected_again_ms: Some(9_500.0),
            },
            Failure {
                kind: "link cut".into(),
                at_ms: 40_000.0,
                gap_ms: 1_204.0,
                connection_gap_ms: 1_310.0,
                gap_limit_ms: CUT_GAP_LIMIT_MS,
                ping_gap_ms: None,
                protected_again_ms: Some(8_000.0),
            },
        ],
        ops_per_s: OpsPerSecond {
            unreplicated: Some(100_000.0),
            protected: Some(45_000.0),
            degraded: Some(90_000.0),
            protected_unpipelined: Some(2_100.0),
            unreplicated_unpipelined: Some(14_000.0),
        },
        syncvm: SyncvmFigures {
            count: 1_234,
            dirty_pages: 456_789,
            divergent_pages: 4_321,
            bytes_sent: 18_874_368,
            full_transfer_bytes: 1_871_007_744,
            stop_ms_p50: 3.21,
            stop_ms_p99: 9.87,
        },
        events: vec![
            event(0.0, "protected: a leads, b is secondary, c is witness"),
            event(20_500.0, "host a killed"),
            event(20_912.0, "b leads"),
            event(30_000.0, "protected again: b leads, c is secondary"),
            event(40_000.0, "link of b cut"),
        ],
        series_100ms: series,
        ..DemoReport::default()
    }
}

#[test]
fn the_table_is_the_golden_one() {
    let text = report().render(Style::PLAIN);
    // To accept a change: write `text` to golden.txt after reading it.
    assert_eq!(text, GOLDEN, "\n{text}");
    assert!(report().is_success());
}

#[test]
fn colour_and_blocks_change_no_word() {
    let styled = report().render(Style { colour: true, unicode: true });
    assert!(styled.contains("\x1b[32mkept"));
    assert!(styled.contains('█'));
    let words = |text: &str| -> Vec<String> {
        let plain = ["\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[0m"]
            .iter()
            .fold(text.to_owned(), |text, code| text.replace(code, ""));
        let is_word = |word: &&str| word.chars().any(char::is_alphanumeric);
        plain.split_whitespace().filter(is_word).map(Into::into).collect()
    };
    assert_eq!(words(&styled), words(GOLDEN));
}

#[test]
fn every_promise_can_be_broken() {
    let broken = |change: fn(&mut DemoReport)| {
        let mut report = report();
        change(&mut report);
        assert!(!report.is_success());
        let names: Vec<_> = report.promises().into_iter().filter(|p| !p.kept).map(|p| p.name).collect();
        let text = report.render(Style::PLAIN);
        assert!(text.contains("BROKEN") && text.contains("Verdict: FAILED, 1 promise broken."), "{text}");
        names.join(", ")
    };
    assert_eq!(broken(|r| r.acknowledged_writes_lost = 1), "no acknowledged write lost");
    assert_eq!(broken(|r| r.acknowledged_writes = 0), "no acknowledged write lost");
    assert_eq!(broken(|r| r.verification_incomplete = Some("no server".into())), "no acknowledged write lost");
    assert_eq!(broken(|r| r.connections_lost = 1), "no connection lost");
    assert_eq!(broken(|r| r.wrong_answers = 1), "no wrong answer");
    for linearizable in [None, Some(false)] {
        let mut report = report();
        report.linearizable = linearizable;
        assert!(!report.is_success(), "{linearizable:?}");
    }
    assert_eq!(broken(|r| r.checked_operations = 0), "shared keys linearizable");
    assert_eq!(broken(|r| r.ops_per_s.protected = Some(39_999.0)), "protected throughput");
    assert_eq!(broken(|r| r.ops_per_s.unreplicated = None), "protected throughput");
    assert_eq!(broken(|r| r.failures.clear()), "survives a failure");
    assert_eq!(broken(|r| r.failures[1].gap_ms = 2_501.0), "link cut: short gap");
    assert_eq!(broken(|r| r.failures[0].protected_again_ms = None), "host killed: protected again");
}

#[test]
fn the_json_has_the_promised_fields() {
    let json = serde_json::to_value(report()).expect("a report is plain data");
    for pointer in [
        "/acknowledged_writes_lost",
        "/connections_lost",
        "/failures/0/kind",
        "/failures/0/gap_ms",
        "/failures/0/protected_again_ms",
        "/ops_per_s/unreplicated",
        "/ops_per_s/protected",
        "/ops_per_s/degraded",
        "/ops_per_s/protected_unpipelined",
        "/ops_per_s/unreplicated_unpipelined",
        "/syncvm/count",
        "/syncvm/dirty_pages",
        "/syncvm/divergent_pages",
        "/syncvm/bytes_sent",
        "/syncvm/full_transfer_bytes",
        "/syncvm/stop_ms_p50",
        "/syncvm/stop_ms_p99",
    ] {
        assert!(json.pointer(pointer).is_some_and(|value| !value.is_null()), "{pointer} is missing");
    }
    assert_eq!(serde_json::from_value::<DemoReport>(json).expect("it reads back"), report());
}

#[test]
fn a_report_of_nothing_is_a_failure_and_renders() {
    let empty = DemoReport::default();
    assert!(!empty.is_success());
    assert!(empty.render(Style::PLAIN).contains("not measured"));
}
