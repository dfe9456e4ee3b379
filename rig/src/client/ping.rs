//! Steady ICMP echo: the simplest client of all, and the finest clock for a gap.
//!
//! A ping socket (SOCK_DGRAM) needs no privilege but is switched off by default in new network namespaces, so a raw socket is
//! the second choice. Each request carries its number in the payload: the header's 16 bits wrap within eleven minutes.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use thiserror::Error;

use super::control::Control;
use super::meter::Meter;
use super::protocol::{Command, Output, PingParameters, PingReport, Progress};

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const HEADER_BYTES: usize = 8;
/// Header, our mark, the request's number.
const PACKET_BYTES: usize = HEADER_BYTES + 16;
/// The loop looks after its commands at least that often.
const TICK_US: u64 = 10_000;

/// Why no ping could be sent at all.
#[derive(Debug, Error)]
pub enum PingError {
    /// Neither kind of socket was granted.
    #[error("no ICMP socket: {0}; run as root or allow the group in net.ipv4.ping_group_range")]
    Socket(Errno),
    /// The kernel refused something that always works.
    #[error("the ping client cannot wait for its socket: {0}")]
    Poll(Errno),
    /// A request every 0 ms.
    #[error("interval_ms is 0; it must be at least 1")]
    Interval,
}

/// Pings until its duration is over or the control says stop.
///
/// # Errors
/// [`PingError`] when it could not run. Lost answers are a result.
pub fn run(p: &PingParameters, control: &mut Control, emit: &mut dyn FnMut(Output)) -> Result<PingReport, PingError> {
    if p.interval_ms == 0 {
        return Err(PingError::Interval);
    }
    let mut pinger = Pinger::new(p.address)?;
    emit(Output::Started { run: 0 });
    let mut stop_us = None;
    let (mut next_send_us, mut next_progress_us) = (0, 0);
    let mut now_us = pinger.now_us();
    loop {
        while let Some((at, command)) = control.poll() {
            let at_us = at.saturating_duration_since(pinger.start).as_micros() as u64;
            match command {
                Command::Mark(label) => {
                    pinger.meter.mark(&label, at_us);
                    emit(Output::Marked { label, t_ms: at_us as f64 / 1000.0 });
                }
                Command::Stop(true) => stop_us = stop_us.or(Some(at_us)),
                Command::Stop(false) | Command::InFlight(_) => {}
            }
        }
        if p.duration_ms != 0 && now_us >= p.duration_ms * 1000 {
            stop_us = stop_us.or(Some(now_us));
        }
        if let Some(stop_us) = stop_us
            && (pinger.answered == pinger.sent || now_us >= stop_us + p.drain_ms * 1000)
        {
            return Ok(pinger.finish(now_us));
        }
        if stop_us.is_none() && now_us >= next_send_us {
            pinger.send(now_us);
            // Behind time (the client was not scheduled): go on from now instead of sending a burst.
            next_send_us = (next_send_us + p.interval_ms * 1000).max(now_us);
        }
        if now_us >= next_progress_us {
            next_progress_us = now_us + p.progress_ms.max(10) * 1000;
            emit(Output::Progress(pinger.progress(now_us)));
        }
        let before_us = now_us;
        pinger.wait(next_send_us.saturating_sub(now_us).clamp(100, TICK_US)).map_err(PingError::Poll)?;
        now_us = pinger.now_us();
        let late_us = (now_us - before_us).saturating_sub(TICK_US);
        pinger.longest_stall_us = pinger.longest_stall_us.max(late_us);
        pinger.receive(now_us);
    }
}

struct Pinger {
    start: Instant,
    socket: OwnedFd,
    raw: bool,
    target: SocketAddrV4,
    mark: u64,
    meter: Meter,
    /// When each request left, in µs; u64::MAX once it is answered.
    sent_us: Vec<u64>,
    sent: u64,
    answered: u64,
    duplicates: u64,
    send_errors: u64,
    last_send_failed: bool,
    longest_stall_us: u64,
}

impl Pinger {
    fn new(target: Ipv4Addr) -> Result<Pinger, PingError> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let open = |kind| rustix::net::socket_with(AddressFamily::INET, kind, flags, Some(ipproto::ICMP));
        let (socket, raw) = match open(SocketType::DGRAM) {
            Ok(socket) => (socket, false),
            Err(_) => (open(SocketType::RAW).map_err(PingError::Socket)?, true),
        };
        let mark = u64::from(super::redis::fresh_run(0)) << 32 | u64::from(std::process::id());
        Ok(Pinger {
            start: Instant::now(),
            socket,
            raw,
            target: SocketAddrV4::new(target, 0),
            mark,
            meter: Meter::new(0),
            sent_us: Vec::with_capacity(65_536),
            sent: 0,
            answered: 0,
            duplicates: 0,
            send_errors: 0,
            last_send_failed: false,
            longest_stall_us: 0,
        })
    }

    fn now_us(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    fn send(&mut self, now_us: u64) {
        let packet = request(self.mark, self.sent_us.len() as u64);
        match rustix::net::sendto(&self.socket, &packet, SendFlags::empty(), &self.target) {
            Ok(_) => {
                self.sent += 1;
                self.last_send_failed = false;
                self.sent_us.push(now_us);
            }
            // No route, no neighbour, queue full: what a cut link looks like from here.
            Err(_) => {
                self.send_errors += 1;
                self.last_send_failed = true;
            }
        }
    }

    fn wait(&self, timeout_us: u64) -> Result<(), Errno> {
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        let timeout = Duration::from_micros(timeout_us);
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn receive(&mut self, now_us: u64) {
        let mut buffer = [0; 256];
        // An error of the socket (say, «host unreachable» from an earlier request) is reported once and then gone.
        while let Ok((count, _)) = rustix::net::recv(&self.socket, &mut buffer, RecvFlags::empty()) {
            let Some(number) = answer(&buffer[..count], self.raw, self.mark) else {
                continue;
            };
            let Some(sent_us) = self.sent_us.get_mut(number as usize) else {
                continue;
            };
            if *sent_us == u64::MAX {
                self.duplicates += 1;
                continue;
            }
            self.meter.latency(now_us, now_us.saturating_sub(*sent_us), 1);
            *sent_us = u64::MAX;
            self.answered += 1;
            let since_us = self.meter.last_answer_us();
            self.meter.answers(now_us, 1, since_us);
        }
    }

    fn progress(&self, now_us: u64) -> Progress {
        Progress {
            t_ms: now_us as f64 / 1000.0,
            ops: self.answered,
            last_answer_ms: now_us.saturating_sub(self.meter.last_answer_us()) as f64 / 1000.0,
            errors: self.send_errors,
            ..Progress::default()
        }
    }

    fn finish(self, now_us: u64) -> PingReport {
        // Silence at the end is a gap too if the last request could not even leave.
        let waiting = self.answered < self.sent || self.last_send_failed;
        let measured = self.meter.finish(now_us, waiting);
        PingReport {
            sent: self.sent,
            answered: self.answered,
            lost: self.sent - self.answered,
            duplicates: self.duplicates,
            send_errors: self.send_errors,
            gap_ms: measured.windows.iter().map(|window| window.gap_ms).fold(0.0, f64::max),
            windows: measured.windows,
            latency: measured.latency,
            longest_stall_ms: self.longest_stall_us as f64 / 1000.0,
        }
    }
}

/// An echo request (RFC 792). The kernel overwrites identifier and checksum on a ping socket.
fn request(mark: u64, number: u64) -> [u8; PACKET_BYTES] {
    let mut packet = [0; PACKET_BYTES];
    packet[0] = ECHO_REQUEST;
    packet[4..6].copy_from_slice(&(mark as u16).to_be_bytes());
    packet[6..8].copy_from_slice(&(number as u16).to_be_bytes());
    packet[8..16].copy_from_slice(&mark.to_be_bytes());
    packet[16..24].copy_from_slice(&number.to_be_bytes());
    let checksum = checksum(&packet);
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// The number of the request that `packet` answers, if it answers one of ours. A raw socket delivers the IP header too.
fn answer(packet: &[u8], raw: bool, mark: u64) -> Option<u64> {
    let header_bytes = if raw { usize::from(packet.first()? & 15) * 4 } else { 0 };
    let echo = packet.get(header_bytes..header_bytes + PACKET_BYTES)?;
    let theirs = u64::from_be_bytes(echo[8..16].try_into().ok()?);
    if echo[0] != ECHO_REPLY || theirs != mark {
        return None;
    }
    Some(u64::from_be_bytes(echo[16..24].try_into().ok()?))
}

/// Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_answers_to_our_own_requests_count() {
        let mut packet = request(7, 70_000).to_vec();
        assert_eq!(checksum(&packet), 0, "a packet with its checksum sums to zero");
        assert_eq!(answer(&packet, false, 7), None, "a request is no answer");
        packet[0] = ECHO_REPLY;
        assert_eq!(answer(&packet, false, 7), Some(70_000));
        assert_eq!(answer(&packet, false, 8), None);
        let mut with_header = vec![0x45; 20];
        with_header.extend_from_slice(&packet);
        assert_eq!(answer(&with_header, true, 7), Some(70_000));
        for cut in 0..with_header.len() {
            assert_eq!(answer(&with_header[..cut], true, 7), None);
        }
    }
}
