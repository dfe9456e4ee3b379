//! The few calls of an installed SPDK that the storage log needs. Empty without the feature `spdk`.
//!
//! Declarations by hand over a C shim that is compiled against the installed headers, so no layout of SPDK's
//! structures is guessed. Rejected: bindgen (libclang on every build machine, for thirty functions) and the crates
//! that wrap SPDK (none with flush, see docs/spdk.md). The functions follow src/shim.c, which says what they do.
#![cfg(feature = "spdk")]

use std::ffi::{c_char, c_int, c_void};

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
    /// `struct spdk_nvme_ctrlr`.
    Controller,
    /// `struct spdk_nvme_ns`.
    Namespace,
    /// `struct spdk_nvme_qpair`.
    QueuePair,
    /// `struct spdk_nvme_cpl`.
    Completion,
    /// `struct plover_spdk_attach`: a controller that is being attached.
    Attach,
    /// `struct spdk_nvme_detach_ctx`: a controller that is being detached.
    Detach
);

/// `struct plover_spdk_env`. Pointers are NUL-terminated texts that live as long as the process, because DPDK may
/// keep them, or null.
#[repr(C)]
#[derive(Debug)]
pub struct EnvironmentOptions {
    /// Cores for DPDK, such as «0x1».
    pub core_mask: *const c_char,
    /// «va», «pa» or null.
    pub iova_mode: *const c_char,
    /// A hugetlbfs mount or null.
    pub huge_dir: *const c_char,
    /// More words for DPDK's command line or null.
    pub eal_arguments: *const c_char,
    /// Reserved at the start, MiB; negative: as needed.
    pub memory_mib: i64,
}

/// `struct plover_spdk_namespace`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct NamespaceInfo {
    /// The handle, valid until the next reset.
    pub ns: *mut Namespace,
    /// Bytes of a sector, without metadata.
    pub sector_bytes: u64,
    /// Sectors.
    pub sector_count: u64,
    /// Bytes of metadata per sector.
    pub metadata_bytes: u64,
    /// Bytes of the largest transfer that is not split.
    pub max_transfer_bytes: u64,
    /// Not 0 with a volatile write cache.
    pub has_write_cache: u64,
}

/// SPDK's levels: 0 error, 1 warning, 2 notice, 3 information, 4 debug.
pub type LogFn = unsafe extern "C" fn(level: c_int, message: *const c_char);
/// Called from [`plover_spdk_poll`] with what was given at submission.
pub type DoneFn = unsafe extern "C" fn(io: *mut c_void, completion: *const Completion);
/// Called from polls for a command that exceeds its time; `qpair` is null for an admin command.
pub type TimeoutFn =
    unsafe extern "C" fn(context: *mut c_void, ctrlr: *mut Controller, qpair: *mut QueuePair, command: u16);

unsafe extern "C" {
    /// SPDK's version, a static text.
    pub fn plover_spdk_version() -> *const c_char;
    /// Starts DPDK and SPDK's memory and PCI layers; 0 or a negative errno. Once per process.
    pub fn plover_spdk_env_start(env: *const EnvironmentOptions, log: LogFn) -> c_int;
    /// Zeroed memory that devices can reach, or null.
    pub fn plover_spdk_dma_alloc(bytes: u64, alignment: u64) -> *mut c_void;
    /// Gives it back.
    pub fn plover_spdk_dma_free(memory: *mut c_void);
    /// Starts to attach; null if there is no such controller or it cannot be had.
    pub fn plover_spdk_attach_begin(pci_address: *const c_char, admin_timeout_ms: u32) -> *mut Attach;
    /// `-EAGAIN`: again. Otherwise `attach` is gone: 0 and a controller, or an error.
    pub fn plover_spdk_attach_poll(attach: *mut Attach, ctrlr: *mut *mut Controller) -> c_int;
    /// Describes a namespace; 0, or `-ENODEV`.
    pub fn plover_spdk_namespace(ctrlr: *mut Controller, id: u32, out: *mut NamespaceInfo) -> c_int;
    /// Watches all commands from now on.
    pub fn plover_spdk_set_timeouts(
        ctrlr: *mut Controller,
        io_us: u64,
        admin_us: u64,
        callback: TimeoutFn,
        context: *mut c_void,
    );
    /// An I/O queue pair, or null.
    pub fn plover_spdk_qpair_create(ctrlr: *mut Controller, depth: u32, requests: u32) -> *mut QueuePair;
    /// Deletes it; calls back for what is in flight.
    pub fn plover_spdk_qpair_free(qpair: *mut QueuePair) -> c_int;
    /// Submits a write; 0 or a negative errno.
    pub fn plover_spdk_write(
        ns: *mut Namespace,
        qpair: *mut QueuePair,
        memory: *const c_void,
        sector: u64,
        sectors: u32,
        done: DoneFn,
        io: *mut c_void,
    ) -> c_int;
    /// Submits a read; 0 or a negative errno.
    pub fn plover_spdk_read(
        ns: *mut Namespace,
        qpair: *mut QueuePair,
        memory: *mut c_void,
        sector: u64,
        sectors: u32,
        done: DoneFn,
        io: *mut c_void,
    ) -> c_int;
    /// Submits a flush; 0 or a negative errno.
    pub fn plover_spdk_flush(ns: *mut Namespace, qpair: *mut QueuePair, done: DoneFn, io: *mut c_void) -> c_int;
    /// Status code type and status code; 0 is success.
    pub fn plover_spdk_status(completion: *const Completion) -> u16;
    /// Calls back for what has completed; the number, or a negative errno when the queue is dead.
    pub fn plover_spdk_poll(qpair: *mut QueuePair) -> i32;
    /// The same for the admin queue; notices a controller that was pulled out.
    pub fn plover_spdk_poll_admin(ctrlr: *mut Controller) -> i32;
    /// Declares the controller failed, so that nothing inside SPDK waits for it.
    pub fn plover_spdk_fail(ctrlr: *mut Controller);
    /// Whether it is.
    pub fn plover_spdk_is_failed(ctrlr: *mut Controller) -> bool;
    /// First step of a reset.
    pub fn plover_spdk_disconnect(ctrlr: *mut Controller) -> c_int;
    /// Third step of a reset, after [`plover_spdk_poll_admin`] has answered `-ENXIO`.
    pub fn plover_spdk_reconnect_begin(ctrlr: *mut Controller);
    /// Fourth step, until it does not answer `-EAGAIN`.
    pub fn plover_spdk_reconnect_poll(ctrlr: *mut Controller) -> c_int;
    /// Starts to detach; the context stays null when there is nothing to wait for.
    pub fn plover_spdk_detach_begin(ctrlr: *mut Controller, detach: *mut *mut Detach) -> c_int;
    /// `-EAGAIN`: again. Otherwise both are gone.
    pub fn plover_spdk_detach_poll(detach: *mut Detach) -> c_int;
}
