//! Dirty tracking of another process's memory, from outside.
//!
//! Three ways, best first; [`choose`] probes the kernel and says what it took and why:
//! * [`TrackerKind::Uffd`]: userfaultfd write protection in asynchronous mode plus `PAGEMAP_SCAN` (Linux ≥ 6.7):
//!   exact and atomic while the guest runs, cost follows RAM size only mildly;
//! * [`TrackerKind::SoftDirty`]: `/proc/PID/clear_refs` and pagemap bit 55: exact for a stopped guest only;
//! * [`TrackerKind::Full`]: every page is dirty; the hash comparison then finds what differs.
//!
//! None of them sees writes through the backend's own mapping, nor pages that QEMU gives back to the
//! kernel (balloon, free page reporting): a protected VM must not have such a device.

mod maps;
mod soft_dirty;
mod sys;
mod uffd;

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

pub use maps::{Mapping, find_mappings};
pub use soft_dirty::SoftDirtyTracker;
pub use uffd::UffdTracker;

use crate::dirty::DirtySet;
use crate::hash::HashPool;

/// Why tracking failed.
#[derive(Debug, Error)]
pub enum TrackerError {
    /// A file of the traced process could not be used.
    #[error("cannot use {path} to track dirty pages; run as root or with CAP_SYS_PTRACE")]
    Proc {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process does not map the RAM file.
    #[error("process {pid} does not map the guest's RAM file shared; start QEMU with share=on")]
    NotMapped {
        /// The process.
        pid: u32,
    },
    /// The process maps the RAM file only in part.
    #[error("process {pid} maps only {mapped} of the {pages} pages of the guest's RAM file")]
    PartlyMapped {
        /// The process.
        pid: u32,
        /// Pages mapped.
        mapped: usize,
        /// Pages of the file.
        pages: usize,
    },
    /// The kernel refused a request.
    #[error("the kernel refused {request}{hint}")]
    Kernel {
        /// Which request.
        request: &'static str,
        /// What that usually means, or nothing.
        hint: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The tracker asked for is not available here.
    #[error("dirty tracker {kind} is not available: {why}")]
    Unavailable {
        /// Which.
        kind: TrackerKind,
        /// Why.
        why: String,
    },
}

/// What one harvest did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HarvestStats {
    /// Pages found dirty (not necessarily new in the set).
    pub pages: usize,
    /// Ranges they came in.
    pub ranges: usize,
    /// System calls made.
    pub calls: usize,
}

/// Finds the pages that another process wrote.
pub trait DirtyTracker: Send {
    /// Adds every page written since the last harvest (or since the tracker was made) to `into`.
    ///
    /// # Errors
    /// When pages may have been missed. The caller must treat every page as dirty.
    fn harvest(&mut self, into: &mut DirtySet) -> Result<HarvestStats, TrackerError>;

    /// Which one it is.
    fn kind(&self) -> TrackerKind;

    /// Whether a harvest misses nothing although the process writes meanwhile.
    fn exact_while_running(&self) -> bool;

    /// Lets the workers of `pool` share the harvests, where that can help.
    fn use_pool(&mut self, _pool: &Arc<HashPool>) {}
}

/// The ways to track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackerKind {
    /// userfaultfd and `PAGEMAP_SCAN`.
    Uffd,
    /// Soft-dirty bits.
    SoftDirty,
    /// Every page is dirty.
    Full,
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uffd => "uffd",
            Self::SoftDirty => "soft-dirty",
            Self::Full => "full",
        })
    }
}

impl FromStr for TrackerKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "uffd" => Ok(Self::Uffd),
            "soft-dirty" => Ok(Self::SoftDirty),
            "full" => Ok(Self::Full),
            _ => Err(format!("no dirty tracker named {name:?}; use uffd, soft-dirty or full")),
        }
    }
}

/// The tracker that needs nothing: all of RAM is dirty every time.
#[derive(Debug)]
pub struct FullTracker;

impl DirtyTracker for FullTracker {
    fn harvest(&mut self, into: &mut DirtySet) -> Result<HarvestStats, TrackerError> {
        into.fill();
        Ok(HarvestStats { pages: into.pages(), ranges: 1, calls: 0 })
    }

    fn kind(&self) -> TrackerKind {
        TrackerKind::Full
    }

    fn exact_while_running(&self) -> bool {
        true
    }
}

/// What [`choose`] has to work with.
pub struct Candidates<'a> {
    /// QEMU.
    pub pid: u32,
    /// The RAM file.
    pub ram: BorrowedFd<'a>,
    /// Its pages.
    pub pages: usize,
    /// A userfaultfd that the agent made inside QEMU; without it [`TrackerKind::Uffd`] is not available.
    pub uffd: Option<OwnedFd>,
    /// Take exactly this one or fail.
    pub force: Option<TrackerKind>,
}

/// What was chosen and why; for the log and `plover status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Which.
    pub kind: TrackerKind,
    /// Why, naming what was missing for anything better.
    pub reason: String,
}

/// Takes the best tracker that works here. Everything written before counts as unknown: begin with
/// [`crate::Pairing::fresh`].
///
/// # Errors
/// When the forced tracker does not work; without `force` the full tracker always does.
pub fn choose(candidates: Candidates<'_>) -> Result<(Box<dyn DirtyTracker>, Choice), TrackerError> {
    let Candidates { pid, ram, pages, uffd, force } = candidates;
    let mut missing = Vec::new();
    let wanted = |kind| force.is_none_or(|forced| forced == kind);
    if wanted(TrackerKind::Uffd) {
        match try_uffd(pid, ram, pages, uffd) {
            Ok(tracker) => return Ok(chosen(Box::new(tracker), &missing, force)),
            Err(error) => missing.push((TrackerKind::Uffd, explain(&error))),
        }
    }
    if wanted(TrackerKind::SoftDirty) {
        match try_soft_dirty(pid, ram, pages) {
            Ok(tracker) => return Ok(chosen(Box::new(tracker), &missing, force)),
            Err(error) => missing.push((TrackerKind::SoftDirty, explain(&error))),
        }
    }
    if wanted(TrackerKind::Full) {
        return Ok(chosen(Box::new(FullTracker), &missing, force));
    }
    let (kind, why) = missing.remove(0);
    Err(TrackerError::Unavailable { kind, why })
}

fn try_uffd(pid: u32, ram: BorrowedFd<'_>, pages: usize, uffd: Option<OwnedFd>) -> Result<UffdTracker, TrackerError> {
    let uffd = uffd.ok_or_else(|| TrackerError::Unavailable {
        kind: TrackerKind::Uffd,
        why: "the agent handed over no userfaultfd".into(),
    })?;
    UffdTracker::new(uffd, pid, &find_mappings(pid, ram)?, pages)
}

fn try_soft_dirty(pid: u32, ram: BorrowedFd<'_>, pages: usize) -> Result<SoftDirtyTracker, TrackerError> {
    if !soft_dirty::supported() {
        return Err(TrackerError::Unavailable {
            kind: TrackerKind::SoftDirty,
            why: "this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)".into(),
        });
    }
    SoftDirtyTracker::new(pid, &find_mappings(pid, ram)?, pages)
}

fn chosen(
    tracker: Box<dyn DirtyTracker>,
    missing: &[(TrackerKind, String)],
    force: Option<TrackerKind>,
) -> (Box<dyn DirtyTracker>, Choice) {
    let kind = tracker.kind();
    let mut reason = match (force, kind) {
        (Some(_), _) => "asked for by the configuration".to_string(),
        (None, TrackerKind::Uffd) => "the kernel has asynchronous write protection and PAGEMAP_SCAN".into(),
        (None, TrackerKind::SoftDirty) => "the kernel has soft-dirty bits".into(),
        (None, TrackerKind::Full) => "nothing else works, so all of RAM is hashed every time".into(),
    };
    for (kind, why) in missing {
        reason.push_str(&format!("; not {kind}: {why}"));
    }
    (tracker, Choice { kind, reason })
}

fn explain(error: &TrackerError) -> String {
    match (error, std::error::Error::source(error)) {
        (TrackerError::Unavailable { why, .. }, _) => why.clone(),
        (_, Some(source)) => format!("{error} ({source})"),
        (_, None) => error.to_string(),
    }
}
