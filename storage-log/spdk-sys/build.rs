//! Finds the SPDK that is installed, compiles the shim against its headers and links its static libraries.
//!
//! Static and whole: SPDK's transports and DPDK's drivers register themselves in constructors that no symbol refers
//! to, so a linker that picks objects leaves them out and no device is ever found. Without the feature this does
//! nothing, so machines without SPDK build everything else.

#[cfg(not(feature = "spdk"))]
fn main() {}

#[cfg(feature = "spdk")]
fn main() {
    if let Err(problem) = spdk::build() {
        eprintln!(
            "error: the feature «spdk» needs an installed SPDK {}.{:02} or newer: {problem}\n  \
             Install SPDK with its static libraries, set PKG_CONFIG_PATH to its lib/pkgconfig if it is not in the \
             system's path, and see docs/spdk.md; or build without the feature.",
            spdk::OLDEST.0,
            spdk::OLDEST.1
        );
        std::process::exit(1);
    }
}

#[cfg(feature = "spdk")]
mod spdk {
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};

    /// Year and month. Older ones lack the sized options that the shim sets.
    pub const OLDEST: (u32, u32) = (24, 9);
    /// The newest that the guest test has run with; newer ones get a warning.
    const NEWEST_TESTED: (u32, u32) = (26, 5);

    pub fn build() -> Result<(), String> {
        println!("cargo::rerun-if-changed=src/shim.c");
        let mut includes = BTreeSet::new();
        let mut directories = BTreeSet::new();
        // In link order, each once.
        let mut libraries: Vec<Library> = Vec::new();
        // syslibs: what the static libraries themselves need (isa-l, OpenSSL, libnuma).
        for name in ["spdk_nvme", "spdk_env_dpdk", "spdk_syslibs"] {
            let found = pkg_config::Config::new()
                .cargo_metadata(false)
                .env_metadata(true)
                .statik(true)
                .probe(name)
                .map_err(|_| format!("«pkg-config --static {name}» does not find it"))?;
            includes.extend(found.include_paths);
            directories.extend(found.link_paths);
            for library in found.libs {
                push(&mut libraries, Library { name: library, file: None });
            }
            for file in found.link_files {
                let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
                let name = stem.trim_start_matches("lib").to_owned();
                push(&mut libraries, Library { name, file: Some(file) });
            }
        }
        check_version(&includes)?;
        let mut shim = cc::Build::new();
        shim.file("src/shim.c").includes(&includes).warnings(true).extra_warnings(true).warnings_into_errors(true);
        shim.flag("-Wno-unused-parameter");
        shim.try_compile("plover_spdk_shim").map_err(|error| format!("the shim does not compile: {error}"))?;
        link(&directories, &libraries)
    }

    struct Library {
        name: String,
        /// When pkg-config gives a path instead of a name.
        file: Option<PathBuf>,
    }

    fn push(libraries: &mut Vec<Library>, library: Library) {
        if !libraries.iter().any(|known| known.name == library.name) {
            libraries.push(library);
        }
    }

    fn check_version(includes: &BTreeSet<PathBuf>) -> Result<(), String> {
        let header = includes.iter().map(|directory| directory.join("spdk/version.h")).find(|path| path.exists());
        let header = header.ok_or("its headers are missing (spdk/version.h)")?;
        let text = std::fs::read_to_string(&header).map_err(|error| format!("{}: {error}", header.display()))?;
        let number = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(&format!("#define {name}")));
            let value = line.and_then(|line| line.split_whitespace().nth(2)?.parse::<u32>().ok());
            value.ok_or_else(|| format!("{} does not define {name}", header.display()))
        };
        let version = (number("SPDK_VERSION_MAJOR")?, number("SPDK_VERSION_MINOR")?);
        if version < OLDEST {
            return Err(format!("{} is of version {}.{:02}", header.display(), version.0, version.1));
        }
        if version > NEWEST_TESTED {
            println!(
                "cargo::warning=SPDK {}.{:02} is newer than {}.{:02}, the newest that Plover was tested with",
                version.0, version.1, NEWEST_TESTED.0, NEWEST_TESTED.1
            );
        }
        Ok(())
    }

    fn link(directories: &BTreeSet<PathBuf>, libraries: &[Library]) -> Result<(), String> {
        for directory in directories {
            println!("cargo::rustc-link-search=native={}", directory.display());
        }
        for Library { name, file } in libraries {
            if name.starts_with("spdk_") || name.starts_with("rte_") {
                if archive(directories, name).is_none() {
                    let places: Vec<String> = directories.iter().map(|path| path.display().to_string()).collect();
                    return Err(format!("lib{name}.a is not in {}", places.join(":")));
                }
                println!("cargo::rustc-link-lib=static:+whole-archive,-bundle={name}");
            } else if let Some(installed) = file.clone().or_else(|| archive(directories, name)) {
                let directory = installed.parent().unwrap_or(Path::new("/"));
                println!("cargo::rustc-link-search=native={}", directory.display());
                println!("cargo::rustc-link-lib=static:-bundle={name}");
            } else {
                println!("cargo::rustc-link-lib=dylib={name}");
            }
        }
        Ok(())
    }

    fn archive(directories: &BTreeSet<PathBuf>, name: &str) -> Option<PathBuf> {
        directories.iter().map(|directory| directory.join(format!("lib{name}.a"))).find(|path| path.exists())
    }
}
