//! Writes initramfs archives (cpio «newc») directly.
//!
//! The cpio program would need real device nodes on disk, and thus root, and one more package. Files get owner
//! root and time 0, so the same input gives the same bytes.

use std::io::{self, Write};
use std::path::Path;

const REGULAR: u32 = 0o100_000;
const DIRECTORY: u32 = 0o040_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
/// Another archive can be appended to a file that ends at a multiple of this.
const ALIGNMENT_BYTES: usize = 4;

/// An archive that is being written; paths are absolute in the guest.
pub struct Archive<W: Write> {
    out: W,
    next_inode: u32,
    directories: Vec<String>,
}

impl<W: Write> Archive<W> {
    /// Starts an archive with a console, which the kernel needs before /dev is mounted.
    ///
    /// # Errors
    /// The writer's, as everywhere here.
    pub fn new(out: W) -> io::Result<Self> {
        let mut archive = Self { out, next_inode: 1, directories: Vec::new() };
        archive.directory("/dev")?;
        archive.entry("/dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[])?;
        Ok(archive)
    }

    /// A directory with its parents; once is enough.
    ///
    /// # Errors
    /// The writer's.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        for (at, _) in path.match_indices('/').skip(1).chain([(path.len(), "")]) {
            let prefix = path[..at].to_owned();
            if !self.directories.contains(&prefix) {
                self.entry(&prefix, DIRECTORY | 0o755, (0, 0), &[])?;
                self.directories.push(prefix);
            }
        }
        Ok(())
    }

    /// A file, executable for everybody.
    ///
    /// # Errors
    /// The writer's, or a file of 4 GiB.
    pub fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.make_parent(path)?;
        self.entry(path, REGULAR | 0o755, (0, 0), content)
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// The writer's.
    pub fn link(&mut self, path: &str, to: &str) -> io::Result<()> {
        self.make_parent(path)?;
        self.entry(path, LINK | 0o777, (0, 0), to.as_bytes())
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// The writer's.
    pub fn finish(mut self) -> io::Result<()> {
        self.entry("/TRAILER!!!", 0, (0, 0), &[])?;
        self.out.flush()
    }

    fn make_parent(&mut self, path: &str) -> io::Result<()> {
        match Path::new(path).parent().and_then(Path::to_str) {
            None | Some("/") => Ok(()),
            Some(parent) => self.directory(parent),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        let name = path.trim_start_matches('/');
        let size = u32::try_from(content.len()).map_err(|_| io::Error::other(format!("{path} exceeds 4 GiB")))?;
        let name_size = u32::try_from(name.len() + 1).expect("path lengths are small");
        let inode = self.next_inode;
        self.next_inode += 1;
        // magic, inode, mode, uid, gid, links, time, size, device, special device, name size, checksum
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let header = fields.iter().fold("070701".to_owned(), |text, field| text + &format!("{field:08x}"));
        self.padded(&[header.as_bytes(), name.as_bytes(), &[0]])?;
        self.padded(&[content])
    }

    fn padded(&mut self, pieces: &[&[u8]]) -> io::Result<()> {
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        for piece in pieces {
            self.out.write_all(piece)?;
        }
        self.out.write_all(&[0; ALIGNMENT_BYTES][..length.next_multiple_of(ALIGNMENT_BYTES) - length])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_parents_come_first() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes).unwrap();
        archive.file("/a/b/c", b"12345").unwrap();
        archive.file("/a/b/d", b"").unwrap();
        archive.finish().unwrap();
        assert_eq!(bytes.len() % ALIGNMENT_BYTES, 0);
        let magics: Vec<usize> = bytes.windows(6).enumerate().filter(|(_, w)| w == b"070701").map(|(i, _)| i).collect();
        assert!(magics.iter().all(|at| at % ALIGNMENT_BYTES == 0), "every header is aligned: {magics:?}");
        let names: Vec<&str> = magics
            .iter()
            .map(|at| std::str::from_utf8(bytes[at + 110..].split(|&b| b == 0).next().unwrap()).unwrap())
            .collect();
        assert_eq!(names, ["dev", "dev/console", "a", "a/b", "a/b/c", "a/b/d", "TRAILER!!!"]);
    }
}
