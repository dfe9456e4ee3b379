//! Starts QEMU: `plover launch` becomes QEMU (exec), so that whoever supervises it sees QEMU's own process and status.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::args::{VmArgs, qemu_args, qemu_environment, shell_text};

/// The binary that is looked up in PATH if the configuration names none.
pub const DEFAULT_QEMU: &str = "qemu-system-x86_64";

/// Why QEMU could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A directory for its sockets.
    #[error("cannot make the directory {} for QEMU's sockets: {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// QEMU would start without the agent: the dynamic linker only warns.
    #[error("the agent's library {} is not there: {source}; install it or set its path in the node's configuration", path.display())]
    AgentLibrary {
        /// The library.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// LD_PRELOAD separates its entries by colons and blanks.
    #[error("the agent's library {} has a colon or blank in its path, which LD_PRELOAD cannot express; move it", path.display())]
    AgentPath {
        /// The library.
        path: PathBuf,
    },
    /// exec failed.
    #[error("cannot start {}: {source}; install qemu-system-x86 10.0 or newer or set its path in the node's configuration", qemu.display())]
    Exec {
        /// The binary.
        qemu: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The command that starts the VM's QEMU; arguments of the user come last, so that they win where QEMU lets the last
/// one win.
pub fn command(qemu: &Path, vm: &VmArgs, user_args: &[OsString]) -> Command {
    let mut command = Command::new(qemu);
    command.args(qemu_args(vm)).args(user_args).envs(qemu_environment(vm));
    command
}

/// The same command as a text for a shell: what `plover qemu-args` prints.
pub fn print_form(qemu: &Path, vm: &VmArgs, user_args: &[OsString]) -> String {
    let mut arguments = qemu_args(vm);
    arguments.extend_from_slice(user_args);
    shell_text(qemu, &qemu_environment(vm), &arguments)
}

/// Checks the agent's library and makes the directories of QEMU's sockets (mode 0700) if they are not there.
///
/// # Errors
/// [`LaunchError`] with what to do.
pub fn prepare(vm: &VmArgs) -> Result<(), LaunchError> {
    use std::os::unix::ffi::OsStrExt;
    let library = &vm.agent_library;
    if library.as_os_str().as_bytes().iter().any(|byte| matches!(byte, b':' | b' ')) {
        return Err(LaunchError::AgentPath { path: library.clone() });
    }
    std::fs::File::open(library).map_err(|source| LaunchError::AgentLibrary { path: library.clone(), source })?;
    let sockets = [&vm.qmp_socket, &vm.agent_socket, &vm.vhost_user_socket];
    for directory in sockets.into_iter().filter_map(|socket| socket.parent()) {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| LaunchError::Directory { path: directory.to_owned(), source })?;
    }
    Ok(())
}

/// Becomes QEMU. Returns only if that failed.
///
/// # Errors
/// Always: [`LaunchError`] with what to do.
pub fn exec(qemu: &Path, vm: &VmArgs, user_args: &[OsString]) -> Result<std::convert::Infallible, LaunchError> {
    prepare(vm)?;
    let source = command(qemu, vm, user_args).exec();
    Err(LaunchError::Exec { qemu: qemu.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::args::{QueueOptions, RamPlace};

    fn vm(directory: &Path, library: &Path) -> VmArgs {
        VmArgs {
            name: "vm".into(),
            memory_bytes: 64 << 20,
            memory_backend: RamPlace::Memfd,
            vhost_user_socket: directory.join("net.sock"),
            qemu_is_server: true,
            mac: [2, 0, 0, 0, 0, 1],
            queues: QueueOptions::default(),
            qmp_socket: directory.join("qmp.sock"),
            agent_socket: directory.join("agent.sock"),
            agent_library: library.to_owned(),
        }
    }

    #[test]
    fn directories_are_made_private() {
        use std::os::unix::fs::PermissionsExt;
        let root = std::env::temp_dir().join(format!("plover-launch-{}", std::process::id()));
        let directory = root.join("a/b");
        let library = std::env::current_exe().expect("some file");
        prepare(&vm(&directory, &library)).expect("prepared");
        prepare(&vm(&directory, &library)).expect("prepared again");
        let mode = std::fs::metadata(&directory).expect("there").permissions().mode();
        std::fs::remove_dir_all(&root).expect("removed");
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn what_would_start_qemu_without_the_agent_is_refused() {
        let missing = exec(Path::new("/bin/true"), &vm(Path::new("/tmp"), Path::new("/nonexistent/agent.so")), &[]);
        assert!(matches!(missing.expect_err("missing"), LaunchError::AgentLibrary { .. }));
        let blank = prepare(&vm(Path::new("/tmp"), Path::new("/a b/agent.so")));
        assert!(matches!(blank.expect_err("blank"), LaunchError::AgentPath { .. }));
    }

    #[test]
    fn a_missing_qemu_is_named() {
        let library = std::env::current_exe().expect("some file");
        let error =
            exec(Path::new("/nonexistent/qemu"), &vm(&std::env::temp_dir(), &library), &[]).expect_err("no QEMU");
        assert!(error.to_string().contains("/nonexistent/qemu"), "{error}");
    }
}
