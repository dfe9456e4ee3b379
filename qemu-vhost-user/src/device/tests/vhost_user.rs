//! The session against the vhost crate's frontend, which plays QEMU, with a thread that plays the reactor.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::bed::{Driver, HALF, Memory, USER_BASE, frame};
use crate::device::features::{Features, PROTOCOL_FEATURES};
use crate::device::link::{Command, LinkError, pair};
use crate::device::memory::BackendDirty;
use crate::device::net::{DeviceError, DeviceEvent, Inject, MAX_QUEUE_PAIRS, NetDevice, RingIndex};
use crate::device::session::{Endpoint, Session, SessionError, open};

/// Every wait in these tests ends here.
const DEADLINE: Duration = Duration::from_secs(10);
const SIZE: u16 = 8;

/// A device, its session, and a thread that serves its commands as the reactor does.
struct Daemon {
    device: Arc<Mutex<NetDevice>>,
    events: Receiver<DeviceEvent>,
    stop: Arc<AtomicBool>,
    reactor: Option<JoinHandle<()>>,
    session: Option<Session>,
    dirty: BackendDirty,
}

impl Daemon {
    fn new(endpoint: Endpoint) -> Self {
        let (device, session) = open("test", endpoint, || {}).unwrap();
        let dirty = device.dirty();
        let device = Arc::new(Mutex::new(device));
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, events) = channel();
        let reactor = std::thread::spawn({
            let (device, stop) = (Arc::clone(&device), Arc::clone(&stop));
            move || react(&device, &stop, &sender)
        });
        Self { device, events, stop, reactor: Some(reactor), session: Some(session), dirty }
    }

    /// A daemon and a QEMU joined by a socket pair.
    fn joined() -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Self::new(Endpoint::Inherited(ours.into())), theirs)
    }

    /// The next event that `wanted` accepts.
    fn wait_for<T>(&self, mut wanted: impl FnMut(DeviceEvent) -> Option<T>) -> T {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).expect("the event comes before the deadline");
            if let Some(found) = wanted(event) {
                return found;
            }
        }
    }

    fn wait_until_started(&self) {
        self.wait_for(|event| matches!(event, DeviceEvent::Started { .. }).then_some(()));
    }

    fn wait_until_disconnected(&self) {
        self.wait_for(|event| matches!(event, DeviceEvent::Disconnected).then_some(()));
    }

    fn wait_until_refused(&self) -> String {
        self.wait_for(|event| match event {
            DeviceEvent::Broken(DeviceError::Session(why)) => Some(why),
            _ => None,
        })
    }

    fn device(&self) -> std::sync::MutexGuard<'_, NetDevice> {
        self.device.lock().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        drop(self.session.take());
        self.stop.store(true, Ordering::Release);
        if let Some(reactor) = self.reactor.take() {
            let ended = reactor.join();
            assert!(ended.is_ok() || std::thread::panicking());
        }
    }
}

fn react(device: &Mutex<NetDevice>, stop: &AtomicBool, events: &Sender<DeviceEvent>) {
    let wake = device.lock().unwrap().event_fd().try_clone_to_owned().unwrap();
    while !stop.load(Ordering::Acquire) {
        let pause = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        poll(&mut [PollFd::new(&wake, PollFlags::IN)], Some(&pause)).unwrap();
        device.lock().unwrap().handle_commands(&mut |event| drop(events.send(event)));
    }
}

/// QEMU with a guest in it.
struct Qemu {
    frontend: Frontend,
    memory: Memory,
    rx: Driver,
    tx: Driver,
    calls: [EventFd; 2],
    kicks: [EventFd; 2],
}

impl Qemu {
    fn new(socket: UnixStream) -> Self {
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Self {
            frontend: Frontend::from_stream(socket, 64),
            memory: Memory::new(),
            rx: Driver::new(0, SIZE, true, Features::offered()),
            tx: Driver::new(0x1_0000, SIZE, false, Features::offered()),
            calls: [event(), event()],
            kicks: [event(), event()],
        }
    }

    fn negotiate(&mut self) -> vhost::Result<()> {
        self.frontend.set_owner()?;
        let offered = self.frontend.get_features()?;
        assert_eq!(offered, Features::offered().0 | PROTOCOL_FEATURES);
        let protocol = self.frontend.get_protocol_features()?;
        assert_eq!(protocol, VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ);
        self.frontend.set_protocol_features(protocol)?;
        self.frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        self.frontend.set_features(offered)
    }

    fn send_memory(&mut self) -> vhost::Result<()> {
        let region = |guest, offset| VhostUserMemoryRegionInfo {
            guest_phys_addr: guest,
            memory_size: HALF,
            userspace_addr: USER_BASE + guest,
            mmap_offset: offset,
            mmap_handle: self.memory.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region(0, HALF), region(HALF, 0)]).map(drop)
    }

    /// What QEMU sends when the guest's driver is ready, and at `cont`.
    fn start(&mut self, bases: [u16; 2]) -> vhost::Result<()> {
        self.send_memory()?;
        for (index, driver) in [&self.rx, &self.tx].into_iter().enumerate() {
            self.frontend.set_vring_enable(index, true)?;
            self.frontend.set_vring_num(index, SIZE)?;
            self.frontend.set_vring_base(index, bases[index])?;
            self.frontend.set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: SIZE,
                    queue_size: SIZE,
                    flags: 0,
                    desc_table_addr: USER_BASE + driver.descriptors(),
                    used_ring_addr: USER_BASE + driver.used(),
                    avail_ring_addr: USER_BASE + driver.available(),
                    log_addr: None,
                },
            )?;
            self.frontend.set_vring_kick(index, &self.kicks[index])?;
            self.frontend.set_vring_call(index, &self.calls[index])?;
        }
        Ok(())
    }

    fn stop(&mut self) -> [u16; 2] {
        [0, 1].map(|index| self.frontend.get_vring_base(index).unwrap() as u16)
    }

    /// A frame goes each way.
    fn exchange(&mut self, daemon: &Daemon, number: u32) {
        let head = self.rx.prepare(&self.memory, &[2000], false).unwrap();
        self.rx.offer(&self.memory, head);
        let (down, up) = (frame(number, 100), frame(number + 1, 200));
        let head = self.tx.prepare(&self.memory, &[212], true).unwrap();
        self.tx.fill(&self.memory, head, &up);
        self.tx.offer(&self.memory, head);
        let mut device = daemon.device();
        assert_eq!(device.inject(&down), Inject::Done);
        assert_eq!(
            device.collect_tx(4, &mut |got| {
                assert_eq!(got, up);
                true
            }),
            1
        );
        device.flush_signals();
        assert_eq!(self.rx.reap(&self.memory).unwrap()[12..], down[12..]);
        assert!(self.tx.reap(&self.memory).is_some());
    }
}

#[test]
fn a_guest_is_served_over_stop_and_cont() {
    let (daemon, socket) = Daemon::joined();
    let mut qemu = Qemu::new(socket);
    qemu.negotiate().unwrap();
    let mut bases = [0; 2];
    for round in 0..5 {
        qemu.start(bases).unwrap();
        daemon.wait_until_started();
        qemu.exchange(&daemon, 10 * round);
        qemu.exchange(&daemon, 10 * round + 5);
        bases = qemu.stop();
        assert!(!daemon.device().is_running(), "GET_VRING_BASE is answered after the ring came to rest");
        assert_eq!(bases, [2 * (round as u16 + 1); 2]);
    }
    drop(qemu);
    daemon.wait_until_disconnected();
}

#[test]
fn the_mapping_and_its_dirty_bits_outlive_a_restart_and_a_lost_connection() {
    let listening = Path::new("mapping");
    let daemon = Daemon::new(Endpoint::Listen(listening.0.clone()));
    let connect = || UnixStream::connect(&listening.0).unwrap();
    let mut qemu = Qemu::new(connect());
    qemu.negotiate().unwrap();
    qemu.start([0; 2]).unwrap();
    daemon.wait_until_started();
    qemu.exchange(&daemon, 1);
    let mapped = daemon.dirty.ram_file().unwrap();
    let bases = qemu.stop();
    qemu.start(bases).unwrap();
    daemon.wait_until_started();
    assert!(Arc::ptr_eq(&mapped, &daemon.dirty.ram_file().unwrap()), "the same file is not mapped again");
    qemu.stop();
    // QEMU loses us and comes back with the same guest.
    let Qemu { memory, frontend, .. } = qemu;
    drop(frontend);
    daemon.wait_until_disconnected();
    let mut qemu = Qemu { memory, ..Qemu::new(connect()) };
    qemu.negotiate().unwrap();
    qemu.send_memory().unwrap();
    assert!(Arc::ptr_eq(&mapped, &daemon.dirty.ram_file().unwrap()));
    let mut pages = Vec::new();
    assert!(daemon.dirty.drain(&mut |page| pages.push(page)));
    for written in [qemu.rx.used(), qemu.tx.used()] {
        assert!(pages.contains(&(Memory::offset(written) / 4096)), "{written:#x} is not in {pages:?}");
    }
    // The file grows: mapped anew, but what was written before is still owed.
    qemu.start(bases).unwrap();
    daemon.wait_until_started();
    assert_eq!(daemon.device().collect_tx(1, &mut |_| true), 0);
    qemu.stop();
    qemu.memory.file.set_len(2 * super::bed::RAM_BYTES).unwrap();
    qemu.send_memory().unwrap();
    assert!(!Arc::ptr_eq(&mapped, &daemon.dirty.ram_file().unwrap()));
    let mut pages = Vec::new();
    assert!(daemon.dirty.drain(&mut |page| pages.push(page)));
    assert_eq!(pages, [Memory::offset(qemu.tx.used()) / 4096], "asking for a kick wrote one page");
    // Another file is another guest.
    qemu.memory = Memory::new();
    qemu.send_memory().unwrap();
    assert_ne!(mapped.identity(), daemon.dirty.ram_identity().unwrap());
    assert!(daemon.dirty.drain(&mut |page| panic!("page {page} of another guest")));
}

/// What an eventfd holds, once it holds something.
fn signalled(fd: &EventFd) -> u64 {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: `polled` is one entry that outlives the call.
    let ready = unsafe { libc::poll(&mut polled, 1, DEADLINE.as_millis() as i32) };
    assert_eq!(ready, 1, "nobody signals");
    fd.read().unwrap()
}

#[test]
fn a_memory_table_and_new_descriptors_take_effect_while_rings_run() {
    let (daemon, socket) = Daemon::joined();
    let mut qemu = Qemu::new(socket);
    qemu.negotiate().unwrap();
    qemu.start([0; 2]).unwrap();
    daemon.wait_until_started();
    qemu.exchange(&daemon, 1);
    qemu.send_memory().unwrap();
    daemon.wait_until_started();
    qemu.exchange(&daemon, 3);
    // MSI-X masking: interrupts go elsewhere, some time soon. The one that was sent before QEMU asked for it may have come
    // too late for the old descriptor.
    let masked = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    qemu.frontend.set_vring_call(0, &masked).unwrap();
    assert_eq!(signalled(&masked), 1, "signalled, because the old one had been");
    let _ = qemu.calls[0].read();
    qemu.rx.want_interrupt(&qemu.memory);
    qemu.exchange(&daemon, 5);
    assert_eq!(masked.read().unwrap(), 1);
    assert!(qemu.calls[0].read().is_err());
    let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    qemu.frontend.set_vring_kick(1, &kick).unwrap();
    assert_eq!(signalled(&kick), 1, "signalled, in case the old one had been");
    qemu.frontend.set_vring_enable(0, false).unwrap();
    assert_eq!(daemon.device().inject(&frame(7, 60)), Inject::NotRunning);
    qemu.frontend.set_vring_enable(0, true).unwrap();
    daemon.wait_until_started();
    qemu.exchange(&daemon, 9);
}

#[test]
fn qemu_may_enable_rings_before_it_has_sent_its_features() {
    let (daemon, mut socket) = Daemon::joined();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    // As recorded from QEMU 10.0.2: SET_VRING_ENABLE with NEED_REPLY, ring 0, enabled.
    let message: Vec<u8> = [18u32, 9, 8, 0, 1].into_iter().flat_map(u32::to_ne_bytes).collect();
    socket.write_all(&message).unwrap();
    let mut reply = [0; 20];
    socket.read_exact(&mut reply).unwrap();
    let expected: Vec<u8> = [18u32, 5, 8, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
    assert_eq!(reply[..], expected);
    let mut qemu = Qemu::new(socket);
    qemu.negotiate().unwrap();
    qemu.start([0; 2]).unwrap();
    daemon.wait_until_started();
    qemu.exchange(&daemon, 1);
}

#[test]
fn what_qemu_gets_wrong_closes_its_connection_with_a_reason_and_the_next_one_works() {
    let listening = Path::new("refused");
    let daemon = Daemon::new(Endpoint::Listen(listening.0.clone()));
    let mut qemu = Qemu::new(UnixStream::connect(&listening.0).unwrap());
    qemu.negotiate().unwrap();
    qemu.rx.base = 1 << 40;
    assert!(qemu.start([0; 2]).is_err());
    let why = daemon.wait_until_refused();
    assert!(why.contains("ring 0 (receive) cannot start") && why.contains("not in guest memory"), "{why}");
    daemon.wait_until_disconnected();
    let mut qemu = Qemu::new(UnixStream::connect(&listening.0).unwrap());
    qemu.negotiate().unwrap();
    qemu.start([0; 2]).unwrap();
    daemon.wait_until_started();
    qemu.exchange(&daemon, 1);
}

#[test]
fn every_queue_that_was_promised_exists_and_no_other() {
    let (daemon, socket) = Daemon::joined();
    let mut qemu = Qemu::new(socket);
    qemu.negotiate().unwrap();
    for index in 0..2 * MAX_QUEUE_PAIRS {
        qemu.frontend.set_vring_enable(index, true).unwrap();
        qemu.frontend.set_vring_num(index, SIZE).unwrap();
        qemu.frontend.set_vring_base(index, 7).unwrap();
        assert_eq!(qemu.frontend.get_vring_base(index).unwrap(), 7);
    }
    // The first pair works while others were never started.
    qemu.start([0; 2]).unwrap();
    daemon.wait_until_started();
    assert_eq!(daemon.device().queue_pairs(), 1);
    qemu.exchange(&daemon, 1);
    assert!(qemu.frontend.set_vring_num(2 * MAX_QUEUE_PAIRS, SIZE).is_err());
    let why = daemon.wait_until_refused();
    assert!(why.contains("ring 16") && why.contains("queues=8"), "{why}");
    // The vhost crate's frontend counts queues where QEMU counts pairs, so it asks last.
    let (_daemon, socket) = Daemon::joined();
    let mut qemu = Qemu::new(socket);
    qemu.negotiate().unwrap();
    assert_eq!(qemu.frontend.get_queue_num().unwrap(), MAX_QUEUE_PAIRS as u64);
}

#[test]
fn a_region_past_the_end_of_its_file_is_refused() {
    let (daemon, socket) = Daemon::joined();
    let mut qemu = Qemu::new(socket);
    qemu.negotiate().unwrap();
    qemu.memory.file.set_len(HALF + 4096).unwrap();
    assert!(qemu.send_memory().is_err());
    let why = daemon.wait_until_refused();
    assert!(why.contains("memory-backend"), "{why}");
}

#[test]
fn the_session_follows_a_qemu_that_is_the_server() {
    let path = Path::new("server");
    let daemon = Daemon::new(Endpoint::Connect(path.0.clone()));
    // Nobody listens yet: the session must be trying again by now, not have given up.
    for _ in 0..2 {
        let listener = UnixListener::bind(&path.0).unwrap();
        let (socket, _) = listener.accept().unwrap();
        let mut qemu = Qemu::new(socket);
        qemu.negotiate().unwrap();
        qemu.start([0; 2]).unwrap();
        daemon.wait_until_started();
        qemu.exchange(&daemon, 1);
        drop(qemu);
        drop(listener);
        daemon.wait_until_disconnected();
        std::fs::remove_file(&path.0).unwrap();
    }
}

#[test]
fn a_path_in_use_is_refused_and_a_stale_one_is_not() {
    let path = Path::new("in-use");
    let listener = UnixListener::bind(&path.0).unwrap();
    let refused = open("test", Endpoint::Listen(path.0.clone()), || {}).map(drop).unwrap_err();
    assert!(matches!(&refused, SessionError::InUse { pid, .. } if *pid == std::process::id() as i32), "{refused}");
    assert!(refused.to_string().contains(path.0.to_str().unwrap()), "{refused}");
    drop(listener);
    let (device, session) = open("test", Endpoint::Listen(path.0.clone()), || {}).unwrap();
    assert!(UnixStream::connect(&path.0).is_ok());
    drop((device, session));
    assert!(!path.0.exists(), "the socket goes with its session");
    std::fs::write(&path.0, "precious").unwrap();
    let refused = open("test", Endpoint::Listen(path.0.clone()), || {}).map(drop).unwrap_err();
    assert!(matches!(refused, SessionError::NotASocket { .. }), "{refused}");
    assert_eq!(std::fs::read(&path.0).unwrap(), b"precious");
    let file = std::fs::File::open(&path.0).unwrap();
    assert!(matches!(open("test", Endpoint::Inherited(file.into()), || {}), Err(SessionError::Inherited(_))));
}

#[test]
fn an_inherited_listening_socket_is_served() {
    let path = Path::new("inherited");
    let listener = UnixListener::bind(&path.0).unwrap();
    let daemon = Daemon::new(Endpoint::Inherited(listener.into()));
    for _ in 0..2 {
        let mut qemu = Qemu::new(UnixStream::connect(&path.0).unwrap());
        qemu.negotiate().unwrap();
        drop(qemu);
        daemon.wait_until_disconnected();
    }
}

#[test]
fn a_stuck_reactor_is_given_up_and_a_missing_one_noticed() {
    let stop = Arc::new(AtomicBool::new(false));
    let (session, reactor) = pair(stop, Duration::from_millis(50)).unwrap();
    let outcome = session.call(Command::StopRing { index: RingIndex::RX });
    assert!(matches!(outcome, Err(LinkError::Stuck { waited_ms: 50 })));
    drop(reactor);
    assert!(matches!(session.call(Command::Connected), Err(LinkError::Gone)));
}

/// Bytes that the other end has not read yet.
fn unread(socket: &UnixStream) -> libc::c_int {
    let mut bytes = 0;
    // SAFETY: TIOCOUTQ writes one int to the address, which is that of a local int.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
    assert_eq!(outcome, 0);
    bytes
}

#[test]
fn half_a_message_does_not_keep_the_session_from_ending() {
    let (daemon, mut socket) = Daemon::joined();
    daemon.wait_for(|event| matches!(event, DeviceEvent::Connected).then_some(()));
    socket.write_all(&[1, 0, 0]).unwrap();
    let began = Instant::now();
    // Only when the session has taken the bytes is it inside the message.
    while unread(&socket) > 0 {
        assert!(began.elapsed() < DEADLINE);
        std::thread::yield_now();
    }
    drop(daemon);
    assert!(began.elapsed() < DEADLINE);
}

#[test]
fn capabilities_are_json_of_the_documented_form() {
    let parsed: serde_json::Value = serde_json::from_str(&crate::device::capabilities_json()).unwrap();
    assert_eq!(parsed["type"], "net");
    assert!(parsed["features"].as_array().unwrap().iter().any(|feature| feature == "mrg-rxbuf"));
}

/// A path for a socket, unlike that of any other test, removed at the end.
struct Path(PathBuf);

impl Path {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("plover-{}-{name}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        Self(path)
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    /// Messages in any order and with any content: the session ends the connection or goes on, and the reactor's side is at
    /// rest afterwards.
    #[test]
    fn any_order_of_messages_is_survived(
        messages in prop::collection::vec((0..42u32, prop::sample::select(vec![1u32, 9, 5, 0]), prop::collection::vec(0..3u32, 0..12)), 0..20),
        after_start in any::<bool>(),
    ) {
        let (daemon, socket) = Daemon::joined();
        let mut raw = socket.try_clone().unwrap();
        let mut qemu = Qemu::new(socket);
        if after_start {
            qemu.negotiate().unwrap();
            qemu.start([0; 2]).unwrap();
            daemon.wait_until_started();
        }
        for (request, flags, words) in messages {
            let header = [request, flags, 4 * words.len() as u32];
            let bytes: Vec<u8> = header.into_iter().chain(words).flat_map(u32::to_ne_bytes).collect();
            if raw.write_all(&bytes).is_err() {
                break;
            }
        }
        drop((qemu, raw));
        daemon.wait_until_disconnected();
        prop_assert!(!daemon.device().is_running());
    }
}
