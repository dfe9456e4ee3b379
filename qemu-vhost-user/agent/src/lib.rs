//! Library preloaded into QEMU.
