//! A guest under one policy, on hosts and cores as the demo has them.
//!
//! One policy at a time: the daemons and guests of another would not be quite idle, and two cores are few. So each
//! policy boots its own in each pass, and policies follow one another within a minute or so.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use rig::guest::BOOT_LIMIT_SECS;
use rig::{Cluster, ClusterOptions, Deadline, Service, Testbed};

use super::policy::Policy;

/// Until leader and secondary are the same.
const PROTECTED_LIMIT_SECS: u64 = 60;
/// What a measurement runs, copied when it begins: a build meanwhile must not mix versions.
const PROGRAMS: [&str; 2] = ["plover", "libplover_agent.so"];

/// Copies the programs.
///
/// # Errors
/// They are not built.
pub fn copy_programs(to: &Path) -> Result<()> {
    for name in PROGRAMS {
        let built = rig::release_program(name)?;
        std::fs::copy(&built, to.join(name)).with_context(|| format!("cannot copy {}", built.display()))?;
    }
    Ok(())
}

/// Boots the guest on the first host, with a secondary on the second and a witness on the third if the policy wants them.
///
/// The leader's guest has the first CPU; the secondary's, all reactors and the client share the second. What the daemons do beside
/// that is mostly done while the guests stand still, so it may take place on either. The witness has no guest, so that no
/// other host can become secondary. Their logs are in memory, in `logs`: hosts have a disk each, which a machine that plays
/// three of them has not.
///
/// # Errors
/// It does not come up, with what each host says.
pub fn boot<'a>(
    bed: &'a Testbed,
    service: Service,
    policy: Policy,
    programs: &Path,
    logs: &Path,
    cpus: [usize; 2],
) -> Result<Cluster<'a>> {
    let mut options = ClusterOptions::new(service, programs.to_owned());
    options.unreplicated = policy.unreplicated;
    options.policy = policy.lines.to_owned();
    let fresh = std::fs::remove_dir_all(logs).and_then(|()| std::fs::create_dir(logs));
    fresh.with_context(|| format!("cannot empty {}", logs.display()))?;
    options.logs = Some(logs.to_owned());
    options.qemu_cores = vec![vec![cpus[0]], vec![cpus[1]], Vec::new()];
    options.daemon_cores = cpus.to_vec();
    options.node = format!("reactor_cores = [{}]\n", cpus[1]);
    let cluster = Cluster::new(bed, options)?;
    let hosts = bed.hosts();
    let (members, guests) = if policy.unreplicated { (1, 1) } else { (3, 2) };
    for host in &hosts[..members] {
        cluster.start_daemon(host)?;
    }
    for host in &hosts[..guests] {
        cluster.start_qemu(host)?;
    }
    let deadline = Deadline::after_secs(BOOT_LIMIT_SECS);
    bed.client().wait_for_port(cluster.address(), deadline).map_err(|error| cluster.explain(error))?;
    if !policy.unreplicated {
        wait_protected(&cluster)?;
    }
    Ok(cluster)
}

/// Waits until the first host leads a protected VM.
///
/// # Errors
/// It never does, with what each host says.
pub fn wait_protected(cluster: &Cluster<'_>) -> Result<()> {
    let leader = cluster.wait_protected(Deadline::after_secs(PROTECTED_LIMIT_SECS))?;
    let first = &cluster.bed().hosts()[0];
    ensure!(leader.name() == first.name(), "{} leads instead of {}", leader.name(), first.name());
    Ok(())
}
