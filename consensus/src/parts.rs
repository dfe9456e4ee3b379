//! Messages as parts: what was encoded, and payloads where they lie, so that a transport that gathers copies them once.
//!
//! A leader sends the same message to both followers as a rule; it is encoded, and its payloads are summed up, once.

use crate::effects::Effects;
use crate::entry::Entry;
use crate::ids::ReplicaId;
use crate::message::Message;
use crate::wire::{checksum, encode_fields};

/// Entries of a message whose payloads stay where they are. More are copied together: they are small.
const MAX_ENTRIES: usize = 16;

/// The memory that messages are encoded in.
#[derive(Debug, Default)]
pub struct Encoder {
    /// Fields of the message, a sum at the end.
    bytes: Vec<u8>,
    /// Where in them the payloads belong.
    cuts: Vec<usize>,
}

impl Encoder {
    /// Encodes `message` behind `prefix`, which is no part of the message.
    fn load(&mut self, prefix: &[u8], message: &Message) {
        self.bytes.clear();
        self.bytes.extend_from_slice(prefix);
        self.cuts.clear();
        let (bytes, cuts) = (&mut self.bytes, &mut self.cuts);
        if entries(message).len() > MAX_ENTRIES {
            return message.encode(bytes);
        }
        encode_fields(message, bytes, |bytes, _| cuts.push(bytes.len()));
        let mut sum = 0;
        self.with_parts(message, |parts| {
            let (first, rest) = parts.split_first().expect("a message has fields");
            sum = rest.iter().fold(checksum(0, &first[prefix.len()..]), |sum, part| checksum(sum, part));
        });
        self.bytes.extend_from_slice(&sum.to_le_bytes());
    }

    /// The parts of the message that was loaded.
    fn with_parts<R>(&self, message: &Message, take: impl FnOnce(&[&[u8]]) -> R) -> R {
        let mut parts: [&[u8]; 2 * MAX_ENTRIES + 1] = [&[]; 2 * MAX_ENTRIES + 1];
        let mut from = 0;
        for (pair, (cut, (_, entry))) in parts.chunks_mut(2).zip(self.cuts.iter().zip(entries(message))) {
            pair[0] = &self.bytes[from..*cut];
            pair[1] = entry.payload();
            from = *cut;
        }
        let last = 2 * self.cuts.len();
        parts[last] = &self.bytes[from..];
        take(&parts[..=last])
    }
}

fn entries(message: &Message) -> &[(crate::ids::View, Entry)] {
    match message {
        Message::Accept { entries, .. } | Message::Fetched { entries, .. } => entries,
        _ => &[],
    }
}

impl Effects {
    /// Shows every message to `send`, in order, as `prefix` and the bytes that [`Message::decode`] reads, cut in parts, and takes
    /// the message back.
    pub fn send_parts(&mut self, encoder: &mut Encoder, prefix: &[u8], mut send: impl FnMut(ReplicaId, &[&[u8]])) {
        let mut loaded: Option<Message> = None;
        for (to, message) in self.messages.drain(..) {
            if loaded.as_ref() != Some(&message) {
                encoder.load(prefix, &message);
            }
            encoder.with_parts(&message, |parts| send(to, parts));
            if let Some(before) = loaded.replace(message) {
                before.recycle(&mut self.spare);
            }
        }
        if let Some(message) = loaded {
            message.recycle(&mut self.spare);
        }
    }
}
