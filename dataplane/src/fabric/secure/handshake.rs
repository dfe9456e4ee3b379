//! From the first byte of a connection to the welcome, for both sides.
//!
//! The dialer opens with a preamble in the clear: magic 8, version u16, mode u8 (0 in the clear, 1 encrypted), zero
//! u8. A listener that cannot go on answers in the clear ([`Answer::Refused`]), so that nodes of other versions
//! and with other settings learn why. The preamble is the handshake's prologue: changing it on the way breaks the
//! handshake, and no side ever goes on in the other mode. When encrypted there follow
//!
//! ```text
//! dialer    Noise message 1 (48 bytes: e, psk)
//! listener  magic 8, Noise message 2 (48 bytes: e, ee)
//! dialer    record: hello           from here on everything is records
//! listener  record: answer
//! ```
//!
//! Whoever plays a recording again gets to the second step only, since its keys are new each time: so the hello is
//! the first thing that may have an effect. In the clear the hello follows the preamble at once.

use super::Security;
use super::cipher::{Cipher, Forged};
use crate::fabric::hello::{Answer, Hello, MAX_HELLO_BYTES, NotAnAnswer, VERSION};
use crate::fabric::{Refusal, RefusalCode};
use snow::{Builder, HandshakeState};

const PREAMBLE_BYTES: usize = 12;
const PREAMBLE_MAGIC: [u8; 8] = *b"PLVRHELO";
/// Tells the second Noise message from a refusal in the clear.
const KEYED_MAGIC: [u8; 8] = *b"PLVRNOIS";
/// An ephemeral key and a tag.
const NOISE_BYTES: usize = 48;
const NOISE_PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_BLAKE2s";
const TAG_BYTES: usize = 16;
const RECORD_HEADER_BYTES: usize = 2;
const MAX_HELLO_RECORD_BYTES: usize = MAX_HELLO_BYTES + TAG_BYTES;

fn preamble(security: &Security) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(&PREAMBLE_MAGIC);
    bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
    bytes[10] = u8::from(matches!(security, Security::Encrypted(_)));
    bytes
}

/// `Ok(false)`: more bytes are needed.
fn check_preamble(bytes: &[u8], security: &Security) -> Result<bool, Refusal> {
    let magic = &bytes[..bytes.len().min(PREAMBLE_MAGIC.len())];
    if !PREAMBLE_MAGIC.starts_with(magic) {
        return Err(Refusal::malformed("something else"));
    }
    let Some(bytes) = bytes.first_chunk::<PREAMBLE_BYTES>() else {
        return Ok(false);
    };
    let version = u16::from_le_bytes([bytes[8], bytes[9]]);
    if version != VERSION {
        let text = format!(
            "this node speaks fabric protocol version {VERSION}, the connecting one speaks {version}; run the \
             same release of plover on all nodes"
        );
        return Err(Refusal::new(RefusalCode::Version, text));
    }
    if *bytes == preamble(security) {
        return Ok(true);
    }
    let text = match (bytes[10], security) {
        (0, Security::Encrypted(_)) => {
            "this node encrypts the fabric, the connecting one has `insecure = true`; remove that from its node.toml"
        }
        (1, Security::Insecure) => {
            "this node has `insecure = true`, the connecting one encrypts the fabric; remove that from this node's \
             node.toml"
        }
        _ => return Err(Refusal::malformed("an unknown mode")),
    };
    Err(Refusal::new(RefusalCode::Mode, text.to_owned()))
}

fn noise(key: &[u8; 32], security: &Security, initiator: bool) -> HandshakeState {
    let prologue = preamble(security);
    let build = || {
        let builder = Builder::new(NOISE_PATTERN.parse()?).psk(0, key)?.prologue(&prologue)?;
        if initiator { builder.build_initiator() } else { builder.build_responder() }
    };
    // Nothing of it depends on input; a pattern that the library lacks would fail every test.
    build().expect("the library knows the pattern")
}

/// The next Noise message of a handshake; the payload is empty.
fn write_message(noise: &mut HandshakeState, out: &mut Vec<u8>) {
    let mut message = [0; NOISE_BYTES];
    let bytes = noise.write_message(&[], &mut message).expect("the kernel has random numbers, and it is our turn");
    out.extend_from_slice(&message[..bytes]);
}

fn read_message(noise: &mut HandshakeState, message: &[u8]) -> Result<(), snow::Error> {
    noise.read_message(message, &mut [0; NOISE_BYTES]).map(drop)
}

fn into_cipher(noise: HandshakeState) -> Cipher {
    Cipher::new(noise.into_transport_mode().expect("both messages are through"))
}

/// The first record in `bytes`, opened; its length is removed from `bytes` too.
fn take_record(bytes: &mut Vec<u8>, cipher: &mut Cipher) -> Result<Option<Vec<u8>>, Forged> {
    let Some((header, message)) = bytes.split_first_chunk::<RECORD_HEADER_BYTES>() else {
        return Ok(None);
    };
    let Some(message) = message.get(..usize::from(u16::from_le_bytes(*header))) else {
        return Ok(None);
    };
    let mut plain = vec![0; message.len()];
    let len = cipher.open(message, &mut plain)?;
    plain.truncate(len);
    bytes.drain(..RECORD_HEADER_BYTES + message.len());
    Ok(Some(plain))
}

/// The wire form of an answer, in the clear or as a record.
pub(in crate::fabric) fn encode_answer(answer: &Answer, cipher: Option<&mut Cipher>) -> Vec<u8> {
    let clear = answer.encode();
    let Some(cipher) = cipher else {
        return clear;
    };
    let mut record = Vec::new();
    cipher.seal([clear.as_slice()], &mut record);
    record
}

/// The listening side.
#[derive(Debug)]
pub(in crate::fabric) struct Accept {
    security: Security,
    state: Accepting,
}

#[derive(Debug)]
enum Accepting {
    /// Nothing is known of the dialer yet.
    Preamble,
    /// It has the common version and mode.
    Keying,
    /// The hello is next.
    Hello(Option<Box<Cipher>>),
}

impl Accept {
    pub fn new(security: Security) -> Accept {
        Accept { security, state: Accepting::Preamble }
    }

    /// Not a preamble has come.
    pub fn is_untouched(&self) -> bool {
        matches!(self.state, Accepting::Preamble)
    }

    /// Consumes what it can of the received bytes and appends what is to be sent. `Some`: the hello, from a
    /// dialer that holds the key.
    ///
    /// # Errors
    /// What to answer, by [`answer`](Self::answer).
    pub fn advance(&mut self, received: &mut Vec<u8>, out: &mut Vec<u8>) -> Result<Option<Hello>, Refusal> {
        if matches!(self.state, Accepting::Preamble) {
            if !check_preamble(received, &self.security)? {
                return Ok(None);
            }
            received.drain(..PREAMBLE_BYTES);
            self.state = match &self.security {
                Security::Encrypted(_) => Accepting::Keying,
                Security::Insecure => Accepting::Hello(None),
            };
        }
        if matches!(self.state, Accepting::Keying) {
            if received.len() < NOISE_BYTES {
                return Ok(None);
            }
            let cipher = self.agree(&received[..NOISE_BYTES], out)?;
            received.drain(..NOISE_BYTES);
            self.state = Accepting::Hello(Some(Box::new(cipher)));
        }
        let Accepting::Hello(cipher) = &mut self.state else { unreachable!("the states before are done") };
        let Some(cipher) = cipher else {
            return Hello::parse(received);
        };
        if let Some(header) = received.first_chunk::<RECORD_HEADER_BYTES>()
            && usize::from(u16::from_le_bytes(*header)) > MAX_HELLO_RECORD_BYTES
        {
            return Err(Refusal::malformed("a hello of an impossible length"));
        }
        let replayed = |_| {
            let text = "the first record of the connection does not open: the connecting side does not hold the \
                        fabric key but repeats what it recorded, or bytes were changed on the way";
            Refusal::new(RefusalCode::Forged, text.to_owned())
        };
        let Some(hello) = take_record(received, cipher).map_err(replayed)? else {
            return Ok(None);
        };
        match Hello::parse(&hello)? {
            Some(hello) if received.is_empty() => Ok(Some(hello)),
            Some(_) => Err(Refusal::malformed("more than a hello")),
            None => Err(Refusal::malformed("half a hello")),
        }
    }

    /// Reads the first Noise message and writes the second.
    fn agree(&self, message: &[u8], out: &mut Vec<u8>) -> Result<Cipher, Refusal> {
        let Security::Encrypted(key) = &self.security else { unreachable!("there are keys only when encrypted") };
        let opened = key.to_accept().iter().find_map(|key| {
            let mut noise = noise(key, &self.security, false);
            read_message(&mut noise, message).is_ok().then_some(noise)
        });
        let Some(mut noise) = opened else {
            let text = "the fabric key differs; copy the same key file (`fabric_key` in node.toml) to all nodes";
            return Err(Refusal::new(RefusalCode::WrongKey, text.to_owned()));
        };
        out.extend_from_slice(&KEYED_MAGIC);
        write_message(&mut noise, out);
        Ok(into_cipher(noise))
    }

    /// The wire form of an answer at this point of the handshake.
    pub fn answer(&mut self, answer: &Answer) -> Vec<u8> {
        match &mut self.state {
            Accepting::Hello(Some(cipher)) => encode_answer(answer, Some(cipher)),
            Accepting::Hello(None) | Accepting::Preamble | Accepting::Keying => answer.encode(),
        }
    }

    /// Ends the handshake; for records from now on.
    pub fn into_cipher(self) -> Option<Box<Cipher>> {
        match self.state {
            Accepting::Hello(cipher) => cipher,
            Accepting::Preamble | Accepting::Keying => None,
        }
    }
}

/// Why a dialer gave up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::fabric) enum DialError {
    /// The answer is none.
    #[error(transparent)]
    NotPlover(#[from] NotAnAnswer),
    /// The second Noise message is not by a holder of the key.
    #[error(
        "what answers there does not hold the fabric key; copy the same key file (`fabric_key` in node.toml) to all nodes"
    )]
    WrongKey,
    /// A record does not open.
    #[error(transparent)]
    Forged(#[from] Forged),
    /// An answer that an encrypting listener gives under encryption only.
    #[error(
        "what answers there does so in the clear, and this node encrypts the fabric; it is not a plover that holds \
         the fabric key"
    )]
    InTheClear,
}

/// How a greeting ended.
#[derive(Debug)]
pub(in crate::fabric) enum Greeted {
    /// Messages can flow, in records if there is a cipher.
    Welcome {
        instance: u64,
        cipher: Option<Box<Cipher>>,
    },
    Refused(Refusal),
}

/// The dialing side.
#[derive(Debug)]
pub(in crate::fabric) struct Dialer {
    /// Sent once it is safe to.
    hello: Vec<u8>,
    state: Dialing,
}

#[derive(Debug)]
enum Dialing {
    /// The second Noise message is next.
    Keying(Box<HandshakeState>),
    /// The answer is next.
    Greeting(Option<Box<Cipher>>),
}

impl Dialer {
    /// Appends the first bytes to `out`.
    pub fn new(security: &Security, hello: &Hello, out: &mut Vec<u8>) -> Dialer {
        let mut encoded = Vec::new();
        hello.encode(&mut encoded);
        Dialer::with_encoded(security, encoded, out)
    }

    /// The same with a hello that is encoded already.
    pub fn with_encoded(security: &Security, mut encoded: Vec<u8>, out: &mut Vec<u8>) -> Dialer {
        out.extend_from_slice(&preamble(security));
        match security {
            Security::Insecure => {
                out.append(&mut encoded);
                Dialer { hello: encoded, state: Dialing::Greeting(None) }
            }
            Security::Encrypted(key) => {
                let mut noise = noise(key.to_dial(), security, true);
                write_message(&mut noise, out);
                Dialer { hello: encoded, state: Dialing::Keying(Box::new(noise)) }
            }
        }
    }

    /// Consumes what it can of the received bytes and appends what is to be sent. Behind a welcome the bytes of
    /// the first messages may be left in `received`. Not to be called again after `Some`.
    ///
    /// # Errors
    /// The connection is of no use.
    pub fn advance(&mut self, received: &mut Vec<u8>, out: &mut Vec<u8>) -> Result<Option<Greeted>, DialError> {
        if let Dialing::Keying(noise) = &mut self.state {
            if !KEYED_MAGIC.starts_with(&received[..received.len().min(KEYED_MAGIC.len())]) {
                return refusal_in_the_clear(received);
            }
            let Some(message) = received.get(KEYED_MAGIC.len()..KEYED_MAGIC.len() + NOISE_BYTES) else {
                return Ok(None);
            };
            read_message(noise, message).map_err(|_| DialError::WrongKey)?;
            received.drain(..KEYED_MAGIC.len() + NOISE_BYTES);
            let Dialing::Keying(noise) = std::mem::replace(&mut self.state, Dialing::Greeting(None)) else {
                unreachable!("the state was just looked at")
            };
            let mut cipher = Box::new(into_cipher(*noise));
            cipher.seal([self.hello.as_slice()], out);
            self.state = Dialing::Greeting(Some(cipher));
        }
        let Dialing::Greeting(cipher) = &mut self.state else { unreachable!("the state before is done") };
        let answer = match cipher {
            None => match Answer::parse(received)? {
                None => return Ok(None),
                Some((answer, length)) => {
                    received.drain(..length);
                    answer
                }
            },
            Some(cipher) => match take_record(received, cipher)? {
                None => return Ok(None),
                Some(plain) => match Answer::parse(&plain)? {
                    Some((answer, length)) if length == plain.len() => answer,
                    _ => return Err(NotAnAnswer.into()),
                },
            },
        };
        Ok(Some(match answer {
            Answer::Welcome { instance } => Greeted::Welcome { instance, cipher: cipher.take() },
            Answer::Refused(refusal) => Greeted::Refused(refusal),
        }))
    }

    /// How many bytes [`advance`](Self::advance) lacks, never more than the greeting has: for a reader that must
    /// not take bytes of the messages behind it.
    pub fn missing_bytes(&self, received: &[u8]) -> usize {
        let needed = match &self.state {
            Dialing::Keying(_) if received.len() < KEYED_MAGIC.len() => KEYED_MAGIC.len(),
            Dialing::Keying(_) if received.starts_with(&KEYED_MAGIC) => KEYED_MAGIC.len() + NOISE_BYTES,
            Dialing::Keying(_) | Dialing::Greeting(None) => return Answer::missing_bytes(received),
            Dialing::Greeting(Some(_)) => match received.first_chunk::<RECORD_HEADER_BYTES>() {
                None => RECORD_HEADER_BYTES,
                Some(header) => RECORD_HEADER_BYTES + usize::from(u16::from_le_bytes(*header)),
            },
        };
        needed.saturating_sub(received.len())
    }
}

/// What a listener says before there are keys. Anybody on the way could have written it, so it can only refuse, and
/// only for reasons that there are before the hello.
fn refusal_in_the_clear(received: &[u8]) -> Result<Option<Greeted>, DialError> {
    use RefusalCode::{Mode, NotPlover, Other, Version, WrongKey};
    match Answer::parse(received)? {
        None => Ok(None),
        Some((Answer::Refused(refusal), _))
            if matches!(refusal.code, NotPlover | Version | Mode | WrongKey | Other) =>
        {
            Ok(Some(Greeted::Refused(refusal)))
        }
        Some(_) => Err(DialError::InTheClear),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fabric::PeerId;
    use crate::fabric::hello::Lane;
    use crate::fabric::secure::FabricKey;
    use proptest::prelude::*;

    fn hello() -> Hello {
        let (group, node) = ("vm1".to_owned(), "node0".to_owned());
        let (lane, from, to, transport) = (Lane::Control, PeerId(0), PeerId(1), crate::fabric::Transport::Tcp);
        Hello { lane, from, to, transport, instance: 7, view: 0, number: 0, group, node }
    }

    fn keyed() -> Security {
        Security::Encrypted(FabricKey::from_bytes([5; 32]))
    }

    /// Both sides in step, each byte on its own in both directions if `bytewise`.
    fn greet(security: &Security, answer: &Answer, bytewise: bool) -> (Greeted, Option<Box<Cipher>>) {
        let (mut at_dialer, mut at_listener, mut to_listener, mut to_dialer) = (vec![], vec![], vec![], vec![]);
        let mut dialer = Dialer::new(security, &hello(), &mut to_listener);
        let mut accept = Accept::new(security.clone());
        let mut answered = false;
        for _ in 0..2000 {
            let step = |bytes: &Vec<u8>| if bytewise { 1.min(bytes.len()) } else { bytes.len() };
            at_listener.extend(to_listener.drain(..step(&to_listener)));
            if !answered && let Some(got) = accept.advance(&mut at_listener, &mut to_dialer).unwrap() {
                assert_eq!(got, hello());
                to_dialer.extend(accept.answer(answer));
                answered = true;
            }
            // Never more than is needed, as on the bulk lane.
            let wanted = step(&to_dialer).min(dialer.missing_bytes(&at_dialer));
            at_dialer.extend(to_dialer.drain(..wanted));
            if let Some(greeted) = dialer.advance(&mut at_dialer, &mut to_listener).unwrap() {
                assert!(at_dialer.is_empty() && to_dialer.is_empty());
                return (greeted, accept.into_cipher());
            }
        }
        panic!("the handshake does not end");
    }

    #[test]
    fn both_sides_agree_however_the_bytes_arrive() {
        for security in [keyed(), Security::Insecure] {
            for bytewise in [false, true] {
                let (greeted, far) = greet(&security, &Answer::Welcome { instance: 9 }, bytewise);
                let Greeted::Welcome { instance: 9, cipher: near } = greeted else { panic!("{greeted:?}") };
                assert_eq!(near.is_some(), matches!(security, Security::Encrypted(_)));
                assert_eq!(near.is_some(), far.is_some());
                let refusal = Refusal::new(RefusalCode::UnknownGroup, "no".repeat(400));
                let (greeted, _) = greet(&security, &Answer::Refused(refusal.clone()), bytewise);
                assert!(matches!(greeted, Greeted::Refused(same) if same == refusal));
            }
        }
    }

    #[test]
    fn a_preamble_changed_on_the_way_breaks_the_handshake() {
        // A listener of another build, which would take any preamble: the dialer said something else.
        let mut sent = Vec::new();
        let _dialer = Dialer::new(&keyed(), &hello(), &mut sent);
        let Security::Encrypted(key) = keyed() else { unreachable!() };
        let mut listener = noise(key.to_dial(), &Security::Insecure, false);
        assert!(read_message(&mut listener, &sent[PREAMBLE_BYTES..]).is_err(), "the mode is part of the handshake");
        let mut listener = noise(key.to_dial(), &keyed(), false);
        assert!(read_message(&mut listener, &sent[PREAMBLE_BYTES..]).is_ok());
    }

    #[test]
    fn every_connection_has_keys_of_its_own() {
        let mut sent = [Vec::new(), Vec::new()];
        for out in &mut sent {
            Dialer::new(&keyed(), &hello(), out);
        }
        assert_eq!(sent[0][..PREAMBLE_BYTES], sent[1][..PREAMBLE_BYTES]);
        assert_ne!(sent[0][PREAMBLE_BYTES..], sent[1][PREAMBLE_BYTES..]);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            crate::fabric::fuzz::hello(&bytes);
        }
    }
}
