//! What replicas say to one another. Every message may be lost, doubled, delayed or overtaken.

use crate::entry::{Base, Entry};
use crate::ids::{Index, View, Viewstamp};
use crate::spare::Spare;

/// A message between two replicas of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// "Would you follow me?" Asked before a campaign, so that a replica that merely lost its own link
    /// disturbs nobody (R3). Promises nothing.
    PreVote {
        /// The view that the sender would lead.
        view: View,
    },
    /// Answer to `PreVote`.
    PreVoteReply {
        /// The view that was asked about.
        view: View,
        /// Whether the sender knows of no live leader.
        granted: bool,
        /// The highest view that the sender has promised; the candidate must choose a higher one.
        promised: View,
    },
    /// Phase 1: "accept nothing below `view`, and tell me what you hold".
    Prepare {
        /// The view that the sender wants to lead.
        view: View,
        /// Not 0 only when a new group forms: the nonce of the blank replica that it is meant for (R12).
        genesis_nonce: u64,
    },
    /// Answer to `Prepare`, sent only once the promise is durable.
    Promise {
        /// The view that was promised.
        view: View,
        /// The last entry of the sender's log.
        last: Viewstamp,
        /// The sender's commit index.
        commit: Index,
    },
    /// A candidate asks the voter with the best log for the entries from `from` on.
    Fetch {
        /// The candidate's view; the voter has promised it, so that its log stands still.
        view: View,
        /// The first index wanted.
        from: Index,
    },
    /// Answer to `Fetch`: as many entries as one message holds.
    Fetched {
        /// The view of the question.
        view: View,
        /// The entry before the first.
        prev: Viewstamp,
        /// The entries that follow it, each with the view that first proposed it.
        entries: Vec<(View, Entry)>,
    },
    /// Answer to `Fetch` when the entries wanted are gone: begin here instead.
    FetchedBase {
        /// The view of the question.
        view: View,
        /// Where the sender's log begins.
        base: Base,
    },
    /// Phase 2, and the leader's heartbeat when `entries` is empty.
    Accept {
        /// The leader's view.
        view: View,
        /// The entry before the first.
        prev: Viewstamp,
        /// The leader's commit index.
        commit: Index,
        /// The leader's base: followers truncate to it.
        base: Index,
        /// The entries that follow `prev`, each with the view that first proposed it.
        entries: Vec<(View, Entry)>,
    },
    /// "In this view my log matches yours through here, durably."
    AcceptOk {
        /// The leader's view.
        view: View,
        /// The last index that matches.
        through: Index,
        /// Whether the sender counts towards a majority (a learner does not, R13).
        voting: bool,
        /// What the sender's guest has consumed (R16).
        consumed: Index,
    },
    /// "My log does not hold `prev`."
    Reject {
        /// The leader's view.
        view: View,
        /// The `prev` that was refused.
        prev: Index,
        /// The sender's own entry at that index, or its last one when it has none there.
        have: Viewstamp,
        /// The sender's commit index: up to there every leader's log agrees.
        commit: Index,
    },
    /// The entries that the follower lacks are gone: begin here instead.
    InstallBase {
        /// The leader's view.
        view: View,
        /// Where the leader's log begins.
        base: Base,
    },
    /// "I have promised a higher view than yours."
    Nack {
        /// The sender's promise.
        promised: View,
    },
    /// "You should lead." From a leader that hands over, or a hint from a replica whose log names the receiver.
    TakeOver {
        /// The sender's view; a receiver in another view ignores a hand-over.
        view: View,
        /// From the leader itself: skip the pre-vote. Otherwise only a hint.
        handover: bool,
    },
    /// "My disk is empty or doubtful (or I have not caught up since); what must I know before I may vote?" (R13)
    Hello {
        /// Drawn afresh by every process, so that an old answer is never taken for a new one.
        nonce: u64,
        /// The sender's disk holds nothing at all: a new group may form with it (R12).
        blank: bool,
    },
    /// Answer to `Hello` from a replica that votes.
    HelloReply {
        /// The nonce of the question.
        nonce: u64,
        /// The sender's promise.
        promised: View,
        /// The last entry of the sender's log.
        last: Viewstamp,
    },
}

impl Message {
    /// Keeps the memory of the entries, if the message is of a kind that has any.
    pub(crate) fn recycle(self, spare: &mut Spare) {
        if let Message::Accept { entries, .. } | Message::Fetched { entries, .. } = self {
            spare.give(entries);
        }
    }
}
