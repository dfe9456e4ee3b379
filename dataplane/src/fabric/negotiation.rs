//! Both sides' way from a greeted connection to a lane: they exchange offers, and each says when its end is up.
//!
//! Messages on the connection, the first byte tells which: offer, ready, failed (with a text). A side that fails says so,
//! because the other one's log is often where somebody looks.

use super::lane::{self, Lane, LaneSetup, MAX_OFFER_BYTES, SetupContext, SetupError, SetupProgress, Transport};

const OFFER: u8 = 1;
const READY: u8 = 2;
const FAILED: u8 = 3;
const MAX_TEXT_BYTES: usize = 1000;

/// Why there will be no lane on this connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// This side cannot.
    #[error(transparent)]
    Ours(#[from] SetupError),
    /// The other side cannot, in its words.
    #[error("the peer says: {0}")]
    Theirs(String),
}

impl Failure {
    /// What to tell the peer, if it does not know.
    pub fn message(&self) -> Option<Vec<u8>> {
        match self {
            Failure::Ours(error) => {
                let text = error.to_string().into_bytes();
                Some([&[FAILED], &text[..text.len().min(MAX_TEXT_BYTES)]].concat())
            }
            Failure::Theirs(_) => None,
        }
    }
}

/// See the module.
pub(super) struct Negotiation {
    transport: Transport,
    setup: Box<dyn LaneSetup>,
    peer_offer: Option<Vec<u8>>,
    lane: Option<Box<dyn Lane>>,
    peer_is_ready: bool,
}

impl Negotiation {
    /// Begins; the bytes are the first message for the peer.
    ///
    /// # Errors
    /// [`Failure::Ours`].
    pub fn begin(transport: Transport, context: &SetupContext) -> Result<(Negotiation, Vec<u8>), Failure> {
        let (setup, offer) = lane::begin(transport, context)?;
        assert!(offer.len() <= MAX_OFFER_BYTES, "an offer of {} bytes", offer.len());
        let negotiation = Negotiation { transport, setup, peer_offer: None, lane: None, peer_is_ready: false };
        Ok((negotiation, [&[OFFER], &offer[..]].concat()))
    }

    /// Takes a message of the peer.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn receive(&mut self, message: &[u8]) -> Result<(), Failure> {
        match message.split_first() {
            Some((&OFFER, offer)) if self.peer_offer.is_none() && offer.len() <= MAX_OFFER_BYTES => {
                self.peer_offer = Some(offer.to_vec());
                Ok(())
            }
            Some((&READY, [])) if self.peer_offer.is_some() && !self.peer_is_ready => {
                self.peer_is_ready = true;
                Ok(())
            }
            Some((&FAILED, text)) => {
                let text = &text[..text.len().min(MAX_TEXT_BYTES)];
                Err(Failure::Theirs(String::from_utf8_lossy(text).into_owned()))
            }
            _ => Err(self.fail("the peer breaks the rules of the set-up; run one version on all nodes")),
        }
    }

    /// Goes on; `send` takes messages for the peer. The lane, as soon as both ends are up.
    ///
    /// # Errors
    /// [`Failure::Ours`].
    pub fn advance(&mut self, now_us: u64, send: &mut dyn FnMut(&[u8])) -> Result<Option<Box<dyn Lane>>, Failure> {
        if let Some(offer) = &self.peer_offer
            && self.lane.is_none()
            && let SetupProgress::Up(lane) = self.setup.complete(offer, now_us)?
        {
            self.lane = Some(lane);
            send(&[READY]);
        }
        let mut lane = if self.peer_is_ready { self.lane.take() } else { None };
        if let Some(lane) = &mut lane {
            lane.peer_is_up();
        }
        Ok(lane)
    }

    /// Whether it must be tried again without anything coming from the peer.
    pub fn is_under_way(&self) -> bool {
        self.peer_offer.is_some() && self.lane.is_none()
    }

    /// The owner gives up.
    pub fn timed_out(&self) -> Failure {
        self.fail("it took too long; is the peer overloaded?")
    }

    fn fail(&self, what: &str) -> Failure {
        Failure::Ours(SetupError { transport: self.transport, what: what.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn context(we_dial: bool) -> SetupContext {
        let addr = "127.0.0.1:1".parse().unwrap();
        SetupContext {
            we_dial,
            local: addr,
            peer: addr,
            ring_bytes: 4096,
            max_message_bytes: 1000,
            max_queued_bytes: 1000,
            deadline_us: u64::MAX,
        }
    }

    #[test]
    fn a_lane_is_up_when_both_ends_are() {
        let (mut dialer, offer) = Negotiation::begin(Transport::Shm, &context(true)).unwrap();
        let (mut acceptor, answer) = Negotiation::begin(Transport::Shm, &context(false)).unwrap();
        let mut sent = Vec::new();
        assert!(dialer.advance(0, &mut |_| panic!("nothing has come")).unwrap().is_none());
        dialer.receive(&answer).unwrap();
        assert!(dialer.advance(0, &mut |bytes| sent.push(bytes.to_vec())).unwrap().is_none());
        assert_eq!(sent, [[READY]]);
        acceptor.receive(&offer).unwrap();
        acceptor.receive(&sent[0]).unwrap();
        assert!(acceptor.advance(0, &mut |bytes| sent.push(bytes.to_vec())).unwrap().is_some());
        dialer.receive(&sent[1]).unwrap();
        assert!(dialer.advance(0, &mut |_| panic!("it is said")).unwrap().is_some());
    }

    #[test]
    fn a_failure_reaches_the_other_side_in_words() {
        let (mut dialer, _) = Negotiation::begin(Transport::Shm, &context(true)).unwrap();
        let (mut acceptor, _) = Negotiation::begin(Transport::Shm, &context(false)).unwrap();
        let offer = [&[OFFER], &b"SHM1\0\x10\0\0plover-lane-0123456789abcdef0123456789abcdef"[..]].concat();
        acceptor.receive(&offer).unwrap();
        let Err(failure) = acceptor.advance(0, &mut |_| ()) else { panic!("there is no such file") };
        let message = failure.message().unwrap();
        let theirs = dialer.receive(&message).unwrap_err();
        assert!(theirs.to_string().starts_with("the peer says: cannot set up the shm lane: there is no /dev/shm/"));
        assert_eq!(theirs.message(), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_make_no_lane(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            crate::fabric::fuzz::lane(&bytes);
        }

        #[test]
        fn arbitrary_messages_never_panic(
            messages in prop::collection::vec((0u8..5, prop::collection::vec(any::<u8>(), 0..60)), 0..6),
        ) {
            let (mut acceptor, _) = Negotiation::begin(Transport::Shm, &context(false)).unwrap();
            for (kind, rest) in messages {
                let message = [&[kind], &rest[..]].concat();
                if acceptor.receive(&message).is_err() || acceptor.advance(0, &mut |_| ()).is_err() {
                    break;
                }
            }
            prop_assert!(acceptor.lane.is_none());
        }
    }
}
