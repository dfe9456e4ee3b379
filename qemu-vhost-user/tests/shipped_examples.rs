//! The files in `dist/` and the tables in `docs/configuration.md` say what the code does: they load, the defaults that
//! they show are the code's, and no field is missing from them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use qemu_vhost_user::config::{NodeConfig, VmConfig};

/// Name of the shipped VM file.
const VM: &str = "example";
/// Fields that the code fills in and a file does not have.
const NOT_IN_FILES: [&str; 4] = ["vms", "path", "name", "policy"];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_owned()
}

fn text_of(relative: &str) -> String {
    let path = repository().join(relative);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A commented setting (`#key = value`, no blank after the `#`) becomes a setting; prose (`# like this`) stays.
fn with_defaults_written_out(text: &str) -> String {
    let is_setting = |line: &str| {
        line.strip_prefix('#')
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()) && rest.contains(" = "))
    };
    text.lines()
        .map(|line| if is_setting(line) { &line[1..] } else { line })
        .fold(String::new(), |all, line| all + line + "\n")
}

fn load_written_out() -> NodeConfig {
    // Tests of one process may run side by side.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("plover-examples-{}-{count}", std::process::id()));
    std::fs::create_dir_all(dir.join("vms")).expect("a folder for the test");
    for file in ["node.toml", "vms/example.toml"] {
        std::fs::write(dir.join(file), with_defaults_written_out(&text_of(&format!("dist/{file}")))).expect("written");
    }
    let loaded = NodeConfig::load(&dir.join("node.toml"));
    std::fs::remove_dir_all(&dir).expect("removed");
    loaded.unwrap_or_else(|error| panic!("with every default written out: {error}"))
}

fn load_shipped() -> NodeConfig {
    NodeConfig::load(&repository().join("dist/node.toml")).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn the_shipped_files_load() {
    let node = load_shipped();
    assert_eq!(node.vms.keys().collect::<Vec<_>>(), [VM]);
    let vm = &node.vms[VM];
    assert_eq!(vm.replicas[0].node, node.name, "the example's node is its first replica");
    assert_eq!(vm.replicas[0].address, node.listen, "at the address on which it listens");
}

#[test]
fn the_defaults_that_the_files_show_are_those_of_the_code() {
    let (shipped, written_out) = (load_shipped(), load_written_out());
    let node_part = |node: &NodeConfig| {
        let NodeConfig {
            vms_dir,
            run_dir,
            data_dir,
            qemu,
            reactor_cores,
            hash_cores,
            scheduling,
            log_max_mib,
            debug_hooks,
            ..
        } = node;
        let NodeConfig { dpdk_memory_mib, dpdk_arguments, .. } = node;
        let NodeConfig { log_mirrors, log_devices, log_segment_mib, idle, fabric_key, insecure, hugepages, .. } = node;
        format!(
            "{vms_dir:?} {run_dir:?} {data_dir:?} {qemu:?} {reactor_cores:?} {hash_cores:?} {scheduling:?} {log_max_mib} {debug_hooks} \
             {log_mirrors:?} {log_devices:?} {log_segment_mib} {idle:?} {fabric_key:?} {insecure} {hugepages:?} \
             {dpdk_memory_mib} {dpdk_arguments:?}"
        )
    };
    assert_eq!(node_part(&shipped), node_part(&written_out));
    let vm_part =
        |vm: &VmConfig| format!("{:?} {:?} {:?} {:?}", vm.mode, vm.memory_backend, vm.vhost_user_server, vm.policy);
    assert_eq!(vm_part(&shipped.vms[VM]), vm_part(&written_out.vms[VM]));
    // The defaults of these are computed: the files show where they lead.
    let (vm, dir) = (&written_out.vms[VM], written_out.vm_run_dir(VM));
    assert_eq!(vm.vhost_user_socket, Some(dir.join("vhost.sock")));
    assert_eq!(vm.qmp_socket, Some(dir.join("qmp.sock")));
    assert_eq!(vm.agent_socket, Some(dir.join("agent.sock")));
    assert!(written_out.agent_library.is_some() && written_out.hash_workers.is_some() && written_out.spin_us.is_some());
    assert!(written_out.numa_node.is_some());
}

/// Names of all fields of a value, from its pretty debug form: `    name: value,`.
fn fields(debug: &str) -> Vec<String> {
    let mut names: Vec<String> = debug
        .lines()
        .filter_map(|line| line.trim_start().split_once(": "))
        .map(|(name, _)| name.to_owned())
        .filter(|name| {
            name.chars().all(|c| c.is_ascii_lowercase() || c == '_') && !NOT_IN_FILES.contains(&name.as_str())
        })
        .collect();
    names.sort();
    names.dedup();
    names
}

#[test]
fn every_field_is_in_the_example_and_in_the_reference() {
    let mut node = load_written_out();
    let vm = node.vms.remove(VM).expect("the example");
    let reference = text_of("docs/configuration.md");
    for (file, debug, some_field) in [
        ("dist/node.toml", format!("{node:#?}"), "log_max_mib"),
        ("dist/vms/example.toml", format!("{vm:#?}"), "failure_timeout_ms"),
    ] {
        let (text, fields) = (text_of(file), fields(&debug));
        assert!(fields.iter().any(|field| field == some_field), "the fields are found: {fields:?}");
        for field in fields {
            let is_set = text.contains(&format!("{field} = ")) || text.contains(&format!("[{field}]"));
            assert!(is_set, "{file} does not show {field}");
            assert!(reference.contains(&format!("`{field}`")), "docs/configuration.md does not explain {field}");
        }
    }
}

#[test]
fn the_discovery_file_describes_this_backend() {
    let discovery: serde_json::Value = serde_json::from_str(&text_of("dist/50-plover.json")).expect("JSON");
    let capabilities: serde_json::Value =
        serde_json::from_str(&qemu_vhost_user::device::capabilities_json()).expect("JSON");
    assert_eq!(discovery["type"], capabilities["type"]);
    let binary = discovery["binary"].as_str().expect("a path");
    for unit in ["dist/systemd/plover.service", "dist/systemd/plover-vm@.service"] {
        assert!(text_of(unit).contains(&format!("ExecStart={binary} ")), "{unit} starts another program than {binary}");
    }
}
