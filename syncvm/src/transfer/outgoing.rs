//! `Outgoing`: the leader's staging area, from which pages are sent while its guest runs again.

use xxhash_rust::xxh3::Xxh3;

use super::blocks::{BlockSize, encode_blocks};
use super::buffer::PageBuffer;
use super::{ENTRY_BYTES, End, FLAG_ZERO, Kind, MAX_BODY_BYTES, Piece};
use crate::page::{PAGE_BYTES, PageNumber, is_zero};
use crate::ram::GuestRam;

/// Private copies of divergent pages plus the device state. Buffers are kept from one use to the next.
#[derive(Debug, Default)]
pub struct Outgoing {
    pages: Vec<(PageNumber, bool)>,
    /// The pages that are not zero, in order.
    data: PageBuffer,
    device: Vec<u8>,
    body: Vec<u8>,
}

impl Outgoing {
    /// Replaces the pages by copies of `pages` as they are now. Zero pages are recognised on the way.
    pub fn copy_pages(&mut self, ram: &GuestRam, pages: &[PageNumber]) {
        self.copy_from(ram, pages.iter().map(|&page| (page, None)));
    }

    /// As [`Self::copy_pages`], of pages of which it is known whether they are zero.
    pub fn copy_from(&mut self, ram: &GuestRam, pages: impl Iterator<Item = (PageNumber, Option<bool>)> + Clone) {
        self.pages.clear();
        self.data.clear();
        self.data.reserve(pages.clone().filter(|(_, known)| *known != Some(true)).count());
        for (number, known) in pages {
            let zero = known == Some(true) || {
                let slot = self.data.slot();
                ram.read_page(number, slot);
                known.is_none() && is_zero(slot)
            };
            if !zero {
                self.data.keep();
            }
            self.pages.push((number, zero));
        }
    }

    /// Gives back memory that only an unusually large transfer needed. Takes its time: not for the stop.
    pub fn trim(&mut self) {
        self.data.trim();
    }

    /// Replaces the device state.
    pub fn set_device(&mut self, state: Vec<u8>) {
        self.device = state;
    }

    /// The device state.
    #[must_use]
    pub fn device(&self) -> &[u8] {
        &self.device
    }

    /// How many pages there are.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// How many of them are zero pages.
    #[must_use]
    pub fn zero_pages(&self) -> usize {
        self.pages.len() - self.data.pages()
    }

    /// The content of the pages that are not zero, in order.
    pub fn nonzero_pages(&self) -> std::slice::ChunksExact<'_, u8> {
        self.data.iter()
    }

    /// Hands every page message to `send(pages so far, kind, parts)`.
    ///
    /// # Errors
    /// Whatever `send` fails with.
    pub fn send_pages<E>(
        &self,
        checksum: &mut Checksum,
        send: impl FnMut(usize, Kind, &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.send_pages_within(MAX_BODY_BYTES, checksum, send)
    }

    /// As [`Self::send_pages`], in messages of about `most_bytes`, at least one page each.
    ///
    /// # Errors
    /// Whatever `send` fails with.
    pub fn send_pages_within<E>(
        &self,
        most_bytes: usize,
        checksum: &mut Checksum,
        mut send: impl FnMut(usize, Kind, &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut first = 0;
        let mut data_at = 0;
        let mut table = Vec::new();
        while first < self.pages.len() {
            let (count, data_bytes) = self.chunk_from(first, most_bytes.min(MAX_BODY_BYTES));
            table.clear();
            table.extend_from_slice(&(count as u32).to_le_bytes());
            for (number, zero) in &self.pages[first..first + count] {
                table.extend_from_slice(&number.0.to_le_bytes());
                table.push(if *zero { FLAG_ZERO } else { 0 });
            }
            let data = &self.data.bytes()[data_at..data_at + data_bytes];
            checksum.add(Kind::Pages, &[&table, data]);
            first += count;
            data_at += data_bytes;
            send(first, Kind::Pages, &[&table, data])?;
        }
        Ok(())
    }

    /// How many pages from `first` on fit one message, and the bytes of data among them.
    fn chunk_from(&self, first: usize, most_bytes: usize) -> (usize, usize) {
        let mut bytes = 4;
        let mut data_bytes = 0;
        let mut count = 0;
        for (_, zero) in &self.pages[first..] {
            let data = if *zero { 0 } else { PAGE_BYTES };
            if count > 0 && bytes + ENTRY_BYTES + data > most_bytes {
                break;
            }
            bytes += ENTRY_BYTES + data;
            data_bytes += data;
            count += 1;
        }
        (count, data_bytes)
    }

    /// Hands the blocks that `maps` name, one map for each page that is not zero, to `send(nonzero pages so far, kind, parts)`.
    /// Returns how many blocks they were.
    ///
    /// # Errors
    /// Whatever `send` fails with.
    pub fn send_blocks<E>(
        &mut self,
        size: BlockSize,
        maps: &[u64],
        checksum: &mut Checksum,
        mut send: impl FnMut(usize, Kind, &[&[u8]]) -> Result<(), E>,
    ) -> Result<usize, E> {
        assert_eq!(maps.len(), self.data.pages(), "a bitmap for each page");
        let (mut first, mut sent) = (0, 0);
        while first < maps.len() {
            let pages = &self.data.bytes()[first * PAGE_BYTES..];
            let (count, blocks) = encode_blocks(size, &maps[first..], pages, &mut self.body);
            checksum.add(Kind::Blocks, &[&self.body]);
            first += count;
            sent += blocks;
            send(first, Kind::Blocks, &[&self.body])?;
        }
        Ok(sent)
    }

    /// The pages at these places among those that are not zero, to be sent whole after all.
    #[must_use]
    pub fn again(&self, places: &[usize]) -> Self {
        let mut again = Self::default();
        let numbers: Vec<PageNumber> = self.pages.iter().filter(|(_, zero)| !zero).map(|(number, _)| *number).collect();
        for &place in places {
            again.pages.push((numbers[place], false));
            again.data.slot().copy_from_slice(&self.data.bytes()[place * PAGE_BYTES..][..PAGE_BYTES]);
            again.data.keep();
        }
        again
    }

    /// Hands the device state to `send(pages so far, kind, parts)`.
    ///
    /// # Errors
    /// Whatever `send` fails with.
    pub fn send_device<E>(
        &self,
        checksum: &mut Checksum,
        mut send: impl FnMut(usize, Kind, &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        for piece in Piece::cut(&self.device) {
            checksum.add(Kind::Device, &[&piece.head(), piece.bytes]);
            send(self.pages.len(), Kind::Device, &[&piece.head(), piece.bytes])?;
        }
        Ok(())
    }

    /// What the end message says of this transfer.
    #[must_use]
    pub fn end(&self, checksum: &Checksum, content: [u8; 16]) -> End {
        End {
            pages: self.pages.len() as u64,
            zero_pages: self.zero_pages() as u64,
            device_bytes: self.device.len() as u64,
            checksum: checksum.value(),
            content,
        }
    }

    /// Hands every message of the whole transfer to `send(pages so far, kind, parts)`: pages, device, end.
    ///
    /// # Errors
    /// Whatever `send` fails with.
    pub fn send_all<E>(&self, mut send: impl FnMut(usize, Kind, &[&[u8]]) -> Result<(), E>) -> Result<(), E> {
        let mut checksum = Checksum::default();
        self.send_pages(&mut checksum, &mut send)?;
        self.send_device(&mut checksum, &mut send)?;
        let end = self.end(&checksum, [0; 16]);
        send(self.pages.len(), Kind::End, &[&end.encode()])
    }
}

/// The running checksum over the bodies of a transfer. Kinds and lengths count as well.
#[derive(Default)]
pub struct Checksum(Xxh3);

impl Checksum {
    /// Adds a message.
    pub fn add(&mut self, kind: Kind, parts: &[&[u8]]) {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        self.0.update(&(kind as u16).to_le_bytes());
        self.0.update(&(bytes as u64).to_le_bytes());
        parts.iter().for_each(|part| self.0.update(part));
    }

    /// The value so far.
    #[must_use]
    pub fn value(&self) -> u64 {
        self.0.digest()
    }
}

impl std::fmt::Debug for Checksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Checksum({:#x})", self.value())
    }
}
