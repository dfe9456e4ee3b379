//! Wire messages of the exchange, and the staged transfer.
//!
//! Every message begins with a [`Header`] that names group, view and exchange, so that a message of an
//! exchange that was given up, or of a deposed leader, is recognised whatever it arrives between. Bodies
//! are little-endian with explicit lengths; all decoders are total. No message is longer than
//! [`MAX_MESSAGE_BYTES`]; what is longer goes in pieces.

mod blocks;
mod buffer;
mod device;
mod divergent;
mod mode;
mod outgoing;
mod staging;

pub use blocks::{BlockSize, BlocksChunk, Differences, decode_digests, differing_blocks, digest_page};
pub use device::{DeviceDelta, device_hash};
pub use divergent::{DivergentList, HashOfHashes, SHORT_HASH_BYTES, short};
pub use mode::TransferMode;
pub use outgoing::{Checksum, Outgoing};
pub use staging::{Staging, TransferError, Verdict, VerifiedTransfer};

pub use crate::wire::WireError;

use crate::hash::HashKind;
use crate::page::{PAGE_BYTES, PageNumber};
use crate::pairing::Basis;
use crate::wire::Reader;

/// Longest body of a message, in bytes.
pub const MAX_BODY_BYTES: usize = 1 << 20;

/// Longest message (header and body) that a [`crate::exchange::Channel`] must carry.
pub const MAX_MESSAGE_BYTES: usize = MAX_BODY_BYTES + Header::BYTES;

/// What kind of message it is; travels beside the header as the channel's `kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Terms and a piece of the sender's dirty set.
    DirtySet = 1,
    /// Hashes of the next batch of pages of the union; with [`TransferMode::Delta`] only [`short`] ones.
    Hashes = 2,
    /// Divergent pages, whole.
    Pages = 3,
    /// A piece of the device state.
    Device = 4,
    /// The end of the transfer: counts and checksum.
    End = 5,
    /// The follower holds the whole verified transfer and will apply it.
    Ack = 6,
    /// The sender gave the exchange up, and why.
    Abort = 7,
    /// Invariant I4: hashes of the next batch of all RAM.
    VerifyHashes = 8,
    /// Invariant I4: a piece of the follower's device state after the load.
    VerifyDevice = 9,
    /// Invariant I4: what the leader found.
    Verdict = 10,
    /// Rejoin: terms and a piece of the set of pages of this round.
    RoundSet = 11,
    /// Rejoin: end of a batch, with its checksum.
    BatchEnd = 12,
    /// Rejoin: the follower has written every page of the round.
    RoundAck = 13,
    /// Rejoin: no more rounds; a syncvm follows.
    RoundsDone = 14,
    /// Rejoin: digests of the granules of a section.
    Granules = 40,
    /// Rejoin: which of them differ.
    Differing = 41,
    /// A piece of the [`DivergentList`].
    Divergent = 15,
    /// Digests of the blocks of the next divergent pages.
    Digests = 16,
    /// The blocks of the next divergent pages that differ.
    Blocks = 17,
    /// A piece of the short hashes of all patched pages: one of them is not what it should be.
    Recheck = 18,
    /// Before the stop: terms and a piece of the sender's dirty set so far.
    AheadSet = 19,
    /// Before the stop: hashes of the next batch of pages of the union so far, as in [`Kind::Hashes`].
    AheadHashes = 20,
    /// A piece of the [`DeviceDelta`], in place of [`Kind::Device`].
    DeviceDelta = 21,
}

impl Kind {
    /// The kind behind a number from the wire.
    #[must_use]
    pub fn from_code(code: u16) -> Option<Self> {
        use Kind::*;
        [
            DirtySet,
            Hashes,
            Pages,
            Device,
            End,
            Ack,
            Abort,
            VerifyHashes,
            VerifyDevice,
            Verdict,
            RoundSet,
            BatchEnd,
            RoundAck,
            RoundsDone,
            Granules,
            Differing,
            Divergent,
            Digests,
            Blocks,
            Recheck,
            AheadSet,
            AheadHashes,
            DeviceDelta,
        ]
        .into_iter()
        .find(|&kind| kind as u16 == code)
    }
}

/// Whether a message belongs to the live rounds of a rejoin or to a syncvm. Rounds come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Live rounds.
    Rejoin,
    /// A syncvm.
    Sync,
}

/// Names the exchange that a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The group (a hash of its name).
    pub group: u64,
    /// The sender's view (PLOVER §4.4: all phases carry the sender's vid).
    pub view: u64,
    /// Index of the `SyncVm` entry; for rounds the number that the leader gave the rejoin. Ascending in a view.
    pub number: u64,
    /// Rounds or syncvm.
    pub scope: Scope,
    /// For rounds: attempt × 65536 + round. For a syncvm 0.
    pub round: u32,
}

impl Header {
    /// Bytes on the wire.
    pub const BYTES: usize = 8 + 8 + 8 + 1 + 4;

    /// The wire form.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[0..8].copy_from_slice(&self.group.to_le_bytes());
        out[8..16].copy_from_slice(&self.view.to_le_bytes());
        out[16..24].copy_from_slice(&self.number.to_le_bytes());
        out[24] = u8::from(self.scope == Scope::Sync);
        out[25..29].copy_from_slice(&self.round.to_le_bytes());
        out
    }

    /// Splits a message into header and body.
    ///
    /// # Errors
    /// When the bytes do not begin with a header.
    pub fn decode(message: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let mut reader = Reader(message);
        let group = reader.u64("group")?;
        let view = reader.u64("view")?;
        let number = reader.u64("number")?;
        let scope = match reader.u8("scope")? {
            0 => Scope::Rejoin,
            1 => Scope::Sync,
            other => {
                return Err(WireError::Value { field: "scope", value: other.into() });
            }
        };
        let round = reader.u32("round")?;
        let header = Self { group, view, number, scope, round };
        Ok((header, reader.0))
    }

    /// Order of exchanges: a later one supersedes an earlier one.
    #[must_use]
    pub fn order(&self) -> (u64, u64, Scope, u32) {
        (self.view, self.number, self.scope, self.round)
    }

    /// What the digests of this exchange are seeded with. Another one for each try.
    #[must_use]
    pub fn seed(&self) -> u64 {
        xxhash_rust::xxh3::xxh3_64(&self.encode())
    }

    /// This exchange as the beginning of a pairing.
    #[must_use]
    pub fn basis(&self) -> Basis {
        Basis { view: self.view, number: self.number, round: self.round }
    }
}

/// What both sides must agree on before pages are compared; travels with the dirty set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Pages of the RAM file.
    pub ram_pages: u64,
    /// The page hash. The leader's counts.
    pub hash: HashKind,
    /// Whether invariant I4 is checked afterwards. The leader's counts.
    pub verify: bool,
    /// What the leader sends. The leader's counts.
    pub transfer: TransferMode,
    /// The sender can compare ahead of its stop. A follower that expects that of its leader waits for it with its own.
    pub ahead: bool,
    /// What the sender's dirty set is relative to.
    pub basis: Option<Basis>,
    /// Follower: [`device_hash`] of the device state that it loaded last and still has.
    pub device: Option<u64>,
}

/// One piece of something longer than a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Bytes of the whole.
    pub total_bytes: u64,
    /// Where this piece begins.
    pub offset_bytes: u64,
    /// The piece.
    pub bytes: &'a [u8],
}

impl Piece<'_> {
    /// The fields before the piece itself.
    #[must_use]
    pub fn head(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.total_bytes.to_le_bytes());
        out[8..].copy_from_slice(&self.offset_bytes.to_le_bytes());
        out
    }

    /// Cuts `whole` into pieces that fit a message. An empty whole is one empty piece.
    pub fn cut(whole: &[u8]) -> impl Iterator<Item = Piece<'_>> {
        const ROOM: usize = MAX_BODY_BYTES - 1024;
        let pieces = whole.len().div_ceil(ROOM).max(1);
        (0..pieces).map(move |index| {
            let start = index * ROOM;
            Piece {
                total_bytes: whole.len() as u64,
                offset_bytes: start as u64,
                bytes: &whole[start..whole.len().min(start + ROOM)],
            }
        })
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Piece<'_>, WireError> {
        let mut reader = Reader(body);
        Ok(Piece { total_bytes: reader.u64("total")?, offset_bytes: reader.u64("offset")?, bytes: reader.0 })
    }

    /// Appends the piece to `whole` and says whether that completed it.
    ///
    /// # Errors
    /// When it is not the next piece, or the whole would exceed `limit_bytes`.
    pub fn append_to(&self, whole: &mut Vec<u8>, limit_bytes: usize) -> Result<bool, WireError> {
        let wrong = |field, value| Err(WireError::Value { field, value });
        if self.total_bytes > limit_bytes as u64 {
            return wrong("total", self.total_bytes);
        }
        if self.offset_bytes != whole.len() as u64 {
            return wrong("offset", self.offset_bytes);
        }
        let left = self.total_bytes - self.offset_bytes.min(self.total_bytes);
        if self.bytes.len() as u64 > left || (self.bytes.is_empty() && left > 0) {
            return wrong("piece length", self.bytes.len() as u64);
        }
        whole.extend_from_slice(self.bytes);
        Ok(whole.len() as u64 == self.total_bytes)
    }
}

impl Terms {
    /// Bytes on the wire.
    pub const BYTES: usize = 8 + 1 + 1 + 1 + 1 + 1 + 8 + 8 + 4 + 1 + 8;

    /// The wire form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::BYTES);
        out.extend_from_slice(&self.ram_pages.to_le_bytes());
        out.extend_from_slice(&[
            self.hash.code(),
            self.verify.into(),
            self.transfer.code(),
            self.ahead.into(),
            self.basis.is_some().into(),
        ]);
        let basis = self.basis.unwrap_or(Basis { view: 0, number: 0, round: 0 });
        out.extend_from_slice(&basis.view.to_le_bytes());
        out.extend_from_slice(&basis.number.to_le_bytes());
        out.extend_from_slice(&basis.round.to_le_bytes());
        out.push(self.device.is_some().into());
        out.extend_from_slice(&self.device.unwrap_or(0).to_le_bytes());
        out
    }

    /// Splits the body of a [`Kind::DirtySet`] or [`Kind::RoundSet`] message.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<(Self, Piece<'_>), WireError> {
        let mut reader = Reader(body);
        let ram_pages = reader.u64("RAM size")?;
        let code = reader.u8("hash")?;
        let hash = HashKind::from_code(code).ok_or(WireError::Value { field: "hash", value: code.into() })?;
        let verify = reader.u8("verify")? != 0;
        let code = reader.u8("transfer mode")?;
        let transfer =
            TransferMode::from_code(code).ok_or(WireError::Value { field: "transfer mode", value: code.into() })?;
        let ahead = reader.u8("ahead")? != 0;
        let has_basis = reader.u8("basis")? != 0;
        let basis = Basis {
            view: reader.u64("basis view")?,
            number: reader.u64("basis number")?,
            round: reader.u32("basis round")?,
        };
        let has_device = reader.u8("device state")? != 0;
        let device = has_device.then_some(reader.u64("hash of the device state")?);
        let basis = has_basis.then_some(basis);
        let terms = Self { ram_pages, hash, verify, transfer, ahead, basis, device };
        Ok((terms, Piece::decode(reader.0)?))
    }
}

/// The body of [`Kind::End`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Pages in the transfer.
    pub pages: u64,
    /// How many of them are zero pages.
    pub zero_pages: u64,
    /// Bytes of device state.
    pub device_bytes: u64,
    /// XXH3-64 over all bodies that belong to the transfer, in order.
    pub checksum: u64,
    /// With blocks: [`HashOfHashes`] of the union and of its pages as the follower must have them in the end, zero pages left
    /// out.
    pub content: [u8; 16],
}

impl End {
    /// The wire form.
    #[must_use]
    pub fn encode(&self) -> [u8; 48] {
        let mut out = [0; 48];
        let fields = [self.pages, self.zero_pages, self.device_bytes, self.checksum];
        for (at, field) in out.chunks_exact_mut(8).zip(fields) {
            at.copy_from_slice(&field.to_le_bytes());
        }
        out[32..].copy_from_slice(&self.content);
        out
    }

    /// Reads the wire form.
    ///
    /// # Errors
    /// When the bytes are not exactly one `End`.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader(body);
        let mut end = Self {
            pages: reader.u64("pages")?,
            zero_pages: reader.u64("zero pages")?,
            device_bytes: reader.u64("device bytes")?,
            checksum: reader.u64("checksum")?,
            content: [0; 16],
        };
        end.content.copy_from_slice(reader.take(16, "content hash")?);
        reader.end()?;
        Ok(end)
    }
}

/// The body of [`Kind::Abort`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abort {
    /// Trying again is pointless before a rejoin: the follower's guest is not whole.
    pub needs_rejoin: bool,
    /// A short hash or a digest took what differs for equal: the next syncvm should use neither.
    pub hash_agreed_falsely: bool,
    /// For people.
    pub reason: String,
}

impl Abort {
    const MAX_REASON_BYTES: usize = 400;

    /// The wire form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![u8::from(self.needs_rejoin) | u8::from(self.hash_agreed_falsely) << 1];
        out.extend(self.reason.bytes().take(Self::MAX_REASON_BYTES));
        out
    }

    /// Reads the wire form.
    ///
    /// # Errors
    /// When the body is empty.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader(body);
        let code = reader.u8("abort code")?;
        let text = &reader.0[..reader.0.len().min(Self::MAX_REASON_BYTES)];
        Ok(Self {
            needs_rejoin: code & 1 != 0,
            hash_agreed_falsely: code & 2 != 0,
            reason: String::from_utf8_lossy(text).into_owned(),
        })
    }
}

const ENTRY_BYTES: usize = 5;
const FLAG_ZERO: u8 = 1;

/// The decoded body of a [`Kind::Pages`] message: a table of pages, then the bytes of the nonzero ones.
#[derive(Clone, Copy, Debug)]
pub struct PagesChunk<'a> {
    table: &'a [u8],
    data: &'a [u8],
}

impl<'a> PagesChunk<'a> {
    /// Reads a body.
    ///
    /// # Errors
    /// When table and data do not fit each other.
    pub fn decode(body: &'a [u8]) -> Result<Self, WireError> {
        let mut reader = Reader(body);
        let count = reader.u32("page count")? as usize;
        let table = reader.take(count.saturating_mul(ENTRY_BYTES), "page table")?;
        let mut data_pages = 0;
        for entry in table.chunks_exact(ENTRY_BYTES) {
            match entry[4] {
                0 => data_pages += 1,
                FLAG_ZERO => {}
                flags => {
                    return Err(WireError::Value { field: "page flags", value: flags.into() });
                }
            }
        }
        let data = reader.take(data_pages * PAGE_BYTES, "page data")?;
        reader.end()?;
        Ok(Self { table, data })
    }

    /// The pages in order; `None` is a zero page.
    pub fn pages(&self) -> impl Iterator<Item = (PageNumber, Option<&'a [u8]>)> {
        let mut data = self.data.chunks_exact(PAGE_BYTES);
        self.table.chunks_exact(ENTRY_BYTES).map(move |entry| {
            let number = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
            let bytes = if entry[4] == FLAG_ZERO { None } else { data.next() };
            (PageNumber(number), bytes)
        })
    }
}

#[cfg(test)]
mod tests;
