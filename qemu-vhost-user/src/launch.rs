//! From a VM's configuration to its QEMU command line: `plover qemu-args` and `plover launch`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::config::{MemoryBackend, NodeConfig, SocketSide, VmConfig};
use crate::qemu::args::{QueueOptions, RamPlace, VmArgs};
use crate::qemu::launch::{LaunchError, exec as exec_qemu, print_form};

/// The agent's file name.
const AGENT_FILE: &str = "libplover_agent.so";
/// Where packages put it.
const AGENT_INSTALLED: &str = "/usr/lib/plover/libplover_agent.so";
/// Huge pages of this size back a VM with `memory_backend = "hugepages"`.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// Everything that QEMU must be told for this replica of `vm`.
pub fn vm_args(node: &NodeConfig, vm: &VmConfig) -> VmArgs {
    let run_dir = node.vm_run_dir(&vm.name);
    let socket = |chosen: &Option<PathBuf>, file: &str| chosen.clone().unwrap_or_else(|| run_dir.join(file));
    VmArgs {
        name: vm.name.clone(),
        memory_bytes: vm.memory_mib << 20,
        memory_backend: match vm.memory_backend {
            MemoryBackend::Memfd => RamPlace::Memfd,
            MemoryBackend::Hugepages => RamPlace::HugePages { page_bytes: HUGE_PAGE_BYTES },
        },
        vhost_user_socket: socket(&vm.vhost_user_socket, "vhost.sock"),
        qemu_is_server: vm.vhost_user_server == SocketSide::Qemu,
        mac: vm.mac_bytes().expect("checked when the file was read"),
        queues: QueueOptions { pairs: vm.queue_pairs, ..QueueOptions::default() },
        qmp_socket: socket(&vm.qmp_socket, "qmp.sock"),
        agent_socket: socket(&vm.agent_socket, "agent.sock"),
        agent_library: agent_library(node),
    }
}

/// The configured library, the one beside the executable (a build tree), or the installed one.
fn agent_library(node: &NodeConfig) -> PathBuf {
    if let Some(path) = &node.agent_library {
        return path.clone();
    }
    std::env::current_exe()
        .ok()
        .and_then(|executable| executable.parent().map(|folder| folder.join(AGENT_FILE)))
        .filter(|path| path.exists())
        .unwrap_or_else(|| Path::new(AGENT_INSTALLED).to_owned())
}

/// The command as a text for a shell.
pub fn command_text(node: &NodeConfig, vm: &VmConfig) -> String {
    print_form(&node.qemu, &vm_args(node, vm), &[])
}

/// Becomes QEMU; returns only the reason why that failed.
pub fn exec(node: &NodeConfig, vm: &VmConfig, user_args: &[OsString]) -> LaunchError {
    match exec_qemu(&node.qemu, &vm_args(node, vm), user_args) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}
