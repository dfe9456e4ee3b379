//! `plover log check` and `plover log dump` on logs that are whole, torn, in doubt and damaged: what they say, and the exit code.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use consensus::{Entry, HardState, ReplicaId, View};
use dataplane::batch::BatchBuilder;
use storage_log::{BLOCK_BYTES, LegSpec, Options, Record, Ticket, open};

const NODE: &str = "name = \"a\"\nlisten = \"127.0.0.1:7400\"\n";
const VM: &str = r#"memory_mib = 256
mac = "52:54:00:00:00:01"
replicas = [
    { node = "a", address = "127.0.0.1:7400" },
    { node = "b", address = "127.0.0.2:7400" },
    { node = "c", address = "127.0.0.3:7400" },
]
uplink = { tap = "plv0" }
"#;

/// A node with a VM whose log holds one group in block 0 and 1, and one in the blocks 2 to 4, of which
/// the last holds the end of entry 2 and entry 3.
struct Node {
    dir: PathBuf,
    log: LegSpec,
}

impl Node {
    fn new(test: &str) -> Node {
        let dir = std::env::temp_dir().join(format!("plover-log-command-{test}-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("vms")).unwrap();
        std::fs::write(dir.join("node.toml"), format!("{NODE}data_dir = {:?}\n", dir.join("data"))).unwrap();
        std::fs::write(dir.join("vms/redis.toml"), VM).unwrap();
        let node = Node { log: LegSpec::Dir(dir.join("data/redis")), dir };
        node.fill();
        node
    }

    fn fill(&self) {
        let options = Options { segment_bytes: 8 * BLOCK_BYTES as u64, max_bytes: 1 << 20, ..Options::default() };
        let (mut log, _) = open(std::slice::from_ref(&self.log), options).unwrap();
        let mut state = Vec::new();
        HardState { promised: View(3), ..HardState::default() }.encode(&mut state);
        log.append(Record::State(&state)).unwrap();
        let mut batch = BatchBuilder::new(1 << 18);
        batch.push(&[0xab; 60]).unwrap();
        batch.push(&[0xcd; 9000]).unwrap();
        let input = Entry::Input(batch.finish().into());
        let mut put = |index: u64, entry: &Entry, is_last: bool| {
            let mut header = Vec::new();
            entry.encode_header(&mut header);
            let ticket = log.append(Record::Entry { index, view: 3, parts: [&header, entry.payload()] }).unwrap();
            if is_last {
                log.flush();
                assert!(log.wait(ticket, Duration::from_secs(20)), "the disk does not answer");
            }
            ticket
        };
        put(1, &Entry::Noop { leader: ReplicaId(0) }, true);
        put(2, &input, false);
        assert_eq!(put(3, &Entry::SyncVm { with: ReplicaId(1) }, true), Ticket(4));
    }

    fn segment(&self) -> PathBuf {
        self.log.path().join("00000000000000000001.log")
    }

    fn write_over(&self, block: u64, bytes: &[u8]) {
        let file = std::fs::OpenOptions::new().write(true).open(self.segment()).unwrap();
        file.write_all_at(bytes, block * BLOCK_BYTES as u64).unwrap();
    }

    /// Exit code, standard output and standard error of `plover log …`, which must change nothing.
    fn plover_log(&self, arguments: &[&str]) -> (i32, String, String) {
        let before = std::fs::read(self.segment()).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_plover"));
        let output =
            command.arg("--config").arg(self.dir.join("node.toml")).arg("log").args(arguments).output().unwrap();
        assert!(before == std::fs::read(self.segment()).unwrap(), "{arguments:?} changed the log");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().expect("it ends by itself"), text(output.stdout), text(output.stderr))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "«{part}» is missing in:\n{text}");
    }
}

#[test]
fn a_whole_log() {
    let node = Node::new("whole");
    let (code, text, _) = node.plover_log(&["check", "redis"]);
    let copy = format!("copy      {}: complete", node.log.path().display());
    assert_has(&text, &[&copy, "segment   1: 5 blocks in ", "state     promised v3, ", "entries   1 to 3, 4 records"]);
    assert!(code == 0 && text.ends_with("whole\n"), "{code}: {text}");
    let (code, text, _) = node.plover_log(&["dump", "redis"]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(code == 0 && lines.len() == 4, "{code}: {text}");
    for (line, what) in lines.iter().zip(["state: promised v3", "1 v3: Noop(", "2 v3: Input(", "3 v3: SyncVm("]) {
        assert_has(line, &[what]);
    }
    let (code, text, _) = node.plover_log(&["dump", "redis", "--frames"]);
    assert_eq!((code, text.lines().count()), (0, 6), "{text}");
    assert_has(&text, &[&"ab".repeat(60), &"cd".repeat(9000)]);
}

#[test]
fn a_torn_log_is_whole_without_its_end() {
    let node = Node::new("torn");
    node.write_over(3, &[0; BLOCK_BYTES]);
    let (code, text, _) = node.plover_log(&["check", "redis"]);
    assert_has(
        &text,
        &["segment   1: 3 blocks", "entries   1 to 1, 2 records", "was cut short and counts for nothing"],
    );
    assert!(code == 0 && text.ends_with("whole\n"), "{code}: {text}");
    let (code, text, _) = node.plover_log(&["dump", "redis"]);
    assert_eq!((code, text.lines().count()), (0, 2), "{text}");
}

#[test]
fn a_log_in_doubt_has_an_exit_code_of_its_own() {
    let node = Node::new("doubt");
    node.write_over(4, &[0x55; 100]);
    let (code, text, _) = node.plover_log(&["check", "redis"]);
    assert_has(&text, &["IN DOUBT  the last records may be lost", "entries   1 to 1, 2 records"]);
    assert!(code == 5 && !text.contains("whole"), "{code}: {text}");
    let (code, text, _) = node.plover_log(&["dump", "redis"]);
    assert_eq!((code, text.lines().count()), (0, 2), "{text}");
}

#[test]
fn a_damaged_log_is_refused_with_the_place_and_the_remedy() {
    let node = Node::new("damaged");
    node.write_over(1, &[0x55; 100]);
    for what in ["check", "dump"] {
        let (code, text, error) = node.plover_log(&[what, "redis"]);
        let place = format!("{} is damaged at byte 4096", node.segment().display());
        assert_has(&error, &[&place, "let the replica join anew"]);
        assert!(code == 1 && text.is_empty(), "{code}: {text}");
    }
}

#[test]
fn a_log_in_use_and_one_that_is_not_there() {
    let node = Node::new("in-use");
    let options = Options { segment_bytes: 8 * BLOCK_BYTES as u64, max_bytes: 1 << 20, ..Options::default() };
    let held = open(std::slice::from_ref(&node.log), options).unwrap();
    let (code, _, error) = node.plover_log(&["check", "redis"]);
    assert_has(&error, &["is in use by another process"]);
    assert_eq!(code, 1);
    drop(held);
    let away = Path::new(node.log.path()).with_extension("away");
    std::fs::rename(node.log.path(), &away).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_plover"));
    let output =
        command.arg("--config").arg(node.dir.join("node.toml")).args(["log", "check", "redis"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(!node.log.path().exists(), "looking makes no log");
}
