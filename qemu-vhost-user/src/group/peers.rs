//! The other two replicas as this one sees them.

use std::ops::Range;

use consensus::{Payload, ReplicaId};
use dataplane::arena::Arena;
use dataplane::fabric::FabricEvent;

use super::memory::shared;
use super::messages::{GuestReport, KIND_CONSENSUS};
use crate::config::ReplicaConfig;
use crate::qemu::fingerprint::{self, Fingerprint};

/// A replica whose rejoin failed is tried again after this time.
const REJOIN_RETRY_US: u64 = 500_000;

/// One other replica.
#[derive(Debug)]
pub struct Peer {
    /// Who.
    pub id: ReplicaId,
    /// Its node's name.
    pub node: String,
    /// Whether its control connection stands.
    pub connected: bool,
    /// Since when it does not.
    pub lost_us: u64,
    /// What it last said about its guest, on this connection.
    pub report: GuestReport,
    /// Whether it has said anything on this connection.
    pub reported: bool,
    /// Whether it has said since it was named secondary that its guest is whole.
    pub seen_intact: bool,
    /// Why it was refused, or refuses us.
    pub refusal: Option<String>,
    /// Not tried as a joiner before this time.
    pub rejoin_after_us: u64,
}

/// What came from the fabric.
#[derive(Debug)]
pub enum PeerEvent<'a> {
    /// The control connection is up.
    Connected,
    /// It is down.
    Lost(&'a str),
    /// The peer's node will not talk to us, or we not to it.
    Refused(&'a str),
    /// One message.
    Message(Received<'a>),
}

/// A message.
#[derive(Debug)]
pub enum Received<'a> {
    /// A small one, or one that the arena had no room for.
    Passing(&'a [u8]),
    /// One whose parts may be kept as they are.
    Kept(&'a Payload),
}

/// Shorter messages carry no input that is worth a place in the arena.
const KEPT_BYTES: usize = 128;

/// Fabric events between polling and handling, in buffers that are used again: handling one may send, which needs the
/// fabric that is being polled.
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
    events: Vec<(ReplicaId, Queued)>,
}

#[derive(Debug)]
enum Queued {
    Message(Range<usize>),
    Kept(Payload),
    Connected,
    Lost(String),
    Refused(String),
}

impl Inbox {
    /// Keeps an event; the bytes of a message in `arena`, as a rule, so that its inputs need not be copied again.
    pub fn take(&mut self, event: FabricEvent<'_>, arena: &mut Arena) {
        let (peer, queued) = match event {
            FabricEvent::Message { peer, bytes } => {
                // The kind byte is left out, so that what is kept is what consensus decodes.
                let kept = match bytes.split_first() {
                    Some((&KIND_CONSENSUS, rest)) if rest.len() >= KEPT_BYTES => arena.put(rest),
                    _ => None,
                };
                let queued = kept.map(|kept| Queued::Kept(shared(kept))).unwrap_or_else(|| {
                    let from = self.bytes.len();
                    self.bytes.extend_from_slice(bytes);
                    Queued::Message(from..self.bytes.len())
                });
                (peer, queued)
            }
            FabricEvent::Connected { peer, .. } => (peer, Queued::Connected),
            FabricEvent::Lost { peer, reason } => (peer, Queued::Lost(reason.to_string())),
            FabricEvent::Refused { peer, reason } => (peer, Queued::Refused(reason.to_string())),
        };
        self.events.push((ReplicaId(peer.0), queued));
    }

    /// How many events came.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Hands every event on, in order, and forgets it.
    pub fn drain(&mut self, mut handle: impl FnMut(ReplicaId, PeerEvent<'_>)) {
        for (peer, queued) in self.events.drain(..) {
            handle(
                peer,
                match &queued {
                    Queued::Message(range) => PeerEvent::Message(Received::Passing(&self.bytes[range.clone()])),
                    Queued::Kept(message) => PeerEvent::Message(Received::Kept(message)),
                    Queued::Connected => PeerEvent::Connected,
                    Queued::Lost(reason) => PeerEvent::Lost(reason),
                    Queued::Refused(reason) => PeerEvent::Refused(reason),
                },
            );
        }
        self.bytes.clear();
    }
}

/// All others.
#[derive(Debug)]
pub struct Peers {
    peers: Vec<Peer>,
    names: Vec<String>,
    /// Events on their way from the fabric.
    pub inbox: Inbox,
}

impl Peers {
    /// Everybody in the configuration but `me`.
    pub fn new(replicas: &[ReplicaConfig], me: ReplicaId) -> Self {
        let names: Vec<String> = replicas.iter().map(|replica| replica.node.clone()).collect();
        let peers = (0u8..)
            .map(ReplicaId)
            .zip(&names)
            .filter(|(id, _)| *id != me)
            .map(|(id, node)| Peer {
                id,
                node: node.clone(),
                connected: false,
                lost_us: 0,
                report: GuestReport::default(),
                reported: false,
                seen_intact: false,
                refusal: None,
                rejoin_after_us: 0,
            })
            .collect();
        Self { peers, names, inbox: Inbox::default() }
    }

    /// The node's name of any replica of the group.
    pub fn name(&self, id: ReplicaId) -> &str {
        &self.names[id.slot()]
    }

    /// All ids.
    pub fn ids(&self) -> impl Iterator<Item = ReplicaId> + use<> {
        let ids: [Option<ReplicaId>; 2] = [self.peers.first().map(|p| p.id), self.peers.get(1).map(|p| p.id)];
        ids.into_iter().flatten()
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = &Peer> {
        self.peers.iter()
    }

    /// One of them.
    ///
    /// # Panics
    /// When `id` is this replica itself: a mistake of the caller.
    pub fn get(&self, id: ReplicaId) -> &Peer {
        self.peers.iter().find(|peer| peer.id == id).expect("the id of another replica")
    }

    /// One of them, for writing.
    ///
    /// # Panics
    /// As [`Peers::get`].
    pub fn get_mut(&mut self, id: ReplicaId) -> &mut Peer {
        self.peers.iter_mut().find(|peer| peer.id == id).expect("the id of another replica")
    }

    /// Its connection is up; what it said on an earlier one no longer counts.
    pub fn connected(&mut self, id: ReplicaId) {
        let peer = self.get_mut(id);
        peer.connected = true;
        peer.refusal = None;
        peer.reported = false;
        peer.report = GuestReport::default();
    }

    /// Its connection is down.
    pub fn lost(&mut self, id: ReplicaId, now_us: u64) {
        let peer = self.get_mut(id);
        if peer.connected {
            peer.connected = false;
            peer.lost_us = now_us;
        }
    }

    /// It was refused or refuses us.
    pub fn note_refusal(&mut self, id: ReplicaId, reason: &str) {
        let peer = self.get_mut(id);
        if peer.refusal.as_deref() != Some(reason) {
            tracing::warn!(peer = %peer.node, reason, "refused");
            peer.refusal = Some(reason.to_owned());
        }
    }

    /// It says how its guest is.
    pub fn note_report(&mut self, id: ReplicaId, report: GuestReport, now_us: u64) {
        let peer = self.get_mut(id);
        if report.attached && !peer.report.attached {
            peer.rejoin_after_us = peer.rejoin_after_us.min(now_us);
        }
        peer.reported = true;
        peer.seen_intact |= report.intact;
        peer.report = report;
    }

    /// Why no guest may be booted afresh as far as the others are concerned.
    pub fn bar_cold_start(&self) -> Option<String> {
        let connected = || self.peers.iter().filter(|peer| peer.connected);
        if let Some(peer) = connected().find(|peer| peer.report.intact) {
            return Some(format!("{} has a whole guest; a cold start would lose it", peer.node));
        }
        let silent = connected().find(|peer| !peer.reported)?;
        Some(format!("{} has not said yet whether it has a whole guest; try again in a moment", silent.node))
    }

    /// Its rejoin failed: others first, then it again.
    pub fn rest(&mut self, id: ReplicaId, now_us: u64) {
        self.get_mut(id).rejoin_after_us = now_us + REJOIN_RETRY_US;
    }

    /// Who can be brought in now: connected, with a QEMU like ours, and not resting. The one that rested longest first.
    /// `alive` says whether a peer was heard of late: a dead host's connection stands for a while.
    pub fn joiner(&mut self, own: &Fingerprint, now_us: u64, alive: impl Fn(ReplicaId) -> bool) -> Option<ReplicaId> {
        let mut best: Option<(u64, ReplicaId)> = None;
        for peer in &mut self.peers {
            if !peer.connected || !peer.report.attached || peer.rejoin_after_us > now_us || !alive(peer.id) {
                continue;
            }
            let Some(theirs) = &peer.report.fingerprint else { continue };
            if let Err(mismatch) = fingerprint::compare(own, theirs) {
                let reason = format!("its QEMU differs from this node's: {mismatch}");
                if peer.refusal.as_deref() != Some(&reason) {
                    tracing::error!(peer = %peer.node, %reason, "cannot be brought in");
                    peer.refusal = Some(reason);
                }
                continue;
            }
            if best.is_none_or(|(since, _)| peer.rejoin_after_us < since) {
                best = Some((peer.rejoin_after_us, peer.id));
            }
        }
        best.map(|(_, id)| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cold_start_before_all_who_are_connected_have_said_that_they_have_no_guest() {
        let replica = |node: &str| -> ReplicaConfig {
            toml::from_str(&format!("node = \"{node}\"\naddress = \"127.0.0.1:7400\"")).unwrap()
        };
        let mut peers = Peers::new(&["a", "b", "c"].map(replica), ReplicaId(0));
        let bar = |peers: &Peers| peers.bar_cold_start().unwrap_or_default();
        assert_eq!(bar(&peers), "", "nobody is there");
        peers.connected(ReplicaId(1));
        assert!(bar(&peers).starts_with("b has not said"), "{}", bar(&peers));
        peers.note_report(ReplicaId(1), GuestReport { intact: true, ..GuestReport::default() }, 0);
        assert!(bar(&peers).starts_with("b has a whole guest"), "{}", bar(&peers));
        // What it said on an earlier connection says nothing.
        peers.lost(ReplicaId(1), 0);
        assert_eq!(bar(&peers), "");
        peers.connected(ReplicaId(1));
        assert!(bar(&peers).starts_with("b has not said"), "{}", bar(&peers));
        peers.note_report(ReplicaId(1), GuestReport::default(), 0);
        assert_eq!(bar(&peers), "");
    }
}
