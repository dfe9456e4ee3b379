//! What each vhost-user message does (QEMU docs/interop/vhost-user.rst). Runs on the session thread.
//!
//! Offered protocol features: REPLY_ACK and MQ. INFLIGHT_SHMFD is not, because nothing is ever in flight (see `ring`); STATUS is not, because the vhost crate does not know it and QEMU
//! does without; RARP is not, because the daemon announces the guest itself after a takeover.

use std::fs::File;

use rustix::fd::OwnedFd;
use thiserror::Error;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error as ProtocolError, GpuBackend, Result as ProtocolResult, VhostUserBackendReqHandlerMut};

use std::sync::Arc;

use super::features::{Features, PROTOCOL_FEATURES};
use super::link::{Answer, Command, LinkError, RingStart, SessionEnd};
use super::memory::{BackendDirty, GuestRam, MemoryError, RegionSpec};
use super::net::{MAX_QUEUE_PAIRS, MAX_RINGS, RingIndex};
use super::ring::{Direction, LayoutError, Ring, RingPlace};

/// What we offer of the protocol itself.
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::REPLY_ACK.union(VhostUserProtocolFeatures::MQ);

/// Why a message was refused. The connection is closed after it.
#[derive(Debug, Error)]
pub(crate) enum RequestError {
    #[error("{what} for ring {index}, but this device has the rings 0 to 15; use queues=8 or fewer on the netdev")]
    NoSuchRing { what: &'static str, index: u32 },
    #[error("{what} for {ring} while it is running")]
    Running { what: &'static str, ring: RingIndex },
    #[error("SET_FEATURES with {extra:#x}, which this device did not offer")]
    Features { extra: u64 },
    #[error("SET_FEATURES changes the features while a ring is running")]
    FeaturesWhileRunning,
    #[error("SET_VRING_BASE for {ring} with {base:#x}, which is no split ring's position")]
    Base { ring: RingIndex, base: u32 },
    #[error("{ring} cannot start: {source}")]
    Layout { ring: RingIndex, source: LayoutError },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("cannot duplicate a descriptor from QEMU: {0}")]
    Duplicate(std::io::Error),
    #[error("cannot make a descriptor from QEMU non-blocking: {0}")]
    NonBlocking(std::io::Error),
    #[error("{0} is not offered by this device")]
    NotOffered(&'static str),
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// What QEMU has said about one ring so far.
#[derive(Default)]
struct RingSetup {
    place: RingPlace,
    /// Some after SET_VRING_KICK, which starts the ring; the inner None means that the guest's kicks are not signalled.
    kick: Option<Option<OwnedFd>>,
    call: Option<OwnedFd>,
    error: Option<OwnedFd>,
    enabled: bool,
    running: bool,
}

/// The state of one vhost-user connection.
pub(crate) struct Handler {
    link: SessionEnd,
    dirty: BackendDirty,
    features: Option<u64>,
    ram: Option<Arc<GuestRam>>,
    rings: [RingSetup; MAX_RINGS],
    failure: Option<RequestError>,
}

impl Handler {
    /// State of a connection that has just been made. `link` comes back by [`Handler::into_link`].
    pub fn new(link: SessionEnd, dirty: BackendDirty) -> Self {
        Self { link, dirty, features: None, ram: None, rings: Default::default(), failure: None }
    }

    /// Ends the connection's state.
    pub fn into_link(self) -> SessionEnd {
        self.link
    }

    /// The line to the reactor.
    pub fn link(&self) -> &SessionEnd {
        &self.link
    }

    /// Why the last request failed, if it was for a reason of ours.
    pub fn take_failure(&mut self) -> Option<RequestError> {
        self.failure.take()
    }

    /// Whether SET_FEATURES has accepted protocol features.
    pub fn protocol_features_accepted(&self) -> bool {
        self.features.is_some_and(|features| features & PROTOCOL_FEATURES != 0)
    }

    /// SET_VRING_ENABLE.
    pub fn enable(&mut self, index: u32, enabled: bool) -> Result<(), RequestError> {
        let ring = ring_index("SET_VRING_ENABLE", index)?;
        let setup = &mut self.rings[usize::from(ring.0)];
        setup.enabled = enabled;
        match setup.running {
            // A ring that is disabled must be at rest when QEMU hears that it is.
            true if !enabled => _ = self.link.call(Command::SetEnabled { index: ring, enabled })?,
            true => self.link.tell(Command::SetEnabled { index: ring, enabled })?,
            false => {}
        }
        Ok(())
    }

    /// Keeps the reason of a failure for the log, and tells the vhost crate that there was one.
    fn report<T>(&mut self, result: Result<T, RequestError>) -> ProtocolResult<T> {
        result.map_err(|error| {
            let text = error.to_string();
            self.failure = Some(error);
            ProtocolError::ReqHandlerError(std::io::Error::other(text))
        })
    }

    /// Starts a ring once everything about it is known. Its kick is what starts it; the rest may come before or after.
    fn start_if_ready(&mut self, ring: RingIndex) -> Result<(), RequestError> {
        let features = self.features.unwrap_or(0);
        let setup = &mut self.rings[usize::from(ring.0)];
        let (Some(ram), Some(kick), false) = (&self.ram, &setup.kick, setup.running) else {
            return Ok(());
        };
        if setup.place.size == 0 || setup.place.descriptors == 0 || self.features.is_none() {
            return Ok(());
        }
        let direction = if ring.is_receive() { Direction::ToGuest } else { Direction::FromGuest };
        let opened = Ring::open(Arc::clone(ram), setup.place, direction, Features(features));
        let opened = opened.map_err(|source| RequestError::Layout { ring, source })?;
        // Without protocol features a ring is enabled as soon as it is started.
        let enabled = setup.enabled || features & PROTOCOL_FEATURES == 0;
        let start = RingStart {
            ring: Box::new(opened),
            features: Features(features & !PROTOCOL_FEATURES),
            kick: duplicate(kick.as_ref())?,
            call: duplicate(setup.call.as_ref())?,
            error: duplicate(setup.error.as_ref())?,
            enabled,
        };
        setup.running = true;
        self.link.tell(Command::StartRing { index: ring, start })?;
        Ok(())
    }

    /// Stops a ring if it runs; afterwards its position is in its set-up.
    fn stop(&mut self, ring: RingIndex) -> Result<(), RequestError> {
        let setup = &mut self.rings[usize::from(ring.0)];
        if !setup.running {
            return Ok(());
        }
        if let Answer::Stopped { position, remains } = self.link.call(Command::StopRing { index: ring })? {
            setup.place.base = position.unwrap_or(setup.place.base);
            drop(remains);
        }
        setup.running = false;
        Ok(())
    }

    /// Changes where a ring is, unless it runs and the change is one.
    fn place(
        &mut self,
        what: &'static str,
        index: u32,
        change: impl FnOnce(&mut RingPlace),
    ) -> Result<(), RequestError> {
        let ring = ring_index(what, index)?;
        let setup = &mut self.rings[usize::from(ring.0)];
        let mut place = setup.place;
        change(&mut place);
        if setup.running && place != setup.place {
            return Err(RequestError::Running { what, ring });
        }
        setup.place = place;
        self.start_if_ready(ring)
    }

    fn change_features(&mut self, features: u64) -> Result<(), RequestError> {
        let extra = features & !(Features::offered().0 | PROTOCOL_FEATURES);
        if extra != 0 {
            return Err(RequestError::Features { extra });
        }
        if self.features != Some(features) && self.rings.iter().any(|ring| ring.running) {
            return Err(RequestError::FeaturesWhileRunning);
        }
        self.features = Some(features);
        RingIndex::all().try_for_each(|ring| self.start_if_ready(ring))
    }

    /// A new memory table, which QEMU also sends while rings run (a memory slot was added): they pause for it.
    fn change_memory(&mut self, table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<(), RequestError> {
        for ring in RingIndex::all() {
            self.stop(ring)?;
        }
        let spec = |(region, file): (&VhostUserMemoryRegion, File)| RegionSpec {
            guest: region.guest_phys_addr,
            size: region.memory_size,
            user: region.user_addr,
            offset: region.mmap_offset,
            file,
        };
        let specs = table.iter().zip(files).map(spec).collect();
        self.ram = Some(Arc::new(GuestRam::build(specs, &self.dirty)?));
        self.link.tell(Command::MemoryReady(self.dirty.ram_identity()))?;
        RingIndex::all().try_for_each(|ring| self.start_if_ready(ring))
    }

    fn base(&mut self, index: u32) -> Result<VhostUserVringState, RequestError> {
        let ring = ring_index("GET_VRING_BASE", index)?;
        self.stop(ring)?;
        let setup = &mut self.rings[usize::from(ring.0)];
        // The next start needs a kick of its own.
        setup.kick = None;
        Ok(VhostUserVringState::new(index, u32::from(setup.place.base)))
    }

    fn set_base(&mut self, index: u32, base: u32) -> Result<(), RequestError> {
        let ring = ring_index("SET_VRING_BASE", index)?;
        let base = u16::try_from(base).map_err(|_| RequestError::Base { ring, base })?;
        // A running ring has moved on from its base, so only a stopped one can be told where it is.
        if self.rings[usize::from(ring.0)].running {
            return Err(RequestError::Running { what: "SET_VRING_BASE", ring });
        }
        self.place("SET_VRING_BASE", index, |place| place.base = base)
    }

    fn kick(&mut self, index: u8, file: Option<File>) -> Result<(), RequestError> {
        let ring = ring_index("SET_VRING_KICK", index.into())?;
        let kick = non_blocking(file)?;
        let copy = duplicate(kick.as_ref())?;
        let setup = &mut self.rings[usize::from(ring.0)];
        setup.kick = Some(kick);
        if setup.running {
            self.link.tell(Command::SetKick { index: ring, kick: copy })?;
        }
        self.start_if_ready(ring)
    }

    fn call(&mut self, index: u8, file: Option<File>) -> Result<(), RequestError> {
        let ring = ring_index("SET_VRING_CALL", index.into())?;
        let call = non_blocking(file)?;
        let copy = duplicate(call.as_ref())?;
        let setup = &mut self.rings[usize::from(ring.0)];
        setup.call = call;
        if setup.running {
            self.link.tell(Command::SetCall { index: ring, call: copy })?;
        }
        Ok(())
    }

    fn error(&mut self, index: u8, file: Option<File>) -> Result<(), RequestError> {
        let ring = ring_index("SET_VRING_ERR", index.into())?;
        // Taken into use at the next start of the ring; nobody changes it in between.
        self.rings[usize::from(ring.0)].error = non_blocking(file)?;
        Ok(())
    }

    fn stop_all(&mut self) -> Result<(), RequestError> {
        RingIndex::all().try_for_each(|ring| self.base(ring.0.into()).map(drop))
    }

    fn not_offered<T>(&mut self, what: &'static str) -> ProtocolResult<T> {
        self.report(Err(RequestError::NotOffered(what)))
    }
}

fn ring_index(what: &'static str, index: u32) -> Result<RingIndex, RequestError> {
    let found = RingIndex::all().find(|ring| u32::from(ring.0) == index);
    found.ok_or(RequestError::NoSuchRing { what, index })
}

fn duplicate(fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, RequestError> {
    fd.map(OwnedFd::try_clone).transpose().map_err(RequestError::Duplicate)
}

/// The reactor reads kicks and writes calls, and must not be held up by a descriptor that blocks.
fn non_blocking(file: Option<File>) -> Result<Option<OwnedFd>, RequestError> {
    let Some(file) = file else { return Ok(None) };
    rustix::io::ioctl_fionbio(&file, true).map_err(|error| RequestError::NonBlocking(error.into()))?;
    Ok(Some(file.into()))
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> ProtocolResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> ProtocolResult<()> {
        let result = self.stop_all();
        self.report(result)
    }

    fn reset_device(&mut self) -> ProtocolResult<()> {
        let result = self.stop_all();
        self.report(result)
    }

    fn get_features(&mut self) -> ProtocolResult<u64> {
        Ok(Features::offered().0 | PROTOCOL_FEATURES)
    }

    fn set_features(&mut self, features: u64) -> ProtocolResult<()> {
        let result = self.change_features(features);
        self.report(result)
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> ProtocolResult<Option<Vec<u64>>> {
        let result = self.change_memory(table, files);
        self.report(result).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> ProtocolResult<()> {
        let result = self.place("SET_VRING_NUM", index, |place| place.size = num);
        self.report(result)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> ProtocolResult<()> {
        let result = self.place("SET_VRING_ADDR", index, |place| {
            (place.descriptors, place.used, place.available) = (descriptors, used, available);
        });
        self.report(result)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> ProtocolResult<()> {
        let result = self.set_base(index, base);
        self.report(result)
    }

    fn get_vring_base(&mut self, index: u32) -> ProtocolResult<VhostUserVringState> {
        let result = self.base(index);
        self.report(result)
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        let result = self.kick(index, fd);
        self.report(result)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        let result = self.call(index, fd);
        self.report(result)
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> ProtocolResult<()> {
        let result = self.error(index, fd);
        self.report(result)
    }

    fn get_protocol_features(&mut self) -> ProtocolResult<VhostUserProtocolFeatures> {
        Ok(PROTOCOL)
    }

    fn set_protocol_features(&mut self, features: u64) -> ProtocolResult<()> {
        if features & !PROTOCOL.bits() != 0 {
            return self.not_offered("a protocol feature other than REPLY_ACK and MQ");
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> ProtocolResult<u64> {
        Ok(MAX_QUEUE_PAIRS as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> ProtocolResult<()> {
        let result = self.enable(index, enable);
        self.report(result)
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> ProtocolResult<Vec<u8>> {
        self.not_offered("GET_CONFIG")
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> ProtocolResult<()> {
        self.not_offered("SET_CONFIG")
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> ProtocolResult<()> {
        self.not_offered("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> ProtocolResult<File> {
        self.not_offered("GET_SHARED_OBJECT")
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> ProtocolResult<(VhostUserInflight, File)> {
        self.not_offered("GET_INFLIGHT_FD")
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> ProtocolResult<()> {
        self.not_offered("SET_INFLIGHT_FD")
    }

    fn get_max_mem_slots(&mut self) -> ProtocolResult<u64> {
        self.not_offered("GET_MAX_MEM_SLOTS")
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> ProtocolResult<Option<u64>> {
        self.not_offered("ADD_MEM_REG")
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> ProtocolResult<()> {
        self.not_offered("REM_MEM_REG")
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> ProtocolResult<Option<File>> {
        self.not_offered("SET_DEVICE_STATE_FD")
    }

    fn check_device_state(&mut self) -> ProtocolResult<()> {
        self.not_offered("CHECK_DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> ProtocolResult<VhostUserShMemConfig> {
        self.not_offered("GET_SHMEM_CONFIG")
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> ProtocolResult<()> {
        self.not_offered("SET_LOG_BASE")
    }
}
