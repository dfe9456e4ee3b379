//! The control socket end to end, with a group that answers or does not.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dataplane::wait::Bell;
use proptest::prelude::*;

use super::{ControlServer, GroupHandle, GroupHandles, Request, Response, request};

fn socket(test: &str) -> PathBuf {
    std::env::temp_dir().join(format!("plover-control-{test}-{}.sock", std::process::id()))
}

fn server(test: &str) -> (ControlServer, PathBuf, GroupHandles) {
    let groups: GroupHandles = Arc::new(Mutex::new(BTreeMap::new()));
    let path = socket(test);
    (ControlServer::start(&path, groups.clone()).unwrap(), path, groups)
}

#[test]
fn a_request_reaches_its_group_and_the_answer_comes_back() {
    let (_server, path, groups) = server("answer");
    let (handle, receiver) = GroupHandle::new(Arc::new(Bell::new().unwrap()));
    groups.lock().unwrap().insert("redis".into(), handle);
    let group = std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(5);
        let asked = loop {
            match receiver.try_recv() {
                Ok(asked) => break asked,
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Err(why) => panic!("nobody asked: {why}"),
            }
        };
        asked.reply.send(Response::Done(format!("{:?}", asked.request.vm()))).unwrap();
    });
    let response = request(&path, &Request::Sync { vm: "redis".into() }, Duration::from_secs(5)).unwrap();
    assert!(matches!(response, Response::Done(text) if text.contains("redis")));
    group.join().unwrap();
}

#[test]
fn an_unknown_vm_and_garbage_are_refused_with_a_reason() {
    let (_server, path, _groups) = server("refuse");
    let response = request(&path, &Request::Sync { vm: "nobody".into() }, Duration::from_secs(5)).unwrap();
    assert!(matches!(response, Response::Refused(text) if text.contains("nobody")));
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"{\"command\":\"explode\"}\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("not understood"), "{answer}");
}

#[test]
fn a_path_in_use_is_refused_and_a_stale_one_is_not() {
    let (server, path, groups) = server("in-use");
    let error = ControlServer::start(&path, groups.clone()).expect_err("a daemon listens");
    assert!(error.to_string().contains("another daemon"), "{error}");
    drop(server);
    std::os::unix::net::UnixListener::bind(&path).map(drop).unwrap();
    ControlServer::start(&path, groups).unwrap();
}

proptest! {
    #[test]
    fn any_line_is_parsed_without_a_panic(line in ".*") {
        let _ = serde_json::from_str::<Request>(&line);
    }
}
