//! What a user can get wrong in the files, and what we answer.

use std::path::{Path, PathBuf};

use dataplane::fabric::Transport;

use super::uplink::FilterAction;
use super::{ConfigError, Mode, NodeConfig, VmConfig};

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

struct Files(PathBuf);

impl Files {
    fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("plover-config-{test}-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("vms")).unwrap();
        Self(dir)
    }
    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn vm_error(test: &str, from: &str, to: &str) -> String {
    let files = Files::new(test);
    assert!(VM.contains(from), "the sample has {from}");
    let path = files.write("redis.toml", &VM.replace(from, to));
    VmConfig::load(&path).expect_err("must be refused").to_string()
}

#[test]
fn a_minimal_pair_of_files_is_enough() {
    let files = Files::new("minimal");
    files.write("vms/redis.toml", VM);
    let node = NodeConfig::load(&files.write("node.toml", NODE)).unwrap();
    let vm = &node.vms["redis"];
    assert_eq!(vm.mac_bytes().unwrap(), [0x52, 0x54, 0, 0, 0, 1]);
    assert_eq!(vm.policy.failure_timeout_ms, 100);
    assert_eq!(node.control_socket(), Path::new("/run/plover/control.sock"));
}

#[test]
fn an_unknown_key_is_refused_with_its_line() {
    let files = Files::new("unknown");
    let path = files.write("node.toml", &format!("{NODE}lissten = 3\n"));
    let text = NodeConfig::load(&path).unwrap_err().to_string();
    assert!(text.contains("node.toml") && text.contains("lissten") && text.contains("line 3"), "{text}");
    let text = vm_error("unknown-vm", "tap = \"plv0\"", "tap = \"plv0\", brigde = \"br0\"");
    assert!(text.contains("brigde") && text.contains("line 8"), "{text}");
}

#[test]
fn a_node_that_is_in_no_replica_list_is_refused() {
    let files = Files::new("stranger");
    files.write("vms/redis.toml", VM);
    let path = files.write("node.toml", &NODE.replace("\"a\"", "\"z\""));
    let text = NodeConfig::load(&path).unwrap_err().to_string();
    assert!(text.contains("\"z\"") && text.contains("redis.toml"), "{text}");
}

#[test]
fn two_replicas_with_one_name_or_address_are_refused() {
    let text = vm_error("twice", "node = \"b\"", "node = \"a\"");
    assert!(text.contains("twice"), "{text}");
    let text = vm_error("address", "127.0.0.2", "127.0.0.1");
    assert!(text.contains("two nodes"), "{text}");
}

#[test]
fn transports_are_known_words_in_order() {
    let files = Files::new("transports");
    let listed = VM.replace("127.0.0.1:7400\" }", "127.0.0.1:7400\", transports = [\"rdma\", \"shm\"] }");
    let vm = VmConfig::load(&files.write("redis.toml", &listed)).unwrap();
    assert_eq!(vm.replicas[0].transports, [Transport::Rdma, Transport::Shm]);
    assert_eq!(vm.replicas[1].transports, []);
    let text = vm_error("transport", "127.0.0.3:7400\" }", "127.0.0.3:7400\", transports = [\"smh\"] }");
    assert!(text.contains("redis.toml") && text.contains("«smh» is no transport") && text.contains("line 6"), "{text}");
}

#[test]
fn values_out_of_range_name_the_field() {
    for (test, from, to, field) in [
        ("mac", "52:54:00:00:00:01", "53:54:00:00:00:01", "mac"),
        ("mem", "memory_mib = 256", "memory_mib = 0", "memory_mib"),
        ("queues", "uplink =", "queue_pairs = 9\nuplink =", "queue_pairs"),
        ("tap", "\"plv0\"", "\"a-name-that-is-too-long\"", "uplink.tap"),
        ("pol", "uplink =", "policy = { failure_timeout_ms = 1 }\nuplink =", "policy.failure_timeout_ms"),
    ] {
        let text = vm_error(test, from, to);
        assert!(text.contains(field), "{text}");
    }
}

#[test]
fn policies_with_a_fixed_interval_have_one_and_vsmr_has_none() {
    let files = Files::new("sync");
    for (policy, passive, interval_us, shown) in [
        ("", false, None, "vsmr"),
        ("sync = \"vsmr\"", false, None, "vsmr"),
        ("sync = \"str\"", false, Some(25_000), "str every 25 ms"),
        ("sync = \"mc\"", true, Some(100_000), "mc every 100 ms"),
        ("sync = \"mc\", interval_ms = 7", true, Some(7_000), "mc every 7 ms"),
    ] {
        let text = VM.replace("uplink =", &format!("policy = {{ {policy} }}\nuplink ="));
        let policy = VmConfig::load(&files.write("redis.toml", &text)).unwrap().policy;
        assert_eq!((policy.sync.is_passive(), policy.interval_us()), (passive, interval_us));
        assert_eq!(policy.describe_sync(), shown);
    }
    for (policy, expected) in [
        ("interval_ms = 25", "policy.interval_ms: means nothing with sync = \"vsmr\""),
        ("sync = \"str\", interval_ms = 0", "policy.interval_ms: is 0"),
        ("sync = \"remus\"", "unknown variant `remus`"),
    ] {
        let text = vm_error("sync-wrong", "uplink =", &format!("policy = {{ {policy} }}\nuplink ="));
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let error = NodeConfig::load(Path::new("/nonexistent/node.toml")).unwrap_err();
    assert!(matches!(error, ConfigError::Unreadable { .. }) && error.to_string().contains("/nonexistent/node.toml"));
}

#[test]
fn an_uplink_has_one_kind_and_only_its_fields() {
    let tap = "uplink = { tap = \"plv0\" }";
    for (test, written, expected) in [
        (
            "kind-tap",
            "uplink = { tap = \"plv0\", interface = \"eth1\" }",
            "uplink.interface: is for kind = \"af_packet\"",
        ),
        ("kind-af", "uplink = { kind = \"af_packet\", tap = \"plv0\" }", "uplink.tap: is for kind = \"tap\""),
        ("kind-none", "uplink = { kind = \"af_packet\" }", "uplink.interface: is missing"),
        ("kind-queues", "uplink = { tap = \"plv0\", queues = 0 }", "uplink.queues: is 0"),
        ("kind-empty", "uplink = {}", "uplink.tap: is missing"),
        ("kind-odd", "uplink = { kind = \"macvtap\" }", "unknown variant `macvtap`"),
        (
            "kind-long",
            "uplink = { kind = \"af_packet\", interface = \"sixteen-bytes-it\" }",
            "uplink.interface: must have",
        ),
    ] {
        let text = vm_error(test, tap, written);
        assert!(text.contains(expected) && text.contains("line 8"), "{text}");
    }
    if !cfg!(feature = "dpdk") {
        let text = vm_error("kind-dpdk", tap, "uplink = { kind = \"dpdk\", port = \"net_null0\" }");
        assert!(text.contains("--features dpdk"), "{text}");
    }
}

#[test]
fn filter_rules_are_read_as_written() {
    let rules = "[uplink]\ntap = \"plv0\"\nfilter_default = \"drop\"\n\
                 [[uplink.filter]]\naction = \"order\"\nethertype = \"arp\"\n\
                 [[uplink.filter]]\naction = \"order\"\nprotocol = \"tcp\"\ndestination_port = [22, \"8000-8100\"]\n\
                 [[uplink.filter]]\naction = \"drop\"\nsource_mac = \"01:00:00:00:00:00/01:00:00:00:00:00\"\nvlan = 7\n";
    let files = Files::new("filter");
    let vm = VmConfig::load(&files.write("redis.toml", &VM.replace("uplink = { tap = \"plv0\" }\n", rules))).unwrap();
    let texts: Vec<&str> = vm.uplink.filter.iter().map(|rule| rule.text.as_str()).collect();
    let last = "drop source_mac=01:00:00:00:00:00/01:00:00:00:00:00 vlan=7";
    assert_eq!(texts, ["order ethertype=arp", "order protocol=tcp destination_port=[22, \"8000-8100\"]", last]);
    let web = &vm.uplink.filter[1].rule.conditions;
    assert_eq!((web.protocol, web.destination_port.as_slice()), (Some(6), &[22..=22, 8000..=8100][..]));
    assert_eq!(vm.uplink.filter[2].rule.conditions.source_mac.unwrap().mask, [1, 0, 0, 0, 0, 0]);
    assert_eq!(vm.uplink.filter_default, FilterAction::Drop);
}

#[test]
fn a_rule_that_cannot_match_is_refused_with_its_line() {
    let tap = "uplink = { tap = \"plv0\" }\n";
    for (at, (written, expected)) in [
        ("protocol = \"icmp\"\ndestination_port = 80", "uplink.filter.protocol: has no ports"),
        ("icmp_type = 8", "uplink.filter.icmp_type: needs protocol"),
        ("ethertype = \"arp\"\nprotocol = \"tcp\"", "uplink.filter.ethertype: only ipv4"),
        ("destination_port = \"90-80\"", "uplink.filter.destination_port: \"90-80\" is no port"),
        ("destination_port = 65536", "uplink.filter.destination_port: 65536 is no port"),
        ("destination_port = []", "uplink.filter.destination_port: is an empty list"),
        ("protocol = \"tpc\"", "uplink.filter.protocol: \"tpc\" is none"),
        ("source_mac = \"52:54:00\"", "uplink.filter.source_mac: \"52:54:00\" is no MAC"),
        ("vlan = 4096", "uplink.filter.vlan: must be"),
        ("prot = 6", "unknown field `prot`"),
    ]
    .into_iter()
    .enumerate()
    {
        let text = vm_error(
            &format!("rule-{at}"),
            tap,
            &format!("[uplink]\ntap = \"plv0\"\n[[uplink.filter]]\naction = \"order\"\n{written}\n"),
        );
        assert!(text.contains(expected) && text.contains("redis.toml"), "{text}");
        // The rule, or the field where the parser itself refuses it.
        assert!(text.contains("line 10") || text.contains("line 12"), "{text}");
    }
}

#[test]
fn an_unreplicated_vm_has_one_node_and_a_replicated_one_three() {
    let files = Files::new("mode");
    let [_, b, c] = ["a", "b", "c"].map(|node| VM.lines().find(|line| line.contains(&format!("\"{node}\""))).unwrap());
    let alone = VM.replace(&format!("{b}\n"), "").replace(&format!("{c}\n"), "");
    let path = files.write("redis.toml", &format!("mode = \"unreplicated\"\n{alone}"));
    assert_eq!(VmConfig::load(&path).unwrap().mode, Mode::Unreplicated);
    let text = VmConfig::load(&files.write("redis.toml", &alone)).unwrap_err().to_string();
    assert!(text.contains("names 1 nodes") && text.contains("unreplicated"), "{text}");
    let text =
        VmConfig::load(&files.write("redis.toml", &format!("mode = \"unreplicated\"\n{VM}"))).unwrap_err().to_string();
    assert!(text.contains("names 3 nodes"), "{text}");
}

#[test]
fn a_core_that_nothing_can_be_pinned_to_is_refused() {
    let files = Files::new("cores");
    files.write("vms/redis.toml", VM);
    for field in ["reactor_cores", "hash_cores"] {
        let text = format!("{NODE}{field} = [0, 1024]\n");
        let text = NodeConfig::load(&files.write("node.toml", &text)).unwrap_err().to_string();
        assert!(text.contains(field) && text.contains("1024"), "{text}");
    }
    let text = format!("{NODE}hash_cores = [5, 1023]\n");
    let node = NodeConfig::load(&files.write("node.toml", &text)).unwrap();
    assert_eq!(node.hash_thread_cores(), [Some(5), Some(1023)]);
    let three = NodeConfig { hash_workers: Some(3), ..node };
    assert_eq!(three.hash_thread_cores(), [Some(5), Some(1023), Some(5)]);
    let free = NodeConfig { hash_cores: Vec::new(), ..three };
    assert_eq!(free.hash_thread_cores(), [None; 3]);
    for (lines, wanted) in [
        ("hash_workers = 257", "asks for 257"),
        ("reactor_cores = [2, 3]\nhash_cores = [4, 3]", "core 3, which is in reactor_cores"),
    ] {
        let text = format!("{NODE}{lines}\n");
        let text = NodeConfig::load(&files.write("node.toml", &text)).unwrap_err().to_string();
        assert!(text.contains(wanted), "{text}");
    }
}
