//! SPDK's environment: DPDK's memory, PCI access and log, once per process.
//!
//! DPDK pins the thread that starts it to its first core and would keep it there; the log must not decide where the
//! reactor runs, so the thread gets its old cores back.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::PathBuf;
use std::ptr;
use std::sync::{Mutex, MutexGuard};

use spdk_sys::EnvironmentOptions as RawOptions;

use super::error::{Result, SpdkError};

/// How bus addresses are chosen for memory that a device reads and writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IovaMode {
    /// Virtual addresses if the IOMMU can hold them, else physical ones.
    #[default]
    Automatic,
    /// Virtual addresses: needs an IOMMU with at least 48 bits.
    Virtual,
    /// Physical addresses: needs root.
    Physical,
}

/// What the environment is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvironmentOptions {
    /// Core that DPDK calls its own. Nothing runs there because of it.
    pub core: u16,
    /// A hugetlbfs mount. Without one, hugepages are taken without any mount and vanish with the process.
    pub huge_dir: Option<PathBuf>,
    /// Memory that is taken from the hugepages at once, MiB; without it as much as is needed, when it is needed.
    pub memory_mib: Option<u32>,
    /// How bus addresses are chosen.
    pub iova_mode: IovaMode,
}

impl Default for EnvironmentOptions {
    fn default() -> Self {
        Self { core: 0, huge_dir: None, memory_mib: None, iova_mode: IovaMode::Automatic }
    }
}

/// Proof that SPDK's environment runs. It runs until the process ends.
#[derive(Debug, Clone, Copy)]
pub struct Environment(());

impl Environment {
    /// Starts it, without telemetry and without sharing anything with other processes.
    ///
    /// # Errors
    /// [`SpdkError::Environment`] when DPDK refuses, [`SpdkError::StartedBefore`] the second time, however the first
    /// one ended: DPDK cannot be started again.
    pub fn start(options: &EnvironmentOptions) -> Result<Self> {
        let mut state = lock();
        if state.is_some() {
            return Err(SpdkError::StartedBefore);
        }
        // A wrong option is no attempt.
        let texts = Texts::new(options)?;
        let outcome = start(options, texts);
        state.insert(outcome).clone()
    }

    /// The one that runs; with the default options if none was started.
    ///
    /// # Errors
    /// That of the attempt to start it.
    pub fn running() -> Result<Self> {
        let mut state = lock();
        if let Some(outcome) = &*state {
            return outcome.clone();
        }
        let options = EnvironmentOptions::default();
        let outcome = Texts::new(&options).and_then(|texts| start(&options, texts));
        state.insert(outcome).clone()
    }

    /// «SPDK v26.05 …».
    pub fn version() -> &'static str {
        // SAFETY: the shim returns a static text.
        unsafe { CStr::from_ptr(spdk_sys::plover_spdk_version()) }.to_str().unwrap_or("SPDK")
    }
}

/// What became of the only attempt.
fn lock() -> MutexGuard<'static, Option<Result<Environment>>> {
    static STATE: Mutex<Option<Result<Environment>>> = Mutex::new(None);
    STATE.lock().expect("no holder of this lock panics")
}

fn start(options: &EnvironmentOptions, texts: Texts) -> Result<Environment> {
    let cores = rustix::thread::sched_getaffinity(None).ok();
    let raw = texts.leak(options);
    // SAFETY: the texts are leaked and thus live as long as DPDK; the call copies the structure; `on_log` may be
    // called at any time from any thread, and it only formats. The lock makes this the only call.
    let rc = unsafe { spdk_sys::plover_spdk_env_start(&raw, on_log) };
    if let Some(cores) = cores
        && let Err(error) = rustix::thread::sched_setaffinity(None, &cores)
    {
        tracing::warn!(%error, "this thread stays on the core that DPDK chose");
    }
    if rc == 0 { Ok(Environment(())) } else { Err(SpdkError::Environment { errno: -rc }) }
}

struct Texts {
    core_mask: CString,
    huge_dir: Option<CString>,
    eal_arguments: CString,
}

impl Texts {
    fn new(options: &EnvironmentOptions) -> Result<Self> {
        let huge_dir = match &options.huge_dir {
            None => None,
            Some(path) => {
                let refuse =
                    |problem| SpdkError::BadOption { name: "huge_dir", value: path.display().to_string(), problem };
                let text = path.to_str().ok_or_else(|| refuse("it must be text"))?;
                Some(CString::new(text).map_err(|_| refuse("it contains a zero byte"))?)
            }
        };
        // A list, not a mask, so that any core number works.
        let core_mask = CString::new(format!("[{}]", options.core)).expect("a number has no zero byte");
        // Without a mount the pages come from anonymous memory files.
        let eal_arguments = if huge_dir.is_some() { c"" } else { c"--in-memory" };
        Ok(Self { core_mask, huge_dir, eal_arguments: eal_arguments.to_owned() })
    }

    /// A few bytes, once per process.
    fn leak(self, options: &EnvironmentOptions) -> RawOptions {
        let iova_mode: *const c_char = match options.iova_mode {
            IovaMode::Automatic => ptr::null(),
            IovaMode::Virtual => c"va".as_ptr(),
            IovaMode::Physical => c"pa".as_ptr(),
        };
        RawOptions {
            core_mask: self.core_mask.into_raw(),
            iova_mode,
            huge_dir: self.huge_dir.map_or(ptr::null(), |text| text.into_raw()),
            eal_arguments: self.eal_arguments.into_raw(),
            memory_mib: options.memory_mib.map_or(-1, i64::from),
        }
    }
}

/// SPDK's messages, in our log.
unsafe extern "C" fn on_log(level: c_int, message: *const c_char) {
    // SAFETY: the shim passes a NUL-terminated text that lives during the call.
    let message = unsafe { CStr::from_ptr(message) }.to_string_lossy();
    let message = message.trim_end();
    match level {
        i32::MIN..=0 => tracing::error!(target: "spdk", "{message}"),
        1 => tracing::warn!(target: "spdk", "{message}"),
        2 | 3 => tracing::info!(target: "spdk", "{message}"),
        _ => tracing::debug!(target: "spdk", "{message}"),
    }
}
