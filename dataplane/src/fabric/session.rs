//! A greeted connection to a peer, and the lane that its messages take.
//!
//! Over TCP the two are the same. Otherwise the connection carries the set-up, pings and doorbells, and its end is the
//! lane's end.

use super::connection::Connection;
use super::lane::{CONTROL_RING_BYTES, Lane, LaneError, Polled, SetupContext, Transport};
use super::negotiation::{Failure, Negotiation};
use super::{LostReason, MAX_CONTROL_MESSAGE_BYTES, SendError};
use rustix::fd::{AsFd, BorrowedFd};
use std::fmt;
use std::net::SocketAddr;

/// Between two looks at a set-up that waits for a device.
const SETUP_RETRY_US: u64 = 500;
/// Pumps of a lane whose connection has ended: more than any ring holds, and an end for a peer that goes on writing.
const MAX_LAST_PUMPS: usize = 1 << 14;

/// See the module.
pub(super) struct Session {
    // Before the connection, whose end the peer takes for the lane's: what was sent is to arrive first.
    carrier: Carrier,
    pub connection: Connection,
}

enum Carrier {
    Stream,
    SettingUp {
        negotiation: Negotiation,
        deadline_us: u64,
        retry_us: u64,
    },
    Lane(Box<dyn Lane>),
    /// There will be no lane; the connection is broken off with the reason.
    None,
}

/// What a session needs to know for its lane.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub transport: Transport,
    pub we_dial: bool,
    pub max_queued_bytes: usize,
    /// For the set-up.
    pub deadline_us: u64,
}

impl Session {
    /// Begins the way to the lane; over TCP it ends here.
    pub fn new(connection: Connection, plan: Plan) -> Session {
        let mut session = Session { connection, carrier: Carrier::Stream };
        if plan.transport != Transport::Tcp {
            session.begin(plan);
        }
        session
    }

    fn begin(&mut self, plan: Plan) {
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let local = rustix::net::getsockname(&self.connection).ok().and_then(|addr| SocketAddr::try_from(addr).ok());
        let context = SetupContext {
            we_dial: plan.we_dial,
            local: local.unwrap_or(unknown),
            peer: self.connection.peer_addr().unwrap_or(unknown),
            ring_bytes: CONTROL_RING_BYTES,
            max_message_bytes: MAX_CONTROL_MESSAGE_BYTES,
            max_queued_bytes: plan.max_queued_bytes,
            deadline_us: plan.deadline_us,
        };
        match Negotiation::begin(plan.transport, &context) {
            Ok((negotiation, offer)) => {
                self.tell(&offer);
                let deadline_us = plan.deadline_us;
                self.carrier = Carrier::SettingUp { negotiation, deadline_us, retry_us: u64::MAX };
            }
            Err(failure) => self.give_up(&failure),
        }
    }

    /// Whether messages flow.
    pub fn is_up(&self) -> bool {
        matches!(self.carrier, Carrier::Stream | Carrier::Lane(_))
    }

    /// Whether there is a lane beside the connection.
    pub fn has_lane(&self) -> bool {
        matches!(self.carrier, Carrier::Lane(_))
    }

    /// Sends a message; see [`Fabric::send`](super::Fabric::send).
    ///
    /// # Errors
    /// [`SendError`].
    pub fn send(&mut self, parts: &[&[u8]], max_queued_bytes: usize) -> Result<(), SendError> {
        match &mut self.carrier {
            Carrier::Stream => self.connection.send(parts, max_queued_bytes),
            Carrier::Lane(lane) => {
                let bytes: usize = parts.iter().map(|part| part.len()).sum();
                if bytes == 0 || bytes > MAX_CONTROL_MESSAGE_BYTES {
                    return Err(SendError::BadLength { bytes });
                }
                if self.connection.is_broken() {
                    return Err(SendError::NotConnected);
                }
                lane.send(parts).map_err(|_| SendError::Full)?;
                if lane.take_early_doorbell() {
                    self.connection.ping();
                }
                Ok(())
            }
            Carrier::SettingUp { .. } | Carrier::None => Err(SendError::NotConnected),
        }
    }

    /// Messages' bytes that wait at this side.
    pub fn queued_bytes(&self) -> usize {
        match &self.carrier {
            Carrier::Stream => self.connection.queued_bytes(),
            Carrier::Lane(lane) => lane.queued_bytes(),
            Carrier::SettingUp { .. } | Carrier::None => 0,
        }
    }

    /// Makes progress on all of it. `true`: it has just come up; to be called again then.
    ///
    /// # Errors
    /// The session has ended. Every message that came before the end was handed out.
    pub fn pump(&mut self, now_us: u64, deliver: &mut dyn FnMut(&[u8])) -> Result<bool, LostReason> {
        match &mut self.carrier {
            Carrier::Stream | Carrier::None => self.connection.pump(now_us, deliver).map(|()| false),
            Carrier::SettingUp { .. } => self.set_up(now_us),
            Carrier::Lane(lane) => {
                lane.disarm();
                let mut strays = 0;
                let ended = self.connection.pump(now_us, &mut |_| strays += 1);
                if let Err(reason) = ended {
                    if reason != LostReason::Disconnected {
                        hand_out_the_rest(&mut **lane, deliver)?;
                    }
                    return Err(reason);
                }
                if strays > 0 {
                    return Err(LostReason::Lane("the peer sent a message beside the lane".to_owned()));
                }
                let messages = lane.pump(deliver)?;
                let rings = lane.take_doorbell();
                self.polled(now_us, Polled { messages, rings });
                Ok(false)
            }
        }
    }

    /// Makes progress on the lane only, without a system call unless its device needs one; and only if it is time to.
    ///
    /// # Errors
    /// As [`pump`](Self::pump).
    #[inline]
    pub fn poll_lane(&mut self, now_us: u64, deliver: &mut dyn FnMut(&[u8])) -> Result<(), LostReason> {
        let Carrier::Lane(lane) = &mut self.carrier else {
            return Ok(());
        };
        let polled = lane.poll(deliver)?;
        self.polled(now_us, polled);
        Ok(())
    }

    #[inline]
    fn polled(&mut self, now_us: u64, polled: Polled) {
        if polled.messages > 0 {
            self.connection.last_heard_us = now_us;
        }
        if polled.rings {
            self.connection.ping();
        }
    }

    /// Before the owner sleeps; `true`: there is something already.
    pub fn arm(&mut self) -> bool {
        match &mut self.carrier {
            Carrier::Lane(lane) => {
                if lane.take_doorbell() {
                    self.connection.ping();
                }
                lane.arm()
            }
            Carrier::Stream | Carrier::SettingUp { .. } | Carrier::None => false,
        }
    }

    /// What wakes besides the connection.
    pub fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.carrier {
            Carrier::Lane(lane) => lane.event_fd(),
            Carrier::Stream | Carrier::SettingUp { .. } | Carrier::None => None,
        }
    }

    /// When [`pump`](Self::pump) is needed for the set-up, at the latest.
    pub fn setup_deadline_us(&self) -> u64 {
        match &self.carrier {
            Carrier::SettingUp { deadline_us, retry_us, .. } => (*deadline_us).min(*retry_us),
            Carrier::Stream | Carrier::Lane(_) | Carrier::None => u64::MAX,
        }
    }

    fn set_up(&mut self, now_us: u64) -> Result<bool, LostReason> {
        let Carrier::SettingUp { negotiation, deadline_us, retry_us } = &mut self.carrier else {
            unreachable!("called while setting up")
        };
        let mut result = Ok(());
        let ended = self.connection.pump(now_us, &mut |message| {
            if result.is_ok() {
                result = negotiation.receive(message);
            }
        });
        let mut to_tell = Vec::new();
        let advanced = result.and_then(|()| negotiation.advance(now_us, &mut |bytes| to_tell.push(bytes.to_vec())));
        *retry_us = if negotiation.is_under_way() { now_us + SETUP_RETRY_US } else { u64::MAX };
        let late = *deadline_us <= now_us;
        let advanced = match advanced {
            Ok(None) if late => Err(negotiation.timed_out()),
            other => other,
        };
        for message in to_tell {
            self.tell(&message);
        }
        match advanced {
            Ok(None) => ended.map(|()| false),
            Ok(Some(lane)) => {
                ended?;
                self.carrier = Carrier::Lane(lane);
                Ok(true)
            }
            Err(failure) => {
                self.give_up(&failure);
                Err(LostReason::Lane(failure.to_string()))
            }
        }
    }

    fn give_up(&mut self, failure: &Failure) {
        if let Some(message) = failure.message() {
            self.tell(&message);
        }
        self.carrier = Carrier::None;
        self.connection.break_off(LostReason::Lane(failure.to_string()));
    }

    /// A message of the set-up. They are few and short; should the socket not take one, the deadline ends it.
    fn tell(&mut self, message: &[u8]) {
        let _ = self.connection.send(&[message], usize::MAX);
    }
}

impl From<LaneError> for LostReason {
    fn from(error: LaneError) -> LostReason {
        LostReason::Lane(error.to_string())
    }
}

fn hand_out_the_rest(lane: &mut dyn Lane, deliver: &mut dyn FnMut(&[u8])) -> Result<(), LostReason> {
    for _ in 0..MAX_LAST_PUMPS {
        if lane.pump(deliver)? == 0 {
            break;
        }
    }
    Ok(())
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("connection", &self.connection).finish_non_exhaustive()
    }
}
