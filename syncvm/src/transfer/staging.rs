//! `Staging`: where the follower collects a transfer before any of it touches its guest.
//!
//! PLOVER §4.4: "The secondary saves the pages in a static buffer, sends an ACK to the leader, and applies
//! divergent pages to its guest VM in an atomic manner." The type makes the order a matter of compiling:
//! only a [`VerifiedTransfer`] can be applied, and only a complete transfer with the right counts and
//! checksum becomes one.
//!
//! A transfer of blocks begins with copies of the follower's own pages, into which the blocks go. Blocks are chosen by short
//! digests, so each page is hashed as soon as it is patched, and only the content that the leader named is
//! [`Verdict::Sound`].

use thiserror::Error;

use super::blocks::{BlockSize, BlocksChunk, Differences, digest_page};
use super::buffer::PageBuffer;
use super::divergent::{DivergentList, HashOfHashes, short};
use super::outgoing::Checksum;
use super::{DeviceDelta, End, Kind, PagesChunk, Piece, WireError, device_hash};
use crate::dirty::DirtySet;
use crate::hash::{HashKind, PageHashValue};
use crate::page::{PAGE_BYTES, PageNumber};
use crate::ram::GuestRam;

/// Why a transfer was refused. The guest is untouched.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TransferError {
    /// Bytes that no correct leader sends.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A page that is not in the union, which no correct leader sends.
    #[error("the leader sent {page}, which is not in the union of the dirty sets")]
    NotInUnion {
        /// Which.
        page: PageNumber,
    },
    /// A page that was sent before.
    #[error("the leader sent {page} twice in one transfer")]
    Twice {
        /// Which.
        page: PageNumber,
    },
    /// The counts of the end message are not what arrived.
    #[error("the transfer is incomplete: {field} should be {announced}, received {received}")]
    Count {
        /// Which count.
        field: &'static str,
        /// From the end message.
        announced: u64,
        /// What arrived.
        received: u64,
    },
    /// The pages that the leader takes for equal have other hashes here: a short hash let a difference through.
    #[error("pages that were taken for equal differ; the next syncvm compares whole hashes")]
    FalselyEqual,
    /// The device state put together from what differs is not the leader's.
    #[error("the device state put together from a delta is not the leader's; the next syncvm sends it whole")]
    DeviceDelta,
    /// Blocks for more pages than are waiting for any.
    #[error("the leader sent blocks of {excess} pages too many")]
    TooManyPages {
        /// How many.
        excess: usize,
    },
    /// The patched pages are not the leader's, although what was doubtful has been sent whole.
    #[error("the pages put together from blocks are not the leader's; the next syncvm sends whole pages")]
    Content,
    /// The checksum differs.
    #[error("the transfer's checksum is {received:#x}, announced was {announced:#x}")]
    Checksum {
        /// From the end message.
        announced: u64,
        /// Over what arrived.
        received: u64,
    },
}

/// What a complete transfer is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is what the leader has.
    Sound,
    /// A short digest took a block for equal that is not: some page must be sent whole.
    Doubtful,
}

/// The pages that blocks have gone into, in order.
#[derive(Debug)]
struct Patched {
    union: HashOfHashes,
    hash: HashKind,
    /// As they are after the last block or replacement.
    hashes: Vec<PageHashValue>,
}

impl Patched {
    fn content(&self) -> [u8; 16] {
        let mut content = self.union.clone();
        self.hashes.iter().for_each(|hash| content.add(hash));
        content.value()
    }
}

/// Collects a transfer. One per follower; its buffers are kept from one syncvm to the next.
#[derive(Debug)]
pub struct Staging {
    pages: Vec<(PageNumber, Option<usize>)>,
    /// Whole pages.
    data: PageBuffer,
    /// With blocks: how many pages `data` will have once they are copied, and how many of `pages` were looked at for that.
    waiting: usize,
    looked_at: usize,
    device: Vec<u8>,
    /// The last one that was loaded, as far as [`Self::keep_device`] knows: what a delta is relative to.
    device_held: Vec<u8>,
    /// Pieces of a delta.
    delta: Vec<u8>,
    device_complete: bool,
    seen: DirtySet,
    zero_pages: u64,
    checksum: Checksum,
    /// With blocks: what is known of the pages in `data`.
    patched: Option<Patched>,
    sound: bool,
}

impl Staging {
    /// An empty staging area for a guest of `ram_pages` pages.
    #[must_use]
    pub fn new(ram_pages: usize) -> Self {
        Self {
            pages: Vec::new(),
            data: PageBuffer::default(),
            device: Vec::new(),
            device_held: Vec::new(),
            delta: Vec::new(),
            device_complete: false,
            waiting: 0,
            looked_at: 0,
            seen: DirtySet::new(ram_pages),
            zero_pages: 0,
            checksum: Checksum::default(),
            patched: None,
            sound: false,
        }
    }

    /// Throws away what was collected.
    pub fn begin(&mut self) {
        self.pages.clear();
        self.data.clear();
        (self.waiting, self.looked_at) = (0, 0);
        self.device.clear();
        self.delta.clear();
        self.device_complete = false;
        self.seen.clear();
        self.zero_pages = 0;
        self.checksum = Checksum::default();
        self.patched = None;
        self.sound = false;
    }

    /// As [`Self::begin`], for blocks of the pages of `union` that `list` (decoded from `wire`) names. `hash` is the hash of
    /// pages. What the blocks go into are copies of the pages, which [`Self::copy_blocks`] makes.
    pub fn begin_blocks(&mut self, union: &[PageNumber], list: &DivergentList, wire: &[u8], hash: HashKind) {
        self.begin();
        self.checksum.add(Kind::Divergent, &[wire]);
        for (place, zero) in list.iter() {
            let data_at = (!zero).then_some(self.waiting * PAGE_BYTES);
            self.waiting += usize::from(!zero);
            self.zero_pages += u64::from(zero);
            self.pages.push((union[place], data_at));
        }
        self.patched = Some(Patched { union: HashOfHashes::over(union), hash, hashes: Vec::new() });
    }

    /// Copies the next `count` of the pages that wait for blocks, or as many as are left, out of a guest that must not run
    /// before the transfer is over. Not all at once, because the leader waits for their digests.
    pub fn copy_blocks(&mut self, ram: &GuestRam, count: usize) {
        let end = self.waiting.min(self.data.pages() + count);
        while self.data.pages() < end {
            let (page, data_at) = self.pages[self.looked_at];
            self.looked_at += 1;
            if data_at.is_some() {
                ram.read_page(page, self.data.slot());
                assert_eq!(data_at, Some(self.data.keep()), "pages are copied in their order");
            }
        }
    }

    /// How many pages wait for blocks, copied or not.
    #[must_use]
    pub fn pages_of_blocks(&self) -> usize {
        self.waiting
    }

    /// Gives back memory that only an unusually large transfer needed. Takes its time.
    pub fn trim(&mut self) {
        self.data.trim();
    }

    /// Appends the digests of `count` of these pages from `first` on, as far as they are copied.
    pub fn digests(&self, first: usize, count: usize, size: BlockSize, seed: u64, out: &mut Vec<u8>) {
        self.data.iter().skip(first).take(count).for_each(|page| digest_page(page, size, seed, out));
    }

    /// Takes the body of a [`Kind::Blocks`] message.
    ///
    /// # Errors
    /// When it is malformed or fewer pages than it covers are copied and wait for blocks.
    ///
    /// # Panics
    /// Unless the transfer began with [`Self::begin_blocks`].
    pub fn blocks_chunk(&mut self, body: &[u8], size: BlockSize) -> Result<usize, TransferError> {
        let chunk = BlocksChunk::decode(body, size)?;
        let waiting = self.data.pages();
        let patched = self.patched.as_mut().expect("blocks are for a transfer of blocks");
        let first = patched.hashes.len();
        let end = first + chunk.pages();
        if end > waiting {
            return Err(TransferError::TooManyPages { excess: end - waiting });
        }
        let pages = &mut self.data.bytes_mut()[first * PAGE_BYTES..end * PAGE_BYTES];
        chunk.patch(pages);
        patched.hashes.extend(pages.chunks_exact(PAGE_BYTES).map(patched.hash.function()));
        self.checksum.add(Kind::Blocks, &[body]);
        Ok(chunk.blocks())
    }

    /// Takes the body of a [`Kind::Pages`] message that replaces patched pages.
    ///
    /// # Errors
    /// When it is malformed or names a page that was not patched.
    pub fn replacement(&mut self, body: &[u8]) -> Result<usize, TransferError> {
        let chunk = PagesChunk::decode(body)?;
        let mut count = 0;
        for (page, bytes) in chunk.pages() {
            let place = self.pages.binary_search_by_key(&page, |(page, _)| *page);
            let data_at = place.ok().and_then(|place| self.pages[place].1);
            let (Some(at), Some(bytes)) = (data_at, bytes) else { return Err(TransferError::NotInUnion { page }) };
            let patched = self
                .patched
                .as_mut()
                .and_then(|patched| Some((patched.hash, patched.hashes.get_mut(at / PAGE_BYTES)?)));
            let Some((hash, known)) = patched else { return Err(TransferError::NotInUnion { page }) };
            *known = hash.function()(bytes);
            self.data.bytes_mut()[at..at + PAGE_BYTES].copy_from_slice(bytes);
            count += 1;
        }
        self.checksum.add(Kind::Pages, &[body]);
        Ok(count)
    }

    /// The short hashes of the pages as they are patched, for the leader to find which are not its own.
    #[must_use]
    pub fn short_hashes(&self) -> Vec<u8> {
        self.patched.iter().flat_map(|patched| patched.hashes.iter().flat_map(short)).collect()
    }

    /// Takes the body of a [`Kind::Pages`] message.
    ///
    /// # Errors
    /// When it is malformed or names a page outside `union` or a page twice.
    pub fn page_chunk(&mut self, body: &[u8], union: &DirtySet) -> Result<(), TransferError> {
        let chunk = PagesChunk::decode(body)?;
        for (page, bytes) in chunk.pages() {
            if !union.contains(page) {
                return Err(TransferError::NotInUnion { page });
            }
            if self.seen.contains(page) {
                return Err(TransferError::Twice { page });
            }
            self.seen.insert(page);
            self.zero_pages += u64::from(bytes.is_none());
            let data_at = bytes.map(|bytes| {
                self.data.slot().copy_from_slice(bytes);
                self.data.keep()
            });
            self.pages.push((page, data_at));
        }
        self.checksum.add(Kind::Pages, &[body]);
        Ok(())
    }

    /// Takes the body of a [`Kind::Device`] message.
    ///
    /// # Errors
    /// When it is not the next piece or the state would exceed `limit_bytes`.
    pub fn device_chunk(&mut self, body: &[u8], limit_bytes: usize) -> Result<(), TransferError> {
        let piece = Piece::decode(body)?;
        self.device_complete = piece.append_to(&mut self.device, limit_bytes)?;
        self.checksum.add(Kind::Device, &[body]);
        Ok(())
    }

    /// Takes the body of a [`Kind::DeviceDelta`] message.
    ///
    /// # Errors
    /// When it is not the next piece, the state would exceed `limit_bytes`, or what comes out is not the leader's.
    pub fn device_delta_chunk(&mut self, body: &[u8], limit_bytes: usize) -> Result<(), TransferError> {
        let piece = Piece::decode(body)?;
        self.checksum.add(Kind::DeviceDelta, &[body]);
        if !piece.append_to(&mut self.delta, limit_bytes)? {
            return Ok(());
        }
        let delta = DeviceDelta::decode(&self.delta, limit_bytes)?;
        self.device = delta.apply(&self.device_held)?;
        if device_hash(&self.device) != delta.hash {
            return Err(TransferError::DeviceDelta);
        }
        self.device_complete = true;
        Ok(())
    }

    /// The device state was loaded: it is what the next delta is relative to. Returns its hash.
    pub fn keep_device(&mut self) -> u64 {
        std::mem::swap(&mut self.device, &mut self.device_held);
        device_hash(&self.device_held)
    }

    /// Checks everything that was collected against the end message.
    ///
    /// # Errors
    /// When anything is missing, too much, or different on the way.
    pub fn check(&mut self, end: &End) -> Result<Verdict, TransferError> {
        self.sound = false;
        let counts = [
            ("pages", end.pages, self.pages.len() as u64),
            ("zero pages", end.zero_pages, self.zero_pages),
            ("device bytes", end.device_bytes, self.device.len() as u64),
            ("complete device states", 1, self.device_complete.into()),
            (
                "pages with blocks",
                self.patched.as_ref().map_or(0, |_| self.pages_of_blocks() as u64),
                self.patched.as_ref().map_or(0, |patched| patched.hashes.len() as u64),
            ),
        ];
        for (field, announced, received) in counts {
            if announced != received {
                return Err(TransferError::Count { field, announced, received });
            }
        }
        let received = self.checksum.value();
        if end.checksum != received {
            return Err(TransferError::Checksum { announced: end.checksum, received });
        }
        let content = self.patched.as_ref().map_or([0; 16], Patched::content);
        self.sound = content == end.content;
        Ok(if self.sound { Verdict::Sound } else { Verdict::Doubtful })
    }

    /// The transfer, once [`Self::check`] found it sound.
    ///
    /// # Panics
    /// When it did not: such a transfer must never be applied.
    #[must_use]
    pub fn verified(&self) -> VerifiedTransfer<'_> {
        assert!(self.sound, "a transfer that was not found sound is not applied");
        VerifiedTransfer { staging: self }
    }
}

/// A transfer that is complete and correct: the only thing that can be applied to a guest.
#[derive(Debug)]
pub struct VerifiedTransfer<'a> {
    staging: &'a Staging,
}

impl VerifiedTransfer<'_> {
    /// How many pages it changes.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.staging.pages.len()
    }

    /// Which.
    pub fn page_numbers(&self) -> impl Iterator<Item = PageNumber> + '_ {
        self.staging.pages.iter().map(|&(page, _)| page)
    }

    /// How many of them become zero.
    #[must_use]
    pub fn zero_pages(&self) -> usize {
        self.staging.zero_pages as usize
    }

    /// The device state to load after [`Self::apply`].
    #[must_use]
    pub fn device_state(&self) -> &[u8] {
        &self.staging.device
    }

    /// Writes every page into the stopped guest, calling `halfway` once in the middle. Cannot fail. Says what changed, if
    /// the transfer was one of blocks.
    pub fn apply(&self, ram: &GuestRam, halfway: impl FnOnce()) -> Differences {
        let mut differences = Differences::default();
        let (front, back) = self.staging.pages.split_at(self.staging.pages.len() / 2);
        self.write(ram, front, &mut differences);
        halfway();
        self.write(ram, back, &mut differences);
        differences
    }

    fn write(&self, ram: &GuestRam, pages: &[(PageNumber, Option<usize>)], differences: &mut Differences) {
        let blocks = self.staging.patched.is_some();
        let mut old = [0; PAGE_BYTES];
        for &(page, data_at) in pages {
            if blocks {
                ram.read_page(page, &mut old);
            }
            match data_at {
                Some(at) => {
                    let new = &self.staging.data.bytes()[at..at + PAGE_BYTES];
                    if blocks {
                        differences.add(&old, new);
                    }
                    ram.write_page(page, new);
                }
                None => {
                    if blocks {
                        differences.add_zeroed(&old);
                    }
                    ram.zero_page(page);
                }
            }
        }
    }
}
