//! The encrypted stream of a bulk link.
//!
//! Bytes are copied twice on each side besides the kernel's copy: into a record's plain text and, by the cipher's
//! library, to where they are encrypted in place. Both buffers stay in the core's second-level cache.

use super::BulkError;
use super::stream::Stream;
use crate::fabric::secure::{Cipher, MAX_PLAIN_BYTES, Parts, Records, sealed_bytes};
use std::io::IoSlice;
use std::time::Instant;

const MAX_SEALED_BYTES: usize = sealed_bytes(MAX_PLAIN_BYTES);
const TAG_BYTES: usize = 16;
/// Records that one system call sends. More do not make it faster and fall out of the cache.
const BATCH_RECORDS: usize = 4;

/// A connection's keys and buffers.
#[derive(Debug)]
pub(super) struct Sealed {
    cipher: Box<Cipher>,
    records: Records,
    /// Bytes of a record that were not asked for yet are `ahead[taken..]`.
    ahead: Vec<u8>,
    taken: usize,
    out: Box<[u8]>,
}

impl Sealed {
    pub fn new(cipher: Box<Cipher>) -> Sealed {
        let out = vec![0; BATCH_RECORDS * MAX_SEALED_BYTES].into();
        Sealed { cipher, records: Records::new(&[]), ahead: Vec::new(), taken: 0, out }
    }

    /// Sends `header`, in a record of its own so that the receiver can open the rest where it belongs, and `parts`.
    /// An error leaves the stream without meaning.
    pub fn send(
        &mut self,
        stream: &Stream,
        header: &[u8],
        parts: &[IoSlice<'_>],
        deadline: Instant,
    ) -> Result<(), BulkError> {
        let mut filled = self.cipher.seal_next(&mut Parts::new(std::iter::once(header)), &mut self.out);
        let mut parts = Parts::new(parts.iter().map(|part| &**part));
        loop {
            let mut ended = false;
            while !ended && self.out.len() - filled >= MAX_SEALED_BYTES {
                let bytes = self.cipher.seal_next(&mut parts, &mut self.out[filled..]);
                filled += bytes;
                ended = bytes == 0;
            }
            stream.write_all(&mut [IoSlice::new(&self.out[..filled])], &mut false, deadline)?;
            if ended {
                return Ok(());
            }
            filled = 0;
        }
    }

    /// Appends bytes of the stream to `buf` until it is `len` long.
    pub fn recv_exact(
        &mut self,
        stream: &Stream,
        buf: &mut Vec<u8>,
        len: usize,
        deadline: Instant,
    ) -> Result<(), BulkError> {
        // The last record is opened in place with its tag.
        buf.reserve_exact(len.saturating_sub(buf.len()) + TAG_BYTES);
        while buf.len() < len {
            let missing = len - buf.len();
            let ahead = &self.ahead[self.taken..];
            if !ahead.is_empty() {
                let take = missing.min(ahead.len());
                buf.extend_from_slice(&ahead[..take]);
                self.taken += take;
            } else if let Some(record_bytes) = self.records.whole() {
                if record_bytes <= missing + TAG_BYTES {
                    self.open_into(buf, record_bytes)?;
                } else {
                    let mut ahead = std::mem::take(&mut self.ahead);
                    ahead.clear();
                    let opened = self.open_into(&mut ahead, record_bytes);
                    (self.ahead, self.taken) = (ahead, 0);
                    opened?;
                }
            } else {
                let received = stream.read(self.records.room(), deadline)?;
                self.records.received(received);
            }
        }
        Ok(())
    }

    /// Appends the next record's bytes to `buf`.
    fn open_into(&mut self, buf: &mut Vec<u8>, record_bytes: usize) -> Result<(), BulkError> {
        let at = buf.len();
        buf.resize(at + record_bytes, 0);
        let opened = self.records.open(&mut self.cipher, &mut buf[at..]);
        buf.truncate(at + opened.unwrap_or(0));
        opened.map(drop).map_err(|forged| BulkError::Protocol(forged.to_string()))
    }
}
