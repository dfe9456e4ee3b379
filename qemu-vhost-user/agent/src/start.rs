//! What happens when the library is loaded.
//!
//! A preloaded library also ends up in every wrapper that execs QEMU (sh, ip netns exec, systemd-run). There it must do
//! nothing and leave the environment alone, or QEMU would start without it. Linked into the daemon (which uses the
//! protocol types) it stays dormant for the same reason.

use std::ffi::{CStr, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use crate::protocol::SOCKET_VARIABLE;
use crate::qemu::QemuSymbols;
use crate::server::Server;

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

extern "C" fn constructor() {
    let Some(path) = std::env::var_os(SOCKET_VARIABLE) else {
        return;
    };
    if !QemuSymbols::find().has_yank() && !is_named_like_qemu() {
        return;
    }
    forget_preload();
    if let Err(error) = Server::bind(Path::new(&path)).and_then(Server::start) {
        // Standard output belongs to QEMU's user (-serial stdio); the daemon reports a missing agent itself.
        eprintln!("plover-agent: cannot serve on {}: {error}", Path::new(&path).display());
    }
}

/// A QEMU built without modules does not export its symbols; it is served too, so that hello can say so.
fn is_named_like_qemu() -> bool {
    std::fs::read_link("/proc/self/exe")
        .is_ok_and(|exe| exe.file_name().is_some_and(|name| name.as_bytes().starts_with(b"qemu-system-")))
}

/// Takes this library out of the environment, so that QEMU's children (scripts, helpers) do not load it.
fn forget_preload() {
    if let (Some(list), Some(own)) = (std::env::var_os("LD_PRELOAD"), own_path()) {
        let rest = without_library(&list, &own);
        // SAFETY: constructors run before main, while the process has one thread.
        unsafe {
            if rest.is_empty() {
                std::env::remove_var("LD_PRELOAD");
            } else {
                std::env::set_var("LD_PRELOAD", rest);
            }
        }
    }
    // SAFETY: as above.
    unsafe { std::env::remove_var(SOCKET_VARIABLE) };
}

/// The path under which the dynamic linker loaded this library: as written in LD_PRELOAD.
fn own_path() -> Option<OsString> {
    let mut found = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: the address is in this library and `found` is valid for writing.
    if unsafe { libc::dladdr(constructor as *const libc::c_void, found.as_mut_ptr()) } == 0 {
        return None;
    }
    // SAFETY: zeroed first and then filled in: plain data either way.
    let name = unsafe { found.assume_init() }.dli_fname;
    if name.is_null() {
        return None;
    }
    // SAFETY: dladdr gives a C string that lives as long as the library is loaded.
    Some(OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes()).to_owned())
}

/// LD_PRELOAD's entries are separated by colons or blanks.
fn without_library(list: &OsStr, own: &OsStr) -> OsString {
    let others: Vec<&[u8]> = list
        .as_bytes()
        .split(|byte| matches!(byte, b':' | b' '))
        .filter(|entry| !entry.is_empty() && *entry != own.as_bytes())
        .collect();
    OsString::from_vec(others.join(&b':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_library_leaves_the_preload_list() {
        let without = |list: &str| without_library(OsStr::new(list), OsStr::new("/lib/libplover_agent.so"));
        assert_eq!(without("/lib/libplover_agent.so"), "");
        assert_eq!(without("/a.so:/lib/libplover_agent.so /b.so"), "/a.so:/b.so");
        assert_eq!(without("/x/libplover_agent.so"), "/x/libplover_agent.so");
    }
}
