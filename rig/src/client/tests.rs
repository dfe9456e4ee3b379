//! The clients against a server that does wrong on purpose: each wrong must be noticed, as exactly what it is.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use super::control::Control;
use super::fake_redis::{FakeRedis, Faults};
use super::job;
use super::ping;
use super::protocol::{
    Command, Job, LoadParameters, LoadReport, Output, PingParameters, ProbeParameters, RegisterParameters,
    RegisterReport, Report, Service, VerifyParameters,
};
use super::redis::{self, LoadError};
use super::register;

fn parameters(server: &FakeRedis) -> LoadParameters {
    LoadParameters {
        address: server.address,
        connections: 1,
        in_flight: 16,
        requests_per_connection: 2_000,
        duration_ms: 10_000,
        keys_per_connection: 64,
        progress_ms: 10,
        drain_ms: 2_000,
        ..Default::default()
    }
}

fn load(parameters: &LoadParameters) -> LoadReport {
    let (_sender, mut control) = Control::channel();
    redis::run(parameters, &mut control, &mut |_| {}).expect("the load runs")
}

fn assert_clean(report: &LoadReport) {
    let verification = report.verification.as_ref().expect("verification was asked for");
    assert_eq!(verification.incomplete, None);
    assert_eq!(verification.lost, []);
    assert_eq!(report.wrong_read_samples, []);
    assert_eq!((report.wrong_reads, report.acknowledged_writes_lost), (0, 0));
}

#[test]
fn a_faultless_server_passes_with_every_request_answered() {
    let server = FakeRedis::start(Faults::default());
    let report = load(&LoadParameters { connections: 5, ..parameters(&server) });
    assert_clean(&report);
    assert_eq!(report.operations, 10_000);
    assert!((4_000..6_000).contains(&report.acknowledged_writes), "half are SET: {report:?}");
    assert_eq!((report.connections_lost, report.errors, report.unanswered_writes), (0, 0, 0));
    assert_eq!(report.series_100ms.iter().sum::<u32>(), 10_000);
    assert_eq!(report.verification.expect("asked for").keys_checked, 5 * 64);
}

#[test]
fn answers_in_pieces_are_put_together() {
    let server = FakeRedis::start(Faults { piece_bytes: Some(7), ..Default::default() });
    let report = load(&LoadParameters { requests_per_connection: 300, ..parameters(&server) });
    assert_clean(&report);
    assert_eq!(report.operations, 300);
}

#[test]
fn batches_and_unpipelined_requests_work() {
    let server = FakeRedis::start(Faults::default());
    for (in_flight, batch) in [(1, 1), (16, 16), (16, 5)] {
        let report = load(&LoadParameters { in_flight, batch, ..parameters(&server) });
        assert_clean(&report);
        assert_eq!(report.operations, 2_000, "{in_flight} in flight, batches of {batch}");
    }
}

#[test]
fn a_forgotten_write_is_found_by_the_verification_as_exactly_that() {
    let server = FakeRedis::start(Faults { forget_set: Some(100), ..Default::default() });
    // Many keys and no GET: only the final read-back can see it.
    let report = load(&LoadParameters { get_percent: 0, keys_per_connection: 100_000, ..parameters(&server) });
    let verification = report.verification.expect("verification was asked for");
    assert_eq!((report.acknowledged_writes_lost, verification.acknowledged_writes_lost), (1, 1));
    assert_eq!(verification.lost[0].expected, "write 100 of connection 0 generation 0");
    assert_eq!(verification.lost[0].got, "nothing");
    assert_eq!(report.acknowledged_writes, 2_000);
    assert_eq!((report.wrong_reads, report.connections_lost), (0, 0));
}

#[test]
fn an_old_value_in_the_verification_is_a_lost_write() {
    let last = Faults { forget_set: Some(2_000), ..Default::default() };
    let server = FakeRedis::start(last);
    let report = load(&LoadParameters { get_percent: 0, ..parameters(&server) });
    let verification = report.verification.expect("verification was asked for");
    assert_eq!((report.acknowledged_writes_lost, verification.acknowledged_writes_lost), (1, 1));
    assert_eq!(verification.lost[0].expected, "write 2000 of connection 0 generation 0");
    assert!(verification.lost[0].got.starts_with("write 19"), "an older one: {:?}", verification.lost);
}

#[test]
fn a_forgotten_write_that_is_overwritten_later_is_found_by_the_reads() {
    let server = FakeRedis::start(Faults { forget_set: Some(100), ..Default::default() });
    let report = load(&LoadParameters { get_percent: 80, keys_per_connection: 3, ..parameters(&server) });
    assert!(report.wrong_reads >= 1, "{report:?}");
    assert_eq!(report.acknowledged_writes_lost, 1, "one write is lost however often it is missed: {report:?}");
    assert_eq!(report.verification.expect("asked for").acknowledged_writes_lost, 0);
    assert_eq!(report.wrong_read_samples[0].expected, "write 100 of connection 0 generation 0");
}

#[test]
fn a_dropped_connection_counts_once_and_loses_nothing() {
    for faults in [
        Faults { close_before: Some(1_000), ..Default::default() },
        Faults { close_after: Some(1_000), ..Default::default() },
    ] {
        let server = FakeRedis::start(faults);
        let report = load(&LoadParameters { connections: 4, get_percent: 0, ..parameters(&server) });
        assert_clean(&report);
        assert_eq!(report.connections_lost, 1, "{report:?}");
        assert_eq!(report.windows[0].connections_lost, 1);
        assert!((1..=16).contains(&report.unanswered_writes), "{report:?}");
        assert_eq!(report.operations + report.unanswered_writes, 8_000);
    }
}

#[test]
fn an_unanswered_write_that_took_effect_is_accepted_and_counted() {
    let server = FakeRedis::start(Faults { close_after: Some(2_000), ..Default::default() });
    let report =
        load(&LoadParameters { get_percent: 0, in_flight: 1, keys_per_connection: 1_000, ..parameters(&server) });
    assert_clean(&report);
    assert_eq!(report.unanswered_writes, 1);
    assert_eq!(report.verification.expect("asked for").maybe_writes_applied, 1);
}

#[test]
fn a_pause_is_seen_as_a_gap_of_its_length_on_a_kept_connection() {
    let pause = Duration::from_millis(300);
    let server = FakeRedis::start(Faults { pause: Some((1_000, pause)), ..Default::default() });
    let report = load(&LoadParameters { connections: 4, ..parameters(&server) });
    assert_clean(&report);
    assert_eq!(report.connections_lost, 0);
    // A busy machine may lengthen it, never shorten it.
    assert!((299.0..800.0).contains(&report.gap_ms), "gap of {} ms", report.gap_ms);
    assert!(report.connection_gap_ms >= report.gap_ms);
    assert!(report.latency.max_us >= 297_000, "{:?}", report.latency);
}

#[test]
fn a_connection_that_owes_answers_for_too_long_is_given_up() {
    let server = FakeRedis::start(Faults { go_silent: Some(500), ..Default::default() });
    let report = load(&LoadParameters { connections: 2, idle_limit_ms: 150, ..parameters(&server) });
    assert_clean(&report);
    assert_eq!(report.connections_lost, 1);
    assert!(report.loss_samples[0].contains("no answer for"), "{:?}", report.loss_samples);
}

#[test]
fn a_refused_request_is_an_error_and_changes_no_expectation() {
    let server = FakeRedis::start(Faults { refuse: Some(700), ..Default::default() });
    let report = load(&LoadParameters { keys_per_connection: 2, ..parameters(&server) });
    assert_clean(&report);
    assert_eq!(report.errors, 1);
    assert_eq!(report.error_samples, ["OOM command not allowed"]);
}

#[test]
fn marks_open_windows_and_stop_ends_the_load() {
    let server = FakeRedis::start(Faults::default());
    let (sender, mut control) = Control::channel();
    let mut marked = Vec::new();
    let parameters = LoadParameters { requests_per_connection: 0, ..parameters(&server) };
    let report = redis::run(&parameters, &mut control, &mut |output| match output {
        Output::Started { .. } => sender.send(Command::InFlight(4)),
        Output::Progress(progress) if marked.is_empty() && progress.ops > 0 => {
            sender.send(Command::Mark("killed".into()));
        }
        Output::Marked { label, t_ms } => {
            marked.push((label, t_ms));
            sender.send(Command::Stop(true));
        }
        _ => {}
    })
    .expect("the load runs");
    assert_clean(&report);
    assert!(!marked.is_empty() && marked.iter().all(|(label, _)| label == "killed"));
    assert_eq!(report.windows.len(), 1 + marked.len());
    assert_eq!(report.windows[1].start_ms, marked[0].1);
    let operations: u64 = report.windows.iter().map(|window| window.operations).sum();
    assert_eq!(operations, report.operations);
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a loopback port is free");
    let address = closed.local_addr().expect("a bound socket has an address");
    drop(closed);
    let (_sender, mut control) = Control::channel();
    let parameters = LoadParameters { address, connect_timeout_ms: 150, ..Default::default() };
    let error = redis::run(&parameters, &mut control, &mut |_| {}).expect_err("nobody listens");
    assert!(matches!(error, LoadError::Connect { connected: 0, wanted: 64, .. }), "{error}");
    let bad = LoadParameters { batch: 65, ..parameters };
    let error = redis::run(&bad, &mut control, &mut |_| {}).expect_err("a batch beyond the pipeline");
    assert_eq!(error.to_string(), "parameter batch is 65; it must be 1 to in_flight");
}

#[test]
fn a_ledger_can_be_verified_later_and_a_dead_server_proves_nothing() {
    let server = FakeRedis::start(Faults::default());
    let path = std::env::temp_dir().join(format!("rig-ledger-{}.json", std::process::id()));
    let report = load(&LoadParameters { ledger_file: Some(path.clone()), ..parameters(&server) });
    assert_clean(&report);
    let verify = |address, timeout_ms| {
        let (_sender, mut control) = Control::channel();
        let job = Job::VerifyRedis(VerifyParameters { address, ledger_file: path.clone(), timeout_ms });
        match job::run(&job, &mut control, &mut |_| {}) {
            Ok(Report::VerifyRedis(verification)) => verification,
            other => panic!("expected a verification, got {other:?}"),
        }
    };
    let again = verify(server.address, 5_000);
    assert_eq!((again.keys_checked, again.acknowledged_writes_lost, again.incomplete), (64, 0, None));
    let empty = FakeRedis::start(Faults::default());
    let lost = verify(empty.address, 5_000);
    assert_eq!(lost.acknowledged_writes_lost, 64, "all 64 keys were written: {lost:?}");
    let address = empty.address;
    drop(empty);
    let nobody = verify(address, 150);
    assert_eq!(nobody.keys_checked, 0);
    assert!(nobody.incomplete.is_some());
    std::fs::remove_file(&path).expect("the ledger was written");
}

fn registers(faults: Faults) -> RegisterReport {
    let server = FakeRedis::start(faults);
    let (_sender, mut control) = Control::channel();
    let parameters = RegisterParameters {
        address: server.address,
        think_ms: 0,
        duration_ms: 250,
        drain_ms: 500,
        ..Default::default()
    };
    register::run(&parameters, &mut control, &mut |_| {}).expect("the registers run")
}

#[test]
fn shared_registers_of_a_faultless_server_are_linearizable() {
    let report = registers(Faults::default());
    assert!(report.linearizable, "{report:?}");
    assert!(report.operations > 100, "{report:?}");
    assert_eq!((report.connections_lost, report.unanswered_writes, report.errors), (0, 0, 0));
}

#[test]
fn a_stale_read_of_a_shared_register_is_a_violation() {
    let report = registers(Faults { stale_from: Some(100), ..Default::default() });
    assert!(!report.linearizable, "{report:?}");
}

#[test]
fn a_register_connection_that_is_dropped_leaves_its_write_open() {
    let report = registers(Faults { close_after: Some(50), ..Default::default() });
    assert!(report.linearizable, "{report:?}");
    assert_eq!(report.connections_lost, 1);
}

#[test]
fn ping_counts_every_answer_of_the_loopback() {
    let (sender, mut control) = Control::channel();
    let parameters =
        PingParameters { address: Ipv4Addr::LOCALHOST, interval_ms: 5, progress_ms: 20, ..Default::default() };
    let result = ping::run(&parameters, &mut control, &mut |output| match output {
        Output::Progress(progress) if progress.ops >= 10 => sender.send(Command::Stop(true)),
        _ => {}
    });
    let report = match result {
        Ok(report) => report,
        Err(ping::PingError::Socket(error)) if !crate::is_root() => {
            eprintln!("not tested: {error}; needs root or net.ipv4.ping_group_range");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    assert!(report.sent >= 10);
    assert_eq!((report.answered, report.lost, report.duplicates), (report.sent, 0, 0));
    assert!(report.gap_ms >= 4.0, "answers come every 5 ms: {report:?}");
}

/// A server that gives one canned answer per connection to whatever is asked.
fn canned<const N: usize>(answers: [&'static [u8]; N]) -> SocketAddr {
    use std::io::{Read, Write};
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a loopback port is free");
    let address = listener.local_addr().expect("a bound socket has an address");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the probe connects");
        for answer in answers {
            let _ = stream.read(&mut [0; 1024]).expect("the probe asks");
            stream.write_all(answer).expect("the probe listens");
        }
    });
    address
}

fn probe(service: Service, address: SocketAddr) -> Result<Report, String> {
    let (_sender, mut control) = Control::channel();
    let job = Job::Probe(ProbeParameters { service, address, timeout_ms: 100 });
    job::run(&job, &mut control, &mut |_| {})
}

#[test]
fn probes_know_a_ready_service_from_a_sick_one() {
    let get = b"VALUE plover:probe 0 5\r\nready\r\nEND\r\n";
    assert!(probe(Service::Memcached, canned([b"STORED\r\n", get])).is_ok());
    assert!(probe(Service::Memcached, canned([b"NOT_STORED\r\n"])).is_err());
    assert!(probe(Service::Http, canned([b"HTTP/1.1 200 OK\r\n\r\nhello"])).is_ok());
    let error = probe(Service::Http, canned([b"HTTP/1.1 502 Bad Gateway\r\n\r\n"])).expect_err("502");
    assert!(error.contains("not ready"), "{error}");
    let server = FakeRedis::start(Faults::default());
    assert!(probe(Service::Redis, server.address).is_ok());
    let before = Instant::now();
    let address = server.address;
    drop(server);
    assert!(probe(Service::Redis, address).is_err());
    assert!(before.elapsed() < Duration::from_secs(5));
}
