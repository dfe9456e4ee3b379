//! A QEMU that the worker is attached to: QMP, agent, memory and tracker, as the guest that syncvm works on.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use plover_agent::protocol::{VcpuChange, WrittenRange};
use syncvm::exchange::{Guest, GuestError};
use syncvm::hash::HashPool;
use syncvm::tracker::{self, Candidates, DirtyTracker, TrackerKind};
use syncvm::{DirtySet, GuestRam, PAGE_BYTES, PageNumber};

use crate::config::{TrackerChoice, VmConfig};
use crate::device::BackendDirty;
use crate::qemu::agent::{AgentClient, AgentError, VcpuClocks};
use crate::qemu::device_state;
use crate::qemu::fingerprint::Fingerprint;
use crate::qemu::preflight::{self, Accepted, Refusal};
use crate::qemu::qmp::{EventKind, Qmp, QmpError, RunState};
use crate::qemu::ram::{RamInfo, RamRange};
use crate::qemu::state_file::StateFile;

/// How long QMP and the agent may take to answer when QEMU is there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one QMP command may take; QEMU's main loop can be busy for a while, but not for this long.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);
/// A leader waits for its secondary with its own guest stopped. So what a secondary's QEMU is asked may take half of the longest silence in
/// a syncvm: the leader hears of a QEMU that is frozen before it gives up by itself. At least this, and no longer than other
/// commands.
const SHORTEST_STOP_TIMEOUT: Duration = Duration::from_millis(250);

/// What became known at attaching.
pub struct Found {
    /// What must be equal on all replicas.
    pub fingerprint: Fingerprint,
    /// The guest has never run and has nobody else's state.
    pub fresh: bool,
    /// It followed another's execution last, so that it may be a mixture.
    pub follows: bool,
    /// It runs.
    pub running: bool,
    /// The vCPUs' clocks.
    pub clocks: VcpuClocks,
    /// Tracker and reason.
    pub tracker: String,
}

/// What QEMU said by itself.
#[derive(Debug, PartialEq, Eq)]
pub enum QemuNews {
    /// Nothing that matters.
    Nothing,
    /// The guest switched itself off.
    PoweredOff,
    /// The connection is gone.
    Gone(String),
}

/// One attached QEMU.
pub struct QemuGuest {
    qmp: Qmp,
    agent: AgentClient,
    ram: GuestRam,
    tracker: Box<dyn DirtyTracker>,
    dirty: BackendDirty,
    state_file: StateFile,
    /// Its process.
    pub pid: i32,
    /// As QEMU has it noted.
    follows: bool,
    powered_off: bool,
    /// How long a secondary's commands may take.
    stop_timeout: Duration,
    /// A leader waits.
    hurried: bool,
    /// The last command that is expected to be quick had no answer in its time.
    unanswered: bool,
    /// The pieces of its RAM in its address space.
    addresses: Vec<RamRange>,
    /// TCG: it keeps translations of the code in RAM.
    translates: bool,
    /// Its device state since it stopped, if it translates.
    saved: Option<Vec<u8>>,
    /// This QEMU can only be stopped, saved, loaded and resumed through its monitor.
    needs_monitor: bool,
    /// It was told of all that was written into its RAM past it since then.
    is_told: bool,
    /// `-no-reboot` or `-action reboot=shutdown`: a reset of ours must not end QEMU.
    reboot_is_shutdown: bool,
}

/// Where a VM's QEMU is to be found.
pub struct Sockets {
    /// QMP.
    pub qmp: PathBuf,
    /// The agent.
    pub agent: PathBuf,
    /// A folder for state files.
    pub run_dir: PathBuf,
}

impl Sockets {
    /// As configured, or in `run_dir`.
    pub fn of(vm: &VmConfig, run_dir: &Path) -> Self {
        Self {
            qmp: vm.qmp_socket.clone().unwrap_or_else(|| run_dir.join("qmp.sock")),
            agent: vm.agent_socket.clone().unwrap_or_else(|| run_dir.join("agent.sock")),
            run_dir: run_dir.to_owned(),
        }
    }
}

impl QemuGuest {
    /// Connects to QEMU, checks it and takes hold of its memory. `replica` names this node in messages.
    ///
    /// # Errors
    /// A text with the remedy: no QEMU yet, or one that cannot be protected.
    pub fn attach(
        sockets: &Sockets,
        vm: &VmConfig,
        replica: &str,
        dirty: BackendDirty,
    ) -> Result<(Self, Found), String> {
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let mut qmp = Qmp::connect(&sockets.qmp, deadline).map_err(|error| error.to_string())?;
        qmp.set_timeout(COMMAND_TIMEOUT);
        let connected = AgentClient::connect(&sockets.agent, deadline);
        let agent_error = connected.as_ref().err().map(|error| format!(" ({error})")).unwrap_or_default();
        let mut agent = connected.ok();
        let Accepted { fingerprint, ram, fresh } =
            preflight::check(&mut qmp, agent.as_mut(), replica, &sockets.run_dir).map_err(|refusal| match refusal {
                Refusal::AgentMissing => format!("{refusal}{agent_error}"),
                _ => refusal.to_string(),
            })?;
        if ram.length_bytes != vm.memory_mib << 20 {
            return Err(format!(
                "QEMU has {} MiB of memory but {} says memory_mib = {}; make them equal on all nodes",
                ram.length_bytes >> 20,
                vm.path.display(),
                vm.memory_mib
            ));
        }
        let mut agent = agent.expect("the check refuses a missing agent");
        let status = qmp.query_status().map_err(|error| error.to_string())?;
        let follows = qmp.is_following().map_err(|error| error.to_string())?;
        let clocks = agent.clocks().map_err(|error| error.to_string())?;
        let (tracker, why) = choose_tracker(vm.policy.tracker, &mut agent, &ram)?;
        let file = ram.clone_file().map_err(|error| error.to_string())?;
        let mapping = GuestRam::new(file, Some(ram.length_bytes)).map_err(|error| error.to_string())?;
        let state_file = StateFile::create(&sockets.run_dir, &vm.name).map_err(|error| error.to_string())?;
        let found = Found { fingerprint, fresh, follows, running: status == RunState::Running, clocks, tracker: why };
        let pid = ram.qemu_pid;
        let translates = found.fingerprint.accelerator == "tcg";
        let reboot_is_shutdown = reboot_is_shutdown(pid);
        let guest = Self {
            qmp,
            agent,
            ram: mapping,
            tracker,
            dirty,
            state_file,
            pid,
            follows,
            powered_off: false,
            stop_timeout: stop_timeout(vm.policy.sync_timeout_ms),
            hurried: false,
            unanswered: false,
            addresses: ram.ranges,
            translates,
            saved: None,
            needs_monitor: false,
            is_told: false,
            reboot_is_shutdown,
        };
        Ok((guest, found))
    }

    /// Whether a leader waits for what is asked of QEMU from here on.
    pub fn hurry(&mut self, hurried: bool) {
        self.hurried = hurried;
    }

    /// `limit` holds in a hurry only.
    fn limited(&self, limit: Duration) -> Duration {
        if self.hurried { limit } else { COMMAND_TIMEOUT }
    }

    /// Runs a command within the limit that holds in a hurry, and notes whether it was answered.
    fn quickly<T>(
        &mut self,
        limit: Duration,
        operation: &'static str,
        command: impl FnOnce(&mut Qmp) -> Result<T, QmpError>,
    ) -> Result<T, GuestError> {
        self.qmp.set_timeout(self.limited(limit));
        let done = command(&mut self.qmp);
        self.qmp.set_timeout(COMMAND_TIMEOUT);
        self.unanswered = done.as_ref().is_err_and(QmpError::is_timeout);
        done.map_err(|error| GuestError::new(operation, error))
    }

    /// As [`Self::quickly`], through the agent where that can be done: the monitor reads a command byte by byte.
    fn directly(
        &mut self,
        limit: Duration,
        operation: &'static str,
        through_agent: impl FnOnce(&mut AgentClient, Duration) -> Result<(), AgentError>,
        through_monitor: impl FnOnce(&mut Qmp) -> Result<(), QmpError>,
    ) -> Result<(), GuestError> {
        if !self.needs_monitor {
            let limited = self.limited(limit);
            let done = through_agent(&mut self.agent, limited);
            self.unanswered = done.as_ref().is_err_and(AgentError::is_timeout);
            if !done.as_ref().is_err_and(AgentError::is_unsupported) {
                return done.map_err(|error| GuestError::new(operation, error));
            }
            tracing::info!(
                "this QEMU is driven through its monitor, because it does not export what is faster; slots cost more"
            );
            self.needs_monitor = true;
        }
        self.quickly(limit, operation, through_monitor)
    }

    /// Whether QEMU does nothing: it answers neither in the time of a `stop` and half as much again nor then. (Asked twice,
    /// because this process may have stood still together with it.)
    pub fn is_silent(&mut self) -> bool {
        !self.answers_within(self.stop_timeout * 3 / 2) && self.is_stuck()
    }

    /// Whether QEMU left a command unanswered and does not answer now either.
    pub fn is_stuck(&mut self) -> bool {
        self.unanswered && !self.answers_within(self.stop_timeout / 4)
    }

    fn answers_within(&mut self, limit: Duration) -> bool {
        let hurried = std::mem::replace(&mut self.hurried, true);
        // That the connection is gone is seen elsewhere.
        let _ = self.quickly(limit, "say how it is", Qmp::query_status);
        self.hurried = hurried;
        !self.unanswered
    }

    /// Lets the hash workers share the harvests.
    pub fn use_pool(&mut self, pool: &Arc<HashPool>) {
        self.tracker.use_pool(pool);
    }

    /// Notes that the guest is about to be given another's state: from here on it can only be restarted.
    ///
    /// # Errors
    /// QEMU does not take the note.
    pub fn mark_used(&mut self) -> Result<(), GuestError> {
        self.qmp.mark_used().map_err(|error| GuestError::new("take a note", error))
    }

    /// Notes whether the guest follows another's execution: then a daemon that is started next cannot know it to be whole.
    ///
    /// # Errors
    /// QEMU does not take the note.
    pub fn note_following(&mut self, follows: bool) -> Result<(), GuestError> {
        if self.follows != follows {
            self.qmp.mark_following(follows).map_err(|error| GuestError::new("take a note", error))?;
            self.follows = follows;
        }
        Ok(())
    }

    /// Readable when QEMU says something by itself.
    pub fn event_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.qmp.poll_fd()
    }

    /// What QEMU has said by itself.
    pub fn news(&mut self) -> QemuNews {
        let polled = self.qmp.poll_events();
        for event in self.qmp.take_events() {
            if let EventKind::Shutdown { guest: true, .. } = event.kind {
                self.powered_off = true;
            }
        }
        match polled {
            _ if self.powered_off => QemuNews::PoweredOff,
            Err(error) => QemuNews::Gone(error.to_string()),
            Ok(()) => QemuNews::Nothing,
        }
    }
}

impl QemuGuest {
    /// Loads the vCPUs' common state in a way that lets TCG keep its translations, if it was told of all that was written, and
    /// returns the rest of the state.
    fn load_vcpus(&mut self, state: &[u8]) -> Option<Vec<u8>> {
        let is_told = std::mem::take(&mut self.is_told);
        let present = device_state::divide(&self.saved.take().filter(|_| is_told)?)?;
        let incoming = device_state::divide(state)?;
        if !present.vcpus.keys().eq(incoming.vcpus.keys()) {
            return None;
        }
        let changes = present.vcpus.iter().zip(incoming.vcpus.values());
        let changes: Vec<VcpuChange> = changes
            .filter(|((_, was), becomes)| *was != *becomes)
            .map(|((index, was), becomes)| VcpuChange { index: *index, was: *was, becomes: *becomes })
            .collect();
        if !changes.is_empty()
            && let Err(error) = self.agent.change_vcpus(&changes)
        {
            tracing::debug!(%error, "the vCPUs' state is loaded in the way that forgets all translations");
            return None;
        }
        Some(incoming.rest)
    }
}

/// Where these pages are in QEMU's address space, neighbours together; `None` if some is not there.
fn ranges_of(addresses: &[RamRange], pages: &mut dyn Iterator<Item = PageNumber>) -> Option<Vec<WrittenRange>> {
    let mut ranges: Vec<WrittenRange> = Vec::new();
    for page in pages {
        let (offset, bytes) = (u64::from(page.0) * PAGE_BYTES as u64, PAGE_BYTES as u64);
        let piece = addresses.iter().rfind(|piece| piece.file_offset <= offset)?;
        let address = piece.addresses.start + (offset - piece.file_offset);
        if address + bytes > piece.addresses.end {
            return None;
        }
        match ranges.last_mut() {
            Some(last) if last.address + last.bytes == address => last.bytes += bytes,
            _ => ranges.push(WrittenRange { address, bytes }),
        }
    }
    Some(ranges)
}

fn stop_timeout(sync_timeout_ms: u64) -> Duration {
    (Duration::from_millis(sync_timeout_ms) / 2).clamp(SHORTEST_STOP_TIMEOUT, COMMAND_TIMEOUT)
}

/// Whether QEMU was told to end instead of rebooting; there is no command that asks it.
fn reboot_is_shutdown(pid: i32) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| {
        let word = String::from_utf8_lossy(word);
        word == "-no-reboot" || word == "--no-reboot" || word.contains("reboot=shutdown")
    })
}

/// The configured tracker, or the best there is.
fn choose_tracker(
    choice: TrackerChoice,
    agent: &mut AgentClient,
    ram: &RamInfo,
) -> Result<(Box<dyn DirtyTracker>, String), String> {
    let force = match choice {
        TrackerChoice::Auto => None,
        TrackerChoice::Uffd => Some(TrackerKind::Uffd),
        TrackerChoice::SoftDirty => Some(TrackerKind::SoftDirty),
        TrackerChoice::Full => Some(TrackerKind::Full),
    };
    let candidates = Candidates {
        pid: u32::try_from(ram.qemu_pid).map_err(|_| "QEMU has no process id here".to_owned())?,
        ram: ram.file.as_fd(),
        pages: (ram.length_bytes / syncvm::PAGE_BYTES as u64) as usize,
        uffd: agent.take_userfaultfd().map_err(|error| tracing::warn!(%error, "no userfaultfd")).ok(),
        force,
    };
    let (tracker, choice) = tracker::choose(candidates).map_err(|error| error.to_string())?;
    Ok((tracker, format!("{} ({})", choice.kind, choice.reason)))
}

impl Guest for QemuGuest {
    fn stop(&mut self) -> Result<(), GuestError> {
        self.directly(self.stop_timeout, "stop", AgentClient::stop, Qmp::stop)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.saved = None;
        self.directly(self.stop_timeout / 2, "run", AgentClient::cont, Qmp::cont)
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        self.tracker.harvest(into).map_err(|error| GuestError::new("tell its dirty pages", error))?;
        // False before the guest's driver has set the device up: then the device has written nothing either.
        self.dirty.drain(&mut |page| into.insert(PageNumber(page as u32)));
        Ok(())
    }

    fn harvest_needs_stop(&self) -> bool {
        !self.tracker.exact_while_running()
    }

    fn harvest_tells_pages_apart(&self) -> bool {
        self.tracker.kind() != TrackerKind::Full
    }

    fn save_device_state(&mut self) -> Result<Vec<u8>, GuestError> {
        let path = self.state_file.path().to_owned();
        self.directly(
            self.stop_timeout,
            "save its device state",
            |agent, limit| agent.save_devices_state(&path, limit),
            |qmp| qmp.save_devices_state(&path),
        )?;
        let mut state = Vec::new();
        self.state_file.read_into(&mut state).map_err(|error| GuestError::new("give its device state", error))?;
        self.saved = self.translates.then(|| state.clone());
        Ok(state)
    }

    fn announce_written(&mut self, pages: &mut dyn Iterator<Item = PageNumber>) {
        if !self.translates {
            return;
        }
        let ranges = ranges_of(&self.addresses, pages);
        self.is_told = match ranges.map(|ranges| self.agent.tell_written(&ranges)) {
            Some(Ok(told)) => told,
            None => false,
            Some(Err(error)) => {
                tracing::debug!(%error, "QEMU is not told what was written; it forgets all translations instead");
                false
            }
        };
    }

    fn load_device_state(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let failed = |error: String| GuestError::new("load the device state", error);
        let rest = self.load_vcpus(state);
        self.state_file.write(rest.as_deref().unwrap_or(state)).map_err(|error| failed(error.to_string()))?;
        if self.needs_monitor {
            self.agent.register_yank().map_err(|error| failed(error.to_string()))?;
        }
        let path = self.state_file.path().to_owned();
        // Half as much again as for the others: a guest that does not take it is lost.
        self.directly(
            self.stop_timeout * 3 / 2,
            "load the device state",
            |agent, limit| agent.load_devices_state(&path, limit),
            |qmp| qmp.load_devices_state(&path),
        )
    }

    fn loads_have_leftovers(&self) -> bool {
        true
    }

    fn leftovers(&self, present: &[u8], incoming: &[u8]) -> Vec<String> {
        device_state::leftovers(present, incoming)
    }

    fn reset_devices(&mut self) -> Result<(), GuestError> {
        self.saved = None;
        self.qmp.reset(self.reboot_is_shutdown).map_err(|error| GuestError::new("reset", error))
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_found_where_qemu_maps_them_and_neighbours_are_one_range() {
        let piece = |start, pages, file_page| RamRange {
            addresses: start..start + pages * PAGE_BYTES as u64,
            file_offset: file_page * PAGE_BYTES as u64,
        };
        // Two pieces of a mapping: pages 0 to 3, and 4 to 9 elsewhere.
        let pieces = [piece(0x10_0000, 4, 0), piece(0x90_0000, 6, 4)];
        let ranges = |pages: &[u32]| {
            let ranges = ranges_of(&pieces, &mut pages.iter().map(|page| PageNumber(*page)))?;
            Some(ranges.iter().map(|range| (range.address, range.bytes)).collect::<Vec<_>>())
        };
        assert_eq!(ranges(&[]), Some(vec![]));
        assert_eq!(ranges(&[1, 2, 5]), Some(vec![(0x10_1000, 0x2000), (0x90_1000, 0x1000)]));
        assert_eq!(
            ranges(&[3, 4]),
            Some(vec![(0x10_3000, 0x1000), (0x90_0000, 0x1000)]),
            "neighbours in the file only"
        );
        assert_eq!(ranges(&[9]), Some(vec![(0x90_5000, 0x1000)]));
        assert_eq!(ranges(&[9, 10]), None, "behind the end");
    }
}
