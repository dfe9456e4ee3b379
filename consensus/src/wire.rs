//! Bytes of messages, entries and hard state: little-endian, fixed fields, no self-description.
//!
//! The decoder is total and bounded: any bytes give a value or an error, and it never reserves more memory
//! than the input is long. Own code rather than serde: the format is small, is read by other versions of the
//! program, and must not change when a library does. A message ends with a CRC-32C, since TCP's checksum is
//! too weak for a log that must stay equal on every replica.

use crate::config::MAX_REPLICAS;
use crate::entry::{Base, Entry, HardState, Payload};
use crate::ids::{Index, ReplicaId, View, Viewstamp};
use crate::message::Message;
use crate::spare::{Entries, Spare};

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Fewer bytes than the fields need.
    #[error("{what}: the bytes end early; the sender or the store cut them off")]
    Truncated {
        /// What was being read.
        what: &'static str,
    },
    /// Bytes after the last field.
    #[error("{what}: {bytes} bytes follow its end; do both ends run the same version?")]
    Trailing {
        /// What was being read.
        what: &'static str,
        /// How many.
        bytes: usize,
    },
    /// A kind that this version does not know.
    #[error("{what}: unknown kind {tag}; do both ends run the same version?")]
    UnknownKind {
        /// What was being read.
        what: &'static str,
        /// The kind.
        tag: u8,
    },
    /// A field has a value that is never written.
    #[error("{what}: value {value} is out of range; do both ends run the same version?")]
    OutOfRange {
        /// The field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The bytes changed on the way.
    #[error("message: checksum {found:#010x} instead of {expected:#010x}; the transport or memory corrupts data")]
    Checksum {
        /// What the message says.
        expected: u32,
        /// What its bytes give.
        found: u32,
    },
}

const NOBODY: u8 = u8::MAX;
const CHECKSUM_BYTES: usize = 4;
/// From here on a sum by carry-less multiplication is faster than by the instruction made for it, which has less to set up.
const FOLD_BYTES: usize = 512;
/// An entry in a message: view (8), length (4), and at least its kind (1).
const MIN_ENTRY_BYTES: usize = 13;

impl Entry {
    /// Appends everything but the payload. `header ++ payload` is what [`Entry::decode`] reads, so that a store
    /// can write both parts without copying the payload.
    pub fn encode_header(&self, out: &mut Vec<u8>) {
        match *self {
            Entry::Input(_) => out.push(1),
            Entry::SyncVm { with } => out.extend_from_slice(&[2, with.0]),
            Entry::Second { replica, base } => {
                out.push(3);
                replica.put(out);
                base.put(out);
            }
            Entry::Noop { leader } => out.extend_from_slice(&[4, leader.0]),
        }
    }

    /// Reads header and payload as one piece.
    ///
    /// # Errors
    /// When the bytes are not an entry of this version.
    pub fn decode(bytes: &[u8]) -> Result<Entry, WireError> {
        Entry::decode_within(bytes, None)
    }

    /// `home` is what `bytes` is a part of, if payloads may be parts of that too; otherwise they are copied.
    fn decode_within(bytes: &[u8], home: Option<&Payload>) -> Result<Entry, WireError> {
        let mut reader = Reader { bytes, what: "entry", home: None };
        let entry = match reader.u8()? {
            1 => {
                let bytes = reader.bytes;
                return Ok(Entry::Input(home.map_or_else(|| Payload::from(bytes.to_vec()), |home| home.part(bytes))));
            }
            2 => Entry::SyncVm { with: reader.replica()? },
            3 => Entry::Second { replica: reader.maybe_replica()?, base: Index(reader.u64()?) },
            4 => Entry::Noop { leader: reader.replica()? },
            tag => return Err(WireError::UnknownKind { what: "entry", tag }),
        };
        reader.end()?;
        Ok(entry)
    }
}

impl HardState {
    /// Appends the bytes that [`HardState::decode`] reads.
    pub fn encode(&self, out: &mut Vec<u8>) {
        self.promised.put(out);
        self.base.put(out);
        out.push(u8::from(self.learner) | u8::from(self.void_entries) << 1);
    }

    /// Reads a stored state.
    ///
    /// # Errors
    /// When the bytes are not a state of this version.
    pub fn decode(bytes: &[u8]) -> Result<HardState, WireError> {
        let mut reader = Reader { bytes, what: "hard state", home: None };
        let (promised, base, flags) = (View(reader.u64()?), reader.base()?, reader.u8()?);
        if flags > 3 {
            return Err(WireError::OutOfRange { what: "hard state flags", value: u64::from(flags) });
        }
        reader.end()?;
        Ok(HardState { promised, base, learner: flags & 1 != 0, void_entries: flags & 2 != 0 })
    }
}

impl Message {
    /// Appends the bytes that [`Message::decode`] reads.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        encode_fields(self, out, |out, payload| out.extend_from_slice(payload));
        let sum = checksum(0, &out[start..]);
        out.extend_from_slice(&sum.to_le_bytes());
    }

    /// Reads one whole message.
    ///
    /// # Errors
    /// When the bytes are not a message of this version, or changed on the way.
    pub fn decode(bytes: &[u8]) -> Result<Message, WireError> {
        Message::decode_with(bytes, &mut Spare::default())
    }

    pub(crate) fn decode_with(bytes: &[u8], spare: &mut Spare) -> Result<Message, WireError> {
        Message::decode_within(bytes, None, spare)
    }

    pub(crate) fn decode_shared(bytes: &Payload, spare: &mut Spare) -> Result<Message, WireError> {
        Message::decode_within(bytes, Some(bytes), spare)
    }

    fn decode_within(bytes: &[u8], home: Option<&Payload>, spare: &mut Spare) -> Result<Message, WireError> {
        let what = "message";
        let Some((body, sum)) = bytes.split_last_chunk::<CHECKSUM_BYTES>() else {
            return Err(WireError::Truncated { what });
        };
        let (expected, found) = (u32::from_le_bytes(*sum), checksum(0, body));
        if expected != found {
            return Err(WireError::Checksum { expected, found });
        }
        Message::decode_body(Reader { bytes: body, what, home }, spare)
    }

    fn decode_body(mut r: Reader<'_>, spare: &mut Spare) -> Result<Message, WireError> {
        let (tag, view) = (r.u8()?, View(r.u64()?));
        let message = match tag {
            1 => Message::PreVote { view },
            2 => Message::PreVoteReply { view, granted: r.flag()?, promised: View(r.u64()?) },
            3 => Message::Prepare { view, genesis_nonce: r.u64()? },
            4 => Message::Promise { view, last: r.viewstamp()?, commit: Index(r.u64()?) },
            5 => Message::Fetch { view, from: Index(r.u64()?) },
            6 => Message::Fetched { view, prev: r.viewstamp()?, entries: r.entries(spare)? },
            7 => Message::FetchedBase { view, base: r.base()? },
            _ => Message::decode_later_kinds(tag, view, &mut r, spare)?,
        };
        r.end()?;
        Ok(message)
    }

    fn decode_later_kinds(tag: u8, view: View, r: &mut Reader<'_>, spare: &mut Spare) -> Result<Message, WireError> {
        Ok(match tag {
            8 => Message::Accept {
                view,
                prev: r.viewstamp()?,
                commit: Index(r.u64()?),
                base: Index(r.u64()?),
                entries: r.entries(spare)?,
            },
            9 => Message::AcceptOk { view, through: Index(r.u64()?), voting: r.flag()?, consumed: Index(r.u64()?) },
            10 => Message::Reject { view, prev: Index(r.u64()?), have: r.viewstamp()?, commit: Index(r.u64()?) },
            11 => Message::InstallBase { view, base: r.base()? },
            12 => Message::Nack { promised: view },
            13 => Message::TakeOver { view, handover: r.flag()? },
            14 => Message::Hello { nonce: view.0, blank: r.flag()? },
            15 => Message::HelloReply { nonce: view.0, promised: View(r.u64()?), last: r.viewstamp()? },
            tag => {
                return Err(WireError::UnknownKind { what: "message", tag });
            }
        })
    }
}

/// A message's sum, begun with `sum` over what came before.
pub(crate) fn checksum(sum: u32, bytes: &[u8]) -> u32 {
    if bytes.len() < FOLD_BYTES {
        return crc32c::crc32c_append(sum, bytes);
    }
    let mut digest = crc_fast::Digest::new_with_init_state(crc_fast::CrcAlgorithm::Crc32Iscsi, u64::from(!sum));
    digest.update(bytes);
    digest.finalize() as u32
}

/// Appends a message without its sum. Each payload goes to `put_payload` when it is its turn.
pub(crate) fn encode_fields(message: &Message, out: &mut Vec<u8>, put_payload: impl FnMut(&mut Vec<u8>, &[u8])) {
    match message {
        Message::PreVote { view } => put(out, 1, &[view]),
        Message::PreVoteReply { view, granted, promised } => put(out, 2, &[view, granted, promised]),
        Message::Prepare { view, genesis_nonce } => put(out, 3, &[view, genesis_nonce]),
        Message::Promise { view, last, commit } => put(out, 4, &[view, last, commit]),
        Message::Fetch { view, from } => put(out, 5, &[view, from]),
        Message::Fetched { view, prev, entries } => {
            put(out, 6, &[view, prev]);
            put_entries(out, entries, put_payload);
        }
        Message::FetchedBase { view, base } => put(out, 7, &[view, base]),
        Message::Accept { view, prev, commit, base, entries } => {
            put(out, 8, &[view, prev, commit, base]);
            put_entries(out, entries, put_payload);
        }
        Message::AcceptOk { view, through, voting, consumed } => put(out, 9, &[view, through, voting, consumed]),
        Message::Reject { view, prev, have, commit } => put(out, 10, &[view, prev, have, commit]),
        Message::InstallBase { view, base } => put(out, 11, &[view, base]),
        Message::Nack { promised } => put(out, 12, &[promised]),
        Message::TakeOver { view, handover } => put(out, 13, &[view, handover]),
        Message::Hello { nonce, blank } => put(out, 14, &[nonce, blank]),
        Message::HelloReply { nonce, promised, last } => put(out, 15, &[nonce, promised, last]),
    }
}

/// A field of a message.
trait Put {
    fn put(&self, out: &mut Vec<u8>);
}

/// Appends a message's kind and its fields in order.
fn put(out: &mut Vec<u8>, kind: u8, fields: &[&dyn Put]) {
    out.push(kind);
    fields.iter().for_each(|field| field.put(out));
}

impl Put for u64 {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_le_bytes());
    }
}

impl Put for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
}

impl Put for View {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
}

impl Put for Index {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
    }
}

impl Put for Viewstamp {
    fn put(&self, out: &mut Vec<u8>) {
        self.view.put(out);
        self.index.put(out);
    }
}

impl Put for Option<ReplicaId> {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(self.map_or(NOBODY, |replica| replica.0));
    }
}

impl Put for Base {
    fn put(&self, out: &mut Vec<u8>) {
        self.index.put(out);
        self.view.put(out);
        self.second.put(out);
        self.second_base.put(out);
        self.leader.put(out);
    }
}

/// Lengths are `u32` on the wire: a batch is bounded by `Config::batch_bytes` plus one entry, and an entry by the
/// largest batch of frames, both far below 4 GiB.
fn put_entries(out: &mut Vec<u8>, entries: &Entries, mut put_payload: impl FnMut(&mut Vec<u8>, &[u8])) {
    out.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    for (view, entry) in entries {
        view.put(out);
        let length_at = out.len();
        out.extend_from_slice(&[0; 4]);
        entry.encode_header(out);
        let length = out.len() - length_at - 4 + entry.payload().len();
        let length = u32::try_from(length).expect("an entry is far below 4 GiB");
        out[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
        put_payload(out, entry.payload());
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    what: &'static str,
    /// What `bytes` is a part of, if payloads may be parts of that too.
    home: Option<&'a Payload>,
}

impl<'a> Reader<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.bytes.split_first_chunk::<N>().ok_or(WireError::Truncated { what: self.what })?;
        self.bytes = rest;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.take::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.take().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(WireError::OutOfRange { what: "flag", value: u64::from(value) }),
        }
    }

    fn maybe_replica(&mut self) -> Result<Option<ReplicaId>, WireError> {
        match self.u8()? {
            NOBODY => Ok(None),
            id if usize::from(id) < MAX_REPLICAS => Ok(Some(ReplicaId(id))),
            id => Err(WireError::OutOfRange { what: "replica", value: u64::from(id) }),
        }
    }

    fn replica(&mut self) -> Result<ReplicaId, WireError> {
        self.maybe_replica()?.ok_or(WireError::OutOfRange { what: "replica", value: u64::from(NOBODY) })
    }

    fn viewstamp(&mut self) -> Result<Viewstamp, WireError> {
        Ok(Viewstamp { view: View(self.u64()?), index: Index(self.u64()?) })
    }

    fn base(&mut self) -> Result<Base, WireError> {
        Ok(Base {
            index: Index(self.u64()?),
            view: View(self.u64()?),
            second: self.maybe_replica()?,
            second_base: Index(self.u64()?),
            leader: self.maybe_replica()?,
        })
    }

    fn entries(&mut self, spare: &mut Spare) -> Result<Entries, WireError> {
        let count = self.u32()? as usize;
        if count > self.bytes.len() / MIN_ENTRY_BYTES {
            return Err(WireError::OutOfRange { what: "entry count", value: count as u64 });
        }
        // Grown as entries appear, not reserved: `count` may claim one entry per 13 bytes of a large payload.
        let mut entries = spare.take();
        entries.reserve(count.min(1024));
        for _ in 0..count {
            let (view, length) = (View(self.u64()?), self.u32()? as usize);
            let bytes = self.bytes.get(..length).ok_or(WireError::Truncated { what: "entry" })?;
            self.bytes = &self.bytes[length..];
            entries.push((view, Entry::decode_within(bytes, self.home)?));
        }
        Ok(entries)
    }

    fn end(&self) -> Result<(), WireError> {
        if self.bytes.is_empty() {
            Ok(())
        } else {
            Err(WireError::Trailing { what: self.what, bytes: self.bytes.len() })
        }
    }
}
