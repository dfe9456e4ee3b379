//! Guests: which files they boot from, their part of QEMU's command line, and an unprotected guest as a baseline.

use std::arch::x86_64::_rdtsc;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::host::Host;
use crate::process::{Process, Spawn};
use crate::testbed::GUEST_IP;
use crate::wait::Deadline;
use crate::{Result, RigError};

/// The guest's init prints this when its service listens.
pub const READY_LINE: &str = "PLOVER-GUEST-READY";
/// A guest that has not come up after this long never will; generous for a loaded machine.
pub const BOOT_LIMIT_SECS: u64 = 90;

/// The workspace's `target` directory.
pub(crate) fn target_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("rig lies in the workspace").join("target")
}

/// Where `cargo xtask setup` puts what it makes: `target/rig`.
pub fn artifacts_dir() -> PathBuf {
    target_dir().join("rig")
}

/// The files that `cargo xtask setup` has made.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// A stock QEMU, 10.0 or newer.
    pub qemu: PathBuf,
    /// Debian's kernel as ELF.
    pub kernel: PathBuf,
    /// One image per service.
    pub initrds: PathBuf,
}

impl Artifacts {
    /// Finds them.
    ///
    /// # Errors
    /// [`RigError::NotSetUp`] for the first one that is missing.
    pub fn locate() -> Result<Self> {
        let root = artifacts_dir();
        let found = |relative: &str| {
            let path = root.join(relative);
            if path.exists() { Ok(path) } else { Err(RigError::NotSetUp { path }) }
        };
        Ok(Self { qemu: found("bin/qemu-system-x86_64")?, kernel: found("vmlinux")?, initrds: found("initrd")? })
    }

    /// The image that contains a service.
    pub fn initrd(&self, service: Service) -> PathBuf {
        self.initrds.join(format!("{}.cpio", service.name()))
    }
}

/// What a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Redis without persistence.
    Redis,
    /// memcached, 64 MiB, one thread.
    Memcached,
    /// nginx with one small page.
    Nginx,
    /// lighttpd with a small page that PHP makes.
    Lighttpd,
    /// PostgreSQL, its data in memory; anybody is its user `postgres`.
    Postgres,
    /// Threads that race without locks (rig/guest/racey.rs says how to ask for the result).
    Racey {
        /// How many threads race.
        threads: u32,
        /// How many rounds; 0: without end.
        rounds: u64,
    },
}

impl Service {
    /// As in `plover.service=` and in the image's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Redis => "redis",
            Self::Memcached => "memcached",
            Self::Nginx => "nginx",
            Self::Lighttpd => "lighttpd",
            Self::Postgres => "postgres",
            Self::Racey { .. } => "racey",
        }
    }

    /// The TCP port that it serves.
    pub fn port(self) -> u16 {
        match self {
            Self::Redis => 6379,
            Self::Memcached => 11211,
            Self::Nginx | Self::Lighttpd => 80,
            Self::Postgres => 5432,
            Self::Racey { .. } => 7000,
        }
    }

    /// What it needs to run well, MiB.
    pub fn memory_mib(self) -> u32 {
        if self == Self::Postgres { 640 } else { 256 }
    }
}

/// A guest to be started, protected or not.
#[derive(Clone, Debug)]
pub struct Guest {
    /// What it runs.
    pub service: Service,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Its memory, MiB.
    pub memory_mib: u32,
    /// More words for the kernel command line.
    pub append: String,
    /// What an unprotected guest's memory consists of; a protected one's is the daemon's business.
    pub plain_memory: PlainMemory,
}

/// What the memory of an unprotected guest consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlainMemory {
    /// QEMU's own choice: private memory, for which it asks the kernel for huge pages.
    Private,
    /// Shared anonymous memory, as protected guests have by default.
    Memfd,
    /// The same of huge pages of 2 MiB, which must be reserved.
    HugePages,
}

impl PlainMemory {
    /// QEMU's options for it, and the machine's.
    fn arguments(self, memory_mib: u32) -> (Vec<String>, &'static str) {
        let pages = match self {
            Self::Private => return (Vec::new(), ""),
            Self::Memfd => "",
            Self::HugePages => ",hugetlb=on,hugetlbsize=2M",
        };
        let object = format!("memory-backend-memfd,id=ram0,size={memory_mib}M,share=on{pages}");
        (vec!["-object".to_owned(), object], ",memory-backend=ram0")
    }
}

impl Guest {
    /// A guest at [`GUEST_IP`] with as much memory as its service needs.
    pub fn new(service: Service) -> Self {
        let memory_mib = service.memory_mib();
        Self { service, ip: GUEST_IP, memory_mib, append: String::new(), plain_memory: PlainMemory::Private }
    }

    /// The user's own part of QEMU's command line: everything except machine, memory backend and devices. The
    /// console goes to the file `serial`.
    ///
    /// # Errors
    /// [`RigError::NotSetUp`].
    pub fn user_args(&self, serial: &Path) -> Result<Vec<String>> {
        let artifacts = Artifacts::locate()?;
        let text = |path: &Path| path.display().to_string();
        Ok([
            "-accel",
            "tcg",
            "-cpu",
            CPU,
            "-smp",
            "1",
            "-m",
            &format!("{}M", self.memory_mib),
            "-bios",
            "qboot.rom",
            "-kernel",
            &text(&artifacts.kernel),
            "-initrd",
            &text(&artifacts.initrd(self.service)),
            "-append",
            &self.kernel_command_line(),
            "-serial",
            &format!("file:{}", text(serial)),
            "-no-reboot",
        ]
        .map(str::to_owned)
        .to_vec())
    }

    /// What the guest's kernel and init are told. The same on every host: the clock frequency is this machine's.
    pub fn kernel_command_line(&self) -> String {
        let racey = match self.service {
            Service::Racey { threads, rounds } => format!(" plover.racey={threads},{rounds}"),
            _ => String::new(),
        };
        format!(
            "console=ttyS0 quiet panic=-1 {KERNEL_QUIRKS} tsc_early_khz={} plover.ip={}/24 plover.service={}{racey} {}",
            tsc_khz(),
            self.ip,
            self.service.name(),
            self.append
        )
        .trim_end()
        .to_owned()
    }

    /// QEMU's whole command line for an unprotected guest on the TAP device `tap`.
    ///
    /// # Errors
    /// [`RigError::NotSetUp`].
    pub fn plain_args(&self, serial: &Path, tap: &str) -> Result<Vec<String>> {
        let (memory, machine) = self.plain_memory.arguments(self.memory_mib);
        let mut arguments = vec!["-machine".to_owned(), format!("pc{machine}")];
        arguments.extend(memory);
        let [.., low] = self.ip.octets();
        let fixed = [
            "-nodefaults",
            "-no-user-config",
            "-vga",
            "none",
            "-display",
            "none",
            "-name",
            "plain,debug-threads=on",
            "-rtc",
            "clock=vm",
            "-netdev",
            &format!("tap,id=n0,ifname={tap},script=no,downscript=no,vhost=off"),
            "-device",
            &format!(
                "virtio-net-pci,netdev=n0,mac=52:54:00:77:00:{low:02x},romfile=,guest_announce=off,{PLAIN_QUEUES}"
            ),
        ];
        arguments.extend(fixed.map(str::to_owned));
        arguments.extend(self.user_args(serial)?);
        Ok(arguments)
    }

    /// Starts the guest on `host` without any protection, on QEMU's own network backend, and waits until its service
    /// listens: the baseline that protected guests are compared with.
    ///
    /// # Errors
    /// When the set-up is incomplete, or with the guest's last console lines when it does not come up.
    pub fn boot_plain(&self, host: &Host, cores: &[usize]) -> Result<Process> {
        let tap = host.add_tap()?;
        let serial = host.directory().join(format!("console-{tap}.log"));
        let mut command = Command::new(Artifacts::locate()?.qemu);
        command.args(self.plain_args(&serial, &tap)?);
        let qemu = host.start(Spawn::new(format!("qemu-{tap}"), command).on_cores(cores))?;
        qemu.wait_for_line_in(&serial, READY_LINE, Deadline::after_secs(BOOT_LIMIT_SECS))?;
        Ok(qemu)
    }
}

/// As protected guests have it. The sending queue cannot be longer than 256, QEMU's own choice, without vhost-user.
const PLAIN_QUEUES: &str = "rx_queue_size=1024";
/// The processor of every guest.
pub(crate) const CPU: &str = "max,la57=off";
/// A paused or moved guest sees its clock jump: nothing may take that for a fault of the machine. IPv6 would send
/// frames by itself; mitigations slow TCG down and protect nobody here; the kernel's tests of its ciphers are half a second of a boot.
pub(crate) const KERNEL_QUIRKS: &str = "ipv6.disable=1 mitigations=off nowatchdog tsc=reliable no_timer_check \
    rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on audit=0 net.ifnames=0 cryptomgr.notests";

/// Frequency of this machine's time stamp counter, which TCG shows to guests. A guest that calibrates by itself
/// is wrong on a busy machine.
pub fn tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| {
        // The shortest of several readings was disturbed least.
        let read = || {
            let candidates = (0..16).map(|_| {
                let before = Instant::now();
                // SAFETY: rdtsc has no preconditions on x86-64 in user space under Linux.
                let ticks = unsafe { _rdtsc() };
                (before.elapsed(), before, ticks)
            });
            candidates.min_by_key(|(width, ..)| *width).expect("there are 16")
        };
        let (_, start, first_ticks) = read();
        std::thread::sleep(CALIBRATION);
        let (_, end, last_ticks) = read();
        let nanoseconds = end.duration_since(start).as_nanos();
        let khz = u128::from(last_ticks - first_ticks) * 1_000_000 / nanoseconds;
        u64::try_from(khz).expect("no counter runs that fast")
    })
}

/// Long enough for an error below one in ten thousand.
const CALIBRATION: Duration = Duration::from_millis(50);
