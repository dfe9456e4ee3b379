//! A device with its session, and the other end of its vhost-user socket: what QEMU and the guest can do to it.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use qemu_vhost_user::device::{self, DeviceEvent, Endpoint, NetDevice, Session};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// What no input may exceed: a device that hangs is a finding.
const DEADLINE: Duration = Duration::from_secs(10);
/// Most descriptors that one message may carry here; more than vhost-user allows.
pub const MAX_FDS: usize = 9;
/// vhost-user version 1.
const VERSION: u32 = 1;
/// A frame for the guest.
const FRAME: [u8; 1514] = [0x5a; 1514];

/// A device and its QEMU.
pub struct Guest {
    pub device: NetDevice,
    socket: Option<UnixStream>,
    started: bool,
    gone: bool,
    deadline: Instant,
    _session: Session,
}

impl Guest {
    /// A device whose QEMU has just connected.
    pub fn connect() -> Guest {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_nonblocking(true).expect("a socket can be set so");
        let inherited = Endpoint::Inherited(OwnedFd::from(theirs));
        let (device, session) = device::open("fuzz", inherited, || {}).expect("a session");
        let deadline = Instant::now() + DEADLINE;
        Guest { device, socket: Some(ours), started: false, gone: false, deadline, _session: session }
    }

    /// A message with a header that says `size` bytes follow, whatever does.
    pub fn send(&mut self, request: u32, need_reply: bool, size: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut bytes = Vec::with_capacity(12 + payload.len());
        bytes.extend(request.to_le_bytes());
        bytes.extend((VERSION | u32::from(need_reply) << 3).to_le_bytes());
        bytes.extend(size.to_le_bytes());
        bytes.extend(payload);
        self.send_bytes(&bytes, fds);
    }

    /// Any bytes with any descriptors.
    pub fn send_bytes(&mut self, mut bytes: &[u8], mut fds: &[BorrowedFd<'_>]) {
        while !bytes.is_empty() && !self.gone {
            let Some(socket) = &self.socket else { return };
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "there is space for MAX_FDS");
            }
            match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => (bytes, fds) = (&bytes[sent..], &[]),
                Err(rustix::io::Errno::AGAIN) => self.turn(Duration::from_millis(1)),
                // The session has refused an earlier message and closed the connection.
                Err(_) => return,
            }
        }
    }

    /// One round of a reactor: commands, frames both ways, interrupts.
    pub fn turn(&mut self, wait: Duration) {
        assert!(Instant::now() < self.deadline, "the device hangs");
        let timeout = Timespec::try_from(wait).expect("a short time");
        let mut fds = [PollFd::from_borrowed_fd(self.device.event_fd(), PollFlags::IN)];
        let _ = poll(&mut fds, Some(&timeout));
        let (started, gone) = (&mut self.started, &mut self.gone);
        self.device.handle_commands(&mut |event| match event {
            DeviceEvent::Started { .. } => *started = true,
            DeviceEvent::Disconnected => *gone = true,
            _ => {}
        });
    }

    /// What a reactor does with a device in between.
    pub fn traffic(&mut self, frame_bytes: usize) {
        self.device.inject(&FRAME[..frame_bytes.min(FRAME.len())]);
        let mut bytes = 0;
        self.device.collect_tx(64, &mut |frame| {
            bytes += frame.len();
            bytes < 1 << 20
        });
        self.device.flush_signals();
    }

    /// Runs until both rings have started.
    pub fn until_started(&mut self) {
        while !self.started {
            assert!(!self.gone, "the session refused a correct set-up");
            self.turn(Duration::from_millis(100));
        }
    }

    /// QEMU goes away; the session must notice.
    pub fn close(mut self) {
        drop(self.socket.take());
        while !self.gone {
            self.turn(Duration::from_millis(100));
        }
    }
}

/// A memfd of that many zero bytes.
pub fn memory(bytes: u64) -> File {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("fuzz-ram", flags).expect("a memfd"));
    file.set_len(bytes).expect("a memfd grows");
    file
}

/// An eventfd for kicks and calls.
pub fn event() -> OwnedFd {
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    rustix::event::eventfd(0, flags).expect("an eventfd")
}

/// The same descriptor `count` times.
pub fn repeat<T: AsFd>(fd: &T, count: usize) -> Vec<BorrowedFd<'_>> {
    vec![fd.as_fd(); count]
}
