//! Fuzz targets for what a guest, a peer or a file can send.
//!
//! A target is a function of bytes that must neither panic nor hang, whatever they are. `cargo xtask fuzz` runs each under
//! libFuzzer with coverage; the inputs worth keeping are in `corpus/TARGET`, and an ordinary test replays them, so that a
//! finding stays a regression test on every machine. Rejected: the layout of cargo-fuzz, which wants a nightly compiler and
//! a workspace of its own (another Cargo.lock, none of our lints).

mod guest;
mod rings;
mod transfer;
mod vhost_user;

/// A target.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What a person types; also the name of its corpus.
    pub name: &'static str,
    /// Takes one input.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "vhost-user", run: vhost_user::run },
    Target { name: "rings", run: rings::run },
    Target { name: "transfer", run: transfer::run },
    Target { name: "consensus-message", run: consensus_message },
    Target { name: "batch", run: batch },
    Target { name: "fabric-hello", run: dataplane::fabric::fuzz::hello },
    Target { name: "fabric-frames", run: dataplane::fabric::fuzz::frames },
    Target { name: "fabric-lane", run: dataplane::fabric::fuzz::lane },
    Target { name: "filter", run: dataplane::uplink::filter::fuzz_filter },
    Target { name: "segments", run: dataplane::uplink::offload::fuzz_segments },
    Target { name: "join", run: dataplane::coalesce::fuzz_join },
    Target { name: "fabric-rdma", run: dataplane::fabric::rdma::fuzz::arrivals },
];

/// A consensus message from a peer: what decodes must encode to something that decodes to the same.
fn consensus_message(bytes: &[u8]) {
    let mut effects = consensus::Effects::default();
    if let Ok(message) = effects.decode(bytes) {
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(effects.decode(&again).as_ref(), Ok(&message), "a message changes on its second way over the wire");
    }
    let _ = consensus::HardState::decode(bytes);
    let _ = consensus::Entry::decode(bytes);
}

/// The payload of an `Input` entry: all of it comes out, or nothing.
fn batch(bytes: &[u8]) {
    if let Ok(frames) = dataplane::batch::frames(bytes) {
        let total: usize = frames.map(|frame| frame.len() + 4).sum();
        assert_eq!(total + 4, bytes.len(), "a batch that was taken has bytes that no frame has");
    }
}
