//! Debian's kernel as a plain ELF file, which QEMU starts without a boot loader and without unpacking.
//!
//! Booting bzImage takes more than twice as long under TCG. The generic kernel, not the «cloud» one: both boot
//! equally fast this way, and only the generic one has soft-RoCE and NVMe for what comes later.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::{Part, Setup, guests};

/// Extracts `target/rig/vmlinux` from the unpacked kernel package.
pub fn extract(setup: &Setup) -> Result<()> {
    let image = compressed_image(setup)?;
    let recipe = format!("{} {}", image.display(), guests::RECIPE);
    let what = "unpacking the guest's kernel (2 s)";
    setup.make(&Part { path: "vmlinux", what, recipe }, |work| {
        let bytes = fs::read(&image).with_context(|| format!("cannot read {}", image.display()))?;
        let elf = decompress(payload(&bytes).with_context(|| format!("{} is no bzImage", image.display()))?)?;
        ensure!(elf.starts_with(b"\x7fELF"), "{} does not contain an ELF kernel", image.display());
        Ok(fs::write(work, elf)?)
    })
}

/// The release of the unpacked kernel, which names its modules' directory.
pub fn release(setup: &Setup) -> Result<String> {
    let image = compressed_image(setup)?;
    let name = image.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    Ok(name.trim_start_matches("vmlinuz-").to_owned())
}

fn compressed_image(setup: &Setup) -> Result<PathBuf> {
    let boot = setup.path("guest-root/boot");
    let mut images = fs::read_dir(&boot).with_context(|| format!("cannot read {}", boot.display()))?;
    let found = images.find_map(|entry| {
        let path = entry.ok()?.path();
        path.file_name()?.to_str()?.starts_with("vmlinuz-").then_some(path)
    });
    found.with_context(|| format!("no kernel in {}; run «cargo xtask setup --refresh»", boot.display()))
}

/// The compressed kernel inside a bzImage (Linux Documentation/arch/x86/boot.rst: setup_sects, payload_offset and
/// payload_length), without the 4 bytes of uncompressed size at its end.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    let setup_sectors = *image.get(0x1f1)? as usize;
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    image.get(start..start + word(0x24c)?.checked_sub(4)?)
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>> {
    ensure!(payload.starts_with(b"\xfd7zXZ"), "the kernel is not compressed with xz");
    let mut command = Command::new("xz");
    let mut xz = command.arg("-dc").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start xz")?;
    let mut input = xz.stdin.take().expect("stdin was piped");
    let output = std::thread::scope(|scope| {
        // xz starts to answer before it has read everything.
        scope.spawn(move || input.write_all(payload));
        xz.wait_with_output()
    })?;
    ensure!(output.status.success(), "xz cannot unpack the kernel ({})", output.status);
    Ok(output.stdout)
}

/// The kernel modules of the initramfs, in the order of loading.
pub fn network_modules(setup: &Setup) -> Result<Vec<PathBuf>> {
    let modules = setup.path("guest-root/lib/modules").join(release(setup)?).join("kernel");
    let needed = [
        "drivers/virtio/virtio_ring.ko",
        "drivers/virtio/virtio.ko",
        "drivers/virtio/virtio_pci_legacy_dev.ko",
        "drivers/virtio/virtio_pci_modern_dev.ko",
        "drivers/virtio/virtio_pci.ko",
        "net/core/failover.ko",
        "drivers/net/net_failover.ko",
        "drivers/net/virtio_net.ko",
    ];
    let paths: Vec<PathBuf> = needed.iter().map(|module| modules.join(module)).collect();
    let missing = |path: &&PathBuf| !Path::new(path).exists();
    if let Some(path) = paths.iter().find(missing) {
        anyhow::bail!("{} is missing in Debian's kernel package", path.display());
    }
    Ok(paths)
}
