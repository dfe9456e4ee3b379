//! The test bed itself: what it makes works, goes away again, and its faults do what they say.
//!
//! These need root and what `cargo xtask setup` makes, so the fast run leaves them out (`#[ignore]`);
//! `cargo xtask test` runs them, one at a time.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rig::fault::Cut;
use rig::{Deadline, Guest, Host, Service, Spawn, Testbed, wait_until};

const PORT: u16 = 4077;
/// Long enough for an answer on an idle machine, short enough to wait for one that must not come.
const ANSWER: Duration = Duration::from_millis(250);

/// Answers every datagram that reaches it with the same bytes, until the test bed goes.
fn start_echo(host: &Host) {
    let address = SocketAddr::from((host.ip(), PORT));
    let socket = host.namespace().run(move || UdpSocket::bind(address)).unwrap().unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut bytes) {
            if &bytes[..length] == b"end" || socket.send_to(&bytes[..length], from).is_err() {
                return;
            }
        }
    });
}

struct Pinger {
    socket: UdpSocket,
    sent: u32,
}

impl Pinger {
    fn new(from: &Host) -> Self {
        let address = SocketAddr::from((from.ip(), 0));
        let socket = from.namespace().run(move || UdpSocket::bind(address)).unwrap().unwrap();
        socket.set_read_timeout(Some(ANSWER)).unwrap();
        Self { socket, sent: 0 }
    }

    /// One question, one answer; late answers to earlier questions do not count.
    fn reaches(&mut self, to: &Host) -> bool {
        self.sent += 1;
        let question = self.sent.to_be_bytes();
        // A cut link may well refuse the send.
        drop(self.socket.send_to(&question, (to.ip(), PORT)));
        let mut answer = [0; 64];
        loop {
            match self.socket.recv(&mut answer) {
                Ok(length) if answer[..length] == question => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }
}

fn namespaces_of(id: &str) -> usize {
    let names = std::fs::read_dir("/run/netns").into_iter().flatten().flatten().map(|entry| entry.file_name());
    names.filter(|name| name.to_str().is_some_and(|name| name.contains(id))).count()
}

fn sleeper() -> Command {
    let mut command = Command::new("sleep");
    command.arg("1000");
    command
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn everything_is_removed_when_the_test_bed_is_dropped() {
    let bed = Testbed::new().unwrap();
    let (id, directory) = (bed.id(), bed.directory());
    let sockets = bed.host(0).socket_directory().to_owned();
    let process = bed.host(1).start(Spawn::new("sleep", sleeper()).restart_after(Duration::ZERO)).unwrap();
    let disk = bed.host(2).mount_data_disk(1).unwrap();
    let pid = process.pid();
    assert_eq!(namespaces_of(&id), 5);
    drop(bed);
    assert_eq!(namespaces_of(&id), 0);
    assert!(!process.is_running() && !Path::new(&format!("/proc/{pid}")).exists(), "{pid} still runs");
    assert!(!directory.exists() && !sockets.exists() && !disk.path().exists());
    assert!(!std::fs::read_to_string("/proc/mounts").unwrap().contains(&id));
}

/// Not a test of its own: the owner that the next test kills. It prints what it made and waits.
#[test]
#[ignore = "e2e: helper of an_owner_that_is_killed_leaves_nothing_behind"]
fn helper_owner() {
    if std::env::var_os("PLOVER_RIG_TEST_OWNER").is_none() {
        return;
    }
    let bed = Testbed::new().unwrap();
    bed.host(0).mount_data_disk(1).unwrap();
    // One that survives its parent's death: a grandchild.
    let mut nested = Command::new("sh");
    nested.args(["-c", "trap '' TERM; sleep 1000 & wait"]);
    bed.host(0).spawn("nested", nested).unwrap();
    println!("\nmade {} {}", bed.id(), bed.directory().display());
    std::io::stdout().flush().unwrap();
    std::io::stdin().read_exact(&mut [0]).unwrap_or_default();
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn an_owner_that_is_killed_leaves_nothing_behind() {
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "helper_owner"])
        .env("PLOVER_RIG_TEST_OWNER", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(owner.stdout.take().unwrap()).lines();
    let made = lines.find_map(|line| line.unwrap().strip_prefix("made ").map(str::to_owned)).unwrap();
    let (id, directory) = made.split_once(' ').unwrap();
    assert_eq!(namespaces_of(id), 5);
    owner.kill().unwrap();
    owner.wait().unwrap();
    wait_until(Deadline::after_secs(20), "the janitor to clean up", || {
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let gone = namespaces_of(id) == 0 && !Path::new(directory).exists() && !mounts.contains(id);
        gone.then_some(())
    })
    .unwrap();
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn two_test_beds_do_not_disturb_each_other() {
    let (one, two) = (Testbed::new().unwrap(), Testbed::new().unwrap());
    start_echo(one.host(0));
    assert!(Pinger::new(one.client()).reaches(one.host(0)));
    assert!(!Pinger::new(two.client()).reaches(two.host(0)), "the same address, but another network");
    let id = one.id();
    drop(two);
    assert_eq!(namespaces_of(&id), 5);
    assert!(Pinger::new(one.client()).reaches(one.host(0)));
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_cut_link_is_silent_or_loses_the_carrier() {
    let bed = Testbed::new().unwrap();
    bed.hosts().iter().for_each(start_echo);
    let mut pinger = Pinger::new(bed.client());
    let carrier = || bed.host(0).output("ip", &["-o", "link", "show", "eth0"]).unwrap().contains("LOWER_UP");
    assert!(pinger.reaches(bed.host(0)));

    let silent = bed.host(0).cut_link(Cut::Silent).unwrap();
    assert!(!pinger.reaches(bed.host(0)) && carrier());
    assert!(pinger.reaches(bed.host(1)), "the others are not affected");

    let pulled = bed.host(0).cut_link(Cut::CarrierLoss).unwrap();
    assert!(!carrier());
    pulled.undo().unwrap();
    assert!(carrier() && !pinger.reaches(bed.host(0)), "the silent cut is still on");

    drop(silent);
    assert!(pinger.reaches(bed.host(0)));
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_one_way_partition_works_in_one_direction() {
    let bed = Testbed::new().unwrap();
    let (one, two, third) = (bed.host(0), bed.host(1), bed.host(2));
    bed.hosts().iter().for_each(start_echo);
    let bind = |host: &Host| {
        let address = SocketAddr::from((host.ip(), 5000));
        let socket = host.namespace().run(move || UdpSocket::bind(address)).unwrap().unwrap();
        socket.set_read_timeout(Some(ANSWER)).unwrap();
        socket
    };
    let (at_one, at_two) = (bind(one), bind(two));
    let fault = one.drop_from(two).unwrap();
    at_one.send_to(b"there", (two.ip(), 5000)).unwrap();
    at_two.send_to(b"back", (one.ip(), 5000)).unwrap();
    assert!(at_two.recv(&mut [0; 8]).is_ok(), "h1 to h2 works");
    assert!(at_one.recv(&mut [0; 8]).is_err(), "h2 to h1 does not");
    assert!(Pinger::new(third).reaches(one) && Pinger::new(third).reaches(two));
    fault.undo().unwrap();
    at_two.send_to(b"back", (one.ip(), 5000)).unwrap();
    assert!(at_one.recv(&mut [0; 8]).is_ok());

    let pair = one.partition_from(two).unwrap();
    assert!(!Pinger::new(one).reaches(two) && !Pinger::new(two).reaches(one));
    assert!(Pinger::new(one).reaches(third));
    drop(pair);
    assert!(Pinger::new(one).reaches(two));
}

/// Sends that many bytes from one host to another and says how long it took.
fn transfer(from: &Host, to: &Host, bytes: usize) -> Duration {
    let address = SocketAddr::from((to.ip(), PORT));
    let listener = to.namespace().run(move || TcpListener::bind(address)).unwrap().unwrap();
    let start = std::time::Instant::now();
    let mut stream = from.namespace().run(move || TcpStream::connect(address)).unwrap().unwrap();
    let sender = std::thread::spawn(move || stream.write_all(&vec![7; bytes]).unwrap());
    let received = std::io::copy(&mut listener.accept().unwrap().0, &mut std::io::sink()).unwrap();
    sender.join().unwrap();
    assert_eq!(received, bytes as u64);
    start.elapsed()
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_slow_link_is_slow_in_both_directions_until_undone() {
    const BYTES: usize = 2 << 20;
    let bed = Testbed::new().unwrap();
    let (one, two) = (bed.host(0), bed.host(1));
    let fault = one.slow_link(20, 50).unwrap();
    assert!(one.slow_link(20, 50).is_err(), "only one rate at a time");
    // 2 MiB at 20 Mbit/s take 0.84 s, less what the bucket holds.
    assert!(transfer(one, two, BYTES) > Duration::from_millis(600));
    assert!(transfer(two, one, BYTES) > Duration::from_millis(600));
    fault.undo().unwrap();
    assert!(transfer(one, two, BYTES) < Duration::from_millis(400));
    one.slow_link(20, 50).unwrap().undo().unwrap();
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_full_disk_has_room_again_when_undone() {
    let bed = Testbed::new().unwrap();
    let disk = bed.host(0).mount_data_disk(8).unwrap();
    let write = || std::fs::write(disk.path().join("log"), [7; 8192]);
    write().unwrap();
    let fault = disk.fill().unwrap();
    let error = std::fs::write(disk.path().join("more"), [7; 8192]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
    fault.undo().unwrap();
    write().unwrap();
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn supervised_processes_restart_except_while_a_fault_is_on() {
    let bed = Testbed::new().unwrap();
    let host = bed.host(0);
    let service = host.start(Spawn::new("service", sleeper()).restart_after(Duration::from_millis(20))).unwrap();
    let alone = host.spawn("alone", sleeper()).unwrap();
    service.kill().unwrap();
    service.wait_started(2, Deadline::after_secs(5)).unwrap();

    let dead = host.crash().unwrap();
    assert!(!service.is_running() && !alone.is_running());
    let starts = service.starts();
    assert!(service.wait_started(starts + 1, Deadline::after(ANSWER)).is_err(), "no restart on a dead host");
    dead.undo().unwrap();
    service.wait_started(starts + 1, Deadline::after_secs(5)).unwrap();
    assert!(!alone.is_running());

    service.finish().unwrap();
    assert!(service.wait_exit(Deadline::after_secs(5)).is_ok());
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_frozen_process_does_nothing_until_thawed() {
    let bed = Testbed::new().unwrap();
    let mut ticker = Command::new("sh");
    ticker.args(["-c", "n=0; while :; do n=$((n + 1)); echo tick $n; sleep 0.01; done"]);
    let ticker = bed.host(0).spawn("ticker", ticker).unwrap();
    ticker.wait_for_line("tick 3", Deadline::after_secs(5)).unwrap();
    let frozen = bed.host(0).freeze().unwrap();
    let state = || std::fs::read_to_string(format!("/proc/{}/stat", ticker.pid())).unwrap();
    wait_until(Deadline::after_secs(5), "the stop", || state().contains(") T ").then_some(())).unwrap();
    let before = ticker.log().lines().count();
    let more = |_: ()| ticker.log().lines().count() > before;
    let ticked = wait_until(Deadline::after(ANSWER), "a tick", || more(()).then_some(()));
    assert!(ticked.is_err(), "it ticked while frozen");
    drop(frozen);
    wait_until(Deadline::after_secs(5), "a tick", || more(()).then_some(())).unwrap();
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn waiting_for_a_process_that_ended_fails_at_once_and_shows_its_log() {
    let bed = Testbed::new().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "echo cannot find the moon >&2; exit 3"]);
    let process = bed.host(0).spawn("astronomer", command).unwrap();
    let error = process.wait_for_line("found", Deadline::after_secs(60)).unwrap_err().to_string();
    assert!(error.contains("cannot find the moon") && error.contains("astronomer"), "{error}");
}

fn ask(bed: &Testbed, guest: &Guest, question: &'static [u8]) -> String {
    let address = SocketAddr::from((guest.ip, guest.service.port()));
    let mut stream = bed.client().namespace().run(move || TcpStream::connect(address)).unwrap().unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(question).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn every_guest_boots_and_answers() {
    let bed = Testbed::new().unwrap();
    let racey = Service::Racey { threads: 4, rounds: 3 };
    let questions: [(Service, &[u8], &str); 4] = [
        (Service::Redis, b"PING\r\n", "+PONG"),
        (Service::Memcached, b"version\r\n", "VERSION"),
        (Service::Nginx, b"GET / HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK"),
        (racey, b"status\n", "rounds "),
    ];
    for (service, question, answer) in questions {
        let guest = Guest::new(service);
        let qemu = guest.boot_plain(bed.host(0), &[]).unwrap();
        let address = SocketAddr::from((guest.ip, service.port()));
        bed.client().wait_for_port(address, Deadline::after_secs(5)).unwrap();
        let said = ask(&bed, &guest, question);
        assert!(said.starts_with(answer), "{service:?} said «{said}»");
        if service == racey {
            wait_until(Deadline::after_secs(30), "three rounds", || {
                ask(&bed, &guest, b"status\n").starts_with("rounds 3 bytes 51 ").then_some(())
            })
            .unwrap();
        }
        assert_eq!(bed.host(0).kill_program("qemu-system-x86").unwrap(), 1);
        qemu.wait_exit(Deadline::after_secs(5)).unwrap();
    }
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_ready_guest_is_silent_and_takes_a_jump_of_its_clock() {
    let bed = Testbed::new().unwrap();
    let host = bed.host(0);
    let guest = Guest::new(Service::Redis);
    let qemu = guest.boot_plain(host, &[]).unwrap();
    let traffic = || host.output("ip", &["-s", "-o", "link", "show", "tap0"]).unwrap();
    let before = traffic();
    assert!(before.contains("RX:"), "{before}");
    let frame = wait_until(Deadline::after_secs(2), "a frame", || (traffic() != before).then_some(()));
    assert!(frame.is_err(), "the guest sent something by itself:\n{before}\n{}", traffic());

    assert_eq!(ask(&bed, &guest, b"PING\r\n"), "+PONG");
    let console = host.directory().join("console-tap0.log");
    let said_before = std::fs::read_to_string(&console).unwrap();
    let frozen = qemu.frozen().unwrap();
    let answer = wait_until(Deadline::after_secs(3), "an end", || (!qemu.is_running()).then_some(()));
    assert!(answer.is_err(), "QEMU ended while frozen");
    frozen.undo().unwrap();
    assert_eq!(ask(&bed, &guest, b"PING\r\n"), "+PONG");
    assert_eq!(std::fs::read_to_string(&console).unwrap(), said_before, "the kernel complained");
}
