//! `Outgoing`: the leader's staging area, from which pages are sent while its guest runs again.

use xxhash_rust::xxh3::Xxh3;

use super::blocks::{BlockSize, encode_blocks};
use super::buffer::PageBuffer;
use super::{DeviceDelta, ENTRY_BYTES, End, FLAG_ZERO, Kind, MAX_BODY_BYTES, Piece, device_hash};
use crate::dirty::DirtySet;
use crate::page::{PAGE_BYTES, PageNumber, is_zero};
use crate::ram::GuestRam;

/// Private copies of divergent pages plus the device state. Buffers are kept from one use to the next.
#[derive(Debug, Default)]
pub struct Outgoing {
    pages: Vec<(PageNumber, bool)>,
    /// Where in `data` those are that are not zero.
    places: Vec<usize>,
    data: PageBuffer,
    /// What was copied before the stop, ascending: where it is, unless it is zero.
    ahead: Vec<(PageNumber, Option<usize>)>,
    /// How many of those copies were used.
    used_ahead: usize,
    device: Vec<u8>,
    /// The device state before that.
    device_before: Vec<u8>,
    body: Vec<u8>,
}

impl Outgoing {
    /// Replaces the pages by copies of `pages` as they are now. Zero pages are recognised on the way.
    pub fn copy_pages(&mut self, ram: &GuestRam, pages: &[PageNumber]) {
        self.forget();
        self.copy_from(ram, pages.iter().map(|&page| (page, None)), None);
    }

    /// Has no copies.
    pub fn forget(&mut self) {
        self.pages.clear();
        self.places.clear();
        self.ahead.clear();
        self.data.clear();
    }

    /// Replaces the pages by copies of pages of the running guest, in ascending order, of each of which it is known whether it
    /// is zero. They are for [`Self::copy_from`] and count for nothing before that.
    pub fn copy_ahead(&mut self, ram: &GuestRam, pages: impl Iterator<Item = (PageNumber, bool)>) {
        self.forget();
        for (page, zero) in pages {
            let place = (!zero).then(|| {
                ram.read_page(page, self.data.slot());
                self.data.keep()
            });
            self.ahead.push((page, place));
        }
    }

    /// Replaces the pages by copies of `pages` of the stopped guest, in ascending order, each with whether it is zero if that
    /// is known. Those of [`Self::copy_ahead`] are taken instead, except of pages that were `written` since.
    pub fn copy_from(
        &mut self,
        ram: &GuestRam,
        pages: impl Iterator<Item = (PageNumber, Option<bool>)> + Clone,
        written: Option<&DirtySet>,
    ) {
        let ahead = std::mem::take(&mut self.ahead);
        let mut at = 0;
        let mut known_place = |page| {
            at += ahead[at..].iter().take_while(|(earlier, _)| *earlier < page).count();
            let &(_, place) = ahead.get(at).filter(|(earlier, _)| *earlier == page)?;
            written.is_some_and(|written| !written.contains(page)).then_some(place)
        };
        self.pages.clear();
        self.places.clear();
        self.used_ahead = 0;
        if ahead.is_empty() {
            self.data.clear();
            self.data.reserve(pages.clone().filter(|(_, known)| *known != Some(true)).count());
        }
        for (number, known) in pages {
            let earlier = known_place(number);
            self.used_ahead += usize::from(earlier.is_some());
            let place = earlier.unwrap_or_else(|| copy(&mut self.data, ram, number, known));
            self.places.extend(place);
            self.pages.push((number, place.is_none()));
        }
        self.ahead = ahead;
        self.ahead.clear();
    }

    /// How many of the pages had been copied before the stop.
    #[must_use]
    pub fn used_ahead(&self) -> usize {
        self.used_ahead
    }

    /// Gives back memory that only an unusually large transfer needed. Takes its time: not for the stop.
    pub fn trim(&mut self) {
        self.data.trim();
    }

    /// Replaces the device state.
    pub fn set_device(&mut self, state: Vec<u8>) {
        self.device_before = std::mem::replace(&mut self.device, state);
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
        self.pages.len() - self.places.len()
    }

    /// The content of the pages that are not zero, in order.
    pub fn nonzero_pages(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.places.iter().map(|at| &self.data.bytes()[*at..][..PAGE_BYTES])
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
        let mut places = &self.places[..];
        let mut table = Vec::new();
        while first < self.pages.len() {
            let (count, nonzero) = self.chunk_from(first, places, most_bytes.min(MAX_BODY_BYTES));
            table.clear();
            table.extend_from_slice(&(count as u32).to_le_bytes());
            for (number, zero) in &self.pages[first..first + count] {
                table.extend_from_slice(&number.0.to_le_bytes());
                table.push(if *zero { FLAG_ZERO } else { 0 });
            }
            let data = &self.data.bytes()[places.first().copied().unwrap_or(0)..][..nonzero * PAGE_BYTES];
            checksum.add(Kind::Pages, &[&table, data]);
            first += count;
            places = &places[nonzero..];
            send(first, Kind::Pages, &[&table, data])?;
        }
        Ok(())
    }

    /// How many pages from `first` on fit one message, and how many of them are not zero. Those lie one after the other in
    /// `data`, the first of them at the first of `places`.
    fn chunk_from(&self, first: usize, places: &[usize], most_bytes: usize) -> (usize, usize) {
        let mut bytes = 4;
        let (mut count, mut nonzero) = (0, 0);
        for (_, zero) in &self.pages[first..] {
            let data = if *zero { 0 } else { PAGE_BYTES };
            let apart = !zero && places[nonzero] != places[0] + nonzero * PAGE_BYTES;
            if count > 0 && (apart || bytes + ENTRY_BYTES + data > most_bytes) {
                break;
            }
            bytes += ENTRY_BYTES + data;
            nonzero += usize::from(!zero);
            count += 1;
        }
        (count, nonzero)
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
        assert_eq!(maps.len(), self.places.len(), "a bitmap for each page");
        let (mut first, mut sent) = (0, 0);
        while first < maps.len() {
            let pages = self.places[first..].iter().map(|at| &self.data.bytes()[*at..][..PAGE_BYTES]);
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
            again.data.slot().copy_from_slice(&self.data.bytes()[self.places[place]..][..PAGE_BYTES]);
            again.places.push(again.data.keep());
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

    /// As [`Self::send_device`], to a follower that says that it has a device state of the hash `held`: only what differs from
    /// that, if that is the one before this.
    ///
    /// # Errors
    /// Whatever `send` fails with.
    pub fn send_device_to<E>(
        &self,
        held: Option<u64>,
        checksum: &mut Checksum,
        mut send: impl FnMut(usize, Kind, &[&[u8]]) -> Result<(), E>,
    ) -> Result<(), E> {
        let is_held = held.is_some_and(|held| held == device_hash(&self.device_before));
        let delta = is_held.then(|| DeviceDelta::encode(&self.device_before, &self.device)).flatten();
        let Some(delta) = delta else { return self.send_device(checksum, send) };
        for piece in Piece::cut(&delta) {
            checksum.add(Kind::DeviceDelta, &[&piece.head(), piece.bytes]);
            send(self.pages.len(), Kind::DeviceDelta, &[&piece.head(), piece.bytes])?;
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

/// Copies a page, unless it is zero, and says where it is.
fn copy(data: &mut PageBuffer, ram: &GuestRam, page: PageNumber, zero: Option<bool>) -> Option<usize> {
    if zero == Some(true) {
        return None;
    }
    let slot = data.slot();
    ram.read_page(page, slot);
    (zero.is_some() || !is_zero(slot)).then(|| data.keep())
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
