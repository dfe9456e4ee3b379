//! Each refusal from facts as QEMU 10.0.2 gives them; against a real QEMU in tests/qemu_side.rs.

use super::*;

fn facts() -> Facts {
    Facts {
        version: Version { major: 10, minor: 0, micro: 2, package: "Debian".into() },
        machine: "pc-i440fx-10.0".into(),
        missing_commands: Vec::new(),
        suppress_vmdesc: true,
        send_configuration: Some(false),
        rtc_clock_vm: true,
        blocks: vec![block("plover-ram", false), block("pc.bios", true), block("/rom@etc/acpi/tables", true)],
        backend: "plover-ram".into(),
        qtree: "  dev: virtio-net-device, id \"\"\n    guest_announce = false\n".into(),
        disks: Vec::new(),
        block_nodes: Vec::new(),
        networks: "net0: index=0,type=nic,model=virtio-net-pci\n \\ plover-net0: index=0,type=vhost-user,status=up\n"
            .into(),
    }
}

fn block(name: &str, read_only: bool) -> RamBlock {
    RamBlock { name: name.into(), used_bytes: 4096, host_address: 4096, read_only }
}

fn refusal(change: impl FnOnce(&mut Facts)) -> String {
    let mut changed = facts();
    change(&mut changed);
    judge(&changed).expect_err("refused").to_string()
}

#[test]
fn a_vm_with_our_arguments_is_accepted() {
    judge(&facts()).expect("accepted");
    let mut by_path = facts();
    by_path.blocks[0].name = "/objects/plover-ram".into();
    judge(&by_path).expect("accepted under the backend's path");
}

#[test]
fn each_refusal_names_its_remedy() {
    let old = refusal(|facts| facts.version = Version { major: 7, minor: 2, micro: 22, package: String::new() });
    assert!(old.contains("7.2.22") && old.contains("backports"), "{old}");
    let before_ten = refusal(|facts| (facts.version.major, facts.version.minor) = (9, 2));
    assert!(before_ten.contains("9.2.2"), "{before_ten}");
    let q35 = refusal(|facts| facts.machine = "pc-q35-10.0".into());
    assert!(q35.contains("pc-q35-10.0") && q35.contains("-machine pc"), "{q35}");
    let vga = refusal(|facts| facts.blocks.push(block("0000:00:02.0/vga.vram", false)));
    assert!(vga.contains("vga.vram") && vga.contains("-nodefaults -vga none"), "{vga}");
    let flash = refusal(|facts| facts.blocks.push(block("system.flash1", false)));
    assert!(flash.contains("system.flash1") && flash.contains("-bios"), "{flash}");
    assert!(refusal(|facts| facts.suppress_vmdesc = false).contains("suppress-vmdesc=on"));
    assert!(refusal(|facts| facts.send_configuration = None).contains("migration.send-configuration=off"));
    assert!(refusal(|facts| facts.send_configuration = Some(true)).contains("migration.send-configuration=off"));
    assert!(
        refusal(|facts| facts.missing_commands = vec!["xen-load-devices-state"]).contains("xen-load-devices-state")
    );
    let announce = refusal(|facts| facts.qtree.push_str("      guest_announce = true\n"));
    assert!(announce.contains("guest_announce=off"), "{announce}");
    let balloon = refusal(|facts| facts.qtree.push_str("  dev: virtio-balloon-pci, id \"\"\n"));
    assert!(balloon.contains("virtio-balloon-pci"), "{balloon}");
    let second = refusal(|facts| facts.networks.push_str("net1: index=0,type=nic\n \\ t0: index=0,type=tap\n"));
    assert!(second.contains("net1") && second.contains("tap"), "{second}");
    assert!(Refusal::AgentMissing.to_string().contains("LD_PRELOAD"));
}

#[test]
fn newer_versions_are_accepted() {
    for (major, minor) in [(10, 1), (11, 0)] {
        let mut newer = facts();
        (newer.version.major, newer.version.minor) = (major, minor);
        judge(&newer).expect("accepted");
    }
}

#[test]
fn privileges_are_read_from_the_status() {
    let with = "Name:\tplover\nCapPrm:\t0000000000000000\nCapEff:\t000001ffffffffff\n";
    let without = "CapEff:\t000001fffff7ffff\nCapPrm:\t000001ffffffffff\n";
    check_privileges(with).expect("root");
    for status in [without, "", "CapEff:\tzz\n"] {
        let refusal = check_privileges(status).expect_err("no CAP_SYS_PTRACE").to_string();
        assert!(refusal.contains("root"), "{refusal}");
    }
}

#[test]
fn globals_are_read_from_the_arguments() {
    let said = |line: &str| send_configuration(&line.split(' ').collect::<Vec<_>>());
    assert_eq!(said("qemu -global migration.send-configuration=off -S"), Some(false));
    assert_eq!(said("qemu --global migration.send-configuration=on"), Some(true));
    assert_eq!(
        said("qemu -global migration.send-configuration=off -global migration.send-configuration=on"),
        Some(true)
    );
    assert_eq!(said("qemu -global driver=migration,property=send-configuration,value=off"), Some(false));
    assert_eq!(said("qemu -name migration.send-configuration=off -global"), None);
}

#[test]
fn a_stream_is_told_by_its_start() {
    check_stream(b"QEVM\0\0\0\x03\x04rest").expect("a device state");
    for other in [&b"QEVM\0\0\0\x02"[..], b"QEV", b""] {
        assert!(matches!(check_stream(other), Err(Refusal::TrialStream(_))));
    }
}

#[test]
fn feature_words_come_in_a_fixed_order() {
    let word = |eax: u64, features: u64| serde_json::json!({"cpuid-register": "EDX", "cpuid-input-eax": eax, "features": features});
    let one = feature_lines(0, &serde_json::json!([word(1, 5), word(7, 0), word(2, 6)]));
    let other = feature_lines(0, &serde_json::json!([word(2, 6), word(1, 5)]));
    assert_eq!(one, other);
    assert_eq!(one, ["cpu 0: cpuid 1 EDX = 0x00000005", "cpu 0: cpuid 2 EDX = 0x00000006"]);
}
