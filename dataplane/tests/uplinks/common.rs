//! What the tests of the kinds share: namespaces, bridges, frames.

use dataplane::VNET_HEADER_BYTES;
use dataplane::batch::{self, BatchBuilder, MIN_BATCH_BYTES};
use dataplane::uplink::filter::Filter;
use dataplane::uplink::{Intake, Uplink};
use dataplane::wait::{Interest, Poller};
use std::process::Command;
use std::time::{Duration, Instant};

pub const BRIDGE: &str = "plvtestbr";
pub const PAYLOAD_BYTES: usize = 30_000;
pub const SEGMENT_BYTES: usize = 1460;

/// Runs `test` on a thread in a fresh network namespace, which goes away with the thread.
pub fn in_namespace(test: fn()) {
    let run = move || {
        // SAFETY: unshare takes no pointers; a network namespace is a property of this thread alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            eprintln!("skipped: cannot make a network namespace (needs root)");
            return;
        }
        test();
    };
    if let Err(panic) = std::thread::spawn(run).join() {
        std::panic::resume_unwind(panic);
    }
}

fn control() -> libc::c_int {
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) };
    assert!(fd >= 0);
    fd
}

/// A bridge that says nothing itself.
pub fn make_bridge(name: &str) {
    ip(&format!("link add {name} type bridge mcast_snooping 0"));
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    set_up(name, true);
}

pub fn set_up(name: &str, up: bool) {
    let fd = control();
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = if up { libc::IFF_UP as libc::c_short } else { 0 };
    // SAFETY: SIOCSIFFLAGS reads an ifreq.
    let result = unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS as _, &raw mut request) };
    assert_eq!(result, 0);
    // SAFETY: the fd is ours.
    unsafe { libc::close(fd) };
}

/// The next frame, within 10 s.
pub fn receive(tap: &mut dyn Uplink) -> Vec<u8> {
    let poller = Poller::new().unwrap();
    if let Some(fd) = tap.fd() {
        poller.add(fd, 1, Interest::Read).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut batch = BatchBuilder::new(MIN_BATCH_BYTES);
    // Stale bytes in the buffer must not show up in the frame.
    batch.push(&[0xaa; 4096]).unwrap();
    batch.finish();
    let mut ready = Vec::new();
    loop {
        tap.recv_burst(&mut Intake::new(&mut batch, &mut Filter::default()), 1).unwrap();
        if batch.len() == 1 {
            return batch::frames(&batch.finish()).unwrap().next().unwrap().to_vec();
        }
        assert!(batch.is_empty(), "one frame at a time");
        assert!(Instant::now() < deadline, "no frame within 10 s");
        poller.wait(Some(if tap.fd().is_some() { 10_000_000 } else { 50 }), &mut ready).unwrap();
    }
}

/// A TCP segment of 30 000 bytes that somebody else is to cut and checksum.
pub fn large_segment() -> Vec<u8> {
    let mut frame = vec![0u8; VNET_HEADER_BYTES + 54 + PAYLOAD_BYTES];
    // Needs checksum, TCPv4, 54 bytes of headers, 1460 per segment, checksum of TCP at 34 + 16.
    frame[..10].copy_from_slice(&[1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
    let packet = &mut frame[VNET_HEADER_BYTES..];
    packet[0..6].fill(0xff);
    packet[6..14].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 1, 8, 0]);
    let ip_len = ((packet.len() - 14) as u16).to_be_bytes();
    packet[14..34]
        .copy_from_slice(&[0x45, 0, ip_len[0], ip_len[1], 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet[34..54].copy_from_slice(&[0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    // What is left of the checksum to compute starts from the sum over the pseudo header.
    let pseudo: u32 = 0x0a00 + 1 + 0x0a00 + 2 + 6 + (packet.len() - 34) as u32;
    packet[50..52].copy_from_slice(&(pseudo as u16).to_be_bytes());
    // A bridge with netfilter drops packets whose IP header does not add up.
    let words = packet[14..34].chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let checksum = !(((sum & 0xffff) + (sum >> 16)) as u16);
    packet[24..26].copy_from_slice(&checksum.to_be_bytes());
    for (i, byte) in packet[54..].iter_mut().enumerate() {
        *byte = (i % 251) as u8;
    }
    frame
}

/// Runs `ip` with these words in the namespace of this thread.
pub fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}
