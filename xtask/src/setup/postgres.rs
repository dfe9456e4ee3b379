//! PostgreSQL's part of its guest image: the server's data directory, as initdb makes it.
//!
//! Made here and not when the guest boots, where it would take ten seconds each time. initdb wants another user than
//! root, so root runs it in a user namespace of its own, in which it is one; everybody else runs it as it is.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use rig::cpio::Archive;

use super::guests::{RECIPE, only_match};
use super::{Part, Setup};
use crate::progress::output;

/// The server in the unpacked packages.
pub const SERVER: &str = "usr/lib/postgresql/*/bin/postgres";
const INITDB: &str = "usr/lib/postgresql/*/bin/initdb";
/// Read when a session asks for a time zone by its short name, which each does at its start.
const ZONES: &str = "usr/share/postgresql/*/timezonesets";
const PART: &str = "postgres-data";
/// The guest has one user and one network.
const ACCESS: &str = "host all all 0.0.0.0/0 trust\n";

/// Makes the data directory in `target/rig/postgres-data`.
pub fn make_data(setup: &Setup) -> Result<()> {
    let root = setup.path("guest-root");
    let recipe = format!("1 {RECIPE} {ACCESS}");
    setup.make(&Part { path: PART, what: "an empty PostgreSQL database", recipe }, |work| {
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|place| root.join(place));
        let search = libraries.map(|place| place.display().to_string()).join(":");
        let mut command = if rig::is_root() {
            let mut command = Command::new("unshare");
            command.args(["--user", "--map-user=1000", "--map-group=1000"]).arg(only_match(&root, INITDB)?);
            command
        } else {
            Command::new(only_match(&root, INITDB)?)
        };
        // Small segments of the log: an image holds one of them.
        let arguments =
            ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--wal-segsize=1"];
        command.args(arguments).arg("-D").arg(work).env("LD_LIBRARY_PATH", search).env("TZ", "GMT");
        output(&mut command)?;
        let mut file = File::options().append(true).open(work.join("pg_hba.conf"))?;
        Ok(file.write_all(ACCESS.as_bytes())?)
    })
}

/// Puts data and what the server reads besides into the image.
pub fn write_data(setup: &Setup, archive: &mut Archive<BufWriter<File>>) -> Result<()> {
    write_tree(archive, &setup.path(PART), "/data", &["postgresql.conf"])?;
    let root = setup.path("guest-root");
    let zones = only_match(&root, ZONES)?;
    let below = zones.strip_prefix(&root).context("a match lies below its root")?;
    write_tree(archive, &zones, &format!("/{}", below.display()), &[])
}

/// Everything in the directory `from`, without files of the names in `except`.
fn write_tree(archive: &mut Archive<BufWriter<File>>, from: &Path, to: &str, except: &[&str]) -> Result<()> {
    archive.directory(to)?;
    let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
    let mut entries = entries.collect::<Result<Vec<_>, _>>()?;
    // In an order of our own: the same files make the same image.
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_str().with_context(|| format!("{} is no text", path.display()))?;
        let inside = format!("{to}/{name}");
        if path.is_dir() {
            write_tree(archive, &path, &inside, except)?;
        } else if !except.contains(&name) {
            let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            archive.file(&inside, &content)?;
        }
    }
    Ok(())
}
