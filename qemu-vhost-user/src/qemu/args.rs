//! The QEMU arguments that a protected VM needs: everything that preflight asks for, and nothing that is the user's
//! own business (CPUs, firmware, kernel, disks, consoles).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use plover_agent::protocol::SOCKET_VARIABLE;

/// Id of the memory backend.
pub const MEMORY_BACKEND_ID: &str = "plover-ram";
/// Id of the network's chardev and netdev.
const NETWORK_ID: &str = "plover-net0";
/// How soon QEMU dials the backend again, if it is the client. QEMU ≥ 9.2 knows milliseconds.
const RECONNECT_MS: u32 = 100;

/// Where the guest's RAM lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RamPlace {
    /// Anonymous shared memory.
    Memfd,
    /// A file on tmpfs or hugetlbfs: `path` is the file or a directory in which QEMU makes a nameless one.
    File(PathBuf),
    /// Huge pages of this size (2 MiB or 1 GiB), which the host must have reserved.
    HugePages {
        /// Size of a huge page.
        page_bytes: u64,
    },
}

/// Settings of the network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueOptions {
    /// Number of receive/transmit queue pairs.
    pub pairs: u16,
    /// Descriptors of a receive queue: a power of two from 256 to 1024.
    pub rx_size: u16,
    /// Descriptors of a transmit queue: a power of two from 256 to 1024.
    pub tx_size: u16,
}

impl Default for QueueOptions {
    fn default() -> Self {
        QueueOptions { pairs: 1, rx_size: 1024, tx_size: 1024 }
    }
}

/// What is to be known about a VM to start its QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmArgs {
    /// Name of the VM.
    pub name: String,
    /// Size of its RAM.
    pub memory_bytes: u64,
    /// Where its RAM lies.
    pub memory_backend: RamPlace,
    /// The socket between QEMU's network device and the daemon.
    pub vhost_user_socket: PathBuf,
    /// Whether QEMU listens on it and the daemon connects (preferred), or the other way round.
    pub qemu_is_server: bool,
    /// The guest's MAC address, equal on all replicas.
    pub mac: [u8; 6],
    /// Its queues.
    pub queues: QueueOptions,
    /// Where QEMU's monitor listens.
    pub qmp_socket: PathBuf,
    /// Where the agent listens.
    pub agent_socket: PathBuf,
    /// The agent's library.
    pub agent_library: PathBuf,
}

/// QEMU's arguments. The VM starts stopped (`-S`): the daemon lets it run when it leads.
///
/// As long as nobody has connected to the vhost-user socket, QEMU with `qemu_is_server` waits in its start-up and
/// does not serve its monitor; connect there first.
pub fn qemu_args(vm: &VmArgs) -> Vec<OsString> {
    let mut arguments = Vec::new();
    let mut option = |name: &str, value: Value| {
        arguments.push(name.into());
        arguments.push(value.0);
    };
    option("-name", Value::new("").escaped(vm.name.as_ref()).plain(",debug-threads=on"));
    let machine = format!("pc,memory-backend={MEMORY_BACKEND_ID},suppress-vmdesc=on");
    option("-machine", Value::new(&machine));
    option("-object", memory_object(vm));
    option("-m", Value::new(&format!("size={}B", vm.memory_bytes)));
    option("-global", Value::new("migration.send-configuration=off"));
    option("-vga", Value::new("none"));
    option("-display", Value::new("none"));
    option("-rtc", Value::new("clock=vm"));
    let chardev = Value::new("socket,id=").plain(NETWORK_ID).plain(",path=").escaped(vm.vhost_user_socket.as_ref());
    let role =
        if vm.qemu_is_server { ",server=on,wait=off".to_owned() } else { format!(",reconnect-ms={RECONNECT_MS}") };
    option("-chardev", chardev.plain(&role));
    let netdev = format!("vhost-user,id={NETWORK_ID},chardev={NETWORK_ID},queues={}", vm.queues.pairs);
    option("-netdev", Value::new(&netdev));
    option("-device", Value::new(&network_device(vm)));
    option("-qmp", Value::new("unix:").escaped(vm.qmp_socket.as_ref()).plain(",server=on,wait=off"));
    // No configuration files of the host, so that all replicas are equal; no default devices, whose memory would not
    // be protected; do not run before the daemon says so.
    arguments.extend(["-no-user-config", "-nodefaults", "-S"].map(OsString::from));
    arguments
}

/// The variables to add to QEMU's environment.
pub fn qemu_environment(vm: &VmArgs) -> Vec<(OsString, OsString)> {
    vec![
        ("LD_PRELOAD".into(), vm.agent_library.clone().into()),
        (SOCKET_VARIABLE.into(), vm.agent_socket.clone().into()),
    ]
}

fn memory_object(vm: &VmArgs) -> Value {
    let size = format!(",id={MEMORY_BACKEND_ID},size={}B,share=on", vm.memory_bytes);
    match &vm.memory_backend {
        RamPlace::Memfd => Value::new("memory-backend-memfd").plain(&size),
        RamPlace::HugePages { page_bytes } => {
            let pages = format!(",hugetlb=on,hugetlbsize={page_bytes}B");
            Value::new("memory-backend-memfd").plain(&size).plain(&pages)
        }
        RamPlace::File(path) => {
            Value::new("memory-backend-file").plain(&size).plain(",mem-path=").escaped(path.as_ref())
        }
    }
}

fn network_device(vm: &VmArgs) -> String {
    let [a, b, c, d, e, f] = vm.mac;
    let QueueOptions { pairs, rx_size, tx_size } = vm.queues;
    // One vector per queue, one for configuration changes, one for the control queue.
    let multiqueue = if pairs > 1 { format!(",mq=on,vectors={}", 2 * u32::from(pairs) + 2) } else { String::new() };
    format!(
        "virtio-net-pci,netdev={NETWORK_ID},mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x},romfile=,\
         guest_announce=off,rx_queue_size={rx_size},tx_queue_size={tx_size}{multiqueue}"
    )
}

/// An option's value; QEMU reads two commas as one that belongs to the value.
struct Value(OsString);

impl Value {
    fn new(text: &str) -> Value {
        Value(text.into())
    }

    fn plain(mut self, text: &str) -> Value {
        self.0.push(text);
        self
    }

    fn escaped(mut self, text: &OsStr) -> Value {
        let mut bytes = Vec::with_capacity(text.len());
        for byte in text.as_bytes() {
            bytes.push(*byte);
            if *byte == b',' {
                bytes.push(b',');
            }
        }
        self.0.push(OsString::from_vec(bytes));
        self
    }
}

/// The whole command for a shell, an option per line.
pub fn shell_text(qemu: &Path, environment: &[(OsString, OsString)], arguments: &[OsString]) -> String {
    let mut text = String::new();
    for (name, value) in environment {
        text.push_str(&format!("{}={} \\\n", name.to_string_lossy(), shell_quoted(value)));
    }
    text.push_str(&shell_quoted(qemu.as_ref()));
    for argument in arguments {
        let separator = if argument.as_bytes().starts_with(b"-") { " \\\n  " } else { " " };
        text.push_str(separator);
        text.push_str(&shell_quoted(argument));
    }
    text
}

/// The text as one word of a POSIX shell.
pub fn shell_quoted(text: &OsStr) -> String {
    let text = text.to_string_lossy();
    let harmless = |c: char| c.is_ascii_alphanumeric() || "-_=+,./:@%".contains(c);
    if !text.is_empty() && text.chars().all(harmless) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vm() -> VmArgs {
        VmArgs {
            name: "web".into(),
            memory_bytes: 256 << 20,
            memory_backend: RamPlace::Memfd,
            vhost_user_socket: "/run/plover/web/net.sock".into(),
            qemu_is_server: true,
            mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56],
            queues: QueueOptions::default(),
            qmp_socket: "/run/plover/web/qmp.sock".into(),
            agent_socket: "/run/plover/web/agent.sock".into(),
            agent_library: "/usr/lib/plover/libplover_agent.so".into(),
        }
    }

    fn text(vm: &VmArgs) -> String {
        shell_text(Path::new("qemu-system-x86_64"), &qemu_environment(vm), &qemu_args(vm))
    }

    #[test]
    fn the_whole_command() {
        let expected = "\
LD_PRELOAD=/usr/lib/plover/libplover_agent.so \\
PLOVER_AGENT_SOCKET=/run/plover/web/agent.sock \\
qemu-system-x86_64 \\
  -name web,debug-threads=on \\
  -machine pc,memory-backend=plover-ram,suppress-vmdesc=on \\
  -object memory-backend-memfd,id=plover-ram,size=268435456B,share=on \\
  -m size=268435456B \\
  -global migration.send-configuration=off \\
  -vga none \\
  -display none \\
  -rtc clock=vm \\
  -chardev socket,id=plover-net0,path=/run/plover/web/net.sock,server=on,wait=off \\
  -netdev vhost-user,id=plover-net0,chardev=plover-net0,queues=1 \\
  -device virtio-net-pci,netdev=plover-net0,mac=52:54:00:12:34:56,romfile=,guest_announce=off,rx_queue_size=1024,tx_queue_size=1024 \\
  -qmp unix:/run/plover/web/qmp.sock,server=on,wait=off \\
  -no-user-config \\
  -nodefaults \\
  -S";
        assert_eq!(text(&vm()), expected);
    }

    #[test]
    fn choices_show_in_the_arguments() {
        let file = text(&VmArgs { memory_backend: RamPlace::File("/mnt/a,b".into()), ..vm() });
        assert!(
            file.contains("memory-backend-file,id=plover-ram,size=268435456B,share=on,mem-path=/mnt/a,,b"),
            "{file}"
        );
        let huge = text(&VmArgs { memory_backend: RamPlace::HugePages { page_bytes: 2 << 20 }, ..vm() });
        assert!(huge.contains("share=on,hugetlb=on,hugetlbsize=2097152B"), "{huge}");
        let client = text(&VmArgs { qemu_is_server: false, ..vm() });
        assert!(client.contains("net.sock,reconnect-ms=100"), "{client}");
        let queues = QueueOptions { pairs: 4, ..QueueOptions::default() };
        assert!(text(&VmArgs { queues, ..vm() }).contains(",mq=on,vectors=10"));
    }

    proptest! {
        #[test]
        fn a_shell_reads_back_what_was_quoted(words in proptest::collection::vec("[ -~\n]{0,12}", 1..4)) {
            let quoted: Vec<String> = words.iter().map(|word| shell_quoted(word.as_ref())).collect();
            let script = format!("printf '%s\\0' {}", quoted.join(" "));
            let output = std::process::Command::new("sh").arg("-c").arg(script).output().expect("sh");
            let mut expected = words.join("\0").into_bytes();
            expected.push(0);
            prop_assert_eq!(output.stdout, expected);
        }
    }
}
