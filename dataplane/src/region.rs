//! Memory for packets: hugepages of a memfd, near the core that uses them, with normal pages as the fallback.
//!
//! Frames of 64 bytes spread over many small pages miss in the TLB; 2 MiB pages cost 512 times fewer entries. A memfd rather
//! than anonymous memory, because regions may come to be shared with other processes or registered with a device. All
//! pages are there from the start: the first frames of a VM must not pay for page faults, and hugepages that run out later
//! would kill the process. Rejected: transparent hugepages (they come and go as the kernel likes) and a mounted hugetlbfs
//! (something more to set up).

use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;

/// Which pages a region should have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PageSize {
    /// The kernel's normal ones.
    #[default]
    Normal,
    /// 2 MiB.
    Huge2M,
    /// 1 GiB.
    Huge1G,
}

impl PageSize {
    /// Bytes of one page; regions are multiples of it.
    pub fn bytes(self) -> usize {
        match self {
            PageSize::Normal => 4096,
            PageSize::Huge2M => 2 << 20,
            PageSize::Huge1G => 1 << 30,
        }
    }

    /// Flags of memfd_create(2).
    fn memfd_flags(self) -> libc::c_uint {
        let huge = match self {
            PageSize::Normal => 0,
            PageSize::Huge2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            PageSize::Huge1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        };
        libc::MFD_CLOEXEC | huge
    }
}

impl std::fmt::Display for PageSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PageSize::Normal => "normal pages",
            PageSize::Huge2M => "2 MiB pages",
            PageSize::Huge1G => "1 GiB pages",
        })
    }
}

/// A NUMA node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NumaNode(pub u32);

impl NumaNode {
    /// The node of a core; `None` when the kernel does not say (one node, or no such core).
    pub fn of_core(core: usize) -> Option<NumaNode> {
        node_in(&Path::new("/sys/devices/system/cpu").join(format!("cpu{core}")))
    }
}

/// The node that a core's folder in sysfs names: it holds a link `nodeN`.
fn node_in(core: &Path) -> Option<NumaNode> {
    let names = std::fs::read_dir(core).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    names.filter_map(|name| name.strip_prefix("node")?.parse().ok()).map(NumaNode).next()
}

/// Why a region does not have the pages that were asked for; the text names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// Not enough hugepages.
    #[error(
        "{bytes} bytes of {pages} are not to be had ({source}); reserve {count} more, for 2 MiB pages with \
         `sysctl vm.nr_hugepages=N`, for 1 GiB pages on the kernel command line (hugepagesz=1G hugepages=N)"
    )]
    NoHugePages {
        /// Which pages.
        pages: PageSize,
        /// The size of the region.
        bytes: usize,
        /// How many pages that is.
        count: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not even normal memory.
    #[error("{bytes} bytes of memory are not to be had: {source}")]
    NoMemory {
        /// The size of the region.
        bytes: usize,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A piece of memory that is mapped, present, zeroed at first, and owned.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    bytes: usize,
    pages: PageSize,
}

// SAFETY: a region is plain memory that nobody else maps in this process; like a boxed slice it may move between threads,
// and shared references to it only read.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// At least `bytes` of memory on `pages`, near `node` if one is given and has room.
    ///
    /// # Errors
    /// [`RegionError`]; nothing is left behind.
    pub fn map(bytes: usize, pages: PageSize, node: Option<NumaNode>) -> Result<Region, RegionError> {
        let bytes = bytes.max(1).next_multiple_of(pages.bytes());
        Region::try_map(bytes, pages, node).map_err(|source| match pages {
            PageSize::Normal => RegionError::NoMemory { bytes, source },
            _ => RegionError::NoHugePages { pages, bytes, count: bytes / pages.bytes(), source },
        })
    }

    /// As [`Region::map`], on normal pages when there are no others. Also says why, then.
    ///
    /// # Errors
    /// There is no memory at all.
    pub fn map_or_normal(
        bytes: usize,
        pages: PageSize,
        node: Option<NumaNode>,
    ) -> Result<(Region, Option<RegionError>), RegionError> {
        match Region::map(bytes, pages, node) {
            Err(why @ RegionError::NoHugePages { .. }) => Ok((Region::map(bytes, PageSize::Normal, node)?, Some(why))),
            mapped => Ok((mapped?, None)),
        }
    }

    fn try_map(bytes: usize, pages: PageSize, node: Option<NumaNode>) -> io::Result<Region> {
        // SAFETY: the name is a C string that outlives the call.
        let fd = check(unsafe { libc::memfd_create(c"plover".as_ptr(), pages.memfd_flags()) })?;
        // SAFETY: the kernel just gave us this descriptor; nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        rustix::fs::ftruncate(&fd, bytes as u64)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, of a file of that size; hugepages are reserved here.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("mmap gives no null page");
        let region = Region { base, bytes, pages };
        region.prefer(node);
        region.populate()?;
        Ok(region)
    }

    /// Asks for memory of a node. A wish: a kernel without NUMA has only one node anyway.
    fn prefer(&self, node: Option<NumaNode>) {
        const MPOL_PREFERRED: libc::c_int = 1;
        const MASK_BITS: u32 = u64::BITS;
        let Some(NumaNode(node)) = node.filter(|node| node.0 < MASK_BITS) else { return };
        let mask = 1u64 << node;
        // SAFETY: sets a policy for our own mapping; the mask lives across the call and has MASK_BITS bits. The kernel
        // reads one bit less than it is told.
        unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.bytes,
                MPOL_PREFERRED,
                &raw const mask,
                libc::c_ulong::from(MASK_BITS) + 1,
                0,
            );
        }
    }

    /// Makes every page present, without the signal that a plain write gets when there is none.
    fn populate(&self) -> io::Result<()> {
        // SAFETY: our own mapping; its contents stay.
        match check(unsafe { libc::madvise(self.base.as_ptr().cast(), self.bytes, libc::MADV_POPULATE_WRITE) }) {
            // Before Linux 5.14. Hugepages were reserved by mmap.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                for at in (0..self.bytes).step_by(PageSize::Normal.bytes()) {
                    // SAFETY: within the mapping, which nobody else uses yet.
                    unsafe { self.base.add(at).write_volatile(0) };
                }
                Ok(())
            }
            result => result.map(drop),
        }
    }

    /// The pages that it has.
    pub fn pages(&self) -> PageSize {
        self.pages
    }

    /// Where it begins. Whoever writes through this pointer must see to it that no reference to the same bytes is in use.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every reference into it borrowed from this value.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: mapped, initialised (the kernel zeroes pages), and written only through `&mut self` or by an owner that
        // keeps `base`'s contract.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Free hugepages of the system.
    fn free_pages(pages: PageSize) -> usize {
        let folder = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", pages.bytes() >> 10);
        let text = std::fs::read_to_string(Path::new(&folder).join("free_hugepages"));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    #[test]
    fn memory_is_present_zeroed_and_writable() {
        let mut region = Region::map(10_000, PageSize::Normal, NumaNode::of_core(0)).unwrap();
        assert_eq!((region.len(), region.pages()), (3 * 4096, PageSize::Normal));
        assert!(region.iter().all(|byte| *byte == 0));
        region.fill(7);
        assert_eq!(region[12_287], 7);
    }

    #[test]
    fn more_hugepages_than_there_are_fall_back_and_name_the_remedy() {
        for pages in [PageSize::Huge2M, PageSize::Huge1G] {
            // One more than any machine has free now; reserving them fails before any is touched.
            let bytes = (free_pages(pages) + (64 << 20)).saturating_mul(pages.bytes());
            let text = Region::map(bytes, pages, None).unwrap_err().to_string();
            assert!(text.contains("vm.nr_hugepages") && text.contains(&pages.to_string()), "{text}");
        }
        if free_pages(PageSize::Huge1G) == 0 {
            let (region, why) = Region::map_or_normal(5 << 20, PageSize::Huge1G, None).unwrap();
            assert_eq!((region.pages(), region.len()), (PageSize::Normal, 5 << 20));
            assert!(why.unwrap().to_string().contains("hugepagesz=1G"));
        }
    }

    #[test]
    fn sysfs_names_the_node_of_a_core() {
        let dir = std::env::temp_dir().join(format!("plover-numa-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("cpu3/node17")).unwrap();
        std::fs::create_dir_all(dir.join("cpu4/topology")).unwrap();
        let (named, silent) = (node_in(&dir.join("cpu3")), node_in(&dir.join("cpu4")));
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!((named, silent), (Some(NumaNode(17)), None));
        assert_eq!(NumaNode::of_core(usize::MAX), None);
    }
}
