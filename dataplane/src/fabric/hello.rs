//! What the dialer says of itself, and the answer to it. What comes before them, and what encrypts them, is in
//! [`secure`](super::secure).
//!
//! All little-endian. Hello: length u16, lane u8, from u8, to u8, group length u8, node length u8, transport u8,
//! instance u64, view u64, number u64, group, node. Answer: magic 8, code u8, zero u8, text length u16, zero u32,
//! instance u64, text. Both parsers are total.

use super::PeerId;
use super::lane::Transport;

/// Of everything that crosses the fabric below the messages.
pub(super) const VERSION: u16 = 2;
const ANSWER_MAGIC: [u8; 8] = *b"PLVRANSW";
const HELLO_FIXED_BYTES: usize = 32;
const ANSWER_FIXED_BYTES: usize = 24;
/// Longest name of a node or a group, bytes.
pub(super) const MAX_NAME_BYTES: usize = 255;
pub(super) const MAX_HELLO_BYTES: usize = HELLO_FIXED_BYTES + 2 * MAX_NAME_BYTES;
const MAX_TEXT_BYTES: usize = 1000;

/// What the connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    Control,
    Bulk,
}

/// Who dials, whom, and for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub lane: Lane,
    pub from: PeerId,
    pub to: PeerId,
    /// What the dialer's configuration wants for the pair.
    pub transport: Transport,
    pub instance: u64,
    /// For the bulk lane's user; 0 on the control lane.
    pub view: u64,
    /// For the bulk lane's user; 0 on the control lane.
    pub number: u64,
    pub group: String,
    pub node: String,
}

/// Why a node will not talk to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RefusalCode {
    /// The bytes are no hello; something else connected to the port.
    NotPlover = 1,
    /// Another protocol version.
    Version = 2,
    /// The group is not (or not yet) served here.
    UnknownGroup = 3,
    /// The dialer means another replica than the one served here, or itself.
    WrongReplica = 4,
    /// The dialer's node name is not the one that the group's configuration gives.
    WrongNode = 5,
    /// Another live node has the same name.
    SameName = 6,
    /// Too many connections wait; the dialer will try again.
    Busy = 7,
    /// One of the two nodes encrypts and the other does not.
    Mode = 8,
    /// The two nodes have different keys.
    WrongKey = 9,
    /// The dialer repeats the start of somebody else's connection.
    Forged = 10,
    /// The two nodes' configurations want different transports for the pair.
    Transport = 11,
    /// The lane over the wanted transport cannot be set up. Never crosses the wire as an answer.
    Lane = 12,
    /// A code that a newer version made up.
    Other = 255,
}

impl RefusalCode {
    fn from_wire(code: u8) -> RefusalCode {
        use RefusalCode::*;
        [
            NotPlover,
            Version,
            UnknownGroup,
            WrongReplica,
            WrongNode,
            SameName,
            Busy,
            Mode,
            WrongKey,
            Forged,
            RefusalCode::Transport,
        ]
        .into_iter()
        .find(|&known| known as u8 == code)
        .unwrap_or(Other)
    }
}

/// A refusal as it crosses the wire.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people: what is wrong and the remedy, in the refusing node's words.
    pub text: String,
}

impl Refusal {
    pub(super) fn new(code: RefusalCode, text: String) -> Refusal {
        Refusal { code, text }
    }

    /// For a connection that sent `what` where a plover sends something else.
    pub(super) fn malformed(what: &str) -> Refusal {
        let text = format!(
            "this port speaks Plover's fabric protocol; the connection sent {what}. Check that the address belongs \
             to the fabric of a plover node"
        );
        Refusal::new(RefusalCode::NotPlover, text)
    }
}

impl Hello {
    /// Appends the wire form.
    ///
    /// # Panics
    /// If a name is longer than [`MAX_NAME_BYTES`]; registration checks that.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let length_of = |name: &str| u8::try_from(name.len()).expect("names are checked at registration");
        let total = HELLO_FIXED_BYTES + self.group.len() + self.node.len();
        out.extend((total as u16).to_le_bytes());
        let lane = match self.lane {
            Lane::Control => 1,
            Lane::Bulk => 2,
        };
        out.extend([lane, self.from.0, self.to.0, length_of(&self.group), length_of(&self.node)]);
        out.push(self.transport as u8);
        out.extend(self.instance.to_le_bytes());
        out.extend(self.view.to_le_bytes());
        out.extend(self.number.to_le_bytes());
        out.extend(self.group.as_bytes());
        out.extend(self.node.as_bytes());
    }

    /// Reads a hello from everything that came behind the preamble. `None`: more is needed.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn parse(bytes: &[u8]) -> Result<Option<Hello>, Refusal> {
        let malformed = Refusal::malformed;
        let Some(total) = bytes.first_chunk().map(|length| usize::from(u16::from_le_bytes(*length))) else {
            return Ok(None);
        };
        if !(HELLO_FIXED_BYTES..=MAX_HELLO_BYTES).contains(&total) {
            return Err(malformed("a hello of an impossible length"));
        }
        if bytes.len() < total {
            return Ok(None);
        }
        let (group_len, node_len) = (bytes[5] as usize, bytes[6] as usize);
        if bytes.len() > total || HELLO_FIXED_BYTES + group_len + node_len != total {
            return Err(malformed("a hello whose lengths disagree"));
        }
        let lane = match bytes[2] {
            1 => Lane::Control,
            2 => Lane::Bulk,
            _ => return Err(malformed("a hello for an unknown lane")),
        };
        let Some(transport) = Transport::from_wire(bytes[7]) else {
            return Err(malformed("a hello for an unknown transport"));
        };
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let text = |range: std::ops::Range<usize>| {
            String::from_utf8(bytes[range].to_vec()).map_err(|_| malformed("a name that is not UTF-8"))
        };
        let group_end = HELLO_FIXED_BYTES + group_len;
        Ok(Some(Hello {
            lane,
            from: PeerId(bytes[3]),
            to: PeerId(bytes[4]),
            transport,
            instance: long(8),
            view: long(16),
            number: long(24),
            group: text(HELLO_FIXED_BYTES..group_end)?,
            node: text(group_end..total)?,
        }))
    }
}

/// The answer to a hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Welcome { instance: u64 },
    Refused(Refusal),
}

impl Answer {
    /// The wire form.
    pub fn encode(&self) -> Vec<u8> {
        let (code, instance, text) = match self {
            Answer::Welcome { instance } => (0, *instance, ""),
            Answer::Refused(refusal) => (refusal.code as u8, 0, refusal.text.as_str()),
        };
        let text = &text[..text.floor_char_boundary(MAX_TEXT_BYTES)];
        let mut out = Vec::with_capacity(ANSWER_FIXED_BYTES + text.len());
        out.extend(ANSWER_MAGIC);
        out.extend([code, 0]);
        out.extend((text.len() as u16).to_le_bytes());
        out.extend([0; 4]);
        out.extend(instance.to_le_bytes());
        out.extend(text.as_bytes());
        out
    }

    /// How many bytes are missing for [`parse`](Self::parse) to get further, never more than the
    /// answer has; 0 once it is whole.
    pub fn missing_bytes(bytes: &[u8]) -> usize {
        if bytes.len() < ANSWER_FIXED_BYTES {
            return ANSWER_FIXED_BYTES - bytes.len();
        }
        let text_len = u16::from_le_bytes([bytes[10], bytes[11]]) as usize;
        (ANSWER_FIXED_BYTES + text_len.min(MAX_TEXT_BYTES)).saturating_sub(bytes.len())
    }

    /// Reads an answer from the start of `bytes` and returns it with its length; bytes of the first
    /// messages may follow. `None`: more is needed.
    ///
    /// # Errors
    /// These bytes are no answer.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Answer, usize)>, NotAnAnswer> {
        if !ANSWER_MAGIC.starts_with(&bytes[..bytes.len().min(ANSWER_MAGIC.len())]) {
            return Err(NotAnAnswer);
        }
        if bytes.len() < ANSWER_FIXED_BYTES {
            return Ok(None);
        }
        let text_len = u16::from_le_bytes([bytes[10], bytes[11]]) as usize;
        if text_len > MAX_TEXT_BYTES {
            return Err(NotAnAnswer);
        }
        let total = ANSWER_FIXED_BYTES + text_len;
        let Some(text) = bytes.get(ANSWER_FIXED_BYTES..total) else {
            return Ok(None);
        };
        let instance = u64::from_le_bytes(bytes[16..24].try_into().expect("8 bytes"));
        let answer = match bytes[8] {
            0 => Answer::Welcome { instance },
            code => Answer::Refused(Refusal::new(
                RefusalCode::from_wire(code),
                // It ends up in logs and on terminals: no control characters.
                String::from_utf8_lossy(text).replace(char::is_control, " "),
            )),
        };
        Ok(Some((answer, total)))
    }
}

/// What answered is not a plover node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("what answers there does not speak Plover's fabric protocol; check the address and port")]
pub(super) struct NotAnAnswer;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> impl Strategy<Value = Hello> {
        (any::<bool>(), any::<(u8, u8, u64, u64, u64)>(), "[a-zä]{0,40}", "[a-z]{0,100}").prop_map(
            |(bulk, (from, to, instance, view, number), group, node)| Hello {
                transport: Transport::ALL[number as usize % 3],
                lane: if bulk { Lane::Bulk } else { Lane::Control },
                from: PeerId(from),
                to: PeerId(to),
                instance,
                view,
                number,
                group,
                node,
            },
        )
    }

    proptest! {
        #[test]
        fn a_hello_survives_the_wire_and_every_prefix_waits(hello in hello()) {
            let mut bytes = Vec::new();
            hello.encode(&mut bytes);
            for cut in 0..bytes.len() {
                prop_assert_eq!(Hello::parse(&bytes[..cut]), Ok(None));
            }
            prop_assert_eq!(Hello::parse(&bytes), Ok(Some(hello)));
            bytes.push(0);
            prop_assert!(Hello::parse(&bytes).is_err());
        }

        #[test]
        fn an_answer_survives_the_wire(instance: u64, code in 0u8..12, text in "[ -~]{0,1200}", tail in 0usize..9) {
            let answer = if code == 0 {
                Answer::Welcome { instance }
            } else {
                Answer::Refused(Refusal::new(RefusalCode::from_wire(code), text[..text.len().min(1000)].to_owned()))
            };
            let mut bytes = match &answer {
                Answer::Refused(r) => Answer::Refused(Refusal::new(r.code, text)).encode(),
                welcome => welcome.encode(),
            };
            for cut in 0..bytes.len() {
                prop_assert_eq!(Answer::parse(&bytes[..cut]), Ok(None));
            }
            let len = bytes.len();
            bytes.resize(len + tail, 0xee);
            prop_assert_eq!(Answer::parse(&bytes), Ok(Some((answer, len))));
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..700),
            good_start: bool,
        ) {
            let mut bytes = bytes;
            if good_start && bytes.len() >= 8 {
                let total = bytes.len() as u16;
                bytes[..2].copy_from_slice(&total.to_le_bytes());
            }
            let _ = Hello::parse(&bytes);
            if good_start && bytes.len() >= 8 {
                bytes[..8].copy_from_slice(&ANSWER_MAGIC);
            }
            let _ = Answer::parse(&bytes);
        }
    }
}
