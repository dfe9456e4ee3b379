//! Stopping, saving, loading and resuming the guest with the functions that QEMU's monitor calls for that, and where it
//! calls them.
//!
//! Both guests of a group stand still while this is done, and the monitor is slow: it reads a command byte by byte,
//! with six system calls for each. Here a command is one message. It runs as the monitor's commands do (`qmp_dispatch`
//! in qapi/qmp-dispatch.c): in a bottom half of the I/O handlers' context, that is in QEMU's main thread with its lock
//! held, and never amid another command or a drain. So it is as safe as they are.
//!
//! One command at a time, because QEMU runs bottom halves that wait together in any order: the agent's thread takes the
//! next message when the last command is done. A main loop that is stuck keeps the agent waiting, as it does the
//! monitor.

use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::mpsc::{SyncSender, sync_channel};

use crate::qemu::{Yank, symbol};

type BottomHalf = unsafe extern "C" fn(*mut c_void);
type Schedule = unsafe extern "C" fn(*mut c_void, BottomHalf, *mut c_void, *const c_char);
type Context = unsafe extern "C" fn() -> *mut c_void;
type Simple = unsafe extern "C" fn(*mut *mut c_void);
type Save = unsafe extern "C" fn(*const c_char, bool, bool, *mut *mut c_void);
type Load = unsafe extern "C" fn(*const c_char, *mut *mut c_void);
type ErrorText = unsafe extern "C" fn(*mut c_void) -> *const c_char;
type ErrorFree = unsafe extern "C" fn(*mut c_void);

/// QEMU's functions.
#[derive(Clone, Copy)]
pub(crate) struct Control {
    schedule: Schedule,
    context: Context,
    stop: Simple,
    cont: Simple,
    save: Save,
    load: Load,
    error_text: ErrorText,
    error_free: ErrorFree,
    yank: Yank,
}

/// What is to be done.
#[derive(Debug)]
pub(crate) enum Command {
    /// `stop`.
    Stop,
    /// `cont`.
    Cont,
    /// `xen-save-devices-state` to this file, without handing disks over (`live` is false).
    Save(CString),
    /// `xen-load-devices-state` from this file, after the migration yank instance was registered, without which it aborts.
    Load(CString),
}

/// How a command ended: a refusal has QEMU's reason.
pub(crate) type Outcome = Result<(), String>;

/// A command on its way to QEMU's main thread.
struct Job {
    control: Control,
    command: Command,
    done: Box<dyn FnOnce(Outcome) + Send>,
    /// Dropped with the job: that wakes the agent's thread.
    _finished: SyncSender<()>,
}

impl Control {
    /// None if this process does not export all of it.
    pub(crate) fn find(yank: Yank) -> Option<Control> {
        let [schedule, context, stop, cont, save, load, error_text, error_free] = [
            c"aio_bh_schedule_oneshot_full",
            c"iohandler_get_aio_context",
            c"qmp_stop",
            c"qmp_cont",
            c"qmp_xen_save_devices_state",
            c"qmp_xen_load_devices_state",
            c"error_get_pretty",
            c"error_free",
        ]
        .map(symbol);
        // SAFETY: symbols of these names are QEMU's functions of these signatures (include/block/aio.h, qapi/error.h,
        // qapi/misc.json and qapi/migration.json) since 6.2. No older QEMU has the first, and without it none is used.
        unsafe {
            Some(Control {
                schedule: std::mem::transmute::<*mut c_void, Schedule>(schedule?),
                context: std::mem::transmute::<*mut c_void, Context>(context?),
                stop: std::mem::transmute::<*mut c_void, Simple>(stop?),
                cont: std::mem::transmute::<*mut c_void, Simple>(cont?),
                save: std::mem::transmute::<*mut c_void, Save>(save?),
                load: std::mem::transmute::<*mut c_void, Load>(load?),
                error_text: std::mem::transmute::<*mut c_void, ErrorText>(error_text?),
                error_free: std::mem::transmute::<*mut c_void, ErrorFree>(error_free?),
                yank,
            })
        }
    }

    /// Carries out a command in QEMU's main thread, which also calls `done`, and returns after that.
    pub(crate) fn run(&self, command: Command, done: impl FnOnce(Outcome) + Send + 'static) {
        let (sender, finished) = sync_channel(1);
        let job = Box::new(Job { control: *self, command, done: Box::new(done), _finished: sender });
        // SAFETY: QEMU makes that context before its monitors, of which the daemon needs one before it comes here, and
        // takes bottom halves from any thread. It calls `run_job` once with the job, which then owns it.
        unsafe { (self.schedule)((self.context)(), run_job, Box::into_raw(job).cast(), c"plover".as_ptr()) };
        // An error is what is waited for: the job is gone.
        let _ = finished.recv();
    }

    /// In QEMU's main thread, under its lock.
    fn carry_out(&self, command: &Command) -> Outcome {
        let mut error: *mut c_void = std::ptr::null_mut();
        // SAFETY: called where QEMU's monitor calls them; paths are C strings that live across the call, and QEMU
        // writes an Error that it allocated, or nothing.
        unsafe {
            match command {
                Command::Stop => (self.stop)(&raw mut error),
                Command::Cont => (self.cont)(&raw mut error),
                Command::Save(path) => (self.save)(path.as_ptr(), true, false, &raw mut error),
                Command::Load(path) => {
                    self.yank.register();
                    (self.load)(path.as_ptr(), &raw mut error);
                }
            }
        }
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: `error` is QEMU's, its text is a C string that lives as long as it, and it is freed once, after the
        // text was copied.
        unsafe {
            let text = CStr::from_ptr((self.error_text)(error)).to_string_lossy().into_owned();
            (self.error_free)(error);
            Err(text)
        }
    }
}

/// The bottom half.
unsafe extern "C" fn run_job(job: *mut c_void) {
    // SAFETY: `Control::run` made it of a box and passed it to QEMU, which calls this once.
    let job = unsafe { Box::from_raw(job.cast::<Job>()) };
    let outcome = job.control.carry_out(&job.command);
    (job.done)(outcome);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::channel;

    static STOPS: AtomicU32 = AtomicU32::new(0);
    static YANKS: AtomicU32 = AtomicU32::new(0);

    /// As QEMU's main loop: another thread runs it, a little later.
    unsafe extern "C" fn schedule(_: *mut c_void, run: BottomHalf, job: *mut c_void, _: *const c_char) {
        let job = job as usize;
        let later = move || {
            std::thread::sleep(std::time::Duration::from_millis(1));
            // SAFETY: as QEMU does, once.
            unsafe { run(job as *mut c_void) };
        };
        std::thread::spawn(later);
    }
    unsafe extern "C" fn context() -> *mut c_void {
        std::ptr::null_mut()
    }
    unsafe extern "C" fn stop(_: *mut *mut c_void) {
        STOPS.fetch_add(1, Ordering::SeqCst);
    }
    unsafe extern "C" fn cont(error: *mut *mut c_void) {
        // SAFETY: the caller's, valid for writing.
        unsafe { *error = c"no more guest".as_ptr().cast_mut().cast() };
    }
    unsafe extern "C" fn save(path: *const c_char, has_live: bool, live: bool, error: *mut *mut c_void) {
        // SAFETY: as above, and the path is a C string.
        unsafe {
            assert_eq!((CStr::from_ptr(path), has_live, live), (c"/a/file", true, false));
            assert!((*error).is_null());
        }
    }
    unsafe extern "C" fn load(path: *const c_char, error: *mut *mut c_void) {
        // SAFETY: the path outlives this; an error's text is the error itself here.
        unsafe { *error = path.cast_mut().cast() };
    }
    unsafe extern "C" fn register_yank(_: *const c_void, _: *mut *mut c_void) -> bool {
        YANKS.fetch_add(1, Ordering::SeqCst) == 0
    }
    unsafe extern "C" fn error_text(error: *mut c_void) -> *const c_char {
        error.cast()
    }
    unsafe extern "C" fn error_free(_: *mut c_void) {}

    #[test]
    fn a_command_runs_in_the_main_thread_and_its_end_is_waited_for() {
        let control = Control {
            schedule,
            context,
            stop,
            cont,
            save,
            load,
            error_text,
            error_free,
            yank: Yank::for_tests(register_yank),
        };
        let run = |command: Command| {
            let (sender, outcome) = channel();
            control.run(command, move |outcome| {
                assert!(sender.send((outcome, std::thread::current().id())).is_ok());
            });
            let (outcome, thread) =
                outcome.try_recv().unwrap_or((Err("it is not done".into()), std::thread::current().id()));
            assert_ne!(thread, std::thread::current().id());
            outcome
        };
        assert_eq!(run(Command::Stop), Ok(()));
        assert_eq!(STOPS.load(Ordering::SeqCst), 1);
        assert_eq!(run(Command::Save(c"/a/file".into())), Ok(()));
        assert_eq!(run(Command::Cont), Err("no more guest".into()));
        assert_eq!(YANKS.load(Ordering::SeqCst), 0);
        assert_eq!(run(Command::Load(c"/another".into())), Err("/another".into()));
        assert_eq!(YANKS.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_process_that_is_no_qemu_has_no_control() {
        assert!(Control::find(Yank::for_tests(register_yank)).is_none());
    }
}
