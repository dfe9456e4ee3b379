//! The client against a scripted monitor.

use super::*;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}"#;

struct Script {
    path: PathBuf,
    server: Option<JoinHandle<()>>,
}

impl Script {
    /// A monitor that greets, accepts capabilities, and then runs `rest` with a reader and writer.
    fn new(name: &str, rest: impl FnOnce(BufReader<UnixStream>, UnixStream) + Send + 'static) -> Script {
        let path = std::env::temp_dir().join(format!("plover-qmp-{name}-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("bind");
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut reader = BufReader::new(stream.try_clone().expect("clone"));
            writeln!(stream, "{GREETING}").expect("greet");
            assert_eq!(request(&mut reader)["execute"], "qmp_capabilities");
            writeln!(stream, r#"{{"return": {{}}, "id": 1}}"#).expect("answer");
            rest(reader, stream);
        });
        Script { path, server: Some(server) }
    }

    fn connect(&self) -> Qmp {
        Qmp::connect(&self.path, Instant::now() + Duration::from_secs(10)).expect("connect")
    }

    fn finish(mut self) {
        self.server.take().expect("once").join().expect("the script went through");
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn request(reader: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    reader.read_line(&mut line).expect("a request");
    serde_json::from_str(&line).expect("JSON")
}

#[test]
fn events_between_request_and_answer_are_kept_in_order() {
    let script = Script::new("events", |mut reader, mut stream| {
        let asked = request(&mut reader);
        assert_eq!(asked["execute"], "stop");
        assert!(asked.get("arguments").is_none());
        writeln!(stream, r#"{{"event": "STOP"}}"#).expect("write");
        writeln!(stream, r#"{{"return": {{}}, "id": {}}}"#, asked["id"]).expect("write");
        writeln!(stream, r#"{{"event": "SHUTDOWN", "data": {{"guest": true, "reason": "guest-shutdown"}}}}"#)
            .expect("write");
        // Kept open until the client is done.
        assert_eq!(reader.read_line(&mut String::new()).expect("end"), 0);
    });
    let mut qmp = script.connect();
    assert_eq!(qmp.version().major, 10);
    assert_eq!(qmp.peer_pid().expect("pid"), std::process::id() as i32);
    qmp.stop().expect("stop");
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut events = qmp.take_events();
    while events.len() < 2 {
        assert!(crate::qemu::wait_for(qmp.poll_fd(), PollFlags::IN, deadline).expect("poll"), "no second event");
        qmp.poll_events().expect("events");
        events.extend(qmp.take_events());
    }
    assert_eq!(events[0].kind, EventKind::Stop);
    assert_eq!(events[1].kind, EventKind::Shutdown { guest: true, reason: "guest-shutdown".into() });
    assert!(qmp.take_events().is_empty());
    drop(qmp);
    script.finish();
}

/// What it said last counts, also if it read nothing more of what it was asked.
#[test]
fn a_qemu_that_ends_is_heard_out() {
    for asked_meanwhile in [false, true] {
        let script = Script::new(&format!("end-{asked_meanwhile}"), move |reader, mut stream| {
            writeln!(stream, r#"{{"event": "SHUTDOWN", "data": {{"guest": true, "reason": "guest-shutdown"}}}}"#)
                .expect("write");
            if asked_meanwhile {
                // A command that lies there unread when the socket is closed: the client's end is reset.
                let peeked = rustix::net::recv(&stream, &mut [0; 1], rustix::net::RecvFlags::PEEK);
                assert_eq!(peeked.expect("a command").1, 1);
            }
            drop((reader, stream));
        });
        let mut qmp = script.connect();
        if asked_meanwhile {
            let error = qmp.stop().expect_err("no answer");
            assert!(error.is_disconnected(), "{error}");
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut events = Vec::new();
        // The end may be seen only with the look after the one that brings the event.
        let error = loop {
            assert!(crate::qemu::wait_for(qmp.poll_fd(), PollFlags::IN, deadline).expect("poll"), "no end");
            let polled = qmp.poll_events();
            events.extend(qmp.take_events());
            if let Err(error) = polled {
                break error;
            }
        };
        assert!(matches!(error, QmpError::Closed { .. }), "{error}");
        let off = EventKind::Shutdown { guest: true, reason: "guest-shutdown".into() };
        assert!(events.iter().any(|event| event.kind == off), "asked meanwhile: {asked_meanwhile}: {events:?}");
        script.finish();
    }
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_commands() {
    let script = Script::new("late", |mut reader, mut stream| {
        let first = request(&mut reader);
        let second = request(&mut reader);
        writeln!(stream, r#"{{"return": {{"status": "paused"}}, "id": {}}}"#, first["id"]).expect("write");
        writeln!(stream, r#"{{"return": {{"status": "running"}}, "id": {}}}"#, second["id"]).expect("write");
    });
    let mut qmp = script.connect();
    let error = qmp.execute_within("query-status", Value::Null, Duration::from_millis(20)).expect_err("no answer");
    assert!(error.is_timeout() && !error.is_disconnected() && !error.is_command_error(), "{error}");
    assert_eq!(qmp.query_status().expect("the second answer"), RunState::Running);
    script.finish();
}

#[test]
fn refusals_and_ends_are_told_apart() {
    let script = Script::new("refusal", |mut reader, mut stream| {
        let asked = request(&mut reader);
        assert_eq!(asked["arguments"]["filename"], "/f");
        let class = "CommandNotFound";
        writeln!(stream, r#"{{"id": {}, "error": {{"class": "{class}", "desc": "not found"}}}}"#, asked["id"])
            .expect("write");
    });
    let mut qmp = script.connect();
    let error = qmp.load_devices_state(Path::new("/f")).expect_err("refused");
    assert!(error.is_command_error() && error.is_unknown_command(), "{error}");
    assert!(error.to_string().contains("xen-load-devices-state"), "{error}");
    let error = qmp.stop().expect_err("the script ended");
    assert!(error.is_disconnected(), "{error}");
    script.finish();
}

#[test]
fn an_answer_of_another_form_names_the_command() {
    let script = Script::new("form", |mut reader, mut stream| {
        let asked = request(&mut reader);
        writeln!(stream, r#"{{"return": 5, "id": {}}}"#, asked["id"]).expect("write");
    });
    let error = script.connect().query_status().expect_err("5 is no status");
    assert!(matches!(error, QmpError::Answer { .. }) && error.to_string().contains("query-status"), "{error}");
    script.finish();
}

#[test]
fn what_is_not_qmp_is_a_lost_connection() {
    let script = Script::new("garbage", |mut reader, mut stream| {
        request(&mut reader);
        writeln!(stream, "HTTP/1.1 400 Bad Request").expect("write");
    });
    let error = script.connect().stop().expect_err("garbage");
    assert!(error.is_disconnected(), "{error}");
    script.finish();
}

#[test]
fn nobody_there_names_socket_and_remedy() {
    let error = Qmp::connect(Path::new("/nonexistent/qmp.sock"), Instant::now()).err().expect("nobody");
    assert!(error.is_disconnected());
    assert!(error.to_string().contains("/nonexistent/qmp.sock") && error.to_string().contains("-qmp"), "{error}");
}
