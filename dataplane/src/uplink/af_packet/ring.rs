//! The receive ring of a packet socket (TPACKET_V2), mapped into this process.
//!
//! The kernel fills fixed slots in order and sets a slot's status last; the reader clears it when it is done. No system call
//! either way. A packet that is larger than a slot also waits in the socket's queue (`TP_STATUS_COPY`), its place in the
//! order kept by the slot.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes of the vnet header that the kernel writes in front of a packet.
pub(super) const KERNEL_VNET_BYTES: usize = 10;
/// What the kernel puts in front of the packet in a slot, at most: its header, an address, the vnet header, alignment.
const SLOT_OVERHEAD_BYTES: usize = 128;
const BLOCK_BYTES: usize = 1 << 16;
/// Slots of the usual size (packets of up to 1900 bytes); with larger ones there are fewer in the same memory.
const RING_BYTES: usize = 8 << 20;

/// How the ring is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    slot_bytes: usize,
    slots: usize,
}

impl Layout {
    /// Slots for the packets of a link with this MTU.
    pub(super) fn for_mtu(mtu: usize) -> Layout {
        let need = (mtu + 18 + SLOT_OVERHEAD_BYTES).next_power_of_two();
        let slot_bytes = need.clamp(2048, 16384);
        Layout { slot_bytes, slots: RING_BYTES / slot_bytes }
    }

    /// How many packets can wait.
    pub(super) fn slots(self) -> usize {
        self.slots
    }

    pub(super) fn request(self) -> libc::tpacket_req {
        libc::tpacket_req {
            tp_block_size: BLOCK_BYTES as _,
            tp_block_nr: (RING_BYTES / BLOCK_BYTES) as _,
            tp_frame_size: self.slot_bytes as _,
            tp_frame_nr: self.slots as _,
        }
    }
}

const _: () = assert!(RING_BYTES.is_multiple_of(BLOCK_BYTES) && BLOCK_BYTES.is_multiple_of(16384));

/// A packet in the slot at the head.
#[derive(Debug)]
pub(super) struct Received<'a> {
    /// The vnet header as the kernel wrote it.
    pub vnet: &'a [u8; KERNEL_VNET_BYTES],
    /// As much of the packet as the slot holds.
    pub packet: &'a [u8],
    /// Bytes of the whole packet.
    pub packet_bytes: usize,
    /// The whole packet waits in the socket's queue.
    pub queued: bool,
    /// The VLAN tag that the kernel took out, as it stood behind the MAC addresses.
    pub vlan: Option<[u8; 4]>,
}

/// The mapped ring.
#[derive(Debug)]
pub(super) struct Ring {
    base: NonNull<u8>,
    layout: Layout,
    head: usize,
}

// SAFETY: the mapping belongs to this value alone and is valid in every thread.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring that was set up on `socket` with this layout.
    pub(super) fn map(socket: BorrowedFd<'_>, layout: Layout) -> io::Result<Ring> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses; it overlaps nothing.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), RING_BYTES, protection, libc::MAP_SHARED, socket.as_raw_fd(), 0)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("mmap gave an address");
        Ok(Ring { base, layout, head: 0 })
    }

    /// The packet at the head, if one has arrived.
    pub(super) fn head(&self) -> Option<Received<'_>> {
        let slot = self.slot();
        let status = self.status().load(Ordering::Acquire);
        if status & libc::TP_STATUS_USER == 0 {
            return None;
        }
        // SAFETY: the slot is inside of the mapping, aligned to 2048, and begins with this struct, which has no invalid
        // values; the kernel set the status after it wrote the slot and does not touch it until `release`.
        let header = unsafe { slot.cast::<libc::tpacket2_hdr>().read() };
        let (start, len) = (usize::from(header.tp_mac), header.tp_snaplen as usize);
        assert!(
            start >= KERNEL_VNET_BYTES && start + len <= self.layout.slot_bytes,
            "the kernel placed {len} bytes at {start} of a slot of {}",
            self.layout.slot_bytes
        );
        // SAFETY: as above; the range was checked, and the bytes stay as they are until `release`, which needs `&mut`.
        let bytes = unsafe {
            std::slice::from_raw_parts(slot.add(start - KERNEL_VNET_BYTES).as_ptr(), KERNEL_VNET_BYTES + len)
        };
        let (vnet, packet) = bytes.split_first_chunk().expect("begins with the vnet header");
        let tpid = match status & libc::TP_STATUS_VLAN_TPID_VALID {
            0 => 0x8100,
            _ => header.tp_vlan_tpid,
        };
        let vlan = (status & libc::TP_STATUS_VLAN_VALID != 0).then(|| {
            let ([a, b], [c, d]) = (tpid.to_be_bytes(), header.tp_vlan_tci.to_be_bytes());
            [a, b, c, d]
        });
        let queued = status & libc::TP_STATUS_COPY != 0;
        Some(Received { vnet, packet, packet_bytes: header.tp_len as usize, queued, vlan })
    }

    /// Gives the slot at the head back to the kernel.
    pub(super) fn release(&mut self) {
        self.status().store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.head = (self.head + 1) % self.layout.slots;
    }

    fn slot(&self) -> NonNull<u8> {
        // SAFETY: `head` is below `slots`, so the slot is inside of the mapping.
        unsafe { self.base.add(self.head * self.layout.slot_bytes) }
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: the slot begins with `tp_status`, aligned, and lives as long as `self`; kernel and process
        // access it as one word.
        unsafe { AtomicU32::from_ptr(self.slot().as_ptr().cast()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map` with this length, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), RING_BYTES) };
    }
}
