//! `Outgoing`: the leader's staging area, from which pages are sent while its guest runs again.

use xxhash_rust::xxh3::Xxh3;

use super::{ENTRY_BYTES, End, FLAG_ZERO, Kind, MAX_BODY_BYTES, Piece};
use crate::page::{PAGE_BYTES, PageNumber, is_zero};
use crate::ram::GuestRam;

/// Private copies of divergent pages plus the device state. Buffers are kept from one use to the next.
#[derive(Debug, Default)]
pub struct Outgoing {
    pages: Vec<(PageNumber, bool)>,
    data: Vec<u8>,
    device: Vec<u8>,
}

impl Outgoing {
    /// Replaces the pages by copies of `pages` as they are now. Zero pages are recognised on the way.
    pub fn copy_pages(&mut self, ram: &GuestRam, pages: &[PageNumber]) {
        self.pages.clear();
        self.data.clear();
        self.data.reserve(pages.len() * PAGE_BYTES);
        let mut page = [0; PAGE_BYTES];
        for &number in pages {
            ram.read_page(number, &mut page);
            let zero = is_zero(&page);
            if !zero {
                self.data.extend_from_slice(&page);
            }
            self.pages.push((number, zero));
        }
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

    /// How many pages are zero pages.
    #[must_use]
    pub fn zero_pages(&self) -> usize {
        self.pages.iter().filter(|(_, zero)| *zero).count()
    }

    /// Hands every page message to `send(pages so far, kind, parts)` and returns the `End` of the pages alone.
    ///
    /// # Errors
    /// Whatever `send` fails with.
    pub fn send_pages<E>(
        &self,
        checksum: &mut Checksum,
        mut send: impl FnMut(usize, Kind, &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut first = 0;
        let mut data_at = 0;
        let mut table = Vec::new();
        while first < self.pages.len() {
            let (count, data_bytes) = self.chunk_from(first);
            table.clear();
            table.extend_from_slice(&(count as u32).to_le_bytes());
            for (number, zero) in &self.pages[first..first + count] {
                table.extend_from_slice(&number.0.to_le_bytes());
                table.push(if *zero { FLAG_ZERO } else { 0 });
            }
            let data = &self.data[data_at..data_at + data_bytes];
            checksum.add(Kind::Pages, &[&table, data]);
            first += count;
            data_at += data_bytes;
            send(first, Kind::Pages, &[&table, data])?;
        }
        Ok(())
    }

    /// How many pages from `first` on fit one message, and the bytes of data among them.
    fn chunk_from(&self, first: usize) -> (usize, usize) {
        let mut bytes = 4;
        let mut data_bytes = 0;
        let mut count = 0;
        for (_, zero) in &self.pages[first..] {
            let data = if *zero { 0 } else { PAGE_BYTES };
            if bytes + ENTRY_BYTES + data > MAX_BODY_BYTES {
                break;
            }
            bytes += ENTRY_BYTES + data;
            data_bytes += data;
            count += 1;
        }
        (count, data_bytes)
    }

    /// Hands every message of the whole transfer to `send(pages so far, kind, parts)`: pages, device, end.
    ///
    /// # Errors
    /// Whatever `send` fails with.
    pub fn send_all<E>(&self, mut send: impl FnMut(usize, Kind, &[&[u8]]) -> Result<(), E>) -> Result<(), E> {
        let mut checksum = Checksum::default();
        self.send_pages(&mut checksum, &mut send)?;
        for piece in Piece::cut(&self.device) {
            checksum.add(Kind::Device, &[&piece.head(), piece.bytes]);
            send(self.pages.len(), Kind::Device, &[&piece.head(), piece.bytes])?;
        }
        let end = End {
            pages: self.pages.len() as u64,
            zero_pages: self.zero_pages() as u64,
            device_bytes: self.device.len() as u64,
            checksum: checksum.value(),
        };
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
