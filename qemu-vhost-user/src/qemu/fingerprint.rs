//! What must be equal on two replicas of one VM, so that a guest can move between their QEMUs.

use serde::{Deserialize, Serialize};

use super::device_set::DeviceSet;
use super::qmp::Version;

/// How many differing lines a message shows.
const SHOWN_LINES: usize = 8;

/// A replica's QEMU as far as it must equal the other's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Name of the replica (its node); names it in messages, is not compared.
    pub replica: String,
    /// QEMU's version with the distribution's package: firmware comes from there too.
    pub qemu_version: Version,
    /// Machine type with its version: `pc-i440fx-10.0`.
    pub machine: String,
    /// Size of the guest's RAM.
    pub ram_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The guest's devices, CPUs and kernel command line.
    pub devices: DeviceSet,
    /// What does not prevent protection but makes it slower; for the log, not compared.
    pub warnings: Vec<String>,
}

/// A simple property of a [`Fingerprint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Property {
    /// QEMU's version and package.
    Qemu,
    /// The machine type.
    Machine,
    /// The size of the guest's RAM.
    RamSize,
    /// The number of vCPUs.
    Vcpus,
    /// KVM or TCG.
    Accelerator,
}

impl Property {
    const ALL: [Property; 5] = {
        use Property::{Accelerator, Machine, Qemu, RamSize, Vcpus};
        [Qemu, Machine, RamSize, Vcpus, Accelerator]
    };

    fn name(self) -> &'static str {
        match self {
            Property::Qemu => "QEMU",
            Property::Machine => "machine type",
            Property::RamSize => "RAM size",
            Property::Vcpus => "number of vCPUs",
            Property::Accelerator => "accelerator",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Property::Qemu => "install the same QEMU package on both hosts and restart the VM's QEMU there",
            Property::Machine => "give both QEMUs the same versioned -machine",
            Property::RamSize => "give both QEMUs the same -m",
            Property::Vcpus => "give both QEMUs the same -smp",
            Property::Accelerator => "give both QEMUs the same -accel; kvm needs /dev/kvm on both hosts",
        }
    }

    fn of(self, fingerprint: &Fingerprint) -> String {
        match self {
            Property::Qemu => fingerprint.qemu_version.to_string(),
            Property::Machine => fingerprint.machine.clone(),
            Property::RamSize => bytes(fingerprint.ram_bytes),
            Property::Vcpus => fingerprint.vcpus.to_string(),
            Property::Accelerator => fingerprint.accelerator.clone(),
        }
    }
}

/// Why a guest cannot move between two replicas.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// A simple property differs.
    #[error("different {}: {a} has {a_value}, {b} has {b_value}; {}", .property.name(), .property.remedy())]
    Property {
        /// Which property.
        property: Property,
        /// One replica.
        a: String,
        /// Its value.
        a_value: String,
        /// The other replica.
        b: String,
        /// Its value.
        b_value: String,
    },
    /// Different devices.
    #[error("different device set: {}; start both QEMUs with the same arguments (`plover qemu-args`)", describe(.only))]
    Devices {
        /// For each replica that has lines of its own: its name and these lines.
        only: Vec<(String, Vec<String>)>,
    },
}

fn describe(only: &[(String, Vec<String>)]) -> String {
    let sides = only.iter().map(|(replica, lines)| {
        let shown = lines.iter().take(SHOWN_LINES).map(|line| format!("«{line}»")).collect::<Vec<_>>().join(", ");
        let rest = lines.len().saturating_sub(SHOWN_LINES);
        let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
        format!("only {replica} has {shown}{more}")
    });
    sides.collect::<Vec<_>>().join("; ")
}

/// Whether a guest can move between the two replicas.
///
/// # Errors
/// The first difference, with its remedy.
pub fn compare(mine: &Fingerprint, theirs: &Fingerprint) -> Result<(), Mismatch> {
    for property in Property::ALL {
        let (a_value, b_value) = (property.of(mine), property.of(theirs));
        if a_value != b_value {
            let (a, b) = (mine.replica.clone(), theirs.replica.clone());
            return Err(Mismatch::Property { property, a, a_value, b, b_value });
        }
    }
    compare_devices(mine, theirs)
}

fn compare_devices(mine: &Fingerprint, theirs: &Fingerprint) -> Result<(), Mismatch> {
    if mine.devices.text == theirs.devices.text {
        return Ok(());
    }
    let mut only = vec![
        (mine.replica.clone(), mine.devices.lines_missing_in(&theirs.devices)),
        (theirs.replica.clone(), theirs.devices.lines_missing_in(&mine.devices)),
    ];
    only.retain(|(_, lines)| !lines.is_empty());
    if only.is_empty() {
        only.push((mine.replica.clone(), vec!["the same devices in another order".into()]));
    }
    Err(Mismatch::Devices { only })
}

fn bytes(count: u64) -> String {
    if count.is_multiple_of(1 << 20) { format!("{} MiB", count >> 20) } else { format!("{count} bytes") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(replica: &str) -> Fingerprint {
        Fingerprint {
            replica: replica.into(),
            qemu_version: Version { major: 10, minor: 0, micro: 2, package: "Debian".into() },
            machine: "pc-i440fx-10.0".into(),
            ram_bytes: 256 << 20,
            vcpus: 1,
            accelerator: "tcg".into(),
            devices: DeviceSet::from_qtree(&[], "dev: virtio-net-pci, id \"\"\n  mac = \"52:54\"\n"),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn equal_replicas_match_whatever_their_names_and_warnings() {
        let other = Fingerprint { warnings: vec!["slow".into()], ..fingerprint("b") };
        assert_eq!(compare(&fingerprint("a"), &other), Ok(()));
    }

    #[test]
    fn a_fingerprint_survives_the_wire() {
        let mine = fingerprint("a");
        let text = serde_json::to_string(&mine).expect("to JSON");
        assert_eq!(serde_json::from_str::<Fingerprint>(&text).expect("from JSON"), mine);
    }

    #[test]
    fn each_difference_names_both_sides_and_the_remedy() {
        let mine = fingerprint("a");
        let message = |change: fn(&mut Fingerprint)| {
            let mut theirs = fingerprint("b");
            change(&mut theirs);
            compare(&mine, &theirs).expect_err("they differ").to_string()
        };
        assert_eq!(
            message(|theirs| theirs.ram_bytes *= 2),
            "different RAM size: a has 256 MiB, b has 512 MiB; give both QEMUs the same -m"
        );
        assert!(message(|theirs| theirs.qemu_version.micro = 3).contains("b has 10.0.3 (Debian)"));
        assert!(message(|theirs| theirs.machine = "pc-i440fx-9.2".into()).contains("machine type"));
        assert!(message(|theirs| theirs.vcpus = 2).contains("-smp"));
        assert!(message(|theirs| theirs.accelerator = "kvm".into()).contains("-accel"));
        let devices = message(|theirs| {
            theirs.devices =
                DeviceSet::from_qtree(&[], "dev: virtio-net-pci, id \"\"\n  mac = \"52:54\"\ndev: e1000, id \"\"\n");
        });
        assert!(devices.starts_with("different device set: only b has «dev: e1000, id \"\"»; start both"), "{devices}");
    }
}
