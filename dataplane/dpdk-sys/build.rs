//! Finds the DPDK that is installed, compiles the shim against its headers and links the libraries that the shim calls.
//!
//! Shared libraries: the drivers are plugins beside them, which DPDK loads by itself, so a driver that a distribution adds
//! needs no new build. Without the feature this does nothing, so machines without DPDK build everything else.

#[cfg(not(feature = "dpdk"))]
fn main() {}

#[cfg(feature = "dpdk")]
fn main() {
    if let Err(problem) = build() {
        eprintln!(
            "error: the feature «dpdk» needs an installed DPDK {OLDEST} or newer with shared libraries: {problem}\n  \
             Install it (Debian: libdpdk-dev), set PKG_CONFIG_PATH if it is not in the system's path, and see \
             docs/uplinks.md; or build without the feature."
        );
        std::process::exit(1);
    }
}

/// Older ones name the flags of packets differently.
#[cfg(feature = "dpdk")]
const OLDEST: &str = "22.11";

/// What the shim calls, in link order.
#[cfg(feature = "dpdk")]
const LIBRARIES: [&str; 5] = ["rte_ethdev", "rte_mbuf", "rte_mempool", "rte_eal", "rte_ring"];

#[cfg(feature = "dpdk")]
fn build() -> Result<(), String> {
    println!("cargo::rerun-if-changed=src/shim.c");
    let found = pkg_config::Config::new()
        .cargo_metadata(false)
        .env_metadata(true)
        .atleast_version(OLDEST)
        .probe("libdpdk")
        .map_err(|_| format!("«pkg-config --atleast-version {OLDEST} libdpdk» does not find it"))?;
    let mut shim = cc::Build::new();
    shim.file("src/shim.c").warnings(true).extra_warnings(true).warnings_into_errors(true);
    for directory in &found.include_paths {
        // As system headers, which are not ours to warn about.
        shim.flag("-isystem").flag(directory);
    }
    // What pkg-config says beside the directories: DPDK's headers need at least SSE 4.2, and their configuration first.
    shim.flag("-march=corei7").flag("-include").flag("rte_config.h").flag("-Wno-unused-parameter");
    shim.try_compile("plover_dpdk_shim").map_err(|error| format!("the shim does not compile: {error}"))?;
    for directory in &found.link_paths {
        println!("cargo::rustc-link-search=native={}", directory.display());
    }
    for library in LIBRARIES {
        println!("cargo::rustc-link-lib=dylib={library}");
    }
    Ok(())
}
