//! A VM for one test: QEMU with our arguments, a network backend that answers just enough, and the end of both.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qemu_vhost_user::qemu::agent::AgentClient;
use qemu_vhost_user::qemu::args::{QueueOptions, RamPlace, VmArgs, qemu_args, qemu_environment};
use qemu_vhost_user::qemu::launch;
use qemu_vhost_user::qemu::qmp::Qmp;

/// How long anything may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The guest's RAM.
pub const MEMORY_BYTES: u64 = 256 << 20;

/// Looks again and again until there is a value.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for {what}");
        // Neither consoles nor sockets announce themselves; give the guest the core.
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn rig() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/rig")
}

fn qemu_binary() -> PathBuf {
    std::env::var_os("PLOVER_QEMU").map_or_else(|| rig().join("bin/qemu-system-x86_64"), PathBuf::from)
}

/// Cargo puts the library beside the test's own program.
fn agent_library() -> PathBuf {
    let program = std::env::current_exe().expect("the test's program");
    let library = program.parent().expect("a directory").join("libplover_agent.so");
    assert!(library.exists(), "{} is missing", library.display());
    library
}

/// A VM that is being described.
pub struct Vm {
    directory: PathBuf,
    args: VmArgs,
    replaced: Vec<(String, String)>,
    user: Vec<OsString>,
    service: String,
    agent: bool,
    children: Vec<Child>,
}

impl Vm {
    pub fn new(name: &str) -> Vm {
        let directory = std::env::temp_dir().join(format!("plover-e2e-{}-{name}", std::process::id()));
        let args = VmArgs {
            name: name.into(),
            memory_bytes: MEMORY_BYTES,
            memory_backend: RamPlace::Memfd,
            vhost_user_socket: directory.join("net.sock"),
            qemu_is_server: true,
            mac: [0x52, 0x54, 0, 0, 0, 1],
            queues: QueueOptions::default(),
            qmp_socket: directory.join("qmp.sock"),
            agent_socket: directory.join("agent.sock"),
            agent_library: agent_library(),
        };
        launch::prepare(&args).expect("prepare");
        Vm {
            directory,
            args,
            replaced: Vec::new(),
            user: Vec::new(),
            service: "plover.service=redis".into(),
            agent: true,
            children: Vec::new(),
        }
    }

    /// Changes a piece of every argument of ours that has it.
    pub fn replace(mut self, from: &str, to: &str) -> Vm {
        self.replaced.push((from.into(), to.into()));
        self
    }

    pub fn user(mut self, arguments: &[&str]) -> Vm {
        self.user.extend(arguments.iter().map(OsString::from));
        self
    }

    pub fn service(mut self, name: &str, words: &str) -> Vm {
        self.service = format!("plover.service={name} {words}");
        self
    }

    pub fn memory(mut self, bytes: u64) -> Vm {
        self.args.memory_bytes = bytes;
        self
    }

    pub fn without_agent(mut self) -> Vm {
        self.agent = false;
        self
    }

    /// What is the user's own business.
    fn user_args(&self) -> Vec<OsString> {
        let append = format!(
            "console=ttyS0 quiet panic=-1 ipv6.disable=1 mitigations=off nowatchdog tsc=reliable no_timer_check \
             rcupdate.rcu_cpu_stall_suppress=1 random.trust_cpu=on audit=0 net.ifnames=0 plover.ip=10.77.0.50/24 {}",
            self.service
        );
        let mut arguments: Vec<OsString> =
            ["-accel", "tcg,thread=single", "-cpu", "max,la57=off", "-smp", "1", "-bios", "qboot.rom"]
                .map(Into::into)
                .into();
        arguments.extend(["-kernel".into(), rig().join("vmlinux").into()]);
        let initrd = self.service.split([' ', '=']).nth(1).unwrap_or("redis");
        arguments.extend(["-initrd".into(), rig().join(format!("initrd/{initrd}.cpio")).into()]);
        arguments.extend(["-append".into(), append.into(), "-serial".into()]);
        let mut console = OsString::from("file:");
        console.push(self.directory.join("console"));
        arguments.push(console);
        arguments.extend(self.user.iter().cloned());
        arguments
    }

    pub fn start(mut self) -> Vm {
        let mut command = Command::new(qemu_binary());
        for argument in qemu_args(&self.args) {
            let mut text = argument.into_string().expect("UTF-8");
            for (from, to) in &self.replaced {
                text = text.replace(from, to);
            }
            command.arg(text);
        }
        command.args(self.user_args());
        if self.agent {
            command.envs(qemu_environment(&self.args));
        }
        self.spawn(command);
        self
    }

    pub fn start_by_shell(mut self) -> Vm {
        let qemu = qemu_binary();
        let script = launch::print_form(&qemu, &self.args, &self.user_args());
        // env and a second shell stand for the wrappers that people use; each becomes the next one, so that the process
        // to end stays the same.
        let qemu = qemu.to_str().expect("UTF-8");
        let wrapped = format!("sh -c 'exec \"$0\" \"$@\"' {qemu}");
        let script = format!("exec env {}", script.replacen(qemu, &wrapped, 1));
        let mut command = Command::new("sh");
        command.arg("-c").arg(script);
        self.spawn(command);
        self
    }

    fn spawn(&mut self, mut command: Command) {
        command.stdin(Stdio::null());
        // SAFETY: between fork and exec only an async-signal-safe call is made.
        unsafe {
            command.pre_exec(|| {
                // Nothing survives a test that is killed.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        self.children.push(command.spawn().expect("QEMU (cargo xtask setup makes it)"));
        let socket = self.args.vhost_user_socket.clone();
        let backend = until("QEMU's vhost-user socket", || UnixStream::connect(&socket).ok());
        std::thread::spawn(move || answer_vhost_user(backend));
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn pid(&self) -> i32 {
        self.children[0].id() as i32
    }

    pub fn qmp(&self) -> Qmp {
        Qmp::connect(&self.args.qmp_socket, Instant::now() + PATIENCE).expect("monitor")
    }

    pub fn agent(&self) -> AgentClient {
        AgentClient::connect(&self.args.agent_socket, Instant::now() + PATIENCE).expect("agent")
    }

    pub fn wait_for_console(&self, text: &str) {
        let console = self.directory.join("console");
        until(text, || {
            let seen = std::fs::read(&console).unwrap_or_default();
            String::from_utf8_lossy(&seen).contains(text).then_some(())
        });
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A vhost-user backend whose network never carries a frame: QEMU does not come up without one. Ends with QEMU.
fn answer_vhost_user(mut socket: UnixStream) -> Option<()> {
    const GET_FEATURES: u32 = 1;
    const GET_VRING_BASE: u32 = 11;
    const VERSION_1: u64 = 1 << 32;
    loop {
        let mut header = [0; 12];
        // Descriptors that come along are dropped by the kernel, since no room is given for them.
        socket.read_exact(&mut header).ok()?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut payload = vec![0; word(8) as usize];
        socket.read_exact(&mut payload).ok()?;
        let answer = match word(0) {
            GET_FEATURES => VERSION_1.to_le_bytes(),
            GET_VRING_BASE => <[u8; 8]>::try_from(&payload[..8]).ok()?,
            _ => continue,
        };
        // Version 1, and this is an answer.
        let mut message = [word(0), 1 | 4, 8].map(u32::to_le_bytes).concat();
        message.extend(answer);
        socket.write_all(&message).ok()?;
    }
}
