//! Where and how the packet path's threads run, and what a reactor does while nothing happens.

use dataplane::idle::IdleStrategy;

use crate::config::{Idle, NodeConfig, Scheduling};

/// SCHED_RR priority of the packet path: above every normal thread, below the kernel's own.
const REALTIME_PRIORITY: i32 = 5;

/// Nice value of the guest worker, of the thread that answers QEMU, of QEMU's own threads that are no vCPUs, and of a
/// reactor that spins.
const FAVOURED_NICE: i32 = -10;

/// Cores that must be left over beside those of the reactors before `idle = "auto"` lets a reactor spin: one for the guest,
/// one for QEMU's other threads, one for the guest worker.
const SPARE_CORES: usize = 3;
/// How long `auto` polls after the last work where it sleeps; nothing on a machine whose cores the guest needs.
const AUTO_SPIN_US: u64 = 20;
/// A real-time reactor that has been busy for this long pauses: it may share its core with clients or the guest.
const BREATH_AFTER_US: u64 = 2_000;

/// Where a group's reactor runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its core; the kernel chooses when absent.
    pub core: Option<usize>,
    /// Another group's reactor has the same core.
    pub shared: bool,
    /// Cores that no reactor is pinned to.
    pub spare_cores: usize,
}

impl Place {
    /// The place of the group number `at` of `groups`, on a machine with `cores` cores.
    pub fn of(node: &NodeConfig, at: usize, groups: usize, cores: usize) -> Self {
        let core_of = |at: usize| node.reactor_cores.get(at % node.reactor_cores.len().max(1)).copied();
        let core = core_of(at);
        let shared = core.is_some() && (0..groups).any(|other| other != at && core_of(other) == core);
        let mut taken: Vec<usize> = (0..groups).filter_map(core_of).collect();
        taken.sort_unstable();
        taken.dedup();
        Self { core, shared, spare_cores: cores.saturating_sub(taken.len()) }
    }

    /// What the reactor does while nothing happens, and why that is not what the configuration asks for, if so.
    pub fn idle(self, node: &NodeConfig) -> (IdleStrategy, Option<&'static str>) {
        let own_core = self.core.is_some() && !self.shared;
        let realtime = node.scheduling == Scheduling::Realtime;
        let adaptive = |spin_us| IdleStrategy::Adaptive {
            spin_us,
            breath_after_us: if realtime { BREATH_AFTER_US } else { u64::MAX },
        };
        let auto_spin_us = if self.spare_cores >= SPARE_CORES { AUTO_SPIN_US } else { 0 };
        match node.idle {
            Idle::Adaptive => (adaptive(node.spin_us.unwrap_or(auto_spin_us)), None),
            Idle::Auto if own_core && self.spare_cores >= SPARE_CORES => (IdleStrategy::Spin { yields: false }, None),
            Idle::Auto => (adaptive(node.spin_us.unwrap_or(auto_spin_us)), None),
            Idle::Spin if own_core => (IdleStrategy::Spin { yields: false }, None),
            Idle::Spin if self.shared => (
                IdleStrategy::Spin { yields: true },
                Some("its core has several reactors, which take turns; name more reactor_cores or set idle = \"auto\""),
            ),
            Idle::Spin => (
                IdleStrategy::Spin { yields: true },
                Some("it has no core of its own, so it takes time from guests; set reactor_cores or idle = \"auto\""),
            ),
        }
    }
}

/// Pins the calling thread and puts it into its scheduling class; failing is said and survived, because a slower daemon
/// protects better than none. A thread that spins never gets the real-time class: the kernel stops such a thread for 50 ms in
/// every second so that others can run, which is a failure timeout's worth of silence.
pub fn apply(scheduling: Scheduling, core: Option<usize>, idle: IdleStrategy, what: &str) {
    if let Some(core) = core
        && !core_affinity::set_for_current(core_affinity::CoreId { id: core })
    {
        tracing::warn!(core, what, "cannot be pinned; does this core exist?");
    }
    if matches!(idle, IdleStrategy::Spin { .. }) {
        return favour(scheduling);
    }
    if scheduling == Scheduling::Realtime {
        let parameters = libc::sched_param { sched_priority: REALTIME_PRIORITY };
        // Not SCHED_RESET_ON_FORK: the kernel's workers that write the log for this thread are to inherit it, or each
        // commit waits until the scheduler takes the core from a vCPU. The daemon's own threads exist already.
        // SAFETY: 0 is the calling thread; the structure lives across the call and is only read.
        let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &parameters) };
        if result != 0 {
            let error = std::io::Error::last_os_error();
            tracing::warn!(%error, what, "no real-time scheduling; a busy host may delay heartbeats");
        }
    }
}

/// Lets the calling thread go before vCPUs where cores are few, without keeping anybody out: for the guest worker, which
/// computes for milliseconds at a time and would delay heartbeats as a real-time thread, for the thread that answers QEMU,
/// and for reactors that spin.
pub fn favour(scheduling: Scheduling) {
    if scheduling == Scheduling::Realtime
        && let Err(error) = favour_thread(0)
    {
        tracing::warn!(%error, "a thread of the packet path keeps the default priority");
    }
}

/// As [`favour`], for the threads of the QEMU with this process id that are no vCPUs: they stop, save and resume the guest, and
/// on a core that they share with a busy vCPU each of these steps would wait for the end of its time slice.
pub fn favour_qemu(scheduling: Scheduling, pid: i32) {
    if scheduling != Scheduling::Realtime {
        return;
    }
    let tasks = match std::fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(tasks) => tasks,
        Err(error) => return tracing::warn!(%error, pid, "QEMU's threads keep the default priority"),
    };
    for task in tasks.flatten() {
        let tid = task.file_name().to_str().and_then(|name| name.parse().ok());
        // As QEMU names them: «CPU 0/KVM», «ALL CPUs/TCG».
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if let Some(tid) = tid
            && !name.contains("CPU")
            && let Err(error) = favour_thread(tid)
        {
            tracing::debug!(%error, tid, name = name.trim(), "a thread of QEMU keeps its priority");
        }
    }
}

fn favour_thread(tid: libc::id_t) -> std::io::Result<()> {
    // SAFETY: setpriority has no memory effects.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, tid, FAVOURED_NICE) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(text: &str) -> NodeConfig {
        toml::from_str(&format!("name = \"a\"\nlisten = \"127.0.0.1:7400\"\n{text}")).unwrap()
    }

    fn idle(text: &str, at: usize, groups: usize, cores: usize) -> (String, bool) {
        let node = node(text);
        let (strategy, warning) = Place::of(&node, at, groups, cores).idle(&node);
        (strategy.to_string(), warning.is_some())
    }

    #[test]
    fn auto_spins_only_where_that_takes_nothing_from_anybody() {
        assert_eq!(idle("", 0, 1, 64), ("adaptive, spin 20 us".into(), false), "no core of its own");
        assert_eq!(idle("reactor_cores = [1]", 0, 1, 4), ("spin".into(), false));
        assert_eq!(idle("reactor_cores = [1]", 0, 1, 3), ("adaptive, spin 0 us".into(), false), "the guest needs them");
        assert_eq!(idle("reactor_cores = [1]", 1, 2, 64), ("adaptive, spin 20 us".into(), false), "shared");
        assert_eq!(idle("reactor_cores = [1, 2]", 2, 3, 64), ("adaptive, spin 20 us".into(), false), "shared");
        assert_eq!(idle("reactor_cores = [1, 2]", 1, 3, 64), ("spin".into(), false));
        assert_eq!(idle("reactor_cores = [1, 1]", 1, 2, 64), ("adaptive, spin 20 us".into(), false), "named twice");
    }

    #[test]
    fn an_explicit_choice_holds_and_is_warned_of() {
        let spin = "idle = \"spin\"\nreactor_cores = [1]";
        assert_eq!(idle(spin, 0, 1, 2), ("spin".into(), false));
        assert_eq!(idle(spin, 0, 2, 2), ("spin (shared core)".into(), true));
        assert_eq!(idle("idle = \"spin\"", 0, 1, 2), ("spin (shared core)".into(), true));
        let adaptive = "idle = \"adaptive\"\nspin_us = 77\nreactor_cores = [1]";
        assert_eq!(idle(adaptive, 0, 1, 64), ("adaptive, spin 77 us".into(), false));
    }

    /// A process whose only thread has this name, as QEMU's threads have theirs; its nice value after it was favoured.
    fn nice_of(thread: &str, scheduling: Scheduling) -> i32 {
        use std::io::{BufRead, BufReader};
        use std::process::{Command, Stdio};
        let script = format!("printf '{thread}' > /proc/$$/comm; echo ready; read end");
        let mut command = Command::new("sh");
        let mut child = command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        favour_qemu(scheduling, child.id() as i32);
        // SAFETY: getpriority has no memory effects.
        let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, child.id()) };
        child.kill().unwrap();
        child.wait().unwrap();
        nice
    }

    #[test]
    fn of_qemus_threads_only_vcpus_are_not_favoured() {
        // SAFETY: geteuid and getpriority have no memory effects.
        let (root, usual) = unsafe { (libc::geteuid() == 0, libc::getpriority(libc::PRIO_PROCESS, 0)) };
        let favoured = if root { FAVOURED_NICE } else { usual };
        assert_eq!(nice_of("IO mon_iothread", Scheduling::Realtime), favoured);
        assert_eq!(nice_of("qemu-system-x86", Scheduling::Normal), usual);
        assert_eq!(nice_of("CPU 0/TCG", Scheduling::Realtime), usual);
        assert_eq!(nice_of("ALL CPUs/TCG", Scheduling::Realtime), usual);
    }
}
