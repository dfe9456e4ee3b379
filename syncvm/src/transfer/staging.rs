//! `Staging`: where the follower collects a transfer before any of it touches its guest.
//!
//! PLOVER §4.4: "The secondary saves the pages in a static buffer, sends an ACK to the leader, and applies
//! divergent pages to its guest VM in an atomic manner." The type makes the order a matter of compiling:
//! only a [`VerifiedTransfer`] can be applied, and only a complete transfer with the right counts and
//! checksum becomes one.

use thiserror::Error;

use super::outgoing::Checksum;
use super::{End, Kind, PagesChunk, Piece, WireError};
use crate::dirty::DirtySet;
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
    /// The checksum differs.
    #[error("the transfer's checksum is {received:#x}, announced was {announced:#x}")]
    Checksum {
        /// From the end message.
        announced: u64,
        /// Over what arrived.
        received: u64,
    },
}

/// Collects a transfer. One per follower; its buffers are kept from one syncvm to the next.
#[derive(Debug)]
pub struct Staging {
    pages: Vec<(PageNumber, Option<usize>)>,
    data: Vec<u8>,
    device: Vec<u8>,
    device_complete: bool,
    seen: DirtySet,
    zero_pages: u64,
    checksum: Checksum,
}

impl Staging {
    /// An empty staging area for a guest of `ram_pages` pages.
    #[must_use]
    pub fn new(ram_pages: usize) -> Self {
        Self {
            pages: Vec::new(),
            data: Vec::new(),
            device: Vec::new(),
            device_complete: false,
            seen: DirtySet::new(ram_pages),
            zero_pages: 0,
            checksum: Checksum::default(),
        }
    }

    /// Throws away what was collected.
    pub fn begin(&mut self) {
        self.pages.clear();
        self.data.clear();
        self.device.clear();
        self.device_complete = false;
        self.seen.clear();
        self.zero_pages = 0;
        self.checksum = Checksum::default();
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
                self.data.extend_from_slice(bytes);
                self.data.len() - PAGE_BYTES
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

    /// Checks everything that was collected against the end message.
    ///
    /// # Errors
    /// When anything is missing, too much, or different.
    pub fn verified(&mut self, end: &End) -> Result<VerifiedTransfer<'_>, TransferError> {
        let counts = [
            ("pages", end.pages, self.pages.len() as u64),
            ("zero pages", end.zero_pages, self.zero_pages),
            ("device bytes", end.device_bytes, self.device.len() as u64),
            ("complete device states", 1, self.device_complete.into()),
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
        Ok(VerifiedTransfer { staging: self })
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

    /// Writes every page into the stopped guest, calling `halfway` once in the middle. Cannot fail.
    pub fn apply(&self, ram: &GuestRam, halfway: impl FnOnce()) {
        let (front, back) = self.staging.pages.split_at(self.staging.pages.len() / 2);
        self.write(ram, front);
        halfway();
        self.write(ram, back);
    }

    fn write(&self, ram: &GuestRam, pages: &[(PageNumber, Option<usize>)]) {
        for &(page, data_at) in pages {
            match data_at {
                Some(at) => ram.write_page(page, &self.staging.data[at..at + PAGE_BYTES]),
                None => ram.zero_page(page),
            }
        }
    }
}
