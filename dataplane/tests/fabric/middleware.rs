//! Fabrics around fabrics: what they do, and that the contract holds all the same.

use dataplane::fabric::conformance::{Bed, CASES, End, Loopback, drive};
use dataplane::fabric::middleware::{DelayConfig, Delayed, FaultConfig, Faulty, Recorder};
use dataplane::fabric::{Fabric, FabricConfig, FabricEvent, LostReason, PeerId, SendError, Transport};
use dataplane::wait::now_us;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn quick() -> FabricConfig {
    FabricConfig { retry_us: 1_000, ..FabricConfig::default() }
}

/// A connected pair over shared memory, with something around the left end.
fn pair(wrap: impl FnOnce(Box<dyn Fabric>) -> Box<dyn Fabric>) -> (End, End) {
    let mut bed = Loopback::encrypted(LOOPBACK, Transport::Shm, None);
    let mut left = bed.end(0, &quick()).wrap(wrap);
    let mut right = bed.end(1, &quick());
    drive(&mut left, &mut right, |left, right| !left.connected.is_empty() && !right.connected.is_empty());
    (left, right)
}

/// A bed whose ends all have the same around them.
struct Wrapped(Loopback, fn(Box<dyn Fabric>) -> Box<dyn Fabric>);

impl Bed for Wrapped {
    fn end(&mut self, me: u8, config: &FabricConfig) -> End {
        self.0.end(me, config).wrap(self.1)
    }

    fn child(&mut self) -> Option<Child> {
        None
    }
}

fn stacked(fabric: Box<dyn Fabric>) -> Box<dyn Fabric> {
    let delay = DelayConfig { seed: 5, least_us: 20, mean_more_us: 50 };
    let no_faults = FaultConfig { seed: 6, losses_per_million: 0, stalls_per_million: 20_000, longest_stall_us: 300 };
    Box::new(Recorder::new(Faulty::new(Delayed::new(fabric, delay), no_faults), std::io::sink()))
}

#[test]
fn delays_stalls_and_recording_keep_the_contract() {
    // Bulk links have no middleware, and thousands of sleeps that all end late show nothing more.
    let skipped = |name: &str| name.starts_with("bulk") || name.starts_with("wake-ups of a receiver");
    for (name, case) in CASES.iter().filter(|(name, _)| !skipped(name)) {
        println!("{name}");
        case(&mut Wrapped(Loopback::encrypted(LOOPBACK, Transport::Shm, None), stacked));
    }
}

#[test]
fn every_message_takes_its_time_and_none_overtakes() {
    let delay = DelayConfig { seed: 1, least_us: 3_000, mean_more_us: 2_000 };
    let (mut left, mut right) = pair(|fabric| Box::new(Delayed::new(fabric, delay)));
    let mut waits_us = Vec::new();
    for number in 0..100u64 {
        assert!(right.send(&[number.to_le_bytes(), now_us().to_le_bytes()].concat()));
        let mut received = 0;
        drive(&mut left, &mut right, |left, _| {
            while let Some(message) = left.messages.pop_front() {
                let word = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().unwrap());
                assert_eq!(word(0), number);
                waits_us.push(now_us() - word(8));
                received += 1;
            }
            received == 1
        });
    }
    assert!(waits_us.iter().all(|&wait_us| wait_us >= 3_000), "{waits_us:?}");
    // Not all the same: 100 draws of an exponential distribution.
    assert!(waits_us.iter().any(|&wait_us| wait_us >= 5_000), "{waits_us:?}");
    // In a burst they keep their order.
    (0..200u8).for_each(|number| assert!(right.send(&[number])));
    drive(&mut left, &mut right, |left, _| left.messages.len() == 200);
    assert!(left.messages.iter().enumerate().all(|(number, message)| message[..] == [number as u8]));
}

/// Numbered messages both ways while the left end loses connections and stalls: within a connection none is missing.
#[test]
fn losses_end_connections_and_nothing_else() {
    let faults =
        FaultConfig { seed: 9, losses_per_million: 20_000, stalls_per_million: 20_000, longest_stall_us: 2_000 };
    let (mut left, mut right) = pair(|fabric| Box::new(Faulty::new(fabric, faults)));
    let (mut sent, mut checks) = ([0u64; 2], [Check::default(), Check::default()]);
    drive(&mut left, &mut right, |left, right| {
        for (end, sent) in [&mut *left, &mut *right].into_iter().zip(&mut sent) {
            // Straight to the fabric: there may be no connection just now.
            if end.fabric.send(end.peer, &[&sent.to_le_bytes()]).is_ok() {
                *sent += 1;
            }
        }
        checks[0].see(left);
        checks[1].see(right);
        sent.iter().all(|&sent| sent > 3_000)
    });
    for (end, check) in [(&left, &checks[0]), (&right, &checks[1])] {
        assert!(end.lost.len() > 20, "{} losses", end.lost.len());
        assert!(check.received > 1_500, "{} messages arrived", check.received);
    }
    assert!(left.lost.iter().all(|reason| *reason == LostReason::Disconnected), "{:?}", left.lost);
}

#[derive(Default)]
struct Check {
    next: u64,
    received: u64,
    gaps: usize,
}

impl Check {
    fn see(&mut self, end: &mut End) {
        while let Some(message) = end.messages.pop_front() {
            let number = u64::from_le_bytes(message[..].try_into().unwrap());
            assert!(number >= self.next, "{number} again or late, after {}", self.next);
            if number > self.next {
                self.gaps += 1;
                assert!(self.gaps < end.connected.len(), "a gap before {number} within a connection");
            }
            self.next = number + 1;
            self.received += 1;
        }
    }
}

/// Answers every call well and does nothing, so that only the decisions of what is around it show.
struct Quiet {
    sent: u64,
    /// After how many messages connections were ended.
    ends: Arc<Mutex<Vec<u64>>>,
}

impl Fabric for Quiet {
    fn send(&mut self, _: PeerId, _: &[&[u8]]) -> Result<(), SendError> {
        self.sent += 1;
        Ok(())
    }
    fn poll(&mut self, _: u64, _: &mut dyn FnMut(FabricEvent<'_>)) {}
    fn poll_lanes(&mut self, _: u64, _: &mut dyn FnMut(FabricEvent<'_>)) {}
    fn has_memory_lanes(&self) -> bool {
        false
    }
    fn arm(&mut self) -> bool {
        false
    }
    fn next_deadline_us(&self) -> u64 {
        u64::MAX
    }
    fn is_connected(&self, _: PeerId) -> bool {
        true
    }
    fn last_heard_us(&self, _: PeerId) -> Option<u64> {
        None
    }
    fn queued_bytes(&self, _: PeerId) -> usize {
        0
    }
    fn disconnect(&mut self, _: PeerId) {
        self.ends.lock().unwrap().push(self.sent);
    }
    fn trouble(&self, _: PeerId) -> Option<&str> {
        None
    }
}

#[test]
fn a_seed_repeats_the_decisions() {
    let decisions = |seed| {
        let ends = Arc::<Mutex<Vec<u64>>>::default();
        let faults = FaultConfig { seed, losses_per_million: 10_000, stalls_per_million: 0, longest_stall_us: 0 };
        let mut faulty = Faulty::new(Quiet { sent: 0, ends: Arc::clone(&ends) }, faults);
        (0..10_000).for_each(|_| faulty.send(PeerId(1), &[b"x"]).unwrap());
        let ends = ends.lock().unwrap().clone();
        assert_eq!(ends.len() as u64, faulty.losses());
        assert!((50..200).contains(&ends.len()), "{} losses instead of 100 or so", ends.len());
        ends
    };
    assert_eq!(decisions(1), decisions(1));
    assert_ne!(decisions(1), decisions(2));
}

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An enhanced packet block.
#[derive(Debug, PartialEq)]
struct Packet {
    interface: u32,
    time_us: u64,
    /// 1: in, 2: out.
    direction: u32,
    bytes: Vec<u8>,
    comment: Option<String>,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Reads what a recorder wrote, by the pcapng draft and strictly: the names of the interfaces, and the packets.
fn parse(mut bytes: &[u8]) -> (Vec<String>, Vec<Packet>) {
    let (mut names, mut packets) = (Vec::new(), Vec::new());
    let mut first = true;
    while !bytes.is_empty() {
        let (kind, length) = (word(bytes, 0), word(bytes, 4) as usize);
        assert!(length.is_multiple_of(4) && word(bytes, length - 4) as usize == length);
        let body = &bytes[8..length - 4];
        bytes = &bytes[length..];
        assert_eq!(kind == 0x0a0d_0d0a, first);
        first = false;
        match kind {
            0x0a0d_0d0a => {
                assert_eq!((word(body, 0), word(body, 4), body.len()), (0x1a2b_3c4d, 1, 16));
                assert_eq!(body[8..], [0xff; 8]);
            }
            1 => {
                assert_eq!((word(body, 0), word(body, 4)), (147, 0));
                let options = options(&body[8..]);
                assert_eq!(options[0].0, 2);
                names.push(String::from_utf8(options[0].1.clone()).unwrap());
            }
            6 => {
                let length = word(body, 12);
                assert_eq!(length, word(body, 16), "nothing is cut");
                let bytes = body[20..20 + length as usize].to_vec();
                let options = options(&body[20 + length.next_multiple_of(4) as usize..]);
                assert_eq!(options[0].0, 2);
                packets.push(Packet {
                    interface: word(body, 0),
                    time_us: u64::from(word(body, 4)) << 32 | u64::from(word(body, 8)),
                    direction: word(&options[0].1, 0),
                    bytes,
                    comment: options.get(1).map(|(code, text)| {
                        assert_eq!(*code, 1);
                        String::from_utf8(text.clone()).unwrap()
                    }),
                });
            }
            other => panic!("block {other:#x}"),
        }
    }
    (names, packets)
}

fn options(mut bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut options = Vec::new();
    loop {
        let head = word(bytes, 0);
        let (code, length) = (head as u16, (head >> 16) as usize);
        if code == 0 {
            assert_eq!((length, bytes.len()), (0, 4), "the end is the end");
            return options;
        }
        options.push((code, bytes[4..4 + length].to_vec()));
        bytes = &bytes[4 + length.next_multiple_of(4)..];
    }
}

#[test]
fn a_recording_has_what_passed_and_tcpdump_reads_it() {
    let written = Shared::default();
    let out = written.clone();
    let (mut left, mut right) = pair(|fabric| Box::new(Recorder::new(fabric, out)));
    let mut expected = Vec::new();
    for length in [1usize, 2, 3, 4, 64, 1500, 70_000] {
        let (there, back) = (vec![length as u8; length], vec![!(length as u8); length]);
        assert!(left.send(&there) && right.send(&back));
        drive(&mut left, &mut right, |left, right| !left.messages.is_empty() && !right.messages.is_empty());
        assert!(left.messages.pop_front() == Some(back.clone()) && right.messages.pop_front() == Some(there.clone()));
        expected.push((2, there));
        expected.push((1, back));
    }
    left.fabric.disconnect(left.peer);
    left.step(0);
    let bytes = written.0.lock().unwrap().clone();
    let (names, mut packets) = parse(&bytes);
    assert_eq!(names, ["replica 1"]);
    assert!(packets.iter().all(|packet| packet.interface == 0));
    assert!(packets.is_sorted_by_key(|packet| packet.time_us));
    let now_s = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(packets.iter().all(|packet| now_s - packet.time_us / 1_000_000 < 60), "the clock on the wall");
    let (first, last) = (packets.remove(0), packets.pop().unwrap());
    assert!(first.bytes.is_empty() && first.comment.unwrap().starts_with("connected, instance 0"));
    assert_eq!((last.bytes.len(), last.comment.unwrap().as_str()), (0, "lost: closed on this side"));
    let passed: Vec<(u32, Vec<u8>)> = packets.into_iter().map(|packet| (packet.direction, packet.bytes)).collect();
    assert!(passed == expected);
    tcpdump_reads(&bytes, expected.len() + 2);
}

/// Where there is one.
fn tcpdump_reads(bytes: &[u8], packets: usize) {
    if Command::new("tcpdump").arg("--version").output().is_err() {
        println!("tcpdump is not installed: only our own reader has read the recording");
        return;
    }
    let path = std::env::temp_dir().join(format!("plover-recording-{}.pcapng", std::process::id()));
    std::fs::write(&path, bytes).unwrap();
    let output = Command::new("tcpdump").arg("-r").arg(&path).args(["-n", "-t"]).output();
    std::fs::remove_file(&path).unwrap();
    let output = output.unwrap();
    let (lines, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{errors}");
    // Each packet begins a line that is not indented.
    let read = lines.lines().filter(|line| !line.starts_with(['\t', ' '])).count();
    assert_eq!(read, packets, "{lines}\n{errors}");
}
