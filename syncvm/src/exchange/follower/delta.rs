//! The follower's part of the transfer below the page.

use super::Run;
use crate::dirty::DirtySet;
use crate::exchange::{Channel, Guest, Observer, Phase, SyncError};
use crate::hash::PageHashValue;
use crate::page::PageNumber;
use crate::transfer::{BlockSize, DivergentList, End, HashOfHashes, Kind, Staging, TransferError, Verdict};

/// Pages whose digests go in one message: at most 128 KiB, so that the leader compares while the next are made.
const DIGEST_PAGES: usize = 1024;

impl<G: Guest, C: Channel, O: Observer> Run<'_, G, C, O> {
    /// Steps 3 to 6 up to the acknowledgement. On success the staging area holds what the leader has, whole and verified.
    pub(super) fn receive_blocks(&mut self, staging: &mut Staging, union: &DirtySet) -> Result<(), SyncError> {
        let pages: Vec<PageNumber> = union.iter().collect();
        let hashes = self.send_hashes(&pages)?;
        self.receive_list(staging, &pages, &hashes)?;
        let size = self.ctx.config.blocks.unwrap_or(self.ctx.blocks);
        self.send_digests(staging, size)?;
        self.report.block_bytes = size.bytes();
        self.save_late()?;
        if self.collect(staging, size, Kind::Blocks)? == Verdict::Sound {
            return Ok(());
        }
        tracing::debug!(number = self.header.number, "a digest agreed falsely; the page is sent whole");
        let short_hashes = staging.short_hashes();
        self.ctx.link.send_pieces(&self.header, Kind::Recheck, &short_hashes, &self.deadlines)?;
        match self.collect(staging, size, Kind::Pages)? {
            Verdict::Sound => Ok(()),
            Verdict::Doubtful => Err(TransferError::Content.into()),
        }
    }

    /// Learns which pages differ, and makes sure by the whole hashes that all others are equal.
    fn receive_list(
        &mut self,
        staging: &mut Staging,
        pages: &[PageNumber],
        hashes: &[PageHashValue],
    ) -> Result<(), SyncError> {
        let limit = DivergentList::max_encoded_bytes(pages.len());
        let link = &mut self.ctx.link;
        let wire =
            link.recv_pieces(&self.header, Kind::Divergent, "the list of divergent pages", limit, &self.deadlines)?;
        let list = DivergentList::decode(&wire, pages.len())?;
        self.report.phases.list_us = self.watch.lap();
        let mut equal = HashOfHashes::over(pages);
        let equals = hashes.iter().enumerate().filter(|(place, _)| !list.contains(*place));
        equals.for_each(|(_, hash)| equal.add(hash));
        if equal.value() != list.equal_hash {
            return Err(TransferError::FalselyEqual.into());
        }
        staging.begin_blocks(pages, &list, &wire, self.ctx.config.hash);
        Ok(())
    }

    fn send_digests(&mut self, staging: &mut Staging, size: BlockSize) -> Result<(), SyncError> {
        let seed = self.header.seed();
        let mut body = Vec::new();
        for first in (0..staging.pages_of_blocks()).step_by(DIGEST_PAGES) {
            staging.copy_blocks(self.ctx.guest.ram(), DIGEST_PAGES);
            body.clear();
            body.push(size.code());
            staging.digests(first, DIGEST_PAGES, size, seed, &mut body);
            self.ctx.link.send(&self.header, Kind::Digests, &[&body], self.deadlines.next())?;
        }
        self.report.phases.digest_us = self.watch.lap();
        self.point(Phase::FollowerDigests);
        Ok(())
    }

    /// Takes messages up to the end message. Memory comes as `kind`: blocks, or whole pages in place of patched ones.
    fn collect(&mut self, staging: &mut Staging, size: BlockSize, kind: Kind) -> Result<Verdict, SyncError> {
        let mut first = kind == Kind::Blocks;
        let end = loop {
            let got = self.ctx.link.recv(&self.header, &self.deadlines)?;
            if std::mem::take(&mut first) {
                self.point(Phase::FollowerReceiving);
            }
            let body = self.ctx.link.body();
            match got {
                Kind::Blocks if kind == Kind::Blocks => self.report.sent_blocks += staging.blocks_chunk(body, size)?,
                Kind::Pages if kind == Kind::Pages => self.report.resent_pages += staging.replacement(body)?,
                Kind::Device if kind == Kind::Blocks => {
                    staging.device_chunk(body, self.ctx.config.max_device_bytes)?;
                }
                Kind::DeviceDelta if kind == Kind::Blocks => {
                    staging.device_delta_chunk(body, self.ctx.config.max_device_bytes)?;
                }
                Kind::End => break End::decode(body)?,
                got => return Err(SyncError::Unexpected { got, wanted: "a part of the transfer" }),
            }
        };
        Ok(staging.check(&end)?)
    }
}
