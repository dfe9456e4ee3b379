//! QEMU's own functions, found by name in the executable. Distribution builds have modules on and so export them.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::protocol::Status;

/// `YANK_INSTANCE_TYPE_MIGRATION`, the third value of QEMU's qapi/yank.json since 6.0.
const YANK_INSTANCE_TYPE_MIGRATION: c_int = 2;

/// QEMU's `YankInstance`: a type and a union of structs of one string each, which migration does not use.
#[repr(C)]
struct YankInstance {
    kind: c_int,
    name: *const c_char,
}

type YankRegisterInstance = unsafe extern "C" fn(*const YankInstance, *mut *mut c_void) -> bool;
type ErrorFree = unsafe extern "C" fn(*mut c_void);

/// What this process exports.
#[derive(Clone, Copy)]
pub(crate) struct QemuSymbols {
    yank_register_instance: Option<YankRegisterInstance>,
    error_free: Option<ErrorFree>,
}

fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: `name` is a C string, RTLD_DEFAULT needs no handle.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

impl QemuSymbols {
    pub(crate) fn find() -> QemuSymbols {
        // SAFETY: a symbol of this name is QEMU's function of this signature (util/yank.c, since 6.0).
        let yank_register_instance = symbol(c"yank_register_instance")
            .map(|address| unsafe { std::mem::transmute::<*mut c_void, YankRegisterInstance>(address) });
        // SAFETY: as above (util/error.c).
        let error_free =
            symbol(c"error_free").map(|address| unsafe { std::mem::transmute::<*mut c_void, ErrorFree>(address) });
        QemuSymbols { yank_register_instance, error_free }
    }

    pub(crate) fn has_yank(&self) -> bool {
        self.yank_register_instance.is_some()
    }

    /// Registers the migration yank instance, which `xen-load-devices-state` unregisters (and aborts without).
    pub(crate) fn register_migration_yank(&self) -> Status {
        let Some(register) = self.yank_register_instance else {
            return Status::Unsupported;
        };
        let instance = YankInstance { kind: YANK_INSTANCE_TYPE_MIGRATION, name: std::ptr::null() };
        let mut error: *mut c_void = std::ptr::null_mut();
        // SAFETY: QEMU reads the instance (it copies it) and writes an Error it allocated; it takes its own lock, so any
        // thread may call this.
        let registered = unsafe { register(&raw const instance, &raw mut error) };
        if let (false, Some(free)) = (error.is_null(), self.error_free) {
            // SAFETY: `error` came from QEMU and is freed once.
            unsafe { free(error) };
        }
        // It fails for one reason only: the instance is there already.
        if registered { Status::Done } else { Status::Already }
    }
}
