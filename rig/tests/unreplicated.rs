//! A VM that nothing protects: a stock QEMU's guest on our device and our uplink, without peers, log and syncvm.

use std::io::{Read, Write};
use std::time::Duration;

use rig::guest::BOOT_LIMIT_SECS;
use rig::{Cluster, ClusterOptions, Deadline, Service, Testbed, program};

/// Requests that must be answered, one after the other.
const REQUESTS: usize = 2_000;
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Lets a guest answer Redis requests with this node configuration, and returns the status that its daemon gave then.
fn answers_redis(node: &str) -> serde_json::Value {
    let bed = Testbed::new().unwrap();
    let programs = program("plover").unwrap().parent().unwrap().to_owned();
    let mut options = ClusterOptions::new(Service::Redis, programs);
    options.unreplicated = true;
    options.node += node;
    let cluster = Cluster::new(&bed, options).unwrap();
    let host = &bed.hosts()[0];
    cluster.start_daemon(host).unwrap();
    cluster.start_qemu(host).unwrap();
    let (client, address) = (bed.client(), cluster.address());
    client
        .wait_for_port(address, Deadline::after_secs(BOOT_LIMIT_SECS))
        .unwrap_or_else(|error| panic!("{}", cluster.explain(error)));
    let mut stream = client.namespace().run(move || std::net::TcpStream::connect(address)).unwrap().unwrap();
    stream.set_read_timeout(Some(ANSWER_LIMIT)).unwrap();
    let mut ask = |request: String, expected: &str| {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = vec![0; expected.len()];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), expected, "to {request:?}");
    };
    for number in 0..REQUESTS {
        ask(format!("SET key {number}\r\n"), "+OK\r\n");
        let text = number.to_string();
        ask("GET key\r\n".into(), &format!("${}\r\n{text}\r\n", text.len()));
    }
    let refused = cluster.ask(host, &["sync", rig::cluster::VM]).expect_err("there is nobody to sync with").to_string();
    assert!(refused.contains("unreplicated"), "{refused}");
    cluster.status(host).expect("the daemon answers")
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn an_unreplicated_guest_serves_and_says_that_it_is_not_protected() {
    let status = answers_redis("");
    assert_eq!((&status["role"], &status["protected"]), (&"unreplicated".into(), &false.into()), "{status}");
    assert!(status["unprotected_reason"].as_str().unwrap().contains("protects nothing"), "{status}");
    for frames in ["frames_in", "frames_out"] {
        assert!(status[frames].as_u64().unwrap() >= 2 * REQUESTS as u64, "{status}");
    }
    let reactor = &status["reactor"];
    assert!(reactor["idle"].as_str().unwrap().contains("adaptive"), "two cores are never spun on: {reactor}");
    assert!(reactor["asleep_us"].as_u64().unwrap() > 0, "{reactor}");
    println!("{reactor}");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_reactor_that_spins_serves_too_and_never_sleeps() {
    let status = answers_redis("idle = \"spin\"\n");
    let reactor = &status["reactor"];
    assert!(reactor["idle"].as_str().unwrap().starts_with("spin"), "{reactor}");
    assert_eq!(reactor["asleep_us"], 0, "{reactor}");
    println!("{reactor}");
}
