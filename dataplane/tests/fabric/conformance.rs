//! The conformance suite over the transports that every machine has.

use dataplane::fabric::conformance::{CASES, Loopback, run_child};
use dataplane::fabric::{Security, Transport};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// This program again, as the child of a case.
fn child() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "conformance::the_child_of_a_case", "--ignored", "--nocapture"]);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
#[ignore = "not a test: the child of «kill -9 inside a message», which starts it"]
fn the_child_of_a_case() {
    run_child();
}

fn run(name: &str, mut bed: Loopback) {
    let (_, case) = CASES.iter().find(|(known, _)| *known == name).expect("a case with that name");
    case(&mut bed);
}

macro_rules! suite {
    ($($test:ident: $name:literal,)+) => {
        mod tcp_insecure {
            $(#[test] fn $test() {
                super::run($name, super::Loopback::new(super::LOOPBACK, super::Transport::Tcp, super::Security::Insecure, Some(super::child)));
            })+
        }

        mod tcp_encrypted {
            $(#[test] fn $test() {
                super::run($name, super::Loopback::encrypted(super::LOOPBACK, super::Transport::Tcp, Some(super::child)));
            })+
        }

        mod shm {
            $(#[test] fn $test() {
                super::run($name, super::Loopback::encrypted(super::LOOPBACK, super::Transport::Shm, Some(super::child)));
            })+
        }

        #[test]
        fn the_suite_is_whole() {
            assert_eq!(CASES.iter().map(|(name, _)| *name).collect::<Vec<_>>(), [$($name),+]);
        }
    };
}

suite! {
    order_and_completeness: "order and completeness",
    back_pressure: "back-pressure",
    wake_ups: "wake-ups of a receiver that sleeps",
    wake_ups_for_room: "wake-ups of a sender without room",
    death_of_the_acceptor: "death of the accepting side at any point",
    death_of_the_dialer: "death of the dialing side at any point",
    kill: "kill -9 inside a message",
    reconnect: "reconnect after a disconnect",
    silence: "silence",
    bulk_messages: "bulk messages of all sizes",
    bulk_deadlines: "bulk deadlines and cancellation",
    bulk_death: "bulk death of either side",
}
