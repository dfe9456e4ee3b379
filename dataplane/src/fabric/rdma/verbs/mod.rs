//! rdma-core in safe Rust, as far as a lane needs it. All unsafe calls of the RDMA lane are here, and in [`arena`](super::arena)
//! those on mapped memory.
//!
//! What belongs to a connection is owned by one [`Link`] and destroyed in the one order that is right: queue pair,
//! completion queue, registrations, protection domain, identifier; memory is unmapped last. Nothing here blocks.

mod id;
mod link;
mod memory;

pub use id::{CmEvent, Id, MAX_PRIVATE_BYTES};
pub use link::{Depths, Link, Write, status_text};
pub use memory::Memory;

use std::ffi::{CStr, c_char, c_int};
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};

use rdma_sys::Rdma;

/// Why a call failed, and the remedy.
#[derive(Debug, Clone, thiserror::Error)]
pub enum VerbsError {
    /// rdma-core is not installed.
    #[error(
        "cannot load rdma-core ({0}): install librdmacm1, libibverbs1 and ibverbs-providers, or choose another transport"
    )]
    NoLibrary(String),
    /// The machine has no RDMA device at this address.
    #[error(
        "no RDMA device has the address {address} ({source}): «rdma link» lists the devices; the address must be that of its \
         network interface"
    )]
    NoDevice {
        /// The address.
        address: IpAddr,
        /// What the system says.
        source: Arc<io::Error>,
    },
    /// Locked memory is limited.
    #[error(
        "cannot lock {bytes} bytes for the RDMA rings ({source}): raise the limit (LimitMEMLOCK= of the service, ulimit -l)"
    )]
    Memory {
        /// How much.
        bytes: usize,
        /// What the system says.
        source: Arc<io::Error>,
    },
    /// Another call.
    #[error("{call}: {source}")]
    Call {
        /// Its name in C.
        call: &'static str,
        /// What the system says.
        source: Arc<io::Error>,
    },
}

fn failed(call: &'static str) -> VerbsError {
    VerbsError::Call { call, source: Arc::new(io::Error::last_os_error()) }
}

/// For calls that return 0 or -1 with errno.
fn check(call: &'static str, result: c_int) -> Result<(), VerbsError> {
    if result == 0 { Ok(()) } else { Err(failed(call)) }
}

/// For calls that return 0 or the error number.
fn check_number(call: &'static str, number: c_int) -> Result<(), VerbsError> {
    match number {
        0 => Ok(()),
        _ => Err(VerbsError::Call { call, source: Arc::new(io::Error::from_raw_os_error(number.abs())) }),
    }
}

/// rdma-core, loaded once.
///
/// # Errors
/// [`VerbsError::NoLibrary`].
pub fn library() -> Result<&'static Rdma, VerbsError> {
    static LOADED: OnceLock<Result<Rdma, String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| Rdma::load().map_err(|error| error.to_string()));
    loaded.as_ref().map_err(|text| VerbsError::NoLibrary(text.clone()))
}

/// A text of the library's.
fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return "unknown".to_owned();
    }
    // SAFETY: not null, and the library returns NUL-terminated constants.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> Result<(), VerbsError> {
    let set =
        rustix::fs::fcntl_getfl(fd).and_then(|flags| rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK));
    set.map_err(|error| VerbsError::Call { call: "fcntl", source: Arc::new(error.into()) })
}
