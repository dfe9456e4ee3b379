//! Starts the unpacked QEMU with the unpacked libraries in reach.
//!
//! Compiled statically, because a dynamic launcher (a shell script, say) would itself load what LD_PRELOAD
//! names, and QEMU's agent must be loaded by QEMU alone. The process keeps its id: exec, no child.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

fn library_path(root: &Path) -> String {
    let directories = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
    let mut path: Vec<String> = directories.iter().map(|dir| root.join(dir).display().to_string()).collect();
    path.extend(std::env::var("LD_LIBRARY_PATH").ok().filter(|user| !user.is_empty()));
    path.join(":")
}

fn main() {
    let me: PathBuf = std::env::current_exe().expect("/proc must be mounted");
    let root = me.parent().and_then(Path::parent).expect("the launcher lives in ROOT/bin").join("qemu");
    let mut qemu = Command::new(root.join("usr/bin/qemu-system-x86_64"));
    // QEMU looks for its firmware where Debian installs it, so it must be told.
    for firmware in ["usr/share/qemu", "usr/share/seabios"] {
        qemu.arg("-L").arg(root.join(firmware));
    }
    qemu.args(std::env::args_os().skip(1));
    qemu.env("LD_LIBRARY_PATH", library_path(&root));
    qemu.env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"));
    let error = qemu.exec();
    eprintln!("{}: cannot start {}: {error}; run «cargo xtask setup»", me.display(), root.display());
    exit(127);
}
