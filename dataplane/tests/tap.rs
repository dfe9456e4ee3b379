//! Real TAPs on a real bridge, in a network namespace of the test thread's own. Needs root; without it the
//! tests say so and pass.

use dataplane::batch::{self, BatchBuilder, MIN_BATCH_BYTES};
use dataplane::uplink::announce::rarp;
use dataplane::uplink::filter::Filter;
use dataplane::uplink::tap::{Tap, TapError};
use dataplane::uplink::{Burst, Intake, OffloadFlags, Uplink, UplinkDrops};
use dataplane::wait::{Interest, Poller};
use dataplane::{VNET_HEADER_BYTES, VnetHeader};
use std::ffi::CString;

const SIOCBRADDBR: libc::c_ulong = 0x89a0;
const BRIDGE: &str = "plvtestbr";
const PAYLOAD_BYTES: usize = 30_000;
const SEGMENT_BYTES: usize = 1460;

/// Runs `test` on a thread in a fresh network namespace, which goes away with the thread.
fn in_namespace(test: fn()) {
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

fn make_bridge(name: &str) {
    let fd = control();
    let text = CString::new(name).unwrap();
    // SAFETY: SIOCBRADDBR reads a NUL-terminated name of fewer than IFNAMSIZ bytes.
    let result = unsafe { libc::ioctl(fd, SIOCBRADDBR as _, text.as_ptr()) };
    assert_eq!(result, 0);
    // Its own announcements are not what is tested here.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    set_up(name, true);
    // SAFETY: the fd is ours.
    unsafe { libc::close(fd) };
}

fn set_up(name: &str, up: bool) {
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
fn receive(tap: &mut Tap) -> Vec<u8> {
    let poller = Poller::new().unwrap();
    poller.add(tap.fd().unwrap(), 1, Interest::Read).unwrap();
    let mut batch = BatchBuilder::new(MIN_BATCH_BYTES);
    // Stale bytes in the buffer must not show up in the frame.
    batch.push(&[0xaa; 4096]).unwrap();
    batch.finish();
    let mut ready = Vec::new();
    loop {
        let burst = tap.recv_burst(&mut Intake::new(&mut batch, &mut Filter::default()), 1).unwrap();
        assert_eq!(burst.frames, batch.len());
        if burst.frames == 1 {
            return batch::frames(&batch.finish()).unwrap().next().unwrap().to_vec();
        }
        poller.wait(Some(10_000_000), &mut ready).unwrap();
        assert!(!ready.is_empty(), "no frame within 10 s");
    }
}

/// A TCP segment of 30 000 bytes that somebody else is to cut and checksum.
fn large_segment() -> Vec<u8> {
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

#[test]
fn frames_cross_a_bridge_and_offloads_are_as_asked() {
    in_namespace(|| {
        make_bridge(BRIDGE);
        let mut a = Tap::open("plvtest0", Some(BRIDGE)).unwrap();
        let mut b = Tap::open("plvtest1", Some(BRIDGE)).unwrap();
        assert_eq!(a.name(), "plvtest0");
        let announcement = rarp([0x52, 0x54, 0, 0, 0, 9]);
        assert!(a.send(&announcement).unwrap());
        assert_eq!(receive(&mut b), announcement, "the host itself must not chatter into the link");

        // A guest without offloads gets segments of its MTU with checksums.
        let large = large_segment();
        assert!(a.send(&large).unwrap());
        let mut payload = Vec::new();
        while payload.len() < PAYLOAD_BYTES {
            let segment = receive(&mut b);
            assert!(segment.len() <= VNET_HEADER_BYTES + 54 + SEGMENT_BYTES);
            let header = VnetHeader::of(&segment).unwrap();
            assert_eq!((header.flags & 1, header.gso_type), (0, 0));
            payload.extend_from_slice(&segment[VNET_HEADER_BYTES + 54..]);
        }
        assert!(payload == large[VNET_HEADER_BYTES + 54..]);

        // A guest with them gets the frame as it was sent.
        b.set_offload(OffloadFlags { csum: true, tso4: true, tso6: true, ecn: true }).unwrap();
        assert!(a.send(&large).unwrap());
        let whole = receive(&mut b);
        let header = VnetHeader::of(&whole).unwrap();
        assert_eq!((header.flags & 1, header.gso_type, header.gso_size.get()), (1, 1, SEGMENT_BYTES as u16));
        assert!(whole[VNET_HEADER_BYTES + 54..] == large[VNET_HEADER_BYTES + 54..]);
        assert_eq!(header.num_buffers.get(), 0);
        assert_eq!(a.drops(), UplinkDrops::default());
    });
}

#[test]
fn nonsense_and_a_pulled_cable_cost_a_frame_and_not_the_port() {
    in_namespace(|| {
        make_bridge(BRIDGE);
        let mut a = Tap::open("plvtest0", Some(BRIDGE)).unwrap();
        let mut b = Tap::open("plvtest1", Some(BRIDGE)).unwrap();
        let good = rarp([0x52, 0x54, 0, 0, 0, 9]);
        let mut bad = good;
        bad[1] = 77; // no such GSO type
        assert!(!a.send(&bad).unwrap());
        assert!(!a.send(&good[..VNET_HEADER_BYTES + 3]).unwrap());
        assert_eq!(a.drops(), UplinkDrops { full: 0, refused: 2, missed: 0 });
        set_up("plvtest0", false);
        assert!(!a.send(&good).unwrap());
        assert_eq!(a.discard_burst(9).unwrap(), Burst::default());
        set_up("plvtest0", true);
        assert!(a.send(&good).unwrap());
        assert_eq!(receive(&mut b), good);
    });
}

#[test]
fn a_burst_ends_with_its_budget_or_with_the_room() {
    in_namespace(|| {
        make_bridge(BRIDGE);
        let mut a = Tap::open("plvtest0", Some(BRIDGE)).unwrap();
        let mut b = Tap::open("plvtest1", Some(BRIDGE)).unwrap();
        let frame = rarp([0x52, 0x54, 0, 0, 0, 9]);
        let mut send = |count| (0..count).for_each(|_| assert!(a.send(&frame).unwrap()));
        send(5);
        let mut batch = BatchBuilder::new(MIN_BATCH_BYTES + 100);
        assert_eq!(
            b.recv_burst(&mut Intake::new(&mut batch, &mut Filter::default()), 2).unwrap(),
            Burst { frames: 2, more: true }
        );
        // The next one could be of any size, and there is no room for the largest any more.
        assert_eq!(
            b.recv_burst(&mut Intake::new(&mut batch, &mut Filter::default()), 2).unwrap(),
            Burst { frames: 0, more: true }
        );
        batch.finish();
        assert_eq!(b.discard_burst(1).unwrap(), Burst { frames: 1, more: true });
        assert_eq!(b.discard_burst(9).unwrap(), Burst { frames: 2, more: false });
    });
}

#[test]
fn each_obstacle_has_its_own_error_and_leaves_nothing_behind() {
    in_namespace(|| {
        for name in ["", "sixteen-bytes-it", "a b", "a/b", "..", "tap%d"] {
            assert!(matches!(Tap::open(name, None), Err(TapError::BadName { .. })), "{name:?}");
        }
        let error = Tap::open("plvtest0", Some("nobridge")).unwrap_err();
        assert!(matches!(error, TapError::NoBridge { .. }), "{error}");
        assert!(error.to_string().contains("ip link add nobridge type bridge"), "{error}");
        let tap = Tap::open("plvtest0", None).unwrap();
        let error = Tap::open("plvtest0", None).unwrap_err();
        assert!(matches!(error, TapError::InUse { .. }), "{error}");
        let error = Tap::open("plvtest1", Some("plvtest0")).unwrap_err();
        assert!(matches!(error, TapError::NoBridge { .. }), "a TAP is no bridge: {error}");
        let error = Tap::open("lo", None).unwrap_err();
        assert!(matches!(error, TapError::InUse { .. }), "{error}");
        drop(tap);
        drop(Tap::open("plvtest0", None).unwrap());
        // SAFETY: the raw call changes this thread's ids only; the thread ends after the test.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        assert_eq!(result, 0);
        let error = Tap::open("plvtest0", None).unwrap_err();
        assert!(matches!(error, TapError::NotPermitted { .. }), "{error}");
        assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
    });
}
