//! `rig-client` as a process: commands in, progress and report out, and an end of its own when its parent goes.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rig::Deadline;
use rig::client::control::{EXIT_DEADLINE, EXIT_ORPHAN};
use rig::client::protocol::{Job, LoadParameters, Report};
use rig::client::{ClientError, ClientProcess};

use fake_redis::{FakeRedis, Faults};

#[path = "../src/client/fake_redis.rs"]
mod fake_redis;

const LIMIT: Duration = Duration::from_secs(20);

fn spawn(job: &Job) -> Child {
    Command::new(env!("CARGO_BIN_EXE_rig-client"))
        .args(job.arguments())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the client starts")
}

fn load(server: &FakeRedis) -> LoadParameters {
    LoadParameters {
        address: server.address,
        connections: 2,
        in_flight: 8,
        progress_ms: 10,
        ..LoadParameters::default()
    }
}

/// The exit status, within the limit; the client is killed if it does not end.
fn status(child: &mut Child) -> Option<i32> {
    let deadline = Instant::now() + LIMIT;
    let pid = rustix::process::Pid::from_child(child);
    let ended =
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).expect("the client is not reaped yet");
    let mut fds = [rustix::event::PollFd::new(&ended, rustix::event::PollFlags::IN)];
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = rustix::event::Timespec { tv_sec: left.as_secs() as i64, tv_nsec: 0 };
    if rustix::event::poll(&mut fds, Some(&timeout)).expect("a pidfd can be polled") == 0 {
        child.kill().expect("the client is our child");
    }
    child.wait().expect("the client is our child").code()
}

#[test]
fn a_load_is_marked_stopped_and_reported() {
    let server = FakeRedis::start(Faults { forget_set: Some(3), ..Faults::default() });
    // One connection: its seed alone decides that the forgotten write is read before it is overwritten.
    let job = Job::RedisLoad(LoadParameters { connections: 1, get_percent: 90, ..load(&server) });
    let mut child = spawn(&job);
    let mut client = ClientProcess::from_child(&mut child);
    client.wait_started(LIMIT).expect("it connects");
    client.wait_progress(LIMIT, |progress| progress.acknowledged_writes > 1_000).expect("it works");
    client.mark("killed").expect("it listens");
    let at_ms = client.wait_marked("killed", LIMIT).expect("it confirms");
    client.set_in_flight(1).expect("it listens");
    client.stop().expect("it listens");
    let Report::RedisLoad(report) = client.report(LIMIT).expect("it reports") else {
        panic!("a load reports a load");
    };
    assert_eq!(status(&mut child), Some(0));
    assert_eq!(report.windows[1].label, "killed");
    assert_eq!(report.windows[1].start_ms, at_ms);
    assert_eq!(report.acknowledged_writes_lost, 1, "{report:?}");
    assert_eq!(report.connections_lost, 0);
    assert!(matches!(client.wait_progress(LIMIT, |_| false), Err(ClientError::Gone)));
}

#[test]
fn a_client_that_cannot_work_says_why() {
    let server = FakeRedis::start(Faults::default());
    let address = server.address;
    let job = Job::RedisLoad(LoadParameters { connect_timeout_ms: 50, ..load(&server) });
    drop(server);
    let mut child = spawn(&job);
    let client = ClientProcess::from_child(&mut child);
    let error = client.report(LIMIT).expect_err("nobody listens there");
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    assert_eq!(status(&mut child), Some(1));
}

#[test]
fn wrong_arguments_are_refused() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rig-client"))
        .args(["redis-load", r#"{"conections": 1}"#])
        .stderr(Stdio::null())
        .spawn()
        .expect("the client starts");
    assert_eq!(status(&mut child), Some(2));
}

#[test]
fn a_client_ends_with_its_parent() {
    let server = FakeRedis::start(Faults::default());
    let mut child = spawn(&Job::RedisLoad(load(&server)));
    let client = ClientProcess::from_child(&mut child);
    client.wait_started(LIMIT).expect("it connects");
    // Closes stdin, as the death of the parent would.
    drop(client);
    assert_eq!(status(&mut child), Some(EXIT_ORPHAN));
}

#[test]
fn a_client_stops_at_its_deadline_by_itself() {
    let server = FakeRedis::start(Faults::default());
    let mut child = spawn(&Job::RedisLoad(LoadParameters { deadline_ms: 150, ..load(&server) }));
    let client = ClientProcess::from_child(&mut child);
    let report = client.report(LIMIT).expect("it reports what it has");
    assert!(matches!(report, Report::RedisLoad(load) if load.operations > 0));
    let status = status(&mut child);
    assert_eq!(status, Some(0), "{EXIT_DEADLINE} would mean that it had to be forced");
}

#[test]
fn a_parent_that_does_not_read_does_not_stop_the_client() {
    let ledger = std::env::temp_dir().join(format!("rig-client-process-{}.json", std::process::id()));
    let server = FakeRedis::start(Faults::default());
    let mut child = spawn(&Job::RedisLoad(LoadParameters {
        duration_ms: 1_500,
        ledger_file: Some(ledger.clone()),
        ..load(&server)
    }));
    let stdout = child.stdout.take().expect("piped");
    // Some twenty lines fill a pipe of one page, 64 more the client's queue: both are full after 0.9 s of 1.5 s.
    rustix::pipe::fcntl_setpipe_size(&stdout, 4096).expect("a pipe can be shrunk");
    let stdin = child.stdin.take().expect("piped");
    // The client writes its ledger after the load: the one sign of its end that needs no pipe.
    rig::wait_until(Deadline::after(LIMIT), "the ledger", || ledger.exists().then_some(())).expect("the load ends");
    let client = ClientProcess::new(stdin, stdout);
    let Report::RedisLoad(report) = client.report(LIMIT).expect("it reports") else {
        panic!("a load reports a load");
    };
    std::fs::remove_file(&ledger).expect("it was there a moment ago");
    assert!(report.gap_ms < 500.0, "the client stood still for {} ms", report.gap_ms);
    assert_eq!(status(&mut child), Some(0));
}
