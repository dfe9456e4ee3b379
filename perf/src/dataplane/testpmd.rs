//! DPDK's `dpdk-testpmd`: the guest's side of every measurement (`net_virtio_user`), and the peer (`net_vhost`).
//!
//! Each runs on one CPU: the thread that forwards and the one that takes commands share it, and the latter sleeps. Counters are
//! read through DPDK's telemetry socket, because testpmd writes its own displays into a buffer.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, Signal};

use crate::peers::{self, Running};
use crate::results::workspace;

/// Longest that testpmd may take for a step that takes well under a second on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Memory of each testpmd in MiB; its frames need 40.
pub const MEMORY_MIB: u64 = 192;
const PROMPT: &[u8] = b"testpmd>";
/// Room for an answer with all counters of a port.
const ANSWER_BYTES: usize = 64 << 10;

/// Frames that went in and out of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Received by this program.
    pub received: u64,
    /// Sent by this program.
    pub sent: u64,
}

/// How to start one.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// For file names.
    pub name: &'a str,
    /// The port: `net_virtio_user0,path=…` or `net_vhost0,iface=…`.
    pub port: &'a str,
    /// `rxonly`, `txonly` or `io`.
    pub forward: &'a str,
    /// Length of the frames that `txonly` and `tx_first` make.
    pub frame_bytes: usize,
    /// Where both of its threads run.
    pub cpu: usize,
    /// Whether there are huge pages.
    pub huge: bool,
    /// Where its output goes.
    pub directory: &'a Path,
}

/// A running testpmd that takes commands.
#[derive(Debug)]
pub struct Testpmd {
    running: Running,
    commands: ChildStdin,
    telemetry: OwnedFd,
    output: PathBuf,
    /// The directory that DPDK makes for a process and leaves behind.
    runtime: PathBuf,
}

impl Testpmd {
    /// Starts it and waits until it takes commands. It does not forward yet.
    ///
    /// # Errors
    /// It is not installed or does not start, with what it said.
    pub fn start(options: Options<'_>) -> Result<Testpmd> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("plover-perf-{}-{number}-{}", std::process::id(), options.name);
        let output = options.directory.join(format!("testpmd.{}", options.name));
        let file = std::fs::File::create(&output).with_context(|| format!("cannot make {}", output.display()))?;
        let mut command = program()?;
        command.args(arguments(&options, &prefix));
        command.stdin(Stdio::piped()).stderr(file.try_clone()?).stdout(file);
        let mut running = Running::start(&mut command)?;
        let commands = running.stdin().context("testpmd was started with a pipe")?;
        let runtime = runtime_directory().join(&prefix);
        let ready = wait_for_prompt(&output, &mut running).and_then(|()| telemetry(&runtime));
        let telemetry = match ready {
            Ok(telemetry) => telemetry,
            Err(error) => {
                let _ = std::fs::remove_dir_all(&runtime);
                return Err(error.context(format!("testpmd said: {}", last_lines(&output))));
            }
        };
        Ok(Testpmd { running, commands, telemetry, output, runtime })
    }

    /// Sends a command.
    ///
    /// # Errors
    /// It has ended, with what it said.
    pub fn command(&mut self, line: &str) -> Result<()> {
        self.running.check().with_context(|| format!("testpmd said: {}", last_lines(&self.output)))?;
        writeln!(self.commands, "{line}").context("testpmd takes no more commands")
    }

    /// Stops its threads where they are, until [`go_on`](Self::go_on).
    ///
    /// # Errors
    /// It has ended.
    pub fn halt(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it run again.
    ///
    /// # Errors
    /// It has ended.
    pub fn go_on(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let process = i32::try_from(self.running.id()).ok().and_then(Pid::from_raw);
        rustix::process::kill_process(process.context("a process has a number")?, signal)
            .with_context(|| format!("testpmd said: {}", last_lines(&self.output)))
    }

    /// Its counters at a moment during the call.
    ///
    /// # Errors
    /// It does not answer.
    pub fn counts(&self) -> Result<Counts> {
        counts(&self.telemetry)
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        self.running.kill();
        let _ = std::fs::remove_dir_all(&self.runtime);
    }
}

/// The installed one, or the one that `cargo xtask perf` has unpacked.
fn program() -> Result<Command> {
    let root = workspace().join("target").join("rig").join("dpdk");
    let mut command = peers::installed_or_unpacked(&root, "dpdk-testpmd")?;
    // It looks for its drivers where Debian installs them.
    let installed = Path::new("/usr/lib/x86_64-linux-gnu/dpdk").exists();
    let unpacked = root.join("usr/lib/x86_64-linux-gnu/dpdk");
    if let (false, Ok(mut directories)) = (installed, std::fs::read_dir(unpacked)) {
        let drivers = directories.next().context("dpdk was unpacked without drivers")??.path();
        for driver in ["librte_mempool_ring.so", "librte_net_vhost.so", "librte_net_virtio.so"] {
            command.arg("-d").arg(drivers.join(driver));
        }
    }
    Ok(command)
}

fn arguments(options: &Options<'_>, prefix: &str) -> Vec<String> {
    let Options { cpu, port, forward, frame_bytes, .. } = options;
    let mut words = vec![format!("--lcores=0@{cpu},1@{cpu}"), "--main-lcore=0".to_owned(), "--no-pci".to_owned()];
    words.extend([format!("--file-prefix={prefix}"), format!("--vdev={port}"), format!("-m{MEMORY_MIB}")]);
    let memory: &[&str] = if options.huge { &["--in-memory", "--single-file-segments"] } else { &["--no-huge"] };
    words.extend(memory.iter().map(ToString::to_string));
    words.extend(["--", "-i", "--nb-cores=1", "--total-num-mbufs=16384"].map(str::to_owned));
    words.extend([format!("--forward-mode={forward}"), format!("--txpkts={frame_bytes}")]);
    words
}

/// Where DPDK puts its directories.
fn runtime_directory() -> PathBuf {
    let user = || std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    let base = if rustix::process::getuid().is_root() { PathBuf::from("/var/run") } else { user() };
    base.join("dpdk")
}

/// Waits until it takes commands. Before that, a question about a port can make it crash.
fn wait_for_prompt(output: &Path, running: &mut Running) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !std::fs::read(output)?.windows(PROMPT.len()).any(|text| text == PROMPT) {
        running.check()?;
        ensure!(Instant::now() < deadline, "testpmd is not ready after {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn telemetry(runtime: &Path) -> Result<OwnedFd> {
    let path = runtime.join("dpdk_telemetry.v2");
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::sockopt::set_socket_timeout(&socket, rustix::net::sockopt::Timeout::Recv, Some(PATIENCE))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(&path)?)
        .with_context(|| format!("cannot connect to {}", path.display()))?;
    // It introduces itself.
    receive(&socket)?;
    counts(&socket)?;
    Ok(socket)
}

fn receive(socket: &OwnedFd) -> Result<Vec<u8>> {
    let mut answer = vec![0; ANSWER_BYTES];
    let (_, len) = rustix::net::recv(socket, &mut answer[..], RecvFlags::empty()).context("no telemetry")?;
    answer.truncate(len);
    ensure!(!answer.is_empty(), "testpmd has closed its telemetry socket");
    Ok(answer)
}

fn counts(socket: &OwnedFd) -> Result<Counts> {
    rustix::net::send(socket, b"/ethdev/stats,0", SendFlags::NOSIGNAL).context("no telemetry")?;
    let answer: serde_json::Value = serde_json::from_slice(&receive(socket)?).context("telemetry is no JSON")?;
    let field = |name: &str| {
        let number = answer["/ethdev/stats"][name].as_u64();
        number.with_context(|| format!("telemetry has no {name}: {answer}"))
    };
    Ok(Counts { received: field("ipackets")?, sent: field("opackets")? })
}

fn last_lines(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join(" | ")
}
