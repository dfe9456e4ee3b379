//! Where the guest's RAM is: which part of QEMU's address space, and the file behind it.
//!
//! The monitor says at which address of its own QEMU holds the RAM block (`info ramblock`), /proc/PID/maps says which
//! file is mapped there, and the descriptor comes from QEMU's own through /proc/PID/fd. Rejected: guessing the mapping
//! by its size (another backend may have the same), taking the descriptor from vhost-user's SET_MEM_TABLE (arrives
//! only when the guest's driver starts, and says nothing about QEMU's addresses).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::qemu::qmp::{Qmp, QmpError};

/// The guest's RAM.
#[derive(Debug)]
pub struct RamInfo {
    /// Process id of QEMU.
    pub qemu_pid: i32,
    /// Id of the memory backend.
    pub backend: String,
    /// The file that holds the RAM, opened for reading and writing; the RAM starts at its offset 0.
    pub file: OwnedFd,
    /// Length of the RAM.
    pub length_bytes: u64,
    /// Where QEMU maps it: in file order, without gaps, together `length_bytes`. More than one if something (a
    /// partial madvise or userfaultfd registration) split the mapping.
    pub ranges: Vec<RamRange>,
    /// st_dev of the file.
    pub device: u64,
    /// st_ino of the file.
    pub inode: u64,
    /// Page size of the file: 4096, or that of its huge pages.
    pub page_bytes: u64,
}

/// A piece of QEMU's mapping of the RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Addresses in QEMU's address space.
    pub addresses: Range<u64>,
    /// Offset in the file that `addresses.start` maps.
    pub file_offset: u64,
}

/// Why the RAM cannot be found or shared.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// RAM without a backend that the user named.
    #[error(
        "the guest's RAM is not in a memory backend: start QEMU with -object memory-backend-memfd,id=plover-ram,size=…,share=on -machine pc,memory-backend=plover-ram"
    )]
    NoBackend,
    /// More than one backend holds RAM.
    #[error(
        "the guest's RAM lies in several memory backends ({0}): give it one (-machine memory-backend=ID, no -numa memdev, no pc-dimm)"
    )]
    SeveralBackends(String),
    /// The backend is private to QEMU.
    #[error("the memory backend «{0}» is not shared: add share=on to its -object")]
    NotShared(String),
    /// `info ramblock` does not list the backend.
    #[error(
        "QEMU's `info ramblock` does not list the memory backend «{0}»; is this a build that prints it in another form?"
    )]
    NoBlock(String),
    /// /proc says something else than the monitor.
    #[error(
        "in QEMU's process {pid} no shared file of {length_bytes} bytes is mapped at {address:#x}: {found}; is the backend memory-backend-memfd or -file with share=on, and is {pid} QEMU's process?"
    )]
    NoMapping {
        /// The process.
        pid: i32,
        /// Where it should be.
        address: u64,
        /// How long it should be.
        length_bytes: u64,
        /// What is there.
        found: String,
    },
    /// /proc cannot be read.
    #[error("cannot read {}: {source}; plover must run as root or with CAP_SYS_PTRACE", path.display())]
    Proc {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No descriptor of QEMU's leads to the file.
    #[error(
        "cannot open the file behind the RAM of QEMU's process {pid}: {source}; plover must run as root or with CAP_SYS_PTRACE"
    )]
    Open {
        /// The process.
        pid: i32,
        /// Why not.
        source: io::Error,
    },
}

/// Finds the RAM of the QEMU behind `qmp`.
///
/// # Errors
/// See [`RamError`]; each names its remedy.
pub fn locate(qmp: &mut Qmp) -> Result<RamInfo, RamError> {
    let qemu_pid = qmp.peer_pid()?;
    let length_bytes = qmp.query_memory_size()?;
    let backend = machine_backend(qmp, length_bytes)?;
    let blocks = parse_ramblocks(&qmp.hmp("info ramblock")?);
    let block = blocks
        .into_iter()
        .find(|block| names_backend(&block.name, &backend))
        .ok_or_else(|| RamError::NoBlock(backend.clone()))?;
    let (file_id, ranges) = find_ranges(qemu_pid, block.host_address, length_bytes)?;
    let file = open_file(qemu_pid, file_id, &ranges)?;
    let page_bytes = rustix::fs::fstatfs(&file).map(|found| found.f_bsize as u64);
    let page_bytes = page_bytes.map_err(|errno| RamError::Open { pid: qemu_pid, source: errno.into() })?;
    let metadata = File::from(file);
    let (device, inode) = metadata
        .metadata()
        .map(|metadata| (metadata.dev(), metadata.ino()))
        .map_err(|source| RamError::Open { pid: qemu_pid, source })?;
    Ok(RamInfo { qemu_pid, backend, file: metadata.into(), length_bytes, ranges, device, inode, page_bytes })
}

/// The backend of the machine's RAM. QEMU shows one also if the user named none (then without id).
fn machine_backend(qmp: &mut Qmp, length_bytes: u64) -> Result<String, RamError> {
    let backends = qmp.query_memory_backends()?;
    let wanted: String = qmp.qom_get("/machine", "memory-backend")?;
    let wanted = wanted.rsplit('/').next().unwrap_or("").to_owned();
    if backends.len() > 1 {
        let names: Vec<_> =
            backends.iter().map(|backend| backend.id.clone().unwrap_or_else(|| "unnamed".into())).collect();
        return Err(RamError::SeveralBackends(names.join(", ")));
    }
    let backend = backends
        .into_iter()
        .find(|backend| backend.id.as_ref() == Some(&wanted) && backend.size_bytes == length_bytes)
        .ok_or(RamError::NoBackend)?;
    if backend.share { Ok(wanted) } else { Err(RamError::NotShared(wanted)) }
}

/// Old machine types name the block by the backend's path.
fn names_backend(block: &str, backend: &str) -> bool {
    block == backend || block.strip_prefix("/objects/") == Some(backend)
}

/// One line of `info ramblock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlock {
    /// QEMU's name for it.
    pub name: String,
    /// How much of it is in use.
    pub used_bytes: u64,
    /// Where it is in QEMU's address space.
    pub host_address: u64,
    /// The guest cannot write it.
    pub read_only: bool,
}

/// Reads the text of `info ramblock` (QEMU ≥ 8.2, which has the columns HVA and RO). Lines of another form are skipped; names may
/// contain blanks, so that a line is read from its end.
pub fn parse_ramblocks(text: &str) -> Vec<RamBlock> {
    text.lines().filter_map(parse_ramblock).collect()
}

fn parse_ramblock(line: &str) -> Option<RamBlock> {
    // NAME  PSIZE UNIT  OFFSET  USED  TOTAL  HVA  ro|rw
    let mut fields = line.split_ascii_whitespace().rev();
    let read_only = match fields.next()? {
        "ro" => true,
        "rw" => false,
        _ => return None,
    };
    let mut number = || parse_hex(fields.next()?);
    let host_address = number()?;
    let _total = number()?;
    let used_bytes = number()?;
    let _offset = number()?;
    let _page_unit = fields.next()?;
    let _page_size = fields.next()?.parse::<u64>().ok()?;
    let mut name: Vec<&str> = fields.collect();
    name.reverse();
    (!name.is_empty()).then(|| RamBlock { name: name.join(" "), used_bytes, host_address, read_only })
}

fn parse_hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// A file as /proc/PID/maps names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId {
    major: u32,
    minor: u32,
    inode: u64,
}

/// One line of /proc/PID/maps.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mapping {
    addresses: Range<u64>,
    shared: bool,
    file_offset: u64,
    file: FileId,
    path: String,
}

fn parse_maps(text: &str) -> Vec<Mapping> {
    text.lines().filter_map(parse_mapping).collect()
}

/// `7f1c00000000-7f1c10000000 rw-s 00000000 00:01 1029   /memfd:memory-backend-memfd (deleted)`
fn parse_mapping(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = fields.next()?.split_once('-')?;
    let addresses = hex(start)?..hex(end)?;
    let shared = fields.next()?.as_bytes().get(3) == Some(&b's');
    let file_offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let file = FileId {
        major: u32::from_str_radix(major, 16).ok()?,
        minor: u32::from_str_radix(minor, 16).ok()?,
        inode: fields.next()?.parse().ok()?,
    };
    let path = fields.next().unwrap_or("").trim_start().to_owned();
    (addresses.start < addresses.end).then_some(Mapping { addresses, shared, file_offset, file, path })
}

fn find_ranges(pid: i32, address: u64, length_bytes: u64) -> Result<(FileId, Vec<RamRange>), RamError> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    // Paths in it need not be UTF-8.
    let text = std::fs::read(&path).map_err(|source| RamError::Proc { path, source })?;
    ranges_at(&parse_maps(&String::from_utf8_lossy(&text)), address, length_bytes)
        .map_err(|found| RamError::NoMapping { pid, address, length_bytes, found })
}

/// The mappings that together hold offset 0 to `length_bytes` of one shared file from `address` on; otherwise what is
/// there instead.
fn ranges_at(mappings: &[Mapping], address: u64, length_bytes: u64) -> Result<(FileId, Vec<RamRange>), String> {
    let covers = |mapping: &&Mapping, at: u64| mapping.addresses.contains(&at);
    let first = mappings.iter().find(|mapping| covers(mapping, address)).ok_or("nothing is mapped there")?;
    let mut ranges = Vec::new();
    let mut done = 0;
    while done < length_bytes {
        let at = address.checked_add(done).ok_or("its addresses wrap around")?;
        let Some(mapping) = mappings.iter().find(|mapping| covers(mapping, at)) else {
            return Err(format!("the mapping ends after {done} bytes"));
        };
        if !mapping.shared || mapping.file != first.file || mapping.file.inode == 0 {
            return Err(format!(
                "at {at:#x} there is {} memory «{}»",
                if mapping.shared { "shared" } else { "private" },
                mapping.path
            ));
        }
        if at != mapping.addresses.start || mapping.file_offset != done {
            return Err(format!("at {at:#x} «{}» is mapped from offset {:#x}", mapping.path, mapping.file_offset));
        }
        let length = (mapping.addresses.end - at).min(length_bytes - done);
        ranges.push(RamRange { addresses: at..at + length, file_offset: done });
        done += length;
    }
    Ok((first.file, ranges))
}

/// Opens the file through one of QEMU's own descriptors; through the mapping if QEMU closed it.
fn open_file(pid: i32, wanted: FileId, ranges: &[RamRange]) -> Result<OwnedFd, RamError> {
    let directory = PathBuf::from(format!("/proc/{pid}/fd"));
    let entries = std::fs::read_dir(&directory).map_err(|source| RamError::Proc { path: directory.clone(), source })?;
    let descriptors = entries.flatten().map(|entry| entry.path());
    let mapped = ranges.first().map(|range| {
        let Range { start, end } = range.addresses;
        PathBuf::from(format!("/proc/{pid}/map_files/{start:x}-{end:x}"))
    });
    let mut last_error = io::Error::from(io::ErrorKind::NotFound);
    for path in descriptors.chain(mapped) {
        // Descriptors may go while we look; only the wanted one matters.
        let same = std::fs::metadata(&path).is_ok_and(|found| is_file(&found, wanted));
        if !same {
            continue;
        }
        match File::options().read(true).write(true).open(&path) {
            Ok(file) if file.metadata().is_ok_and(|found| is_file(&found, wanted)) => {
                return Ok(file.into());
            }
            Ok(_) => {}
            Err(error) => last_error = error,
        }
    }
    Err(RamError::Open { pid, source: last_error })
}

fn is_file(metadata: &std::fs::Metadata, wanted: FileId) -> bool {
    metadata.is_file()
        && metadata.ino() == wanted.inode
        && rustix::fs::major(metadata.dev()) == wanted.major
        && rustix::fs::minor(metadata.dev()) == wanted.minor
}

impl RamInfo {
    /// Another descriptor of the RAM's file.
    ///
    /// # Errors
    /// If this process may have no more descriptors.
    pub fn clone_file(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }
}

#[cfg(test)]
mod tests;
