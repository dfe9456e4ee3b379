//! What goes into a replica and what comes out of it.

use crate::entry::{Entry, HardState, Payload};
use crate::ids::{Index, PersistId, ReplicaId, View};
use crate::message::Message;
use crate::spare::Spare;
use crate::wire::WireError;

/// Something that happened to a replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A message arrived.
    Message {
        /// Who sent it; the transport vouches for that.
        from: ReplicaId,
        /// What it says.
        message: Message,
    },
    /// Every [`Persist`] up to this one is durable.
    Persisted {
        /// The last one that is.
        through: PersistId,
    },
    /// Time has passed; due at [`Replica::next_deadline_us`](crate::Replica::next_deadline_us), after whatever waits to be
    /// handed in.
    Tick,
    /// The connection to a peer is up: what it lacks is sent at once.
    PeerConnected(ReplicaId),
    /// The connection to a peer broke, which is how a process death is noticed at once.
    PeerLost(ReplicaId),
    /// The peer gave a sign of life outside of consensus (bulk traffic).
    PeerHeard(ReplicaId),
    /// Whether this replica runs a guest that a whole syncvm, or its own execution of the log since, produced.
    /// False after a start until the wiring says otherwise, and after a jump.
    GuestIntact(bool),
    /// The guest of this replica died: stop leading, and pass the lead to the secondary if there is one.
    StepDown,
    /// Pass the lead to the secondary, as planned.
    HandOver {
        /// The secondary.
        to: ReplicaId,
    },
    /// The guest of this replica has consumed every entry through this index, or has none that could (R16).
    Consumed(Index),
    /// The syncvm with this index is given up: nothing is released for it and nobody named by it (R17).
    SyncVmFailed(Index),
    /// A syncvm that was acknowledged covers every entry through this index. Indices above the commit index
    /// are clamped to it.
    Truncate(Index),
    /// The log store failed: this process acknowledges nothing any more.
    StorageFailed,
    /// The operator's word that every guest is lost: this replica may lead with a freshly booted guest, if
    /// the log names it.
    AllowColdStart,
}

/// A record to make durable. Records are numbered from 1 in order of emission ([`PersistId`]).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Persist {
    /// Replaces the state that was stored before.
    State(HardState),
    /// Stores an entry and supersedes every stored entry at or above its index. After a jump the index is
    /// `base + 1` whatever was stored before; entries at or below the base no longer matter.
    Append {
        /// Its position.
        index: Index,
        /// The view that first proposed it.
        view: View,
        /// The entry.
        entry: Entry,
    },
}

/// Something that the wiring should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// This replica leads: everything of earlier views and the `Noop` of this view are committed.
    Leading {
        /// The view that it leads.
        view: View,
    },
    /// This replica led (or was about to, its `Noop` not yet committed) and does so no longer.
    LostLead {
        /// The view that it led.
        view: View,
    },
    /// This replica follows a leader whose first message just arrived.
    Following {
        /// The leader's view.
        view: View,
        /// The leader.
        leader: ReplicaId,
    },
    /// Entries that this replica lacked are gone: its log begins anew after `base`, and its guest, which
    /// never saw them, is worth nothing until the next rejoin. It no longer counts as intact.
    Jumped {
        /// Where the log begins now.
        base: Index,
    },
    /// The secondary did not take over in time; this leader accepts proposals again.
    HandOverFailed {
        /// The secondary.
        to: ReplicaId,
    },
    /// A campaign ended because the recovered log names somebody else (R6).
    Ineligible {
        /// The view of the campaign.
        view: View,
    },
    /// This replica was not run for longer than the failure timeout: its host is short of CPU, or stood still (R18).
    Absent {
        /// For how long it was given no event.
        for_us: u64,
    },
    /// This replica came back with an empty or doubtful disk, has caught up, and votes again as
    /// soon as the record that says so is durable (R13).
    Promoted,
}

/// What the caller must do after a step. It drains the vectors and passes the same value in again.
///
/// Steady state allocates nothing: the memory of messages circulates through this value as well. A step takes what
/// it needs from here and leaves here what the message that it was given held; [`Effects::send`] and
/// [`Effects::decode`] do the same on the way to and from the wire. A caller that drops messages instead
/// merely pays for new ones.
///
/// Order: hand `persist` to the log store first, then send `messages` (those that depend on a record of this
/// step are not emitted before [`Event::Persisted`] covers it, so that sending never has to wait), then apply
/// `committed`, then act on `notices`.
#[derive(Debug, Default)]
pub struct Effects {
    /// To send, in order.
    pub messages: Vec<(ReplicaId, Message)>,
    /// To make durable, in order.
    pub persist: Vec<Persist>,
    /// Entries that became committed: in index order, each once per process, without gaps from the base on.
    pub committed: Vec<(Index, View, Entry)>,
    /// What else happened.
    pub notices: Vec<Notice>,
    pub(crate) spare: Spare,
}

impl Effects {
    /// Shows every message to `send`, in order, and takes it back.
    pub fn send(&mut self, mut send: impl FnMut(ReplicaId, &Message)) {
        for (to, message) in self.messages.drain(..) {
            send(to, &message);
            message.recycle(&mut self.spare);
        }
    }

    /// [`Message::decode`] with memory from here.
    ///
    /// # Errors
    /// As [`Message::decode`].
    pub fn decode(&mut self, bytes: &[u8]) -> Result<Message, WireError> {
        Message::decode_with(bytes, &mut self.spare)
    }

    /// As [`Effects::decode`], without a copy: inputs are parts of `message`, and keep its memory.
    ///
    /// # Errors
    /// As [`Message::decode`].
    pub fn decode_shared(&mut self, message: &Payload) -> Result<Message, WireError> {
        Message::decode_shared(message, &mut self.spare)
    }

    /// Gives back the memory of a message that was taken out of `messages` and is not needed any more.
    pub fn recycle(&mut self, message: Message) {
        message.recycle(&mut self.spare);
    }

    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        self.send(|_, _| {});
        self.persist.clear();
        self.committed.clear();
        self.notices.clear();
    }
}
