//! What cannot be protected is refused, end to end: the daemon or its status says what is wrong and what to do about it.
//!
//! QEMU starts prepared and stopped, so no guest boots here and each case takes well under a second. A QEMU older than 10.0 is
//! left to the unit tests of the preflight check, which feed it samples: there is none to install beside a new one.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use rig::cluster::{DAEMON, VM};
use rig::{Cluster, ClusterOptions, Deadline, Host, Process, Service, Testbed, program, wait_until_every};

const LOOK: Duration = Duration::from_millis(50);
const LIMIT_SECS: u64 = 20;
/// Long enough for a group of two to protect a guest many times over, if it wanted to.
const NEVER: Duration = Duration::from_secs(3);
/// «nobody».
const ANOTHER_USER: u32 = 65_534;

fn cluster(bed: &Testbed) -> Cluster<'_> {
    let programs = program("plover").unwrap().parent().unwrap().to_owned();
    Cluster::new(bed, ClusterOptions::new(Service::Redis, programs)).unwrap()
}

/// QEMU as `plover qemu-args` prints it and the user completes it, with a change: a text for a shell.
fn start_qemu(cluster: &Cluster, host: &Host, from: &str, to: &str, more: &[&str]) -> Process {
    let printed = cluster.plover(host, &["qemu-args", VM]).output().unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert!(from.is_empty() || printed.contains(from), "no {from:?} in:\n{printed}");
    let mut line = format!("exec env {}", printed.replace(from, to).trim());
    let user = cluster.guest().user_args(&cluster.console(host)).unwrap();
    for argument in user.iter().map(String::as_str).chain(more.iter().copied()) {
        line += &format!(" '{argument}'");
    }
    let mut command = Command::new("sh");
    command.args(["-c", &line]);
    host.spawn("qemu-changed", command).unwrap()
}

/// Waits until the status of a host contains all of these texts.
fn wait_said(cluster: &Cluster, host: &Host, texts: &[&str]) -> String {
    let said = || cluster.ask(host, &["status", VM]).unwrap_or_default();
    let what = format!("{texts:?} in the status of {}", host.name());
    wait_until_every(LOOK, Deadline::after_secs(LIMIT_SECS), &what, || {
        let said = said();
        texts.iter().all(|text| said.contains(text)).then_some(said)
    })
    .unwrap_or_else(|error| panic!("{}", cluster.explain(error)))
}

/// A change of the printed command line that makes the guest impossible to protect, and what must be said about it.
struct Refused {
    what: &'static str,
    from: &'static str,
    to: &'static str,
    more: &'static [&'static str],
    said: &'static [&'static str],
}

const REFUSED: [Refused; 11] = [
    Refused {
        what: "machine q35",
        from: "-machine pc,",
        to: "-machine q35,",
        more: &[],
        said: &["pc-q35", "-machine pc"],
    },
    Refused { what: "memory not shared", from: ",share=on", to: ",share=off", more: &[], said: &["share=on"] },
    Refused {
        what: "a writable RAM block outside the memory backend",
        from: "-vga none",
        to: "-vga std",
        more: &[],
        said: &["vga", "-nodefaults -vga none"],
    },
    Refused {
        what: "agent missing",
        from: "LD_PRELOAD=",
        to: "NOT_PRELOADED=",
        more: &[],
        said: &["no agent in QEMU", "LD_PRELOAD"],
    },
    Refused {
        what: "a device that announces itself",
        from: "guest_announce=off",
        to: "guest_announce=on",
        more: &[],
        said: &["guest_announce=off"],
    },
    Refused {
        what: "a trailing description in the device state",
        from: ",suppress-vmdesc=on",
        to: "",
        more: &[],
        said: &["suppress-vmdesc=on"],
    },
    Refused {
        what: "other memory than configured",
        from: "size=268435456B",
        to: "size=134217728B",
        more: &["-m", "128M"],
        said: &["128 MiB", "memory_mib = 256"],
    },
    Refused {
        what: "a disk that the guest can write",
        from: "",
        to: "",
        more: &["-drive", "if=none,id=d0,driver=null-co,size=1M", "-device", "virtio-blk-pci,drive=d0"],
        said: &["d0", "each replica would write its own copy", "readonly=on"],
    },
    Refused {
        what: "a disk that is read past the page cache, below the node that the device sees",
        from: "",
        to: "",
        more: &[
            "-blockdev",
            "driver=raw,node-name=n,read-only=on,file.driver=null-co,file.cache.direct=on",
            "-device",
            "virtio-blk-pci,drive=n",
        ],
        said: &["past the host's page cache", "cache.direct=off"],
    },
    Refused {
        what: "a balloon",
        from: "",
        to: "",
        more: &["-device", "virtio-balloon-pci"],
        said: &["virtio-balloon-pci", "remove its -device"],
    },
    Refused {
        what: "a second network card",
        from: "",
        to: "",
        more: &["-netdev", "user,id=u0", "-device", "virtio-net-pci,id=second,netdev=u0,romfile=,guest_announce=off"],
        said: &["second", "«user»", "one network card"],
    },
];

/// What may be there beside our devices: a disk that nobody writes.
const ACCEPTED: [&str; 4] =
    ["-drive", "if=none,id=d0,driver=null-co,size=1M,readonly=on", "-device", "virtio-blk-pci,drive=d0"];

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn a_qemu_that_cannot_be_protected_is_refused_with_the_remedy() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed);
    let host = bed.host(0);
    cluster.start_daemon(host).unwrap();
    for Refused { what, from, to, more, said } in REFUSED {
        let qemu = start_qemu(&cluster, host, from, to, more);
        let text = wait_said(&cluster, host, said);
        println!("{what}:\n{text}");
        assert!(text.contains("NOT protected"), "{what}: {text}");
        qemu.kill().unwrap();
    }
    // The same daemon takes a QEMU that is right, so none of these refusals was for another reason.
    start_qemu(&cluster, host, "", "", &ACCEPTED);
    wait_said(&cluster, host, &["guest     prepared"]);
}

/// Two hosts with different guests: the group forms, the leader says why nobody can be secondary, and never calls the guest
/// protected.
fn different_guests_are_never_protected(change: impl FnOnce(&Cluster, &Host), said: &[&str]) {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed);
    let (one, two) = (bed.host(0), bed.host(1));
    // The third takes part in the votes only: it has no QEMU.
    for host in bed.hosts() {
        cluster.start_daemon(host).unwrap();
    }
    cluster.start_qemu(one).unwrap();
    change(&cluster, two);
    let leader = cluster.wait_leader(Deadline::after_secs(LIMIT_SECS)).unwrap();
    let text = wait_said(&cluster, leader, said);
    println!("{text}");
    let protected = cluster.wait_protected(Deadline::after(NEVER));
    assert!(protected.is_err(), "two different guests, and yet «protected»");
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn replicas_with_different_ram_are_never_protected() {
    different_guests_are_never_protected(
        |cluster, host| {
            let file = host.directory().join("vms").join(format!("{VM}.toml"));
            let text = std::fs::read_to_string(&file).unwrap();
            std::fs::write(&file, text.replace("memory_mib = 256", "memory_mib = 128")).unwrap();
            host.process(DAEMON).unwrap().kill().unwrap();
            start_qemu(cluster, host, "", "", &["-m", "128M"]);
        },
        &["different RAM size", "h1 has 256 MiB", "h2 has 128 MiB", "the same -m"],
    );
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn replicas_with_different_devices_are_never_protected() {
    different_guests_are_never_protected(
        |cluster, host| {
            start_qemu(cluster, host, "", "", &["-device", "virtio-rng-pci"]);
        },
        &["different device set", "only h2 has", "virtio-rng", "plover qemu-args"],
    );
}

/// Runs `plover` in a host's namespace to its end.
fn run(host: &Host, mut command: Command) -> (Option<i32>, String) {
    let output: Output = host.namespace().run(move || command.output()).unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{}: {said}", output.status);
    (output.status.code(), said)
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn unknown_keys_are_refused_with_file_and_line() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed);
    let host = bed.host(0);
    let node = cluster.config_path(host);
    let vm = host.directory().join("vms").join(format!("{VM}.toml"));
    // Appended to the VM's file it lands in [policy], the last table.
    for (file, key) in [(&node, "hash_wokers"), (&vm, "max_slot")] {
        let right = std::fs::read_to_string(file).unwrap();
        std::fs::write(file, format!("{right}{key} = 1\n")).unwrap();
        for command in [&["run"][..], &["status"], &["qemu-args", VM]] {
            let (code, said) = run(host, cluster.plover(host, command));
            assert_eq!(code, Some(3));
            let name = file.display().to_string();
            assert!(said.contains(&name) && said.contains(key) && said.contains("line"), "{said}");
        }
        std::fs::write(file, right).unwrap();
    }
    assert_eq!(run(host, cluster.plover(host, &["qemu-args", VM])).0, Some(0));
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn sockets_and_ports_in_use_are_refused() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed);
    let host = bed.host(0);
    let socket = host.socket_directory().join("net.sock");
    let first = host
        .spawn(DAEMON, {
            let mut command = cluster.plover(host, &["run"]);
            command.arg("--socket-path").arg(&socket);
            command
        })
        .unwrap();
    first
        .wait_for("its vhost-user socket", Deadline::after_secs(LIMIT_SECS), || socket.exists().then_some(()))
        .unwrap();

    let (code, said) = run(host, cluster.plover(host, &["run"]));
    assert_eq!(code, Some(1));
    assert!(said.contains("another daemon listens there") && said.contains("run_dir"), "{said}");

    // Folders of its own, but the same port.
    let config = second_config(&cluster, host);
    let (code, said) = run(host, plover(&config, &["run"]));
    assert_eq!(code, Some(1));
    assert!(said.contains("listen = ") && said.contains("in use"), "{said}");

    // A daemon of its own in every respect but the socket for QEMU.
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace(":7400\"", ":7499\"")).unwrap();
    let vm = host.directory().join("vms").join(format!("{VM}.toml"));
    let text = std::fs::read_to_string(&vm).unwrap();
    let text = text.replace(&format!("{}:7400", host.ip()), &format!("{}:7499", host.ip()));
    std::fs::write(&vm, text.replace("plv0", "plv1")).unwrap();
    let mut command = plover(&config, &["run"]);
    command.arg("--socket-path").arg(&socket);
    let second = host.spawn("second", command).unwrap();
    let line = second.wait_for_line("is in use by process", Deadline::after_secs(LIMIT_SECS)).unwrap();
    println!("{line}");
    assert!(line.contains(&first.pid().to_string()) && line.contains("another path"), "{line}");
}

fn plover(config: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program("plover").unwrap());
    command.arg("--config").arg(config).args(arguments);
    command
}

/// A copy of a host's `node.toml` with folders of its own for what no two daemons may share.
fn second_config(cluster: &Cluster, host: &Host) -> PathBuf {
    let text = std::fs::read_to_string(cluster.config_path(host)).unwrap();
    let folder = host.socket_directory().join("second");
    let changed: Vec<String> = text
        .lines()
        .map(|line| match line.split_once(" = ") {
            Some((key @ ("run_dir" | "data_dir"), _)) => format!("{key} = {folder:?}"),
            _ => line.to_owned(),
        })
        .collect();
    let path = host.directory().join("second.toml");
    std::fs::write(&path, changed.join("\n")).unwrap();
    path
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn two_nodes_with_one_name_are_refused() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed);
    let two = bed.host(1);
    // What happens when a host is set up from another's files: only the address is its own.
    let config = cluster.config_path(two);
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("name = \"h2\"", "name = \"h1\"")).unwrap();
    for host in bed.hosts() {
        cluster.start_daemon(host).unwrap();
    }
    for host in [bed.host(0), two] {
        let said = ["two nodes must not have one name", "correct `name`"];
        println!("{}", wait_said(&cluster, host, &said));
    }
}

/// A folder that other users may read; it goes at the end.
struct OpenFolder(PathBuf);

impl Drop for OpenFolder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

#[test]
#[ignore = "e2e: run by cargo xtask test"]
fn another_user_than_root_is_refused() {
    let bed = Testbed::new().unwrap();
    let cluster = cluster(&bed);
    let host = bed.host(0);
    let folder = OpenFolder(std::env::temp_dir().join(format!("plover-rig-{}", bed.id())));
    std::fs::create_dir_all(folder.0.join("vms")).unwrap();
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let files: [(PathBuf, &str); 3] = [
        (program("plover").unwrap(), "plover"),
        (cluster.config_path(host), "node.toml"),
        (host.directory().join("vms").join(format!("{VM}.toml")), "vms/guest.toml"),
    ];
    for (from, to) in files {
        std::fs::copy(from, folder.0.join(to)).unwrap();
        open(&folder.0.join(to));
    }
    open(&folder.0);
    open(&folder.0.join("vms"));
    let mut command = Command::new(folder.0.join("plover"));
    command.arg("--config").arg(folder.0.join("node.toml")).arg("run");
    command.uid(ANOTHER_USER).gid(ANOTHER_USER);
    let (code, said) = run(host, command);
    assert_eq!(code, Some(1));
    assert!(said.contains("must run as root") && said.contains("sudo"), "{said}");
}
