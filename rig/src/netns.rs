//! Named network namespaces, as `ip netns` makes them, so that a person can enter them too.

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::thread::JoinHandle;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::error::Context;
use crate::process::start_time;
use crate::{Result, tool};

/// A network namespace that the test bed made. Dropping it closes our handle; the janitor removes the namespace.
pub struct NetNs {
    name: String,
    handle: File,
    inode: u64,
}

impl NetNs {
    /// Makes the namespace with loopback up, one congestion control everywhere, and IPv6 off: router solicitations would be
    /// stray frames.
    pub(crate) fn create(name: &str) -> Result<Self> {
        tool::run("ip", &["netns", "add", name], "")?;
        let path = format!("/run/netns/{name}");
        let handle = File::open(&path).context(|| format!("cannot open {path}"))?;
        let inode = handle.metadata().context(|| format!("cannot look at {path}"))?.ino();
        let namespace = Self { name: name.to_owned(), handle, inode };
        namespace.quieten()?;
        tool::ip_batch(name, "link set lo up")?;
        Ok(namespace)
    }

    /// Name for `ip netns exec NAME`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The handle, for setns.
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.handle.as_raw_fd()
    }

    /// Starts `work` on a new thread inside the namespace. Sockets that it opens belong to the namespace, also
    /// when they are handed out and used elsewhere.
    pub fn on_thread<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let name = self.name.clone();
        let handle = self.handle.try_clone().context(|| format!("cannot duplicate the handle of {name}"))?;
        Ok(std::thread::spawn(move || {
            enter(handle.as_fd(), &name)?;
            Ok(work())
        }))
    }

    /// Runs `work` inside the namespace and waits for it.
    ///
    /// # Panics
    /// When `work` does, with its message.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter(self.handle.as_fd(), &self.name)?;
                Ok(work())
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The processes that live in the namespace, each with its start time, which makes it unique.
    pub(crate) fn live(&self) -> Result<Vec<(u32, u64)>> {
        let entries = fs::read_dir("/proc").context(|| "cannot read /proc".to_owned())?;
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let inside = pids.filter(|&pid| self.contains(pid));
        Ok(inside.filter_map(|pid| Some((pid, start_time(pid)?))).collect())
    }

    /// Whether the process lives in the namespace. One that has just ended lives nowhere.
    pub(crate) fn contains(&self, pid: u32) -> bool {
        let theirs = fs::metadata(format!("/proc/{pid}/ns/net"));
        theirs.is_ok_and(|theirs| theirs.ino() == self.inode)
    }

    fn quieten(&self) -> Result<()> {
        let written = self.run(|| {
            // These exist only with the bridge netfilter module; bridged frames are not this host's to filter.
            for family in ["iptables", "ip6tables", "arptables"] {
                drop(fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{family}"), "0"));
            }
            // Not what this machine happens to have as its default: BBR spreads what a client sends over the time that its answers
            // take, so that it would wait for itself where answers are held. Reno reacts to loss, as Debian's default does, and
            // every namespace may have it.
            fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "reno")?;
            let switch = "/proc/sys/net/ipv6/conf";
            if !fs::exists(switch)? {
                return Ok(());
            }
            fs::write(format!("{switch}/all/disable_ipv6"), "1")?;
            fs::write(format!("{switch}/default/disable_ipv6"), "1")
        })?;
        written.context(|| format!("cannot set up TCP or switch off IPv6 in {}", self.name))
    }
}

/// Moves the calling thread; it never comes back, so use a thread of its own.
fn enter(namespace: BorrowedFd, name: &str) -> Result<()> {
    let moved = move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network));
    moved.context(|| format!("cannot enter the network namespace {name}"))
}
