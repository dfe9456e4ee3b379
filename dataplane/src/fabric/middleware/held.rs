//! Messages that have come and are not handed on yet.

use super::super::{FabricEvent, PeerId};
use std::collections::VecDeque;

#[derive(Debug)]
struct Message {
    due_us: u64,
    peer: PeerId,
    bytes: Vec<u8>,
}

/// Messages by the time at which they are due; those of one peer in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Held {
    messages: VecDeque<Message>,
}

impl Held {
    /// When the youngest message of `peer` is due: a later one must not be earlier.
    pub fn last_due_us(&self, peer: PeerId) -> Option<u64> {
        self.messages.iter().rev().find(|message| message.peer == peer).map(|message| message.due_us)
    }

    pub fn keep(&mut self, due_us: u64, peer: PeerId, bytes: &[u8]) {
        let message = Message { due_us, peer, bytes: bytes.to_vec() };
        let at = self.messages.partition_point(|other| other.due_us <= due_us);
        self.messages.insert(at, message);
    }

    /// The connection is gone, and what was on its way with it.
    pub fn forget(&mut self, peer: PeerId) {
        self.messages.retain(|message| message.peer != peer);
    }

    pub fn release(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        while let Some(message) = self.messages.pop_front_if(|message| message.due_us <= now_us) {
            sink(FabricEvent::Message { peer: message.peer, bytes: &message.bytes });
        }
    }

    pub fn next_due_us(&self) -> u64 {
        self.messages.front().map_or(u64::MAX, |message| message.due_us)
    }
}
