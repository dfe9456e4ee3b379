//! What can go wrong in an exchange, and what the owner has to do about it.

use std::io;

use thiserror::Error;

use crate::page::PageNumber;
use crate::pairing::Basis;
use crate::transfer::{Kind, TransferError, WireError};

/// Why the channel to the peer failed.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// Nothing arrived, or nothing could be sent, by the deadline.
    #[error("the peer was silent until the deadline")]
    Timeout,
    /// The peer closed the channel.
    #[error("the peer closed the channel")]
    Closed,
    /// A message longer than the channel carries.
    #[error("a message of {bytes} bytes exceeds what the channel carries")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The transport failed.
    #[error("the channel failed")]
    Io(#[from] io::Error),
}

/// A step that QEMU or the device did not carry out.
#[derive(Debug, Error)]
#[error("the guest did not {operation}: {detail}")]
pub struct GuestError {
    /// What was asked ("stop", "load its device state").
    pub operation: &'static str,
    /// What came back.
    pub detail: String,
}

impl GuestError {
    /// An error of `operation` with any displayable cause.
    pub fn new(operation: &'static str, detail: impl std::fmt::Display) -> Self {
        Self { operation, detail: detail.to_string() }
    }
}

/// Why an exchange ended without success.
#[derive(Debug, Error)]
pub enum SyncError {
    /// The local guest refused a step before the point of no return; it is as it was.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The channel failed; reconnect before the next exchange.
    #[error("the exchange with the peer broke off")]
    Channel(#[from] ChannelError),
    /// The peer sent something malformed.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The transfer was refused; the guest is untouched.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The peer gave up.
    #[error("the peer gave the exchange up: {reason}")]
    PeerAborted {
        /// A rejoin must come first.
        needs_rejoin: bool,
        /// A short hash or a digest agreed falsely.
        hash_agreed_falsely: bool,
        /// In the peer's words.
        reason: String,
    },
    /// The two sides are configured differently.
    #[error("{what} differs: {ours} here, {theirs} at the peer; give both replicas the same configuration")]
    Mismatch {
        /// What.
        what: &'static str,
        /// Here.
        ours: u64,
        /// There.
        theirs: u64,
    },
    /// The follower's guest does not stand on what the leader's dirty set is relative to.
    #[error(
        "this guest stands on {ours:?}, the leader's dirty pages are relative to {theirs:?}; a rejoin must come first"
    )]
    NotWhole {
        /// The follower's basis.
        ours: Option<Basis>,
        /// The leader's.
        theirs: Option<Basis>,
    },
    /// The peer is already in a later exchange; its message is kept for it.
    #[error("the peer is in view {view} with exchange {number} already")]
    Superseded {
        /// The peer's view.
        view: u64,
        /// Its exchange.
        number: u64,
    },
    /// A message of another group.
    #[error("a message of group {theirs:#x} arrived on the channel of group {ours:#x}; check the peer addresses")]
    ForeignGroup {
        /// This group.
        ours: u64,
        /// The message's.
        theirs: u64,
    },
    /// A message that does not belong here.
    #[error("the peer sent {got:?} where {wanted} was due")]
    Unexpected {
        /// What came.
        got: Kind,
        /// What should have come.
        wanted: &'static str,
    },
    /// This replica's guest may not run any more (it is no longer leader).
    #[error("this replica lost its role during the exchange; its guest stays stopped")]
    Deposed,
    /// The guest writes faster than the rejoin carries, and the policy says not to stop it.
    #[error(
        "the guest writes faster than rejoin rounds carry: {left} pages are left, {target} are allowed; raise the target or let the rejoin stop the guest"
    )]
    NotConverging {
        /// Pages left after the last round.
        left: usize,
        /// Pages allowed.
        target: usize,
    },
    /// Invariant I4 does not hold.
    #[error(
        "after syncvm {number} the guests differ in {pages} pages (first: {first_pages:?}) and {device_bytes} bytes of device state (first at {first_device_byte:?})"
    )]
    Diverged {
        /// The syncvm.
        number: u64,
        /// How many pages differ.
        pages: usize,
        /// The first of them.
        first_pages: Vec<PageNumber>,
        /// How many bytes of device state differ.
        device_bytes: usize,
        /// Where the first is.
        first_device_byte: Option<usize>,
    },
    /// The follower's devices have something set that the leader's state does not mention. Nothing was applied.
    #[error("this guest has device state that a load would leave as it is ({}); it must rejoin", parts.join(", "))]
    Leftovers {
        /// Which parts.
        parts: Vec<String>,
    },
    /// Saving the follower's device state wrote guest memory behind the comparison. Nothing was applied; from the next syncvm on it
    /// is saved before anything is compared.
    #[error("saving the device state wrote {pages} pages that had been compared; the next syncvm saves first")]
    SavingWrites {
        /// How many.
        pages: usize,
    },
    /// The follower's guest is lost: the transfer was acknowledged but QEMU did not take the state.
    #[error("this guest is lost and must rejoin")]
    GuestLost(#[source] GuestError),
    /// The exchange failed and then the guest did not run again either.
    #[error("{cause}; afterwards the guest could not be resumed: {resume}")]
    NotResumed {
        /// The first failure.
        #[source]
        cause: Box<SyncError>,
        /// The second.
        resume: GuestError,
    },
}

impl SyncError {
    /// Whether the channel must be replaced before the next exchange.
    #[must_use]
    pub fn channel_broken(&self) -> bool {
        match self {
            Self::Channel(_) => true,
            Self::NotResumed { cause, .. } => cause.channel_broken(),
            _ => false,
        }
    }

    /// Whether the peer let a deadline pass.
    #[must_use]
    pub fn peer_was_silent(&self) -> bool {
        match self {
            Self::Channel(ChannelError::Timeout) => true,
            Self::NotResumed { cause, .. } => cause.peer_was_silent(),
            _ => false,
        }
    }

    /// Whether a short hash or a digest took what differs for equal. It would again, so the next syncvm must not rest on them.
    #[must_use]
    pub fn hash_agreed_falsely(&self) -> bool {
        match self {
            Self::PeerAborted { hash_agreed_falsely, .. } => *hash_agreed_falsely,
            Self::Transfer(TransferError::FalselyEqual | TransferError::Content | TransferError::DeviceDelta) => true,
            Self::NotResumed { cause, .. } => cause.hash_agreed_falsely(),
            _ => false,
        }
    }

    /// Whether another syncvm is pointless before a rejoin.
    #[must_use]
    pub fn needs_rejoin(&self) -> bool {
        match self {
            Self::PeerAborted { needs_rejoin, .. } => *needs_rejoin,
            Self::NotWhole { .. } | Self::Diverged { .. } | Self::GuestLost(_) | Self::Leftovers { .. } => true,
            Self::NotResumed { cause, .. } => cause.needs_rejoin(),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_passed_is_told_from_a_channel_that_broke() {
        let silent = || SyncError::Channel(ChannelError::Timeout);
        assert!(silent().peer_was_silent());
        let resume = GuestError::new("cont", "no");
        assert!(SyncError::NotResumed { cause: Box::new(silent()), resume }.peer_was_silent());
        assert!(!SyncError::Channel(ChannelError::Closed).peer_was_silent() && !SyncError::Deposed.peer_was_silent());
    }
}
