//! Memory that a device knows.

use std::ffi::c_int;
use std::io;
use std::sync::Arc;

use rdma_sys::{self as sys, Rdma};

use super::super::arena::Arena;
use super::{Id, VerbsError, failed};

/// A protection domain: its registrations serve its queue pairs only.
#[derive(Debug)]
pub(super) struct Domain {
    library: &'static Rdma,
    pub(super) raw: *mut sys::Pd,
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: registrations and queue pairs of it are gone (field order of Memory and Link).
        unsafe { (self.library.dealloc_pd)(self.raw) };
    }
}

/// Registered memory.
#[derive(Debug)]
pub(super) struct Region {
    library: &'static Rdma,
    pub(super) raw: *mut sys::Mr,
    /// Mapped for as long as it is registered.
    _arena: Arc<Arena>,
}

impl Region {
    fn new(
        domain: &Domain,
        arena: &Arc<Arena>,
        offset: usize,
        bytes: usize,
        access: c_int,
    ) -> Result<Region, VerbsError> {
        assert!(offset + bytes <= arena.len(), "the region lies in the arena");
        let library = domain.library;
        // SAFETY: the range is mapped for as long as the registration, which holds the arena.
        let raw = unsafe { (library.reg_mr)(domain.raw, arena.as_ptr(offset).cast(), bytes, access) };
        match raw.is_null() {
            true => Err(VerbsError::Memory { bytes, source: Arc::new(io::Error::last_os_error()) }),
            false => Ok(Region { library, raw, _arena: Arc::clone(arena) }),
        }
    }

    pub(super) fn lkey(&self) -> u32 {
        // SAFETY: registered until drop.
        unsafe { (*self.raw).lkey }
    }

    fn rkey(&self) -> u32 {
        // SAFETY: registered until drop.
        unsafe { (*self.raw).rkey }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: registered once, deregistered here only. The device does not touch the memory afterwards.
        unsafe { (self.library.dereg_mr)(self.raw) };
    }
}

/// The ring that the peer writes, and the mirror of the peer's ring that is written from.
#[derive(Debug)]
pub struct Memory {
    // In the order of destruction.
    pub(super) ring: Option<Region>,
    pub(super) mirror: Region,
    pub(super) domain: Domain,
    pub(super) arena: Arc<Arena>,
    pub(super) ring_bytes: usize,
}

// SAFETY: libibverbs locks what threads share; this is used by one thread at a time.
unsafe impl Send for Memory {}

impl Memory {
    /// Maps and registers it with the device of `id`.
    ///
    /// # Errors
    /// [`VerbsError`].
    pub fn new(id: &Id, ring_bytes: usize) -> Result<Memory, VerbsError> {
        let library = id.library();
        let arena = Arena::new(2 * ring_bytes)
            .map_err(|source| VerbsError::Memory { bytes: 2 * ring_bytes, source: Arc::new(source) })?;
        let arena = Arc::new(arena);
        // SAFETY: the context is that of a bound identifier.
        let raw = unsafe { (library.alloc_pd)(id.context()) };
        if raw.is_null() {
            return Err(failed("ibv_alloc_pd"));
        }
        let domain = Domain { library, raw };
        let peer_writes = sys::ACCESS_LOCAL_WRITE | sys::ACCESS_REMOTE_WRITE;
        let ring = Region::new(&domain, &arena, 0, ring_bytes, peer_writes)?;
        let mirror = Region::new(&domain, &arena, ring_bytes, ring_bytes, 0)?;
        Ok(Memory { ring: Some(ring), mirror, domain, arena, ring_bytes })
    }

    /// The ring's address and key, for the peer.
    pub fn ring_for_peer(&self) -> (u64, u32) {
        (self.arena.address(), self.ring.as_ref().map_or(0, Region::rkey))
    }

    /// The ring at its start, and behind it the mirror.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }
}
