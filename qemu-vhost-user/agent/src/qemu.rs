//! QEMU's own functions, found by name in the executable. Distribution builds have modules on and so export them.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::control::Control;
use crate::protocol::{Status, VcpuChange, VcpuCommon, WrittenRange};

/// `YANK_INSTANCE_TYPE_MIGRATION`, the third value of QEMU's qapi/yank.json since 6.0.
const YANK_INSTANCE_TYPE_MIGRATION: c_int = 2;

/// QEMU's `YankInstance`: a type and a union of structs of one string each, which migration does not use.
#[repr(C)]
struct YankInstance {
    kind: c_int,
    name: *const c_char,
}

type YankRegisterInstance = unsafe extern "C" fn(*const c_void, *mut *mut c_void) -> bool;
type ErrorFree = unsafe extern "C" fn(*mut c_void);
type MemoryRegionFromHost = unsafe extern "C" fn(*mut c_void, *mut u64) -> *mut c_void;
type MemoryRegionRef = unsafe extern "C" fn(*mut c_void);
type CpuPhysicalMemoryUnmap = unsafe extern "C" fn(*mut c_void, u64, bool, u64);
type RcuRegisterThread = unsafe extern "C" fn();
type QemuGetCpu = unsafe extern "C" fn(c_int) -> *mut c_void;

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
    yank: Option<Yank>,
    direct_access: Option<DirectAccess>,
    vcpus: Option<Vcpus>,
    /// Of the whole guest.
    pub(crate) control: Option<Control>,
}

/// An address that this process exports.
pub(crate) fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: `name` is a C string, RTLD_DEFAULT needs no handle.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

impl QemuSymbols {
    pub(crate) fn find() -> QemuSymbols {
        let yank = Yank::find();
        QemuSymbols {
            yank,
            direct_access: DirectAccess::find(),
            vcpus: Vcpus::find(),
            control: yank.and_then(Control::find),
        }
    }

    pub(crate) fn has_yank(&self) -> bool {
        self.yank.is_some()
    }

    /// Registers the migration yank instance, which `xen-load-devices-state` unregisters (and aborts without).
    pub(crate) fn register_migration_yank(&self) -> Status {
        match self.yank {
            None => Status::Unsupported,
            Some(yank) if yank.register() => Status::Done,
            Some(_) => Status::Already,
        }
    }

    /// Gives vCPUs of the stopped guest another common state, as a load would do that then forgets all translations.
    /// [`Status::Unsupported`] if this QEMU does not say where it is, or if one is not as expected; then nothing is changed.
    pub(crate) fn change_vcpus(&self, changes: impl Iterator<Item = VcpuChange> + Clone) -> Status {
        match self.vcpus {
            Some(vcpus) if vcpus.change(changes) => Status::Done,
            _ => Status::Unsupported,
        }
    }

    /// Must be called by each thread that calls [`Self::tell_written`], once before.
    pub(crate) fn register_thread(&self) {
        if let Some(access) = self.direct_access {
            // SAFETY: QEMU's RCU takes any thread that is not registered yet; ours lives as long as the process.
            unsafe { (access.register_thread)() };
        }
    }

    /// Tells QEMU what a device would tell it that wrote there directly: whatever was derived from the old content, as TCG's
    /// translations of code, is forgotten. The guest stands still. [`Status::Unsupported`] if QEMU does not export what
    /// that needs, or if a range is not in one block of RAM.
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

/// QEMU's register of who can be interrupted.
#[derive(Clone, Copy)]
pub(crate) struct Yank {
    register: YankRegisterInstance,
    error_free: Option<ErrorFree>,
}

impl Yank {
    fn find() -> Option<Yank> {
        // SAFETY: symbols of these names are QEMU's functions of these signatures (util/yank.c, since 6.0; util/error.c).
        unsafe {
            Some(Yank {
                register: std::mem::transmute::<*mut c_void, YankRegisterInstance>(symbol(c"yank_register_instance")?),
                error_free: symbol(c"error_free").map(|free| std::mem::transmute::<*mut c_void, ErrorFree>(free)),
            })
        }
    }

    /// Registers the migration instance. False if it is registered already, which is as good.
    pub(crate) fn register(&self) -> bool {
        let instance = YankInstance { kind: YANK_INSTANCE_TYPE_MIGRATION, name: std::ptr::null() };
        let mut error: *mut c_void = std::ptr::null_mut();
        // SAFETY: QEMU reads the instance (it copies it) and writes an Error it allocated; it takes its own lock, so any
        // thread may call this.
        let registered = unsafe { (self.register)((&raw const instance).cast(), &raw mut error) };
        if let (false, Some(free)) = (error.is_null(), self.error_free) {
            // SAFETY: `error` came from QEMU and is freed once.
            unsafe { free(error) };
        }
        registered
    }

    #[cfg(test)]
    pub(crate) fn for_tests(register: YankRegisterInstance) -> Yank {
        Yank { register, error_free: None }
    }
}

/// QEMU's vCPUs, and where in them their common state is.
#[derive(Clone, Copy)]
struct Vcpus {
    by_index: QemuGetCpu,
    halted_at: usize,
    interrupts_at: usize,
}

/// The beginning of QEMU's `VMStateDescription` (include/migration/vmstate.h).
#[repr(C)]
struct StateDescription {
    name: *const c_char,
    versions: [usize; 2],
    callbacks: [usize; 6],
    fields: *const StateField,
}

/// QEMU's `VMStateField`.
#[repr(C)]
struct StateField {
    name: *const c_char,
    err_hint: *const c_char,
    offset: usize,
    bytes: usize,
    rest: [usize; 9],
}

impl Vcpus {
    /// QEMU itself says where what it saves is. Nothing is taken for granted of how it says that: an address is followed only
    /// inside QEMU's own program, and the names must be right.
    fn find() -> Option<Vcpus> {
        let (by_index, description) = (symbol(c"qemu_get_cpu")?, symbol(c"vmstate_cpu_common")?);
        let program = program_of(description)?;
        let is_ours = |address: *const c_void| program_of(address) == Some(program);
        let is_named = |name: *const c_char, expected: &CStr| {
            // SAFETY: an address inside the program, of which no segment ends within a few bytes of a name.
            is_ours(name.cast()) && unsafe { CStr::from_ptr(name) } == expected
        };
        // SAFETY: a symbol of this name is a description (since 2.8), which is larger than what is read of it here.
        let description = unsafe { &*description.cast::<StateDescription>() };
        let (fields, end) = (description.fields, description.fields.wrapping_add(2));
        if !is_named(description.name, c"cpu_common")
            || !fields.is_aligned()
            || !is_ours(fields.cast())
            || !is_ours(end.cast())
        {
            return None;
        }
        // SAFETY: aligned and inside the program, all of it.
        let [halted, interrupts] = unsafe { &*fields.cast::<[StateField; 2]>() };
        let words = halted.bytes == size_of::<u32>() && interrupts.bytes == size_of::<u32>();
        let known = is_named(halted.name, c"halted") && is_named(interrupts.name, c"interrupt_request");
        (words && known).then_some(Vcpus {
            // SAFETY: a symbol of this name is QEMU's function of this signature (include/hw/core/cpu.h).
            by_index: unsafe { std::mem::transmute::<*mut c_void, QemuGetCpu>(by_index) },
            halted_at: halted.offset,
            interrupts_at: interrupts.offset,
        })
    }

    fn words_of(&self, change: VcpuChange) -> Option<(&AtomicU32, &AtomicU32)> {
        // SAFETY: QEMU looks a vCPU up in its list, which does not change while the guest stands still.
        let vcpu = unsafe { (self.by_index)(c_int::from(change.index)) };
        let word = |at: usize| {
            let word = vcpu.cast::<u8>().wrapping_add(at).cast::<u32>();
            // SAFETY: QEMU says that a vCPU has a word there, and vCPUs live as long as QEMU. While the guest stands still nothing
            // else writes it, and QEMU accesses it atomically as well.
            word.is_aligned().then(|| unsafe { AtomicU32::from_ptr(word) })
        };
        if vcpu.is_null() { None } else { Some((word(self.halted_at)?, word(self.interrupts_at)?)) }
    }

    /// All or nothing.
    fn change(&self, changes: impl Iterator<Item = VcpuChange> + Clone) -> bool {
        let is = |(halted, interrupts): (&AtomicU32, &AtomicU32), expected: VcpuCommon| {
            halted.load(Ordering::SeqCst) == u32::from(expected.halted)
                && interrupts.load(Ordering::SeqCst) == expected.interrupts
        };
        if !changes.clone().all(|change| self.words_of(change).is_some_and(|words| is(words, change.was))) {
            return false;
        }
        for change in changes {
            if let Some((halted, interrupts)) = self.words_of(change) {
                halted.store(u32::from(change.becomes.halted), Ordering::SeqCst);
                interrupts.store(change.becomes.interrupts, Ordering::SeqCst);
            }
        }
        true
    }
}

/// Where the program or library begins that has this address.
fn program_of(address: *const c_void) -> Option<*mut c_void> {
    let mut found = std::mem::MaybeUninit::<libc::Dl_info>::zeroed();
    // SAFETY: any address may be asked for, and `found` is valid for writing.
    if unsafe { libc::dladdr(address, found.as_mut_ptr()) } == 0 {
        return None;
    }
    // SAFETY: zeroed first and then filled in: plain data either way.
    Some(unsafe { found.assume_init() }.dli_fbase)
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
