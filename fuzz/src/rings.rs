//! Descriptor chains: rings that are set up correctly, over memory that a hostile guest has written.
//!
//! An input is: features, log2 of the ring size, then operations of a tag byte each: write bytes to guest memory at an
//! offset, give the guest a frame, let it send, or advance an available index.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::guest::{Guest, event, memory, repeat};

/// Two regions of one file, swapped in guest-physical space, so that buffers can cross from one to the other.
const RAM_BYTES: u64 = 1 << 18;
const HALF: u64 = RAM_BYTES / 2;
/// QEMU's address of guest-physical zero.
const USER: u64 = 0x7f00_0000_0000;
/// Where each ring's descriptors, available and used ring begin, guest-physical.
const RING_BYTES: u64 = 0x6000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x4000;
/// VERSION_1, MRG_RXBUF, EVENT_IDX, INDIRECT_DESC: what a guest may leave out, by the bits of the input's first byte.
const OPTIONAL: [u32; 4] = [32, 15, 29, 28];

// vhost-user requests (QEMU docs/interop/vhost-user.rst).
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;

pub(crate) fn run(input: &[u8]) {
    let Some((&[features, size], mut rest)) = input.split_first_chunk::<2>() else { return };
    let ram = memory(RAM_BYTES);
    let mut guest = start(&ram, features, 1 << (size % 9));
    while let Some((&tag, tail)) = rest.split_first() {
        rest = match tag % 4 {
            0 => write(&ram, tail),
            1 => {
                let (length, tail) = word(tail);
                guest.traffic(usize::from(length));
                tail
            }
            2 => {
                guest.device.collect_tx(8, &mut |_| tag & 4 == 0);
                tail
            }
            _ => advance(&ram, tag, tail),
        };
    }
    guest.traffic(100);
    guest.close();
}

fn start(ram: &File, features: u8, size: u32) -> Guest {
    let signal = event();
    let mut guest = Guest::connect();
    let bits = OPTIONAL.iter().enumerate().filter(|(bit, _)| features & 1 << bit != 0);
    let features = bits.fold(0u64, |all, (_, bit)| all | 1 << bit);
    guest.send(SET_OWNER, false, 0, &[], &[]);
    message(&mut guest, SET_FEATURES, &[features]);
    let region = |guest: u64, offset: u64| [guest, HALF, USER + guest, offset];
    let mut table = vec![2, 0, 0, 0, 0, 0, 0, 0];
    for word in [region(0, HALF), region(HALF, 0)].concat() {
        table.extend(word.to_le_bytes());
    }
    guest.send(SET_MEM_TABLE, false, table.len() as u32, &table, &repeat(ram, 2));
    for ring in 0..2u64 {
        let at = USER + ring * RING_BYTES;
        message(&mut guest, SET_VRING_NUM, &[ring | u64::from(size) << 32]);
        message(&mut guest, SET_VRING_BASE, &[ring]);
        message(&mut guest, SET_VRING_ADDR, &[ring, at, at + USED, at + AVAILABLE, 0]);
        guest.send(SET_VRING_CALL, false, 8, &ring.to_le_bytes(), &[signal.as_fd()]);
        guest.send(SET_VRING_KICK, false, 8, &ring.to_le_bytes(), &[signal.as_fd()]);
    }
    guest.until_started();
    guest
}

fn message(guest: &mut Guest, request: u32, words: &[u64]) {
    let payload: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    guest.send(request, false, payload.len() as u32, &payload, &[]);
}

/// Takes a little-endian word off the input; zero at its end.
fn word(bytes: &[u8]) -> (u16, &[u8]) {
    bytes.split_first_chunk::<2>().map_or((0, &[]), |(word, tail)| (u16::from_le_bytes(*word), tail))
}

/// Offset, length, bytes. Three quarters of the offsets lie in the rings.
fn write<'a>(ram: &File, input: &'a [u8]) -> &'a [u8] {
    let (at, tail) = word(input);
    let Some((&length, tail)) = tail.split_first() else { return &[] };
    let (bytes, tail) = tail.split_at(usize::from(length).min(tail.len()));
    put(ram, u64::from(at), bytes);
    tail
}

/// Offers the chains whose heads follow.
fn advance<'a>(ram: &File, tag: u8, input: &'a [u8]) -> &'a [u8] {
    let ring = u64::from(tag >> 7) * RING_BYTES;
    let (index, tail) = word(input);
    put(ram, ring + AVAILABLE + 2, &(index % 512).to_le_bytes());
    tail
}

/// Writes at a guest-physical address, through the file: the guest's side of its memory.
fn put(ram: &File, guest: u64, bytes: &[u8]) {
    let at = (guest + HALF) % RAM_BYTES;
    let fits = bytes.len().min((RAM_BYTES - at) as usize);
    ram.write_all_at(&bytes[..fits], at).expect("the file is that long");
}
