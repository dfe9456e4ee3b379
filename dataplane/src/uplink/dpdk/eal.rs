//! DPDK's environment: started once per process, in a thread of its own.
//!
//! DPDK pins the thread that starts it and takes cores for its own threads. Ours are pinned by the reactor, so the thread here
//! ends at once, and DPDK is told of one core that is all of them.

use super::DpdkError;
use std::ffi::CString;
use std::fmt::Write as _;
use std::sync::OnceLock;

const HUGE_PAGE_MIB: u64 = 2;
const FREE_HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// What DPDK gets from this process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EalOptions {
    /// Memory for packets of all ports, MiB.
    pub memory_mib: u64,
    /// PCI addresses of the ports that it may drive; without any it looks at no PCI device.
    pub pci: Vec<String>,
    /// More words for its command line; they come last.
    pub arguments: Vec<String>,
}

/// Starts DPDK, unless it runs already: then the options are those of the first call.
///
/// # Errors
/// DPDK would not start. It cannot be tried again in this process, and later calls give the same error.
pub fn start(options: &EalOptions) -> Result<(), DpdkError> {
    static STARTED: OnceLock<i32> = OnceLock::new();
    let result = *STARTED.get_or_init(|| {
        let words = command_line(options, free_huge_mib());
        tracing::info!(arguments = words.join(" "), "DPDK starts");
        let thread = std::thread::Builder::new().name("dpdk-start".into()).spawn(move || init(words));
        thread.ok().and_then(|thread| thread.join().ok()).unwrap_or(-libc::EAGAIN)
    });
    if result == 0 { Ok(()) } else { Err(DpdkError::NotStarted { source: super::error(result) }) }
}

fn init(words: Vec<String>) -> i32 {
    let owned: Vec<CString> = words.into_iter().filter_map(|word| CString::new(word).ok()).collect();
    // DPDK keeps pointers into its command line.
    let owned: &'static mut [CString] = owned.leak();
    let pointers: Vec<*mut libc::c_char> = owned.iter().map(|word| word.as_ptr().cast_mut()).collect();
    let pointers: &'static mut [*mut libc::c_char] = pointers.leak();
    let count = libc::c_int::try_from(pointers.len()).expect("a short command line");
    // SAFETY: an array of `count` NUL-terminated strings, which live as long as the process; DPDK reorders the array and does
    // not write to the strings.
    unsafe { dpdk_sys::plover_dpdk_init(count, pointers.as_mut_ptr()) }
}

fn command_line(options: &EalOptions, free_huge_mib: u64) -> Vec<String> {
    let mut words: Vec<String> =
        ["plover", "--no-telemetry", "--iova-mode=va", "--log-level=warning"].map(Into::into).into();
    // Both keep files out of the file system, so that a second process finds nothing to join and nothing is left behind.
    let refused = options.arguments.iter().any(|word| word == "--no-huge");
    if refused {
        words.push("--no-shconf".into());
    } else if free_huge_mib >= options.memory_mib {
        words.push("--in-memory".into());
    } else {
        tracing::warn!(
            free_huge_mib,
            memory_mib = options.memory_mib,
            "too few free huge pages for DPDK, it uses normal ones, which real NICs cannot: reserve them (vm.nr_hugepages)"
        );
        words.extend(["--no-huge".into(), "--no-shconf".into()]);
    }
    words.extend(["-m".into(), options.memory_mib.to_string()]);
    words.push(format!("--lcores=0@({})", own_cores()));
    match options.pci.as_slice() {
        [] => words.push("--no-pci".into()),
        addresses => words.extend(addresses.iter().flat_map(|address| ["-a".into(), address.clone()])),
    }
    words.extend(options.arguments.iter().cloned());
    words
}

fn free_huge_mib() -> u64 {
    let text = std::fs::read_to_string(FREE_HUGE_PAGES).unwrap_or_default();
    text.trim().parse::<u64>().unwrap_or(0) * HUGE_PAGE_MIB
}

/// The cores on which this thread may run, as DPDK writes them.
fn own_cores() -> String {
    let mut list = String::new();
    if let Ok(set) = rustix::thread::sched_getaffinity(None) {
        for core in (0..rustix::thread::CpuSet::MAX_CPU).filter(|core| set.is_set(*core)) {
            let comma = if list.is_empty() { "" } else { "," };
            let _ = write!(list, "{comma}{core}");
        }
    }
    if list.is_empty() { "0".into() } else { list }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_device_is_touched_that_was_not_named() {
        let options = EalOptions { memory_mib: 64, pci: Vec::new(), arguments: vec!["--log-level=debug".into()] };
        let line = command_line(&options, 64).join(" ");
        assert!(line.contains("--no-pci") && line.contains("--in-memory") && !line.contains("--no-huge"), "{line}");
        assert!(line.ends_with(" --log-level=debug"), "{line}");
        let options = EalOptions { pci: vec!["0000:01:00.0".into()], ..options };
        let line = command_line(&options, 63).join(" ");
        assert!(line.contains("-a 0000:01:00.0") && !line.contains("--no-pci"), "{line}");
        assert!(line.contains("--no-huge --no-shconf") && !line.contains("--in-memory"), "{line}");
        let options = EalOptions { arguments: vec!["--no-huge".into()], ..options };
        let words = command_line(&options, 1 << 20);
        assert!(!words.contains(&"--in-memory".into()), "the two exclude each other: {words:?}");
        assert_eq!(words.iter().filter(|word| *word == "--no-huge").count(), 1);
    }
}
