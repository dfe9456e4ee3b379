//! Parsers against text of QEMU 10.0.2 and Linux 6.18, and against anything.

use super::*;
use proptest::prelude::*;

const RAMBLOCKS: &str = "\
              Block Name    PSize              Offset               Used              Total                HVA  RO
              plover-ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f021bfff000  rw
    /rom@etc/acpi/tables    4 KiB  0x0000000010080000 0x0000000000020000 0x0000000000200000 0x00007f0278c00000  ro
                  pc.rom    4 KiB  0x0000000010040000 0x0000000000020000 0x0000000000020000 0x00007f027a400000  ro
   0000:00:02.0/vga.vram    4 KiB  0x0000000010080000 0x0000000001000000 0x0000000001000000 0x00007f0277c00000  rw
             a name here    2 MiB  0x0000000010080000 0x0000000001000000 0x0000000001000000 0x00007f0277c00000  rw
";

const MAPS: &str = "\
55e0c0000000-55e0c0200000 r--p 00000000 fe:00 1234                       /usr/bin/qemu-system-x86_64
7f021bfff000-7f0223fff000 rw-s 00000000 00:01 33                         /memfd:memory-backend-memfd (deleted)
7f0223fff000-7f022bfff000 rw-s 08000000 00:01 33                         /memfd:memory-backend-memfd (deleted)
7f022bfff000-7f022c000000 ---p 00000000 00:00 0 
7f022c000000-7f022c021000 rw-p 00000000 00:00 0 
7f0230000000-7f0231000000 rw-s 00001000 00:01 34                         /memfd:other (deleted)
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";

const RAM_AT: u64 = 0x7f02_1bff_f000;
const RAM_BYTES: u64 = 256 << 20;

#[test]
fn ramblocks_are_read_with_address_and_protection() {
    let blocks = parse_ramblocks(RAMBLOCKS);
    let names: Vec<_> = blocks.iter().map(|block| block.name.as_str()).collect();
    assert_eq!(names, ["plover-ram", "/rom@etc/acpi/tables", "pc.rom", "0000:00:02.0/vga.vram", "a name here"]);
    assert_eq!(
        blocks[0],
        RamBlock { name: "plover-ram".into(), used_bytes: RAM_BYTES, host_address: RAM_AT, read_only: false }
    );
    let writable: Vec<_> = blocks.iter().map(|block| !block.read_only).collect();
    assert_eq!(writable, [true, false, false, true, true]);
}

#[test]
fn a_split_mapping_is_found_whole() {
    let (file, ranges) = ranges_at(&parse_maps(MAPS), RAM_AT, RAM_BYTES).expect("found");
    assert_eq!(file, FileId { major: 0, minor: 1, inode: 33 });
    assert_eq!(ranges.len(), 2);
    assert_eq!(ranges[1], RamRange { addresses: 0x7f02_23ff_f000..0x7f02_2bff_f000, file_offset: 128 << 20 });
}

#[test]
fn what_is_not_the_whole_shared_file_is_refused() {
    let maps = parse_maps(MAPS);
    let refused = |address, length| ranges_at(&maps, address, length).expect_err("refused");
    assert!(refused(RAM_AT, RAM_BYTES + 4096).contains("private"));
    assert!(refused(RAM_AT + 4096, 4096).contains("from offset"));
    assert!(refused(0x7f02_2c00_0000, 4096).contains("private"));
    assert!(refused(0x7f02_3000_0000, 4096).contains("from offset 0x1000"));
    assert!(refused(0x1000, 4096).contains("nothing"));
    assert!(refused(0x7f02_3100_0000 - 1, 4096).contains("offset"));
    assert!(refused(u64::MAX, 4096).contains("nothing"));
}

#[test]
fn the_file_of_ones_own_mapping_is_opened_for_writing() {
    let memfd = rustix::fs::memfd_create("plover-test", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    rustix::fs::ftruncate(&memfd, 8192).expect("truncate");
    // SAFETY: a new mapping at an address of the kernel's choice; it stays until the test's process ends.
    let address = unsafe {
        let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        rustix::mm::mmap(std::ptr::null_mut(), 8192, protection, rustix::mm::MapFlags::SHARED, &memfd, 0)
    }
    .expect("mmap");
    let pid = std::process::id() as i32;
    let (id, ranges) = find_ranges(pid, address as u64, 8192).expect("found in /proc/self/maps");
    let file = File::from(open_file(pid, id, &ranges).expect("opened"));
    std::os::unix::fs::FileExt::write_all_at(&file, b"hello", 4096).expect("write");
    // SAFETY: the five bytes are inside the mapping, and nobody else writes them now.
    let seen = unsafe { std::slice::from_raw_parts(address.cast::<u8>().add(4096), 5) };
    assert_eq!(seen, b"hello");
}

#[test]
fn backends_are_known_by_either_name() {
    assert!(names_backend("plover-ram", "plover-ram") && names_backend("/objects/m0", "m0"));
    assert!(!names_backend("pc.ram", "plover-ram") && !names_backend("/objects/m0", "m"));
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let text = String::from_utf8_lossy(&bytes);
        parse_ramblocks(&text);
        parse_maps(&text);
    }

    #[test]
    fn text_that_is_nearly_right_never_panics(
        maps in "([0-9a-f]{0,17}-[0-9a-f]{0,17} [rwxps-]{0,4} [0-9a-f]{0,9} [0-9a-f]{0,3}:[0-9a-f]{0,3} [0-9]{0,21} *[a-z/]*\n){0,4}",
        blocks in "([a-z ]{0,6} [0-9]{1,21} [KMG]iB (0x[0-9a-f]{0,17} ){0,5}(ro|rw)?\n){0,4}",
        address in any::<u64>(), length in any::<u64>(),
    ) {
        parse_ramblocks(&blocks);
        let mappings = parse_maps(&maps);
        if let Ok((_, ranges)) = ranges_at(&mappings, address, length) {
            let total: u64 = ranges.iter().map(|range| range.addresses.end - range.addresses.start).sum();
            prop_assert_eq!(total, length);
        }
    }
}
