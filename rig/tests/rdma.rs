//! The fabric over RDMA, in guests with soft-RoCE (rig/src/rdma_guest.rs).

use std::net::Ipv4Addr;

use rig::device_guest::DeviceGuest;
use rig::{Deadline, Testbed, rdma_guest};

/// Under TCG on a busy machine.
const LIMIT_SECS: u64 = 300;

fn ip(guest: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 50 + guest)
}

/// Boots a guest by itself, waits and expects success.
fn run_alone(words: &[&str]) -> String {
    let bed = Testbed::new().unwrap();
    let guest = rdma_guest::boot(bed.host(0), words[0], ip(1), "", words).unwrap();
    let outcome = guest.wait(Deadline::after_secs(LIMIT_SECS)).unwrap();
    assert_eq!(outcome.status, Some(0), "{} ended with this on its console:\n{}", words[0], outcome.console);
    assert!(outcome.console.contains(&format!("PLOVER-RDMA-OK {}", words[0])), "{}", outcome.console);
    outcome.console
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn the_lane_does_what_it_says_and_survives_faults() {
    let console = run_alone(&["selftest", &ip(1).to_string()]);
    println!("{console}");
    // Round trips are measured in the end, for perf.
    assert_eq!(
        console.lines().filter(|line| line.starts_with('{') && line.contains("bare_us")).count(),
        3,
        "{console}"
    );
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn the_fabric_keeps_what_every_transport_must() {
    println!("{}", run_alone(&["conformance", &ip(1).to_string()]));
}

/// Boots guest `number` on the host of that number, counted from 1.
fn boot(bed: &Testbed, number: u8, name: &str, loss: &str, words: &[&str]) -> DeviceGuest {
    rdma_guest::boot(bed.host(usize::from(number) - 1), name, ip(number), loss, words).unwrap()
}

/// Expects success.
fn finish(guest: &DeviceGuest, name: &str) -> String {
    let outcome = guest.wait(Deadline::after_secs(LIMIT_SECS)).unwrap();
    assert_eq!(outcome.status, Some(0), "{name} ended with this on its console:\n{}", outcome.console);
    outcome.console
}

fn await_line(guest: &DeviceGuest, line: &str) {
    let said = || guest.console().lines().any(|other| other == line).then_some(());
    guest.wait_for(&format!("«{line}»"), Deadline::after_secs(LIMIT_SECS), said).unwrap();
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn two_guests_exchange_messages_and_meet_again_after_a_power_cut() {
    const COUNT: &str = "100";
    let bed = Testbed::new().unwrap();
    let [one, two] = [1, 2].map(|guest| ip(guest).to_string());
    let stays = boot(&bed, 1, "stays", "", &["pair", "0", &one, &two, COUNT]);
    let dies = boot(&bed, 2, "dies", "", &["pair", "1", &one, &two, COUNT]);
    await_line(&stays, "received 40");
    dies.cut_power().unwrap();
    let comes = boot(&bed, 2, "comes", "", &["pair", "1", &one, &two, COUNT]);
    let consoles = [finish(&stays, "stays"), finish(&comes, "comes")];
    println!("{}\n{}", consoles[0], consoles[1]);
    assert!(consoles[0].contains("exchanged 100 over connection 2"), "{}", consoles[0]);
    assert!(consoles[1].contains("exchanged 100 over connection 1"), "{}", consoles[1]);
}

/// Frames get lost on the way out of one of the guests; RDMA's retransmission, or a new connection, makes up for it.
#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn messages_arrive_whole_though_frames_get_lost() {
    const COUNT: &str = "60";
    let bed = Testbed::new().unwrap();
    let [one, two] = [1, 2].map(|guest| ip(guest).to_string());
    let clean = boot(&bed, 1, "clean", "", &["pair", "0", &one, &two, COUNT]);
    let lossy = boot(&bed, 2, "lossy", "loss,2%,delay,1ms", &["pair", "1", &one, &two, COUNT]);
    println!("{}", finish(&clean, "clean"));
    let console = finish(&lossy, "lossy");
    println!("{console}");
    let dropped = console.split_once("(dropped ").and_then(|(_, rest)| rest.split(',').next()?.parse::<u64>().ok());
    assert!(dropped.is_some_and(|dropped| dropped > 0), "netem dropped {dropped:?} frames");
}

/// The leader loses its power; the other two go on, and all that it acknowledged is there.
#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn two_of_three_replicas_go_on_and_nothing_acknowledged_is_lost() {
    let bed = Testbed::new().unwrap();
    let addresses = [1, 2, 3].map(|guest| ip(guest).to_string());
    let [one, two, three] = addresses.each_ref().map(String::as_str);
    let replica = |number: u8| {
        let me = (number - 1).to_string();
        boot(&bed, number, &format!("replica{me}"), "", &["replica", &me, one, two, three])
    };
    let [leader, secondary, witness] = [1, 2, 3].map(replica);
    await_line(&leader, "acked 50");
    leader.cut_power().unwrap();
    let last = acknowledged(&leader.console()).expect("it acknowledged 50");
    let mut told = Vec::new();
    for (guest, name) in [(&secondary, "the secondary"), (&witness, "the witness")] {
        let console = finish(guest, name);
        println!("{name}:\n{console}");
        let ranges: Vec<String> = console.lines().filter(|line| line.starts_with("by ")).map(str::to_owned).collect();
        let through = ranges[0].strip_prefix("by 0: 1 to ").and_then(|number| number.parse::<u64>().ok());
        let through = through.expect("the first numbers are the leader's");
        assert!(through >= last, "{name} lacks some of the {last} acknowledged numbers: {ranges:?}");
        assert!(ranges[1].starts_with(&format!("by 1: {} to ", through + 1)), "{name}: {ranges:?}");
        told.push(ranges[0].clone());
    }
    assert_eq!(told[0], told[1], "both have the same");
}

/// The last number of the «acked N» lines; a last line without its end is not one.
fn acknowledged(console: &str) -> Option<u64> {
    let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(|line| line.strip_prefix("acked ")?.parse().ok()).max()
}
