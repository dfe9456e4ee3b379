//! Feature bits of the device: what it offers, and what a guest's choice means for the uplink.
//!
//! The control queue is QEMU's own, so it is not ours to offer or to refuse; MQ, which needs it, has effect if QEMU has `mq=on`. GUEST_ANNOUNCE is left out because a guest that
//! announces itself after a load would send frames that its twin does not send; the daemon announces the MAC itself.
//! VHOST_F_LOG_ALL is left out because syncvm, not QEMU's migration, carries these guests.

use virtio_bindings::bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Bit 30 of the vhost-user feature word (VHOST_USER_F_PROTOCOL_FEATURES): not a virtio feature, QEMU never shows it to guests.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Names as QEMU's vhost-user schema and the virtio headers spell them, with their bits.
const OFFERED: [(&str, u32); 14] = [
    ("csum", VIRTIO_NET_F_CSUM),
    ("guest-csum", VIRTIO_NET_F_GUEST_CSUM),
    ("guest-tso4", VIRTIO_NET_F_GUEST_TSO4),
    ("guest-tso6", VIRTIO_NET_F_GUEST_TSO6),
    ("guest-ecn", VIRTIO_NET_F_GUEST_ECN),
    ("host-tso4", VIRTIO_NET_F_HOST_TSO4),
    ("host-tso6", VIRTIO_NET_F_HOST_TSO6),
    ("host-ecn", VIRTIO_NET_F_HOST_ECN),
    ("mrg-rxbuf", VIRTIO_NET_F_MRG_RXBUF),
    ("mq", VIRTIO_NET_F_MQ),
    ("indirect-desc", VIRTIO_RING_F_INDIRECT_DESC),
    ("event-idx", VIRTIO_RING_F_EVENT_IDX),
    ("version-1", VIRTIO_F_VERSION_1),
    // Buffers are completed in the order in which they were offered anyway (`ring`), so the driver may rely on it.
    ("in-order", VIRTIO_F_IN_ORDER),
];

/// The virtio feature bits that a guest and the device have agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// Everything that the device offers, without the vhost-user bit 30.
    pub fn offered() -> Self {
        Self(OFFERED.iter().fold(0, |bits, (_, bit)| bits | 1 << bit))
    }

    /// Names of everything offered, for `--print-capabilities`.
    pub fn offered_names() -> impl Iterator<Item = &'static str> {
        OFFERED.iter().map(|(name, _)| *name)
    }

    fn has(self, bit: u32) -> bool {
        self.0 & 1 << bit != 0
    }

    pub(crate) fn event_idx(self) -> bool {
        self.has(VIRTIO_RING_F_EVENT_IDX)
    }

    pub(crate) fn indirect(self) -> bool {
        self.has(VIRTIO_RING_F_INDIRECT_DESC)
    }

    pub(crate) fn mergeable(self) -> bool {
        self.has(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// Length of the header in the guest's buffers. Only a driver of before virtio 1.0 that merges no buffers has the short
    /// one, without `num_buffers` (virtio 1.2 §5.1.6.1).
    pub(crate) fn header_bytes(self) -> usize {
        if self.has(VIRTIO_F_VERSION_1) || self.mergeable() { 12 } else { 10 }
    }

    /// What the uplink may leave undone on frames for this guest.
    pub fn offloads(self) -> Offloads {
        let checksum = self.has(VIRTIO_NET_F_GUEST_CSUM);
        // virtio 1.2 §5.1.3.1: the segmentation bits need GUEST_CSUM, and ECN needs one of them.
        let tso4 = checksum && self.has(VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = checksum && self.has(VIRTIO_NET_F_GUEST_TSO6);
        Offloads { checksum, tso4, tso6, ecn: (tso4 || tso6) && self.has(VIRTIO_NET_F_GUEST_ECN) }
    }
}

/// What the guest accepts in received frames, thus what TUNSETOFFLOAD on the TAP should allow. Default: nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Checksums may be incomplete (`TUN_F_CSUM`).
    pub checksum: bool,
    /// TCP over IPv4 segments may be longer than the MTU (`TUN_F_TSO4`).
    pub tso4: bool,
    /// TCP over IPv6 segments may be longer than the MTU (`TUN_F_TSO6`).
    pub tso6: bool,
    /// Such segments may carry ECN bits (`TUN_F_TSO_ECN`).
    pub ecn: bool,
}

impl Offloads {
    /// The same as the argument of TUNSETOFFLOAD (linux/if_tun.h).
    pub fn tun_flags(self) -> u32 {
        let wanted = [self.checksum, self.tso4, self.tso6, self.ecn];
        // TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 and TUN_F_TSO_ECN are the bits 0 to 3.
        (0..).zip(wanted).fold(0, |flags, (bit, wanted)| flags | u32::from(wanted) << bit)
    }
}

/// The answer to `--print-capabilities` (QEMU docs/interop/vhost-user.rst, «Backend program conventions»).
pub fn capabilities_json() -> String {
    let features: Vec<_> = Features::offered_names().collect();
    serde_json::json!({ "type": "net", "features": features }).to_string()
}
