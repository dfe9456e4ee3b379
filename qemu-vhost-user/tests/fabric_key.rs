//! `plover keygen`, and what `plover run` says about the key before it does anything else.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const VM: &str = r#"memory_mib = 256
mac = "52:54:00:00:00:01"
replicas = [
    { node = "a", address = "127.0.0.1:7400" },
    { node = "b", address = "127.0.0.2:7400" },
    { node = "c", address = "127.0.0.3:7400" },
]
uplink = { tap = "plv0" }
"#;

/// A node's files. Its daemon never gets far: its control socket would be below /dev/null.
struct Node(PathBuf);

impl Node {
    fn new(test: &str, more: &str) -> Node {
        let dir = std::env::temp_dir().join(format!("plover-fabric-key-{test}-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("vms")).unwrap();
        let node = format!("name = \"a\"\nlisten = \"127.0.0.1:7400\"\nrun_dir = \"/dev/null/none\"\n{more}");
        std::fs::write(dir.join("node.toml"), node).unwrap();
        std::fs::write(dir.join("vms/redis.toml"), VM).unwrap();
        Node(dir)
    }

    fn key(&self) -> PathBuf {
        self.0.join("fabric.key")
    }

    /// Exit code and standard error of `plover run`.
    fn run(&self) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plover"));
        let output = command.arg("--config").arg(self.0.join("node.toml")).arg("run").output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Nobody else gets as far as the key: rig/tests/refusals.rs has that.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: plover run starts as root only");
    }
    root
}

fn keygen(path: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_plover")).arg("keygen").arg(path).output().unwrap()
}

#[test]
fn without_a_key_the_daemon_does_not_start_and_says_how_to_make_one() {
    if !is_root() {
        return;
    }
    let node = Node::new("missing", "fabric_key = \"fabric.key\"\n");
    let (code, said) = node.run();
    let path = node.key().display().to_string();
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains(&format!("plover keygen {path}")) && said.contains("insecure = true"), "{said}");
    // What it says works: the next start fails for another reason.
    let made = keygen(&node.key());
    assert!(made.status.success(), "{made:?}");
    assert!(String::from_utf8(made.stdout).unwrap().contains("copy it to the same place on all nodes"));
    let (code, said) = node.run();
    assert_eq!(code, Some(1), "{said}");
    assert!(!said.contains("fabric"), "{said}");
}

#[test]
fn keygen_never_overwrites() {
    let node = Node::new("overwrite", "");
    assert!(keygen(&node.key()).status.success());
    let first = std::fs::read_to_string(node.key()).unwrap();
    assert_eq!(std::fs::metadata(node.key()).unwrap().permissions().mode() & 0o7777, 0o600);
    let again = keygen(&node.key());
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8(again.stderr).unwrap().contains("never overwritten"));
    assert_eq!(std::fs::read_to_string(node.key()).unwrap(), first);
}

#[test]
fn a_key_that_others_can_read_is_refused_with_the_remedy() {
    if !is_root() {
        return;
    }
    let node = Node::new("exposed", "fabric_key = \"fabric.key\"\n");
    assert!(keygen(&node.key()).status.success());
    std::fs::set_permissions(node.key(), std::fs::Permissions::from_mode(0o644)).unwrap();
    let (code, said) = node.run();
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains(&format!("chmod 600 {}", node.key().display())), "{said}");
}

#[test]
fn insecure_needs_no_key_and_warns_at_each_start() {
    if !is_root() {
        return;
    }
    let node = Node::new("insecure", "fabric_key = \"fabric.key\"\ninsecure = true\n");
    for _ in 0..2 {
        let (code, said) = node.run();
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("WARN") && said.contains("insecure = true") && said.contains("plover keygen"), "{said}");
    }
}
