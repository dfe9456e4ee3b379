//! A message on its way.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use consensus::{Event, Index, Message, ReplicaId};

use crate::host::Host;

/// See the module. Its wire form, which the codec's tests show to be faithful, stands for the message wherever it is
/// compared, ordered or hashed.
#[derive(Clone)]
pub struct Envelope {
    pub from: ReplicaId,
    pub to: ReplicaId,
    letter: Arc<(Vec<u8>, Message)>,
}

impl Envelope {
    pub fn new(from: ReplicaId, to: ReplicaId, message: Message) -> Envelope {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        Envelope { from, to, letter: Arc::new((bytes, message)) }
    }

    pub fn event(&self) -> Event {
        Event::Message { from: self.from, message: self.letter.1.clone() }
    }

    fn key(&self) -> (ReplicaId, ReplicaId, &[u8]) {
        (self.from, self.to, &self.letter.0)
    }

    /// A hint starts a campaign each time it arrives: doubled without end, views rise without end.
    pub fn may_be_doubled(&self) -> bool {
        !matches!(self.letter.1, Message::TakeOver { .. })
    }

    /// Whether its receiver has no use for it, now or ever: the message may as well be lost, which keeps
    /// the number of states small.
    ///
    /// Views only rise, and so does what a replica has committed or acknowledged within a view; an answer that
    /// was given once is under way or has arrived.
    pub fn is_dead(&self, sender: &Host, receiver: &Host) -> bool {
        let (theirs, ours) = (sender.replica.view(), receiver.replica.view());
        let leads = |host: &Host, id| host.replica.leader() == Some(id);
        match &self.letter.1 {
            // Questions of a campaign, and their answers, until it is won or another view is promised.
            Message::PreVote { view } => theirs >= *view,
            Message::PreVoteReply { view, .. } => ours >= *view,
            Message::Prepare { view, .. } => theirs > *view || (theirs == *view && leads(sender, self.from)),
            Message::Promise { view, .. } => ours > *view || (ours == *view && leads(receiver, self.to)),
            Message::Fetch { view, .. } => theirs > *view || ours > *view,
            Message::Fetched { view, .. } | Message::FetchedBase { view, .. } => {
                ours > *view || (ours == *view && leads(receiver, self.to))
            }
            // A lower view is refused, which its leader knows by itself once it has promised a higher one.
            Message::Accept { view, prev, commit, entries, .. } => {
                let through = Index(prev.index.0 + entries.len() as u64);
                let (of, acknowledged) = receiver.acknowledged;
                let known = leads(receiver, self.from) && ours == *view && *commit <= receiver.replica.commit_index();
                (ours > *view && theirs >= ours) || (known && of == *view && acknowledged >= through)
            }
            Message::InstallBase { view, .. } => ours > *view && theirs >= ours,
            Message::AcceptOk { view, through, .. } => {
                ours > *view || (ours == *view && receiver.replica.match_index(self.from) >= *through)
            }
            Message::Reject { view, .. } => ours > *view,
            Message::Nack { promised } => ours >= *promised,
            Message::TakeOver { .. } | Message::Hello { .. } | Message::HelloReply { .. } => false,
        }
    }
}

impl PartialEq for Envelope {
    fn eq(&self, other: &Envelope) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Envelope {}

impl PartialOrd for Envelope {
    fn partial_cmp(&self, other: &Envelope) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Envelope {
    fn cmp(&self, other: &Envelope) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl Hash for Envelope {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl fmt::Debug for Envelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {} {:?}", self.from, self.to, self.letter.1)
    }
}
