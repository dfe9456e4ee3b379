//! What a VM has besides its RAM and our network card, and must not have: disks that it can write, because only RAM and
//! device state are made equal; whatever writes guest memory past QEMU's own page tables, because no tracker sees that;
//! and network cards whose frames are neither ordered nor held.
//!
//! Read-only disks are fine as long as the page cache is in between: a read is then a copy by the kernel through QEMU's
//! mapping, which faults like any other write. With O_DIRECT the page faults when the kernel takes hold of it and is
//! written later, by when a harvest of a running guest may have looked at it already. Rejected: asking QEMU whether it
//! would migrate (`query-migrate` lists reasons that do not matter here, such as our own backend's missing log, and
//! not those that do).

use super::Refusal;
use crate::qemu::qmp::{BlockDevice, BlockNode};

/// Devices by the beginning of their type's name, and what is wrong with them.
const REFUSED_DEVICES: [(&str, &str); 11] = [
    ("vfio-", PAST_QEMU),
    ("vhost-", PAST_QEMU),
    ("x-pci-proxy", PAST_QEMU),
    ("scsi-block", PAST_QEMU),
    ("scsi-generic", PAST_QEMU),
    ("virtio-balloon", "it takes pages away from the guest unseen"),
    ("virtio-9p", OUTSIDE),
    ("usb-host", OUTSIDE),
    ("usb-mtp", OUTSIDE),
    ("usb-redir", OUTSIDE),
    ("tpm-", OUTSIDE),
];
const PAST_QEMU: &str = "it writes the guest's memory past QEMU, and no syncvm would carry that over";
const OUTSIDE: &str = "it keeps state outside of QEMU that the other replica does not have";
/// Block drivers that hand the guest's memory to hardware or to another process.
const DIRECT_DRIVERS: [&str; 5] =
    ["nvme", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user", "virtio-blk-vhost-vdpa"];

/// Refuses disks that a syncvm would not make equal, or that it could not follow.
pub fn check_disks(disks: &[BlockDevice], nodes: &[BlockNode]) -> Result<(), Refusal> {
    let writable = disks.iter().filter(|disk| disk.inserted.as_ref().is_some_and(|node| !node.read_only));
    let writable: Vec<String> = writable.map(name).collect();
    if !writable.is_empty() {
        return Err(Refusal::WritableDisks(writable));
    }
    // Below the node that the device sees, each may have its own way to the file.
    let is_direct = |node: &&BlockNode| node.cache.direct || DIRECT_DRIVERS.contains(&node.driver.as_str());
    let direct: Vec<String> = nodes.iter().filter(is_direct).map(|node| node.file.clone()).collect();
    if direct.is_empty() { Ok(()) } else { Err(Refusal::DirectDisks(direct)) }
}

fn name(disk: &BlockDevice) -> String {
    let file = disk.inserted.as_ref().map_or("", |node| &node.file);
    let id = [disk.device.as_str(), disk.qdev.as_deref().unwrap_or_default()].into_iter().find(|id| !id.is_empty());
    format!("{} ({file})", id.unwrap_or("a disk"))
}

/// A line per disk for the comparison of two replicas: whether the contents are equal only the user knows, but a disk that
/// is missing or of another size cannot be the same.
pub fn disk_lines(disks: &[BlockDevice]) -> Vec<String> {
    let line = |disk: &BlockDevice| {
        let node = disk.inserted.as_ref()?;
        let place = disk.qdev.as_deref().unwrap_or(&disk.device);
        Some(format!("disk at {place}: {} bytes, read-only", node.image.virtual_size_bytes))
    };
    let mut lines: Vec<String> = disks.iter().filter_map(line).collect();
    lines.sort();
    lines
}

/// Refuses devices by the text of `info qtree`.
pub fn check_devices(qtree: &str) -> Result<(), Refusal> {
    let types = qtree.lines().filter_map(|line| line.trim_start().strip_prefix("dev: ")?.split(',').next());
    for device in types {
        if let Some((_, why)) = REFUSED_DEVICES.iter().find(|(start, _)| device.starts_with(start)) {
            return Err(Refusal::Device { device: device.to_owned(), why });
        }
    }
    Ok(())
}

/// Refuses network cards other than one on vhost-user, by the text of `info network`.
pub fn check_networks(networks: &str) -> Result<(), Refusal> {
    let kind = |line: &str| line.split(',').find_map(|part| part.strip_prefix("type=").map(str::to_owned));
    let (mut card, mut ours) = ("", None);
    for line in networks.lines() {
        let Some(peer) = line.strip_prefix(" \\ ") else {
            card = line.split(':').next().unwrap_or(line);
            continue;
        };
        let kind = kind(peer).unwrap_or_default();
        // A card with several queues has a line for each.
        if kind != "vhost-user" || *ours.get_or_insert(card) != card {
            return Err(Refusal::Network { card: card.to_owned(), kind });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As QEMU 10.0.2 answers.
    fn disk(device: &str, qdev: &str, read_only: bool) -> BlockDevice {
        let answer = serde_json::json!({
            "device": device, "qdev": qdev, "locked": false, "removable": false, "type": "unknown",
            "inserted": {
                "ro": read_only, "drv": "raw", "node-name": "#block107", "file": "/srv/d.img",
                "image": {"virtual-size": 16_777_216, "filename": "/srv/d.img", "format": "raw"},
                "cache": {"no-flush": false, "direct": false, "writeback": true},
            },
        });
        serde_json::from_value(answer).expect("a disk")
    }

    fn node(driver: &str, direct: bool) -> BlockNode {
        let mut node = disk("d0", "", true).inserted.expect("inserted");
        (node.driver, node.cache.direct) = (driver.to_owned(), direct);
        node
    }

    fn refusal(result: Result<(), Refusal>) -> String {
        result.expect_err("refused").to_string()
    }

    #[test]
    fn a_disk_that_can_be_written_is_refused_and_named() {
        let said = refusal(check_disks(&[disk("d0", "/machine/x", false)], &[]));
        assert!(said.contains("d0 (/srv/d.img)") && said.contains("readonly=on"), "{said}");
        let said = refusal(check_disks(&[disk("", "cd", true), disk("", "/machine/x", false)], &[]));
        assert!(said.contains("/machine/x") && !said.contains("cd ("), "{said}");
    }

    #[test]
    fn read_only_disks_and_empty_drives_are_accepted_unless_they_go_past_the_page_cache() {
        let empty: BlockDevice = serde_json::from_value(serde_json::json!({"device": "", "qdev": "empty"})).unwrap();
        let disks = [disk("d0", "cd", true), empty];
        check_disks(&disks, &[node("raw", false), node("file", false)]).expect("accepted");
        assert_eq!(disk_lines(&disks), ["disk at cd: 16777216 bytes, read-only"]);
        // The child, not what the device sees.
        let said = refusal(check_disks(&disks, &[node("raw", false), node("file", true)]));
        assert!(said.contains("/srv/d.img") && said.contains("cache.direct=off"), "{said}");
        for driver in DIRECT_DRIVERS {
            assert!(matches!(check_disks(&disks, &[node(driver, false)]), Err(Refusal::DirectDisks(_))));
        }
    }

    #[test]
    fn devices_that_no_tracker_follows_are_refused() {
        let accepted = "bus: main-system-bus\n  dev: virtio-net-pci, id \"\"\n    netdev = \"vhost-user\"\n  dev: ide-cd, id \"\"\n";
        check_devices(accepted).expect("accepted");
        let devices = [
            ("vfio-pci", "past QEMU"),
            ("vhost-user-blk-pci", "past QEMU"),
            ("vhost-vsock-pci", "past QEMU"),
            ("scsi-generic", "past QEMU"),
            ("virtio-balloon-pci", "unseen"),
            ("virtio-9p-pci", "outside"),
            ("usb-host", "outside"),
        ];
        for (device, why) in devices {
            let said = refusal(check_devices(&format!("{accepted}      dev: {device}, id \"a\"\n")));
            assert!(said.contains(device) && said.contains(why) && said.contains("remove"), "{said}");
        }
    }

    #[test]
    fn one_card_on_vhost_user_is_accepted_and_no_other() {
        let ours = "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:77:00:32\n \\ plover-net0: index=0,type=vhost-user,status=up\n \\ plover-net0: index=1,type=vhost-user,status=up\n";
        check_networks(ours).expect("accepted");
        // Nobody is behind it, or in front of it.
        let loose = "unused: index=0,type=user,net=10.0.2.0,restrict=off\nnet1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57\n";
        check_networks(&format!("{loose}{ours}")).expect("accepted");
        let user =
            "e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\n \\ u0: index=0,type=user,net=10.0.2.0\n";
        let said = refusal(check_networks(&format!("{ours}{user}")));
        assert!(said.contains("e1000.0") && said.contains("user"), "{said}");
        let second = ours.replace("net0", "net1");
        let said = refusal(check_networks(&format!("{ours}{second}")));
        assert!(said.contains("net1") && said.contains("one network card"), "{said}");
    }
}
