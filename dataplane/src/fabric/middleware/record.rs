//! What passes, as pcapng: one interface per peer, one packet per message, direction and time with each.
//!
//! The link type is USER0, so a dissector can be bound to it; without one wireshark and tcpdump show the bytes. A
//! connection that begins or ends is an empty packet with a comment. The writer is a page of code; the crates that
//! write pcapng bring a parser along.

use super::super::{Fabric, FabricEvent, PeerId, SendError};
use super::leave_to;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
const LINK_TYPE_USER0: u16 = 147;
const OPTION_COMMENT: u16 = 1;
const OPTION_NAME: u16 = 2;
const OPTION_FLAGS: u16 = 2;

#[derive(Debug, Clone, Copy)]
#[repr(u32)]
enum Direction {
    Inbound = 1,
    Outbound = 2,
}

/// A pcapng stream.
#[derive(Debug)]
struct Capture<W> {
    out: W,
    /// The interface's number is the place in here.
    peers: Vec<PeerId>,
    block: Vec<u8>,
    failed: bool,
}

impl<W: Write> Capture<W> {
    fn new(out: W) -> Capture<W> {
        let mut capture = Capture { out, peers: Vec::new(), block: Vec::new(), failed: false };
        capture.write_block(SECTION_HEADER, |block| {
            block.extend(BYTE_ORDER_MAGIC.to_le_bytes());
            block.extend([1, 0, 0, 0]);
            // The section's length is not known.
            block.extend(u64::MAX.to_le_bytes());
        });
        capture
    }

    fn interface(&mut self, peer: PeerId) -> u32 {
        let known = self.peers.iter().position(|of| *of == peer);
        let number = known.unwrap_or_else(|| {
            self.write_block(INTERFACE_DESCRIPTION, |block| {
                block.extend(LINK_TYPE_USER0.to_le_bytes());
                block.extend([0; 2]);
                // No limit of length; and times in µs, which is the default.
                block.extend(0u32.to_le_bytes());
                let mut name = String::new();
                write!(name, "replica {peer}").expect("strings take everything");
                option(block, OPTION_NAME, name.as_bytes());
                option(block, 0, &[]);
            });
            self.peers.push(peer);
            self.peers.len() - 1
        });
        number as u32
    }

    fn packet(&mut self, peer: PeerId, direction: Direction, parts: &[&[u8]], comment: Option<&str>) {
        let interface = self.interface(peer);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros() as u64;
        self.write_block(ENHANCED_PACKET, |block| {
            let length = parts.iter().map(|part| part.len()).sum::<usize>() as u32;
            for word in [interface, (now >> 32) as u32, now as u32, length, length] {
                block.extend(word.to_le_bytes());
            }
            parts.iter().for_each(|part| block.extend_from_slice(part));
            pad(block);
            option(block, OPTION_FLAGS, &(direction as u32).to_le_bytes());
            if let Some(comment) = comment {
                option(block, OPTION_COMMENT, comment.as_bytes());
            }
            option(block, 0, &[]);
        });
    }

    fn write_block(&mut self, kind: u32, body: impl FnOnce(&mut Vec<u8>)) {
        self.block.clear();
        self.block.extend(kind.to_le_bytes());
        self.block.extend([0; 4]);
        body(&mut self.block);
        let length = (self.block.len() + 4) as u32;
        self.block[4..8].copy_from_slice(&length.to_le_bytes());
        self.block.extend(length.to_le_bytes());
        if self.failed {
            return;
        }
        if let Err(error) = self.out.write_all(&self.block) {
            tracing::warn!(%error, "the recording of the fabric ends here; is the disk full?");
            self.failed = true;
        }
    }
}

fn option(block: &mut Vec<u8>, code: u16, value: &[u8]) {
    // Only comments could be longer, and the reasons in them are not.
    let value = &value[..value.len().min(usize::from(u16::MAX))];
    block.extend(code.to_le_bytes());
    block.extend((value.len() as u16).to_le_bytes());
    block.extend(value);
    pad(block);
}

fn pad(block: &mut Vec<u8>) {
    block.resize(block.len().next_multiple_of(4), 0);
}

/// Records what passes; see the module.
#[derive(Debug)]
pub struct Recorder<F, W> {
    inner: F,
    capture: Capture<W>,
}

impl<F: Fabric, W: Write + Send> Recorder<F, W> {
    /// Writes to `out` what passes `inner`. Every message is one write, so `out` should be buffered; what cannot be written
    /// ends the recording, with a line in the log, and never the fabric.
    pub fn new(inner: F, out: W) -> Recorder<F, W> {
        Recorder { inner, capture: Capture::new(out) }
    }

    /// Ends the recording and gives both back.
    ///
    /// # Errors
    /// The writer's.
    pub fn finish(mut self) -> io::Result<(F, W)> {
        self.capture.out.flush()?;
        Ok((self.inner, self.capture.out))
    }
}

impl<W: Write> Capture<W> {
    fn note(&mut self, event: &FabricEvent<'_>) {
        match event {
            FabricEvent::Message { peer, bytes } => self.packet(*peer, Direction::Inbound, &[bytes], None),
            FabricEvent::Connected { peer, instance } => {
                self.packet(*peer, Direction::Inbound, &[], Some(&format!("connected, instance {instance:016x}")));
            }
            FabricEvent::Lost { peer, reason } => {
                self.packet(*peer, Direction::Inbound, &[], Some(&format!("lost: {reason}")));
            }
            FabricEvent::Refused { peer, reason } => {
                self.packet(*peer, Direction::Inbound, &[], Some(&format!("refused: {reason}")));
            }
        }
    }
}

impl<F: Fabric, W: Write + Send> Fabric for Recorder<F, W> {
    fn send(&mut self, peer: PeerId, parts: &[&[u8]]) -> Result<(), SendError> {
        self.inner.send(peer, parts)?;
        self.capture.packet(peer, Direction::Outbound, parts, None);
        Ok(())
    }

    fn poll(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let capture = &mut self.capture;
        self.inner.poll(now_us, &mut |event| {
            capture.note(&event);
            sink(event);
        });
    }

    fn poll_lanes(&mut self, now_us: u64, sink: &mut dyn FnMut(FabricEvent<'_>)) {
        let capture = &mut self.capture;
        self.inner.poll_lanes(now_us, &mut |event| {
            capture.note(&event);
            sink(event);
        });
    }

    leave_to!(
        inner: has_memory_lanes, arm, next_deadline_us, is_connected, last_heard_us, queued_bytes, disconnect, trouble
    );
}
