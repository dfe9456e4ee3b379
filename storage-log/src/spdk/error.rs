//! What can go wrong with a device that SPDK drives. Each text names the place and the remedy.

use std::sync::Arc;
use std::time::Duration;

/// Result of this module.
pub type Result<T, E = SpdkError> = std::result::Result<T, E>;

/// Why SPDK or a device of it cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SpdkError {
    /// An option cannot be passed on.
    #[error("SPDK's option {name} is «{value}», but {problem}; correct it in the configuration")]
    BadOption {
        /// Which.
        name: &'static str,
        /// As given.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// DPDK's environment exists once in a process.
    #[error(
        "SPDK was started before in this process, perhaps without success; that works once only, so restart the process"
    )]
    StartedBefore,
    /// DPDK refused.
    #[error(
        "SPDK's environment does not start (error {errno}); its own messages above say why. Usual reasons: too few free \
         hugepages (/proc/meminfo), no rights on them or on /dev/vfio, an IOMMU of less than 48 bits (set the IOVA mode to \
         physical), a DPDK that this SPDK does not know (docs/spdk.md)"
    )]
    Environment {
        /// errno of the failed call.
        errno: i32,
    },
    /// Nothing there, or somebody else has it.
    #[error(
        "no NVMe controller can be attached at PCI address {address}: is it there («lspci -s {address}»), bound to vfio-pci \
         and not used by another process? docs/spdk.md shows how"
    )]
    Attach {
        /// The controller.
        address: Arc<str>,
    },
    /// The controller has other namespaces.
    #[error(
        "controller {address} has no active namespace {namespace}: correct it in the configuration («nvme list-ns» shows them)"
    )]
    NoNamespace {
        /// The controller.
        address: Arc<str>,
        /// The namespace.
        namespace: u32,
    },
    /// A format that the log cannot live on.
    #[error(
        "namespace {namespace} of {address} is formatted with sectors of {sector_bytes} bytes and {metadata_bytes} bytes of \
         metadata; the log needs 512 to 4096 bytes without metadata («nvme format» changes it and erases everything)"
    )]
    Format {
        /// The controller.
        address: Arc<str>,
        /// The namespace.
        namespace: u32,
        /// Of one sector.
        sector_bytes: u64,
        /// Of one sector.
        metadata_bytes: u64,
    },
    /// No hugepage left.
    #[error("no {bytes} bytes of hugepages are left for {purpose}: reserve more (docs/spdk.md) or make it smaller")]
    NoMemory {
        /// What was asked for.
        bytes: usize,
        /// What for.
        purpose: &'static str,
    },
    /// The controller gives no queue.
    #[error(
        "controller {address} gives no I/O queue pair of depth {depth}: another depth may fit, or reset the device"
    )]
    QueuePair {
        /// The controller.
        address: Arc<str>,
        /// Commands.
        depth: u32,
    },
    /// Too many commands in flight: poll, then submit again.
    #[error("all commands of {address} are in flight; try again after the next completion")]
    Busy {
        /// The controller.
        address: Arc<str>,
    },
    /// The driver took no command.
    #[error("{action} on {address} was not accepted (error {errno}): the device may be gone; check it and restart")]
    Submit {
        /// «a write», …
        action: &'static str,
        /// The controller.
        address: Arc<str>,
        /// errno of the failed call.
        errno: i32,
    },
    /// The device answered with an error.
    #[error(
        "{action} on {address} at byte {offset_bytes} failed: NVMe status type {status_type}, code {status_code:#04x}; check \
         the device's health («nvme smart-log» after giving it back to the kernel) and replace it if the error stays"
    )]
    Device {
        /// «a write», …
        action: &'static str,
        /// The controller.
        address: Arc<str>,
        /// Where; 0 for a flush.
        offset_bytes: u64,
        /// NVMe's status code type.
        status_type: u8,
        /// NVMe's status code.
        status_code: u8,
    },
    /// A command or a step took too long.
    #[error("{action} on {address} did not end within {limit:?}: the device hangs; reset or replace it")]
    Timeout {
        /// «a write», «attaching», …
        action: &'static str,
        /// The controller.
        address: Arc<str>,
        /// The limit.
        limit: Duration,
    },
    /// The queue is dead: pulled out, or failed in the driver.
    #[error("controller {address} is gone or failed: check the device; a reset of it or a restart may bring it back")]
    Gone {
        /// The controller.
        address: Arc<str>,
    },
}
