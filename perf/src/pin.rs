//! Threads on fixed CPUs.
//!
//! Two threads that wake each other take several times as long on two CPUs as on one, and the scheduler moves
//! them as it likes: unpinned, a ratio of two such pairs says where they happened to run.

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Two CPUs that the calling thread may use: the first two, or the same twice if there is only one.
///
/// # Errors
/// The kernel does not tell.
pub fn two_cpus() -> Result<[usize; 2]> {
    let allowed = sched_getaffinity(None).context("cannot read the CPU affinity")?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu));
    let first = cpus.next().context("no CPU is allowed")?;
    Ok([first, cpus.next().unwrap_or(first)])
}

/// Puts the calling thread on `cpu`.
///
/// # Errors
/// The kernel refuses, as it does if the CPU is not allowed.
pub fn pin(cpu: usize) -> Result<()> {
    ensure!(cpu < CpuSet::MAX_CPU, "there is no CPU {cpu}");
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).with_context(|| format!("cannot use CPU {cpu} alone"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_has_one_cpu() {
        let [_, second] = two_cpus().unwrap();
        std::thread::spawn(move || {
            pin(second).unwrap();
            assert_eq!(two_cpus().unwrap(), [second, second]);
        })
        .join()
        .unwrap();
        assert!(pin(CpuSet::MAX_CPU).is_err());
    }
}
