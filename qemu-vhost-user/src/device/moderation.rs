//! When the guest is interrupted because frames that it sent have left.
//!
//! Such an interrupt tells a driver only that it can free buffers, and it does that as well whenever it sends, and Linux' also
//! when it takes what came in. In a dialogue the next request is there before the buffers are missed. So the interrupt waits a
//! little, and is spared when the guest has found out by itself meanwhile: less work for its CPU, and for QEMU's main loop, which
//! passes interrupts on where the accelerator cannot. NICs do the same (`ethtool -C … tx-usecs`). Rejected: VIRTIO_NET_F_NOTF_COAL,
//! which lets the guest ask for this, because guests do not ask.
//!
//! A dialogue has a deadline so late that a sleep until then arms no timer of its own: a tick of the kernel is due before. Each
//! earlier one costs an exit to the hypervisor where there is one, twice per request.
//!
//! The decisions only, with the time as a value; [`super::net`] carries them out.

/// How long such an interrupt waits. Longer than most clients take to answer, short for a sender whose socket is full.
pub(super) const WAIT_US: u64 = 100;
/// The same if the guest is given frames meanwhile: with those it frees what it has sent. A driver that does not must be told.
pub(super) const RECEIVER_WAIT_US: u64 = 1_000;

/// The same for one small frame that follows what the guest was given: it is an answer, and what the guest does next it does
/// when it is given more. Only a socket or a queue that is full with one such frame waits so long.
pub(super) const DIALOGUE_WAIT_US: u64 = 5_000;
/// Longest frame that is small: the smallest send buffer that Linux allows is not full with one of them.
pub(super) const SMALL_FRAME_BYTES: usize = 2_048;

/// An interrupt that is owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Debt {
    since_us: u64,
    /// The used index that it is about.
    upto: u16,
    /// The guest was given frames since.
    received: bool,
    /// It is about one small frame, and the guest was given frames between the one before and this.
    answer: bool,
}

impl Debt {
    /// It arose at `now_us`, when the used index was `upto`.
    pub fn new(now_us: u64, upto: u16, answer: bool) -> Debt {
        Debt { since_us: now_us, upto, received: false, answer }
    }

    /// The used index that it is about.
    pub fn upto(&self) -> u16 {
        self.upto
    }

    /// It is about more by now, and as old as before.
    pub fn extended(self, upto: u16) -> Debt {
        Debt { upto, answer: false, ..self }
    }

    /// The guest was given frames.
    pub fn note_received(&mut self) {
        self.received = true;
    }

    /// When it is to be paid.
    pub fn due_us(&self) -> u64 {
        self.since_us
            + match self {
                Debt { answer: true, .. } => DIALOGUE_WAIT_US,
                Debt { received: true, .. } => RECEIVER_WAIT_US,
                _ => WAIT_US,
            }
    }
}

/// Whether so many transmissions that the guest was not told of are too many to wait: its ring must not run full of them.
pub(super) fn are_many(owed: u16, ring_size: u16) -> bool {
    owed >= (ring_size / 4).max(1)
}
