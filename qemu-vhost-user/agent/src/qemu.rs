//! QEMU's own functions, found by name in the executable. Distribution builds have modules on and so export them.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::protocol::{Status, WrittenRange};

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
type MemoryRegionFromHost = unsafe extern "C" fn(*mut c_void, *mut u64) -> *mut c_void;
type MemoryRegionRef = unsafe extern "C" fn(*mut c_void);
type CpuPhysicalMemoryUnmap = unsafe extern "C" fn(*mut c_void, u64, bool, u64);
type RcuRegisterThread = unsafe extern "C" fn();

/// How a device of QEMU's ends a direct access to the guest's RAM.
#[derive(Clone, Copy)]
struct DirectAccess {
    region_of: MemoryRegionFromHost,
    hold: MemoryRegionRef,
    end: CpuPhysicalMemoryUnmap,
    register_thread: RcuRegisterThread,
}

/// What this process exports.
#[derive(Clone, Copy)]
pub(crate) struct QemuSymbols {
    yank_register_instance: Option<YankRegisterInstance>,
    error_free: Option<ErrorFree>,
    direct_access: Option<DirectAccess>,
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
        QemuSymbols { yank_register_instance, error_free, direct_access: DirectAccess::find() }
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

    /// Must be called by each thread that calls [`Self::tell_written`], once before.
    pub(crate) fn register_thread(&self) {
        if let Some(access) = self.direct_access {
            // SAFETY: QEMU's RCU takes any thread that is not registered yet; ours lives as long as the process.
            unsafe { (access.register_thread)() };
        }
    }

    /// Tells QEMU what a device would tell it that wrote there directly: whatever was derived from the old content, as TCG's
    /// translations of code, is forgotten. The guest stands still. [`Status::Unsupported`] if QEMU does not export what that needs, or if a range is not
    /// in one block of RAM.
    pub(crate) fn tell_written(&self, ranges: impl Iterator<Item = WrittenRange>) -> Status {
        let Some(access) = self.direct_access else { return Status::Unsupported };
        for range in ranges {
            if !access.tell_written(range) {
                return Status::Unsupported;
            }
        }
        Status::Done
    }
}

impl DirectAccess {
    fn find() -> Option<DirectAccess> {
        let [region_of, hold, end, register_thread] =
            [c"memory_region_from_host", c"memory_region_ref", c"cpu_physical_memory_unmap", c"rcu_register_thread"]
                .map(symbol);
        // SAFETY: symbols of these names are QEMU's functions of these signatures (include/exec/memory.h, cpu-common.h and
        // qemu/rcu.h; the same since 5.0, and older QEMUs are refused).
        unsafe {
            Some(DirectAccess {
                region_of: std::mem::transmute::<*mut c_void, MemoryRegionFromHost>(region_of?),
                hold: std::mem::transmute::<*mut c_void, MemoryRegionRef>(hold?),
                end: std::mem::transmute::<*mut c_void, CpuPhysicalMemoryUnmap>(end?),
                register_thread: std::mem::transmute::<*mut c_void, RcuRegisterThread>(register_thread?),
            })
        }
    }

    fn tell_written(&self, range: WrittenRange) -> bool {
        let Some(last) = range.bytes.checked_sub(1).and_then(|rest| range.address.checked_add(rest)) else {
            return false;
        };
        let region_at = |address: u64| {
            let mut offset = 0;
            // SAFETY: QEMU looks the address up among its RAM blocks, under its own RCU lock, and touches nothing there.
            let region = unsafe { (self.region_of)(address as *mut c_void, &raw mut offset) };
            (!region.is_null()).then_some((region, offset))
        };
        let (Some((region, first_at)), Some((other, last_at))) = (region_at(range.address), region_at(last)) else {
            return false;
        };
        if region != other || last_at.wrapping_sub(first_at) != last.wrapping_sub(range.address) {
            return false;
        }
        // SAFETY: the range lies in one block of RAM. `unmap` gives back the reference that `hold` takes, as if this were the
        // end of a mapping for writing; QEMU allows both in threads other than its own (I/O threads do it).
        unsafe {
            (self.hold)(region);
            (self.end)(range.address as *mut c_void, range.bytes, true, range.bytes);
        }
        true
    }
}
