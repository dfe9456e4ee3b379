//! The leader's part of the transfer below the page.
//!
//! Short page hashes find the divergent pages; the list of them goes out before they are copied, so that the follower
//! digests their blocks while this side copies and resumes. Everything after the copy works on private copies: the stop
//! is not longer than with whole pages. The sides still take turns in sending: list, digests, blocks to end message,
//! acknowledgement (or a recheck, whole pages and another end message).

use super::Run;
use crate::dirty::DirtySet;
use crate::exchange::{BATCH_PAGES, Channel, Guest, Observer, Phase, SyncError};
use crate::page::PageNumber;
use crate::transfer::{
    BlockSize, Checksum, DivergentList, HashOfHashes, Kind, SHORT_HASH_BYTES, WireError, decode_digests,
    differing_blocks, short,
};

/// What the leader remembers of the comparison until the follower has put the pages together.
#[derive(Default)]
pub(super) struct Delta {
    /// Each page that differs, with whether it is zero.
    divergent: Vec<(PageNumber, bool)>,
    checksum: Checksum,
    /// Of the union, and of its divergent pages that are not zero.
    content: HashOfHashes,
    short_hashes: Vec<[u8; SHORT_HASH_BYTES]>,
}

impl Delta {
    /// The pages to be copied.
    pub fn pages(&self) -> impl Iterator<Item = (PageNumber, Option<bool>)> + Clone + '_ {
        self.divergent.iter().map(|&(page, zero)| (page, Some(zero)))
    }
}

impl<G: Guest, C: Channel, O: Observer> Run<'_, G, C, O> {
    /// Steps 3 and 4 with short hashes.
    pub(super) fn compare_short(&mut self, union: &DirtySet) -> Result<Delta, SyncError> {
        let pages: Vec<PageNumber> = union.iter().collect();
        let mut equal = HashOfHashes::over(&pages);
        let mut delta = Delta { content: equal.clone(), ..Delta::default() };
        let mut places = Vec::new();
        let zero_hash = self.ctx.config.hash.zero_page();
        for (index, batch) in pages.chunks(BATCH_PAGES).enumerate() {
            self.compare_batch(batch, |at, hash, is_equal| {
                if is_equal {
                    return equal.add(hash);
                }
                let zero = *hash == zero_hash;
                places.push((index * BATCH_PAGES + at, zero));
                delta.divergent.push((batch[at], zero));
                if !zero {
                    delta.content.add(hash);
                    delta.short_hashes.push(short(hash));
                }
            })?;
            if index == 0 {
                self.point(Phase::LeaderHashed);
            }
        }
        self.compared(pages.len(), places.len());
        self.send_list(&mut delta, &DivergentList::new(pages.len(), &places, equal.value()))?;
        Ok(delta)
    }

    fn send_list(&mut self, delta: &mut Delta, list: &DivergentList) -> Result<(), SyncError> {
        let wire = list.encode();
        delta.checksum.add(Kind::Divergent, &[&wire]);
        self.ctx.link.send_pieces(&self.header, Kind::Divergent, &wire, &self.deadlines)?;
        self.report.phases.list_us = self.watch.lap();
        self.point(Phase::LeaderListed);
        Ok(())
    }

    /// Step 5, second half: the blocks whose digests differ.
    pub(super) fn send_blocks(&mut self, delta: &mut Delta) -> Result<(), SyncError> {
        let (size, maps) = self.receive_digests()?;
        self.report.phases.digest_us = self.watch.lap();
        self.point(Phase::LeaderDigests);
        let (outgoing, link, observer) = (&mut self.ctx.outgoing, &mut self.ctx.link, &mut self.ctx.observer);
        let (header, deadlines) = (&self.header, &self.deadlines);
        let half = maps.len() / 2;
        let mut half_sent = false;
        let mut send = |pages, kind, parts: &[&[u8]]| {
            link.send(header, kind, parts, deadlines.next())?;
            if pages >= half && !half_sent {
                half_sent = true;
                observer.crash_point(Phase::LeaderSentHalf);
            }
            Ok::<(), SyncError>(())
        };
        self.report.block_bytes = size.bytes();
        self.report.sent_blocks = outgoing.send_blocks(size, &maps, &mut delta.checksum, &mut send)?;
        outgoing.send_device_to(self.device_held, &mut delta.checksum, &mut send)?;
        let end = outgoing.end(&delta.checksum, delta.content.value());
        link.send(header, Kind::End, &[&end.encode()], deadlines.next())
    }

    /// The follower's digests, compared as they come. None are due when no page needs them.
    fn receive_digests(&mut self) -> Result<(BlockSize, Vec<u64>), SyncError> {
        let (outgoing, link) = (&self.ctx.outgoing, &mut self.ctx.link);
        let seed = self.header.seed();
        let mut maps = Vec::with_capacity(outgoing.nonzero_pages().len());
        let mut pages = outgoing.nonzero_pages();
        let mut size = BlockSize::default();
        while pages.len() > 0 {
            let body = link.expect(&self.header, Kind::Digests, "digests of blocks", &self.deadlines)?;
            let (theirs, digests) = decode_digests(body)?;
            let first = maps.is_empty();
            if digests.len() == 0 || digests.len() > pages.len() || (!first && theirs != size) {
                return Err(WireError::Value { field: "number of digests", value: digests.len() as u64 }.into());
            }
            size = theirs;
            maps.extend(digests.zip(&mut pages).map(|(theirs, page)| differing_blocks(page, theirs, size, seed)));
        }
        Ok((size, maps))
    }

    /// The follower's pages are not this guest's: those that differ go whole. The copies are still there.
    pub(super) fn resend(&mut self, delta: &mut Delta) -> Result<(), SyncError> {
        let (link, bytes) = (&mut self.ctx.link, delta.short_hashes.len() * SHORT_HASH_BYTES);
        let theirs =
            link.recv_pieces(&self.header, Kind::Recheck, "hashes of the patched pages", bytes, &self.deadlines)?;
        if theirs.len() != bytes {
            return Err(WireError::Value { field: "number of hash bytes", value: theirs.len() as u64 }.into());
        }
        let differ = delta.short_hashes.iter().zip(theirs.chunks_exact(SHORT_HASH_BYTES));
        let places: Vec<usize> =
            differ.enumerate().filter(|(_, (ours, theirs))| ours != theirs).map(|(place, _)| place).collect();
        let again = self.ctx.outgoing.again(&places);
        let (link, header, deadlines) = (&mut self.ctx.link, &self.header, &self.deadlines);
        again.send_pages(&mut delta.checksum, |_, kind, parts| link.send(header, kind, parts, deadlines.next()))?;
        let end = self.ctx.outgoing.end(&delta.checksum, delta.content.value());
        link.send(header, Kind::End, &[&end.encode()], deadlines.next())?;
        self.report.resent_pages = places.len();
        Ok(())
    }
}
