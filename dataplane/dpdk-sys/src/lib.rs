//! The few calls of an installed DPDK that the uplinks need. Empty without the feature `dpdk`.
//!
//! Declarations by hand over a C shim that is compiled against the installed headers, so no layout of DPDK's structures is
//! guessed and its inline functions (all of the packet path) can be called. Rejected: bindgen, which needs libclang on every
//! build machine and a shim all the same, for twenty functions of scalars; and the crates that wrap DPDK (none builds
//! against 22.11 or later). The functions follow src/shim.c, which says what they do.
#![cfg(feature = "dpdk")]

use std::ffi::{c_char, c_int, c_uint};

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident),*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug)]
        pub struct $name {
            _private: [u8; 0],
        }
    )*};
}

opaque!(
    /// `struct rte_mempool`.
    Pool,
    /// `struct rte_mbuf`.
    Mbuf
);

/// `struct plover_dpdk_port`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Port {
    /// Its number.
    pub id: u16,
    /// Largest packet without Ethernet header, bytes.
    pub mtu: u16,
    /// 1: computes the checksums of TCP and UDP.
    pub sends_checksums: u8,
    /// 1: takes the frames for the guest's address.
    pub hears_guest: u8,
    /// 1: the link was up when the port was started.
    pub link_up: u8,
    /// Descriptors of the receive queue.
    pub receive_slots: u16,
}

/// `struct plover_dpdk_received`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// The frame, to be freed.
    pub mbuf: *mut Mbuf,
    /// Its first piece.
    pub data: *const u8,
    /// Bytes of the whole frame.
    pub bytes: u32,
    /// Of how many pieces it is.
    pub pieces: u16,
    /// 1: the port has found the checksum right. 2: the data are right, the checksum in them is not.
    pub checksum: u16,
}

impl Default for Received {
    fn default() -> Received {
        Received { mbuf: std::ptr::null_mut(), data: std::ptr::null(), bytes: 0, pieces: 0, checksum: 0 }
    }
}

unsafe extern "C" {
    /// Once per process.
    pub fn plover_dpdk_init(argc: c_int, argv: *mut *mut c_char) -> c_int;
    /// The calling thread gets caches of its own.
    pub fn plover_dpdk_register_thread() -> c_int;
    /// The opposite, in the same thread.
    pub fn plover_dpdk_unregister_thread();
    /// Attaches a device.
    pub fn plover_dpdk_attach(arguments: *const c_char, name: *const c_char, id: *mut u16) -> c_int;
    /// Null: see [`plover_dpdk_last_error`].
    pub fn plover_dpdk_pool(name: *const c_char, id: u16, count: c_uint, frame_bytes: u16) -> *mut Pool;
    /// After everything of it was freed.
    pub fn plover_dpdk_free_pool(pool: *mut Pool);
    /// A negative errno.
    pub fn plover_dpdk_last_error() -> c_int;
    /// Bytes without Ethernet header.
    pub fn plover_dpdk_mtu(id: u16) -> u16;
    /// Configures and starts a port. `mac` is six bytes or null.
    pub fn plover_dpdk_start(port: *mut Port, pool: *mut Pool, mac: *const u8) -> c_int;
    /// 1: up.
    pub fn plover_dpdk_link_up(id: u16) -> c_int;
    /// Stops a port and detaches its device.
    pub fn plover_dpdk_detach(id: u16);
    /// 1: the device was pulled out.
    pub fn plover_dpdk_is_removed(id: u16) -> c_int;
    /// Frames lost for want of room.
    pub fn plover_dpdk_missed(id: u16) -> u64;
    /// At most 64.
    pub fn plover_dpdk_receive(id: u16, into: *mut Received, count: u16) -> u16;
    /// All pieces of a frame.
    pub fn plover_dpdk_copy(mbuf: *const Mbuf, into: *mut u8);
    /// What was received.
    pub fn plover_dpdk_free_received(received: *mut Received, count: u16);
    /// Null: no room.
    pub fn plover_dpdk_prepare(pool: *mut Pool, bytes: u16, skip: u16, data: *mut *mut u8) -> *mut Mbuf;
    /// The port computes the checksum.
    pub fn plover_dpdk_request_checksum(mbuf: *mut Mbuf, l2_bytes: u16, l3_bytes: u16, is_v6: c_int, is_tcp: c_int);
    /// All are gone afterwards.
    pub fn plover_dpdk_send(id: u16, mbufs: *mut *mut Mbuf, count: u16, refused: *mut u16) -> u16;
    /// What was prepared and is not sent.
    pub fn plover_dpdk_free(mbufs: *mut *mut Mbuf, count: u16);
}
