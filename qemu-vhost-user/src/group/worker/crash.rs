//! Crash points: places in syncvm where a test can make this host die, so that «during every phase» is not left to luck.
//!
//! Armed over the control socket and only with `debug_hooks = true`; otherwise one relaxed load per phase.

use std::str::FromStr;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use syncvm::exchange::Phase;

/// What to do at the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CrashAction {
    /// SIGKILL to this daemon.
    KillDaemon,
    /// SIGKILL to QEMU.
    KillQemu,
    /// SIGKILL to both: the host dies.
    KillBoth,
    /// SIGSTOP to this daemon.
    FreezeDaemon,
}

impl FromStr for CrashAction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "kill-daemon" => Ok(Self::KillDaemon),
            "kill-qemu" => Ok(Self::KillQemu),
            "kill-both" => Ok(Self::KillBoth),
            "freeze-daemon" => Ok(Self::FreezeDaemon),
            _ => Err(format!("{text:?} is no action; there are kill-daemon, kill-qemu, kill-both and freeze-daemon")),
        }
    }
}

/// The armed point of one group.
#[derive(Debug, Default)]
pub struct CrashPoints {
    /// 0: none; else the phase's number plus one.
    armed: AtomicU8,
    action: AtomicU8,
    qemu: AtomicI32,
}

impl CrashPoints {
    /// The next time syncvm reaches `phase` here, `action` happens, once.
    pub fn arm(&self, phase: Phase, action: CrashAction) {
        self.action.store(action as u8, Ordering::Relaxed);
        self.armed.store(phase as u8 + 1, Ordering::Release);
    }

    /// Which process is QEMU.
    pub fn set_qemu(&self, pid: i32) {
        self.qemu.store(pid, Ordering::Release);
    }

    /// syncvm is at `phase`.
    pub fn reached(&self, phase: Phase) {
        if self.armed.load(Ordering::Acquire) == phase as u8 + 1 {
            self.armed.store(0, Ordering::Release);
            self.strike();
        }
    }

    fn strike(&self) {
        let action = self.action.load(Ordering::Relaxed);
        let qemu = self.qemu.load(Ordering::Acquire);
        let kills_qemu = action == CrashAction::KillQemu as u8 || action == CrashAction::KillBoth as u8;
        if kills_qemu && qemu > 0 {
            // SAFETY: kill has no memory effects; the pid is that of the QEMU that this worker is attached to.
            unsafe { libc::kill(qemu, libc::SIGKILL) };
        }
        let signal = match action {
            a if a == CrashAction::KillQemu as u8 => return,
            a if a == CrashAction::FreezeDaemon as u8 => libc::SIGSTOP,
            _ => libc::SIGKILL,
        };
        // SAFETY: a signal to ourselves; nothing in memory is touched.
        unsafe { libc::kill(libc::getpid(), signal) };
    }
}
